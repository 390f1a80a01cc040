"""Episodes a minute of PushT with the same weights: a plain loop, LeRobot's `lerobot-eval`, `vlafit eval`.

    make .venv-lerobot/ready      # one environment with both (Python 3.12, some GB); then gym-pusht into it:
    .venv-lerobot/bin/pip install 'pymunk<7' pygame shapely
    .venv-lerobot/bin/pip install --no-deps gym-pusht
    .venv-lerobot/bin/python -m benchmarks.evaluation_beside_lerobot --out FILE
    .venv-lerobot/bin/python -m benchmarks.evaluation_beside_lerobot --table FILE

Run it in the repository's root. Each side is a process of its own, with torch on one thread; all play the
same number of episodes in turns, the order reversed each round. The policy is a small SmolVLA on 96 pixels
with random weights, which LeRobot loads from our export: no episode succeeds, so that every one has 300
steps, and each side replans every 8. Loading is left out; the start of vlafit's environment processes is
not. Only "lerobot-eval, as it comes" films (its first ten episodes). Several environments of lerobot-eval are
in its own process: with processes of their own, its default, 0.6.1 ends at once with a ConnectionResetError
on PushT. Where the time goes is CPU time: policy (with its processors), simulation, drawing, and the rest:
filming, the exchange with environment processes, their start, and Python.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIDES = {  # name -> side, and how it plays
    "plain loop": ("loop", 0),
    "lerobot-eval": ("lerobot", 1),
    "lerobot-eval, as it comes": ("filmed", 1),
    "lerobot-eval, 8 at once": ("lerobot", 8),
    "vlafit eval, 1 worker": ("vlafit", 1),
    "vlafit eval, 2 workers": ("vlafit", 2),
}
PARTS = ("policy", "simulation", "drawing")
CAMERA, SIZE = "top", 96
HORIZON, REPLAN = 300, 8
FIRST_SEED = 90_000
CONFIG = {
    "image_size": SIZE, "vision": {"image_size": SIZE}, "expert": {"mlp": 256}, "chunk": 16, "state_dim": 2,
    "action_dim": 2,
}  # fmt: skip
NATIVE, EXPORTED = "vlafit", "lerobot"

Row = dict[str, Any]


def write_policy(folder: Path) -> None:
    """Write the policy in both formats, with random weights and a codec of the board's range."""
    import numpy as np
    import torch

    from vlafit import envs
    from vlafit.checkpoints.export import write
    from vlafit.codec import Codec, CodecConfig, train_word_tokenizer
    from vlafit.envs import EnvSpec
    from vlafit.envs.pusht import SENTENCE
    from vlafit.policies import build_family

    policy = build_family("smolvla", "smolvla-small", CONFIG, generator=torch.Generator().manual_seed(0))
    needs = policy.needs()
    env = envs.make(EnvSpec("pusht", size=SIZE, cameras=(CAMERA,)))
    robot = env.embodiment
    env.close()
    config = CodecConfig(
        (CAMERA,), needs.image_size, needs.state_dim, needs.action_dim, needs.chunk, prompt=needs.prompt,
        max_tokens=needs.max_tokens, framing=needs.framing,
    )  # fmt: skip
    values = np.random.default_rng(0).uniform(0, 512, (500, 2))
    codec = Codec.fit(config, robot, values, values, train_word_tokenizer([SENTENCE], 300))
    write(policy, codec, NATIVE, folder / NATIVE, "here")
    write(policy, codec, EXPORTED, folder / EXPORTED, "here")


# -------------------------------------------------------------------------------------------------- the sides


def played(side: str, at_once: int, folder: Path, episodes: int) -> Row:
    """Play the episodes in this process, and return what they took."""
    import torch

    torch.set_num_threads(1)
    if side == "loop":
        return _loop(folder, episodes)
    if side == "vlafit":
        return _vlafit(folder, episodes, at_once)
    return _lerobot(folder, episodes, at_once, filmed=side == "filmed")


def _loop(folder: Path, episodes: int) -> Row:
    """One episode after the other, with gym-pusht's own environment, which draws every step."""
    import gym_pusht  # noqa: F401  # registers it
    import gymnasium
    import numpy as np

    from benchmarks.timed_pusht import timed_method, timed_simulation
    from vlafit.actor import load_actor
    from vlafit.envs.pusht import SENTENCE
    from vlafit.types import EpisodeKey, Observation

    seconds = timed_simulation()
    actor = load_actor(folder / NATIVE, device="cpu")
    timed_method(actor, "act", seconds, "policy")
    env = gymnasium.make(
        "gym_pusht/PushT-v0", obs_type="pixels_agent_pos", max_episode_steps=HORIZON, disable_env_checker=True
    )

    def play() -> tuple[int, int]:
        steps = successes = 0
        for seed in range(FIRST_SEED, FIRST_SEED + episodes):
            seen, _ = env.reset(seed=seed)
            over, replans = False, 0
            while not over:
                state = seen["agent_pos"].astype(np.float32)
                (chunk,) = actor.act(
                    [Observation({CAMERA: seen["pixels"]}, state, SENTENCE)],
                    [EpisodeKey(seed, "push-t", replans)],
                )
                replans += 1
                for action in chunk.actions[:REPLAN]:
                    seen, _, succeeded, truncated, _ = env.step(action.clip(0, 512))
                    steps, successes = steps + 1, successes + bool(succeeded)
                    if over := succeeded or truncated:
                        break
        return steps, successes

    return _taken(play, lambda: seconds)


def _vlafit(folder: Path, episodes: int, workers: int) -> Row:
    """What `vlafit eval --videos 0` runs."""
    from benchmarks.timed_pusht import TIMES, timed_method
    from vlafit.actor import load_actor
    from vlafit.rollout import evaluate, load_protocol, policy_width

    protocol = load_protocol("pusht")
    env = dataclasses.replace(protocol.env, name="benchmarks.timed_pusht")
    protocol = dataclasses.replace(
        protocol, env=env, trials=episodes, first_seed=FIRST_SEED, horizon=HORIZON, replan=REPLAN
    )
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as out:
        width = policy_width(protocol, Path(out) / "evaluation")
        actor = load_actor(folder / NATIVE, device="cpu", width=width)
        timed_method(actor, "act", seconds, "policy")
        times = Path(out) / "times"
        times.mkdir()
        os.environ[TIMES] = str(times)

        def play() -> tuple[int, int]:
            result = evaluate(actor, protocol, Path(out) / "evaluation", workers=workers, videos=0)
            return sum(r.steps for r in result.records), sum(bool(r.success) for r in result.records)

        def parts() -> dict[str, float]:
            of_workers = [json.loads(path.read_text()) for path in times.iterdir()]
            return seconds | {p: sum(one[p] for one in of_workers) for p in ("simulation", "drawing")}

        return _taken(play, parts)


def _lerobot(folder: Path, episodes: int, at_once: int, filmed: bool) -> Row:
    """What `lerobot-eval` runs, as many environments at once as named; it films 10 episodes if `filmed`."""
    from lerobot.scripts import lerobot_eval
    from lerobot.utils.import_utils import register_third_party_plugins

    from benchmarks.timed_pusht import timed_method, timed_simulation

    seconds = timed_simulation()
    inner, taken = lerobot_eval.eval_policy_all, {}

    def eval_policy_all(*values: Any, **named: Any) -> Any:
        policy = named["policy"]
        timed_method(policy, "select_action", seconds, "policy")
        for name in ("preprocessor", "postprocessor"):
            named[name] = _Timed(named[name], seconds)
        if not filmed:
            named["max_episodes_rendered"] = 0

        def play() -> tuple[int, int]:
            found = inner(*values, **named)
            successes = found["per_task"][0]["metrics"]["successes"]
            taken["found"] = found
            return episodes * HORIZON, sum(map(bool, successes))

        taken["row"] = _taken(play, lambda: seconds)
        return taken["found"]

    lerobot_eval.eval_policy_all = eval_policy_all
    os.chdir(folder / EXPORTED)  # 0.6.1 looks for the tokenizer and the language model there
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [
            "lerobot-eval", "--policy.path=.", "--policy.device=cpu", f"--policy.n_action_steps={REPLAN}",
            "--env.type=pusht", f"--env.episode_length={HORIZON}", f"--eval.n_episodes={episodes}",
            f"--eval.batch_size={at_once}", "--eval.use_async_envs=false", f"--seed={FIRST_SEED}",
            f"--output_dir={out}",
            f'--rename_map={{"observation.image": "observation.images.{CAMERA}"}}',
        ]  # fmt: skip
        register_third_party_plugins()
        lerobot_eval.eval_main()
    return taken["row"]


class _Timed:
    """A processor of LeRobot, whose calls count as the policy's."""

    def __init__(self, inner: Any, seconds: dict[str, float]) -> None:
        self._inner, self._seconds = inner, seconds

    def __call__(self, values: Any) -> Any:
        began = time.thread_time()
        try:
            return self._inner(values)
        finally:
            self._seconds["policy"] += time.thread_time() - began


def _taken(play: Callable[[], tuple[int, int]], parts: Callable[[], dict[str, float]]) -> Row:
    began, before = time.perf_counter(), _cpu_s()
    steps, successes = play()
    wall, cpu = time.perf_counter() - began, _cpu_s() - before
    return {"wall_s": wall, "cpu_s": cpu, "steps": steps, "successes": successes, "parts": parts()}


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --------------------------------------------------------------------------------------------- the comparison


def measure(name: str, folder: Path, episodes: int) -> Row:
    """Play the episodes of a side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.evaluation_beside_lerobot", "--play", name]
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, "--folder", str(folder), "--episodes", str(episodes)],
        capture_output=True, text=True, env=os.environ | alone,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"wall_s"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{name}: ended with status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def table(rows: Sequence[Row]) -> str:
    """Return a line for each side: episodes a minute with their range, and the CPU seconds of an episode."""
    lines = [
        "| | episodes a minute | CPU s an episode | policy | simulation | drawing | the rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SIDES:
        own = [row for row in rows if row["side"] == name]
        if not own:
            continue
        rates = sorted(60 * row["episodes"] / row["wall_s"] for row in own)
        cells = [f"{statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"]
        means = [statistics.fmean(row["parts"][part] / row["episodes"] for row in own) for part in PARTS]
        cpu = statistics.fmean(row["cpu_s"] / row["episodes"] for row in own)
        cells += [f"{seconds:.2f}" for seconds in (cpu, *means, cpu - sum(means))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    parser.add_argument("--table", type=Path, help="print the table of an earlier run's file, and end")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--play", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        print(json.dumps(played(*SIDES[options.play], options.folder, options.episodes)), flush=True)
        return 0
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return 0
    import torch

    from benchmarks import rows
    from vlafit.envs import EnvSpec, make

    env = make(EnvSpec("pusht", size=SIZE, cameras=(CAMERA,)))
    from importlib.metadata import version

    facts = rows.machine(torch.device("cpu"), "")
    facts |= {"versions": {**env.versions, "lerobot": version("lerobot")}, "cores": os.cpu_count()}
    env.close()
    folder = Path(tempfile.mkdtemp())
    taken: list[Row] = []
    try:
        write_policy(folder)
        for number in range(options.rounds):
            for name in options.sides if number % 2 == 0 else reversed(options.sides):
                row = {"side": name, "round": number, "episodes": options.episodes}
                row |= measure(name, folder, options.episodes)
                rows.write(row | {"load": os.getloadavg()[0]} | facts, options.out)
                taken.append(row)
    finally:
        shutil.rmtree(folder)
    print(table(taken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
