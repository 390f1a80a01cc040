"""Whether a checkpoint is whole: shards and their index, headers alone, mixed families, and their names."""

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints.forms import FORMS, Form, save
from vlafit import cli
from vlafit.checkpoints import inspect
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.name_map import back
from vlafit.checkpoints.tensor_files import INDEX
from vlafit.checkpoints.tensor_lists import list_tensors
from vlafit.errors import WeightsError
from vlafit.policies import override
from vlafit.policies.pi0 import SIZES, build

BY_NAME = {form.name: form for form in FORMS}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


# -------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def form() -> Form:
    return BY_NAME["openpi pi0"]


@pytest.fixture
def sharded(form: Form, tmp_path: Path) -> Path:
    """Two files with an index, as transformers and LeRobot split a large checkpoint."""
    tensors = form.write(tmp_path)
    names = sorted(tensors)
    for shard, part in zip(SHARDS, (names[:40], names[40:]), strict=True):
        save_file({n: tensors[n].contiguous() for n in part}, tmp_path / shard)
    places = {n: SHARDS[i >= 40] for i, n in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def change(folder: Path, edit) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_shards_that_are_as_the_index_says_load(form: Form, sharded: Path):
    vlafit.load_policy(sharded, config=form.told)


def test_an_index_and_shards_that_differ_are_refused_with_every_name(form: Form, sharded: Path):
    names = list(load_file(sharded / SHARDS[0]))

    def wrong(places: dict[str, str]) -> None:
        places["lost.weight"] = SHARDS[1]
        places[names[0]] = SHARDS[1]
        del places[names[1]]

    change(sharded, wrong)
    save_file({"x": torch.ones(1)}, sharded / "model-00003-of-00003.safetensors")
    for look in (inspect, vlafit.load_checkpoint):
        with pytest.raises(WeightsError) as caught:
            look(sharded, config=form.told)
        message = str(caught.value)
        assert f"in no file (1): lost.weight ({SHARDS[1]})" in message
        assert f"not in the index (1): {names[1]} ({SHARDS[0]})" in message
        assert f"in another file (1): {names[0]} ({SHARDS[0]}, not {SHARDS[1]})" in message
        assert "files that it does not name (1): model-00003-of-00003.safetensors" in message


def test_a_tensor_in_two_shards_and_a_shard_that_is_lost_are_refused(form: Form, sharded: Path):
    first, second = (load_file(sharded / shard) for shard in SHARDS)
    name = next(iter(first))
    save_file(second | {name: first[name]}, sharded / SHARDS[1])
    with pytest.raises(WeightsError, match=f"in another file .1.: {name}"):
        vlafit.load_policy(sharded, config=form.told)
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(WeightsError, match=f"{SHARDS[1]}: is missing"):
        vlafit.load_policy(sharded, config=form.told)


@pytest.mark.case(
    section="checkpoints",
    report="other weights are loaded than meant",
    user_has="one file and shards in a folder, or shards without an index",
    now="refused; the error says how they differ",
)
@pytest.mark.parametrize("how", ["the same", "other numbers", "a tensor more"])
def test_weights_that_are_there_twice_are_refused_and_compared(form: Form, sharded: Path, how: str):
    tensors = load_file(sharded / SHARDS[0]) | load_file(sharded / SHARDS[1])
    first = min(tensors)
    if how == "other numbers":
        tensors[first] = tensors[first] + 1
    elif how == "a tensor more":
        tensors["more"] = torch.ones(1)
    fact = {
        "the same": "they are the same",
        "other numbers": f"they differ in 1 tensors, such as {first}",
        "a tensor more": "1 tensors are only in one of the two, such as more",
    }[how]
    save_file(tensors, sharded / "model.safetensors")
    for look in (inspect, vlafit.load_checkpoint):
        with pytest.raises(WeightsError) as caught:
            look(sharded, config=form.told)
        assert fact in str(caught.value) and INDEX in str(caught.value)
    (sharded / INDEX).unlink()  # shards of an older download beside the file
    with pytest.raises(WeightsError, match=f"without an index.*{SHARDS[0]}"):
        inspect(sharded, config=form.told)
    (sharded / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=f"2 shards.*{SHARDS[0]}.* no {INDEX}"):
        inspect(sharded, config=form.told)


# ------------------------------------------------------------------------------------------- headers alone


def _hollow(path: Path) -> int:
    """Write a gigabyte of an openpi file that holds both of the tied copies, all of it a hole."""
    config = override(SIZES["pi0-tiny"], {"language.vocab": 1 << 22, "state_dim": 5, "action_dim": 5}, "here")
    meta = {n: p.detach() for n, p in build(config, "meta").named_parameters()}
    embedding = meta["language.embed_tokens.weight"]
    meta = back(meta, openpi.NAMES) | {openpi.NAMES.file_name("language.embed_tokens.weight"): embedding}
    header, end = {}, 0
    for name, tensor in meta.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_inspect_touches_no_page_of_the_weights_not_even_those_of_two_tied_copies(tmp_path: Path):
    size = _hollow(tmp_path / "model.safetensors")
    told = {"vision.heads": 2, "language.head_dim": 8, "chunk": 4}
    inspect(tmp_path, config=told)  # all is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loaded = inspect(tmp_path, config=told)
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert loaded.report.tied == tuple(openpi.NAMES.ties.values())
    assert size > 8e8 and touched < 2000, touched  # one copy has 100,000 pages, 16 of which come at once


def test_two_copies_of_another_shape_are_told_by_headers_alone(form: Form, tmp_path: Path):
    tensors = form.write(tmp_path)
    head, embedding = (
        next(iter(openpi.NAMES.ties.values())),
        openpi.NAMES.file_name("language.embed_tokens.weight"),
    )
    for other in (tensors[head][:-1], tensors[head].double()):
        save(tensors | {embedding: other}, tmp_path)
        for look in (inspect, vlafit.load_checkpoint):
            with pytest.raises(WeightsError, match="tied, but different: .*lm_head.weight is .*embed_tokens"):
                look(tmp_path, config=form.told)


def test_copies_that_hold_nan_are_not_taken_for_equal(form: Form, tmp_path: Path):
    tensors = form.write(tmp_path)
    head, embedding = (
        next(iter(openpi.NAMES.ties.values())),
        openpi.NAMES.file_name("language.embed_tokens.weight"),
    )
    tensors[head][0, 0] = torch.nan
    save(tensors | {embedding: tensors[head].clone()}, tmp_path)
    with pytest.raises(WeightsError, match=r"tied, but different \(1\).*\n.*not finite \(1\)"):
        vlafit.load_policy(tmp_path, config=form.told)


# ------------------------------------------------------------------------------------------------- mixes


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (
            "SmolVLA",
            "LeRobot pi0",
            r"(?s)a mix of several.*LeRobot's SmolVLA \(\d+\): .*pi0, pi0.5 or pi0-FAST \(\d+\): ",
        ),
        ("SmolVLA", "openpi pi0", r"(?s)a mix of several.*LeRobot's SmolVLA.*openpi's pi0 or pi0.5"),
        (
            "openpi pi0",
            "transformers",
            r"(?s)a mix of several(?=.*openpi's pi0 or pi0.5)(?=.*transformers' pi0)",
        ),
        (
            "openpi pi05",
            "openpi pi0",
            r"a mix of two families: of pi0 only .*state_proj.*of pi0.5 only .*time_mlp_in",
        ),
        (
            "LeRobot pi0",
            "LeRobot pi05",
            r"a mix of two families: of pi0 only .*state_proj.*of pi0.5 only .*time_mlp_in",
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["all of both", "a part of the second"])
def test_tensors_of_two_families_in_one_file_are_called_a_mix(
    one: str, two: str, message: str, whole: bool, tmp_path: Path
):
    (tmp_path / "b").mkdir()
    second = BY_NAME[two].write(tmp_path / "b")
    first = BY_NAME[one].write(tmp_path)
    names = [n for n in second if n not in first]
    save({n: second[n] for n in (names if whole else names[1::2])} | first, tmp_path)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(tmp_path, config=BY_NAME[one].told)


# ------------------------------------------------------------------------------------------------- names


def test_an_error_names_all_tensors_and_whole_layers_at_once(
    form: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tensors = form.write(tmp_path)
    layer = f"{openpi.PREFIX}gemma_expert.model.layers."
    lost = [n for n in tensors if n.startswith(f"{layer}1.") or n.endswith(("up_proj.weight", "fc1.bias"))]
    assert len(lost) > 16
    save({n: t for n, t in tensors.items() if n not in lost}, tmp_path)
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(tmp_path, config=form.told)
    assert set(caught.value.tensors["missing"]) == set(lost)
    words = [word for key, value in form.told.items() for word in ("--config", f"{key}={value}")]
    assert cli.main(["inspect", str(tmp_path), *words]) != 0
    for message in (str(caught.value), capsys.readouterr().err):
        assert f"{layer}1.* (9 tensors)" in message
        assert f"{layer}{{0,2-3}}.mlp.up_proj.weight [expert.layers.{{0,2-3}}.mlp.up_proj.weight]" in message
        assert "language_model.layers.{0-3}.mlp.up_proj.weight" in message
        assert "vision_model.encoder.layers.{0-1}.mlp.fc1.bias" in message


def test_lists_keep_what_differs_between_layers_apart():
    found = list_tensors(
        ["a.layers.0.x is (1,), not (2,)", "a.layers.1.x is (3,), not (2,)", "b"], str.upper, ["B"]
    )
    assert found == "A.LAYERS.0.X [a.layers.0.x] is (1,), not (2,), A.LAYERS.1.X [a.layers.1.x] is (3,)," \
        " not (2,), B [b]"  # fmt: skip


def test_a_name_that_torch_compile_made_is_the_files_and_not_there_twice(tmp_path: Path):
    form = BY_NAME["LeRobot pi0"]
    tensors = form.write(tmp_path)
    compiled = {n.replace("model.", "model._orig_mod.", 1): t for n, t in tensors.items()}
    name = "model._orig_mod.action_in_proj.weight"
    compiled[name][0, 0] = torch.inf
    save(compiled, tmp_path)
    with pytest.raises(WeightsError, match=rf"not finite \(1\): {name} \[action_in_proj.weight\]"):
        vlafit.load_policy(tmp_path, config=form.told)
    save(tensors | {name: tensors["model.action_in_proj.weight"] + 1}, tmp_path)
    with pytest.raises(WeightsError, match=r"surplus \(1\): .*action_in_proj.weight beside .*action_in_proj"):
        vlafit.load_policy(tmp_path, config=form.told)
