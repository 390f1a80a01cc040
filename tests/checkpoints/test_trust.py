"""An untrusted checkpoint runs no code and reads no file outside its folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import vlafit
from tests.policies.tiny import random_policy
from vlafit import checkpoints, files, shipped
from vlafit.cli import main
from vlafit.codec import tokenizer
from vlafit.errors import CodecError, ConfigError, WeightsError
from vlafit.policies import build_family, family

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_smolvla"
PAYLOAD = """\
import pathlib
pathlib.Path({witness!r}).write_text("ran")
from vlafit.policies.pi0 import *
from vlafit.policies.pi0 import Pi0Config as Config
"""


def rename_family(checkpoint: Path, name: str) -> None:
    """Write another family's name into a native checkpoint, with its hash."""
    policy, manifest = checkpoint / "policy.json", checkpoint / "manifest.json"
    policy.write_text(json.dumps(json.loads(policy.read_text()) | {"family": name}))
    listed = json.loads(manifest.read_text())
    listed["files"]["policy.json"] = files.sha256(policy)
    manifest.write_text(json.dumps(listed))


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A checkpoint in the package `evilckpt` whose family is a module beside it."""
    folder = tmp_path / "evilckpt"
    vlafit.save_checkpoint(random_policy("pi0-tiny"), folder)
    (folder / "__init__.py").write_text("")
    (folder / "payload.py").write_text(PAYLOAD.format(witness=str(tmp_path / "ran")))
    rename_family(folder, "evilckpt.payload")
    return folder


VERBS = (
    "inspect evilckpt",
    "inspect evilckpt --whole",
    "export evilckpt --to vlafit --out out",
    "eval evilckpt --protocol pusht",
)


@pytest.mark.case(
    section="checkpoints",
    report="a checkpoint runs code when it is opened",
    user_has="`policy.json` that names a module",
    now="not imported without an entry point or `--trust` ([Security](security.md))",
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_module_beside_a_checkpoint_is_not_imported_by_any_verb(evil: Path, verb: str, monkeypatch, capsys):
    monkeypatch.chdir(evil.parent)
    monkeypatch.syspath_prepend(evil.parent)  # as `python -m vlafit` does
    assert main(verb.split()) == 2 and "--trust evilckpt" in capsys.readouterr().err
    assert not (evil.parent / "ran").exists()


def test_a_module_beside_a_checkpoint_is_not_imported_by_python_m(evil: Path):
    environment = os.environ | {"PYTHONPATH": str(Path(vlafit.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "vlafit", "inspect", "evilckpt"],
        cwd=evil.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert not (evil.parent / "ran").exists()
    assert done.returncode == 2 and "--trust evilckpt" in done.stderr, done.stderr


def test_a_trusted_package_is_imported_and_only_that_one(evil: Path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(evil.parent)
    try:
        for trust in ((), ("evil",), ("evilckpt.pay",), ("payload",)):
            with pytest.raises(WeightsError, match="evilckpt.payload"):
                checkpoints.inspect(evil, trust=trust)
        with pytest.raises(ConfigError, match="trust is a list of packages"):
            checkpoints.inspect(evil, trust="evilckpt")
        assert not (evil.parent / "ran").exists()
        assert main(["inspect", str(evil), "--trust", "evilckpt"]) == 0
        assert "total" in capsys.readouterr().out and (evil.parent / "ran").exists()
    finally:
        sys.modules.pop("evilckpt.payload", None)
        sys.modules.pop("evilckpt", None)


def test_the_family_that_a_recipe_names_is_imported(evil: Path, monkeypatch):
    monkeypatch.syspath_prepend(evil.parent)
    try:
        build_family("evilckpt.payload", "pi0-tiny", device="meta")
        assert checkpoints.inspect(evil).report.parameters
    finally:
        sys.modules.pop("evilckpt.payload", None)
        sys.modules.pop("evilckpt", None)


@pytest.mark.parametrize("name", ["../x", "..", ".pi0", "a..b", "a b.c", "os.path", "", "json"])
def test_a_name_that_is_no_family_is_one_error(name: str):
    with pytest.raises(ConfigError) as caught:
        family(name)
    assert repr(name) in str(caught.value)


@pytest.mark.case(
    section="checkpoints",
    report="a question on standard input about `trust_remote_code`",
    user_has="a tokenizer folder with code",
    now="never asked, never run",
)
def test_a_tokenizer_folder_runs_none_of_its_code(tmp_path: Path, monkeypatch):
    witness = tmp_path / "ran"
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w').close()\nclass Words: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["code.Words", "code.Words"]}, "tokenizer_class": "Words"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "words"}))

    def asked(prompt: str = "") -> str:
        pytest.fail(f"asked on standard input: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(CodecError, match=str(folder)):
        tokenizer.load(folder)
    assert not witness.exists()


def test_a_tokenizer_with_code_in_a_checkpoint_whose_manifest_agrees_is_refused_and_not_run(
    tmp_path: Path, monkeypatch
):
    folder, witness = tmp_path / "checkpoint", tmp_path / "ran"
    shutil.copytree(shipped.find("checkpoint", "metaworld-base"), folder)
    code = f"open({str(witness)!r}, 'w').close()\nclass Words: pass\n"
    config = {"auto_map": {"AutoTokenizer": ["code.Words", "code.Words"]}, "tokenizer_class": "Words"}
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "code.py").write_text(code)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [name for name in manifest["files"] if not name.startswith("tokenizer/")]
    names += [f"tokenizer/{path.name}" for path in (folder / "tokenizer").iterdir()]
    manifest["files"] = {name: files.sha256(folder / name) for name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.syspath_prepend(folder / "tokenizer")
    for look in (checkpoints.inspect, checkpoints.load):
        with pytest.raises((CodecError, WeightsError), match="tokenizer"):
            look(folder)
    assert not witness.exists()


# ------------------------------------------------------------------------------ files outside the folder


@pytest.mark.case(
    section="checkpoints",
    report="statistics from elsewhere",
    user_has="LeRobot's `state_file` absolute or `../`",
    now="refused",
)
@pytest.mark.parametrize("place", ["absolute", "parent", ".."])
def test_statistics_outside_a_lerobot_folder_are_refused(tmp_path: Path, place: str):
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "copy"))
    pipeline = folder / "policy_preprocessor.json"
    content = json.loads(pipeline.read_text())
    step = next(one for one in content["steps"] if "state_file" in one)
    moved = tmp_path / "elsewhere.safetensors"
    (folder / step["state_file"]).rename(moved)
    step["state_file"] = {"absolute": str(moved), "parent": "../elsewhere.safetensors"}.get(place, place)
    pipeline.write_text(json.dumps(content))
    with pytest.raises(WeightsError) as caught:
        checkpoints.load(folder)
    assert repr(step["state_file"]) in str(caught.value) and "policy_preprocessor.json" in str(caught.value)


def test_a_tokenizer_outside_a_lerobot_folder_is_refused(tmp_path: Path):
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "copy"))
    pipeline = folder / "policy_preprocessor.json"
    content = json.loads(pipeline.read_text())
    step = next(one for one in content["steps"] if one["registry_name"] == "tokenizer_processor")
    (tmp_path / "words").mkdir()
    step["artifacts"] = {"tokenizer_name": str(tmp_path / "words")}
    pipeline.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=str(tmp_path / "words")):
        checkpoints.load(folder)


@pytest.mark.case(
    section="checkpoints",
    report="statistics from elsewhere",
    user_has="LeRobot's `state_file` or its tokenizer as a link out of the folder",
    now="refused with the link's target; a blob of the same download of the Hub is read",
)
@pytest.mark.parametrize("kind", ["state_file", "tokenizer"])
def test_a_link_out_of_a_lerobot_folder_is_refused_unless_it_leads_into_its_own_download(
    tmp_path: Path, kind: str
):
    folder, hub = Path(shutil.copytree(FIXTURE, tmp_path / "copy")), tmp_path / "models--org--name"
    (hub / "snapshots").mkdir(parents=True)
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    if kind == "state_file":
        name = next(one for one in steps if "state_file" in one)["state_file"]
    else:
        name = next(one["artifacts"] for one in steps if "artifacts" in one)["tokenizer_name"]
    folder = folder.rename(hub / "snapshots" / "1")
    for place in ("private", "models--other--name/blobs", "models--org--name/blobs"):
        moved = tmp_path / place / "0123"
        moved.parent.mkdir(parents=True)
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)
        if moved.parent != hub / "blobs":
            with pytest.raises(WeightsError) as caught:
                checkpoints.load(folder)
            assert all(fact in str(caught.value) for fact in (repr(name), str(moved)))
            (folder / name).unlink()
            moved.rename(folder / name)
    checkpoints.load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "{parent}/model.safetensors"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: str):
    folder = tmp_path / "shards"
    folder.mkdir()
    vlafit.save_checkpoint(random_policy("pi0-tiny"), tmp_path / "native")
    weights = load_file(tmp_path / "native" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    listed = dict.fromkeys(weights, name.format(parent=tmp_path))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(WeightsError, match="not a file beside it"):
        checkpoints.load(folder)


def test_a_manifest_lists_no_file_outside_its_folder(tmp_path: Path):
    vlafit.save_checkpoint(random_policy("pi0-tiny"), tmp_path / "c")
    (tmp_path / "note").write_text("private")
    path = tmp_path / "c" / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["../note"] = files.sha256(tmp_path / "note")
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"\.\./note"):
        checkpoints.load(tmp_path / "c")
