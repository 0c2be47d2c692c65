"""A zeroth-order step beside the two forward passes in it, beside the usual way to regenerate directions (a seeded generator, tensor by tensor) and beside a step of backpropagation; and the direction alone.

The language model of the project, 2.6 million weights, all of them trained, 16 rows of 128 tokens (its own length) and, harder, of 32. What a zeroth-order step costs beyond its forward passes is making the direction three times; the larger the batch and the model's activations, the less it counts.
"""
import pytest
import torch
from harness import ratios, report, side_by_side

from efftrain.models import lm
from efftrain.optim.zo import ZOOptimizer
from efftrain.optim.zo_random import add_normal_


def usual_step(model, loss, lr=1e-9, eps=1e-3):
    """In place with a seeded generator: perturb, perturb back twice, restore, update."""
    params, generator, count = list(model.parameters()), torch.Generator(), iter(range(10**9))

    def move(seed, scale):
        generator.manual_seed(seed)
        for p in params: p.add_(torch.randn(p.shape, generator=generator), alpha=scale)

    @torch.no_grad()
    def step():
        seed = next(count)
        move(seed, eps); plus = loss().item()
        move(seed, -2 * eps); minus = loss().item()
        move(seed, eps); move(seed, -lr * (plus - minus) / (2 * eps))
    return step


@pytest.fixture(scope="module", params=[128, 32])
def length(request): return request.param


@pytest.fixture(scope="module")
def steps(length):
    models = {name: lm()[0].eval() for name in ("forward", "fused", "plain", "usual", "backprop")}
    ids = torch.randint(0, 4096, (16, length), generator=torch.Generator().manual_seed(0))
    losses = {name: (lambda m=m: m(input_ids=ids, labels=ids).loss) for name, m in models.items()}

    @torch.no_grad()
    def forwards(): losses["forward"](); losses["forward"]()
    sgd = torch.optim.SGD(models["backprop"].parameters(), lr=1e-9)

    def backprop(): sgd.zero_grad(); losses["backprop"]().backward(); sgd.step()
    out = {"two forward passes": forwards, "backpropagation, SGD": backprop, "ZO step, seeded generator": usual_step(models["usual"], losses["usual"])}
    for name in ("fused", "plain"):
        opt = ZOOptimizer(models[name].parameters(), 1e-9, fused=name == "fused")
        out[f"ZO step {name}"] = lambda opt=opt, loss=losses[name]: opt.step(loss)
    return out


@pytest.mark.parametrize("name", ["two forward passes", "ZO step fused", "ZO step plain", "ZO step, seeded generator", "backpropagation, SGD"])
@pytest.mark.benchmark(group="zeroth-order step, 2.6M weights, 16 rows")
def test_step(benchmark, steps, name):
    benchmark.pedantic(steps[name], rounds=8, warmup_rounds=2)


def test_side_by_side(steps, length, tables):
    frame = ratios(side_by_side(steps), "ZO step fused", {}, copy="two forward passes").drop(columns=["words", "floor_ms", "of_floor"])
    value = frame.set_index("name").min_ms
    share, faster = value["two forward passes"] / value["ZO step fused"], value["ZO step, seeded generator"] / value["ZO step fused"]
    tables.append(report("zo" if length == 128 else f"zo_{length}_tokens", f"A zeroth-order step on 2.6 million weights, 16 rows of {length} tokens", frame,
                         {"throughput of the ZO step, of forward passes alone, at least": (share, 0.9, share >= 0.9), "faster than a seeded generator, at least": (faster, 1.0, faster >= 1.0)}))


def test_directions(tables):
    """Adding a direction to one tensor of 25 million numbers."""
    x, generator = torch.zeros(25 * 2**20), torch.Generator()
    target = torch.empty_like(x)
    contenders = {"copy": lambda: target.copy_(x), "add_normal_ fused": lambda: add_normal_(x, 1e-9, 1, fused=True), "add_normal_ plain": lambda: add_normal_(x, 1e-9, 1),
                  "torch.randn, then add": lambda: x.add_(torch.randn(x.shape, generator=generator.manual_seed(1)), alpha=1e-9)}
    frame = ratios(side_by_side(contenders, rounds=8, warmup=1), "add_normal_ fused", {"copy": 2, "add_normal_ fused": 2, "add_normal_ plain": 2, "torch.randn, then add": 5})
    value = frame.set_index("name").ours_faster["torch.randn, then add"]
    tables.append(report("zo_direction", "Adding a random direction to 25 million numbers, float32", frame, {"faster than torch.randn and an addition, at least": (value, 1.5, value >= 1.5)}))
