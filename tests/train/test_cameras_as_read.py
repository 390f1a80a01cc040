"""What cards say about cameras holds for the whole run: when it goes on, for validation sets and mixtures."""

import json
import re
from pathlib import Path

import h5py
import pytest

from tests.train.agreement_world import EPISODES, recipe_of, write_card
from vlafit.datasets import load_card
from vlafit.datasets.framing import frames, frames_of, is_same
from vlafit.errors import TrainingError
from vlafit.recipe import Recipe
from vlafit.train import run

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


def edited(text: str, *changes: tuple[str, str]) -> str:
    """Return a card with each first text replaced by the second, at once."""
    table = dict(changes)
    assert all(text.count(before) for before in table)
    return re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], text)


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
    assert set(recorded["joints"]) == {"camera front", "camera back", "robot.relative"}
    (out / "run.json").write_text(json.dumps(content))
    assert run(recipe, out, resume=True).finished
    assert json.loads((out / "run.json").read_text())["data_read"] == recorded


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
