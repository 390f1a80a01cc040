"""A robot of pan, lift and grip whose numbers are worked out by hand, its cards and its checkpoints.

Its state at step t is (1 + t/2, 2 - t/5, 3 + 0.1 (t odd)), its action the state plus (0.5, -0.5, 1).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.train.agreement_world import codec_config
from vlafit import checkpoints
from vlafit.agreement import Agreement, Item
from vlafit.codec import Codec, Statistics, train_word_tokenizer
from vlafit.nn.policy import Policy
from vlafit.types import Embodiment, Feature

T, EPISODES = 8, 5
STEP = np.arange(T)
STATES = np.stack([1 + 0.5 * STEP, 2 - 0.2 * STEP, 3 + 0.1 * (STEP % 2)], axis=1)
ACTIONS = STATES + np.array([0.5, -0.5, 1])
NAMES = ("pan", "lift", "grip")
CARD = """
name = "{name}"
layout = "libero"
path = "data"
[instruction]
source = "attrs"
[robot]
name = "arm"
hz = {hz}
control = "joint_position"
relative = {relative}
[robot.state]
keys = ["{key}"]
dimensions = {dimensions}
labels = {labels}
{state}
[robot.action]
keys = ["actions"]
dimensions = 3
labels = {action_labels}
{action}
"""
KEYS = {"top": "top", "hand": "hand"}


def write_card(
    folder: Path,
    *,
    states: np.ndarray = STATES,
    scaled: Any = 1.0,
    order: list[int] | None = None,
    cameras: dict[str, str] = KEYS,
    height: int = 16,
    edit: Callable[[h5py.File], None] | None = None,
    labels: tuple[str, ...] = NAMES,
    sentence: str = "push the cube",
    **texts: Any,
) -> Path:
    """Write the dataset and its card; frames of the key `top` are 10, of any other 20, plus the episode."""
    (folder / "data").mkdir()
    some = order or [0, 1, 2]
    with h5py.File(folder / "data" / "a_demo.hdf5", "w") as file:
        group = file.create_group("data")
        group.attrs["problem_info"] = json.dumps({"language_instruction": sentence})
        for number in range(EPISODES):
            demo = group.create_group(f"demo_{number}")
            demo["obs/s"] = (states * scaled)[:, some].astype(np.float32)
            demo["actions"] = (ACTIONS * scaled)[:, some].astype(np.float32)
            for key in cameras.values():
                demo[f"obs/{key}"] = np.full((T, 16, 16, 3), (10 if key == "top" else 20) + number, np.uint8)
        if edit:
            edit(file)
    values: dict[str, Any] = {"name": "arm", "hz": 10, "relative": [], "key": "obs/s", "dimensions": 3}
    values |= {"labels": labels, "action_labels": labels, "state": "", "action": ""} | texts
    for name in ("relative", "labels", "action_labels"):
        values[name] = json.dumps(list(values[name]))
    text = CARD.format(**values)
    for name, key in cameras.items():
        text += f'[[robot.cameras]]\nname = "{name}"\nkey = "obs/{key}"\nheight = {height}\nwidth = 16\n'
    (folder / "card.toml").write_text(text)
    return folder / "card.toml"


def write_checkpoint(
    folder: Path,
    policy: Policy,
    *,
    cameras: tuple[str, ...] = ("top", "hand"),
    relative: tuple[bool, ...] = (),
    labels: tuple[str, ...] = NAMES,
    unit: str = "",
    normalisation: Any = "mean_std",
    mean: tuple[float, ...] = (1, 2, 3),
    low: Any = None,
    high: Any = None,
    prompt: Any = "pi0",
    learned: tuple[str, str] | None = None,
) -> Path:
    """Write the checkpoint; `learned` is an item of its agreement, and what that says of the data."""
    state = Feature("state", (3,), unit, labels)
    views = tuple(Feature(name, (16, 16, 3)) for name in cameras if name)
    robot = Embodiment("arm", views, state, replace(state, name="action"), 10.0, "joint_position")
    config = codec_config(cameras, normalisation, relative, prompt)
    numbers = (("state", mean, (2, 1, 0.5)), ("action", (0, 1, -1), (1, 2, 4)))
    statistics = {
        name: Statistics(
            9,
            np.asarray(middle, float),
            np.asarray(std, float),
            min=None if low is None else np.asarray(low[number], float),
            max=None if high is None else np.asarray(high[number], float),
        )
        for number, (name, middle, std) in enumerate(numbers)
    }
    words = train_word_tokenizer(["push the cube", "\n"], 300)
    items = () if learned is None else (Item(learned[0], {"dataset": learned[1]}, learned[1], "same"),)
    agreement = Agreement(items, cameras, relative) if items else None
    checkpoints.save(policy, folder, Codec(config, robot, statistics, words), agreement=agreement)
    return folder
