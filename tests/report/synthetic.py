"""A run folder as a training run leaves it, made in a second: real writers, made-up numbers."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from vlafit import config
from vlafit.envs import EnvSpec
from vlafit.policies import pi0
from vlafit.recipe import DataRecipe, EvalRecipe, PolicyRecipe, Recipe, TrainRecipe
from vlafit.rollout import Protocol, video
from vlafit.score import Score, errors_notice, overall
from vlafit.tuning import load_strategy, preview

TASKS = {
    "faucet-open-v3": "rotate the faucet counter-clockwise",
    "faucet-close-v3": "rotate the faucet clockwise",
}
RECIPE = Recipe(
    name="quickstart",
    purpose="Two tasks that the checkpoint has never seen, told apart by the instruction alone.",
    policy=PolicyRecipe(checkpoint="metaworld-small"),
    data=DataRecipe(cards=("metaworld-faucet",)),
    strategy="full",
    train=TrainRecipe(steps=400, batch_size=16),
    eval=EvalRecipe(protocol="metaworld-faucet", before=True, after=True, wrong_instruction=True, every=200),
)


def write_run(folder: Path, recipe: Recipe = RECIPE) -> Path:
    """Write a finished run with all its evaluations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(config.dump(recipe))
    with torch.device("meta"):
        policy = pi0.build(pi0.SIZES["pi0-tiny"])
    (folder / "plan.json").write_text(preview(policy, load_strategy("expert")).to_json())
    write_metrics(folder, recipe.train.steps)
    write_evaluation(folder, "before", (1, 0), 25)
    write_evaluation(folder, "step_000200", (3, 2), 5, filmed=0)
    write_evaluation(folder, "after", (24, 23), 25)
    write_evaluation(folder, "wrong_instruction", (0, 1), 25)
    checkpoint = folder / "checkpoints" / f"step_{recipe.train.steps:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    write_json(
        folder / "run.json",
        {
            "command": "vlafit train quickstart",
            "started": "2026-01-02T03:04:05+00:00",
            "ended": "2026-01-02T03:12:05+00:00",
            "finished": True,
            "seconds": 480.2,
            "train_seconds": 300.0,
            "steps": recipe.train.steps,
            "load_report": "all 220 tensors loaded exactly",
            "processes": 1,
            "device": "cpu: x86_64",
            "threads": 2,
            "cpus": 2,
            "versions": {"python": "3.12.1", "torch": "2.13.0", "vlafit": "0.1.0"},
            "commit": "0123456789abcdef",
        },
    )
    return folder


def write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def write_metrics(folder: Path, steps: int) -> None:
    """Write curves that fall, with the noise of small batches."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(0, steps + 1, 5):
        time_s, progress = step * 0.75, step / steps
        if step:
            noise = 1 + 0.25 * rng.standard_normal()
            values = {
                "train/loss": max(0.02, (0.05 + 0.9 * math.exp(-5 * progress)) * noise),
                "train/lr": 3e-4 * min(1, step / 40) * (0.55 + 0.45 * math.cos(math.pi * progress)),
                "train/grad_norm": 1.5 * math.exp(-2 * progress) * noise,
                "train/samples_per_s": 21 + rng.standard_normal(),
                "train/data_share": 0.05 + 0.01 * rng.random(),
            }
            lines.append({"step": step, "time_s": time_s, **values})
        if step % 50 == 0:
            loss = 0.07 + 0.85 * math.exp(-5 * progress)
            values = {"validation/loss": loss, "validation/action_error": 0.1 + 0.5 * math.exp(-4 * progress)}
            lines.append({"step": step, "time_s": time_s, **values})
    lines.append({"step": steps, "eval/after/success": 0.94})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def frames(reach: float, count: int = 40) -> list[np.ndarray]:
    """Pictures of a square that moves `reach` of the way towards a disc."""
    found = []
    y, x = np.mgrid[:64, :64]
    for i in range(count):
        picture = np.full((64, 64, 3), (196, 190, 178), np.uint8)
        picture[40:] = (128, 96, 70)
        picture[(x - 46) ** 2 + (y - 34) ** 2 < 50] = (180, 40, 40)
        at = int(6 + 34 * reach * i / count)
        picture[20:30, at : at + 10] = (40, 60, 120)
        found.append(picture)
    return found


def write_evaluation(
    folder: Path, name: str, successes: tuple[int, int], trials: int, *, errors: int = 0, filmed: int = 1
) -> None:
    """Write an evaluation as `vlafit.rollout` does; the first `errors` episodes of the first task broke."""
    out, wrong = folder / "eval" / name, name == "wrong_instruction"
    told = dict(zip(TASKS, reversed(TASKS.values()), strict=True)) if wrong else TASKS
    records, scores = [], {}
    for (task, sentence), count in zip(told.items(), successes, strict=True):
        broken = errors if task == next(iter(TASKS)) else 0
        scores[task] = Score(count, trials - broken, broken)
        for trial in range(trials):
            done = trial < count + broken if 2 * count > trials else trial >= trials - count
            success = None if trial < broken else done
            record = {
                "task": task,
                "trial": trial,
                "seed": 1000 + trial,
                "instruction": sentence,
                "success": success,
                "steps": 63 if success else 150,
                "replans": 13,
                "wall_s": 2.5,
                "error": "the environment process ended by SIGSEGV" if success is None else None,
                "video": None,
            }
            if trial < filmed:
                record["video"] = f"videos/{task}_{1000 + trial}.mp4"
                film = frames(1.0 if success else 0.3)
                video.write_mp4(out / record["video"], film, 12.5)
                strip = video.strip(film, video.colour_of(success), f"{task}, seed {1000 + trial}")
                video.write_png((out / record["video"]).with_suffix(".png"), strip)
            records.append(record)
    protocol = Protocol(
        "metaworld-faucet", EnvSpec("metaworld"), tuple(TASKS), trials, 1000, horizon=150, replan=12
    )
    total = overall(scores)
    notice = errors_notice(total)
    out.mkdir(parents=True, exist_ok=True)
    (out / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_json(
        out / "result.json",
        {
            "format": 1,
            "protocol": protocol.to_json(),
            "protocol_sha256": protocol.sha256(),
            "actor": "checkpoint sha256:" + "a" * 64,
            "tasks": {task: {"instruction": told[task], **one.to_json()} for task, one in scores.items()},
            "trials": trials,
            "wrong_instruction": wrong,
            "overall": total.to_json(),
            "complete": not notice,
            "notices": [notice] if notice else [],
            "versions": {"metaworld": "3.1.1", "mujoco": "3.3.0"},
            "software": {"python": "3.12.1", "numpy": "2.3.0"},
            "renderer": "ray",
            "seconds": 61.0,
        },
    )
