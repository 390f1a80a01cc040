"""OpenVLA's folders: OFT's files beside the weights, statistics by name, adapters, export and damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlafit
from tests.policies.test_openvla import FIXTURE, KEYS, recorded
from vlafit import checkpoints
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.openvla import format as openvla_format
from vlafit.checkpoints.formats.openvla import names
from vlafit.checkpoints.pickles import convert
from vlafit.cli import main
from vlafit.codec.tokenizer import Tokenizer, train_word_tokenizer
from vlafit.errors import CodecError, WeightsError
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family, openvla

UNTOLD = {"chunk": 8, "vision.dino.heads": 2, "vision.siglip.heads": 2}  # what no file records
CAMERAS = {"openvla.cameras": ["front", "wrist"]}
FILES = {
    "action_head_l1": "action_head--10_checkpoint",
    "proprio_projector": "proprio_projector--10_checkpoint",
}
FILM = "vision_backbone--10_checkpoint"
DIFFUSION = {
    "action_head_diffusion": "action_head",
    "noisy_action_projector": "noisy_action_projector",
}


def write(folder: Path) -> Path:
    """Lay the recorded policy out as OFT does, its component files already converted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "dataset_statistics.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, folder)
    for name, file in FILES.items():
        tensors = {f"module.{n}": t for n, t in load_file(FIXTURE / f"{name}.safetensors").items()}
        save_file(tensors, folder / f"{file}.safetensors")
    return folder


def write_film(folder: Path) -> Path:
    """Add the file in which OFT saves FiLM and the towers that it modulates."""
    towers = {n: t for n, t in load_file(FIXTURE / "model.safetensors").items() if n.startswith("vision_")}
    wrapped = {
        n.replace(".blocks.0.", ".blocks.0.block.")
        .replace(".blocks.1.", ".blocks.1.block.")
        .replace(".blocks.2.", ".blocks.2.block."): t
        for n, t in towers.items()
    }
    tensors = wrapped | load_file(FIXTURE / "film.safetensors")
    save_file({f"module.{n}": t for n, t in tensors.items()}, folder / f"{FILM}.safetensors")
    return folder


def write_diffusion(folder: Path) -> Path:
    """Put the files of the diffusion head in the place of the other head's."""
    for module, stem in DIFFUSION.items():
        tensors = {f"module.{n}": t for n, t in load_file(FIXTURE / f"{module}.safetensors").items()}
        save_file(tensors, folder / f"{stem}--10_checkpoint.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("oft") / "whole")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_word_tokenizer(["put the bowl on the plate"], 300)


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(FIXTURE / "io.safetensors")


def test_a_folder_with_ofts_files_answers_as_recorded_in_the_robots_units(whole: Path, words, io):
    loaded = checkpoints.load(whole, config=UNTOLD | CAMERAS, tokenizer=words, assets="tiny_no_noops")
    assert (loaded.report.form, loaded.report.family, loaded.report.unused) == ("OpenVLA", "openvla", ())
    policy, codec = loaded.policy, loaded.codec
    assert isinstance(policy, openvla.OpenVLA) and codec is not None
    assert policy.config.proprio and not policy.config.film
    assert codec.config.normalisation == "openvla_quantile"
    assert codec.config.unchanged == (False,) * 6 + (True,)
    answers = policy.act(recorded(io), sample_rng(KEYS[:2], seed=0)).double().numpy()
    for row in range(2):
        decoded = codec._action.decode(answers[row])
        np.testing.assert_allclose(decoded, io[f"predict.l1.{row}"].numpy(), rtol=0, atol=1e-4)


def test_what_no_file_records_is_asked_for_by_its_key(whole: Path, words):
    for key in UNTOLD:
        with pytest.raises(WeightsError, match=key):
            vlafit.load_policy(whole, config={k: v for k, v in UNTOLD.items() if k != key})
    loaded = checkpoints.load(whole, config=UNTOLD)
    assert loaded.codec is None and "openvla.cameras" in str(loaded.report)
    with pytest.raises(WeightsError, match="'tiny_no_noop'.*tiny_no_noops"):
        checkpoints.load(whole, config=UNTOLD | CAMERAS, tokenizer=words, assets="tiny_no_noop")


def test_of_several_datasets_statistics_are_chosen_by_name(whole: Path, words, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "several")
    path = folder / "dataset_statistics.json"
    values = json.loads(path.read_text())
    other = json.loads(json.dumps(values["tiny_no_noops"]))
    other["action"]["q99"][0] = 5.0
    path.write_text(json.dumps(values | {"other": other}))
    with pytest.raises(WeightsError, match="tiny_no_noops, other"):
        checkpoints.load(folder, config=UNTOLD | CAMERAS, tokenizer=words)
    codec = checkpoints.load(folder, config=UNTOLD | CAMERAS, tokenizer=words, assets="other").codec
    assert codec is not None and codec.statistics["action"].array("q99")[0] == 5.0
    del other["action"]["q01"]
    path.write_text(json.dumps({"other": other}))
    with pytest.raises(CodecError, match="statistics of other: action.*q01"):
        checkpoints.load(folder, config=UNTOLD | CAMERAS, tokenizer=words)


def test_a_component_that_is_a_pickle_is_refused_with_the_command_that_converts_it(
    whole: Path, tmp_path: Path
):
    folder = shutil.copytree(whole, tmp_path / "pickled")
    file = folder / f"{FILES['action_head_l1']}.safetensors"
    pickle = file.with_suffix(".pt")
    torch.save(load_file(file), pickle)
    file.unlink()
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(folder, config=UNTOLD)
    assert f"vlafit convert-pickle {pickle} --out {file}" in str(caught.value)
    convert(pickle, file)
    assert vlafit.load_policy(folder, config=UNTOLD).config.chunk == 8  # the pickle beside it is not opened
    shutil.copy(file, folder / "action_head--20_checkpoint.safetensors")
    with pytest.raises(WeightsError, match="action_head is there of several steps, 10, 20"):
        vlafit.load_policy(folder, config=UNTOLD)


def test_component_files_of_different_steps_are_refused(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "mixed")
    file = folder / f"{FILES['proprio_projector']}.safetensors"
    file.rename(folder / "proprio_projector--20_checkpoint.safetensors")
    with pytest.raises(WeightsError, match=r"action_head--10_\w+ and proprio_projector--20_\w+ are of diff"):
        vlafit.load_policy(folder, config=UNTOLD)
    file = write_film(shutil.copytree(whole, tmp_path / "film")) / f"{FILM}.safetensors"
    file.rename(file.with_name("vision_backbone--20_checkpoint.safetensors"))
    with pytest.raises(WeightsError, match=r"action_head--10_\w+ and vision_backbone--20_\w+ are of diff"):
        vlafit.load_policy(file.parent, config=UNTOLD)


def test_settings_that_are_not_computed_and_foreign_modules_are_refused(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "other")
    extra = folder / "value_head--10_checkpoint.safetensors"
    save_file({"fc1.weight": torch.zeros(4, 1)}, extra)
    with pytest.raises(WeightsError, match="value_head"):
        vlafit.load_policy(folder, config=UNTOLD)
    extra.unlink()
    with pytest.raises(WeightsError, match="'diffusion'.*'l1'"):
        vlafit.load_policy(folder, config=UNTOLD | {"head": "diffusion"})
    values = json.loads((folder / "config.json").read_text())
    for change, key in (
        ({"arch_specifier": "linear"}, "arch_specifier"),
        ({"image_sizes": [42, 56]}, "image_sizes"),
    ):
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(WeightsError, match=key):
            vlafit.load_policy(folder, config=UNTOLD)


def test_film_and_its_towers_come_from_the_file_that_oft_saves_them_in(whole: Path, tmp_path: Path, io):
    folder = write_film(shutil.copytree(whole, tmp_path / "film"))
    policy = vlafit.load_policy(folder, config=UNTOLD)
    assert policy.config.film
    mean = io["film.average_language_embedding"]
    with torch.no_grad():
        error = (policy.predict(recorded(io), mean) - io["in.actions"]).abs().mean()
    assert error.item() == pytest.approx(io["film.l1_loss"].item(), rel=1e-6)


def test_a_tower_that_ofts_own_file_lacks_is_missing_and_not_that_of_the_base(whole: Path, tmp_path: Path):
    folder = write_film(shutil.copytree(whole, tmp_path / "film"))
    file = folder / f"{FILM}.safetensors"
    tensors = load_file(file)
    name = "vision_backbone.featurizer.blocks.1.block.attn.qkv.weight"
    del tensors[f"module.{name}"]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="missing .1.: .*featurizer.blocks.1.block.attn.qkv.weight"):
        vlafit.load_policy(folder, config=UNTOLD)


class Tower(torch.nn.Module):
    """Modules of the names and shapes of a checkpoint's tensors, as timm has them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for first in dict.fromkeys(name.partition(".")[0] for name in tensors):
            inside = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == first}
            setattr(self, first, torch.nn.Parameter(inside[""]) if "" in inside else self._module(inside))

    @staticmethod
    def _module(inside: dict[str, Tensor]) -> torch.nn.Module:
        if set(inside) != {"weight", "bias"} or inside["weight"].ndim == 1:
            return Tower(inside)
        rows, columns, *kernel = inside["weight"].shape
        return torch.nn.Conv2d(columns, rows, kernel) if kernel else torch.nn.Linear(columns, rows)


def as_oft_loads_film(folder: Path, words: int) -> torch.nn.Module:
    """Return the towers of a folder as `_apply_film_to_vla` makes them: LoRA first, then FiLM's wrappers."""
    plain = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.startswith("vision_")}
    made = Tower({"base": torch.zeros(1)} | plain)
    layers = r".*\.(q|kv|qkv|proj|fc1|fc2)"  # what peft 0.11.1 makes of "all-linear"
    made = inject_adapter_in_model(LoraConfig(r=32, lora_alpha=16, target_modules=layers), made)
    towers = made.vision_backbone
    for tower in (towers.featurizer, towers.fused_featurizer):
        for number, block in list(tower.blocks.named_children()):
            width = block.norm1.weight.shape[0]
            parts = {"block": block, "scale": torch.nn.Linear(words, width)}
            wrapper = torch.nn.ModuleDict(parts | {"shift": torch.nn.Linear(words, width)})
            setattr(tower.blocks, number, wrapper)
    return torch.nn.ModuleDict({"vision_backbone": towers})


@pytest.mark.parametrize("tuned", ["loaded", "lora"])
def test_film_goes_out_in_the_file_that_ofts_loader_takes_and_reads_back_the_same(
    whole: Path, tmp_path: Path, tuned: str
):
    if tuned == "loaded":
        policy = vlafit.load_policy(write_film(shutil.copytree(whole, tmp_path / "film")), config=UNTOLD)
        vlafit.save_checkpoint(policy, tmp_path / "native", None)
    else:
        policy = build_family("openvla", "openvla-oft-tiny", {"film": True}, torch.Generator().manual_seed(0))
        plan = vlafit.apply_strategy(policy, "openvla-oft")
        with torch.no_grad():
            for name in plan.trainable:
                torch.nn.init.normal_(policy.get_parameter(name), std=0.1)
        checkpoints.save(policy, tmp_path / "native", plan=plan)
    made = export(tmp_path / "native", "openvla", tmp_path / "out", merge=True)
    file = tmp_path / "out" / "vision_backbone--vlafit_checkpoint.safetensors"
    strict = as_oft_loads_film(tmp_path / "out", policy.config.language.width)
    strict.load_state_dict(load_file(file))  # raises for a name or a shape that is not OFT's
    assert not any(
        names.NAMES.policy_name(n).count("film") for n in load_file(file.parent / "model.safetensors")
    )
    assert any("use_film" in note for note in made.notes)
    assert any("vision_backbone--vlafit_checkpoint" in note for note in made.notes)
    sizes = {key: getattr(policy.config, key) for key in ("chunk", "action_dim", "state_dim")}
    again = vlafit.load_policy(tmp_path / "out", config=sizes)
    assert again.config.film
    if tuned == "loaded":
        assert again.config == policy.config
        for (name, one), other in zip(policy.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other), name
    batch, keys = random_batch(policy.needs(), 2), [(0, 0), (0, 1)]
    ours, theirs = (one.eval().act(batch, sample_rng(keys, seed=0)) for one in (policy, again))
    close = 1e-5 * max(1.0, float(ours.detach().abs().max()))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=close)
    if tuned == "lora":  # and with its adapters beside a base that holds FiLM
        export(tmp_path / "native", "openvla", tmp_path / "apart")
        apart = (
            vlafit.load_policy(tmp_path / "apart", config=sizes).eval().act(batch, sample_rng(keys, seed=0))
        )
        torch.testing.assert_close(apart, ours, rtol=0, atol=close)


def test_adapters_in_the_file_of_the_towers_are_merged_as_oft_merges_them(whole: Path, tmp_path: Path):
    plain = write_film(shutil.copytree(whole, tmp_path / "plain"))
    before = vlafit.load_policy(plain, config=UNTOLD)
    vlafit.save_checkpoint(before, tmp_path / "native", None)
    export(tmp_path / "native", "openvla", tmp_path / "out")
    file = tmp_path / "out" / "vision_backbone--vlafit_checkpoint.safetensors"
    tensors = load_file(file)
    rng = torch.Generator().manual_seed(0)
    changed = {n: torch.randn(t.shape, generator=rng) / 8 for n, t in tensors.items() if ".lora_B." in n}
    save_file({f"module.{n}": t for n, t in (tensors | changed).items()}, file)
    after = vlafit.load_policy(tmp_path / "out")
    towers = as_oft_loads_film(tmp_path / "out", before.config.language.width)
    towers.load_state_dict(tensors | changed)
    for name, layer in towers.named_modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            ours = after.get_parameter(names.NAMES.policy_name(f"{name.replace('.block.', '.')}.weight"))
            torch.testing.assert_close(ours, layer.get_base_layer().weight, rtol=0, atol=1e-5)
    first = next(iter(changed))
    (broken := dict(tensors)).pop(first)
    save_file(broken, file)
    with pytest.raises(WeightsError, match=f"without {first}"):
        vlafit.load_policy(tmp_path / "out")
    save_file(tensors | {first: torch.zeros(3, 32)}, file)
    with pytest.raises(WeightsError, match=r"the adapter of .* which do not fit"):
        vlafit.load_policy(tmp_path / "out")


def test_a_component_of_another_width_than_the_statistics_is_refused(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "narrow")
    file = folder / f"{FILES['proprio_projector']}.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("fc1.weight"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(WeightsError, match=r"state_dim is 7 by proprio_proj.*, 8 by the statistics"):
        vlafit.load_policy(folder, config=UNTOLD)


def test_a_base_without_a_head_starts_one_afresh(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "base")
    for file in FILES.values():
        (folder / f"{file}.safetensors").unlink()
    own = {"expert.width": 48, "expert.blocks": 2, "state_dim": 8, "action_dim": 7, "proprio": True}
    loaded = checkpoints.load(folder, config=UNTOLD | own, fresh=["expert", "projections"])
    assert {name.split(".")[0] for name in loaded.report.fresh} == {"expert", "proprio_proj"}


def without(whole: Path, folder: Path, *files: str) -> Path:
    shutil.copytree(whole, folder)
    for file in files:
        (folder / f"{FILES[file]}.safetensors").unlink()
    return folder


def test_an_action_head_without_a_state_projection_is_asked_for_the_width_of_the_state(
    whole: Path, words, tmp_path: Path
):
    """OFT saves none with use_proprio false; else the file was forgotten."""
    blind = without(whole, tmp_path / "blind", "proprio_projector")
    with pytest.raises(WeightsError, match=r"copy proprio_projector--N_checkpoint .*state_dim=8") as caught:
        checkpoints.load(blind, config=UNTOLD)
    assert str(blind) in str(caught.value)
    given = {"tokenizer": words, "assets": "tiny_no_noops"}
    loaded = checkpoints.load(blind, config=UNTOLD | CAMERAS | {"state_dim": 8}, **given)
    assert (loaded.policy.config.head, loaded.policy.config.proprio) == ("l1", False)
    vlafit.save_checkpoint(loaded.policy, tmp_path / "native", loaded.codec)
    export(tmp_path / "native", "openvla", tmp_path / "out")
    again = checkpoints.load(tmp_path / "out")  # what we write says it
    assert again.policy.config == loaded.policy.config and again.codec is not None


def test_a_state_projection_without_an_action_head_is_refused_unless_the_head_is_said(
    whole: Path, tmp_path: Path
):
    headless = without(whole, tmp_path / "headless", "action_head_l1")
    with pytest.raises(
        WeightsError, match=r"proprio_projector is there, and no action head: copy action_head--N"
    ):
        checkpoints.load(headless, config=UNTOLD)
    loaded = checkpoints.load(headless, config=UNTOLD | {"head": "parallel_tokens"})
    assert (loaded.policy.config.head, loaded.policy.config.proprio) == ("parallel_tokens", True)


def adapters(folder: Path, base: Path) -> dict[str, Tensor]:
    """Write adapters on all that OFT's "all-linear" reaches: convolutions, output layer, unused blocks."""
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    generator, tensors = torch.Generator().manual_seed(0), {}
    modules = [
        n.removesuffix(".weight") for n, t in weights.items() if n.endswith(".weight") and t.ndim in (2, 4)
    ]
    for module in modules:
        if module.endswith("embed_tokens"):
            continue
        shape = weights[f"{module}.weight"].shape
        inner, outer = (shape[1:], (1, 1)) if len(shape) == 4 else (shape[1:], ())
        tensors[f"base_model.model.{module}.lora_A.weight"] = (
            torch.randn(4, *inner, generator=generator) * 0.1
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = (
            torch.randn(shape[0], 4, *outer, generator=generator) * 0.1
        )
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [
        "qkv",
        "proj",
        "q",
        "kv",
        "fc1",
        "fc2",
        "fc3",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    ]
    targets += ["gate_proj", "up_proj", "down_proj"]
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "lora_dropout": 0.0, "bias": "none"}
    described |= {
        "init_lora_weights": "gaussian",
        "base_model_name_or_path": "openvla/openvla-7b",
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return tensors


def test_ofts_adapters_are_merged_as_oft_merges_them(whole: Path, tmp_path: Path):
    tensors = adapters(tmp_path / "lora_adapter", whole)
    policy = vlafit.load_policy(tmp_path / "lora_adapter", base=whole, config=UNTOLD)
    merged = vlafit.merge(policy)
    weights = load_file(whole / "model.safetensors")
    adapted = 0
    for info in merged.parts():
        module = names.NAMES.file_name(info.name).removesuffix(".weight")
        a = tensors.get(f"base_model.model.{module}.lora_A.weight")
        value = names.written({info.name: merged.get_parameter(info.name)})[names.NAMES.file_name(info.name)]
        if a is None or info.dead:
            continue
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        expected = weights[f"{module}.weight"] + 0.5 * (b.flatten(1) @ a.flatten(1)).view_as(value)
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-6)
        adapted += 1
    assert adapted == 2 * 2 * 4 + 2 + 3 + 3 * 7  # two blocks of each tower, patches, projector, decoder


def test_an_export_reads_back_the_same_and_says_what_oft_needs(whole: Path, words, tmp_path: Path):
    source = checkpoints.load(whole, config=UNTOLD | CAMERAS, tokenizer=words)
    vlafit.save_checkpoint(source.policy, tmp_path / "native", source.codec)
    export(tmp_path / "native", "openvla", tmp_path / "out")
    again = checkpoints.load(tmp_path / "out")  # our table in config.json records what OpenVLA does not
    assert again.policy.config == source.policy.config
    for (name, one), other in zip(source.policy.named_parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert again.codec is not None and source.codec is not None
    assert again.codec.config == source.codec.config
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(whole / "model.safetensors")
    assert set(stored) == set(original) and all(torch.equal(stored[n], t) for n, t in original.items())
    said = json.loads((tmp_path / "out" / "dataset_statistics.json").read_text())["tiny_no_noops"]
    meant = json.loads((whole / "dataset_statistics.json").read_text())["tiny_no_noops"]
    assert said["action"] == meant["action"] and said["proprio"] == meant["proprio"]
    (tmp_path / "out" / "codec.json").unlink()
    (tmp_path / "out" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "out" / "config.json").read_text()))
    )
    read = checkpoints.load(tmp_path / "out", config=CAMERAS, tokenizer=words).codec
    assert read is not None and read.config == source.codec.config


# ---------------------------------------------------------------------------- OpenVLA, and OFT's other heads


def write_plain(folder: Path) -> Path:
    """Lay the recorded OpenVLA out as its authors publish it: no files beside config, weights, statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, folder)  # the statistics are in config.json, as in openvla-7b
    return folder


PLAIN = {"vision.dino.heads": 2, "vision.siglip.heads": 2}
FRONT = {"openvla.cameras": ["front"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("openvla") / "plain")


def test_a_plain_folder_is_openvla_and_answers_with_the_recorded_actions(plain: Path, words, io):
    from tests.policies.test_openvla_heads import one_image

    loaded = checkpoints.load(plain, config=PLAIN | FRONT, tokenizer=words, assets="tiny_no_noops")
    policy, codec = loaded.policy, loaded.codec
    assert isinstance(policy, openvla.OpenVLA) and codec is not None and codec.action_bins is not None
    c = policy.config
    assert (c.head, c.chunk, c.text_vocab, c.proprio, c.state_dim, c.action_dim) == (
        "tokens", 1, 512, False, 8, 7,
    )  # fmt: skip
    assert "actions are OpenVLA's tokens" in loaded.report.text()
    recorded_plain = load_file(FIXTURE / "openvla_plain.safetensors")
    answers = policy.act(one_image(io, recorded_plain), sample_rng(KEYS[:2], seed=0)).numpy()
    for row in range(2):
        decoded = codec._action.decode(codec.detokenise(answers[row]).chunk)[0]
        expected = recorded_plain[f"predict.actions.{row}"].numpy()
        np.testing.assert_allclose(decoded, expected, rtol=0, atol=1e-6)


def test_a_tokenizer_beyond_the_text_vocabulary_is_refused(plain: Path):
    wide = train_word_tokenizer(["a b"], 400)
    short = {"text_vocab": 257}
    with pytest.raises(CodecError, match="text_vocab"):
        checkpoints.load(plain, config=PLAIN | FRONT | short, tokenizer=wide, assets="tiny_no_noops")


@pytest.mark.parametrize("head", ["tokens", "parallel_tokens"])
def test_policies_that_write_tokens_are_exported_and_read_back(plain: Path, words, tmp_path: Path, head: str):
    config = PLAIN | FRONT | ({"head": head, "chunk": 8} if head == "parallel_tokens" else {})
    source = checkpoints.load(plain, config=config, tokenizer=words)
    vlafit.save_checkpoint(source.policy, tmp_path / "native", source.codec)
    export(tmp_path / "native", "openvla", tmp_path / "out")
    names_there = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any("--" in name for name in names_there)
    original, made = load_file(plain / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(original) == set(made) and all(torch.equal(made[n], t) for n, t in original.items())
    again = checkpoints.load(tmp_path / "out")
    assert again.policy.config == source.policy.config
    assert again.codec is not None and source.codec is not None
    assert again.codec.config == source.codec.config
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    meant = json.loads((plain / "config.json").read_text())
    assert said["pad_to_multiple_of"] == meant["pad_to_multiple_of"] == 64
    assert said["norm_stats"]["tiny_no_noops"]["action"] == meant["norm_stats"]["tiny_no_noops"]["action"]


@pytest.mark.parametrize("head", ["tokens", "l1"])
def test_adapters_go_out_as_ofts_lora_adapter_does_where_every_layer_is_the_bases(head: str, tmp_path: Path):
    size = "openvla-tiny" if head == "tokens" else "openvla-oft-tiny"
    policy = build_family("openvla", size, {}, torch.Generator().manual_seed(0))
    plan = vlafit.apply_strategy(policy, "openvla-oft")
    with torch.no_grad():
        for name in plan.trainable:
            if ".lora_B." in name:
                torch.nn.init.normal_(policy.get_parameter(name), generator=torch.Generator().manual_seed(1))
    checkpoints.save(policy, tmp_path / "run", plan=plan)
    export(tmp_path / "run", "openvla", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("language_model.lm_head.lora_A" in name for name in stored) == (head == "tokens")
    again = checkpoints.load(
        tmp_path / "out",
        config={key: getattr(policy.config, key) for key in ("chunk", "action_dim", "state_dim")},
    )
    batch, keys = random_batch(policy.needs(), 2), [(0, 0), (0, 1)]
    ours, theirs = (one.eval().probe(batch, sample_rng(keys, seed=0)) for one in (policy, again.policy))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.detach().abs().max()))
    film = build_family("openvla", "openvla-oft-tiny", {"film": True}, device="meta")
    layers = [["vision.dino.layers.0.film.scale"], ["expert.layers.0.fc"], ["proprio_proj.fc1"]]
    for one in layers:
        (said,) = openvla_format.FORMAT.adapters.refusals(film, ["lm_head", *one])
        assert said == f"{one[0]} is in a file of its own there: add --merge"


def test_a_folder_with_the_diffusion_head_is_read_and_exported(whole: Path, tmp_path: Path, io):
    folder = write_diffusion(shutil.copytree(whole, tmp_path / "diffusion"))
    policy = vlafit.load_policy(folder, config=UNTOLD)
    assert policy.config.head == "diffusion" and policy.steps == 50
    more = load_file(FIXTURE / "diffusion.safetensors")
    with torch.no_grad():
        noise = policy.noise(recorded(io), more["diffusion.noisy_actions"], more["in.diffusion_timesteps"])
    torch.testing.assert_close(noise, more["diffusion.noise_pred"], rtol=0, atol=1e-4)
    vlafit.save_checkpoint(policy, tmp_path / "native", None)
    export(tmp_path / "native", "openvla", tmp_path / "out")
    for module, stem in DIFFUSION.items():
        made = load_file(tmp_path / "out" / f"{stem}--vlafit_checkpoint.safetensors")
        meant = load_file(FIXTURE / f"{module}.safetensors")
        assert set(made) == set(meant) and all(torch.equal(made[n], t) for n, t in meant.items())
    assert vlafit.load_policy(tmp_path / "out").config == policy.config


def test_a_folder_with_statistics_takes_the_tokenizer_of_a_recipe(plain: Path, whole: Path, tmp_path: Path):
    assert checkpoints.wants_tokenizer(plain) and checkpoints.wants_tokenizer(whole)
    bare = shutil.copytree(whole, tmp_path / "bare")
    (bare / "dataset_statistics.json").unlink()
    values = json.loads((bare / "config.json").read_text())
    values.pop("norm_stats", None)
    (bare / "config.json").write_text(json.dumps(values))
    assert not checkpoints.wants_tokenizer(bare)


def without_states(plain: Path, folder: Path) -> Path:
    """Return a copy of a plain folder whose statistics have no proprio."""
    shutil.copytree(plain, folder)
    values = json.loads((folder / "config.json").read_text())
    for one in values["norm_stats"].values():
        del one["proprio"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_statistics_without_states_are_enough_for_a_head_that_reads_none(plain: Path, words, tmp_path: Path):
    folder = without_states(plain, tmp_path / "silent")
    loaded = checkpoints.load(folder, config=PLAIN)
    assert loaded.policy.config.state_dim == 32 and not loaded.policy.config.proprio
    given = {"config": PLAIN | FRONT, "tokenizer": words, "assets": "tiny_no_noops"}
    with pytest.raises(WeightsError, match=r"width of the robot's state.*openvla\.state_dims"):
        checkpoints.load(folder, **given)
    given["config"] |= {"openvla.state_dims": 5}
    loaded, whole = (
        checkpoints.load(folder, **given),
        checkpoints.load(plain, **given | {"config": PLAIN | FRONT}),
    )
    assert loaded.codec is not None and whole.codec is not None
    assert "have no states, which this head does not read" in loaded.report.text()
    assert loaded.codec.embodiment.state.shape == (5,)
    assert loaded.codec.statistics["action"].to_json() == whole.codec.statistics["action"].to_json()
    state = np.linspace(-0.9, 0.9, 5, dtype=np.float32)
    assert loaded.codec._state.encode(state) == pytest.approx(state, abs=1e-6)


def test_a_head_that_reads_the_state_needs_its_statistics(whole: Path, plain: Path, words, tmp_path: Path):
    folder = tmp_path / "oft"
    shutil.copytree(whole, folder)
    values = json.loads((folder / "dataset_statistics.json").read_text())
    for one in values.values():
        del one["proprio"]
    (folder / "dataset_statistics.json").write_text(json.dumps(values))
    given = {"tokenizer": words, "assets": next(iter(values))}
    with pytest.raises(CodecError, match="proprio: not there"):
        checkpoints.load(folder, config=UNTOLD | CAMERAS, **given)
    for path, config in ((folder, UNTOLD | CAMERAS), (plain, PLAIN | FRONT)):
        with pytest.raises(CodecError, match="state_dims would have no effect"):
            checkpoints.load(path, config=config | {"openvla.state_dims": 5}, **given)


def test_headers_are_enough_for_the_codec_that_the_options_describe(plain: Path, words, tmp_path: Path):
    looked = checkpoints.inspect(plain, config=PLAIN | FRONT, tokenizer=words, assets="tiny_no_noops")
    loaded = checkpoints.load(plain, config=PLAIN | FRONT, tokenizer=words, assets="tiny_no_noops")
    assert looked.codec is not None and loaded.codec is not None
    assert looked.codec.config == loaded.codec.config and looked.policy.config == loaded.policy.config
    with pytest.raises(WeightsError, match="lacks a tokenizer"):
        checkpoints.inspect(plain, config=PLAIN | FRONT)


def test_inspect_shows_the_robot_of_a_folder_that_only_statistics_describe(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_word_tokenizer([f"{n} times {n} is {n * n}" for n in range(400)], 500).save(tmp_path / "words")
    options = [part for key, value in PLAIN.items() for part in ("--config", f"{key}={value}")]
    options += ["--config", 'openvla.cameras=["front"]']
    assert main(["inspect", str(plain), *options]) == 2
    assert "lacks a tokenizer" in capsys.readouterr().err
    chosen = ["--tokenizer", str(tmp_path / "words"), "--assets", "tiny_no_noops"]
    assert main(["inspect", str(plain), *options, *chosen]) == 0
    said = capsys.readouterr().out
    assert "cameras  front 42x42" in said and "chunks of 1" in said
    assert main(["inspect", "openvla", "--size", "openvla-tiny", *options[-2:]]) == 2
    assert "openvla.cameras would have no effect: it is for checkpoints" in capsys.readouterr().err


def test_a_folder_with_its_own_tokenizer_needs_assets_and_cameras_but_no_tokenizer(
    plain: Path, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = shutil.copytree(plain, tmp_path / "own")
    options = [part for key, value in PLAIN.items() for part in ("--config", f"{key}={value}")]
    assert main(["inspect", str(own), *options]) == 0
    assert "; policy.tokenizer: openvla/openvla-7b" in capsys.readouterr().out
    words.save(tmp_path / "words")
    shutil.copy(tmp_path / "words" / "tokenizer.json", own)
    assert main(["inspect", str(own), *options]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to train it")]
    assert said.endswith('data.statistics = "data", or policy.config.openvla.cameras')
    assert checkpoints.declaration(own).own_tokenizer == own / "tokenizer.json"


def test_what_only_decides_about_a_codec_does_not_stop_a_forecast_of_the_run(plain: Path):
    """A run on a GPU looks at headers first, with the recipe's config, which names the cameras."""
    given = checkpoints.parse_config(PLAIN | FRONT | {"codec.relative": [True], "lora.rslora": True})
    assert given.of_weights() == {
        "vision": {"dino": {"heads": 2}, "siglip": {"heads": 2}}, "lora": {"rslora": True},
    }  # fmt: skip
    meant = {"vision": {"dino": {"heads": 2}, "siglip": {"heads": 2}}}
    checkpoints.inspect(plain, config=checkpoints.parse_config(PLAIN | FRONT).of_weights())
    assert checkpoints.parse_config(PLAIN | FRONT).of_weights() == meant


def unmerged(folder: Path, base: Path) -> Path:
    """Lay out a run of OFT that is not merged: adapters, and its files beside them."""
    folder.mkdir()
    for file in FILES.values():
        shutil.copy(base / f"{file}.safetensors", folder)
    shutil.copy(base / "dataset_statistics.json", folder)
    adapters(folder / "lora_adapter", base)
    return folder


def test_a_run_that_is_not_merged_has_the_head_and_statistics_beside_its_adapters(
    whole: Path, plain: Path, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = unmerged(tmp_path / "run", whole)
    statistics = json.loads((run / "dataset_statistics.json").read_text())
    (run / "dataset_statistics.json").write_text(json.dumps({"mine": statistics["tiny_no_noops"]}))
    given = {"config": UNTOLD | CAMERAS, "tokenizer": words}
    same = checkpoints.load(run / "lora_adapter", base=whole, config=UNTOLD).policy  # the base has that head
    for path in (run, run / "lora_adapter"):
        loaded = checkpoints.load(path, base=plain, **given)
        assert loaded.codec is not None and loaded.codec.embodiment.name == "mine"
        assert loaded.report.statistics_of == "" and loaded.policy.config.head == "l1"
        for name, value in same.named_parameters():
            assert torch.equal(loaded.policy.get_parameter(name), value), name
    assert f"beside the adapters: {FILES['action_head_l1']}" in loaded.report.text()
    options = [part for key, value in UNTOLD.items() for part in ("--config", f"{key}={value}")]
    assert main(["inspect", str(run), "--base", str(plain), *options]) == 0
    assert "proprio_projector--10_checkpoint.safetensors" in capsys.readouterr().out
    report = checkpoints.load(run, base=whole, config=UNTOLD).report
    assert f"not read, because the adapters have files of their own: {FILES['action_head_l1']}" in str(report)
    write_film(run)
    with pytest.raises(WeightsError, match=r"vision_backbone--10_\w+\.safetensors: FiLM.*merge_lora_weights"):
        checkpoints.load(run, base=plain, config=UNTOLD)


def test_an_export_without_a_codec_says_what_is_missing_and_takes_it(plain: Path, words, tmp_path: Path):
    adapters(tmp_path / "lora_adapter", plain)
    given = {"base": plain, "merge": True, "config": PLAIN}
    made = export(tmp_path / "lora_adapter", "vlafit", tmp_path / "without", **given)
    assert not (tmp_path / "without" / "codec.json").exists()
    assert "no codec.json is written: the checkpoint lacks a tokenizer: give" in made.text()
    assert "vlafit export takes --tokenizer" in made.text()
    words.save(tmp_path / "words")
    command = ["export", str(tmp_path / "lora_adapter"), "--to", "vlafit", "--out", str(tmp_path / "out")]
    command += ["--base", str(plain), "--merge", "--tokenizer", str(tmp_path / "words")]
    for key, value in (PLAIN | {"openvla.cameras": '["front"]'}).items():
        command += ["--config", f"{key}={value}"]
    assert main(command) == 0
    assert checkpoints.load(tmp_path / "out").codec is not None
