"""Before training and evaluation: the data's values are those that the statistics in use describe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.train.agreement_world import recipe_of, start, write_card, write_checkpoint
from vlafit import cli, config
from vlafit.agreement import Agreement
from vlafit.codec import Codec, CodecConfig, Statistics
from vlafit.codec.normaliser import NEEDED
from vlafit.codec.state_watch import StateWatch
from vlafit.datasets import EpisodeInfo, EpisodeStore, value_faults, value_ranges
from vlafit.datasets.card import CameraCard, Card, ColumnCard, RobotCard
from vlafit.errors import EmbodimentError
from vlafit.offline.contract import adaptations, compare_values
from vlafit.recipe import AdaptRecipe
from vlafit.train.data import open_data
from vlafit.train.experiment import build
from vlafit.types import Embodiment, Feature

# ----------------------------------------------------------------------------- values that are all too small


@pytest.mark.case(
    section="data",
    report="the policy hardly moves, and training looked fine",
    user_has="radians under a checkpoint's statistics of degrees, m under mm, 0 to 1 under percent",
    now="an error where nearly all dimensions that move have less than 1/20 of the statistics' spread",
)
@pytest.mark.parametrize(("scale", "word"), [(1 / 57.29578, "radians"), (0.001, "m where"), (0.01, "0 to 1")])
def test_a_dataset_that_moves_a_fiftieth_of_the_statistics_is_an_error(scale, word, tmp_path: Path):
    # States and actions deviate by 0.170783 times the scale; the statistics by 1 and 2.
    base = write_checkpoint(tmp_path / "base")
    card = write_card(tmp_path / "data", scale=scale)
    with pytest.raises(EmbodimentError) as error:
        start(recipe_of(card, base, {}))
    text = str(error.value)
    for column, std in (("state", 1), ("action", 2)):
        times = std / (0.1707825 * scale)
        part = f"1/{times:.3g}" if times < 1000 else f"1/{times:.0f}"
        factor = f"a {part}, b {part}"
        assert f"spread of {column}" in text and factor in text and f"std a {std}, b {std}" in text
        assert f"robot.{column}.scale" in text and f'outside = ["{column}.a", "{column}.b"]' in text
    assert word in text
    every = ("state.a", "state.b", "action.0", "action.1")
    with pytest.raises(EmbodimentError, match="spread of state"):
        start(recipe_of(card, base, {"outside": every[2:]}))
    accepted = start(recipe_of(card, base, {"outside": every})).agreement
    assert accepted is not None
    assert {"spread of state", "spread of action"} <= {item.name for item in accepted.chosen}
    start(recipe_of(card, base, {}, statistics="data"))


def codec_of(std: list[float], **changes: Any) -> Codec:
    """Return a codec of an arm of `len(std)` joints whose statistics have mean 0 and these deviations."""
    joints = Feature("state", (len(std),))
    robot = Embodiment("arm", (Feature("front", (16, 16, 3)),), joints, joints, 10.0, "joint_position")
    config = CodecConfig(("front",), 16, len(std), len(std), 4, prompt=None, **changes)
    statistics = Statistics(9, np.zeros(len(std)), np.asarray(std))
    return Codec(config, robot, {"state": statistics, "action": statistics}, None)


class Recorded(EpisodeStore):
    """Episodes whose states are also the actions."""

    def __init__(self, name: str, robot: Embodiment, *rows: np.ndarray) -> None:
        column = ColumnCard(("x",), robot.state.shape[0])
        camera = CameraCard("front", "front", 16, 16)
        card = RobotCard(robot.name, robot.hz, robot.control, (camera,), column, column)
        self.card = Card(name, "generic", ".", card)
        self.rows = [row.astype(np.float32) for row in rows]
        self.episodes = tuple(EpisodeInfo(f"e{i}", "t", "go", len(row)) for i, row in enumerate(rows))

    def state(self, episode: int) -> np.ndarray:
        return self.rows[episode]

    actions = state

    def image(self, episode: int, step: int, camera: str) -> np.ndarray:
        return np.zeros((16, 16, 3), np.uint8)

    def files(self) -> tuple[Path, ...]:
        return ()

    def close(self) -> None: ...


def alternating(*sizes: float, steps: int = 400) -> np.ndarray:
    """Rows that go from -size to size and back in each dimension: their deviation is the size."""
    return np.outer(np.where(np.arange(steps) % 2, 1.0, -1.0), sizes)


def faults(codec: Codec, *stores: EpisodeStore, fitted: bool = False) -> dict[str, str]:
    every = [[one.id for one in store.episodes] for store in stores]
    items = value_faults.items(stores, every, codec, (), fitted)
    return {item.name: item.status for item in items if item.status != "same"}


ARMS = {
    # Deviations of the data under statistics of deviation 1 in every dimension, and what is said.
    "a gripper that kept its unit": ((1 / 57, 1 / 80, 1 / 60, 1 / 57, 1 / 57, 1 / 90, 1.0), "conflict"),
    "two arms in radians": ((*[1 / 57] * 6, 0.9, *[1 / 70] * 6, 1.0), "conflict"),
    "an idle arm": ((*[1 / 200] * 7, *[0.8] * 7), "differs"),
    "one joint that rests": ((0.5, 0.7, 1.0, 0.01, 0.3, 0.9, 1.0), "differs"),
    "a single task of a pretrained robot": ((0.2, 0.3, 0.14, 0.2, 0.1, 0.06, 1.0), None),
    "joints that do not move at all": ((0, 0, 0, 0, 0, 0, 1.0), None),
    "position in m, rotation alike": ((0.001, 0.001, 0.001, 0.5, 0.6, 0.7, 1.0), "differs"),
    "one dimension only": ((1 / 57,), "conflict"),
}


@pytest.mark.parametrize("name", ARMS)
def test_one_joint_may_rest_and_all_joints_at_once_are_another_unit(name: str):
    sizes, status = ARMS[name]
    codec = codec_of([1.0] * len(sizes))
    expected = dict.fromkeys(("spread of state", "spread of action"), status) if status else {}
    assert faults(codec, Recorded("arm", codec.embodiment, alternating(*sizes))) == expected


METHODS = [method for method in NEEDED if method != "identity"]


@pytest.mark.case(
    section="data",
    report="degrees under a checkpoint of radians, and every normalised value is at most 1",
    user_has="an OpenVLA or GR00T checkpoint, whose normalisation clips, and data in other units",
    now="values are compared before they are clipped: the same error as for other checkpoints",
)
@pytest.mark.parametrize("method", METHODS)
def test_values_far_outside_are_an_error_under_every_normalisation(method: Any):
    rows = np.random.default_rng(0).uniform(-1, 1, (400, 3))
    # A gripper that hardly ever closes has equal quantiles, by which LeRobot makes 1e8 of its values.
    rows[:, 2] = np.arange(400) % (2 if method == "lerobot_quantile" else 250) == 0
    robot, known = codec_of([1.0, 1.0, 1.0]).embodiment, Statistics.of_blocks([rows], "state", ())
    config = CodecConfig(("front",), 16, 3, 3, 4, prompt=None, normalisation=method)
    codec = Codec(config, robot, {"state": known, "action": known}, None)
    # OpenVLA and GR00T make every value of it the same, which is said.
    gone = {"clipped state.2": "differs", "clipped action.2": "differs"}
    gone = gone if method in ("openvla_quantile", "groot_quantile", "nvidia_quantile") else {}
    assert faults(codec, Recorded("same", robot, rows)) == gone
    degrees = faults(codec, Recorded("degrees", robot, rows * [57.3, 57.3, 1.0]))
    degrees = {name: status for name, status in degrees.items() if name not in gone}
    assert {"normalised state.0", "normalised action.1"} <= set(degrees)
    assert set(degrees.values()) == {"conflict"} and not any("2" in name for name in degrees)
    assert StateWatch(codec).sentences(np.array([57.3, 0.0, 1.0]))
    assert not StateWatch(codec).sentences(rows[0])


def test_a_dimension_that_never_moves_is_shown_as_such():
    codec = codec_of([1.0, 1.0])
    store = Recorded("arm", codec.embodiment, alternating(1, 0))
    (item, *_) = value_faults.items([store], [["e0"]], codec, (), False)
    assert item.sides["dataset"] == "arm: 0 1, 1 0 (never moves)"


def test_values_that_are_not_normalised_are_compared_with_no_spread():
    codec = codec_of([1.0, 1.0], normalisation="identity")
    assert faults(codec, Recorded("arm", codec.embodiment, alternating(0.01, 0.01))) == {}


def test_statistics_of_a_range_only_are_compared_by_range():
    codec = codec_of([50.0, 50.0])  # what reading a range of 0 to 100 without a deviation puts in its place
    wide = {"min": np.zeros(2), "max": np.full(2, 100.0)}
    codec.statistics["state"] = codec.statistics["action"] = replace(codec.statistics["state"], **wide)
    rare = np.full((400, 2), 50.0)
    rare[:4] = [[45, 45], [55, 55]] * 2  # a deviation of 0.5, a hundredth; a range of 10, a tenth
    assert faults(codec, Recorded("arm", codec.embodiment, rare)) == {}
    rare[:4] = [[49, 49], [51, 51]] * 2
    assert set(faults(codec, Recorded("arm", codec.embodiment, rare)).values()) == {"conflict"}


@pytest.mark.case(
    section="data",
    report="one of two datasets is not learned",
    user_has="two cards of one robot, one in degrees and one in radians, statistics fitted to both",
    now="an error that names the card in the smaller unit",
)
def test_two_cards_in_different_units_under_their_common_statistics_are_an_error():
    degrees, radians = alternating(60, 40, 50), alternating(60, 40, 50) / 57.29578
    robot = codec_of([1.0] * 3).embodiment
    stores = [Recorded("deg", robot, degrees), Recorded("rad", robot, radians)]
    fitted = Statistics.of(np.concatenate([degrees, radians]))
    codec = codec_of([1.0] * 3)
    codec = Codec(codec.config, robot, {"state": fitted, "action": fitted}, None)
    assert faults(codec, *stores, fitted=True) == dict.fromkeys(
        ("spread of state", "spread of action"), "conflict"
    )
    every = [["e0"], ["e0"]]
    items = [i for i in value_faults.items(stores, every, codec, (), True) if i.status == "conflict"]
    assert all(item.sides["dataset"].startswith("rad: ") and "different units" in item.fix for item in items)


# ---------------------------------------------------------- single values under their own statistics


@pytest.mark.case(
    section="data",
    report="a joint that the policy never moves after training",
    user_has="one action of 1e30 in a column of -1 to 1, statistics fitted to it",
    now="an error with dataset, episode, step, dimension and value",
)
def test_one_wild_value_under_its_own_statistics_is_an_error_that_says_where_it_is(tmp_path: Path):
    card = write_card(tmp_path / "data")
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "r+") as file:
        file["data/demo_2/actions"][3, 1] = 1e30  # type: ignore[index]
    recipe = recipe_of(card, None, {})
    training = open_data(recipe.data, recipe.train.seed).training[0]
    (wild,) = [one for one in training if one.endswith("demo_2")]
    with pytest.raises(EmbodimentError) as error:
        start(recipe)
    for word in (
        "single values of action.b",
        f"joints: 1e+30 in episode {wild}, step 3",
        "leave the episode",
    ):
        assert word in str(error.value)
    start(recipe_of(card, None, {"outside": ("action.1",)}))


@pytest.mark.parametrize(
    ("value", "status"),
    [(1e30, "conflict"), (-65535.0, "conflict"), (1000.0, "conflict"), (300.0, "differs"), (3.0, None)],
)
def test_a_value_counts_as_wild_by_how_far_it_is_from_the_others(value: float, status: str | None):
    rows = np.random.default_rng(5).uniform(-1, 1, (400, 2))
    rows[123, 1] = value
    fitted = Statistics.of(rows.astype(np.float32))
    codec = codec_of([1.0, 1.0])
    codec = Codec(codec.config, codec.embodiment, {"state": fitted, "action": fitted}, None)
    store = Recorded("arm", codec.embodiment, rows[:100], rows[100:])
    names = ("single values of state.1", "single values of action.1")
    assert faults(codec, store, fitted=True) == (dict.fromkeys(names, status) if status else {})
    if status:
        items = value_faults.items([store], [["e0", "e1"]], codec, (), True)
        texts = [item.sides["dataset"] for item in items if item.status == status]
        assert all(text.startswith(f"arm: {value:.4g} in episode e1, step 23;") for text in texts)


def test_a_noisy_signal_that_is_on_for_a_while_is_no_wild_value():
    rows = np.random.default_rng(5).normal(0, 1e-4, (400, 2))  # an encoder at rest
    rows[:, 0] = np.sin(np.arange(400))
    rows[390:, 1] += 1.0  # the gripper closes at the end
    fitted = Statistics.of(rows)
    codec = codec_of([1.0, 1.0])
    codec = Codec(codec.config, codec.embodiment, {"state": fitted, "action": fitted}, None)
    assert "conflict" not in faults(codec, Recorded("arm", codec.embodiment, rows), fitted=True).values()


@pytest.mark.case(
    section="data",
    report="the policy hardly moves, and training looked fine",
    user_has="one episode in degrees among a hundred in radians, statistics fitted to all",
    now="an error that names the episode and how many times as far it moves",
)
@pytest.mark.parametrize(
    ("scale", "free", "word"),
    [
        (57.29578, 1, "degrees among radians?"),
        (1000.0, 1, "mm among m?"),
        (30.0, 0, "degrees among radians?"),
        (57.29578, 2, None),  # two of five joints are no unit
        (10.0, 0, None),
    ],
)
def test_an_episode_in_another_unit_is_found_under_statistics_of_all(
    scale: float, free: int, word: str | None
):
    random = np.random.default_rng(3)
    rows = [random.normal(0, random.uniform(0.3, 0.9), (60, 5)) for _ in range(100)]
    rows[41][:, free:] *= scale
    codec = codec_of([1.0] * 5)
    fitted = Statistics.of(np.concatenate(rows))
    codec = Codec(codec.config, codec.embodiment, {"state": fitted, "action": fitted}, None)
    store = Recorded("arm", codec.embodiment, *rows)
    every = [[info.id for info in store.episodes]]
    found = [i for i in value_faults.items([store], every, codec, (), True) if i.name.startswith("episodes")]
    assert [item.status for item in found] == (["conflict"] * 2 if word else [])
    for item in found:
        assert "arm: episode e41 moves" in item.sides["dataset"] and word and word in item.fix
        assert "episodes.skip" in item.fix
    names = [f"{column}.{i}" for column in ("state", "action") for i in range(5)]
    again = value_faults.items([store], every, codec, names, True)
    assert {i.status for i in again if i.name.startswith("episodes")} <= {"chosen"}


def test_values_of_no_unit_are_wild_however_many_there_are():
    rows = np.random.default_rng(5).uniform(-1, 1, (400, 2))
    rows[::5, 1] = -1e12
    fitted = Statistics.of(rows.astype(np.float32))
    codec = codec_of([1.0, 1.0])
    codec = Codec(codec.config, codec.embodiment, {"state": fitted, "action": fitted}, None)
    names = ("single values of state.1", "single values of action.1")
    assert faults(codec, Recorded("arm", codec.embodiment, rows), fitted=True) == dict.fromkeys(
        names, "conflict"
    )


def test_a_signal_that_is_rarely_on_is_no_wild_value():
    rows = np.zeros((400, 2))
    rows[:, 0] = np.sin(np.arange(400))
    rows[399, 1] = 1.0  # the end of the episode, or a gripper
    fitted = Statistics.of(rows)
    codec = codec_of([1.0, 1.0])
    codec = Codec(codec.config, codec.embodiment, {"state": fitted, "action": fitted}, None)
    assert faults(codec, Recorded("arm", codec.embodiment, rows), fitted=True) == {}


@pytest.mark.case(
    section="data",
    report="the gripper never moves, and no loss shows why",
    user_has="a gripper that moves in under 1 % of the rows, clipped by quantiles, as GR00T and OpenVLA do",
    now="an error before training: of its movement the normalisation keeps nothing",
)
@pytest.mark.parametrize("method", METHODS)
def test_a_movement_of_which_clipping_keeps_nothing_is_an_error_under_fitted_statistics(method: Any):
    rows = np.zeros((400, 2))
    rows[:, 0] = np.sin(np.arange(400))
    rows[200, 1] = 1.0  # its 1 % and 99 % quantiles are 0
    plain, known = codec_of([1.0, 1.0]), Statistics.of(rows)
    codec = Codec(
        replace(plain.config, normalisation=method),
        plain.embodiment, {"state": known, "action": known}, None,
    )  # fmt: skip
    arm = Recorded("arm", codec.embodiment, rows)
    # By hand: (q99 - q01) / 2 = 0 is what a full swing of -1 to 1 is decoded to.
    kept = codec.normaliser_of("action").decode(codec.normaliser_of("action").encode(rows))
    lost = kept[:, 1].max() - kept[:, 1].min() < 1e-6
    assert lost == (method in ("openvla_quantile", "groot_quantile", "nvidia_quantile"))
    found = faults(codec, arm, fitted=True)
    assert ("clipped action.1" in found, "clipped state.1" in found) == (lost, lost)
    assert not lost or set(found.values()) == {"conflict"}
    permitted = value_faults.items([arm], [["e0"]], codec, ("action.1", "state.1"), True)
    assert "conflict" not in {item.status for item in permitted}


# ---------------------------------------------------------------------------------------- evaluation on data


@pytest.mark.case(
    section="data",
    report="an evaluation on recorded data measures nothing",
    user_has="`vlafit eval metaworld-base --data CARD` with a card in other units than the checkpoint's",
    now="the same error as in training; `--outside` permits dimensions",
)
@pytest.mark.parametrize("scale", [57.29578, 1 / 57.29578])
def test_an_evaluation_on_data_compares_the_values_as_training_does(
    scale: float, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = str(write_checkpoint(tmp_path / "base"))
    card = write_card(tmp_path / "data", scale=scale)
    asked = ["eval", base, "--data", str(card), "--samples", "2", "--draws", "2", "--device", "cpu"]
    out = tmp_path / "out"
    assert cli.main([*asked, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    name = "normalised action.b" if scale > 1 else "spread of action"
    for word in (name, "dataset 'joints'", base, "--outside ", "Else train on data of this robot"):
        assert word in error
    assert not out.exists()
    permitted = ["--outside", "state.0", "state.1", "action.a", "action.b"]
    assert cli.main([*asked, "--out", str(out), *permitted]) == 0
    assert cli.main([*asked, "--out", str(tmp_path / "no"), "--outside", "action.c"]) == 2
    assert "--outside: the robot has no dimension 'action.c'" in capsys.readouterr().err
    assert cli.main([*asked, "--out", str(tmp_path / "no"), "--outside", "foo"]) == 2
    said = capsys.readouterr().err
    assert cli.main([*asked, "--out", str(tmp_path / "no"), "--outside", "action"]) == 2
    assert "no dimension 'action'; name its dimensions one by one; it has: " in capsys.readouterr().err
    listed = said.rpartition("no dimension 'foo'; it has: ")[2].strip().split(", ")
    assert len(listed) == len(set(listed)) == 4


def test_an_evaluation_names_what_differs_and_is_no_error(tmp_path: Path):
    codec = codec_of([1.0, 1.0, 1.0, 1.0])
    store = Recorded("arm", codec.embodiment, alternating(1, 1, 1, 0.01))
    items = compare_values(codec, store, "base")
    lines = [f"{item.name}: {item.sides}" for item in items if item.status == "differs"]
    for words in (("spread of state", "3 1/100"), ("spread of action",)):
        assert any(all(word in line for word in words) for line in lines), words


@pytest.mark.case(
    section="data",
    report="validation loss in the thousands",
    user_has="a validation set in other units than the training data",
    now="an error that names set, dimension and episode; `[adapt] outside` permits dimensions",
)
def test_the_values_of_a_validation_set_are_compared_as_those_of_the_training_data(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base")
    card = write_card(tmp_path / "data")
    other = write_card(tmp_path / "other", scale=57.29578)
    other.write_text(other.read_text().replace('name = "joints"', 'name = "degrees"'))
    recipe = recipe_of(card, base, {}, validation_sets={"old": (str(other),)})
    with pytest.raises(EmbodimentError) as error:
        build(recipe, torch.device("cpu"))
    for word in (
        "data.validation_sets.old",
        "normalised action.b",
        "degrees: ",
        "reach_demo/demo_",
        "outside",
    ):
        assert word in str(error.value)
    every = ("state.a", "state.b", "action.a", "action.b")
    build(replace(recipe, adapt=AdaptRecipe(outside=every)), torch.device("cpu"))


# ------------------------------------------------------------------------------------- held-out episodes


def in_degrees(card: Path, episode: str, columns: tuple[str, ...]) -> None:
    """Scale the columns of one of the card's episodes."""
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "r+") as file:
        for column in columns:
            rows = file[f"data/{episode.rpartition('/')[2]}/{column}"]
            rows[...] = rows[...] * 57.29578  # type: ignore[index, operator]


@pytest.mark.case(
    section="data",
    report="validation loss in the thousands",
    user_has="a held-out episode in degrees among radians, or the only one where the gripper moves",
    now="an error that names episode, step and dimension before training; `inspect --data` shows it",
)
@pytest.mark.parametrize("statistics", ["checkpoint", "data"])
def test_the_values_of_held_out_episodes_are_compared_with_the_statistics_in_use(
    statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base, card = write_checkpoint(tmp_path / "base"), write_card(tmp_path / "data")
    recipe = recipe_of(card, base, {}, statistics=statistics)
    (held_out,) = open_data(recipe.data, recipe.train.seed).validation[0]
    accepted = start(recipe).agreement
    assert accepted is not None
    assert "normalised action, held-out episodes" in {item.name for item in accepted.items}
    in_degrees(card, held_out, ("actions", "obs/at"))
    with pytest.raises(EmbodimentError) as error:
        start(recipe)
    text = str(error.value)
    for word in ("normalised action.b, held-out episodes", f"in episode {held_out}, step", "episodes.skip"):
        assert word in text
    assert text.count("fix:") == 1 and 'outside = ["state.a", ' in text
    every = ("state.a", "state.b", "action.a", "action.b")
    start(replace(recipe, adapt=AdaptRecipe(outside=every)))
    if statistics == "checkpoint":
        assert cli.main(["inspect", str(base), "--data", str(card)]) == 1
        table, errors = capsys.readouterr()
        assert f"{held_out}, step" in table and "normalised action.b, held-out episodes" in errors
        assert errors.count("episodes.skip") == 1


def test_a_dimension_that_only_moves_in_a_held_out_episode_is_an_error(tmp_path: Path):
    card = write_card(tmp_path / "data")
    recipe = recipe_of(card, None, {})
    (held_out,) = open_data(recipe.data, recipe.train.seed).validation[0]
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "r+") as file:
        for name, group in file["data"].items():  # type: ignore[union-attr]
            group["actions"][:, 1] = float(held_out.endswith(name)) * (np.arange(6) > 2)
    with pytest.raises(EmbodimentError, match="normalised action.b, held-out episodes") as error:
        start(recipe)
    assert f"1 in episode {held_out}, step 3" in str(error.value)


def test_a_remedy_that_many_dimensions_share_is_given_once(tmp_path: Path):
    codec = codec_of([1.0] * 13)
    store = Recorded("arm", codec.embodiment, alternating(*[57.3] * 13))
    items = tuple(value_faults.items([store], [["e0"]], codec, (), False))
    agreement = Agreement(items, (), ())
    with pytest.raises(EmbodimentError) as error:
        agreement.require()
    text = str(error.value)
    assert text.count("fix:") == 1 and "disagree on 26 points" in text
    assert all(f"normalised {column}.{i}: " in text for column in ("state", "action") for i in range(13))
    assert all(f'"{column}.{i}"' in text for column in ("state", "action") for i in range(13))
    assert [row[4].endswith("as above") for row in agreement.rows()].count(True) == 25


def test_an_evaluation_permits_what_the_recipe_of_the_run_permitted(tmp_path: Path):
    recipe = recipe_of(tmp_path / "card.toml", None, {"outside": ("action.a",)})
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    assert adaptations(tmp_path).outside == ("action.a",)
    assert adaptations(tmp_path / "elsewhere").outside == ()


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1000.2, ["mm"]),
        (999.7, ["mm"]),
        (98.0, ["percent"]),
        (57.3, ["radians"]),
        (500.0, ["mm", "percent", "radians"]),
        (300.0, ["percent", "radians"]),
    ],
)
def test_the_unit_nearest_to_the_measured_factor_is_named_first(factor: float, words: list[str]):
    names = {"mm": "m where they are of mm", "percent": "0 to 1 where they are of 0 to 100"}
    names["radians"] = "radians where the statistics are of degrees"
    assert value_faults._guess(factor) == "; or ".join(names[word] for word in words)


def test_a_small_share_is_written_without_an_exponent():
    assert [value_ranges.fraction(share) for share in (0.001, 1 / 999.7, 1 / 57.29578)] == [
        "1/1000",
        "1/1000",
        "1/57.3",
    ]


def test_a_console_names_the_largest_of_many_dimensions_and_those_with_a_note():
    codec = codec_of([1.0] * 13)
    values = [1.0 + i / 100 for i in range(12)] + [0.01]
    store = Recorded("arm", codec.embodiment, alternating(*values))
    state, *_ = value_faults.items([store], [["e0"]], codec, ("state.12", "action.12"), False)
    whole = state.sides["dataset"]
    assert all(f"{i} {value:.3g}" in whole for i, value in enumerate(values))
    assert state.short[whole] == "arm: 9 1.09, 10 1.1, 11 1.11, 12 0.01 (spread 1/100); 9 more"
