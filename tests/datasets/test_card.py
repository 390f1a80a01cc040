"""What a data card may say, and how its layout's options are found in it."""

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlafit import shipped
from vlafit.config import field_help
from vlafit.datasets import Card, load_card
from vlafit.datasets.card import ColumnCard, RecordSpec
from vlafit.datasets.layouts import robomimic
from vlafit.datasets.load import build, prepare
from vlafit.datasets.relative import with_relative_matches
from vlafit.datasets.write import card_text
from vlafit.errors import ConfigError
from vlafit.types import Embodiment, Feature

SMALL = """
name = "small"
layout = "libero"
path = "small"
[instruction]
source = "attrs"
[robot]
name = "arm"
hz = 20
control = "delta_position"
[[robot.cameras]]
name = "front"
key = "obs/front_rgb"
height = 6
width = 5
[robot.state]
keys = ["obs/ee_pos", "obs/gripper_states"]
dimensions = 4
[robot.action]
keys = ["actions"]
dimensions = 3
labels = ["x", "y", "z"]
unit = "cm"
"""

POSITIONS = SMALL.replace("delta_position", "position")  # whose actions can be relative to the state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_a_card_declares_an_embodiment(path: Path):
    assert load_card(path).embodiment == Embodiment(
        name="arm",
        cameras=(Feature("front", (6, 5, 3)),),
        state=Feature("state", (4,)),
        action=Feature("action", (3,), "cm", ("x", "y", "z")),
        hz=20,
        control="delta_position",
    )


@pytest.mark.parametrize("name", shipped.names("card"))
def test_every_card_that_ships_can_be_read(name: str):
    card = load_card(name)
    assert card.name == name
    assert card.purpose and card.license and card.source
    assert len(card.embodiment.state.labels) == card.robot.state.dimensions
    assert len(card.embodiment.action.labels) == card.robot.action.dimensions


def test_the_quickstart_records_both_faucet_tasks_and_disturbs_some_of_their_episodes():
    record = load_card("metaworld-faucet").record
    assert record is not None
    assert (record.env, record.tasks) == ("metaworld", ("faucet-open-v3", "faucet-close-v3"))
    assert 0 < record.perturbed < 1 and record.compress


def test_what_a_policy_is_pretrained_on_leaves_out_the_quickstarts_tasks_but_is_the_same_robot():
    faucet, pretrain = load_card("metaworld-faucet"), load_card("metaworld-pretrain")
    assert faucet.record is not None and pretrain.record is not None
    assert not set(faucet.record.tasks) & set(pretrain.record.tasks)
    assert len(pretrain.record.tasks) >= 10
    assert faucet.embodiment == pretrain.embodiment


def test_a_card_based_on_another_looks_for_data_beside_itself(path: Path, tmp_path: Path):
    other = tmp_path / "elsewhere" / "more.toml"
    other.parent.mkdir()
    other.write_text('base = "../small.toml"\nname = "more"\n')
    (tmp_path / "elsewhere" / "small").mkdir()
    assert load_card(other).location() == tmp_path / "elsewhere" / "small"


def test_data_is_looked_for_beside_the_card_then_below_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    card = load_card(path)
    assert card.location() == Path("data/small")
    (tmp_path / "small").mkdir()
    assert card.location() == tmp_path / "small"


def test_a_folder_gives_its_hdf5_files_sorted_and_a_pattern_those_that_match(path: Path, tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("b.hdf5", "a.h5", "notes.txt", "c.hdf5.partial", ".d.hdf5.tmp"):
        (folder / name).touch()
    card = load_card(path)
    suffixes = (".hdf5", ".h5")
    assert [p.name for p in card.files(suffixes)] == ["a.h5", "b.hdf5"]
    assert [p.name for p in card.files()] == ["a.h5", "b.hdf5", "c.hdf5.partial", "notes.txt"]
    assert [p.name for p in replace(card, path="small/b*").files(suffixes)] == ["b.hdf5"]
    assert [p.name for p in replace(card, path="**/*.hdf5").files(suffixes)] == ["b.hdf5"]
    assert [p.name for p in replace(card, path=str(folder / "a.h5")).files(suffixes)] == ["a.h5"]
    assert replace(card, path="small/*.hdf5").location() == folder


BAD = [
    ('layout = "libero"', 'layout = "libreo"', "layout.*'libreo'.*did you mean 'libero'"),
    ('path = "small"', 'pth = "small"', "unknown key 'pth'; did you mean 'path'"),
    ('path = "small"', "path = 3", "path"),
    ('path = "small"', 'path = "small"\nfile = "x"', "filled in when the card is read"),
    ('path = "small"', 'path = "small"\nmask = "train"', "'mask'.*'libero'.*layout robocasa or robomimic"),
    ("hz = 20", "hz = 0", "hz must be above 0"),
    ("hz = 20", "hz = 1e-300", r"hz must be .*0\.001.* is 1e-300"),
    ("height = 6", "height = 0", "camera 'front' is 0x5"),
    ("height = 6", "height = 6\nrotate = 90", "rotate: 90 is not one of 0, 180"),
    ('name = "front"', 'name = ""', "names of their own"),
    ('keys = ["actions"]', "keys = []", "robot.action needs at least one key"),
    ("dimensions = 3", "dimensions = 4", "3 labels for 4 dimensions"),
    ("hz = 20", "hz = 20\nrelative = [true]", "robot.relative has 1 entries"),
    ('source = "attrs"', 'source = "card"', r"instruction\.text or \.files"),
    ('source = "attrs"', 'source = "attrs"\ntext = "x"', 'need instruction.source = "card"'),
    ('layout = "libero"', 'layout = "robomimic"', "instruction.source: 'attrs'.*'card'.*'robomimic'"),
    (
        "[instruction]",
        '[record]\nenv = "metaworld"\ntasks = []\nepisodes_per_task = 3\n[instruction]',
        "record needs tasks",
    ),
    (
        "[instruction]",
        '[record]\nenv = "metaworld"\ntasks = ["a"]\nepisodes_per_task = 3\nperturbed = 2\n[instruction]',
        "0 <= perturbed <= 1",
    ),
    ("dimensions = 4", "dimensions = 4\nscale = [1.0, 1e-300, 1.0, 1.0]", "holds 1e-300, which would erase"),
    (
        "dimensions = 3",
        "dimensions = 3\nlow = [0.0, 2.0, 0.0]\nhigh = [1.0, 1.0, 1.0]",
        "low 2 of dimension 1",
    ),
    ('name = "small"', 'name = " "', "name is empty"),
    ('layout = "libero"', 'layout = "libero"\nexpect = { episodes = -1 }', "expect.episodes must be 0"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_a_card_that_cannot_be_meant_is_refused_with_its_path(
    tmp_path: Path, old: str, new: str, message: str
):
    assert SMALL.count(old) == 1
    path = tmp_path / "bad.toml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        load_card(path)
    assert str(path) in str(caught.value)


def test_relative_dimensions_need_a_state_of_the_same_number(tmp_path: Path):
    path = tmp_path / "bad.toml"
    text = SMALL.replace("dimensions = 4", "dimensions = 2")
    path.write_text(text.replace("hz = 20", "hz = 20\nrelative = [true, false, true]"))
    with pytest.raises(ConfigError, match=r"no state for action dimensions \[2\]"):
        load_card(path)


def test_an_action_relative_to_a_state_of_another_name_is_refused(tmp_path: Path):
    path = tmp_path / "bad.toml"
    text = POSITIONS.replace("hz = 20", "hz = 20\nrelative = [true, false, false]")
    text = text.replace("dimensions = 4", 'dimensions = 4\nlabels = ["grip", "x", "y", "z"]')
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"robot.relative: action 'x' .* state 'grip' \(dimension 0\)"):
        load_card(path)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({'"position"': '"delta_position"'}, ("control is 'delta_position'", "robot.control")),
        ({"= 4": '= 4\nunit = "rad"', '"cm"': '"deg"'}, ("in 'deg'", "state in 'rad'", "scale")),
    ],
)
def test_an_action_that_is_a_difference_or_has_another_unit_is_not_relative(
    changes: dict[str, str], facts: tuple[str, ...], tmp_path: Path
):
    path, text = tmp_path / "card.toml", POSITIONS.replace("= 4", '= 4\nlabels = ["x", "y", "z", "g"]')
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    with pytest.raises(ConfigError) as matching:
        with_relative_matches(load_card(path))
    path.write_text(text.replace("hz = 20", "hz = 20\nrelative = [true, false, false]"))
    with pytest.raises(ConfigError) as listed:
        load_card(path)
    for error in (listed, matching):
        assert all(fact in str(error.value) for fact in facts)


def test_relative_matches_are_refused_where_a_name_stands_at_another_place():
    base = prepare(build(tomllib.loads(POSITIONS), "small.toml"))
    state = ColumnCard(("s",), 4, ("x", "y", "z", "g"))
    robot = replace(base.robot, state=state, action=ColumnCard(("a",), 4, ("x", "y", "g", "z")))
    with pytest.raises(ConfigError) as error:
        with_relative_matches(replace(base, robot=robot))
    assert all(fact in str(error.value) for fact in ("'g'", "another place", "x, y, z, g", "x, y, g, z"))


def test_a_card_without_cameras_is_refused(tmp_path: Path):
    path = tmp_path / "bad.toml"
    start, end = SMALL.index("[[robot.cameras]]"), SMALL.index("[robot.state]")
    path.write_text(SMALL[:start].replace("hz = 20", "hz = 20\ncameras = []") + SMALL[end:])
    with pytest.raises(ConfigError, match=r"robot\.cameras is empty"):
        load_card(path)


def test_an_unknown_card_names_those_there_are():
    with pytest.raises(ConfigError, match="metaworld-faucet"):
        load_card("metaworld-fauced")


def test_every_field_of_a_card_has_help():
    assert set(field_help(Card)) == set(Card.__dataclass_fields__)
    assert set(field_help(RecordSpec)) == set(RecordSpec.__dataclass_fields__)


def test_a_card_survives_being_written_and_read_again(path: Path):
    card = replace(load_card(path), file=None)
    assert prepare(build(tomllib.loads(card_text(card)), "here")) == card
    assert np.isclose(card.robot.hz, 20)


@pytest.mark.parametrize("name", shipped.names("card"))
def test_a_card_that_ships_survives_being_written_and_read_again(name: str):
    card = replace(load_card(name), file=None)
    assert prepare(build(tomllib.loads(card_text(card)), "here")) == card


def test_a_guess_is_a_comment_above_its_key_and_one_about_no_key_is_refused(path: Path):
    card = load_card(path)
    text = card_text(card, {"robot.hz": "read from nowhere", "robot.cameras.0.name": "the key's"})
    lines = text.splitlines()
    assert lines[lines.index("hz = 20.0") - 1] == "# GUESS: read from nowhere"
    assert lines[lines.index('name = "front"') - 1] == "# GUESS: the key's"
    with pytest.raises(KeyError, match="robot.rate"):
        card_text(card, {"robot.rate": "x"})


# ------------------------------------ a layout's section

ROBOMIMIC = SMALL.replace('layout = "libero"', 'layout = "robomimic"').replace(
    'source = "attrs"', 'source = "card"\ntext = "lift"'
)


@pytest.mark.parametrize("place", ["top", "table"])
def test_a_layouts_option_stands_in_its_table_or_as_in_older_cards_at_the_top(tmp_path: Path, place: str):
    path = tmp_path / "masked.toml"
    top = 'mask = "train"\n' if place == "top" else ""
    table = "" if place == "top" else '[robomimic]\nmask = "train"\n'
    path.write_text(top + ROBOMIMIC + table)
    assert load_card(path).section == robomimic.Section(mask="train")


def test_an_option_in_both_places_or_of_another_layout_is_refused(tmp_path: Path):
    path = tmp_path / "masked.toml"
    path.write_text('mask = "train"\n' + ROBOMIMIC + '[robomimic]\nmask = "valid"\n')
    with pytest.raises(ConfigError, match=r"'mask'.*\[robomimic\]"):
        load_card(path)
    path.write_text(ROBOMIMIC + "[libero]\nlinked = []\n")
    with pytest.raises(ConfigError, match="'libero'.*'robomimic'"):
        load_card(path)
    path.write_text(ROBOMIMIC + '[robomimic]\nmsk = "valid"\n')
    with pytest.raises(ConfigError, match=r"\[robomimic\].*'msk'.*did you mean 'mask'"):
        load_card(path)


def test_a_layout_that_cannot_be_imported_or_lacks_part_of_the_contract_is_refused(tmp_path: Path):
    path = tmp_path / "bad.toml"
    for layout, fact in (
        ("no_such.module", "no_such"),
        ("tests.datasets.robots", "robots"),
        ("json", "json"),
    ):
        path.write_text(SMALL.replace("libero", layout))
        with pytest.raises(ConfigError, match=fact):
            load_card(path)
    path.write_text(SMALL.replace("libero", "json.decoder"))
    with pytest.raises(ConfigError, match=r"json\.decoder.*Section, .*recognise, open"):
        load_card(path)


def test_relative_matches_are_the_actions_with_the_name_of_their_state_dimension():
    base = prepare(build(tomllib.loads(POSITIONS), "small.toml"))

    def mask(state: ColumnCard, action: ColumnCard) -> tuple[bool, ...]:
        robot = replace(base.robot, state=state, action=action)
        return with_relative_matches(replace(base, robot=robot)).robot.relative

    joints = ColumnCard(("s",), 3, ("a", "b", "c"))
    assert mask(joints, ColumnCard(("x",), 3, ("a", "b", "hand"))) == (True, True, False)
    assert mask(joints, ColumnCard(("x",), 4, ("a", "b", "c", "c"))) == (True, True, True, False)
    suffixed = ColumnCard(("s",), 3, ("a.pos", "B.pos", "hand"))
    assert mask(suffixed, joints) == (True, True, False)
    unnamed = ColumnCard(("s",), 2)
    assert mask(unnamed, unnamed) == (True, True)
    with pytest.raises(ConfigError, match=r"matching.*'b'.*'small'.*a, b, c.*robot\.relative"):
        mask(joints, ColumnCard(("x",), 3, ("b", "c", "a")))
