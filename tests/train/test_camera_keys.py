"""A key from which another card, or the checkpoint, reads another camera is refused unless it is confirmed.

The names of the keys say nothing (obs/cam_1), or the camera's (obs/front): both are the same fault.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from tests.train.agreement_world import EPISODES, card_beside, recipe_of, start, write_card
from vlafit import checkpoints, cli, config, load_actor
from vlafit.agreement import Agreement, Item, Learned
from vlafit.datasets import Card, load_card, open_dataset
from vlafit.datasets.camera_keys import items, learned_by
from vlafit.errors import EmbodimentError
from vlafit.offline.contract import adaptations, compare_readings
from vlafit.recipe import Recipe
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import serving
from vlafit.train.experiment import build

NAMES = ("top", "wrist")
SPARE = "obs/cam_3"
SHORT = ("--samples", "1", "--draws", "2")
CONFIRMED = {"cameras": {"top": "top", "wrist": "wrist"}}
OPTIONS = "--adapt.cameras.top top --adapt.cameras.wrist wrist"


@pytest.fixture(scope="module", params=["names that say nothing", "names of cameras"])
def keys(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The keys of top and wrist in the first card."""
    return ("obs/cam_1", "obs/cam_2") if request.param.endswith("nothing") else ("obs/top", "obs/wrist")


def write(folder: Path, keys: tuple[str, str], scale: float = 1.0) -> Path:
    """Write recordings, and a card whose cameras top and wrist are read from `keys`."""
    card = write_card(folder, cameras=NAMES, scale=scale)
    with h5py.File(folder / "joints" / "reach_demo.hdf5", "a") as file:
        for number in range(EPISODES):
            group = file[f"data/demo_{number}"]
            assert isinstance(group, h5py.Group)
            front = group["obs/front"]
            assert isinstance(front, h5py.Dataset)
            for place, key in enumerate((*keys, SPARE)):
                group[key] = front[:] + 50 * place
    text = card.read_text()
    for key in keys:
        text = text.replace('key = "obs/front"', f'key = "{key}"', 1)
    card.write_text(text)
    return card


@pytest.fixture(scope="module")
def card(keys: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), keys)


@pytest.fixture(scope="module")
def late(keys: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other recordings of the robot, for the cards below."""
    return write(tmp_path_factory.mktemp("late"), keys, scale=1.01)


@pytest.fixture(scope="module")
def same(late: Path) -> Path:
    return card_beside(late, "same")


@pytest.fixture(scope="module")
def other(late: Path, keys: tuple[str, str]) -> Path:
    """A card that exchanges the keys."""
    top, wrist = (f'key = "{key}"' for key in keys)
    return card_beside(late, "exchanged", (top, wrist), (wrist, top))


@pytest.fixture(scope="module")
def learned(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(recipe_of(card, None, {}), tmp_path_factory.mktemp("checkpoint") / "learned")


def saved(recipe: Recipe, folder: Path) -> Path:
    """Save the checkpoint with which a run begins."""
    initial = start(recipe)
    checkpoints.save(initial.policy, folder, initial.codecs, agreement=initial.agreement)
    return folder


def placed(place: str, card: Path, other: Path, checkpoint: Path | None, adapt: dict) -> Recipe:
    """Return the recipe in which the card `other` has this place."""
    recipe = recipe_of(other if place == "alone" else card, checkpoint, adapt)
    if place == "further card":
        return replace(recipe, data=replace(recipe.data, cards=(str(card), str(other))))
    if place == "validation set":
        return replace(recipe, data=replace(recipe.data, validation_sets={"late": str(other)}))
    return recipe


def agreed(recipe: Recipe) -> Agreement:
    agreement = build(recipe, torch.device("cpu")).agreement
    assert agreement is not None
    return agreement


def require_both(said: str, keys: tuple[str, str]) -> None:
    """The error says of both cameras which key they have, and whose it is."""
    for camera, key, whose in (("top", keys[1], "wrist"), ("wrist", keys[0], "top")):
        assert f"camera {camera} reads {key}, " in said and f"camera {whose}" in said


@pytest.mark.case(
    section="data",
    report="a mixture, or a validation set, whose cards exchange two cameras under keys that say nothing",
    user_has="`top` with the key `cam_1` and `wrist` with `cam_2`; another card has them the other way round",
    now="an error with both cards and both cameras; `adapt.cameras` confirms it",
)
@pytest.mark.parametrize(
    ("place", "start_from"),
    [
        ("alone", "checkpoint"),
        ("further card", "checkpoint"),
        ("further card", "nothing"),
        ("validation set", "checkpoint"),
        ("validation set", "nothing"),
    ],
)
def test_training_refuses_exchanged_keys_unless_the_recipe_confirms_them(
    place: str, start_from: str, card: Path, other: Path, learned: Path, keys: tuple[str, str]
):
    checkpoint = None if start_from == "nothing" else learned
    with pytest.raises(EmbodimentError) as error:
        agreed(placed(place, card, other, checkpoint, {}))
    require_both(str(error.value), keys)
    assert OPTIONS in str(error.value)
    title = str(error.value).partition("\n")[0]
    assert "statistics" not in title
    expected = {
        "alone": ["card 'exchanged'", "checkpoint"],
        "further card": ["'joints'", "'exchanged'"],
        "validation set": ["data.validation_sets.late", "the training data"],
    }
    assert [fact for fact in expected[place] if fact not in title] == []
    rows = [
        one for one in agreed(placed(place, card, other, checkpoint, CONFIRMED)).items if "key of" in one.name
    ]
    assert {(row.status, row.reason) for row in rows if row.status != "same"} == {("chosen", "adapt.cameras")}


@pytest.mark.parametrize("place", ["alone", "further card", "validation set"])
def test_training_takes_the_same_keys_and_keys_of_no_other_camera(
    place: str, card: Path, late: Path, same: Path, learned: Path, keys: tuple[str, str]
):
    third = card_beside(late, "third", (f'key = "{keys[0]}"', f'key = "{SPARE}"'))
    for one, status in ((same, "same"), (third, "differs")):
        for checkpoint in (None, learned):
            made = agreed(placed(place, card, one, checkpoint, {})).items
            rows = [item for item in made if "key of" in item.name]
            keyed = {row.name.partition(",")[0]: row.status for row in rows}
            is_compared = place != "alone" or checkpoint is not None
            top = status if is_compared else "same"
            assert keyed == {"key of camera top": top, "key of camera wrist": "same"}


def test_one_key_that_is_another_cameras_is_enough(card: Path, late: Path, keys: tuple[str, str]):
    shifted = card_beside(
        late,
        "shifted",
        (f'key = "{keys[1]}"', f'key = "{SPARE}"'),
        (f'key = "{keys[0]}"', f'key = "{keys[1]}"'),
    )
    with pytest.raises(EmbodimentError) as error:
        agreed(placed("further card", card, shifted, None, {}))
    assert f"camera top reads {keys[1]}" in str(error.value) and "camera wrist reads" not in str(error.value)


def test_a_recipes_cameras_confirm_no_other_card_than_it_learned_from(
    card: Path, other: Path, learned: Path, tmp_path: Path
):
    recipe = recipe_of(other, learned, CONFIRMED)
    actor = load_actor(saved(recipe, tmp_path / "tuned"), width=4)
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    adapt = adaptations(tmp_path)
    assert dict(adapt.cameras) == CONFIRMED["cameras"]
    rows = compare_readings(actor, open_dataset(str(other)), "it", adapt)
    assert {row.status for row in rows if "key of" in row.name} <= {"same", "chosen"}
    with pytest.raises(EmbodimentError, match="--confirm-cameras top wrist"):
        compare_readings(actor, open_dataset(str(card)), "it", adapt)


def test_a_key_that_differs_from_the_learned_one_is_a_row_of_an_evaluation(
    late: Path, learned: Path, keys: tuple[str, str], tmp_path: Path, run: Callable[..., int], capsys
):
    third = card_beside(late, "third", (f'key = "{keys[0]}"', f'key = "{SPARE}"'))
    assert run("eval", learned, "--data", third, "--out", tmp_path / "out", *SHORT) == 0
    [line] = [one for one in capsys.readouterr().out.splitlines() if one.startswith("key of camera")]
    assert [fact for fact in ("top", SPARE, keys[0], "differs: another key") if fact not in line] == []


def test_robots_whose_cards_exchange_keys_are_trained_together_and_rows_say_so(
    card: Path, other: Path, keys: tuple[str, str]
):
    recipe = placed("further card", card, other, None, {})
    names = {"joints": "one", "exchanged": "two"}
    rows = agreed(replace(recipe, data=replace(recipe.data, embodiments=names))).items
    keyed = {row.name: row for row in rows if "key of" in row.name}
    assert keyed["one: key of camera top"].status == "same"
    two = keyed["two: key of camera top"]
    assert two.status == "differs" and f"camera top reads {keys[1]}, from which card 'joints'" in two.reason


@pytest.mark.parametrize("exchanged", [False, True])
def test_cameras_that_the_recipe_renames_are_compared_with_those_whose_place_they_take(
    exchanged: bool, late: Path, learned: Path, keys: tuple[str, str]
):
    top, wrist = ('name = "top"', 'name = "wrist"') if not exchanged else ('name = "wrist"', 'name = "top"')
    renamed = card_beside(late, f"renamed_{exchanged}", (top, 'name = "one"'), (wrist, 'name = "two"'))
    cameras = {"top": "one", "wrist": "two"}
    rows = agreed(placed("alone", renamed, renamed, learned, {"cameras": cameras})).items
    [row] = [row for row in rows if row.name == "key of camera one"]
    there = keys[1] if exchanged else keys[0]
    assert row.sides == {"dataset": there, "checkpoint": keys[0]}
    assert (row.status, row.reason) == (("chosen", "adapt.cameras") if exchanged else ("same", ""))


def test_inspect_refuses_them(other: Path, learned: Path, keys: tuple[str, str], capsys):
    assert cli.main(["inspect", str(learned), "--data", str(other)]) == 1
    require_both("".join(capsys.readouterr()), keys)


@pytest.fixture(scope="module")
def address(learned: Path) -> Iterator[str]:
    actor = load_actor(learned, width=4)
    with serving(actor, describe(actor), Options(port=0)) as running:
        yield running.address


@pytest.mark.parametrize("who", ["local", "served"])
def test_an_evaluation_refuses_them_unless_they_are_confirmed(
    who: str, other: Path, learned: Path, keys: tuple[str, str], tmp_path: Path, capsys, request
):
    whose = [str(learned)] if who == "local" else ["--actor", request.getfixturevalue("address")]
    words = ["eval", *whose, "--data", str(other), "--out", str(tmp_path / "out"), *SHORT]
    assert cli.main(words) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    require_both(said, keys)
    assert "--confirm-cameras top wrist" in said
    assert cli.main([*words, "--confirm-cameras", "top", "wrist"]) == 0
    rows = json.loads((tmp_path / "out/result.json").read_text())["agreement"]
    keyed = {row["name"]: row for row in rows if row["name"].startswith("key of")}
    assert {(row["status"], row["reason"]) for row in keyed.values()} == {("chosen", "--confirm-cameras")}
    assert keyed["key of camera top"]["sides"] == {"dataset": keys[1], "checkpoint": keys[0]}


def test_who_learned_from_both_is_evaluated_on_each(
    card: Path, same: Path, other: Path, tmp_path: Path, run: Callable[..., int]
):
    both = saved(placed("further card", card, other, None, CONFIRMED), tmp_path / "both")
    for number, one in enumerate((card, same, other)):
        assert run("eval", both, "--data", one, "--out", tmp_path / str(number), *SHORT) == 0


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Run a command; return its exit status."""
    return lambda *words: cli.main([str(word) for word in words])


def test_an_agreement_of_an_older_version_names_exchanged_keys_in_sentences():
    said = {
        "camera front": "camera front reads obs/back, which has the name of camera back",
        "camera left": "camera left reads obs/r, which is of the other hand",
        "camera slot 0": "front 8x8",
    }
    (one,) = learned_by(Learned(said))
    assert one.keys == {"front": "obs/back", "left": "obs/r"}
    said = {"key of camera top": "a: obs/1; b: obs/2", "key of camera wrist": "obs/3"}
    assert [one.keys for one in learned_by(Learned(said))] == [
        {"top": "obs/1", "wrist": "obs/3"},
        {"top": "obs/2", "wrist": "obs/3"},
    ]


@pytest.mark.parametrize(
    ("here", "there", "asked"),
    [
        ("images/cam2 images/cam1", "obs/cam_1 obs/cam_2", "top wrist"),
        (
            "observation.images.camera_2 observation.images.camera_1",
            "obs/cam_1_rgb obs/cam_2_rgb",
            "top wrist",
        ),
        ("cam_2/color cam_1/color", "obs/cam_1 obs/cam_2", "top wrist"),
        ("images/cam1 images/cam2", "obs/cam_1 obs/cam_2", ""),
        ("images/cam2 images/cam3", "obs/cam_1 obs/cam_2", ""),  # another numbering, perhaps
        ("images/cam0 images/cam1", "obs/cam_1 obs/cam_2", ""),
        ("obs/b obs/c obs/a", "img/a img/b img/c", "top wrist side"),
        ("obs/b obs/a obs/c", "img/a img/b img/c", "top wrist"),
        ("obs/b obs/a obs/d", "img/a img/b img/c", "top wrist"),
        ("obs/a obs/a", "obs/a obs/b", "wrist"),
        ("1/rgb 2/rgb", "2/rgb 1/rgb", "top wrist"),
        ("rgb image", "image rgb", "top wrist"),
    ],
)
def test_keys_in_other_words_are_compared_where_cameras_are_exchanged(
    here: str, there: str, asked: str, card: Path
):
    def keyed(name: str, keys: str) -> Card:
        one = load_card(str(card))
        cameras = [
            replace(one.robot.cameras[0], name=camera, key=key)
            for camera, key in zip(("top", "wrist", "side"), keys.split(), strict=False)
        ]
        return replace(one, name=name, robot=replace(one.robot, cameras=tuple(cameras)))

    def asked_in(cards: list[Card], learned: Learned | None) -> list[str]:
        rows = items(cards, learned, {}, lambda names: (" ".join(names), ()))
        return [row.name.removeprefix("key of camera ") for row in rows if row.status == "conflict"]

    first, second = keyed("first", there), keyed("second", here)
    assert asked_in([first, second], None) == asked.split()
    before = items([first], None, {}, lambda names: ("", ()))
    assert asked_in([second], Learned({row.name: row.sides["dataset"] for row in before})) == asked.split()


def test_cameras_of_any_name_are_compared(card: Path):
    card_a = load_card(str(card))
    odd = ("top: left, a", "in 2; b")
    robot = replace(
        card_a.robot,
        cameras=tuple(replace(c, name=n) for c, n in zip(card_a.robot.cameras, odd, strict=True)),
    )
    one = replace(card_a, robot=robot)
    exchanged = [replace(c, key=k.key) for c, k in zip(robot.cameras, reversed(robot.cameras), strict=True)]
    two = replace(one, name="two", robot=replace(robot, cameras=tuple(exchanged)))

    def compare(cards: list, learned: Learned | None) -> list[Item]:
        return list(items(cards, learned, {}, lambda names: (" ".join(names), ())))

    rows = compare([one], None)
    learned = Learned({row.name: row.sides["dataset"] for row in rows})
    assert [row.status for row in rows] == ["same", "same"]
    assert [row.status for row in compare([two], learned)] == ["conflict", "conflict"]
    assert [row.status for row in compare([one, two], None)] == ["conflict", "conflict"]
