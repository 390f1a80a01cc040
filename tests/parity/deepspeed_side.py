"""Train recipes with DeepSpeed's own engine, in two processes; run by test_deepspeed_live.

Policy, samples, noise and the terms of the loss are vlafit's. Averaging over processes, accumulation,
clipping, sharding, casts and AdamW's masters are DeepSpeed's, by the file that a user would give it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed  # type: ignore[import-not-found]
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch import Tensor

from vlafit import config
from vlafit.nn.policy import Policy, mean_loss
from vlafit.nn.recompute import recompute_blocks
from vlafit.nn.rng import dropout_seed, sample_rng
from vlafit.recipe import Recipe
from vlafit.train import dataloader
from vlafit.train.distributed import sum_over_processes
from vlafit.train.experiment import build
from vlafit.train.optim import begin_step, build_optimizer, schedule
from vlafit.train.settle import with_field


def train(recipe: Recipe, zero: dict[str, Any], out: Path) -> None:
    """Train `recipe` by the DeepSpeed file `zero`; write losses, gradient norms and fp32 weights to `out`."""
    rank, world, cpu = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    recipe = with_field(recipe, "train.accumulate", zero["gradient_accumulation_steps"])
    experiment = build(recipe, cpu)
    policy = experiment.policy
    recompute_blocks(policy, recipe.train.recompute)
    engine, wrapped, _, _ = deepspeed.initialize(
        model=policy, optimizer=build_optimizer(policy, experiment.plan, recipe.optim), config=zero
    )
    inner = getattr(wrapped, "optimizer", wrapped)  # ZeRO-0 in fp32 steps AdamW itself
    terms, losses, norms, began = policy.terms(), [], [], masters(policy)
    batches = dataloader.training_batches(experiment, first_step=0, rank=rank, world=world)
    engine.train()
    for step in range(recipe.train.steps):
        parts = [(keys, batch.trim()) for keys, batch in next(batches)]
        rngs = [sample_rng(keys, seed=recipe.train.seed, draws=recipe.train.draws) for keys, _ in parts]
        counted = [policy.drawn_counts(batch, rng) for (_, batch), rng in zip(parts, rngs, strict=True)]
        own = torch.tensor([sum(one[n] for one in counted) for n in terms], dtype=torch.float64)
        counts = dict(zip(terms, sum_over_processes(own).tolist(), strict=True))
        begin_step(inner, step, schedule(step, recipe.train.steps, recipe.optim))
        sums = torch.zeros(len(terms), dtype=torch.float64)
        for (keys, batch), rng in zip(parts, rngs, strict=True):
            torch.manual_seed(dropout_seed(keys, seed=recipe.train.seed, step=step))
            found = engine(batch, rng)
            # DeepSpeed averages over processes and over what it accumulates.
            share = world * len(parts)
            engine.backward(sum(found[n] * factor * share / counts[n] for n, factor in terms.items()))
            sums += torch.stack([found[n].detach().double() for n in terms])
            engine.step()
        totals = dict(zip(terms, sum_over_processes(sums).tolist(), strict=True))
        losses.append(mean_loss(terms, totals, counts))
        if (norm := engine.get_global_grad_norm()) is not None:  # ZeRO-0 in fp32 does not say
            norms.append(float(norm))
    ended = masters(policy)
    if rank == 0:
        out.mkdir(parents=True)
        save_file(began, out / "began.safetensors")
        save_file(ended, out / "ended.safetensors")
        (out / "found.json").write_text(json.dumps({"losses": losses, "norms": norms}))
    engine.destroy()


def masters(policy: Policy) -> dict[str, Tensor]:
    """Return what is trained, in fp32; every process must call it."""
    found = {
        name: (p, safe_get_full_fp32_param(p)) for name, p in policy.named_parameters() if p.requires_grad
    }
    # ZeRO-0 in fp32 keeps none beside the weights.
    return {n: (p if master is None else master).detach().clone() for n, (p, master) in found.items()}


def main() -> None:
    """Carry out the jobs of a JSON file: {"recipe": path, "zero": path, "out": path}."""
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed.init_distributed(dist_backend="gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        recipe = config.read(Recipe, Path(job["recipe"]), "recipe")
        train(recipe, json.loads(Path(job["zero"]).read_text()), Path(job["out"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
