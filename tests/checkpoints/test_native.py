"""Our own checkpoints: bit-exact round trips, and every damage caught."""

import json
import shutil
import struct
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.codec import robots
from tests.policies.tiny import random_batch, random_draws, random_policy
from vlafit import checkpoints, files
from vlafit.checkpoints.formats.native import read as native
from vlafit.codec import Codec
from vlafit.errors import CodecError, ConfigError, WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies import override
from vlafit.policies.pi0 import SIZES

CONFIG = override(
    SIZES["pi0-tiny"],
    {"state_dim": 5, "action_dim": 4, "chunk": 3, "max_tokens": 40, "language.vocab": 700},
    "here",
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(CONFIG)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return robots.codec(np.random.default_rng(0))


@pytest.fixture(scope="module")
def saved(policy: Policy, codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    plan = vlafit.apply_strategy(policy, [{"select": {}, "mode": "full"}])
    vlafit.save_checkpoint(policy, folder, codec, plan=plan, recipe='name = "a run"\n')
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def rewritten(folder: Path) -> None:
    """Make the manifest agree with what is there, so that the tensors alone are judged."""
    path = folder / native.MANIFEST
    values = json.loads(path.read_text())
    values["files"] = {n: files.sha256(folder / n) for n in values["files"] if (folder / n).is_file()}
    path.write_text(json.dumps(values))


def test_a_checkpoint_comes_back_bit_for_bit(saved: Path, policy: Policy, codec: Codec):
    loaded, its_codec, plan, report = vlafit.load_checkpoint(saved)
    before, after = policy.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert loaded.config == CONFIG
    assert its_codec is not None and plan is not None
    rng = np.random.default_rng(1)
    seen = robots.observation(rng)
    one, other = codec.encode(seen), its_codec.encode(seen)
    assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
    assert len(plan.trainable) == sum(not i.dead for i in policy.parts())
    assert report.form == "native" and report.parameters == sum(p.numel() for p in policy.parameters())
    assert (saved / "recipe.toml").read_text() == 'name = "a run"\n'
    batch, (noise, time) = random_batch(CONFIG), random_draws(CONFIG)
    assert torch.equal(policy.velocity(batch, noise, time), loaded.velocity(batch, noise, time))


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path):
    loaded, codec, plan, _ = vlafit.load_checkpoint(saved)
    checkpoints.save(loaded, tmp_path / "again", codec, plan=plan, recipe='name = "a run"\n')
    assert checkpoints.digest(tmp_path / "again") == checkpoints.digest(saved)


def test_an_older_checkpoint_is_replaced_whole_and_other_weights_can_be_stored(
    policy: Policy, tmp_path: Path
):
    checkpoints.save(policy, tmp_path / "c", None, recipe="old")
    average = {n: p.detach() * 2 for n, p in policy.named_parameters()}
    checkpoints.save(policy, tmp_path / "c", None, weights=average)
    loaded, codec, plan, _ = checkpoints.load(tmp_path / "c")
    assert codec is None and plan is None and not (tmp_path / "c" / "recipe.toml").exists()
    assert all(torch.equal(p, average[n]) for n, p in loaded.named_parameters())
    with pytest.raises(WeightsError, match=r"differ in \['action_in_proj\.bias'\]"):
        checkpoints.save(policy, tmp_path / "d", weights={**average, "action_in_proj.bias": torch.ones(2)})
    assert not (tmp_path / "d").exists()


def test_in_bfloat16_matrices_are_halved_and_norms_and_projections_stay(saved: Path, policy: Policy):
    loaded = vlafit.load_policy(saved, dtype="bfloat16")
    dtypes = {n: p.dtype for n, p in loaded.named_parameters()}
    assert dtypes["language.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["language.layers.0.input_layernorm.weight"] == torch.float32
    assert dtypes["state_proj.weight"] == dtypes["vision.patch_embedding.weight"] == torch.float32
    batch, (noise, time) = random_batch(CONFIG), random_draws(CONFIG)
    with torch.no_grad():
        exact, near = policy.velocity(batch, noise, time), loaded.velocity(batch, noise, time)
    assert near.dtype == torch.float32
    assert (near - exact).square().mean() < 1e-3 * exact.square().mean()
    assert torch.isfinite(loaded.sample(batch, noise[0])).all()


def test_named_parts_start_anew_and_are_reported(saved: Path, policy: Policy):
    loaded = checkpoints.load(saved, fresh=("expert", "state_*"), generator=torch.Generator().manual_seed(4))
    again = checkpoints.load(saved, fresh=("expert", "state_*"), generator=torch.Generator().manual_seed(4))
    old, new = policy.state_dict(), loaded.policy.state_dict()
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed == set(loaded.report.fresh) == {n for n in old if n.startswith(("expert.", "state_proj."))}
    assert all(torch.equal(new[n], value) for n, value in again.policy.state_dict().items())
    assert "fresh (" in loaded.report.text()


def test_another_action_width_must_be_declared_fresh(saved: Path):
    wider = {"action_dim": 6}
    with pytest.raises(WeightsError, match=r"changes action_in_proj\.weight, .*resize="):
        checkpoints.load(saved, wider)
    loaded = checkpoints.load(saved, wider, fresh=("action_in_proj.*", "action_out_proj.*"))
    assert loaded.policy.config.action_dim == 6
    assert loaded.codec is not None and loaded.codec.config.action_dim == 6


def test_another_chunk_length_needs_no_new_weights(saved: Path):
    loaded = checkpoints.load(saved, {"chunk": 9})
    assert loaded.codec is not None and loaded.codec.config.chunk == loaded.policy.config.chunk == 9


BAD_REQUESTS = {
    "a misspelt key": (
        {"config": {"vision.head": 2}},
        ConfigError,
        r"unknown key 'head'.*did you mean 'heads'",
    ),
    "a part that is none": ({"fresh": ("actor",)}, ConfigError, r"'actor' is no part of the policy"),
    "a dtype that is none": ({"dtype": "float16"}, WeightsError, r"dtype 'float16'.*bfloat16"),
    "another depth": ({"config": {"vision.depth": 3}}, WeightsError, r"missing \(16\): vision.layers.2"),
    "fewer layers": ({"config": {"vision.depth": 1}}, WeightsError, r"surplus \(16\): vision.layers.1"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_cannot_be_met_is_refused(saved: Path, case: str):
    arguments, kind, message = BAD_REQUESTS[case]
    with pytest.raises(kind, match=message):
        checkpoints.load(saved, **arguments)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def lie_about_offsets(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    path.write_bytes(data[:8] + header + data[8 + size :])


FILE_DAMAGE = {
    "a cut file": cut,
    "a cut header": cut_header,
    "offsets that lie": lie_about_offsets,
    "an empty file": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a text file": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"),
}


@pytest.mark.parametrize("case", FILE_DAMAGE)
def test_a_damaged_weights_file_is_caught_by_its_hash_and_without_it(copy: Path, case: str):
    FILE_DAMAGE[case](copy)
    with pytest.raises(WeightsError, match=r"changed: model.safetensors"):
        checkpoints.load(copy)
    rewritten(copy)
    with pytest.raises(WeightsError, match=r"model.safetensors: not a whole safetensors file"):
        checkpoints.load(copy)


TENSOR_DAMAGE = ("drop", "rename", "reshape", "transpose", "nan", "inf", "int", "surplus")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_a_damaged_tensor_is_named(copy: Path, damage: str, seed: int):
    rng = np.random.default_rng([seed, TENSOR_DAMAGE.index(damage)])
    path = copy / "model.safetensors"
    tensors = load_file(path)
    oblong = [n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1]]
    name = str(rng.choice(oblong if damage == "transpose" else list(tensors)))
    tensor = tensors.pop(name)
    flat = tensor.flatten()
    at = int(rng.integers(len(flat)))
    match damage:
        case "rename":
            tensors[f"{name}x"] = tensor
        case "reshape":
            tensors[name] = flat[None]
        case "transpose":
            tensors[name] = tensor.T.contiguous()
        case "nan" | "inf":
            flat[at] = float(damage)
            tensors[name] = flat.reshape(tensor.shape)
        case "int":
            tensors[name] = tensor.to(torch.int32)
        case "surplus":
            tensors |= {name: tensor, f"{name}.more": tensor.clone()}
    save_file(tensors, path)
    rewritten(copy)
    with pytest.raises(WeightsError) as caught:
        checkpoints.load(copy)
    assert name in str(caught.value)


FOLDER_DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"missing: model.safetensors"),
    "no codec": (lambda f: (f / "codec.json").unlink(), r"missing: codec.json"),
    "an edited recipe": (lambda f: (f / "recipe.toml").write_text("x"), r"changed: recipe.toml"),
    "an added tokenizer file": (
        lambda f: (f / "tokenizer" / "added_tokens.json").write_text("{}"),
        r"not in the manifest: tokenizer/added_tokens.json",
    ),
    "a manifest of another kind": (lambda f: (f / "manifest.json").write_text("[]"), r"manifest.json.*list"),
    "a torn manifest": (lambda f: (f / "manifest.json").write_text('{"for'), r"cannot be read as JSON"),
}


@pytest.mark.parametrize("case", FOLDER_DAMAGE)
def test_a_damaged_folder_is_refused_by_the_file(copy: Path, case: str):
    change, message = FOLDER_DAMAGE[case]
    change(copy)
    with pytest.raises(WeightsError, match=message):
        checkpoints.load(copy)


POLICY_DAMAGE = {
    "an unknown key": ({"colour": "red"}, WeightsError, r"policy.json: must have exactly the keys"),
    "a later format": ({"format": 99}, WeightsError, r"policy.json: format 99; this version reads format 1"),
    "an unknown family": ({"family": "pi7"}, WeightsError, r"policy.json: .*no policy family 'pi7'"),
    "an unknown field": ({"config": {"depht": 1}}, ConfigError, r"policy.json: config: unknown key 'depht'"),
}


@pytest.mark.parametrize("case", POLICY_DAMAGE)
def test_a_policy_file_that_says_something_else_is_refused(copy: Path, case: str):
    values, kind, message = POLICY_DAMAGE[case]
    path = copy / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    rewritten(copy)
    with pytest.raises(kind, match=message):
        checkpoints.load(copy)


def test_a_codec_that_does_not_fit_the_policy_is_refused(policy: Policy, codec: Codec, tmp_path: Path):
    other = Codec(replace(codec.config, chunk=5), codec.embodiment, codec.statistics, codec.tokenizer)
    checkpoints.save(policy, tmp_path / "c", other)
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(WeightsError, match=r"codec.json does not fit policy.json: ") as caught:
            read(tmp_path / "c")
        said = str(caught.value).partition("policy.json: ")[2]
        assert said == f"chunk is 5, and the policy's is {codec.config.chunk}"


SIZES_OF_A_CODEC = {
    "history": 10**6, "chunk": 10**9, "image_size": 10**7, "max_tokens": 10**9, "state_dim": 10**9,
    "action_dim": 10**9, "valid_steps": 10**7,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES_OF_A_CODEC)
def test_a_size_of_a_codec_that_no_machine_holds_is_refused_by_name(copy: Path, name: str):
    path, value = copy / "codec.json", SIZES_OF_A_CODEC[name]
    content = json.loads(path.read_text())
    content["config"][name] = value
    path.write_text(json.dumps(content))
    rewritten(copy)
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(CodecError, match=rf"codec\.json: config: {name} must be at most \d+, is {value}"):
            read(copy)


def test_inspect_refuses_a_token_beyond_the_embedding_as_load_does(policy: Policy, codec: Codec, copy: Path):
    path = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 100_000
    path.write_text(json.dumps(content))
    rewritten(copy)
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(WeightsError, match="the tokenizer has 100001 tokens, the policy has only"):
            read(copy)


def test_other_forms_are_refused_by_name(tmp_path: Path):
    with pytest.raises(WeightsError, match="there is no such checkpoint"):
        vlafit.load_policy(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"no checkpoint: none of model\.safetensors"):
        vlafit.load_policy(tmp_path)
    for sign, message in (
        ("params/_METADATA", "not Orbax's list of arrays"),
        ("adapter_config.json", "cannot be read as JSON"),
        ("pytorch_model.bin", "a pickle"),
    ):
        folder = tmp_path / sign.replace("/", "_").replace(".", "_")
        (folder / sign).parent.mkdir(parents=True)
        (folder / sign).write_text("")
        with pytest.raises(WeightsError, match=message):
            vlafit.load_policy(folder)
    save_file({"lm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 tensors, such as 'lm.weight'.*native.*openpi"):
        vlafit.load_policy(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"a pickle.*convert-pickle .*weights\.pt.*weights\.safetensors"):
        vlafit.load_policy(tmp_path / "weights.pt")


def test_an_interrupted_save_leaves_the_older_checkpoint(
    saved: Path, copy: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("vlafit.checkpoints.formats.native.write"), "save_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(policy, copy)
    assert checkpoints.digest(copy) == checkpoints.digest(saved)
    assert vlafit.load_policy(copy)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "codec.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused_though_its_hash_is_right(
    copy: Path, tmp_path: Path, name: str
):
    moved = (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(moved)
    with pytest.raises(WeightsError, match=name):
        checkpoints.load(copy)


def test_weights_may_be_a_link_to_another_disk(copy: Path, tmp_path: Path):
    moved = (copy / "model.safetensors").rename(tmp_path / "elsewhere")
    (copy / "model.safetensors").symlink_to(moved)
    checkpoints.load(copy)
