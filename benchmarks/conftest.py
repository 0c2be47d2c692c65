"""Tables of the benchmarks that ran are printed at the end: `make bench`, or OMP_NUM_THREADS=2 python -m pytest benchmarks."""
import pytest

_tables = []


@pytest.fixture
def tables():
    """Append Markdown here to have it printed after the run."""
    return _tables


def pytest_terminal_summary(terminalreporter):
    for text in _tables: terminalreporter.write_line(""); terminalreporter.write_line(text)
