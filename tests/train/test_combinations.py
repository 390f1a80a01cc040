"""Combinations of card and checkpoint, and what must come out, worked out by hand.

The robot has pan, lift and grip. Its state at step t is (1 + t/2, 2 - t/5, 3 + 0.1 (t odd)), its action the
state plus (0.5, -0.5, 1). The checkpoint's statistics are, unless a row changes them, mean (1, 2, 3) and std
(2, 1, 0.5) of states, mean (0, 1, -1) and std (1, 2, 4) of actions: the first state is normalised to
(0, 0, 0), the first action to (1.5, 0.25, 1.25). Over 8 steps the states deviate by (1.1456, 0.4583, 0.05).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.policies.tiny import random_policy
from tests.train.agreement_world import CONFIG, recipe_of, start
from tests.train.combinations_world import (
    ACTIONS,
    EPISODES,
    NAMES,
    STATES,
    STEP,
    T,
    write_card,
    write_checkpoint,
)
from vlafit.datasets import open_dataset
from vlafit.errors import VlafitError
from vlafit.nn.policy import Policy
from vlafit.types import Observation, Sample

ORDER = [2, 0, 1]  # grip, pan, lift
DEGREES = 57.29578


@dataclass(frozen=True)
class Row:
    """A card, a checkpoint and a recipe, with the numbers, lines or error that must come of them."""

    card: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] | None = field(default_factory=dict)
    """None: fresh weights."""
    adapt: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe's section."""
    state: tuple[float, ...] = ()
    action: tuple[float, ...] = ()
    mask: tuple[bool, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()
    """(item, status) in the agreement; besides these nothing may differ."""
    error: tuple[str, ...] = ()
    at: int = 0
    """The step whose numbers are compared."""
    policy: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] | None = None
    """A second card, of the dataset that gives the statistics."""
    prompt: str = ""
    """The text of the prompt's tokens."""


# By hand: the action of pan has mean 3.25, beyond 3 of std 1; that of grip deviates by 0.05, 1/80 of 4.
USUAL = (("normalised action.pan", "differs"), ("spread of action", "differs"))
GRIP = USUAL[1:]
S0, A0 = (0, 0, 0), (1.5, 0.25, 1.25)
# Chunks of 4 steps have 8, 7, 6, 5 rows k = 0..3 after their start, so that k has mean 34 / 26 and its square
# 76 / 26. Step j of the episode is in min(j + 1, 4) of them: j has mean 108 / 26, its square 554 / 26, and 14
# of the 26 are odd.
LIFT = (34 / 26) / np.sqrt(76 / 26 - (34 / 26) ** 2)
PAN, SHUT = -(108 / 26) / np.sqrt(554 / 26 - (108 / 26) ** 2), -14 / np.sqrt(14 * 12)
SCALE = f"scale = [{DEGREES}, {DEGREES}, {DEGREES}]"


PERCENT = "scale = [100.0, 100.0, 100.0]"
FIRST = ACTIONS[0] - [*STATES[0, :2], 0]
# Relative actions are differences to the chunk's first state, of all chunks of 4 steps.
OF_CHUNKS = np.concatenate([ACTIONS[k : k + 4] - [*STATES[k, :2], 0] for k in range(T)])


def of_quantiles(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    low, high = np.quantile(np.tile(rows, (EPISODES, 1)), [0.01, 0.99], axis=0)
    return (values - low) / (high - low + 1e-6) * 2 - 1  # openpi's


def everywhere(state: str) -> dict[str, str]:
    return {"state": state, "action": state}


def wild(file: h5py.File) -> None:
    file["data/demo_1/obs/s"][4, 0] = 1e20  # type: ignore[index]


ROWS: dict[str, Row] = {
    "the same": Row(state=S0, action=A0, mask=(True, True), lines=USUAL),
    # pan 0.5 / 1, lift (-0.5 - 1) / 2
    "relative on both sides": Row(
        {"relative": [True, True, False]}, {"relative": (True, True, False)},
        state=S0, action=(0.5, -0.75, 1.25), lines=GRIP,
    ),
    "other masks": Row(
        {"relative": [True, True, False]}, {"relative": (True, False, False)},
        error=("relative in dimensions 0, 1", "actions = "),
    ),
    "named columns in another order": Row(
        {"order": ORDER, "labels": ("grip", "pan", "lift")},
        error=("state names", "action names", "another order"),
    ),
    # the action of grip has mean 4.05 and lies under pan's mean 0 and std 1
    "unnamed columns in another order": Row(
        {"order": ORDER, "labels": ()}, error=("normalised action.pan", "mean 4.05"),
    ),
    # 1.1456 / 57.3 by 2, 0.4583 / 57.3 by 1, 0.05 / 57.3 by 0.5
    "radians under degrees": Row(
        {"scaled": 1 / DEGREES}, error=("spread of state", "pan 1/100", "lift 1/125", "grip 1/573"),
    ),
    "radians that both sides call degrees": Row(
        {"scaled": 1 / DEGREES, **everywhere('unit = "degrees"')}, {"unit": "deg", "mean": (0, 0, 0)},
        error=("spread of state", "std pan 2, lift 1, grip 0.5"),
    ),
    "radians converted by the card": Row(
        {"scaled": 1 / DEGREES, **everywhere(SCALE)}, state=S0, action=A0, lines=USUAL,
    ),
    # (0.0305 - 3) / 0.5
    "a gripper of 0 to 1 under percent": Row(
        {"scaled": [1, 1, 0.01]}, error=("normalised state.grip", "mean -5.94"),
    ),
    "the sign of the gripper": Row(
        {"state": "scale = [1.0, 1.0, -1.0]"}, error=("normalised state.grip", "mean -12.1"),
    ),
    # (1 * 2 + 1 - 1) / 2, (2 * 0.5 - 2) / 1
    "scale and offset": Row(
        {"state": "scale = [2.0, 0.5, 1.0]\noffset = [1.0, 0.0, 0.0]"},
        state=(1, -1, 0), action=A0, lines=USUAL,
    ),
    "keys exchanged": Row(
        {"cameras": {"top": "hand", "hand": "top"}}, error=("camera top reads obs/hand", "camera slot 1"),
    ),
    "keys exchanged and confirmed": Row(
        {"cameras": {"top": "hand", "hand": "top"}}, adapt={"cameras": {"top": "top", "hand": "hand"}},
        state=S0, action=A0, mask=(True, True), lines=USUAL,
    ),
    "a key of the other hand": Row(
        {"cameras": {"eye_l": "eye_r", "eye_r": "eye_l"}}, {"cameras": ("eye_l", "eye_r")},
        error=("camera eye_l reads obs/eye_r",),
    ),
    "hands by number": Row(
        {"cameras": {"left_eye": "left_eye", "right_eye": "right_eye"}}, {"cameras": ("l1", "r1")},
        {"cameras": {"l1": "right_eye", "r1": "left_eye"}}, error=("left camera 'l1'", "right camera"),
    ),
    "one camera of two": Row(
        {"cameras": {"top": "top"}}, adapt={"cameras": {"hand": ""}},
        state=S0, action=A0, mask=(True, False), lines=(*USUAL, ("camera slot 1", "chosen")),
    ),
    "an empty slot and a camera more": Row({}, {"cameras": ("top", "")}, error=("camera hand", "no slot")),
    "another rate": Row({"hz": 5}, error=("control rate", "5 Hz", "10 Hz")),
    "another rate, accepted": Row(
        {"hz": 5}, adapt={"robot": True}, state=S0, action=A0, lines=(*USUAL, ("control rate", "chosen")),
    ),
    "a unit by its name": Row(
        everywhere('unit = "Metres"'), {"unit": "m"}, state=S0, lines=(*USUAL, ("state unit", "same")),
    ),
    "another unit": Row(everywhere('unit = "mm"'), {"unit": "m"}, error=("state unit", "mm", "`scale`")),
    # 0.25 t has mean 2.75 and std 0.5 sqrt(63 / 12) = 1.14564: -1.75 / 1.14564; grip -0.05 / 0.05
    "another unit, fitted": Row(
        everywhere('unit = "mm"'), {"unit": "m"}, {"robot": True}, {"statistics": "data"},
        (-1.52753, 1.52753, -1), (-1.52753, 1.52753, -1), lines=(("state unit", "chosen"),),
    ),
    "two of three dimensions": Row(
        {"key": "obs/s[:, :2]", "dimensions": 2, "labels": ("pan", "lift"), "action_labels": NAMES},
        error=("state dimensions", "dataset: 2; checkpoint: 3"),
    ),
    "relative with names of states only": Row(
        {"relative": [True, True, False], "action_labels": ()}, {"relative": (True, True, False)},
        state=S0, action=(0.5, -0.75, 1.25), lines=(*GRIP, ("relative actions", "assumed")),
    ),
    # lift less its state is -0.5 - 0.2 k
    "relative lift, fitted": Row(
        {"relative": [False, True, False]}, {"relative": (False, True, False)}, {},
        {"statistics": "data"}, (), (PAN, LIFT, SHUT),
    ),
    "a mask by name": Row(
        {}, {"relative": (True, False, False), "labels": ("lift", "grip", "pan")},
        {"robot": True, "actions": "checkpoint"}, {"statistics": "data"},
        (), (PAN, LIFT, SHUT), lines=(("relative actions", "chosen"),),
    ),
    "the checkpoint's absolute actions": Row(
        {"relative": [True, True, False]}, adapt={"actions": "checkpoint"},
        state=S0, action=A0, lines=(*USUAL, ("relative actions", "chosen")),
    ),
    "matching names that do not match": Row(
        {"action_labels": ("grip", "pan", "lift")}, None, data={"relative": "matching"}, error=("matching",),
    ),
    # min 0 and max 5: 1 / 5 * 2 - 1; the middle of 0 to 4 and of 2 to 4 is 0; of 0 to 10: 1.5 / 10 * 2 - 1
    "LeRobot's range": Row(
        {},
        {"normalisation": "lerobot_min_max", "low": ((0, 0, 2), (0,) * 3), "high": ((5, 4, 4), (10, 10, 8))},
        state=(-0.6, 0, 0), action=(-0.7, -0.7, 0), lines=GRIP,
    ),
    # the other dataset is twice as far in pan and lift
    "statistics of another dataset": Row(
        other={"scaled": [2, 2, 1]}, data={"statistics": "data", "statistics_from": "OTHER"},
        state=(*(STATES[0, :2] - 2 * STATES[:, :2].mean(0)) / (2 * STATES[:, :2].std(0)), -1),
        action=(*(ACTIONS[0, :2] - 2 * ACTIONS[:, :2].mean(0)) / (2 * ACTIONS[:, :2].std(0)), -1),
        lines=(("statistics", "chosen"),),
    ),
    "statistics of another dataset that is relative": Row(
        other={"scaled": [2, 2, 1], "relative": [True, True, False]},
        data={"statistics": "data", "statistics_from": "OTHER"},
        error=("robot.relative", "relative in dimensions 0, 1", "absolute"),
    ),
    "statistics of another dataset in other units": Row(
        other=everywhere('unit = "mm"'), data={"statistics": "data", "statistics_from": "OTHER"},
        error=("robot.state.unit", "'mm'", "''"),
    ),
    "quantiles, fitted": Row(
        data={"statistics": "data", "normalisation": "quantile"},
        state=tuple(of_quantiles(STATES[0], STATES)), action=tuple(of_quantiles(ACTIONS[0], ACTIONS)),
        lines=(("statistics", "chosen"), ("state normalisation", "chosen")),
    ),
    "a scale and relative actions, fitted": Row(
        {"relative": [True, True, False], "state": PERCENT, "action": PERCENT}, None, {}, {},
        action=tuple((100 * FIRST - 100 * OF_CHUNKS.mean(0)) / (100 * OF_CHUNKS.std(0))),
    ),
    "one prompt for another": Row({}, {"prompt": "line"}, state=S0, lines=USUAL, prompt="push the cube\n"),
    "a prompt without a line feed": Row(
        {}, {"prompt": "text"}, state=S0, lines=USUAL, prompt="push the cube",
    ),
    "a prompt that holds the state, which pi0 does not read": Row(
        {}, {"prompt": "pi05"}, error=("prompt is 'pi05'", "the policy's is 'pi0'"),
    ),
    "a sentence that is too long": Row(
        {"sentence": "push the cube with care to the left of the bowl"}, error=("tokens", "takes 16"),
    ),
    "a tokenizer for the checkpoint's": Row(
        policy={"tokenizer": "metaworld"}, error=("policy.tokenizer", "no effect", "their own tokenizer"),
    ),
    "the checkpoint's conversion": Row(
        {"action": "scale = [1.0, -1.0, 1.0]"}, {"learned": ("action conversion", "as in the files")},
        error=("action conversion", "times -1 in dimension 1", "as in the files", "--adapt.conversion true"),
    ),
    # lift is -(1.5 - 0.2 k): (-1.5 - 1) / 2
    "another conversion, accepted": Row(
        {"action": "scale = [1.0, -1.0, 1.0]"}, {"learned": ("action conversion", "as in the files")},
        {"conversion": True}, action=(1.5, -1.25, 1.25), lines=(*USUAL, ("action conversion", "chosen")),
    ),
    "the checkpoint's frames": Row(
        {}, {"learned": ("frames", "top turned by 180")},
        error=("frames", "as stored", "--adapt.frames true"),
    ),
    "a normalisation without effect": Row(data={"normalisation": "quantile"}, error=("no effect",)),
    # step 6: (4.5 - 0) / 1, (0.3 - 1) / 2, (4 + 1) / 4; state (4 - 1) / 2, 0.8 - 2, 0
    "the end of an episode": Row(
        state=(1.5, -1.2, 0), action=(4.5, -0.35, 1.25), lines=USUAL, at=6,
    ),
    "only the gripper moves": Row(
        {"states": np.stack([np.ones(T), 2 * np.ones(T), 3 + 0.5 * (STEP % 2)], axis=1)},
        state=S0, action=A0, lines=USUAL,
    ),
    "a state of zeros": Row({"states": 0 * STATES}, error=("normalised state.grip", "mean -6")),
    "frames that are not the card's": Row(
        {"height": 32}, adapt={"resize": True}, error=("(16, 16, 3)", "(32, 16, 3)"),
    ),
    "a wild state, fitted": Row(
        {"relative": [True, True, False], "edit": wild}, {"relative": (True, True, False)},
        data={"statistics": "data"},
        error=("single values of state.pan", "1e+20", "demo_1, step 4", "single values of action.pan"),
    ),
    "a wild state, under the checkpoint's statistics": Row(
        {"edit": wild}, error=("normalised state.pan", "1e+20", "demo_1, step 4"),
    ),
    "a dimension that does not exist": Row(
        adapt={"outside": ("action.wrist",)}, error=("no dimension 'action.wrist'", "action.grip"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(CONFIG)


def problems(row: Row, card: Path, base: Path | None) -> Iterator[str]:
    """Yield what is not as the row says."""
    other = {"statistics_from": str(card.parent / "other" / "card.toml")} if row.other is not None else {}
    recipe = recipe_of(card, base, row.adapt, **row.data | other)
    recipe = replace(recipe, policy=replace(recipe.policy, **row.policy))
    initial = start(replace(recipe, data=replace(recipe.data, validation=0.0)))
    store, chunk = open_dataset(card), initial.codec.config.chunk
    sample = store.sample(0, row.at, chunk)
    encoded = initial.codec.encode(sample)
    assert isinstance(sample, Sample) and isinstance(sample.observation, Observation)
    assert encoded.actions is not None and initial.agreement is not None
    for name, wanted, values in (
        ("state", row.state, encoded.state),
        ("action", row.action, encoded.actions[0]),
    ):
        if not np.allclose(values[: len(wanted)], wanted, atol=3e-4):
            yield f"{name} is {values[: len(wanted)]}, not {wanted}"
    if row.prompt:
        assert encoded.tokens is not None and encoded.token_mask is not None
        said = initial.codec.required_tokenizer.decode(encoded.tokens[encoded.token_mask].tolist())
        if said != row.prompt:
            yield f"the prompt is {said!r}"
    if row.mask and tuple(encoded.image_mask.tolist()) != row.mask:
        yield f"image mask is {encoded.image_mask}"
    items = {(item.name, item.status) for item in initial.agreement.items}
    differing = {item for item in items if item[1] in ("differs", "conflict")}
    if missing := set(row.lines) - items:
        yield f"no line {missing}"
    if more := differing - set(row.lines):
        yield f"lines {more}"


@pytest.mark.parametrize("name", ROWS)
def test_what_comes_out_is_what_was_worked_out_by_hand(name: str, policy: Policy, tmp_path: Path):
    row = ROWS[name]
    card = write_card(tmp_path, **row.card)
    if row.other is not None:
        (tmp_path / "other").mkdir()
        write_card(tmp_path / "other", **row.other)
    base = None
    if row.checkpoint is not None:
        base = write_checkpoint(tmp_path / "base", policy, **row.checkpoint)
    if not row.error:
        assert list(problems(row, card, base)) == []
        return
    with pytest.raises(VlafitError) as error:
        list(problems(row, card, base))
    assert [word for word in row.error if word not in str(error.value)] == []
