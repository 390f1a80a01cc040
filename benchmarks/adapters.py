"""Measure time and memory of a training step on a CPU for each tuning strategy, relative to full and to LoRA.

    python benchmarks/adapters.py [--strategies full lora dora ...] [--rounds 3] [--out adapters.json]

A pi0 of 51 M parameters (tower 6 x 384, language model 8 x 512, expert 8 x 256), random weights, float32,
one thread, batch 4. Each strategy runs in a process of its own, in turns, `--rounds` times; the median is
reported. Time is the CPU time of one whole step (forward, backward, AdamW). "kept" is the memory that
autograd keeps for the backward pass, without weights; "peak" the process's peak resident memory above its
level before the policy was built. A strategy in stages has a row for each (`progressive, stage 2`), because
its cost changes as it unfreezes. `dora (peft)` is DoRA with peft's own layer instead of factored norms.
`--size pi0-tiny` checks the script itself. On a GPU, use benchmarks/train.py."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

PEFTS_DORA = "dora (peft)"
STRATEGIES = [
    "full", "frozen-vision", "mlp", "attention", "expert", "projections", "lora", "lora-all", "rslora",
    "dora", PEFTS_DORA, "loha", "lokr", "adalora", "oft", "ia3", "miss", "openpi-lora", "qlora",
    "progressive", "progressive-lora",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--size", default="50M", help="50M, or a name of vlafit.policies.pi0.SIZES")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", metavar="STRATEGY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.size, options.batch, options.steps)))
        return 0
    names = [row for name in options.strategies for row in rows_of(name, options.size)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                failed[name] = (done.stderr.strip().splitlines() or ["no message"])[-1]
            else:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"round {number + 1}: {name}: {failed.get(name) or runs[name][-1]}",
                file=sys.stderr,
                flush=True,
            )
    rows = [
        {"strategy": name, **{key: statistics.median(run[key] for run in found) for key in found[0]}}
        for name, found in runs.items()
        if found
    ]
    print(table(rows))
    for name, message in failed.items():
        print(f"{name} failed: {message}")
    if options.out:
        content = {"command": " ".join(["python", *sys.argv]), "rows": rows, "failed": failed}
        options.out.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if failed else 0


STAGE = ", stage "


def rows_of(strategy: str, size: str) -> list[str]:
    """Return the rows of a strategy: itself, or one for each of its stages."""
    from vlafit import tuning
    from vlafit.policies import pi0

    if strategy == PEFTS_DORA:
        return [strategy]
    infos = pi0.build(_config(size), "meta").parts()
    count = len(tuning.load_strategy(strategy).expand(infos).stages)
    return [strategy] if count == 1 else [f"{strategy}{STAGE}{number + 1}" for number in range(count)]


def measure(strategy: str, size: str, rows: int, steps: int) -> dict[str, float]:
    """Return one run's figures: `trainable`, `step_s`, `kept_mb`, `peak_mb`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    from benchmarks.train import host_batch
    from vlafit import tuning
    from vlafit.policies import pi0
    from vlafit.recipe import OptimRecipe

    if strategy == PEFTS_DORA:
        from vlafit.tuning import dora

        dora.begin = lambda policy, name: None
        strategy = "dora"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import peft  # noqa: F401 - its own memory is not the strategy's

    before = _resident_mb()
    strategy, _, stage = strategy.partition(STAGE)
    policy = pi0.build(_config(size), "cpu", torch.Generator().manual_seed(0))
    plan = tuning.apply(policy, tuning.load_strategy(strategy))
    if stage:
        plan = plan.at(int(stage) - 1)
        tuning.enter(policy, plan)
    optimizer = torch.optim.AdamW(plan.groups(policy, OptimRecipe()), fused=True)
    needs = policy.needs()
    batch = host_batch(needs, "padded", rows, 0).to("cpu")
    noise, when = torch.randn(rows, needs.chunk, needs.action_dim), torch.rand(rows)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        policy.flow_loss(batch, noise, when)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    times = []
    for _ in range(steps):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return {
        "trainable": plan.trainable_parameters,
        "step_s": statistics.median(times),
        "kept_mb": sum(kept.values()) / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before,
    }


def _config(size: str):
    from vlafit.policies import pi0

    return pi0.SIZES[size] if size in pi0.SIZES else _fifty_million()


def _fifty_million():
    from vlafit.policies import pi0

    return pi0.Pi0Config(
        pi05=False,
        state_input="continuous",
        vision=pi0.VisionConfig(width=384, depth=6, mlp=1536, heads=6, patch=16, image_size=112),
        language=pi0.LanguageConfig(
            width=512, depth=8, mlp=1536, heads=8, kv_heads=1, head_dim=64, vocab=8192
        ),
        expert=pi0.ExpertConfig(width=256, mlp=1024),
        state_dim=32,
        action_dim=32,
        chunk=16,
        max_tokens=32,
    )


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table, with ratios to LoRA's and full fine-tuning's step."""
    by_name = {row["strategy"]: row for row in rows}

    def ratio(row: dict, key: str, to: str) -> str:
        return f"{row[key] / by_name[to][key]:.2f}" if to in by_name else ""

    lines = [
        "| strategy | trainable | step s | / full | / LoRA | kept MB | peak MB | peak / full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            row["strategy"], f"{row['trainable']:,.0f}", f"{row['step_s']:.2f}", ratio(row, "step_s", "full"),
            ratio(row, "step_s", "lora"), f"{row['kept_mb']:.0f}", f"{row['peak_mb']:.0f}",
            ratio(row, "peak_mb", "full"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
