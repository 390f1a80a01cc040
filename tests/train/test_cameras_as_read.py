"""What cards say about cameras holds for the whole run: when it goes on, for validation sets and mixtures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from tests.train.agreement_world import EPISODES, edited, recipe_of, start, write_card, write_checkpoint
from vlafit import cli, config, load_actor
from vlafit.agreement import Item
from vlafit.datasets import load_card, open_dataset
from vlafit.datasets.framing import differing, frames, frames_of, is_same, reading
from vlafit.errors import EmbodimentError, TrainingError
from vlafit.offline.contract import Confirmed, adaptations, compare_readings
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.data_files import require_same_readings
from vlafit.train.experiment import build

RIGHT = 'key = "obs/front"'


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card of the cameras front and back, each with frames of its own."""
    card = write_card(tmp_path_factory.mktemp("data"), cameras=("front", "back"))
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "a") as file:
        for number in range(EPISODES):
            file[f"data/demo_{number}/obs/back"] = file[f"data/demo_{number}/obs/front"][:] + 50  # type: ignore[index]
    text = card.read_text()
    second = text.rindex(RIGHT)
    card.write_text(text[:second] + text[second:].replace(RIGHT, 'key = "obs/back"'))
    return card


@pytest.fixture(scope="module")
def trained(card: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe, out = recipe_of(card, None, {}), tmp_path_factory.mktemp("trained") / "run"
    assert run(recipe, out).finished
    return recipe, out


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (
            (('"obs/front"', '"obs/back"'), ('"obs/back"', '"obs/front"')),
            ("camera front was 'key obs/front", "is now 'key obs/back", "camera back was 'key obs/back"),
        ),
        ((('key = "obs/front"', 'rotate = 180\nkey = "obs/front"'),), ("camera front", "turned by 180")),
        ((('key = "obs/back"', 'flip = "vertical"\nkey = "obs/back"'),), ("camera back", "flipped vertical")),
        ((('key = "obs/back"', 'channels = "bgr"\nkey = "obs/back"'),), ("camera back", "bgr to rgb")),
        ((("relative = []", "relative = [true, false]"),), ("robot.relative", "'none'", "'dimensions 0'")),
        (
            (('"actions"], dim', '"actions"], scale = [-1.0, 1.0], dim'),),
            ("action conversion was 'as in the files'", "is now 'times -1 in dimension 0'"),
        ),
        (
            (("[robot]", "[rows]\naction_shift = 1\n[robot]"),),
            ("action conversion was 'as in the files'", "is now 'that of row t+1'"),
        ),
    ],
)
def test_a_card_that_reads_cameras_or_actions_otherwise_is_refused_on_resume(
    card: Path, trained: tuple[Recipe, Path], changes: tuple[tuple[str, str], ...], facts: tuple[str, ...]
) -> None:
    recipe, out = trained
    before = card.read_text()
    card.write_text(edited(before, *changes))
    try:
        with pytest.raises(TrainingError) as caught:
            run(recipe, out, resume=True)
    finally:
        card.write_text(before)
    assert all(fact in str(caught.value) for fact in ("card 'joints'", *facts))


def test_a_run_without_a_record_of_its_cameras_is_resumed_and_has_one_then(
    trained: tuple[Recipe, Path],
) -> None:
    recipe, out = trained
    content = json.loads((out / "run.json").read_text())
    recorded = content.pop("data_read")
    stated = {
        f"{column} {what}" for column in ("state", "action") for what in ("unit", "names", "conversion")
    }
    assert set(recorded["joints"]) == {"camera front", "camera back", "robot.relative", *stated}
    (out / "run.json").write_text(json.dumps(content))
    assert run(recipe, out, resume=True).finished
    assert json.loads((out / "run.json").read_text())["data_read"] == recorded


def test_names_that_the_card_states_only_since_the_run_began_are_named(card: Path, tmp_path: Path) -> None:
    plain = card.with_name("plain.toml")
    plain.write_text(re.sub(r"labels = \[[^]]*\]", "labels = []", card.read_text()))
    named, unnamed = ({"joints": reading(load_card(str(one)))} for one in (card, plain))
    for before, now, facts in (
        (unnamed, named, ("'a, b'", "did not state")),
        (named, unnamed, ("was 'a, b', is now 'not stated'",)),
        (named, {"joints": named["joints"] | {"action names": "b, a"}}, ("was 'a, b', is now 'b, a'",)),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"data_read": before}))
        try:
            said = " ".join(require_same_readings(tmp_path, now))
        except TrainingError as error:
            said = str(error)
        assert all(fact in said for fact in ("card 'joints'", "action names", *facts))
    old = {key: value for key, value in unnamed["joints"].items() if "names" not in key}
    (tmp_path / "run.json").write_text(json.dumps({"data_read": {"joints": old}}))
    assert require_same_readings(tmp_path, named) == [], "a run of before"


def test_a_unit_that_the_card_states_only_since_the_run_began_is_named(tmp_path: Path) -> None:
    def record(**stated: str) -> Path:
        (tmp_path / "run.json").write_text(json.dumps({"data_read": {"joints": stated}}))
        return tmp_path

    now = {"joints": {"state unit": "rad", "robot.relative": "none"}}
    (warning,) = require_same_readings(record(**{"state unit": "not stated", "robot.relative": "none"}), now)
    for fact in ("card 'joints'", "state unit", "'rad'", "do not state it"):
        assert fact in warning
    assert require_same_readings(record(**now["joints"]), now) == []
    assert require_same_readings(record(**{"robot.relative": "none"}), now) == [], "a run of before"
    with pytest.raises(TrainingError, match="state unit was 'deg', is now 'rad'"):
        require_same_readings(record(**{"state unit": "deg", "robot.relative": "none"}), now)


def test_limits_that_the_card_changes_before_a_resumption_are_named(
    card: Path, trained: tuple[Recipe, Path]
) -> None:
    (recipe, out), before = trained, card.read_text()
    checkpoint = max((out / "checkpoints").iterdir())
    assert not build(recipe, torch.device("cpu"), checkpoint).warnings
    card.write_text(
        edited(
            before, ('action = { keys = ["actions"],', 'action = { keys = ["actions"], low = [-9.0, -2.5],')
        )
    )
    try:
        (warning,) = build(recipe, torch.device("cpu"), checkpoint).warnings
    finally:
        card.write_text(before)
    for fact in ("card 'joints'", "robot.action.low is [-9.0, -2.5]", "not stated", str(checkpoint), "keep"):
        assert fact in warning


def test_frames_of_several_cards_are_stated_for_each_where_they_differ(card: Path) -> None:
    plain = load_card(str(card))
    other = card.with_name("other.toml")
    other.write_text(
        edited(
            card.read_text(),
            ('name = "joints"', 'name = "other"'),
            ('key = "obs/front"', 'rotate = 180\nchannels = "bgr"\nkey = "obs/front"'),
        )
    )
    turned = load_card(str(other))
    assert frames_of([plain, plain]) == frames(plain) == "as stored"
    both = frames_of([plain, turned])
    assert both == "joints: as stored; other: front turned by 180 and bgr to rgb"
    assert is_same(frames(plain), both) and is_same(frames(turned), both)
    assert not is_same(frames(turned), frames(plain))


def other_card(card: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    """Write the card of other recordings of the same robot, with `changes`."""
    other = write_card(folder, cameras=("front", "back"), scale=1.01)
    with h5py.File(folder / "joints" / "reach_demo.hdf5", "a") as file:
        for number in range(EPISODES):
            file[f"data/demo_{number}/obs/back"] = file[f"data/demo_{number}/obs/front"][:] + 60  # type: ignore[index]
    other.write_text(edited(card.read_text(), ('name = "joints"', 'name = "other"'), *changes))
    return other


EXCHANGED = (('"obs/front"', '"obs/back"'), ('"obs/back"', '"obs/front"'))
TURNED = ('key = "obs/front"', 'rotate = 180\nkey = "obs/front"')


@pytest.mark.case(
    section="data",
    report="evaluation on recordings whose cameras are exchanged in the card",
    user_has="a checkpoint, and a card in which `front` has the key of `back`",
    now="an error with both names; `--confirm-cameras` says that the card is right",
)
def test_exchanged_cameras_are_refused_by_an_evaluation_unless_confirmed_or_learned(
    card: Path, trained: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, checkpoint = other_card(card, tmp_path / "other", *EXCHANGED), trained[1]
    words = ["--data", str(other), "--out", str(tmp_path / "out"), "--samples", "1", "--draws", "2"]
    assert cli.main(["eval", str(checkpoint), *words]) == 2
    error = capsys.readouterr().err
    for fact in (
        "camera front reads obs/back",
        "camera back reads obs/front",
        "--confirm-cameras front back",
    ):
        assert fact in error
    assert not (tmp_path / "out").exists()
    assert cli.main(["eval", str(checkpoint), *words, "--confirm-cameras", "front"]) == 2
    error = capsys.readouterr().err
    assert "camera front reads" not in error and "--confirm-cameras back" in error
    assert cli.main(["eval", str(checkpoint), *words, "--confirm-cameras", "front", "top"]) == 2
    assert "no camera 'top'" in capsys.readouterr().err
    assert cli.main(["eval", str(checkpoint), *words, "--confirm-cameras", "front", "back"]) == 0
    kept = json.loads((tmp_path / "out/result.json").read_text())["agreement"]
    assert {i["name"]: i["reason"] for i in kept if i["status"] == "chosen"} == dict.fromkeys(
        ("key of camera front", "key of camera back"), "--confirm-cameras"
    )


def test_a_checkpoint_is_evaluated_on_cameras_that_it_learned_from_or_its_recipe_names(
    card: Path, trained: tuple[Recipe, Path], tmp_path: Path
) -> None:
    store, actor = open_dataset(str(other_card(card, tmp_path / "other", *EXCHANGED))), load_actor(trained[1])
    text = "camera front reads obs/back, which has the name of camera back"
    with pytest.raises(EmbodimentError, match=text):
        compare_readings(actor, store, "it")
    assert actor.agreement is not None
    older = tuple(item for item in actor.agreement.items if not item.name.startswith("key of camera"))
    actor.agreement = replace(actor.agreement, items=older).with_items(
        [Item("camera front", {"dataset": text}, "front", "differs")]
    )
    with pytest.raises(EmbodimentError, match="camera back") as caught:
        compare_readings(actor, store, "it")
    assert "camera front reads" not in str(caught.value)
    recipe = recipe_of(card, None, {"cameras": {"slot": "back"}})
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    items = compare_readings(actor, store, "it", adaptations(tmp_path))
    assert [item.status for item in items if item.name.startswith("key of ")] == ["chosen", "chosen"]


def test_a_validation_set_that_is_framed_otherwise_is_refused_unless_the_recipe_says_so(
    card: Path, tmp_path: Path
) -> None:
    other = other_card(card, tmp_path / "other", TURNED)
    recipe = recipe_of(card, None, {}, validation_sets={"old": str(other)})
    with pytest.raises(EmbodimentError) as error:
        build(recipe, torch.device("cpu"))
    for fact in (
        "data.validation_sets.old",
        "dataset: other: front turned by 180; training data: joints: as stored",
        "--adapt.frames true",
    ):
        assert fact in str(error.value)
    recipe = recipe_of(card, None, {"frames": True}, validation_sets={"old": str(other)})
    agreement = build(recipe, torch.device("cpu")).agreement
    assert agreement is not None
    (chosen,) = [item for item in agreement.chosen if item.name.startswith("frames")]
    assert (chosen.name, chosen.reason) == ("frames, validation/old", "adapt.frames")


def test_an_evaluation_of_frames_that_are_read_otherwise_than_in_training_is_refused_unless_confirmed(
    card: Path, trained: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actor, other = load_actor(trained[1]), other_card(card, tmp_path / "other", TURNED)
    same = compare_readings(actor, open_dataset(str(card)), "it")
    assert {item.status for item in same} == {"same"}
    words = ("--data", str(other), "--out", str(tmp_path / "out"), "--samples", "1", "--draws", "2")
    assert cli.main(["eval", str(trained[1]), *words]) == 2 and not (tmp_path / "out").exists()
    assert "--confirm-frames" in capsys.readouterr().err
    assert cli.main(["eval", str(trained[1]), *words, "--confirm-frames"]) == 0
    [shown] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frames ")]
    assert "front turned by 180" in shown and "as stored" in shown and "--confirm-frames" in shown
    [kept] = [
        i
        for i in json.loads((tmp_path / "out/result.json").read_text())["agreement"]
        if i["name"] == "frames"
    ]
    assert kept["status"] == "chosen" and kept["sides"]["checkpoint"] == "as stored"
    actor.agreement = None
    items = compare_readings(actor, open_dataset(str(other)), "it", confirmed=Confirmed())
    [frames] = [item for item in items if item.name == "frames"]
    assert (frames.status, frames.reason) == ("assumed", "the checkpoint does not say")


@pytest.mark.case(
    section="data",
    report="the policy learns from pictures that are upside down",
    user_has="a card that turns or flips a camera, and a checkpoint that learned from frames as stored",
    now="refused, naming camera and both sides; `adapt.frames` accepts it",
)
def test_frames_that_a_checkpoint_learned_otherwise_are_refused_unless_accepted(
    card: Path, trained: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, other = trained[1], other_card(card, tmp_path / "other", TURNED)
    with pytest.raises(EmbodimentError) as caught:
        start(recipe_of(other, checkpoint, {}))
    for fact in ("frames: dataset: front turned by 180; checkpoint: as stored", "--adapt.frames true"):
        assert fact in str(caught.value)
    head = str(caught.value).splitlines()[0]
    assert head.startswith("card ") and str(checkpoint) in head and "statistics" not in head
    assert cli.main(["inspect", str(checkpoint), "--data", str(other)]) == 1
    assert "[adapt] frames = true" in "".join(capsys.readouterr())
    front = 'name = "front"'
    renamed = other_card(card, tmp_path / "renamed", TURNED, (front, front.replace('t"', 't_rgb"')))
    with pytest.raises(EmbodimentError) as caught:
        start(recipe_of(renamed, checkpoint, {}))
    for option in ("--adapt.cameras.front front_rgb", "--adapt.frames true"):
        assert option in str(caught.value), "one error for all that cameras need"
    frames_of_run = {}
    for name, on, base, adapt in (
        ("chosen", other, checkpoint, {"frames": True}),
        ("same", card, checkpoint, {}),
        ("assumed", other, write_checkpoint(tmp_path / "base", cameras=("front", "back")), {}),
    ):
        agreement = start(recipe_of(on, base, adapt)).agreement
        assert agreement is not None
        [item] = [item for item in agreement.items if item.name == "frames"]
        frames_of_run[name] = item.status
        assert item.value.startswith("8x8") or item.value.startswith("16x16")
    assert frames_of_run == {name: name for name in frames_of_run}


@pytest.mark.parametrize(
    ("learned_from", "sources", "names"),
    [
        ("as stored", {"front": "front"}, ["front"]),
        ("front turned by 180", {"front": "front", "back": "back"}, []),
        ("top turned by 180", {"top": "front", "back": "back"}, []),
        ("one: as stored; two: front turned by 180, back flipped vertical", {"front": "front"}, []),
        ("one: as stored; two: back turned by 180", {"front": "front", "back": "back"}, ["front"]),
    ],
)
def test_frames_are_compared_camera_by_camera(
    card: Path, tmp_path: Path, learned_from: str, sources: dict[str, str], names: list[str]
) -> None:
    turned = card.with_name("turned.toml")
    turned.write_text(edited(card.read_text(), TURNED))
    assert differing([load_card(str(turned))], learned_from, sources) == names
