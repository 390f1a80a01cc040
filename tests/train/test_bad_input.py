"""What a user can get wrong about a run, and what each is told, before anything is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from tests.train.world import tiny
from vlafit import cli, config
from vlafit.errors import CodecError, VlafitError
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.experiment import build
from vlafit.train.preflight import check

NAN = float("nan")

VALUES: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"train": {"steps": 0}}, r"train\.steps must be at least 1, is 0"),
    ({"train": {"batch_size": -4}}, r"train\.batch_size must be at least 1, is -4"),
    ({"train": {"accumulate": -1}}, r"train\.accumulate must be at least 0, is -1"),
    ({"train": {"draws": 0}}, r"train\.draws must be at least 1"),
    ({"train": {"log_every": 0}}, r"train\.log_every must be at least 1"),
    ({"train": {"validation_batches": 0}}, r"train\.validation_batches must be at least 1"),
    ({"train": {"seed": -1}}, r"train\.seed must be at least 0, is -1"),
    ({"train": {"keep": -1}}, r"train\.keep must be at least 0"),
    ({"train": {"batch_size": 6, "accumulate": 4}}, r"batch_size 6 is not a multiple of .* 4 x .* 1; use 8"),
    ({"train": {"trackers": ("tensorbord",)}}, r"no tracker 'tensorbord'; did you mean 'tensorboard'\?"),
    ({"train": {"trackers": ("swanlab",)}}, r"train\.trackers: swanlab is not installed"),
    ({"optim": {"lr": 0.0}}, r"optim\.lr must be above 0"),
    ({"optim": {"lr": NAN}}, r"optim\.lr must be above 0, is nan"),
    ({"optim": {"weight_decay": NAN}}, r"optim\.weight_decay must be at least 0, is nan"),
    ({"optim": {"final_lr": 1e-5 * -1}}, r"optim\.final_lr is a share of the peak"),
    ({"optim": {"schedule": "step"}}, r'"step" needs optim\.schedule_steps, .* optim\.final_lr = 1'),
    ({"optim": {"beta2": 1.0}}, r"optim\.beta2 must be at least 0 and below 1, is 1\.0"),
    ({"optim": {"ema": 1.0}}, r"optim\.ema must be at least 0 and below 1"),
    ({"data": {"validation": 1.0}}, r"data\.validation must be at least 0 and below 1, is 1\.0"),
    ({"data": {"workers": -1}}, r"data\.workers must be at least 0"),
    ({"policy": {"fresh": ("expert",)}}, r"policy\.fresh .*policy\.checkpoint is empty"),
    ({"eval": {"before": True}}, r"eval\.before .* eval\.protocol is empty"),
    ({"eval": {"every": 5}}, r"eval\.every .* eval\.protocol is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), VALUES, ids=[says[:40] for _, says in VALUES])
def test_a_value_that_cannot_train_is_refused(
    card: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], says: str
) -> None:
    with pytest.raises(VlafitError, match=says):
        run(tiny(card, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_must_divide_over_the_processes(recipe: Recipe) -> None:
    check(recipe, 4)
    with pytest.raises(VlafitError, match="batch_size 4 .*multiple of .*processes 3; .*3"):
        check(recipe, 3)


# ------------------------------------------------------------------------------------- names and files


NAMES: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, r"name '' must be a single folder name"),
    ({"name": "a\nb"}, r"name 'a\\nb' holds a line break"),
    ({"name": "../elsewhere"}, r"name '\.\./elsewhere' must be a single folder name"),
    ({"train": {"seed": 2**63}}, r"train\.seed must be below 2\^63"),
    ({"train": {"threads": 100_000}}, r"train\.threads 100000 .*CPU cores"),
    ({"data": {"cards": ()}}, r"data\.cards is empty; name at least one"),
    ({"data": {"cards": ("no-such-card",)}}, r"no-such-card"),
    ({"strategy": "expret"}, r"expret.*did you mean 'expert'"),
    ({"policy": {"family": ""}}, r"give either `checkpoint` or `family`"),
    ({"policy": {"family": "pi1"}}, r"no policy family 'pi1'; .*pi0"),
    ({"policy": {"size": "pi0-tiney"}}, r"no size 'pi0-tiney'; did you mean 'pi0-tiny'"),
    ({"policy": {"config": {"chnk": 4}}}, r"chnk.*did you mean 'chunk'"),
    ({"policy": {"config": {"chunk": "four"}}}, r"chunk"),
    ({"policy": {"config": {"action_dim": 1}}}, r"card 'dots' .* 2 action dimensions, the policy takes 1"),
    ({"policy": {"config": {"max_tokens": 2}}}, r"card 'dots', episode .* tokens, the policy takes 2"),
    ({"data": {"shift_pixels": 16}}, r"data\.shift_pixels 16 .*camera 'front' .16x16"),
    ({"policy": {"checkpoint": "no-such-checkpoint", "family": "", "size": ""}}, r"no-such-checkpoint"),
    ({"policy": {"tokenizer": "no-such-tokenizer"}}, r"no-such-tokenizer"),
    ({"eval": {"protocol": "no-such-protocol"}}, r"no-such-protocol"),
]


@pytest.mark.parametrize(("changes", "says"), NAMES, ids=[says[:40] for _, says in NAMES])
def test_a_name_that_leads_nowhere_is_refused(
    card: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(VlafitError, match=says):
        run(tiny(card, **changes), tmp_path / "run")
    assert not list(tmp_path.glob("run/*")), "nothing is written, so the same command works once mended"


# ------------------------------------------------------------------------------------------ recordings


Spoil = Callable[[h5py.File], None]


def without(name: str) -> Spoil:
    def spoil(file: h5py.File) -> None:
        del file[f"data/demo_1/{name}"]

    return spoil


def instead(name: str, values: np.ndarray) -> Spoil:
    def spoil(file: h5py.File) -> None:
        del file[f"data/demo_1/{name}"]
        file[f"data/demo_1/{name}"] = values

    return spoil


def nothing_left(file: h5py.File) -> None:
    for name in list(file["data"]):
        del file[f"data/{name}"]


RECORDINGS: dict[str, tuple[Spoil, str]] = {
    "no camera": (without("obs/front"), r"obs/front"),
    "no state": (without("obs/at"), r"obs/at"),
    "no actions": (without("actions"), r"actions"),
    "wide actions": (instead("actions", np.zeros((7, 3), np.float32)), r"actions"),
    "short actions": (instead("actions", np.zeros((5, 2), np.float32)), r"actions"),
    "text": (instead("actions", np.full((7, 2), b"left")), r"actions"),
    "nan": (instead("obs/at", np.full((7, 2), NAN, np.float32)), r"(?i)finite|nan"),
    "infinite action": (instead("actions", np.full((7, 2), np.inf, np.float32)), r"(?i)finite|inf"),
    "small pictures": (instead("obs/front", np.zeros((7, 8, 8, 3), np.uint8)), r"obs/front"),
    "float pictures": (instead("obs/front", np.zeros((7, 16, 16, 3), np.float32)), r"obs/front"),
    "no episodes": (nothing_left, r"(?i)no (demonstration|episode)|empty"),
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_spoilt_recording_is_refused_by_file_and_place(card: Path, tmp_path: Path, name: str) -> None:
    spoil, says = RECORDINGS[name]
    shutil.copytree(card.parent, tmp_path / "data")
    with h5py.File(tmp_path / "data" / "dots" / "left_demo.hdf5", "a") as file:
        spoil(file)
    with pytest.raises(VlafitError, match=says) as caught:
        run(tiny(tmp_path / "data" / card.name), tmp_path / "run")
    assert "left_demo.hdf5" in str(caught.value)
    assert not list(tmp_path.glob("run/*"))


def test_a_file_that_is_no_hdf5_is_refused(card: Path, tmp_path: Path) -> None:
    shutil.copytree(card.parent, tmp_path / "data")
    (tmp_path / "data" / "dots" / "left_demo.hdf5").write_bytes(b"not a recording")
    with pytest.raises(VlafitError, match=r"left_demo\.hdf5"):
        run(tiny(tmp_path / "data" / card.name), tmp_path / "run")


def test_a_dataset_that_is_not_there_is_refused(card: Path, tmp_path: Path) -> None:
    shutil.copy(card, tmp_path / card.name)
    with pytest.raises(VlafitError, match=r"dataset 'dots'"):
        run(tiny(tmp_path / card.name), tmp_path / "run")


def test_a_dataset_is_named_once(card: Path, tmp_path: Path) -> None:
    with pytest.raises(VlafitError, match=r"data\.cards: 2 cards are called 'dots'"):
        run(tiny(card, data={"cards": (str(card), str(card))}), tmp_path / "run")


def test_two_cards_must_show_one_robot(card: Path, tmp_path: Path) -> None:
    shutil.copytree(card.parent, tmp_path / "data")
    other = tmp_path / "data" / card.name
    other.write_text(card.read_text().replace("hz = 10.0", "hz = 20.0").replace('"dots"', '"fast"', 1))
    with pytest.raises(VlafitError, match=r"(?s)card 'fast'.*Hz: 20\.0 .*10\.0"):
        run(tiny(card, data={"cards": (str(card), str(other))}), tmp_path / "run")


# ----------------------------------------------------------------------------------------- checkpoints


def from_checkpoint(card: Path, path: Path, **sections: Any) -> Recipe:
    policy = {"checkpoint": str(path), "family": "", "size": "", "config": {}, **sections.pop("policy", {})}
    return tiny(card, policy=policy, **sections)


BESIDE: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"policy": {"family": "pi0"}}, r"policy\.family 'pi0': .*policy\.checkpoint"),
    ({"policy": {"family": "pi0", "size": "a"}}, r"'pi0' and policy\.size 'a': .*policy\.checkpoint"),
    ({"policy": {"tokenizer": "metaworld"}}, r"policy\.tokenizer 'metaworld' .*step_000008"),
    ({"data": {"normalisation": "quantile"}}, r"data\.normalisation 'quantile' .*000008.* by 'mean_std'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), BESIDE, ids=[says[:30] for _, says in BESIDE])
def test_a_field_that_a_checkpoint_overrules_is_refused(
    card: Path, whole: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], says: str
) -> None:
    base = whole / "checkpoints" / "step_000008"
    with pytest.raises(VlafitError, match=says):
        run(from_checkpoint(card, base, **changes), tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


ROBOTS = {
    "control mode": (
        '"delta_position"',
        '"absolute_position"',
        r'control mode: dataset: absolute_position; checkpoint: delta_position.*data\.statistics = "data"',
        {"robot": True},
    ),
    "another camera": (
        'name = "front"',
        'name = "top"',
        r'front 16x16; dataset: no camera of this name \(has: top\).*front = "CAMERA".*put top, or',
        {"cameras": {"front": "top"}},
    ),
    "rate": (
        "hz = 10.0",
        "hz = 5.0",
        r"control rate: dataset: 5 Hz; checkpoint: 10 Hz.*\[adapt\] robot = true",
        {"robot": True},
    ),
}


@pytest.mark.parametrize("name", ROBOTS)
def test_a_checkpoint_of_another_robot_is_refused_or_taught(
    card: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    old, new, says, adapt = ROBOTS[name]
    shutil.copytree(card.parent, tmp_path / "data")
    other = tmp_path / "data" / card.name
    other.write_text(card.read_text().replace(old, new))
    base = whole / "checkpoints" / "step_000008"
    with pytest.raises(VlafitError, match=rf"(?s)card 'dots'.*step_000008.*{says}"):
        run(from_checkpoint(other, base), tmp_path / "run")
    taught = from_checkpoint(other, base, data={"statistics": "data"}, adapt=adapt, train={"steps": 1})
    assert run(taught, tmp_path / "run").finished


@pytest.mark.parametrize(
    ("file", "says"),
    [("model.safetensors", "changed: model.safetensors"), ("codec.json", "changed: codec.json")],
)
def test_a_damaged_checkpoint_is_refused(
    card: Path, whole: Path, tmp_path: Path, file: str, says: str
) -> None:
    shutil.copytree(whole / "checkpoints" / "step_000008", tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(VlafitError, match=says):
        run(from_checkpoint(card, tmp_path / "base"), tmp_path / "run")


def test_a_folder_without_a_checkpoint_is_refused(card: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(VlafitError, match="no checkpoint"):
        run(from_checkpoint(card, tmp_path / "base"), tmp_path / "run")


# --------------------------------------------------------------------------------------- the run's folder


def test_a_folder_that_cannot_be_written_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VlafitError, match="is a file"):
        run(recipe, tmp_path / "file")
    with pytest.raises(VlafitError, match="cannot write"):
        run(recipe, tmp_path / "file" / "below")
    with pytest.raises(VlafitError, match="cannot write"):
        run(recipe, Path("/proc/nowhere/run"))


def test_a_folder_with_other_things_in_it_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("do not lose me")
    for resume in (False, True):
        with pytest.raises(VlafitError, match=f"^{tmp_path}/run .*not empty.*not hold a run.*--out"):
            run(recipe, tmp_path / "run", resume=resume)


def test_resuming_what_never_began_begins(recipe: Recipe, tmp_path: Path) -> None:
    assert run(replace(recipe, train=replace(recipe.train, steps=1)), tmp_path / "run", resume=True).finished


def test_a_damaged_record_of_the_run_is_named(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps([]))
    with pytest.raises(VlafitError, match=r"run\.json: .*list"):
        run(recipe, tmp_path / "run", resume=True)


def test_the_command_line_tells_it_in_one_line_and_ends_with_2(
    card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(config.dump(tiny(card, strategy="expret")))
    assert cli.main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("vlafit: ") and "did you mean 'expert'" in errors and "Traceback" not in errors


# ------------------------------------------------------------------------------------------ instructions


def words(folder: Path, *known: str) -> Path:
    """Write a tokenizer that knows these words only; every other is <unk>."""
    vocabulary = {
        word: number for number, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", "\n", *known))
    }
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = Lowercase()  # type: ignore[assignment]
    backend.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    backend.add_special_tokens(["<pad>", "<bos>", "<eos>", "<unk>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.case(
    section="data",
    report="the policy ignores the instruction",
    user_has="instructions in words or a language that the tokenizer does not know",
    now="two instructions of the same tokens are an error that names both",
)
def test_instructions_that_the_tokenizer_does_not_tell_apart_are_refused(card: Path, tmp_path: Path) -> None:
    for name, known in (("half", ("go", "to", "the", "left")), ("none", ("go", "to", "the"))):
        recipe = tiny(card, policy={"tokenizer": str(words(tmp_path / name, *known))})
        if name == "half":
            assert build(recipe, torch.device("cpu")).codec.tokenizer is not None
            continue
        with pytest.raises(CodecError) as caught:
            run(recipe, tmp_path / "run")
        for fact in ("card 'dots', episode", "'go to the left'", "'go to the right'", "policy.tokenizer"):
            assert fact in str(caught.value)
    assert not list(tmp_path.glob("run/*"))
    sentences = 'source = "card"\nfiles.left_demo = "Go  there"\nfiles.right_demo = "go there"'
    alike = card.parent / "alike.toml"
    alike.write_text(card.read_text().replace('source = "attrs"', sentences))
    build(tiny(alike, policy={"tokenizer": str(tmp_path / "none")}), torch.device("cpu"))  # one sentence
