"""The model card: what it says of a checkpoint, and how a run's results come into it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.checkpoints.test_export import codec_for, unpublished
from tests.policies.tiny import random_policy
from vlafit import checkpoints, locks
from vlafit.checkpoints import model_card
from vlafit.checkpoints.export import export
from vlafit.checkpoints.history import Learned, Lineage
from vlafit.checkpoints.locate import digest
from vlafit.errors import VlafitError

RECIPE = """
name = "mine"
purpose = "It picks up the cup."
strategy = "lora"
[policy]
checkpoint = "metaworld-base"
"""
HISTORY = Lineage(datasets=(Learned("cups", "abcdef" * 10, 5, 120),))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint that was evaluated in simulation and on held-out episodes."""
    folder = tmp_path_factory.mktemp("run")
    saved = folder / "checkpoints" / "step_000010"
    policy = unpublished()
    checkpoints.save(policy, saved, codec_for(policy), recipe=RECIPE, history=HISTORY)
    (folder / "recipe.toml").write_text(RECIPE)
    actor = f"checkpoint sha256:{digest(saved)} width=16"
    rollouts = {
        "actor": actor, "wrong_instruction": False, "protocol": {"name": "cups-in-simulation"},
        "overall": {"successes": 47, "episodes": 50, "rate": 0.94, "low": 0.838, "high": 0.979},
    }  # fmt: skip
    mean = {"value": 0.25, "low": 0.2, "high": 0.3}
    offline = {
        "actor": actor, "kind": "offline", "dataset": "cups", "episodes": ["a", "b"],
        "overall": {"policy": mean, "hold_still": None, "mean_chunk": mean | {"value": 0.5}},
    }  # fmt: skip
    other = rollouts | {"actor": "checkpoint sha256:of-another", "protocol": {"name": "unrelated"}}
    for path, value in (("eval/after", rollouts), ("eval/before", other), ("held_out/cups", offline)):
        (folder / path).mkdir(parents=True)
        (folder / path / "result.json").write_text(json.dumps(value))
    return folder


def test_a_checkpoint_says_base_licence_data_strategy_robot_and_how_to_load_it(run: Path) -> None:
    text = (run / "checkpoints" / "step_000010" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: vlafit\n") and "license: apache-2.0" in text
    for fact in ("# mine", "It picks up the cup.", "`metaworld-base`", "Apache-2.0", "`lora`", "smolvla, "):
        assert fact in text
    assert "cups: 5 episodes, 120 frames (sha256 abcdefabcdef)" in text
    assert "vlafit.load_actor(" in text and "--to lerobot" in text and "--to openpi" in text
    assert model_card.NONE in text


def test_results_of_this_very_checkpoint_come_into_its_card_and_into_its_exports(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    saved = copy / "checkpoints" / "step_000010"
    before = digest(saved)
    model_card.refresh(saved)
    assert digest(saved) == before
    checkpoints.load(saved)  # the card is not in the manifest, so that it may be edited
    made = export(saved, "lerobot", tmp_path / "out")
    assert "README.md" in made.files
    for folder in (saved, tmp_path / "out"):
        text = (folder / "README.md").read_text()
        assert "protocol cups-in-simulation: 47 of 50 succeed, 94 % (95 %: 84 to 98 %)" in text
        assert "cups, 2 held-out episodes" in text and "policy 0.250 (95 %: 0.200 to 0.300)" in text
        assert "mean chunk 0.500" in text and "hold still" not in text and "unrelated" not in text
        assert model_card.NONE not in text
    assert "library_name: lerobot" in (tmp_path / "out" / "README.md").read_text()
    assert "get_policy_class" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("target", ["vlafit", "lerobot"])
def test_an_export_that_ends_once_its_folder_has_its_name_is_complete(
    run: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, real = run / "checkpoints" / "step_000010", os.rename

    def rename_and_die(old: Path, new: Path) -> None:
        real(old, new)
        if Path(new) == tmp_path / "out":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename_and_die)
        with pytest.raises(KeyboardInterrupt):
            export(saved, target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = export(saved, target, tmp_path / "again")
    assert sorted(made.files) == sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert (tmp_path / "out" / "README.md").read_text() == (tmp_path / "again" / "README.md").read_text()
    assert "47 of 50 succeed" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_another_process_exports_to_is_left_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        locks.creating(out, "vlafit export"),
        pytest.raises(VlafitError, match=f"{out}.*process {os.getpid()}"),
    ):
        export(run / "checkpoints" / "step_000010", "vlafit", out)
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_the_hub_or_without_a_licence_says_where_to_find_out(tmp_path: Path) -> None:
    assert model_card.licence_of("lerobot/pi0_base@abc") == "see https://huggingface.co/lerobot/pi0_base"
    assert model_card.licence_of(str(tmp_path)) == ""
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert model_card.licence_of(str(tmp_path)) == "gemma"
    policy = random_policy("pi0-tiny")
    text = model_card.card(policy, None, recipe='[policy]\ncheckpoint = "some/where/local"\n')
    assert "not stated by the base" in text
