"""A tiny experiment for the toy robot: recordings in LIBERO's layout, their card, a recipe of a few steps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from vlafit import config
from vlafit.recipe import DataRecipe, EvalRecipe, OptimRecipe, PolicyRecipe, Recipe, TrainRecipe

REPOSITORY = Path(__file__).parents[2]
SIZE = 16  # pixels
CARD = """
name = "dots"
layout = "libero"
path = "dots"

[instruction]
source = "attrs"

[robot]
name = "dot"
hz = 10.0
control = "delta_position"
renderer = "ray"
state = { keys = ["obs/at"], dimensions = 2 }
action = { keys = ["actions"], dimensions = 2 }

[[robot.cameras]]
name = "front"
key = "obs/front"
height = 16
width = 16
"""
PROTOCOL = """
name = "toy"
tasks = ["left", "right"]
trials = 2
first_seed = 100
horizon = 6
replan = 3

[env]
name = "tests.rollout.toy_env"
size = 16

[swapped]
left = "right"
right = "left"
"""


def write_dots(
    folder: Path, episodes: int = 4, tasks: tuple[str, ...] = ("left", "right"), seed: int = 0
) -> Path:
    """Write episodes of 6, 7, ... steps in which a dot goes to one side, and return their card."""
    rng = np.random.default_rng(seed)
    (folder / "dots").mkdir(parents=True)
    for task in tasks:
        with h5py.File(folder / "dots" / f"{task}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": f"go to the {task}"})
            for number in range(episodes):
                length = 6 + number
                side = 1.0 if task == "right" else -1.0
                actions = rng.normal([side, 0], 0.3, (length, 2)).astype(np.float32)
                at = np.clip(np.cumsum(0.1 * actions, axis=0), -1, 1).astype(np.float32)
                group = data.create_group(f"demo_{number}")
                group.create_dataset("actions", data=actions)
                group.create_dataset("obs/at", data=at)
                images = rng.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8)
                group.create_dataset("obs/front", data=images)
    (folder / "dots.toml").write_text(CARD)
    (folder / "toy.toml").write_text(PROTOCOL)
    return folder / "dots.toml"


def tiny(card: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe of 8 steps on the card; `sections` replace fields: ``train={"steps": 4}``.

    Its policy has fewer layers than pi0-tiny, because a run's time goes by them: 1.2 s of CPU instead of 1.7.
    """
    shallow = {"max_tokens": 16, "vision": {"depth": 1}, "language": {"depth": 2}}
    plain = {"name", "purpose", "strategy"} & set(sections)
    recipe = Recipe(
        name="tiny",
        policy=PolicyRecipe(family="pi0", size="pi0-tiny", config=shallow),
        data=DataRecipe(cards=(str(card),), validation=0.25),
        optim=OptimRecipe(lr=1e-3, warmup_steps=2, ema=0.9, weight_decay=0.01),
        train=TrainRecipe(
            steps=8, batch_size=4, draws=2, seed=3, log_every=1, validate_every=4, validation_batches=1,
            save_every=3, keep=1, threads=1, trackers=(), report=False,
        ),
        eval=EvalRecipe(after=False, workers=1, videos=0),
    )  # fmt: skip
    for name, values in sections.items():
        new = values if name in plain else replace(getattr(recipe, name), **values)
        recipe = replace(recipe, **{name: new})
    return recipe


def start(recipe: Recipe, out: Path, *words: str, **env: str) -> "subprocess.Popen[str]":
    """Start `python -m vlafit train` as its own process."""
    path = out.with_name(f"{out.name}.toml")
    path.write_text(config.dump(recipe))
    command = [sys.executable, "-m", "vlafit", "train", str(path), "--out", str(out), *words]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | env
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """The training loss by step; a step that is logged twice is an error."""
    found = [(event["step"], event["train/loss"]) for event in metrics(out) if "train/loss" in event]
    assert len(dict(found)) == len(found), f"a step is logged twice: {found}"
    return dict(found)


def learned(out: Path, step: int) -> dict[str, Tensor]:
    """Everything that training changed: exported weights, raw weights, moving average, AdamW's states."""
    folder = out / "checkpoints" / f"step_{step:06d}"
    files = [folder / "model.safetensors"]
    if not files[0].is_file():  # it sits on a base
        files = [folder / "trained.safetensors", *folder.glob("adapters/*/adapter_model.safetensors")]
    exported = {f"exported/{k}": v for file in files for k, v in load_file(file).items()}
    return exported | load_file(folder / "training" / "state.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    odd = [name for name in one if not one[name].equal(other[name])]
    assert not odd, f"not bit-identical: {odd[:5]}"
