"""Combinations of card and another program's checkpoint: what must come out is computed here, in numpy.

openpi's folder is the recorded one with statistics for the robot of `combinations_world`: mean (1, 2, 3) and
std (2, 1, 0.5) of states, mean (0, 1, -1) and std (1, 2, 4) of actions, padded to 32; openpi divides by the
std plus 1e-6. LeRobot's SmolVLA is the recorded one, cut to three dimensions; LeRobot adds 1e-8.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.train.agreement_world import recipe_of, start
from tests.train.combinations_world import ACTIONS, NAMES, STATES, write_card
from vlafit.agreement import Agreement, Item
from vlafit.checkpoints import beside
from vlafit.codec import train_word_tokenizer
from vlafit.datasets import open_dataset
from vlafit.errors import VlafitError
from vlafit.train.initial_policy import InitialPolicy
from vlafit.types import Embodiment, Feature

FIXTURES = Path(__file__).parents[1] / "fixtures"
MEANS, STDS = np.array([[1, 2, 3], [0, 1, -1]]), np.array([[2, 1, 0.5], [1, 2, 4]])
MASK = np.array([True, True, False])
TOP, HAND = {"cameras": {"top": "top"}}, {"cameras": {"top": "top", "hand": "hand"}}
BASE = {"base_0_rgb": "top", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}
TO_OPENPI: dict[str, Any] = {
    "config": {"vision.heads": 2, "chunk": 6, "max_tokens": 24},
    "tokenizer": "WORDS",
}
SLOTS = {"cameras": {"cam_high": "top", "cam_wrist": "hand"}, "resize": True}


def normalised(eps: float, shift: float = 0.0, relative: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the first state and action under the statistics; `shift` is added to their means."""
    action = ACTIONS[0] - MASK * relative * STATES[0]
    return (STATES[0] - MEANS[0] - shift) / (STDS[0] + eps), (action - MEANS[1] - shift) / (STDS[1] + eps)


@dataclass(frozen=True)
class Row:
    """A card, a folder and a recipe, with the numbers or the error that must come of them."""

    program: str = "openpi"
    card: dict[str, Any] = field(default_factory=lambda: dict(TOP))
    adapt: dict[str, Any] = field(default_factory=lambda: {"cameras": BASE})
    policy: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    learned: tuple[bool, ...] | None = None
    """Relative actions of an agreement.json beside the weights; None: there is none."""
    values: tuple[np.ndarray, np.ndarray] | None = None
    slots: tuple[str, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()
    """(item, status) in the agreement."""
    error: tuple[str, ...] = ()


PADDED = (("frames", "assumed"), ("action conversion", "assumed"))
ASSUMED = (*PADDED, ("relative actions", "assumed"))
RELATIVE = {"relative": [True, True, False]}
LEROBOT: dict[str, Any] = {"program": "lerobot", "card": HAND, "adapt": SLOTS}
ROWS: dict[str, Row] = {
    "openpi": Row(values=normalised(1e-6), slots=("top", "", ""), lines=ASSUMED),
    "openpi, a card of relative actions": Row(
        card=TOP | RELATIVE, values=normalised(1e-6, relative=True), lines=ASSUMED
    ),
    "openpi, codec.relative against the card": Row(
        policy={"codec.relative": [True, True, False]},
        error=("relative actions", "absolute", "relative in dimensions 0, 1", "[adapt] actions"),
    ),
    "openpi, codec.relative as the card": Row(
        card=TOP | RELATIVE, policy={"codec.relative": [True, True, False]},
        values=normalised(1e-6, relative=True), lines=(*PADDED, ("relative actions", "same")),
    ),
    "openpi, an agreement against the card": Row(
        learned=(True, True, False),
        error=("relative actions", "absolute", "relative in dimensions 0, 1", "[adapt] actions"),
    ),
    "openpi, an agreement against the card, the checkpoint's chosen": Row(
        learned=(True, True, False), adapt={"cameras": BASE, "actions": "checkpoint"},
        values=normalised(1e-6, relative=True), lines=(("relative actions", "chosen"),),
    ),
    "openpi without a tokenizer": Row(
        policy={"tokenizer": ""}, error=("policy.tokenizer", "google/paligemma-3b-pt-224", "gated"),
    ),
    "openpi, a tokenizer beyond the embedding": Row(
        policy={"tokenizer": "MANY"}, error=("600 tokens", "512"),
    ),
    "openpi, a tokenizer of few words": Row(
        policy={"tokenizer": "FEW"}, error=("tokens, the pretrained embedding 512 rows",),
    ),
    "openpi, two statistics": Row(policy={"two": True}, error=("arm, other", "policy.assets")),
    "openpi, the second of two statistics": Row(
        policy={"two": True, "assets": "other"}, values=normalised(1e-6, shift=0.25), lines=ASSUMED,
    ),
    "openpi, hands exchanged": Row(
        card={"cameras": {"left_cam": "left_cam", "right_cam": "right_cam"}},
        adapt={"cameras": BASE | {"base_0_rgb": "", "left_wrist_0_rgb": "right_cam",
                                  "right_wrist_0_rgb": "left_cam"}},
        error=("right camera 'right_cam'", "left camera 'left_wrist_0_rgb'"),
    ),
    "openpi, hands by name": Row(
        card={"cameras": {"left_cam": "left_cam", "right_cam": "right_cam"}},
        adapt={"cameras": BASE | {"base_0_rgb": "", "left_wrist_0_rgb": "left_cam",
                                  "right_wrist_0_rgb": "right_cam"}},
        values=normalised(1e-6), slots=("", "left_cam", "right_cam"), lines=ASSUMED,
    ),
    "openpi, no camera is named": Row(adapt={}, error=("base_0_rgb", "top", "[adapt] cameras")),
    "openpi, two states of three": Row(
        card=TOP | {"key": "obs/s[:, :2]", "dimensions": 2, "labels": NAMES[:2], "action_labels": NAMES},
        error=("state dimensions", "dataset: 2; checkpoint: 3", "[adapt] robot"),
    ),
    "openpi, radians of degrees": Row(card=TOP | {"scaled": 1 / 57.29578}, error=("spread of state",)),
    # 0.5 / 2 and so on: fitted statistics are of the three training episodes, which are alike
    "openpi, statistics of the data": Row(
        data={"statistics": "data"},
        values=((STATES[0] - STATES.mean(0)) / (STATES.std(0) + 1e-6),
                (ACTIONS[0] - ACTIONS.mean(0)) / (ACTIONS.std(0) + 1e-6)),
        lines=(("statistics", "chosen"),),
    ),
    "LeRobot": Row(**LEROBOT, values=normalised(1e-8), slots=("top", "hand"), lines=PADDED),
    "LeRobot, relative in the card only": Row(
        program="lerobot", card=HAND | RELATIVE, adapt=SLOTS,
        error=("relative actions", "relative in dimensions 0, 1", "absolute"),
    ),
    "LeRobot, relative in the card only, taught": Row(
        program="lerobot", card=HAND | RELATIVE, adapt=SLOTS | {"actions": "data"},
        error=('data.statistics = "data"',),
    ),
    "LeRobot, one camera of two": Row(
        program="lerobot", card=TOP, adapt={"cameras": {"cam_high": "top"}, "resize": True},
        error=("cam_wrist", "top"),
    ),
    "LeRobot, one camera of two, said": Row(
        program="lerobot", card=TOP, adapt={"cameras": {"cam_high": "top", "cam_wrist": ""}, "resize": True},
        values=normalised(1e-8), slots=("top", ""), lines=(("camera slot 1", "chosen"),),
    ),
    "LeRobot, frames of another size": Row(
        program="lerobot", card=HAND, adapt={"cameras": SLOTS["cameras"]}, error=("16x16", "40x72", "resize"),
    ),
    "LeRobot, a tokenizer for its own": Row(
        **LEROBOT, policy={"tokenizer": "WORDS"}, error=("policy.tokenizer", "no effect"),
    ),
    "LeRobot, a gripper in percent": Row(
        program="lerobot", card=HAND | {"scaled": [1, 1, 100]}, adapt=SLOTS,
        error=("normalised state.grip", "normalised action.grip"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """openpi's folders with one and with two statistics, LeRobot's, and three tokenizers."""
    root = tmp_path_factory.mktemp("folders")
    for name, shifts in (("openpi", {"arm": 0.0}), ("two", {"arm": 0.0, "other": 0.25})):
        (root / name).mkdir()
        shutil.copy(FIXTURES / "openpi_pi0" / "model.safetensors", root / name)
        for asset, shift in shifts.items():
            write_norm_stats(root / name / "assets" / asset, shift)
    shutil.copytree(FIXTURES / "lerobot_smolvla", root / "lerobot")
    of_three_dimensions(root / "lerobot")
    words = [f"{a}{b}{c}" for a in "bcdfgklm" for b in "aeiou" for c in "nrstpqxyz"]
    for name, size in (("WORDS", 500), ("MANY", 600), ("FEW", 270)):
        train_word_tokenizer(["push the cube", "\n", *words], size).save(root / name)
    return root


def write_norm_stats(folder: Path, shift: float) -> None:
    def padded(values: np.ndarray) -> list[float]:
        return [*values.tolist(), *[0.0] * (32 - len(values))]

    values = {}
    for name, mean, std in zip(("state", "actions"), MEANS + shift, STDS, strict=True):
        values[name] = {"mean": padded(mean), "std": padded(std)}
        values[name] |= {"q01": padded(mean - 2 * std), "q99": padded(mean + 2 * std)}
    folder.mkdir(parents=True)
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": values}))


def of_three_dimensions(folder: Path) -> None:
    """Let the files of a LeRobot folder describe a robot of three dimensions, with the statistics above."""
    for path in (folder / "config.json", *folder.glob("policy_*processor.json")):
        content = json.loads(path.read_text())
        tables = [content.get("input_features", {}), content.get("output_features", {})]
        tables += [step["config"].get("features", {}) for step in content.get("steps", ())]
        for table in tables:
            for name in {"observation.state", "action"} & set(table):
                table[name]["shape"] = [3]
        path.write_text(json.dumps(content))
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            column, _, kind = name.rpartition(".")
            row = 0 if column == "observation.state" else 1
            if column in ("observation.state", "action"):
                table = {"mean": MEANS[row], "std": STDS[row]}
                own = table.get(kind, MEANS[row] - 4 * STDS[row] + 8 * STDS[row] * (kind in ("max", "q99")))
                tensors[name] = own.astype(np.float32)
        save_file(tensors, path)


def begun(row: Row, folders: Path, tmp_path: Path) -> tuple[InitialPolicy, Path]:
    """Begin the run of a row, and return its card."""
    policy = dict(row.policy)
    place = folders / ("two" if policy.pop("two", False) else row.program)
    if row.learned is not None:
        place = Path(shutil.copytree(place, tmp_path / "copy"))
        column = Feature("state", (3,))
        robot = Embodiment("arm", (), column, replace(column, name="action"), 0.0, "")
        item = Item("control rate", {"dataset": ""}, "", "assumed")
        beside.write(place, Agreement((item,), (), row.learned), robot)
    given = {**TO_OPENPI, "config": dict(TO_OPENPI["config"])} if row.program == "openpi" else {}
    if "codec.relative" in policy:
        given["config"] |= {"codec.relative": policy.pop("codec.relative")}
    given |= policy
    if given.get("tokenizer"):
        given["tokenizer"] = str(folders / given["tokenizer"])
    card = write_card(tmp_path, **row.card)
    recipe = recipe_of(card, place, row.adapt, **row.data)
    recipe = replace(
        recipe, policy=replace(recipe.policy, **given), data=replace(recipe.data, validation=0.0)
    )
    return start(recipe), card


@pytest.mark.parametrize("name", ROWS)
def test_what_comes_out_is_what_numpy_says(name: str, folders: Path, tmp_path: Path):
    row = ROWS[name]
    if row.error:
        with pytest.raises(VlafitError) as error:
            begun(row, folders, tmp_path)
        assert [word for word in row.error if word not in str(error.value)] == []
        return
    initial, card = begun(row, folders, tmp_path)
    encoded = initial.codec.encode(open_dataset(card).sample(0, 0, initial.codec.config.chunk))
    assert row.values is not None and encoded.actions is not None
    for mine, wanted in ((encoded.state, row.values[0]), (encoded.actions[0], row.values[1])):
        assert np.allclose(mine[:3], wanted, rtol=1e-5, atol=1e-6) and not mine[3:].any()
    if row.slots:
        assert initial.codec.config.cameras == row.slots
        assert encoded.image_mask.tolist() == [bool(name) for name in row.slots]
    assert initial.agreement is not None
    found = {(item.name, item.status) for item in initial.agreement.items}
    assert set(row.lines) - found == set()
