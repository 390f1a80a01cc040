"""Count how often the scripted expert, or chance, solves LIBERO's tasks; one JSON line an episode.

    python eval/libero_expert.py --suite libero-object --actor expert --first-seed 1000 --trials 10
    python eval/libero_expert.py --suite libero-object --actor chance --first-seed 0 --trials 1

Seeds 0 to 49 are the official initial states, those from 1000 on are sampled from the tasks' BDDL regions,
as `vlafit record` samples them. Horizon, settle steps and tasks are those of the suite's openpi protocol; no
picture is drawn. Episodes that the file holds already are not played again, so a stopped run goes on; those
of another expert are removed: `expert` is a hash of the code of the motion that the task takes.
Prints the table of all; `python eval/readme.py` writes it into eval/README.md.
"""

import argparse
import hashlib
import inspect
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vlafit import envs, files
from vlafit.envs import (
    experts_libero,
    experts_libero_parts,
    experts_libero_place,
    experts_libero_push,
    libero_control,
    libero_parts,
    libero_scene,
)
from vlafit.envs.libero import SAMPLED, Libero
from vlafit.rollout import Protocol, load_protocol
from vlafit.types import ActionChunk, Actor, EpisodeKey, Observation

RESULTS = Path("eval/results/libero-expert.jsonl")
EACH = (libero_control, libero_scene)  # modules of every motion
CODE = {
    "part": (experts_libero_parts, libero_parts),
    "place": (experts_libero_place,),
    "push": (experts_libero_push,),
}  # those of each motion


class Chance:
    """Draws actions evenly from [-1, 1]; each is held for five steps."""

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        return [self._act(key) for key in keys]

    def _act(self, key: EpisodeKey) -> ActionChunk:
        rng = np.random.default_rng([key.seed, key.replan // 5])
        return ActionChunk(rng.uniform(-1, 1, (1, 7)).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="libero-object")
    parser.add_argument("--actor", choices=("expert", "chance"), default="expert")
    parser.add_argument("--tasks", type=int, nargs="*", help="positions in the protocol [all]")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no episode after so many")
    parser.add_argument("--first-seed", type=int, default=SAMPLED)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    protocol = load_protocol(f"{options.suite}-openpi")
    numbers = options.tasks if options.tasks is not None else range(len(protocol.tasks))
    lines = options.results.read_text().splitlines() if options.results.is_file() else []
    earlier = [json.loads(line) for line in lines]
    rows = [
        row
        for row in earlier
        if row["actor"] == "chance" or row["expert"] == code(row.get("motion", "place"))
    ]
    if len(rows) < len(earlier):
        files.write_atomic(options.results, "".join(json.dumps(row) + "\n" for row in rows))
    played = {(row["actor"], row["task"], row["seed"]) for row in rows}
    env = Libero(envs.EnvSpec("libero", size=8, renderer="auto", cameras=("agentview",)))
    until = time.monotonic() + 60 * options.minutes
    try:
        for task in (protocol.tasks[number] for number in numbers):
            for seed in range(options.first_seed, options.first_seed + options.trials):
                if (options.actor, task, seed) in played or time.monotonic() > until:
                    continue
                actor = envs.expert("libero") if options.actor == "expert" else Chance()
                row = {"suite": options.suite, "actor": options.actor, "task": task, "seed": seed}
                row |= play(env, actor, protocol, task, seed)
                motion = row.pop("motion")
                if options.actor == "expert":
                    row |= {"motion": motion, "expert": code(motion)}
                rows.append(row)
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    finally:
        env.close()
    show(rows)


def code(motion: str) -> str:
    """Return a hash of the code that plays a motion."""
    modules = (*EACH, *CODE[motion])
    return hashlib.sha256(
        b"".join(Path(inspect.getfile(module)).read_bytes() for module in modules)
    ).hexdigest()[:12]


def play(env: Libero, actor: Actor, protocol: Protocol, task: str, seed: int) -> dict[str, object]:
    """Play one episode; return its success, steps, CPU time and the motion that the expert has for it."""
    started = time.process_time()
    observation = env.reset(task, seed, render=False)
    if seed < SAMPLED:
        for _ in range(protocol.settle_steps):
            rest = np.array(protocol.settle_action, np.float32)
            observation, _, _ = env.step(rest, render=False)
    success, steps = False, 0
    while not success and steps < protocol.horizon:
        action = actor.act([observation], [EpisodeKey(seed, task, steps)])[0].actions[0]
        observation, success, _ = env.step(action, render=False)
        steps += 1
    cpu = round(time.process_time() - started, 1)
    motion = experts_libero.motion(observation)
    return {"success": success, "steps": steps, "cpu_s": cpu, "mujoco": version("mujoco"), "motion": motion}


def show(rows: list[dict]) -> None:
    """Print successes by actor, kind of start and task."""
    counts: dict[tuple[str, str, str, str], list[bool]] = defaultdict(list)
    for row in rows:
        start = "sampled" if row["seed"] >= SAMPLED else "official"
        counts[row["suite"], row["actor"], start, row["task"]].append(row["success"])
    for (suite, actor, start, task), outcomes in counts.items():
        print(f"| {suite} | {actor} | {start} | {task} | {sum(outcomes)} of {len(outcomes)} |")


if __name__ == "__main__":
    main()
