"""The model card: what it says of a checkpoint, and how a run's results come into it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlafit
from tests.checkpoints.forms import GROOT
from tests.checkpoints.test_export import codec_for, unpublished
from tests.policies.tiny import random_policy
from tests.report.synthetic import write_evaluation, write_json
from vlafit import checkpoints, locks
from vlafit.checkpoints import model_card
from vlafit.checkpoints.export import export, write
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.hf_transformers.names import LIVE
from vlafit.checkpoints.formats.openpi import write as openpi_export
from vlafit.checkpoints.history import Learned, Lineage
from vlafit.checkpoints.locate import digest
from vlafit.checkpoints.name_map import translate
from vlafit.codec import Codec, CodecSet
from vlafit.codec.normaliser import Normalisation
from vlafit.errors import VlafitError, WeightsError
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import Policy
from vlafit.policies import build_family
from vlafit.report.card_results import results_of

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
    mean = {"value": 0.25, "low": 0.2, "high": 0.3}
    offline = {
        "actor": actor, "kind": "offline", "dataset": "cups", "episodes": ["a", "b"],
        "settings": {"samples": 16, "draws": 4}, "chosen": "Held out from training (data.validation).",
        "measured_over": "16 observations of 2 episodes, 4 draws of noise each (seeds 0 to 3)",
        "overall": {"policy": mean, "hold_still": None, "mean_chunk": mean | {"value": 0.5}},
    }  # fmt: skip
    for name, (successes, of) in {"after": (4, actor), "before": (3, "checkpoint sha256:other")}.items():
        write_evaluation(folder, name, (successes, successes), 5, filmed=0)
        set_values(folder / "eval" / name / "result.json", lambda value, of=of: value.update(actor=of))
    (folder / "held_out" / "cups").mkdir(parents=True)
    write_json(folder / "held_out" / "cups" / "result.json", {**offline, "format": 1})
    return folder


def set_values(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_a_checkpoint_says_base_licence_data_strategy_robot_and_how_to_load_it(run: Path) -> None:
    text = (run / "checkpoints" / "step_000010" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: vlafit\n") and "license: apache-2.0" in text
    for fact in (
        "# mine",
        "It picks up the cup.",
        "`metaworld-base`",
        "| apache-2.0 |",
        "`lora`",
        "smolvla, ",
    ):
        assert fact in text
    assert "cups: 5 episodes, 120 frames (sha256 abcdefabcdef)" in text
    assert 'vlafit.load_actor("path/to/this/folder")' in text
    assert "- for LeRobot: `vlafit export path/to/this/folder --to lerobot --out exported`" in text
    assert "- openpi cannot hold it: openpi has no such family" in text and "--to openpi" not in text
    assert model_card.NONE in text


def test_a_card_says_which_actions_are_relative_and_how_many_steps_are_continued_without_guidance() -> None:
    policy = build_family("pi0", "pi0-tiny")
    plain = model_card.card(policy, codec_for(policy))
    assert "real-time chunking" not in plain and "| actions |" not in plain
    assert isinstance(policy, FlowPolicy)
    policy.max_delay = 3
    codec = codec_for(policy, relative=(True, False, True))
    labels = codec.embodiment.action.labels or ("0", "1", "2")
    text = model_card.card(policy, codec)
    assert f"| actions | dimensions {labels[0]}, {labels[2]} learned relative to the state" in text
    assert "| real-time chunking | trained with the first 0 to 3 steps" in text
    every = codec_for(policy, relative=(True, True, True))
    assert "| actions | all learned relative" in model_card.card(policy, every)
    assert "real-time chunking" not in model_card.card(policy, codec, target="lerobot")


def policies() -> dict[str, tuple[Policy, Codec | None]]:
    """A policy of every family, each with a codec of its own."""
    made: dict[str, tuple[Policy, Codec | None]] = {"smolvla": ((policy := unpublished()), codec_for(policy))}
    for family, size in (
        ("pi0", "pi0-tiny"), ("pi0", "pi05-tiny"), ("xvla", "xvla-tiny"), ("openvla", "openvla-tiny"),
        ("pi0_fast", "pi0-fast-tiny"),
    ):  # fmt: skip
        narrow = {"state_dim": 4, "action_dim": 3} if family == "openvla" else {}  # it pads neither
        policy = build_family(family, size, narrow)
        methods: dict[str, Normalisation] = {"openvla": "openvla_quantile", "pi0_fast": "quantile"}
        made[size] = policy, codec_for(policy, methods.get(family, "mean_std"))
    made["act-tiny"] = build_family("act", "act-tiny"), None
    loaded = checkpoints.load(GROOT, tokenizer=GROOT / "char_tokenizer")
    return made | {"groot": (loaded.policy, loaded.codec)}


@pytest.mark.slow
def test_a_card_lists_the_exports_that_succeed_and_no_others(tmp_path: Path) -> None:
    for name, (policy, codec) in policies().items():
        saved = tmp_path / name / "saved"
        checkpoints.save(policy, saved, codec)
        listed = set(re.findall(r"--to (\w+) ", (saved / "README.md").read_text()))
        for target in registry.writable():
            out = tmp_path / name / target
            if target not in {*listed, "vlafit"}:
                with pytest.raises(WeightsError):
                    export(saved, target, out)
                continue
            export(saved, target, out)
            card = (out / "README.md").read_text()
            assert set(re.findall(r"--to (\w+) ", card)) == listed - {target}, (name, target)
            if codec is not None:
                (code,) = re.findall(r"import vlafit\n\nactor = (vlafit\..*)\n", card)
                exec(code.replace("path/to/this/folder", str(out)), {"vlafit": vlafit})
    # The GR00T here is LeRobot's, whose framing NVIDIA's program does not have; no tiny policy fits openpi's.
    written = {path.name for path in tmp_path.glob("*/*")}
    assert written == {*registry.writable(), "saved"} - {"openpi", "groot"}


def test_the_card_of_a_groot_asks_lerobot_for_no_step_that_its_pipeline_lacks(tmp_path: Path) -> None:
    loaded = checkpoints.load(GROOT, tokenizer=GROOT / "char_tokenizer")
    write(loaded.policy, loaded.codec, "lerobot", tmp_path / "out", "here")
    steps = (tmp_path / "out" / "policy_preprocessor.json").read_text()
    text = model_card.card(loaded.policy, loaded.codec, target="lerobot")
    assert "tokenizer_processor" not in steps and "tokenizer_processor" not in text


def code_of(card: str) -> str:
    """Return the first block of Python in a card, with the folder's name as a place to fill in."""
    (code, *_) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.count("path/to/this/folder") == 1
    return code


def test_transformers_loads_an_export_by_the_python_in_its_card(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    policy, codec = random_policy("pi0-tiny"), codec_for(random_policy("pi0-tiny"))
    checkpoints.save(policy, tmp_path / "saved", codec)
    export(tmp_path / "saved", "transformers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- transformers reads no codec: normalise states and actions" in card
    found: dict[str, Any] = {}
    exec(code_of(card).replace("path/to/this/folder", str(tmp_path / "out")), found)
    theirs = found["policy"]
    assert type(theirs).__name__ == "PI0ForConditionalGeneration" and not theirs.training
    again = translate(theirs.state_dict(), LIVE).weights
    assert all(torch.equal(again[name], p) for name, p in policy.named_parameters())


@pytest.mark.parametrize("target", ["openpi", "openvla", "groot"])
def test_a_card_says_what_its_program_needs_beside_the_folder(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"openpi": "pi0-tiny", "openvla": "openvla-tiny", "groot": "groot"}[target]
    policy, codec = policies()[size]
    if target == "groot" and codec is not None:  # NVIDIA's program resizes frames its own way
        codec = codec.with_changes(config=replace(codec.config, framing="nvidia"))
    checkpoints.save(policy, tmp_path / "saved", codec)
    monkeypatch.setattr(openpi_export, "refusals", lambda policy, codec: [])  # no tiny size has a name
    made = export(tmp_path / "saved", target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert made.notes and all(f"\n- {note}\n" in card for note in made.notes)
    if (
        target == "openpi"
    ):  # openpi, scripts/serve_policy.py: Checkpoint(config, dir); policies/policy_config.py
        assert "serve_policy.py policy:checkpoint --policy.config CONFIG --policy.dir path/to/this" in card
        (asset,) = [path.name for path in (tmp_path / "out" / "assets").iterdir()]
        assert f"asset_id={asset!r}" in card and "pi05=False" in card


def test_a_card_of_adapters_or_several_robots_says_what_its_export_needs() -> None:
    policy = random_policy("pi0-tiny")
    holders = {"lerobot": ("LeRobot", ""), "openpi": ("openpi", "")}
    text = model_card.card(policy, codec_for(policy), adapters=True, holders=holders)
    assert model_card.MERGE in text and "--to openpi --out exported" in text
    codec = codec_for(policy)
    other = codec.with_changes(embodiment=replace(codec.embodiment, name="other"))
    text = model_card.card(policy, CodecSet([codec, other]), holders=holders)
    assert "--to lerobot --embodiment NAME --out" in text and 'folder", embodiment="NAME")' in text
    assert model_card.MERGE not in text


def test_results_of_this_very_checkpoint_come_into_its_card_and_into_its_exports(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    saved = copy / "checkpoints" / "step_000010"
    before = digest(saved)
    model_card.refresh(saved, results_of(saved))
    assert digest(saved) == before
    checkpoints.load(saved)  # the card is not in the manifest, so that it may be edited
    made = export(saved, "lerobot", tmp_path / "out", results=results_of(saved))
    assert "README.md" in made.files
    for folder in (saved, tmp_path / "out"):
        text = (folder / "README.md").read_text()
        assert "protocol metaworld-faucet: 8 of 10 succeed, 80 % (95 %: 49 to 94 %)" in text
        assert "Measured over 16 observations of 2 episodes, 4 draws of noise each (seeds 0 to 3)." in text
        assert "Held out from training" in text and "`--samples 16 --draws 4`" in text
        assert "cups, mean absolute error" in text and "policy 0.250 (95 %: 0.200 to 0.300)" in text
        assert "mean chunk 0.500" in text and "hold still" not in text and "6 of 10" not in text
        assert model_card.NONE not in text
    assert "library_name: lerobot" in (tmp_path / "out" / "README.md").read_text()
    code = (tmp_path / "out" / "README.md").read_text()
    assert 'folder = "path/to/this/folder"' in code and 'f"{folder}/tokenizer"' in code


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "rate": lambda value: value["overall"].update(rate=0.99),
    "low": lambda value: value["overall"].update(low=0.9),
    "successes": lambda value: value["overall"].update(successes=10, rate=1.0),
    "name": lambda value: value["protocol"].update(name="libero-10"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_result_whose_numbers_its_episodes_do_not_have_is_in_no_card(
    run: Path, tmp_path: Path, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    set_values(copy / "eval" / "after" / "result.json", CHANGES[changed])
    (line,) = results_of(copy / "checkpoints" / "step_000010")
    assert line.startswith("cups, mean absolute error")
    assert "left out of the model card: " in caplog.text and "result.json: " in caplog.text


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
            export(saved, target, tmp_path / "out", results=results_of(saved))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = export(saved, target, tmp_path / "again", results=results_of(saved))
    assert sorted(made.files) == sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert (tmp_path / "out" / "README.md").read_text() == (tmp_path / "again" / "README.md").read_text()
    assert "8 of 10 succeed" in (tmp_path / "out" / "README.md").read_text()


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
