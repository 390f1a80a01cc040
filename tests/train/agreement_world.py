"""A robot of two joints with a dataset and a checkpoint whose every number is chosen, not drawn.

State at step t: (0.5 + 0.1 t, -0.1 t). Action: state + (1, 2). The checkpoint's statistics are mean 0 and
std 1 for states, mean 0.5 and std 2 for actions, without a range, so that no floor applies.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import vlafit
from tests.policies.tiny import random_policy
from vlafit.codec import Codec, CodecConfig, Statistics, train_word_tokenizer
from vlafit.policies.pi0 import SIZES
from vlafit.recipe import AdaptRecipe, DataRecipe, EvalRecipe, PolicyRecipe, Recipe, TrainRecipe
from vlafit.train.data import open_data
from vlafit.train.frozen import FrozenWeights
from vlafit.train.initial_policy import InitialPolicy, initialise
from vlafit.tuning import load_strategy
from vlafit.types import Embodiment, Feature

STEPS, EPISODES = 6, 4
CONFIG = replace(SIZES["pi0-tiny"], max_tokens=16)
CARD = """
name = "joints"
layout = "libero"
path = "joints"

[instruction]
source = "attrs"

[robot]
name = "two-joints"
hz = {hz}
control = "{control}"
renderer = "ray"
relative = {relative}
state = {{ keys = ["obs/at"], dimensions = 2, unit = "{unit}", labels = {labels} }}
action = {{ keys = ["actions"], dimensions = 2, unit = "{unit}", labels = {labels} }}
"""
CAMERA = """
[[robot.cameras]]
name = "{name}"
key = "obs/front"
height = {size}
width = {size}
"""
TEXTS: dict[str, Any] = {"hz": 10.0, "control": "joint_position", "unit": "rad", "labels": '["a", "b"]'}


def states() -> np.ndarray:
    t = np.arange(STEPS)
    return np.stack([0.5 + 0.1 * t, -0.1 * t], axis=1).astype(np.float32)


def write_card(
    folder: Path,
    *,
    cameras: tuple[str, ...] = ("front",),
    size: int = 16,
    relative: str = "[]",
    scale: float = 1.0,
    **texts: Any,
) -> Path:
    """Write the dataset, its values times `scale`, and its card."""
    (folder / "joints").mkdir(parents=True)
    with h5py.File(folder / "joints" / "reach_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "reach out"})
        for number in range(EPISODES):
            group = data.create_group(f"demo_{number}")
            group.create_dataset("actions", data=(states() + np.float32([1, 2])) * np.float32(scale))
            group.create_dataset("obs/at", data=states() * np.float32(scale))
            group.create_dataset("obs/front", data=np.full((STEPS, size, size, 3), 7 + 10 * number, np.uint8))
    text = CARD.format(relative=relative, **(TEXTS | texts))
    text += "".join(CAMERA.format(name=name, size=size) for name in cameras)
    (folder / "joints.toml").write_text(text)
    return folder / "joints.toml"


def codec_config(cameras: tuple[str, ...], normalisation: Any, relative: Any, prompt: Any) -> CodecConfig:
    """The config of a codec for CONFIG."""
    return CodecConfig(
        cameras=cameras,
        image_size=CONFIG.vision.image_size,
        state_dim=CONFIG.state_dim,
        action_dim=CONFIG.action_dim,
        chunk=CONFIG.chunk,
        normalisation=normalisation,
        relative=relative,
        prompt=prompt,
        max_tokens=CONFIG.max_tokens,
    )


def write_checkpoint(
    folder: Path,
    *,
    cameras: tuple[str, ...] = ("front",),
    relative: tuple[bool, ...] = (),
    dimensions: int = 2,
    normalisation: Any = "mean_std",
    prompt: Any = "pi0",
    codec: bool = True,
    **statistics: Any,
) -> Path:
    labels = ("a", "b", "c")[:dimensions]
    column = Feature("state", (dimensions,), "rad", labels)
    robot = Embodiment(
        name="two-joints",
        cameras=tuple(Feature(name, (16, 16, 3)) for name in cameras if name),
        state=column,
        action=replace(column, name="action"),
        hz=10.0,
        control="joint_position",
        renderer="ray",
    )
    config = codec_config(cameras, normalisation, relative, prompt)
    ones = np.ones(dimensions)
    values = {
        "state": Statistics(9, 0 * ones, ones, **statistics),
        "action": Statistics(9, 0.5 * ones, 2 * ones, **statistics),
    }
    words = train_word_tokenizer(["reach out", "\n"], 300)
    policy = random_policy(CONFIG)
    vlafit.save_checkpoint(policy, folder, Codec(config, robot, values, words) if codec else None)
    return folder


def recipe_of(card: Path, checkpoint: Path | None, adapt: dict[str, Any], **data: Any) -> Recipe:
    if checkpoint is None:
        policy = PolicyRecipe(family="pi0", size="pi0-tiny", config={"max_tokens": 16})
    else:
        policy = PolicyRecipe(checkpoint=str(checkpoint))
    return Recipe(
        name="joints",
        policy=policy,
        data=DataRecipe(cards=(str(card),), validation=0.25, **data),
        adapt=AdaptRecipe(**adapt),
        train=TrainRecipe(
            steps=1,
            batch_size=2,
            validate_every=0,
            save_every=0,
            validation_batches=1,
            threads=1,
            trackers=(),
            report=False,
        ),
        eval=EvalRecipe(after=False, workers=1, videos=0),
    )  # fmt: skip


def start(recipe: Recipe) -> InitialPolicy:
    """Begin a run as far as policy, codec and agreement."""
    frozen = FrozenWeights(load_strategy(recipe.strategy), wanted=False)
    return initialise(recipe, open_data(recipe.data, recipe.train.seed), frozen)


def edited(text: str, *changes: tuple[str, str]) -> str:
    """Return a card with each first text replaced by the second, at once."""
    table = dict(changes)
    assert all(text.count(before) for before in table)
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], text)


def card_beside(card: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Write another card beside a card, of the same files, with `changes`."""
    made = card.with_name(f"{name}.toml")
    made.write_text(edited(card.read_text(), ('name = "joints"', f'name = "{name}"'), *changes))
    return made
