"""GradNormLoRP: a training step beside peft's DoRA with AdamW, and the norms alone."""
import copy
import warnings

import torch
from harness import ratios, report, side_by_side

from efftrain.memory.gradnormlorp import GradNormLoRPAdamW, gradnormlorp
from efftrain.models import llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

WIDTH, LAYERS, RANK, ROWS = 512, 4, 8, 256


def test_step(tables):
    """Forward, backward and update of a Llama 512 wide, 4 rows of 64 tokens, adapters of rank 8 on every linear layer; subspaces are found anew every 500 updates, so not in the timed ones."""
    base = llama(WIDTH, LAYERS)
    ids = torch.randint(512, (ROWS // 64, 64), generator=torch.Generator().manual_seed(0))

    def step(model, optimizer):
        def once():
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return once
    ours, constant = copy.deepcopy(base), copy.deepcopy(base)
    gradnormlorp(ours, RANK); gradnormlorp(constant, RANK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=True, exclude_modules=["lm_head"]))
    trained = lambda model: [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained(ours)) == sum(p.numel() for p in trained(dora))
    contenders = {"GradNormLoRP": step(ours, GradNormLoRPAdamW(ours, 1e-3)), "GradNormLoRP, no projection": step(constant, GradNormLoRPAdamW(constant, 1e-3, proj_rank=None)),
                  "peft DoRA + AdamW": step(dora, torch.optim.AdamW(trained(dora), 1e-3, weight_decay=0.0))}
    frame = ratios(side_by_side(contenders, rounds=10), "GradNormLoRP", {}, copy="peft DoRA + AdamW").drop(columns=["words", "floor_ms", "of_floor"])
    best = frame.set_index("name").min_ms
    slower = best["GradNormLoRP"] / best["peft DoRA + AdamW"]
    tables.append(report("gradnormlorp_step", f"A training step of GradNormLoRP, Llama {WIDTH} wide with {LAYERS} blocks, {ROWS} tokens, rank {RANK}, float32", frame, {"time over that of peft's DoRA with AdamW, at most": (slower, 1.1, slower <= 1.1)}, ("peft",)))
