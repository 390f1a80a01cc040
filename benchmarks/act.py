"""Measure how long the product's actor takes for one observation with three views, and what of it is what.

    python -m benchmarks.act --sizes pi0 pi05 smolvla
    python -m benchmarks.act --sizes pi0-tiny --device cpu --calls 5        # checks the script itself

Run it in the repository's root. Each row is measured in a fresh process: a policy with random weights, kept
as `load_actor(dtype=...)` keeps them, in a `PolicyActor` of width 1 with a codec for a robot with three
cameras of 256 pixels and 7 dimensions.

p50, p90, p99   milliseconds of `PolicyActor.act`: observation in, chunk in the robot's units out. The codec,
                the copies to and from the GPU and all sampling steps are in it.
prefix, suffix  milliseconds of one pass over images and prompt, and of one sampling step; median, each
                waited for, so that prefix + steps x suffix is more than the whole where launches overlap.
sample          milliseconds of the sampler, its inputs being on the GPU.
codec           milliseconds of encoding the observation, which is part of the whole.
eager, graph    one kernel after the other; as a CUDA graph, as `load_actor` does on a GPU; with compiled
compiled        blocks, too (`load_actor(compile=True)`). difference: of the chunk to that of eager, relative.
int8, fp8       matrices in 8 bits (`load_actor(quantise=...)`), one kernel after the other; weights: GB.
kernels         of one call, by torch.profiler, with launches and the time in which the GPU was busy.
--profile       writes its 25 longest operations into a text file beside --out for each row.
"""

import argparse
import itertools
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import rows
from benchmarks.rows import Row
from vlafit.actor import PolicyActor
from vlafit.checkpoints import keep_in
from vlafit.codec import Codec, CodecConfig
from vlafit.codec.prompts import FORMS
from vlafit.codec.tokenizer import train_word_tokenizer
from vlafit.inference import accelerated, with_steps
from vlafit.nn.batch import stack
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import Policy
from vlafit.tuning.quantise import stored_bytes
from vlafit.types import Embodiment, EpisodeKey, Feature, Observation

VIEWS = ("front", "left", "wrist")
PIXELS, DIMENSIONS = 256, 7
ROBOT = Embodiment(
    "arm",
    tuple(Feature(view, (PIXELS, PIXELS, 3)) for view in VIEWS),
    Feature("state", (DIMENSIONS,)),
    Feature("action", (DIMENSIONS,)),
    20.0,
    "delta_position",
)
TASK = "put the bowl on the plate"
MODES = ("eager", "graph", "compiled")
QUANTISED = ("int8", "fp8")
PARTS_CALLS = 20  # of prefix and suffix
COLUMNS = (
    "size", "dtype", "mode", "difference", "steps", "p50_ms", "p90_ms", "p99_ms", "sample_ms", "prefix_ms",
    "suffix_step_ms", "codec_ms", "kernels", "launches", "device_busy_ms", "peak_gb", "weights_gb",
)  # fmt: skip


def main() -> int:
    options = parser().parse_args()
    if options.one:
        return rows.print_values(measure(options.one))
    measured = list(measure_all(points_of(options), options))
    print(rows.table(measured, COLUMNS))
    return 1 if any("error" in row for row in measured) else 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["pi0", "pi05", "smolvla"], choices=list(rows.sizes()))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=(*MODES, *QUANTISED))
    parser.add_argument("--steps", nargs="+", type=int, default=[10], help="sampling steps [10]")
    parser.add_argument("--calls", type=int, default=100, help="measured calls [100]")
    parser.add_argument("--warm-up", type=int, default=5, help="calls before them [5]")
    rows.add_options(parser)
    return parser


def measure_all(points: list[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Yield the row of each point, and add it to the file of rows."""
    for row in rows.measured_rows("act", points, options):
        rows.write(row, options.out)
        yield row


def points_of(options: argparse.Namespace) -> list[Row]:
    """Return what is to be measured, in the order of the options."""
    points = []
    every = itertools.product(options.sizes, options.dtypes, options.modes, options.steps)
    for size, dtype, mode, steps in every:
        beside = options.out or Path("act.jsonl")
        table = beside.with_name(f"{beside.stem}-{size}-{dtype}-{mode}-{steps}.txt")
        points.append({
            "size": size, "dtype": dtype, "mode": mode, "steps": steps, "calls": options.calls,
            "warm_up": options.warm_up, "device": options.device, "commit": options.commit,
            "profile": str(table) if options.profile else "",
        })  # fmt: skip
    return points


def actor_of(point: Row) -> PolicyActor:
    """Return an actor with random weights, kept as a checkpoint's are after `load_actor`."""
    policy = rows.random_policy(point["size"], torch.device(point["device"]))
    keep_in(policy, point["dtype"])
    return PolicyActor(with_steps(policy, point["steps"]), codec_of(policy), width=1)


def codec_of(policy: Policy) -> Codec:
    """Return a codec of the benchmark's robot for the policy."""
    needs, rng = policy.needs(), np.random.default_rng(0)
    dimensions = min(DIMENSIONS, needs.state_dim, needs.action_dim)
    settings = CodecConfig(
        cameras=VIEWS,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        framing=needs.framing,
    )
    assert needs.prompt is not None
    tokenizer = train_word_tokenizer([TASK, *FORMS[needs.prompt].vocabulary], needs.vocabulary)
    values = rng.normal(size=(50, dimensions))
    return Codec.fit(settings, robot(dimensions), values, values, tokenizer)


def robot(dimensions: int) -> Embodiment:
    """Return the benchmark's robot, with fewer dimensions for a policy that takes fewer."""
    return Embodiment(
        ROBOT.name,
        ROBOT.cameras,
        Feature("state", (dimensions,)),
        Feature("action", (dimensions,)),
        ROBOT.hz,
        ROBOT.control,
    )


def observation(dimensions: int) -> Observation:
    """Return a random observation of the benchmark's robot."""
    rng = np.random.default_rng(1)
    images = {camera.name: rng.integers(0, 256, camera.shape, np.uint8) for camera in ROBOT.cameras}
    return Observation(images, rng.normal(size=dimensions).astype(np.float32), TASK)


def measure(point: Row) -> Iterator[Row]:
    """Yield the facts of a point's machine, and then what its actor takes."""
    device = torch.device(point["device"])
    began = time.perf_counter()
    yield rows.machine(device, point["commit"])
    actor = actor_of(point)
    rows.wait_for(device)
    yield {"build_s": round(time.perf_counter() - began, 1)}
    seen = observation(actor.embodiment.state.shape[0])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    replans = itertools.count()
    if point["mode"] != "eager":
        key = EpisodeKey(0, TASK, 0)
        eager = actor.act([seen], [key])[0].actions
        accelerated(actor.policy, point["mode"] == "compiled", point["mode"] * (point["mode"] in QUANTISED))
        began = time.perf_counter()
        chunk = actor.act([seen], [key])[0].actions
        yield {
            "first_call_s": round(time.perf_counter() - began, 1),
            "difference": float(np.linalg.norm(chunk - eager) / np.linalg.norm(eager)),
        }
    yield {"weights_gb": sum(stored_bytes(p) for p in actor.policy.parameters()) / 1e9}

    def act() -> None:
        actor.act([seen], [EpisodeKey(0, TASK, next(replans))])

    rows.timed(act, point["warm_up"], device)
    taken = rows.timed(act, point["calls"], device)
    p50, p90, p99 = np.percentile(np.array(taken), [50, 90, 99]).tolist()
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    yield {"p50_ms": round(p50, 3), "p90_ms": round(p90, 3), "p99_ms": round(p99, 3), "peak_gb": peak}
    yield parts_of(actor, seen, point["calls"], device)
    if device.type == "cuda" or point["profile"]:
        profiler = rows.profiler(device)
        with profiler:
            act()
            rows.wait_for(device)
        yield rows.profiled(profiler, device, Path(point["profile"]) if point["profile"] else None)


@torch.no_grad()
def parts_of(actor: PolicyActor, seen: Observation, calls: int, device: torch.device) -> Row:
    """Return the medians of the codec, of the prefix pass and of one sampling step."""
    policy, codec, calls = actor.policy.eval(), actor.codec, min(calls, PARTS_CALLS)
    assert isinstance(policy, FlowPolicy)
    batch = stack([codec.encode(seen)]).to(device)
    noisy = torch.randn(1, 1, codec.config.chunk, codec.config.action_dim, device=device)
    when = torch.ones(1, 1, device=device)
    prefix = policy.encode_prefix(batch, fixed=True)
    timings = {
        "sample_ms": rows.timed(
            lambda: policy.sample(batch, noisy[:, 0], actor.policy.steps or 1), calls, device
        ),
        "codec_ms": rows.timed(lambda: codec.encode(seen), calls, device),
        "prefix_ms": rows.timed(lambda: policy.encode_prefix(batch, fixed=True), calls, device),
        "suffix_step_ms": rows.timed(lambda: policy.denoise(prefix, batch.state, noisy, when), calls, device),
    }
    return {name: round(statistics.median(taken), 3) for name, taken in timings.items()}


if __name__ == "__main__":
    sys.exit(main())
