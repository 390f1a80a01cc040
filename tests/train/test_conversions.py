"""What a card does to states and actions when it reads them is said where it matters, and exports keep it."""

from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from tests.train.agreement_world import recipe_of, start, write_card
from vlafit import checkpoints, cli
from vlafit.agreement import values
from vlafit.checkpoints import model_card
from vlafit.errors import EmbodimentError
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


def test_a_validation_set_or_statistics_of_values_read_otherwise_are_said(plain: Path, other: Path):
    recipe = recipe_of(plain, None, {"outside": ("action.a",)})
    sets = replace(recipe, data=replace(recipe.data, validation_sets={"late": str(other)}))
    taken = replace(recipe, data=replace(recipe.data, statistics="data", statistics_from=str(other)))
    for made, where in ((sets, "data.validation_sets.late"), (taken, "data.statistics_from")):
        (said,) = [text for text in build(made, torch.device("cpu")).warnings if "are read" in text]
        for fact in (where, "card 'other'", "actions", "times -1 in dimension 0", "as in the files"):
            assert fact in said
    own = build(recipe, torch.device("cpu"))
    assert not [text for text in own.warnings if "are read" in text]


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
