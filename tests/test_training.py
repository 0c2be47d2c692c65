"""`fit` where a notebook cannot go: processes that are killed, processes that work together, optimizers of other people, and what it costs."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from efftrain.state import last_state, read_state
from efftrain.training import _share, classification_loss, cosine_schedule, evaluate_accuracy, fit, linear_schedule, lm_loss, set_seed

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def data(n=48):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=g)
    return x, (x.sum(1) > 0).long()


def network(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))


def loader(**kwargs): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=10, shuffle=True, **kwargs)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- kill -9

KILLED = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_training import *
import accelerate.utils, pandas, safetensors.torch, torch._dynamo, torch.optim.lr_scheduler
folder, cases = sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)

def run(when):
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    count = {"replace": 0, "fsync": 0}
    def dying(name):
        real = getattr(os, name)
        def call(*args):
            count[name] += 1
            if when == f"{name} {count[name]}": kill()
            return real(*args)
        return call
    for name in count: setattr(os, name, dying(name))
    def after_step(model, optimizer, step):
        if when == f"step {step}": kill()
        if when.startswith("after"): time.sleep(0.02)
    run_to_kill(folder, after_step)
    os._exit(0)

left = []
for when in cases:  # each in a process of its own, forked from this one, which has imported everything and computed nothing
    process, before = os.fork(), last_state(folder)
    if process == 0: run(when)
    if when.startswith("after"):  # a moment that nobody chose, once something new is saved
        start = time.time()
        while last_state(folder) == before and time.time() - start < 60: time.sleep(0.002)
        time.sleep(float(when.split()[1]))
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    weights, training = read_state(last_state(folder))
    left.append([os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), last_state(folder).name, training["step"]])
print(json.dumps(left))
"""


def run_to_kill(folder, after_step=None):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    history = fit(net, classification_loss, loader(), optimizer, 24, scheduler=cosine_schedule(optimizer, 24), clip=1.0, seed=3, after_step=after_step,
                  evaluate=lambda m: {"accuracy": evaluate_accuracy(m, data())}, eval_every=7, save_to=folder, save_every=5, resume=True)
    return history, net


def in_processes(tmp_path, *cases):
    """What a run killed at each of `cases`, one after the other, leaves: (signal, newest state, its step)."""
    (tmp_path / "run.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "run.py", Path(__file__).parent, tmp_path / "state", json.dumps(cases)], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(left) for left in json.loads(done.stdout)]


def test_kill_9(tmp_path):
    """One run is killed between two saves, twice while it writes a state, between the new state's rename and the removal of the old one, and at moments that nobody chose. It ends as if nothing had happened."""
    left = in_processes(tmp_path, "step 8", "fsync 3", "replace 2", "fsync 8", "after 0.03", "never")
    assert left[:4] == [(9, "step000005", 5), (9, "step000005", 5), (9, "step000010", 10), (9, "step000015", 15)]
    assert left[4][2] > 15 and left[5] == (0, "step000024", 24)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step000024"], "no rest of the killed ones"

    whole, net = run_to_kill(tmp_path / "other")
    again, resumed = run_to_kill(tmp_path / "state")  # finished: it is read, not trained
    assert whole.equals(again) and same(net, resumed)


def test_kill_at_any_time(tmp_path):
    """Killed from outside at moments that nobody chose, again and again."""
    left = in_processes(tmp_path, "after 0.05", "after 0.11", "after 0.02", "never")
    assert left[0][0] == 9 and left[-1][0] == 0
    assert run_to_kill(tmp_path / "state")[0].equals(run_to_kill(tmp_path / "other")[0])


# ---------------------------------------------------------------- several processes

SEVERAL = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from test_training import *
out, folder = sys.argv[2:4]
torch.set_num_threads(1)
rank = int(os.environ.get("RANK", 0))
results = several(folder)
if rank == 0: json.dump(results, open(out, "w"))
"""


class Unused(nn.Module):
    """The second layer takes no part (as a pooler that nobody asks): DDP must be told."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x): return self.used(x)


def several(folder):
    """Everything that must be the same on one process and on two, as numbers; what must not, as messages."""
    x, y = data()
    rows = lambda n: lambda step: (x[step % 4 * n:][:n], y[step % 4 * n:][:n])
    adam = lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2)
    numbers = lambda history, net: [history.drop(columns="step").fillna(-1).values.tolist(), [p.double().sum().item() for p in net.parameters()]]
    out = {}
    for n in (8, 7, 3):  # 7 and 3 do not split evenly
        net = network(dropout=0.0)
        out[f"rows {n}"] = numbers(fit(net, classification_loss, rows(n), adam(net), 6, clip=0.1, evaluate=lambda m: {"accuracy": evaluate_accuracy(m, (x, y))}, eval_every=2), net)
        out[f"rows {n} again"] = numbers(fit(net, classification_loss, rows(n), adam(net), 3), net)  # the same model a second time
    net = network(dropout=0.0)
    out["loader"] = numbers(fit(net, classification_loss, loader(), adam(net), 8, seed=0), net)
    net = Unused()
    out["unused parameters"] = numbers(fit(net, classification_loss, rows(8), adam(net), 4), net)

    def padded(model, batch):  # rows 0 and 1 hold most of what counts, and they are in the first process
        x, y, keep = batch
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        return (losses * keep).sum() / keep.sum(), keep.sum()
    net, keep = network(dropout=0.0), torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 1])
    out["weights"] = numbers(fit(net, padded, lambda step: (x[:8], y[:8], keep), adam(net), 4), net)

    seen = []
    net = network(dropout=0.0)
    fit(net, classification_loss, rows(8), adam(net), 2, after_backward=lambda m, step: seen.append(m[0].weight.grad.double().sum().item()))
    out["gradients in a hook"] = [[seen], []]

    def fresh(): net = network(dropout=0.0); return net, adam(net)
    class Dies:
        def __call__(self, model, optimizer, step):
            if step == 5: raise RuntimeError("power failure")
    net, optimizer = fresh()
    try: fit(net, classification_loss, rows(7), optimizer, 8, seed=0, save_to=folder, save_every=3, after_step=Dies())
    except RuntimeError: pass
    net, optimizer = fresh()
    resumed = fit(net, classification_loss, rows(7), optimizer, 8, seed=0, save_to=folder, save_every=3, resume=True)
    straight, straight_optimizer = fresh()
    whole = fit(straight, classification_loss, rows(7), straight_optimizer, 8, seed=0)
    assert resumed.equals(whole) and same(net, straight)
    out["resumed"] = numbers(resumed, net)

    messages = {}
    for name, batches in [("too few", rows(1)), ("other values", lambda step: tuple(t[torch.randperm(8)] for t in (x[:8], y[:8]))), ("no rows", lambda step: 3)]:
        net, optimizer = fresh()
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        try: fit(net, lambda m, b: classification_loss(m, b if isinstance(b, tuple) else (x, y)), batches, optimizer, 1)
        except ValueError as error: messages[name] = str(error)
    return {"numbers": out, "messages": messages}


def test_two_processes_as_one(tmp_path):
    """The same calls under `accelerate launch` on two processes: the same losses, norms, evaluations and weights; a state of two processes is not taken for one."""
    (tmp_path / "several.py").write_text(SEVERAL)
    done = subprocess.run([sys.executable, *LAUNCH, tmp_path / "several.py", Path(__file__).parent, tmp_path / "two.json", tmp_path / "state"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads((tmp_path / "two.json").read_text()), several(tmp_path / "one")
    assert two["numbers"].keys() == one["numbers"].keys()
    for name, (table, weights) in one["numbers"].items():
        assert np.allclose(table, two["numbers"][name][0], rtol=1e-5, atol=1e-6) and np.allclose(weights, two["numbers"][name][1], rtol=1e-4, atol=1e-5), name
    assert one["messages"] == {}
    assert "a batch of 1 rows cannot be shared among 2 processes" in two["messages"]["too few"]
    assert "other values in other processes" in two["messages"]["other values"] and "must be tensors" in two["messages"]["no rows"]

    net = network(dropout=0.0)
    x, y = data()
    with pytest.raises(ValueError, match="processes: saved 2, now 1"):
        fit(net, classification_loss, lambda step: (x[step % 4 * 7:][:7], y[step % 4 * 7:][:7]), torch.optim.AdamW(net.parameters(), lr=1e-2), 8, seed=0, save_to=tmp_path / "state", resume=True)


FSDP = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from test_training import *
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
torch.set_num_threads(1)
# Accelerate offers FSDP on GPUs alone; PyTorch's own works on gloo too, so we tell Accelerate that this is one
Accelerator(cpu=True, mixed_precision="no")
for state in (AcceleratorState, PartialState): state._shared_state["distributed_type"] = DistributedType.FSDP
AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False)
whole, kinds = language(None)
assert DTensor in kinds, "the parameters were sharded"
try: language(sys.argv[3], dies_at=5)
except RuntimeError: pass
resumed, _ = language(sys.argv[3])
finished, _ = language(sys.argv[3])
if int(os.environ["RANK"]) == 0: json.dump([h.fillna(-1).values.tolist() for h in (whole, resumed, finished)], open(sys.argv[2], "w"))
"""


def language(folder, dies_at=None):
    """A small language model with tied weights, and the classes that its parameters had during training."""
    from efftrain.models import llama
    from efftrain.training import evaluate_lm
    tokens = torch.randint(0, 64, (2000,), generator=torch.Generator().manual_seed(0))
    net, kinds = llama(dim=32, layers=1, vocab=64, length=16), set()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

    def after_step(model, optimizer, step):
        kinds.update(type(p.data) for p in optimizer.param_groups[0]["params"])
        if step == dies_at: raise RuntimeError("power failure")
    history = fit(net, lm_loss, lambda step: tokens[step * 112:][:112].view(7, 16), optimizer, 8, scheduler=cosine_schedule(optimizer, 8), clip=0.5, seed=0, after_step=after_step,
                  evaluate=lambda m: {"valid": evaluate_lm(m, tokens[:320], length=16)}, eval_every=3, save_to=folder, save_every=folder and 3, resume=folder is not None)
    return history, kinds


def test_fsdp(tmp_path):
    """Sharded over two processes: the losses of one; saved whole, resumed bit for bit, and the weights can be read by anyone."""
    (tmp_path / "fsdp.py").write_text(FSDP)
    done = subprocess.run([sys.executable, *LAUNCH, tmp_path / "fsdp.py", Path(__file__).parent, tmp_path / "two.json", tmp_path / "state"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed, finished = json.loads((tmp_path / "two.json").read_text())
    one, _ = language(None)
    assert np.allclose(one.fillna(-1).values, whole, rtol=1e-5, atol=1e-6)
    assert whole == resumed == finished
    weights, _ = read_state(last_state(tmp_path / "state"))
    assert weights["model.embed_tokens.weight"].shape == (64, 32)


# ---------------------------------------------------------------- resume, in one process

OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True), "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
              "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2), "lion": lambda p: __import__("lion_pytorch").Lion(p, lr=1e-3, weight_decay=0.1),
              "groups": lambda p: torch.optim.AdamW([{"params": [q for q in p if q.ndim > 1]}, {"params": [q for q in p if q.ndim == 1], "weight_decay": 0.0, "lr": 3e-3}], lr=1e-2)}


class Dies:
    def __init__(self, at=None): self.at = at
    def __call__(self, model, optimizer, step):
        if step == self.at: raise RuntimeError("power failure")


def interrupted(folder, make, dies_at, steps=11, **kwargs):
    """History and model of a run that dies after `dies_at` updates and is resumed, and of one that does not."""
    results = []
    for place, at in [(folder / "a", None), (folder / "b", dies_at), (folder / "b", None)]:
        net, optimizer, batches, scheduler = make()
        try: results.append((fit(net, classification_loss, batches, optimizer, steps, scheduler=scheduler, seed=5, after_step=Dies(at), save_to=place, save_every=3, resume=True, **kwargs), net))
        except RuntimeError: assert at is not None
    return results


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact_with_every_optimizer(tmp_path, name):
    def make():
        net = network()
        optimizer = OPTIMIZERS[name](list(net.parameters()))
        return net, optimizer, loader(), linear_schedule(optimizer, 11)
    (whole, a), (resumed, b) = interrupted(tmp_path, make, dies_at=8)
    assert whole.equals(resumed) and same(a, b)


@pytest.mark.parametrize("scheduler", [lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=11), lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4), lambda o: None])
def test_resume_is_exact_with_other_schedulers(tmp_path, scheduler):
    def make():
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return net, optimizer, loader(), scheduler(optimizer)
    (whole, a), (resumed, b) = interrupted(tmp_path, make, dies_at=5)
    assert whole.equals(resumed) and same(a, b)


@pytest.mark.parametrize("dies_at", [1, 3, 4, 5, 6, 10])  # an epoch has 5 batches: before, at and after its end and the saves
def test_resume_wherever_an_epoch_ends(tmp_path, dies_at):
    def make(): net = network(); return net, torch.optim.SGD(net.parameters(), lr=0.1), loader(), None
    (whole, a), (resumed, b) = interrupted(tmp_path, make, dies_at)
    assert whole.equals(resumed) and same(a, b)


@pytest.mark.parametrize("kind", ["function with random numbers", "generator", "list", "loader with workers"])
def test_resume_with_other_sources(tmp_path, kind):
    x, y = data()
    rows = lambda i: (x[i % 4 * 10:][:10], y[i % 4 * 10:][:10])
    def batches():
        if kind == "generator": return (rows(i) for i in range(11))
        if kind == "list": return [rows(i) for i in range(4)]
        if kind == "loader with workers": return loader(num_workers=1)
        return lambda step: tuple(t[torch.randint(0, len(x), (10,), generator=None)] if t is x else t[:10] for t in (x, y))
    def make(): net = network(); return net, torch.optim.SGD(net.parameters(), lr=0.1), batches(), None
    (whole, a), (resumed, b) = interrupted(tmp_path, make, 8)
    assert whole.equals(resumed) and same(a, b)


def test_a_function_that_is_none_of_the_step_is_found_out(tmp_path):
    """`lambda step: next(iterator)` looks like a function of the step. After a resume it would start from the first batch again."""
    def make():
        net, stream = network(), iter([b for _ in range(3) for b in loader()])
        return net, torch.optim.SGD(net.parameters(), lr=0.1), lambda step: next(stream), None
    with pytest.raises(ValueError, match="no function of the step"): interrupted(tmp_path, make, 8)


def test_resume_keeps_dtypes_and_hooks(tmp_path):
    """bfloat16 weights with float32 moments, and a hook that counts."""
    class Float32Momentum(torch.optim.Optimizer):
        def __init__(self, params): super().__init__(params, {"lr": 0.05})
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.float32))
                m.mul_(0.9).add_(p.grad.float())
                p.data.add_(m.to(p.dtype), alpha=-0.05)

    class Counts:
        def __init__(self, dies_at=None): self.calls, self.dies_at = 0, dies_at
        def __call__(self, model, optimizer, step):
            self.calls += 1
            if step == self.dies_at: raise RuntimeError("power failure")
        def state_dict(self): return {"calls": self.calls}
        def load_state_dict(self, state): self.calls = state["calls"]

    def go(folder, dies_at=None):
        net, count = network().bfloat16(), Counts(dies_at)
        optimizer = Float32Momentum(net.parameters())
        x, y = data()
        try: return fit(net, classification_loss, lambda step: (x.bfloat16(), y), optimizer, 10, seed=0, after_step=count, save_to=folder, save_every=4, resume=True), net, optimizer, count
        except RuntimeError: pass
    whole = go(tmp_path / "a"); go(tmp_path / "b", 7); resumed = go(tmp_path / "b")
    assert whole[0].equals(resumed[0]) and same(whole[1], resumed[1]) and resumed[3].calls == 10
    for a, b in zip(whole[2].state.values(), resumed[2].state.values(), strict=True): assert a["m"].dtype == b["m"].dtype == torch.float32 and torch.equal(a["m"], b["m"])


def test_an_existing_state_is_not_overwritten(tmp_path):
    net = network()
    go = lambda **kwargs: fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 2, save_to=tmp_path, **kwargs)
    go()
    with pytest.raises(FileExistsError, match="resume=True"): go()
    for change, words in [(dict(clip=1.0), "clip: saved None, now 1.0"), (dict(seed=1), "seed: saved None, now 1"), (dict(precision="bf16"), "precision: saved 'no', now 'bf16'")]:
        with pytest.raises(ValueError, match=words): go(resume=True, **change)
    os.truncate(last_state(tmp_path) / "training.pt", 100)
    with pytest.raises(ValueError, match="cannot be read"): go(resume=True)


def test_resume_with_the_objects_of_the_interrupted_call(tmp_path):
    """Someone stops the cell and runs it again: model, optimizer and scheduler are used ones."""
    net = network(); optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2); scheduler = cosine_schedule(optimizer, 11)
    go = lambda at: fit(net, classification_loss, loader(), optimizer, 11, scheduler=scheduler, seed=5, after_step=Dies(at), save_to=tmp_path / "a", save_every=3, resume=True)
    with pytest.raises(RuntimeError, match="power"): go(8)
    def make(): net = network(); o = torch.optim.AdamW(net.parameters(), lr=1e-2); return net, o, loader(), cosine_schedule(o, 11)
    (whole, a), _ = interrupted(tmp_path / "other", make, 8)
    assert go(None).equals(whole) and same(a, net)


# ---------------------------------------------------------------- leaving no trace

def test_evaluation_changes_nothing():
    """A run with dropout that is evaluated at every step, with random numbers, gives the losses of one that is not."""
    def go(**kwargs):
        net = network()
        return fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 9, seed=0, **kwargs)
    noisy = lambda m: {"value": float(torch.rand(1) + np.random.rand())}
    assert go()["loss"].equals(go(evaluate=noisy, eval_every=1)["loss"])


def test_modes_forward_and_accelerate_are_given_back():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have made an Accelerator of its own
    net = network()
    net[0].eval()
    before, forward = [m.training for m in net.modules()], net.forward
    go = lambda precision, **kwargs: fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 2, precision=precision, **kwargs)
    go("bf16"); go("no"); go("bf16")
    with pytest.raises(ZeroDivisionError): go("bf16", after_step=lambda *a: 1 / 0)
    assert [m.training for m in net.modules()] == before and net.forward == forward and "forward" not in vars(net) and not hasattr(net, "_is_accelerate_prepared")
    assert AcceleratorState._shared_state == {} == PartialState._shared_state
    mine = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
    try:
        go("no")
        assert mine.mixed_precision == "bf16" and mine.gradient_accumulation_steps == 3
    finally: AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_is_bf16():
    kinds = []
    class Watch(nn.Linear):
        def forward(self, x): out = super().forward(x); kinds.append(out.dtype); return out
    net = nn.Sequential(Watch(8, 16), nn.ReLU(), Watch(16, 2))
    history = fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 2, precision="bf16")
    assert set(kinds) == {torch.bfloat16} and net[0].weight.dtype == torch.float32 and history["loss"].notna().all()
    with pytest.raises(ValueError, match="'fp16', which needs a GPU"): fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 2, precision="fp16", device="cpu")


def test_fp16_scales_skips_and_unscales(monkeypatch):
    """The way of a GPU in half precision, on a CPU: the loss is scaled, a step whose gradients overflow is skipped together with the scheduler, hooks and the norm see unscaled gradients."""
    from contextlib import contextmanager
    from efftrain import training
    real = training._accelerator

    @contextmanager
    def half(precision, device):
        with real("no", "cpu") as accelerator:
            accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000), True, "fp16"
            yield accelerator
    x, y = data()
    norms, results = [], []
    for accelerator in (real, half):
        monkeypatch.setattr(training, "_accelerator", accelerator)
        net = network(dropout=0.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        hook = None if accelerator is real else lambda m, step: norms.append(nn.utils.get_total_norm([p.grad for p in m.parameters()]).item())
        results.append(fit(net, classification_loss, lambda step: (x, y), optimizer, 20, scheduler=linear_schedule(optimizer, 20), clip=10.0, after_backward=hook))
    full, half = results
    skipped = (~np.isfinite(half["grad_norm"])).sum()
    assert 0 < skipped < 12 and np.array_equal(half["grad_norm"], norms, equal_nan=True)
    assert (half["loss"][:skipped + 1] == half["loss"][0]).all() and (half["lr"][:skipped + 1] == half["lr"][0]).all(), "a skipped step changes nothing"
    n = 20 - skipped
    assert np.allclose(half["loss"][skipped:], full["loss"][:n], rtol=1e-2) and np.allclose(half["grad_norm"][skipped:], full["grad_norm"][:n], rtol=2e-2) and np.array_equal(half["lr"][skipped:], full["lr"][:n])


def test_losses_are_not_read_one_by_one(monkeypatch):
    """On a GPU reading a loss stops the CPU: nothing may do so between two flushes. A device that is 'not a CPU' is played by a _Run that says so."""
    from efftrain import training
    reads, real = [], torch.Tensor.tolist
    class Elsewhere(training._Run):
        def prepare(self): super().prepare(); self.device = type("Device", (), {"type": "elsewhere"})()
        def loss(self, batch, first):
            device, self.device = self.device, torch.device("cpu")
            try: return super().loss(batch, first)
            finally: self.device = device
    monkeypatch.setattr(training, "_Run", Elsewhere)
    for name in ("item", "tolist", "__float__", "__bool__"):
        def read(self, *args, _real=getattr(torch.Tensor, name), **kwargs): reads.append(name); return _real(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, read)
    net, (x, y) = network(), data()
    go = lambda **kwargs: fit(net, classification_loss, lambda step: (x, y), torch.optim.SGD(net.parameters(), lr=0.1, foreach=False), 250, seed=0, **kwargs)
    history = go(clip=1.0)
    assert len(history) == 250 and len(reads) <= 6, f"{len(reads)} reads: two columns, three flushes"
    with pytest.raises(FloatingPointError, match="step 120 of 250") as caught:
        fit(net, lambda m, b: classification_loss(m, (x, y)) * b, lambda step: float("nan") if step == 119 else 1.0, torch.optim.SGD(net.parameters(), lr=0.1), 250)
    assert len(caught.value.history) == 120


def test_an_optimizer_state_that_cannot_be_read_back_is_found_out_at_the_first_save(tmp_path):
    class Projector: pass
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    def project(model, optimizer, step): optimizer.state[model[0].weight]["projector"] = Projector()
    with pytest.raises(TypeError, match="cannot be loaded again"): fit(net, classification_loss, loader(), optimizer, 9, after_step=project, save_to=tmp_path, save_every=3)
    assert last_state(tmp_path) is None


def test_a_fit_inside_an_evaluation():
    """A probe trained on the features of the model, inside `evaluate`."""
    x, y = data()
    def probe(model):
        features, head = model[:2](x).detach(), nn.Linear(16, 2)
        return {"probe": fit(head, classification_loss, lambda step: (features, y), torch.optim.SGD(head.parameters(), lr=0.5), 20)["loss"].iloc[-1]}
    net = network()
    history = fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 4, precision="bf16", evaluate=probe, eval_every=2)
    assert history["probe"].notna().tolist() == [False, True, False, True]


def test_interrupt_and_nan_keep_the_history():
    net = network()
    def stop(model, optimizer, step):
        if step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as caught: fit(net, classification_loss, loader(), torch.optim.SGD(net.parameters(), lr=0.1), 9, after_step=stop)
    assert len(caught.value.history) == 2
    with pytest.raises(FloatingPointError, match="step 1[0-9] of 500 is") as caught:
        fit(net, lambda m, b: classification_loss(m, b) * (b[0].sum() * 0 + float("inf") if m.count > 10 else 1), lambda step: (setattr(net, "count", step), data())[1], torch.optim.SGD(net.parameters(), lr=0.1), 500, clip=1.0)
    assert np.isinf(caught.value.history["loss"].iloc[-1]) and len(caught.value.history) == 12


# ---------------------------------------------------------------- properties and cost

@given(rows=st.integers(1, 60), processes=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_shares_are_a_partition(rows, processes):
    batch = torch.arange(rows)
    if rows < processes:
        with pytest.raises(ValueError, match=f"{rows} rows"): _share(batch, 0, processes)
        return
    parts = [_share((batch, {"y": batch * 2}), r, processes) for r in range(processes)]
    assert torch.cat([p[0][0] for p in parts]).tolist() == batch.tolist()
    assert all(torch.equal(p[0][1]["y"], p[0][0] * 2) and len(p[0][0]) == p[1] and p[2] == rows for p in parts)
    assert max(p[1] for p in parts) - min(p[1] for p in parts) <= 1


@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.99), floor=st.floats(0, 1), shape=st.sampled_from([cosine_schedule, linear_schedule]))
@settings(max_examples=60, deadline=None)
def test_schedules(steps, warmup, floor, shape):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    factor = shape(optimizer, steps, warmup=warmup, floor=floor).lr_lambdas[0]
    rates = [factor(k) for k in range(steps)]
    top = max(range(steps), key=rates.__getitem__)
    assert all(0 <= r <= 1 + 1e-12 for r in rates) and abs(rates[-1] - floor) < 1e-9 and factor(steps + 5) == rates[-1]
    assert all(a <= b + 1e-12 for a, b in zip(rates[:top], rates[1:top + 1])) and all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1:]))


def test_overhead():
    """What `fit` adds to an update of the smallest language models of the sweeps: less than 0.2 ms of CPU time (minimum of repeats, one thread)."""
    from efftrain.models import llama
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    tokens, steps = torch.randint(0, 512, (4, 4, 64), generator=torch.Generator().manual_seed(0)), 60
    batches = lambda step: tokens[step % 4]
    def make(): net = llama(dim=32, layers=1); o = torch.optim.AdamW(net.parameters(), lr=1e-3); return net, o, cosine_schedule(o, steps)

    def bare():
        net, optimizer, scheduler = make(); start = time.process_time()
        for step in range(steps):
            loss = lm_loss(net, batches(step)); loss.backward(); nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step(); scheduler.step(); optimizer.zero_grad(); loss.item()
        return time.process_time() - start

    def ours():
        net, optimizer, scheduler = make(); start = time.process_time()
        fit(net, lm_loss, batches, optimizer, steps, scheduler=scheduler, clip=1.0)
        return time.process_time() - start
    try:
        times = np.array([[bare(), ours()] for _ in range(7)]).min(0) / steps
        assert times[1] - times[0] < 0.2e-3 + 0.05 * times[0], f"{times * 1e3} ms"
    finally: torch.set_num_threads(threads)


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", "import sys, efftrain.training, efftrain.sweep, efftrain.state; print([m for m in ('torch', 'pandas', 'accelerate', 'joblib', 'transformers') if m in sys.modules])"], env=ENV, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
