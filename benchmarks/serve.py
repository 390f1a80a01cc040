"""Measure what the server adds to the policy: p50 and p99 of requests, beside the bare call.

    python benchmarks/serve.py                                  # 1, 8 and 64 clients, no GPU
    python benchmarks/serve.py --every 1000                     # as robots ask: each once a second
    python benchmarks/serve.py --checkpoint CHECKPOINT --device cuda

A robot with two cameras of 224 pixels asks a policy that takes `--act` milliseconds and computes nothing, so
that server and clients have the machine to themselves; `--checkpoint` measures a real one. Overhead is the
time of a request minus that of one bare call (the same percentile; half of the bare calls come before the
clients, half after them): the wire, both ends, and the wait for the call in progress
where there are several clients. Clients are threads of another process; they ask without a pause, or, with
`--every`, at a robot's pace and each at its own time. `queue` is the mean wait for the policy, and `server
own` the server's mean time for a request less the queue and the policy's call. Numbers of clients take turns
for `--rounds` rounds; figures are medians over rounds, with the least and the largest.
"""

import argparse
import multiprocessing
import platform
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np

from vlafit.serve.client import connect
from vlafit.serve.metadata import Described
from vlafit.serve.options import Options
from vlafit.serve.server import serving
from vlafit.types import ActionChunk, Actor, Embodiment, EpisodeKey, Feature, Observation

PIXELS, JOINTS, CHUNK = 224, 7, 50
ROBOT = Embodiment(
    "arm",
    (Feature("front", (PIXELS, PIXELS, 3)), Feature("wrist", (PIXELS, PIXELS, 3))),
    Feature("state", (JOINTS,)),
    Feature("action", (JOINTS,)),
    30.0,
    "absolute_position",
)


class Timed:
    """Takes a fixed time for each call and returns zeros."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        time.sleep(self.seconds)
        return [ActionChunk(np.zeros((CHUNK, JOINTS), np.float32)) for _ in keys]


def ask(address: str, number: int, requests: int, every_s: float, start: threading.Barrier) -> list[float]:
    """Ask `requests` times, one after the other, `every_s` apart; return how many seconds each took."""
    rng = np.random.default_rng(number)
    with connect(address) as remote:
        images = {c.name: rng.integers(0, 256, c.shape, np.uint8) for c in remote.embodiment.cameras}
        seen = Observation(images, np.zeros(remote.embodiment.state.shape, np.float32), "pick up the cube")
        remote.act([seen], [EpisodeKey(number, "pick", 0)])
        start.wait()
        taken = []
        due = time.perf_counter() + rng.uniform(0, every_s)
        for i in range(requests):
            time.sleep(max(0.0, due + i * every_s - time.perf_counter()))
            began = time.perf_counter()
            remote.act([seen], [EpisodeKey(number, "pick", i)])
            taken.append(time.perf_counter() - began)
    return taken


def robots(address: str, clients: int, requests: int, every_s: float) -> list[float]:
    """Let `clients` threads ask; return the seconds of all their requests."""
    start = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as pool:
        parts = pool.map(lambda number: ask(address, number, requests, every_s, start), range(clients))
        return [seconds for part in parts for seconds in part]


def local(checkpoint: str, device: str, width: int) -> tuple[Actor, Described]:
    """Return a checkpoint's actor and its description."""
    from vlafit.actor import load_actor
    from vlafit.serve.describe import describe

    actor = load_actor(checkpoint, device=device, width=width)
    return actor, describe(actor)


def one_round(options: argparse.Namespace, clients: int) -> dict[str, float]:
    """Serve, let `clients` ask, and return the figures in milliseconds."""
    if options.checkpoint:
        actor, described = local(options.checkpoint, options.device, clients)
    else:
        actor, described = Timed(options.act / 1000), Described(ROBOT, clients, "timed", chunk=CHUNK)
    calls = min(options.requests, 200)
    bare = [bare_call(actor, described, calls)]
    with serving(actor, described, Options(port=0, max_clients=clients)) as running:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            every_s = options.every / 1000
            taken = pool.submit(robots, running.address, clients, options.requests, every_s).result()
        metrics = running.metrics
        batches, requests = sum(metrics.rows.counts), sum(metrics.request.counts)
        queue = metrics.queue.total / requests
        own = metrics.request.total / requests - queue - metrics.act.total / batches
    bare.append(bare_call(actor, described, calls))
    act50, act99 = np.percentile(np.concatenate(bare), [50, 99]).tolist()
    p50, p99 = np.percentile(np.array(taken) * 1000, [50, 99]).tolist()
    return {
        "batch": metrics.rows.total / batches,
        "act p50": act50,
        "act p99": act99,
        "request p50": p50,
        "request p99": p99,
        "overhead p50": p50 - act50,
        "overhead p99": p99 - act99,
        "times act p50": p50 / act50,
        "times act p99": p99 / act99,
        "queue": queue * 1000,
        "server own": own * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--device", default="")
    parser.add_argument("--act", type=float, default=20.0, help="milliseconds of the timed policy [20]")
    parser.add_argument("--requests", type=int, default=200, help="of each client [200]")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--every", type=float, default=0.0, help="milliseconds from request to request [0]")
    parser.add_argument("--rounds", type=int, default=1, help="numbers of clients take turns [1]")
    options = parser.parse_args()
    pace = f"every {options.every:g} ms" if options.every else "without a pause"
    print(
        f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores; "
        f"{options.checkpoint or f'{options.act:g} ms policy'}; {options.requests} requests a client, "
        f"{pace}; {options.rounds} rounds; milliseconds"
    )
    rounds: dict[int, list[dict[str, float]]] = {clients: [] for clients in options.clients}
    for _ in range(options.rounds):
        for clients in options.clients:
            rounds[clients].append(one_round(options, clients))
    heads = list(next(iter(rounds.values()))[0])
    print(f"| clients | {' | '.join(heads)} |")
    print("|---:" * (len(heads) + 1) + "|")
    for clients, figures in rounds.items():
        print(f"| {clients} | {' | '.join(_range([f[head] for f in figures]) for head in heads)} |")


def _range(values: Sequence[float]) -> str:
    middle = f"{np.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.2f}, {max(values):.2f}]"


def bare_call(actor: Actor, described: Described, calls: int) -> np.ndarray:
    """Return the milliseconds of single calls without a server."""
    robot = described.embodiment
    images = {camera.name: np.zeros(camera.shape, np.uint8) for camera in robot.cameras}
    seen = Observation(images, np.zeros(robot.state.shape, np.float32), "pick up the cube")
    taken = []
    for i in range(calls):
        began = time.perf_counter()
        actor.act([seen], [EpisodeKey(0, "pick", i)])
        taken.append(time.perf_counter() - began)
    return np.array(taken) * 1000


if __name__ == "__main__":
    main()
