"""Measure a training step and an action on a GPU: full-size pi0 and pi0.5, random weights, bf16.

    python benchmarks/gpu.py [--sizes pi0 pi05] [--strategies full expert ...] [--batch 8] [--out gpu.json]

For each size and strategy, in a process of its own so that memory is counted from zero: samples/s of training
steps (fp32 master weights, bf16 compute, fused AdamW), their peak memory, and the latency of one action chunk
(10 Euler steps, batch 1). `--sizes pi0-tiny --device cpu` checks the script itself.
"""

import argparse
import json
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import torch

from vlafit import shipped
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy
from vlafit.policies import family
from vlafit.recipe import OptimRecipe
from vlafit.tuning import Plan, apply, load_strategy

CAMERAS = 3
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pi0", "pi05"])
    parser.add_argument("--strategies", nargs="+", default=["full", "frozen-vision", "expert", "projections"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "STRATEGY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.batch, options.steps, torch.device(options.device))))
        return 0
    shipped_names = shipped.names("strategy")
    unknown = [name for name in options.strategies if name not in shipped_names]
    if unknown:
        parser.error(f"no strategy {unknown[0]!r}; there are {', '.join(shipped_names)}")
    rows = []
    for size in options.sizes:
        for strategy in options.strategies:
            rows.append(row := in_own_process(size, strategy))
            print(json.dumps(row), flush=True)
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2) + "\n")
    return 0 if all("error" not in row for row in rows) else 1


def in_own_process(size: str, strategy: str) -> dict[str, object]:
    """Measure one row in a new process; a failure, such as out of memory, becomes a row with its message."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", size, strategy]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"size": size, "strategy": strategy, "error": last[0]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, strategy: str, rows: int, steps: int, device: torch.device) -> dict[str, object]:
    """Return one row: `train_samples_per_s`, `train_peak_gb`, `act_ms`, `act_peak_gb`, parameters."""
    module = family("pi0")
    config = module.SIZES[size]
    policy: Policy = module.build(config, device, torch.Generator().manual_seed(0))
    plan = apply(policy, load_strategy(strategy))
    row: dict[str, object] = {
        "size": size,
        "strategy": strategy,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "batch": rows,
        "parameters": plan.parameters,
        "trainable": plan.trainable_parameters,
    }
    seconds, row["train_peak_gb"] = training(policy, plan, rows, steps, device)
    row["train_samples_per_s"] = round(rows / seconds, 2)
    seconds, row["act_peak_gb"] = acting(policy, steps, device)
    row["act_ms"] = round(1000 * seconds, 1)
    return row


def training(
    policy: Policy, plan: Plan, rows: int, steps: int, device: torch.device
) -> tuple[float, float | None]:
    """Return seconds and peak memory of an optimiser step."""
    batch, noise, when = random_inputs(policy, rows, device)
    optimizer = torch.optim.AdamW(plan.groups(policy, OptimRecipe()), fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            policy.flow_loss(batch, noise, when)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, steps, device)


def acting(policy: Policy, steps: int, device: torch.device) -> tuple[float, float | None]:
    """Return seconds and peak memory of sampling one chunk, the weights in bf16."""
    batch, noise, _ = random_inputs(policy, 1, device)
    policy.to(torch.bfloat16).eval()
    batch.images, batch.state = batch.images.bfloat16(), batch.state.bfloat16()

    def act() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            policy.sample(batch, noise, steps=10)

    return timed(act, steps, device)


def random_inputs(
    policy: Policy, rows: int, device: torch.device
) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Return a batch of full prompts and three cameras, noise [b, t, a] and time [b]."""
    needs = policy.needs()
    shape = (rows, needs.chunk, needs.action_dim)
    images = torch.randint(0, 256, (rows, CAMERAS, 3, needs.image_size, needs.image_size), dtype=torch.uint8)
    batch = Batch(
        images=images,
        image_mask=torch.ones(rows, CAMERAS, dtype=torch.bool),
        tokens=torch.randint(1, needs.vocabulary, (rows, needs.max_tokens)),
        token_mask=torch.ones(rows, needs.max_tokens, dtype=torch.bool),
        state=torch.randn(rows, needs.state_dim),
        actions=torch.randn(shape),
        action_mask=torch.ones(shape, dtype=torch.bool),
    )
    return batch.to(device), torch.randn(shape, device=device), torch.rand(rows, device=device)


def timed(call: Callable[[], None], times: int, device: torch.device) -> tuple[float, float | None]:
    """Return the mean seconds of a call after a warm-up, and the peak device memory in GB (None on a CPU)."""
    cuda = device.type == "cuda"
    for _ in range(WARM_UP):
        call()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - began) / times
    return seconds, round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if cuda else None


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as a Markdown table."""
    columns = (
        "size",
        "strategy",
        "trainable",
        "train_samples_per_s",
        "train_peak_gb",
        "act_ms",
        "act_peak_gb",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [str(row.get(column, row.get("error", ""))) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
