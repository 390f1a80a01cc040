"""Every verb that puts data beside a checkpoint refuses what changes the policy's input, item by item.

The checkpoint learned from the card of `agreement_world` with two cameras, its values centred at 0, so that
neither a sign nor an offset is an extreme value: only what the card says tells them apart.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.train.agreement_world import EPISODES, STEPS, card_beside, recipe_of, start, write_card
from tests.variants import variants
from vlafit import checkpoints, cli, config, load_actor
from vlafit.agreement import Learned, protocol_items
from vlafit.datasets import load_card
from vlafit.errors import VlafitError
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import serving
from vlafit.train.experiment import build
from vlafit.types import differences

CAMERAS = ("front", "back")
ACTION = '"actions"], dimensions = 2'
STATE = '"obs/at"], dimensions = 2'
LABELS = 'labels = ["a", "b"]'
FRONT, BACK = 'key = "obs/front"', 'key = "obs/back"'


SECOND = f'[[robot.cameras]]\nname = "back"\n{BACK}\nheight = 16\nwidth = 16\n'


def write(folder: Path, *, late: float = 0.0, **texts: object) -> Path:
    """Write recordings whose states and actions are centred at 0, plus `late`, and their card."""
    card = write_card(folder, cameras=CAMERAS, **texts)  # type: ignore[arg-type]
    with h5py.File(folder / "joints" / "reach_demo.hdf5", "a") as file:
        t = np.linspace(-1, 1, STEPS)
        for number in range(EPISODES):
            group = file[f"data/demo_{number}"]
            assert isinstance(group, h5py.Group)
            front = group["obs/front"]
            assert isinstance(front, h5py.Dataset)
            group["obs/back"] = front[:] + 50
            group["obs/at"][:] = np.stack([t, -t], axis=1) + late  # type: ignore[index]
            group["actions"][:] = np.stack([t, t**3], axis=1) + late  # type: ignore[index]
    text = card.read_text()
    second = text.rindex(FRONT)
    card.write_text(text[:second] + text[second:].replace(FRONT, BACK))
    return card


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other recordings of the robot."""
    return write(tmp_path_factory.mktemp("late"), late=0.01)


def saved(card: Path, folder: Path) -> Path:
    """Save the checkpoint with which a run on the card begins."""
    initial = start(recipe_of(card, None, {}))
    checkpoints.save(initial.policy, folder, initial.codecs, agreement=initial.agreement)
    return folder


@pytest.fixture(scope="module")
def learned(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(card, tmp_path_factory.mktemp("checkpoint") / "learned")


# Item -> changes to the card, and what an error names beside the verb's own remedy.
ITEMS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "a sign": (
        ((ACTION, '"actions"], scale = [-1.0, 1.0], dimensions = 2'),),
        ("action conversion", "times -1 in dimension 0", "as in the files"),
    ),
    "a factor of states": (
        ((STATE, '"obs/at"], scale = [1.5, 1.5], dimensions = 2'),),
        ("state conversion", "times 1.5", "as in the files"),
    ),
    "an offset": (
        ((ACTION, '"actions"], offset = [0.0, 0.25], dimensions = 2'),),
        ("action conversion", "plus 0.25 in dimension 1", "as in the files"),
    ),
    "a shift": (
        (("[robot]", "[rows]\naction_shift = 1\n\n[robot]"),),
        ("action conversion", "that of row t+1", "as in the files"),
    ),
    "turned frames": (((FRONT, f"rotate = 180\n{FRONT}"),), ("frames", "front turned by 180", "as stored")),
    "mirrored frames": (
        ((BACK, f'flip = "horizontal"\n{BACK}'),),
        ("frames", "back flipped horizontal", "as stored"),
    ),
    "red for blue": (((BACK, f'channels = "bgr"\n{BACK}'),), ("frames", "back bgr to rgb", "as stored")),
    "exchanged cameras": (
        ((FRONT, BACK), (BACK, FRONT)),
        ("camera front reads obs/back", "camera back reads obs/front"),
    ),
    "relative actions": (
        (("relative = []", "relative = [true, false]"),),
        ("relative", "relative in dimensions 0", "absolute"),
    ),
    "a unit": ((('unit = "rad"', 'unit = "deg"'),), ("unit", "deg", "rad")),
    "names in another order": (((LABELS, 'labels = ["b", "a"]'),), ("a, b", "b, a")),
    "other names": (((LABELS, 'labels = ["a", "c"]'),), ("b", "c")),
    "control": (
        (('"joint_position"', '"joint_velocity"'),),
        ("control mode", "joint_velocity", "joint_position"),
    ),
    "rate": ((("hz = 10.0", "hz = 20.0"),), ("20", "10")),
    "dimensions": (
        ((STATE, '"obs/at[:, :1]"], dimensions = 1'), (LABELS + " }\naction", 'labels = ["a"] }\naction')),
        ("state", "1", "2"),
    ),
    "a camera less": (((SECOND, ""),), ("back",)),
    "a camera's name": ((('name = "back"', 'name = "top"'), (BACK, BACK)), ("back", "top")),
}  # fmt: skip
READINGS = tuple(ITEMS)[:7]
"""Items that only the card tells: what it does to values and frames when it reads them."""
Command = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must fail, and return what it said."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) in (1, 2)
        return "".join(capsys.readouterr())

    return run


def other_card(item: str, late: Path) -> Path:
    name = item.replace(" ", "_").replace("'", "")
    return card_beside(late, name, *ITEMS[item][0])


def require_said(item: str, said: str, options: Sequence[str]) -> None:
    """The error names both sides and, for what only cards tell, the option that accepts it."""
    facts = ITEMS[item][1]
    assert [fact for fact in facts if fact not in said] == []
    if item in READINGS:
        assert options["frames" in facts] in said
        assert options["frames" not in facts] not in said


SOME = variants(ITEMS, ["a shift", "turned frames", "exchanged cameras", "a unit", "names in another order"])
IN_RECIPE = ("--adapt.conversion true", "--adapt.frames true")
BY_OPTION = ("--confirm-conversion", "--confirm-frames", "--confirm-relative")


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("place", ["alone", "further card", "validation set"])
def test_training_refuses_it(place: str, item: str, card: Path, late: Path, learned: Path):
    other = other_card(item, late)
    recipe = recipe_of(other if place == "alone" else card, learned, {})
    if place == "further card":
        recipe = replace(recipe, data=replace(recipe.data, cards=(str(card), str(other))))
    elif place == "validation set":
        recipe = replace(recipe, data=replace(recipe.data, validation_sets={"late": str(other)}))
    with pytest.raises(VlafitError) as error:
        start(recipe) if place == "alone" else build(recipe, torch.device("cpu"))
    require_said(item, str(error.value), IN_RECIPE)


def test_all_that_differs_is_one_error(late: Path, learned: Path):
    some = ("rate", "a sign", "turned frames", "a factor of states")
    other = card_beside(late, "all", *(pair for item in some for pair in ITEMS[item][0]))
    with pytest.raises(VlafitError) as error:
        start(recipe_of(other, learned, {}))
    for item in some:
        assert [fact for fact in ITEMS[item][1] if fact not in str(error.value)] == []


@pytest.mark.parametrize("item", ITEMS)
def test_inspect_refuses_it(item: str, late: Path, learned: Path, refused: Command):
    said = refused("inspect", learned, "--data", other_card(item, late))
    require_said(item, said.replace("[adapt] ", "--adapt.").replace(" = true", " true"), IN_RECIPE)


SHORT = ("--samples", "1", "--draws", "2")


@pytest.mark.case(
    section="data",
    report="an evaluation on recordings shows large errors, or small ones for a policy that fails",
    user_has="`eval --data` with a card that turns a sign, adds an offset, shifts actions, or turns, mirrors "
    "or recolours frames, and a checkpoint whose card does not",
    now="refused with both sides; `--confirm-conversion` or `--confirm-frames` accepts it, and a row says so",
)
@pytest.mark.parametrize("item", ITEMS)
def test_an_evaluation_on_recordings_refuses_it(
    item: str, late: Path, learned: Path, refused: Command, tmp_path: Path
):
    out = tmp_path / "out"
    said = refused("eval", learned, "--data", other_card(item, late), "--out", out, *SHORT)
    require_said(item, said, BY_OPTION)
    assert ("--confirm-relative" in said) == (item == "relative actions")
    assert not out.exists()


@pytest.fixture(scope="module")
def address(learned: Path) -> Iterator[str]:
    actor = load_actor(learned, width=4)
    with serving(actor, describe(actor), Options(port=0)) as running:
        yield running.address


@pytest.mark.parametrize("item", SOME)
def test_an_evaluation_of_a_served_policy_refuses_it(
    item: str, late: Path, address: str, refused: Command, tmp_path: Path
):
    out = tmp_path / "out"
    said = refused("eval", "--actor", address, "--data", other_card(item, late), "--out", out, *SHORT)
    require_said(item, said, BY_OPTION)
    assert not out.exists()


@pytest.mark.parametrize("item", SOME)
def test_an_evaluation_by_a_recipe_refuses_what_neither_its_card_nor_the_checkpoint_says(
    item: str, card: Path, late: Path, learned: Path, refused: Command, tmp_path: Path
):
    (tmp_path / "recipe.toml").write_text(config.dump(recipe_of(card, learned, {})))
    words = ("--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out", *SHORT)
    said = refused("eval", learned, "--data", other_card(item, late), *words)
    require_said(item, said, BY_OPTION)


@pytest.mark.parametrize(("item", "option"), [("a shift", 0), ("turned frames", 1), ("relative actions", 2)])
def test_an_evaluation_is_on_what_was_confirmed_and_says_so(
    item: str, option: int, late: Path, learned: Path, address: str, tmp_path: Path
):
    other = str(other_card(item, late))
    for number, who in enumerate(([str(learned)], ["--actor", address])):
        out = tmp_path / str(number)
        words = ["eval", *who, "--data", other, "--out", str(out), *SHORT]
        assert cli.main([*words, BY_OPTION[option - 1]]) == 2, "another option"
        assert cli.main([*words, BY_OPTION[option]]) == 0
        rows = {row["name"]: row for row in json.loads((out / "result.json").read_text())["agreement"]}
        row = rows["relative actions" if option == 2 else ITEMS[item][1][0]]
        assert (row["status"], row["reason"]) == ("chosen", BY_OPTION[option])
        assert set(row["sides"]) == {"dataset", "checkpoint"}


def test_the_card_of_a_run_that_kept_its_checkpoints_actions_is_evaluated(
    late: Path, learned: Path, tmp_path: Path
):
    other = other_card("relative actions", late)
    initial = start(recipe_of(other, learned, {"actions": "checkpoint"}))
    saved_to = tmp_path / "run"
    checkpoints.save(initial.policy, saved_to, initial.codecs, agreement=initial.agreement)
    words = ("--data", str(other), "--out", str(tmp_path / "out"), *SHORT)
    assert cli.main(["eval", str(saved_to), *words]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/result.json").read_text())["agreement"]}
    row = rows["relative actions"]
    assert (row["status"], row["value"], row["reason"]) == ("chosen", "absolute", "as in the policy's run")


def test_what_a_recipe_reads_otherwise_on_purpose_is_evaluated_as_it_reads_it(
    late: Path, learned: Path, tmp_path: Path, refused: Command
):
    other = other_card("turned frames", late)
    (tmp_path / "recipe.toml").write_text(config.dump(recipe_of(other, learned, {"frames": True})))
    words = ("--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out"), *SHORT)
    assert "--confirm-frames" in refused("eval", learned, "--data", late, *words)
    assert cli.main(["eval", str(learned), "--data", str(other), *words]) == 0


def test_a_policy_that_does_not_say_what_it_read_is_evaluated_and_a_row_says_so(
    late: Path, learned: Path, tmp_path: Path
):
    actor = load_actor(learned, width=4)
    silent = replace(describe(actor), learned=Learned(silence="the server does not say"))
    with serving(actor, silent, Options(port=0)) as running:
        words = ["--data", str(other_card("turned frames", late)), "--out", str(tmp_path / "out"), *SHORT]
        assert cli.main(["eval", "--actor", running.address, *words]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/result.json").read_text())["agreement"]}
    for name in ("frames", "state conversion", "action conversion"):
        assert (rows[name]["status"], rows[name]["reason"]) == ("assumed", "the server does not say")


@pytest.mark.parametrize("point", ["a unit", "rate", "control", "names in another order", "dimensions"])
def test_a_protocol_of_another_robot_is_refused(point: str, late: Path, learned: Path):
    """What `vlafit eval --protocol`, inspect --protocol and a robot's client compare."""
    policy, robot = load_actor(learned).embodiment, load_card(str(other_card(point, late))).embodiment
    said = "\n".join(differences(policy, robot))
    assert [fact for fact in ITEMS[point][1] if fact not in said] == []
    items = protocol_items(policy, robot, "toy")
    assert {item.status for item in items} == {"conflict"}
