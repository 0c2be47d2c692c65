"""diffGrad against independent implementations and its exact limits; what users expect of any torch optimizer is asked in test_optimizers.py."""
import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn

from efftrain.optim import base
from efftrain.optim.diffgrad import DiffGrad, paper_functions

PATHS = {"single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_path = pytest.mark.parametrize("path", PATHS)


def gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params: p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


# the rule

PEERS = {"torch-optimizer": (torch_optimizer.DiffGrad, {}), "pytorch-optimizer": (pytorch_optimizer.DiffGrad, dict(weight_decouple=False)), "pytorch-optimizer decoupled": (pytorch_optimizer.DiffGrad, dict(weight_decouple=True))}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("decay, scale", [(0.0, 1.0), (0.3, 1.0), (0.3, 30.0), (0.0, 0.01)])
def test_equals_the_peers_over_200_steps(peer, decay, scale):
    cls, more = PEERS[peer]
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((13, 7), (29,), ())]
    ours, theirs = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    a, b = DiffGrad(ours, lr=1e-3, weight_decay=decay, decoupled_weight_decay="decoupled" in peer), cls(theirs, lr=1e-3, weight_decay=decay, **more)
    for step in range(200):
        gradients(ours, step, scale); gradients(theirs, step, scale)
        a.step(); b.step()
    for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, rtol=0, atol=2e-6 if scale < 1 else 1e-6)  # the peer adds eps before the correction: more to see in small gradients


def numpy_diffgrad(w, grads, lr, beta1, beta2, eps, l2=0.0):
    m, v, last = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        g = g + l2 * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        w = w - lr / (1 + np.exp(-np.abs(last - g))) * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        last = g
    return w


@every_path
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_equals_numpy_in_float64(path, l2):
    w = torch.randn(base.SMALL + 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, grads = nn.Parameter(w.clone()), []
    opt = DiffGrad([p], lr=1e-2, betas=(0.8, 0.97), eps=1e-3, weight_decay=l2, **PATHS[path])
    for step in range(12):
        gradients([p], step, step % 3 + 0.1); grads.append(p.grad.numpy().copy()); opt.step()
    np.testing.assert_allclose(p.detach().numpy(), numpy_diffgrad(w.numpy(), grads, 1e-2, 0.8, 0.97, 1e-3, l2), rtol=0, atol=1e-11)


def moves(cls, grads, **options):
    w = nn.Parameter(torch.zeros(grads.shape[1], dtype=torch.float64)); opt, out = cls([w], **options), []
    for g in grads: before = w.detach().clone(); w.grad = g.clone(); opt.step(); out.append(w.detach() - before)
    return torch.stack(out)


@every_path
def test_steady_gradients_give_half_of_adam_and_huge_changes_give_adam(path):
    n = base.SMALL if path == "fused" else 3
    steady, huge = torch.full((20, n), 0.7, dtype=torch.float64), 1000 * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(10)[:, None].expand(20, n)
    torch.testing.assert_close(moves(DiffGrad, steady, lr=1e-2, **PATHS[path])[1:], moves(torch.optim.Adam, steady, lr=5e-3)[1:], rtol=1e-9, atol=0)
    torch.testing.assert_close(moves(DiffGrad, huge, lr=1e-2, **PATHS[path]), moves(torch.optim.Adam, huge, lr=1e-2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 10.0])
def test_every_step_lies_between_half_of_adam_and_adam(scale):
    noise = scale * torch.randn(100, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ratio = moves(DiffGrad, noise, lr=1e-2) / moves(torch.optim.Adam, noise, lr=1e-2)
    assert (ratio >= 0.5 - 1e-9).all() and (ratio <= 1 + 1e-9).all()
    friction = torch.sigmoid(torch.diff(noise, dim=0, prepend=torch.zeros(1, 50, dtype=torch.float64)).abs())
    torch.testing.assert_close(ratio, friction, rtol=1e-6, atol=0)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_previous_gradient_is_a_copy(path, dtype):
    """Gradients that are zeroed and written in place, as before PyTorch 2.0, must not change what is remembered."""
    w = nn.Parameter(torch.ones(base.SMALL if path == "fused" else 4, dtype=dtype)); opt = DiffGrad([w], lr=1e-3, **PATHS[path])
    for k in (1.0, 3.0, -2.0):
        opt.zero_grad(set_to_none=False); (w * k).sum().backward(); opt.step()
        memory = opt.state[w]["previous_grad"]
        assert memory.dtype == torch.float32 and memory.data_ptr() != w.grad.data_ptr() and (memory == k).all()
        w.grad.fill_(9.0)
        assert (opt.state[w]["previous_grad"] == k).all()


def test_change_of_the_decay_term_counts_only_with_l2():
    for decoupled in (False, True):
        w = nn.Parameter(torch.full((2,), 5.0)); opt = DiffGrad([w], lr=0.1, weight_decay=0.5, decoupled_weight_decay=decoupled); w.grad = torch.ones(2); opt.step()
        torch.testing.assert_close(opt.state[w]["previous_grad"], torch.full((2,), 1.0 if decoupled else 3.5))


def test_parameters_keep_counts_of_their_own():
    for flags in PATHS.values():
        a, b, alone = (nn.Parameter(torch.ones(4)) for _ in range(3))
        opt, other = DiffGrad([a, b], lr=0.1, **flags), DiffGrad([alone], lr=0.1)
        for step in range(7):
            gradients([a], step)
            if step >= 3: gradients([b], step); gradients([alone], step); other.step()
            opt.step()
        assert opt.state[a]["step"] == 7 and opt.state[b]["step"] == 4
        torch.testing.assert_close(b, alone, rtol=0, atol=1e-6)


def test_state_is_twelve_bytes_a_parameter():
    w = nn.Parameter(torch.zeros(10, 10)); opt = DiffGrad([w]); w.grad = torch.ones(10, 10); opt.step()
    assert sum(t.nbytes for k, t in opt.state[w].items() if k != "step") == 12 * w.numel()


# the paper's functions

def test_the_functions_have_the_values_and_minima_of_the_paper():
    functions, x = paper_functions(), torch.linspace(-1.2, 1.2, 24_001, dtype=torch.float64)
    values = {name: f(x) for name, f in functions.items()}
    assert x[values["F1"].argmin()] == pytest.approx(-0.3, abs=1e-4) and values["F1"].min() == pytest.approx(0, abs=1e-7)
    assert functions["F1"](torch.tensor(0.2)) == pytest.approx(0.05) and functions["F2"](torch.tensor(-1.0)) == pytest.approx(4.85)
    assert values["F3"].min() == pytest.approx(0, abs=1e-4) and functions["F3"](torch.tensor(0.0)) == 0 and functions["F3"](torch.tensor(-0.45)) == pytest.approx(0.3)
    for name, at in (("F1", [0.0]), ("F3", [-0.5, -0.4, 0.0, 0.4, 0.5])):
        left, right = (functions[name](torch.tensor(at, dtype=torch.float64) + d) for d in (-1e-9, 1e-9))
        torch.testing.assert_close(left, right, rtol=0, atol=0.05 if name == "F1" else 1e-6)


def official_gradient(name, x):
    """As in the authors' notebook, with the inner derivative of sin(8x) that is missing there."""
    if name == "F1": return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4
    if name == "F2": return -40.0 if x <= -0.9 else 8 * x * np.cos(8 * x) + np.sin(8 * x) + 3 * x * x
    for edge, slope in ((-0.5, 2 * x), (-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0)):
        if x <= edge: return slope
    return 2 * x


@pytest.mark.parametrize("name", ["F1", "F2", "F3"])
@pytest.mark.parametrize("cls", [DiffGrad, torch.optim.Adam])
def test_walks_down_the_functions_as_the_formula_says(name, cls):
    """300 iterations at the paper's settings, against NumPy and gradients written by hand."""
    w = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64)); opt = cls([w], lr=0.1, betas=(0.95, 0.999))
    x, m, v, last = -1.0, 0.0, 0.0, 0.0
    for t in range(1, 301):
        opt.zero_grad(); paper_functions()[name](w).sum().backward(); opt.step()
        g = official_gradient(name, x)
        m, v = 0.95 * m + 0.05 * g, 0.999 * v + 0.001 * g * g
        friction = 1 / (1 + np.exp(-abs(last - g))) if cls is DiffGrad else 1.0
        x, last = x - 0.1 * friction * (m / (1 - 0.95**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), g
        assert w.item() == pytest.approx(x, abs=1e-6)


@pytest.mark.parametrize("options, error, text", [
    (dict(eps=-1e-8), ValueError, "eps is -1e-08"), (dict(eps="small"), TypeError, "eps is 'small'"), (dict(decoupled_weight_decay=None), TypeError, "decoupled_weight_decay is None"), (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0")])
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text): DiffGrad([nn.Parameter(torch.ones(2))], **options)
    opt = DiffGrad([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=text): opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(opt.param_groups) == 1
