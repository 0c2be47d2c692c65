"""What users expect of a torch optimizer, asked of every optimizer of the package. A new one joins with a line in CASES."""
import copy
import io
import pickle
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from efftrain.memory.fira import Fira
from efftrain.memory.frugal import Frugal
from efftrain.memory.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from efftrain.memory.qgalore import QGaLoreAdamW8bit
from efftrain.optim import base
from efftrain.optim.adadagrad import AdaGradNorm
from efftrain.optim.adabelief import AdaBelief
from efftrain.optim.diffgrad import DiffGrad
from efftrain.optim.lamb import Lamb
from efftrain.optim.lars import Lars
from efftrain.optim.lion import Lion
from efftrain.optim.sophia import SophiaG, SophiaH


@dataclass
class Case:
    """An optimizer and how to ask it: `options` it is made with, `variants` (more options, each tested by the round trips and the paths), `paths` it has ("plain": it takes neither foreach nor fused), `shards`: also under FSDP2.

    `matrix`: keys for matrices with at least 3 rows and columns, which get groups of their own, as for optimizers that project gradients; `close`: how far sharded runs may be from the plain one.
    """
    cls: type
    options: dict = field(default_factory=dict)
    variants: tuple = ({},)
    paths: tuple = ("single", "foreach", "fused")
    shards: bool = True
    compiles: bool = True  # torch.compile around the step, in one graph
    matrix: dict | None = None
    close: float = 2e-6

    def make(self, params, path=None, **more): return self.cls(self.grouped(params), **{"lr": 1e-2, **self.options, **FLAGS[path or self.paths[0]], **more})

    def grouped(self, params):
        if self.matrix is None: return params
        groups = []
        for group in [g if isinstance(g, dict) else dict(params=[g]) for g in params]:
            found = [group["params"]] if torch.is_tensor(group["params"]) else list(group["params"])
            shape = lambda p: (p[1] if isinstance(p, tuple) else p).shape
            matrices = [p for p in found if len(shape(p)) == 2 and min(shape(p)) >= 3]
            rest = [p for p in found if not any(p is q for q in matrices)]
            groups += [{**group, "params": part, **keys} for part, keys in ((matrices, self.matrix), (rest, {})) if part]
        return groups


CASES = {
    "lion": Case(Lion, dict(weight_decay=0.1), ({}, dict(state_dtype=torch.bfloat16), dict(state_dtype=torch.float32))),
    "adabelief": Case(AdaBelief, dict(weight_decay=0.1), ({}, dict(rectify=False, amsgrad=True, eps=1e-8), dict(weight_decouple=False, degenerate_to_sgd=False, amsgrad=True), dict(fixed_decay=True, weight_decay=1e-3, betas=(0.8, 0.9)))),
    "adadagrad": Case(AdaGradNorm, dict(weight_decay=0.1, scope="group"), ({}, dict(scope="all", weight_decay=0.0), dict(scope="tensor"))),
    "sophia_g": Case(SophiaG, dict(weight_decay=0.1)), "sophia_h": Case(SophiaH, dict(weight_decay=0.1), ({}, dict(distribution="rademacher"))),
    "diffgrad": Case(DiffGrad, dict(weight_decay=0.1), ({}, dict(decoupled_weight_decay=True, betas=(0.8, 0.99)))),
    "lamb": Case(Lamb, dict(weight_decay=0.1), ({}, dict(nesterov="first", phi=(0.1, 10), norm=1), dict(nesterov="both", bias_correction=False, norm=float("inf"), always_adapt=True, weight_decay=0.0, clip_global_norm=1.0), dict(state_dtype=torch.float64, clip_global_norm=0.5))),
    "lars": Case(Lars, dict(weight_decay=0.1), ({}, dict(form="local_rate", trust_coefficient=0.1), dict(form="local_rate", trust_coefficient=0.1, nesterov=True, norm=1, clip_global_norm=1.0), dict(norm=float("inf"), phi=(0.1, 10), state_dtype=torch.float64))),
    # moments of half of the coordinates, others after every second step; the step runs outside of any graph (tests/test_frugal.py compiles around it); eps: moments that start anew make signs of rounding errors
    "frugal": Case(Frugal, dict(weight_decay=0.1, density=0.5, selection="randk", update_gap=2, eps=1e-3), ({}, dict(selection="blocks", update_gap=3), dict(selection="blocks", density=1.0), dict(density=0.25, state_full="lion", reset=False),
                                                                                               dict(state_full="sgdm", state_free="sgd", update_gap=7), dict(density=0.0), dict(density=0.25, state_free=None)), compiles=False),
    "frugal_columns": Case(Frugal, dict(weight_decay=0.1, eps=1e-3), matrix=dict(density=0.5, selection="columns", update_gap=2), compiles=False)
}

PROJECTED = dict(rank=3, update_proj_gap=100, scale=0.5)
GALORE = dict(paths=("plain",), compiles=False, matrix=PROJECTED, close=1e-4)
CASES |= {
    "galore": Case(GaLoreAdamW, dict(weight_decay=0.1), ({}, dict(correct_bias=False)), **GALORE),
    "galore_adafactor": Case(GaLoreAdafactor, dict(weight_decay=0.1, relative_step=False), ({}, dict(beta1=0.9, scale_parameter=False)), **GALORE),
    "galore_8bit": Case(GaLoreAdamW8bit, dict(weight_decay=0.1), ({}, dict(block=64, min_8bit_size=0)), **GALORE),
    "fira": Case(Fira, dict(weight_decay=0.1), ({}, dict(correct_bias=False, betas=(0.8, 0.9))), **GALORE),
    "fira_code": Case(Fira, paths=("plain",), compiles=False, matrix=dict(rank=3, update_proj_gap=2, form="code", scaling="matrix", limiter=1.5), close=1e-4),
    "qgalore": Case(QGaLoreAdamW8bit, dict(weight_decay=0.1), ({}, dict(bits=32), dict(block=64, min_8bit_size=0)), **{**GALORE, "matrix": {**PROJECTED, "proj_bits": 8, "proj_group_size": 3}}),
}

FLAGS = {"plain": {}, "single": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_path = pytest.mark.parametrize("case, path", [pytest.param(c, p, id=f"{n}-{p}") for n, c in CASES.items() for p in c.paths])
every_variant = pytest.mark.parametrize("case, variant", [pytest.param(c, v, id=f"{n}-{i}") for n, c in CASES.items() for i, v in enumerate(c.variants)])
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 0.05}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])
SHAPES = [(300, 400), (70_000,), (8, 64, 16, 16), (5, 3), (), (0, 4), (1,)]


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params: p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def parameters(dtype=torch.float32):
    """All shapes, one channels_last, one transposed."""
    generator = torch.Generator().manual_seed(3)
    out = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    out[2] = out[2].contiguous(memory_format=torch.channels_last)
    out.append(torch.randn(500, 200, generator=generator).to(dtype).t())
    return [nn.Parameter(p) for p in out]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 260), nn.Tanh(), nn.Linear(260, 3))


def same_state(a, b):
    """Are the states of two optimizers equal, value by value and dtype by dtype?"""
    return len(a.state) == len(b.state) and all(
        s.keys() == t.keys() and all(torch.equal(s[k], t[k]) and s[k].dtype == t[k].dtype if torch.is_tensor(s[k]) else s[k] == t[k] for k in s)
        for s, t in zip(a.state.values(), b.state.values()))


# one rule, three ways to compute it

@every_dtype
@every_variant
def test_paths_agree(case, variant, dtype):
    """Also: dtypes and memory layouts stay, 0-d and empty parameters are no trouble, the fused path does not fall back."""
    runs = {}
    for path in case.paths:
        params = parameters(dtype)
        opt = case.make(params, path, lr=1e-3, **variant)
        for step in range(10):
            gradients(params, step)
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # a fall-back would be a warning
                opt.step()
        assert all(p.dtype == dtype and p.isfinite().all() for p in params) and params[2].is_contiguous(memory_format=torch.channels_last)
        runs[path] = params
    first, *others = runs.values()
    assert any((p != q).any() for p, q in zip(first, parameters(dtype)))
    for other in others:
        for a, b in zip(first, other): torch.testing.assert_close(a, b, rtol=0, atol=DTYPES[dtype])


@every_path
def test_maximize_is_minimizing_the_negative(case, path):
    a, b = parameters(), parameters()
    down, up = case.make(a, path), case.make(b, path, maximize=True)
    for step in range(4):
        gradients(a, step)
        for p, q in zip(a, b): q.grad = -p.grad
        down.step(); up.step()
    for p, q in zip(a, b): assert torch.equal(p, q)


@every_path
def test_a_tensor_is_a_learning_rate_like_a_number(case, path):
    a, b = parameters(), parameters()
    one, other = case.make(a, path, lr=1e-3), case.make(b, path, lr=torch.tensor(1e-3))
    for step in range(4):
        gradients(a, step); gradients(b, step); one.step(); other.step()
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@every_path
def test_gradients_with_other_strides_than_the_parameter(case, path):
    a, b = (nn.Parameter(torch.linspace(-1, 1, 120_000).reshape(300, 400)) for _ in range(2))
    one, other = case.make([a]), case.make([b], path)
    a.grad = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).t(); b.grad = a.grad.clone(memory_format=torch.preserve_format)
    for _ in range(3): one.step(); other.step()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# groups, gradients, closures, hooks

@every_path
def test_parameters_without_gradient_are_passed_over(case, path):
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    opt = case.make(params, path)
    params[1].grad = torch.tensor([1.0, -2.0, 0.5])
    opt.step()
    assert (params[0] == 1).all() and (params[1] != 1).any() and set(opt.state) <= {params[1]}
    opt.zero_grad(); opt.step()


@every_path
def test_sparse_and_complex_gradients_are_rejected_by_name(case, path):
    name = case.cls.__name__
    table = nn.Embedding(5, 3, sparse=True); table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{name} does not take sparse gradients.*'weight'"): case.make(table.named_parameters(), path).step()
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64)); z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match=f"{name} does not take complex gradients.*parameter 0"): case.make([z], path).step()


@every_path
def test_groups_have_their_own_settings(case, path):
    together, apart = parameters()[:4], parameters()[:4]
    one = case.make([dict(params=together[:2], lr=3e-3, weight_decay=0.3), dict(params=together[2:])], path)
    others = [case.make(apart[:2], path, lr=3e-3, weight_decay=0.3), case.make(apart[2:], path)]
    for step in range(3):
        gradients(together, step)
        for p, q in zip(together, apart): q.grad = p.grad.clone()
        for opt in (one, *others): opt.step()
    for p, q in zip(together, apart): assert torch.equal(p, q)
    one.add_param_group(dict(params=nn.Parameter(torch.ones(2)), lr=1.0))
    assert one.param_groups[-1]["lr"] == 1.0 and one.param_groups[-1]["weight_decay"] == one.defaults["weight_decay"]


@every_case
def test_closure_hooks_and_a_schedule(case):
    p, calls = nn.Parameter(torch.tensor([1.0, 2.0])), []
    opt = case.make([p])
    opt.register_step_pre_hook(lambda *_: calls.append("before")); opt.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: k)  # starts at zero
    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad(); loss = p.square().sum(); loss.backward(); return loss
    with torch.no_grad(): assert opt.step(closure).item() == 5
    assert calls == ["before", "after"] and p.tolist() == [1, 2], "a rate of zero moves nothing"
    schedule.step(); opt.step(closure)
    assert p.tolist() != [1, 2] and opt.step() is None


@every_case
@pytest.mark.parametrize("options, error, text", [
    (dict(lr=0.0), ValueError, "lr is 0.0"), (dict(lr=-1), ValueError, "lr is -1"), (dict(lr=float("nan")), ValueError, "lr is nan"), (dict(lr="1"), TypeError, "lr is '1'"),
    (dict(lr=torch.ones(2)), ValueError, "lr is a tensor"), (dict(weight_decay=-1e-9), ValueError, "weight_decay is -1e-09"), (dict(foreach=True, fused=True), ValueError, "foreach and fused"),
    (dict(foreach="yes"), TypeError, "foreach is 'yes'"), (dict(maximize=None), TypeError, "maximize is None")])
def test_bad_arguments_are_named_and_add_nothing(case, options, error, text):
    if "foreach" in options and "plain" in case.paths: pytest.skip(f"{case.cls.__name__} has one path")
    with pytest.raises(error, match=text): case.make([nn.Parameter(torch.ones(2))], **options)
    opt = case.make([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=text): opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(opt.param_groups) == 1


@every_case
@pytest.mark.parametrize("argument", ["betas", "eps"])
def test_betas_and_eps_out_of_range_are_named(case, argument):
    value = case.cls([nn.Parameter(torch.ones(2))], **{"lr": 1e-2, **case.options}).defaults.get(argument)
    if value is None: pytest.skip(f"{case.cls.__name__} has no {argument}")
    for bad in ((1.0,) * len(value), (-0.1, *value[1:])) if argument == "betas" else (-1e-8, float("inf")):
        with pytest.raises(ValueError, match=argument): case.make([nn.Parameter(torch.ones(2))], **{argument: bad})


# state

@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_state_dict_deepcopy_and_pickle_go_on_bit_for_bit(case, variant, dtype):
    for path in case.paths:
        fresh = lambda: [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel(), dtype=torch.float64).reshape(s).to(dtype)) for s in ((300, 250), (7,), ())]
        a = fresh(); one = case.make(a, path, **variant)
        for step in range(5): gradients(a, step); one.step()
        file = io.BytesIO(); torch.save(one.state_dict(), file); file.seek(0)
        b = fresh(); other = case.make(b, lr=1.0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert same_state(one, other) and all(s.data_ptr() != t.data_ptr() for p, q in zip(a, b) for s, t in zip(one.state[p].values(), other.state[q].values()) if torch.is_tensor(s))
        with torch.no_grad():
            for p, q in zip(a, b): q.copy_(p)
        c, copied = copy.deepcopy((a, one)); d, pickled = pickle.loads(pickle.dumps((a, one)))
        for step in range(5, 10):
            for params, opt in ((a, one), (b, other), (c, copied), (d, pickled)): gradients(params, step); opt.step()
        for params, opt in ((b, other), (c, copied), (d, pickled)):
            assert all(torch.equal(p, q) for p, q in zip(a, params)) and same_state(one, opt)


CONVERSIONS = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("case, path, saved, loaded", [pytest.param(c, p, s, l, id=f"{n}-{p}-{str(s)[6:]}-{str(l)[6:]}") for n, c in CASES.items() for p in c.paths for s, l in CONVERSIONS if p != "fused" or torch.bfloat16 not in (s, l)])
def test_a_checkpoint_of_a_model_in_another_dtype_goes_on(case, path, saved, loaded):
    """State is converted where it must be; the next steps are those of the run that went on, up to rounding."""
    a = [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel(), dtype=torch.float64).reshape(s).to(saved)) for s in ((300, 250), (7,), ())]
    one = case.make(a, path, lr=1e-3)
    for step in range(3): gradients(a, step); one.step()
    b = [nn.Parameter(p.detach().to(loaded)) for p in a]
    other = case.make(b, path, lr=1e-3); other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(3, 6): gradients(a, step); gradients(b, step); one.step(); other.step()
    coarse = torch.bfloat16 in (saved, loaded)
    assert all(p.dtype == saved and q.dtype == loaded for p, q in zip(a, b))
    for p, q in zip(a, b): torch.testing.assert_close(p.double(), q.double(), rtol=0, atol=0.02 if coarse else 1e-6)


@every_case
def test_checkpoints_that_lack_an_option_load(case):
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); one = case.make([p]); one.step()
    saved = one.state_dict(); saved["param_groups"][0].pop("maximize")
    other = case.make([p]); other.load_state_dict(saved); other.step()
    assert other.param_groups[0]["maximize"] is False


# other parts of torch

@every_case
def test_grad_scaler_unscales_and_skips_overflow(case):
    a, b = (nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0])) for _ in range(2))
    one, scaled, scaler = case.make([a]), case.make([b]), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), -3.0):
        scaled.zero_grad(); scaler.scale((b * factor).sum()).backward(); scaler.step(scaled); scaler.update()
        if factor != float("inf"): one.zero_grad(); (a * factor).sum().backward(); one.step()
    assert torch.equal(a, b) and same_state(one, scaled)


@every_path
def test_autograd_sees_that_weights_changed(case, path):
    p = nn.Parameter(torch.linspace(1, 2, base.SMALL)); loss = (p * p).sum()
    p.grad = torch.ones_like(p); case.make([p], path).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


@pytest.mark.parametrize("case, path", [pytest.param(c, p, id=f"{n}-{p}") for n, c in CASES.items() if c.compiles for p in c.paths if p != "foreach"])
def test_torch_compile_around_the_step(case, path):
    a, b = network(), network()
    one, other = case.make(a.parameters(), lr=torch.tensor(1e-2)), case.make(b.parameters(), path, lr=torch.tensor(1e-2))
    torch.compiler.reset()
    compiled = torch.compile(other.step, backend="aot_eager", fullgraph=True)
    for step in range(6):
        gradients(a.parameters(), step); gradients(b.parameters(), step)
        for opt in (one, other): opt.param_groups[0]["lr"].fill_(1e-2 / (step + 1))
        one.step()
        if step == 3: torch.compiler.set_stance("fail_on_recompile")  # the rate changes, the graph does not
        try: compiled()
        finally: torch.compiler.set_stance("default")
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if "fused" in c.paths])
def test_one_compilation_serves_schedules_and_groups(case):
    from torch._dynamo.utils import counters
    params = parameters()
    opt = case.make([{"params": params[:1]}, {"params": params[1:2], "lr": 0.3, "weight_decay": 2.0}, {"params": params[2:], "maximize": True}], "fused")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8)
    torch.compiler.reset(); counters.clear()
    for step in range(8):
        gradients(params, step); opt.step(); schedule.step()
        if step == 1: compiled = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == compiled <= 3


@every_path
def test_fake_tensors_take_a_step(case, path):
    """Accounting runs optimizers on tensors without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(1 << 20, 1 << 10, dtype=torch.bfloat16)); p.grad = torch.ones_like(p)
        case.make([p], path).step()


def _worker(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(5)); mine = x.chunk(world)[rank]
    mesh = init_device_mesh("cpu", (world,))
    for name, case in CASES.items():
        plain, models = network(), {"ddp": (DistributedDataParallel(network()), case.paths[0])}
        for path in [p for p in case.paths if p != "fused"] if case.shards else ():
            sharded = network()
            for layer in (sharded[0], sharded[2], sharded[4]): fully_shard(layer, mesh=mesh)  # the last layer has 3 rows: shards of 2 and 1
            models[path] = fully_shard(sharded, mesh=mesh), path
        reference, optimizers = case.make(plain.parameters()), {k: case.make(m.parameters(), path) for k, (m, path) in models.items()}

        def update(model, opt, batch): opt.zero_grad(); model(batch).square().mean().backward(); opt.step()
        for step in range(6):
            if step == 4:
                for k, (m, path) in models.items():  # go on from a state dict, shards and all
                    state, optimizers[k] = optimizers[k].state_dict(), case.make(m.parameters(), path)
                    optimizers[k].load_state_dict(state)
            update(plain, reference, x)
            for k, (m, _) in models.items(): update(m, optimizers[k], mine)
        for k, (m, _) in models.items():
            for p, q in zip(plain.parameters(), m.parameters()):
                torch.testing.assert_close(p, q.full_tensor() if hasattr(q, "full_tensor") else q, rtol=0, atol=case.close, msg=lambda text: f"{name}, {k}: {text}")
    dist.destroy_process_group()


def test_ddp_and_fsdp2_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store")), nprocs=2)


@every_case
def test_transformers_trainer(case, tmp_path):
    from transformers import Trainer, TrainingArguments
    from efftrain.models import llama
    model = llama(16, 1, heads=1)
    before = [p.detach().clone() for p in model.parameters()]
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(12)]
    opt = case.make(model.parameters(), lr=1e-3)
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    Trainer(model=model, args=args, train_dataset=rows, optimizers=(opt, torch.optim.lr_scheduler.ConstantLR(opt))).train()
    assert all((p != q).any() for p, q in zip(model.parameters(), before))
