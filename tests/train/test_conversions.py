"""What a card does to states and actions when it reads them holds for the whole run, and exports keep it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from tests.train.agreement_world import card_beside, edited, recipe_of, start, write_card, write_checkpoint
from vlafit import checkpoints, cli
from vlafit.agreement import Agreement, Learned, values
from vlafit.checkpoints import model_card
from vlafit.errors import EmbodimentError
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.experiment import build

SCALED = ('"actions"], dim', '"actions"], scale = [-1.0, 1.0], dim')


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_card(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other recordings of the robot, whose card turns the sign of an action."""
    card = write_card(tmp_path_factory.mktemp("other"))
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "a") as file:
        for group in file["data"].values():
            for key in ("actions", "obs/at"):
                group[key][:] += 0.001
    text = card.read_text()
    card.write_text(text.replace(*SCALED).replace('name = "joints"', 'name = "other"', 1))
    assert text != card.read_text()
    return card


@pytest.mark.case(
    section="data",
    report="a validation loss that stays high, or falls for a policy that moves the wrong way",
    user_has="a validation set whose card turns a sign, adds an offset, shifts actions or turns frames, "
    "and a training card that does not",
    now="an error with both cards; `[adapt] conversion` or `frames` accepts it, with a row in agreement.json",
)
@pytest.mark.parametrize("place", ["validation_sets", "statistics_from"])
def test_a_set_whose_values_are_read_otherwise_is_refused_unless_the_recipe_says_so(
    place: str, plain: Path, other: Path
):
    changes: dict[str, Any] = {"validation_sets": {"late": str(other)}}
    where, title = "data.validation_sets.late", "action conversion, validation/late"
    if place == "statistics_from":
        changes = {"statistics": "data", "statistics_from": str(other)}
        where, title = "data.statistics_from", "action conversion, data.statistics_from"
    recipe = recipe_of(plain, None, {"outside": ("action.a",)}, **changes)
    with pytest.raises(EmbodimentError) as error:
        build(recipe, torch.device("cpu"))
    for fact in (
        where,
        title,
        "other: times -1 in dimension 0",
        "joints: as in the files",
        "--adapt.conversion true",
    ):
        assert fact in str(error.value)
    assert "state conversion" not in str(error.value)
    accepted = replace(recipe, adapt=replace(recipe.adapt, conversion=True))
    items = {item.name: item for item in agreed(accepted).items}
    assert (items[title].status, items[title].reason) == ("chosen", "adapt.conversion")
    assert dict(items[title].sides) == {
        "dataset": "other: times -1 in dimension 0",
        "training data": "joints: as in the files",
    }
    assert items[title.replace("action", "state")].status == "same"


def agreed(recipe: Recipe) -> Agreement:
    agreement = build(recipe, torch.device("cpu")).agreement
    assert agreement is not None
    return agreement


def test_a_run_keeps_how_its_validation_sets_are_read_and_resumes_with_a_set_that_it_would_refuse(
    plain: Path, other: Path, tmp_path: Path
):
    recipe = recipe_of(plain, None, {"outside": ("action.a",), "conversion": True})
    recipe = replace(recipe, data=replace(recipe.data, validation_sets={"late": str(other)}))
    out = tmp_path / "run"
    assert run(recipe, out).finished
    kept = values.read(out)
    assert kept is not None
    names = [item.name for item in kept.items]
    for name in ("frames", "state columns", "action conversion", "normalised action"):
        assert names.count(f"{name}, validation/late") == 1
    assert Learned.of(kept).said["action conversion"] == "as in the files", "that of the training data"
    strict = replace(recipe, adapt=replace(recipe.adapt, conversion=False))
    resumed = build(strict, torch.device("cpu"), out / "checkpoints" / "step_000001")
    (said,) = [text for text in resumed.warnings if "action conversion" in text]
    assert "data.validation_sets.late" in said and "other: times -1 in dimension 0" in said
    assert resumed.agreement is not None
    again = [item.name for item in resumed.agreement.items]
    assert sorted(again) == sorted(names), "each row once"


def test_cards_of_one_robot_that_read_otherwise_are_refused_unless_the_recipe_says_so(
    plain: Path, other: Path, tmp_path: Path
):
    base = write_checkpoint(tmp_path / "base")  # without an agreement: it does not say
    turned = other.with_name("turned.toml")
    turned.write_text(edited(other.read_text(), ("[[robot.cameras]]", "[[robot.cameras]]\nrotate = 180")))
    outside = {"outside": ("action.a",)}
    for checkpoint in (None, base):
        recipe = recipe_of(plain, checkpoint, outside)
        recipe = replace(recipe, data=replace(recipe.data, cards=(str(plain), str(turned))))
        with pytest.raises(EmbodimentError) as error:
            build(recipe, torch.device("cpu"))
        for fact in (
            "frames: dataset: joints: as stored; other: front turned by 180",
            "action conversion: dataset: joints: as in the files; other: times -1 in dimension 0",
            "--adapt.frames true --adapt.conversion true",
        ):
            assert fact in str(error.value)
        adapt = replace(recipe.adapt, frames=True, conversion=True)
        chosen = {item.name: item.reason for item in agreed(replace(recipe, adapt=adapt)).chosen}
        assert chosen["frames"] == "adapt.frames" and chosen["action conversion"] == "adapt.conversion"


def test_columns_in_another_order_without_names_are_refused_in_mixtures_and_validation_sets(tmp_path: Path):
    keys, swapped = '"actions"], dim', '"actions[:, 1]", "actions[:, 0]"], dim'
    card = write_card(tmp_path / "data", labels="[]")
    other = write_card(tmp_path / "other", labels="[]", scale=1.01)
    other = card_beside(other, "other", (keys, swapped))
    mixed = recipe_of(card, None, {})
    mixed = replace(mixed, data=replace(mixed.data, cards=(str(card), str(other))))
    for recipe in (mixed, recipe_of(card, None, {}, validation_sets={"late": str(other)})):
        with pytest.raises(EmbodimentError, match=r"(?s)action columns.*actions\[:, 1\].*labels"):
            build(recipe, torch.device("cpu"))


@pytest.mark.case(
    section="runs",
    report="the served policy moves one joint the wrong way",
    user_has="a run whose card turns a sign, and a client that executes values as the files have them",
    now="the model card says what the card converts; an export for vlafit keeps the agreement",
)
def test_the_model_card_says_what_a_client_sends_and_an_export_still_refuses_other_values(
    other: Path, tmp_path: Path
):
    recipe, out = recipe_of(other, None, {}), tmp_path / "run"
    run(recipe, out)
    facts = ("execute actions", "times -1 in dimension 0", "not as in the files")
    saved = out / "checkpoints" / "step_000001"
    assert all(fact in (saved / "README.md").read_text() for fact in facts)
    loaded = checkpoints.load(saved)
    text = model_card.card(loaded.policy, loaded.codec, agreement=values.read(saved), target="lerobot")
    assert all(fact in text for fact in facts)
    assert cli.main(["export", str(out), "--to", "vlafit", "--out", str(tmp_path / "copy")]) == 0
    assert all(fact in (tmp_path / "copy" / "README.md").read_text() for fact in facts)
    assert (tmp_path / "copy" / "agreement.json").read_text() == (saved / "agreement.json").read_text()
    card = other.with_name("unscaled.toml")
    card.write_text(other.read_text().replace(*reversed(SCALED)))
    for folder in (saved, tmp_path / "copy"):
        with pytest.raises(EmbodimentError, match="action conversion"):
            start(recipe_of(card, folder, {}))
