"""LeRobot's pi0-FAST folders: read exactly, damage caught, written back, adapters put on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlafit
from tests.checkpoints.pi0_fast_folder import RECORDED, TOLD, edit, step_of, write_folder
from tests.policies.test_pi0_fast import CONFIG
from tests.tuning.world import rules
from vlafit import checkpoints
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.checkpoints.formats.lerobot.names import PI0_FAST as NAMES
from vlafit.checkpoints.loaded import Loaded
from vlafit.codec import Codec
from vlafit.errors import CodecError, WeightsError
from vlafit.nn.batch import stack
from vlafit.nn.rng import sample_rng
from vlafit.policies import pi0_fast
from vlafit.types import Observation, Sample

META = json.loads((RECORDED / "meta.json").read_text())
IO = load_file(RECORDED / "io.safetensors")
CAMERAS = ("cam_high", "cam_wrist")
HEAD, EMBEDDING = NAMES.file_name("lm_head.weight"), NAMES.file_name("language.embed_tokens.weight")
WIDE = {"state_dim": 32, "action_dim": 32, "tied": False}  # to which LeRobot pads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody may change it."""
    return write_folder(tmp_path_factory.mktemp("pi0_fast") / "checkpoint")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def opened(folder: Path) -> Loaded:
    return vlafit.load_checkpoint(folder, config=TOLD)


def codec_in(loaded: Loaded) -> Codec:
    assert loaded.codec is not None, loaded.report.codec
    return loaded.codec


def seen(i: int) -> Observation:
    images = {
        name: (IO[f"raw.observation.images.{name}"][i] * 255).round().byte().permute(1, 2, 0).numpy()
        for name in CAMERAS
    }
    return Observation(images, IO["raw.observation.state"][i].numpy(), META["tasks"][i])


def samples() -> list[Sample]:
    every = range(2)
    return [Sample(seen(i), IO["raw.action"][i].numpy(), np.ones(10, bool), ("", "", i)) for i in every]


# -------------------------------------------------------------------------------------------------- reading


def test_a_folder_of_lerobot_is_read_tensor_for_tensor(opened: Loaded):
    assert opened.policy.config == replace(CONFIG, **WIDE)
    assert (opened.report.form, opened.report.family, opened.report.unused) == ("LeRobot", "pi0_fast", ())
    theirs = load_file(RECORDED / "model.safetensors")
    ours = {NAMES.file_name(name): p for name, p in opened.policy.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parity
def test_its_codec_writes_the_recorded_prompts_states_and_action_tokens(opened: Loaded):
    batch = stack([codec_in(opened).encode(sample) for sample in samples()])
    assert torch.equal(batch.tokens, IO["batch.observation.language.tokens"])
    assert torch.equal(batch.token_mask, IO["batch.observation.language.attention_mask"])
    torch.testing.assert_close(batch.state[:, :7], IO["batch.observation.state"], atol=1e-6, rtol=1e-6)
    assert batch.actions is not None and batch.target_mask is not None
    torch.testing.assert_close(batch.actions[..., :6], IO["batch.action"], atol=1e-6, rtol=1e-6)
    assert torch.equal(batch.target_tokens, IO["batch.action.tokens"])
    assert torch.equal(batch.target_mask, IO["batch.action.token_mask"])
    assert batch.target_mask.sum(1).tolist() == META["action_token_counts"]
    words = codec_in(opened).required_tokenizer
    decoded = [words.decode(t[m].tolist()) for t, m in zip(batch.tokens, batch.token_mask, strict=True)]
    assert decoded == META["prompts"]
    for slot, name in enumerate(CAMERAS):
        # Half a grey level is lost on the way in, and half on the way out.
        difference = batch.images[:, slot] / 255 * 2 - 1 - IO[f"core.image.{name}"]
        assert difference.abs().max() < 1.01 * 2 / 255


@pytest.mark.parity
def test_an_overfit_checkpoint_answers_with_the_recorded_actions(tmp_path: Path):
    loaded = vlafit.load_checkpoint(write_folder(tmp_path / "overfit", "overfit"), config=TOLD)
    codec = codec_in(loaded)
    batch = replace(
        stack([codec.encode(seen(i)) for i in range(2)]),
        images=torch.stack([IO[f"core.image.{name}"] for name in CAMERAS], 1),
    )
    tokens = loaded.policy.act(batch, sample_rng([(0, 0), (0, 1)], seed=0))
    assert loaded.policy.config.tied is False
    for i in range(2):
        chunk, valid = codec.detokenise(tokens[i].numpy())
        assert valid
        np.testing.assert_allclose(chunk[:, :6], IO["overfit.predict_action_chunk"][i], atol=1e-6)
        robot = codec.decode(chunk.astype(np.float32), seen(i)).actions
        np.testing.assert_allclose(robot, IO["overfit.actions_unnormalised"][i], atol=1e-6)


@pytest.mark.parity
def test_loss_and_gradient_through_the_codec_are_the_recorded_ones(opened: Loaded):
    batch = replace(
        stack([codec_in(opened).encode(sample) for sample in samples()]),
        images=torch.stack([IO[f"core.image.{name}"] for name in CAMERAS], 1),
    )
    opened.policy.zero_grad()
    loss = opened.policy.loss(batch, sample_rng([(0, 0), (0, 1)], seed=0))["token"]
    loss = loss / opened.policy.counts(batch, 1)["token"]
    torch.testing.assert_close(loss, IO["out.loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    squares = sum(float(p.grad.square().sum()) for p in opened.policy.parameters() if p.grad is not None)
    assert squares**0.5 == pytest.approx(META["grad_norm_total"], rel=1e-4)


def test_a_base_of_the_hub_has_other_names_and_may_hold_the_output_layer_alone(copy: Path):
    path = copy / "model.safetensors"
    theirs = {name.removeprefix("model."): t for name, t in load_file(path).items()}
    save_file(theirs, path)
    assert vlafit.load_policy(copy, TOLD).config.tied is False
    del theirs[EMBEDDING.removeprefix("model.")]
    save_file(theirs, path)
    loaded = vlafit.load_checkpoint(copy, TOLD)
    assert loaded.policy.config.tied and loaded.report.tied == (HEAD.removeprefix("model."),)
    head = theirs[HEAD.removeprefix("model.")]
    assert torch.equal(loaded.policy.get_parameter("language.embed_tokens.weight"), head)
    (copy / "config.json").unlink()  # without it these may be the weights of PaliGemma
    with pytest.raises(WeightsError, match="PaliGemma"):
        vlafit.load_policy(copy, TOLD)


def test_names_of_torch_compile_are_read_and_two_of_one_tensor_are_refused(copy: Path):
    theirs = load_file(copy / "model.safetensors")
    theirs[HEAD.replace("model.", "model._orig_mod.", 1)] = theirs.pop(HEAD)
    save_file(theirs, copy / "model.safetensors")
    vlafit.load_policy(copy, TOLD)
    save_file({**theirs, HEAD: torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(WeightsError, match="_orig_mod"):
        vlafit.load_policy(copy, TOLD)


# ------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda v: v.update(type="pi0"), "type 'pi0'.*pi0_fast"),
        ("config.json", lambda v: v.update(fast_skip_tokens=0), "fast_skip_tokens is 0"),
        ("config.json", lambda v: v.update(action_tokenizer_name="other"), "'other'.*contradict"),
        ("config.json", lambda v: v.update(max_action_tokens=40), "max_action_tokens is 40, and 48"),
        ("config.json", lambda v: v.update(tokenizer_max_length=50), "tokenizer_max_length is 50"),
        ("config.json", lambda v: v.update(paligemma_variant="gemma_2b"), "language.width is 64.*gemma_2b"),
        ("config.json", lambda v: v.update(image_resolution=[28, 56]), "only squares"),
        (
            "policy_preprocessor.json",
            lambda v: v["steps"].insert(3, v["steps"].pop(4)),
            "before it is normal",
        ),
        ("policy_preprocessor.json", lambda v: v["steps"].insert(3, v["steps"].pop(6)), "not normalised"),
        (
            "policy_preprocessor.json",
            lambda v: step_of(v, "action_tokenizer_processor").update(fast_skip_tokens=1),
            "fast_skip_tokens is 1",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step_of(v, "action_tokenizer_processor").update(action_tokenizer_name=3),
            "action_tokenizer_name is 'fast_tokenizer'.*3",
        ),
    ],
)
def test_what_contradicts_or_cannot_be_repeated_is_an_error_that_names_it(
    copy: Path, file: str, change: Callable[[dict[str, Any]], object], said: str
):
    edit(copy / file, change)
    with pytest.raises(WeightsError, match=f"(?s){said}"):
        vlafit.load_checkpoint(copy, TOLD)


def test_without_its_action_tokenizer_it_has_no_codec_and_says_where_to_put_it(copy: Path):
    for name in ("tokenizer.json", "processor_config.json"):
        text = (copy / "fast_tokenizer" / name).read_text()
        (copy / "fast_tokenizer" / name).write_text(text[:50])
        with pytest.raises(CodecError, match="fast_tokenizer: not a readable FAST action tokenizer"):
            vlafit.load_checkpoint(copy, TOLD)
        (copy / "fast_tokenizer" / name).write_text(text)
    shutil.rmtree(copy / "fast_tokenizer")
    loaded = vlafit.load_checkpoint(copy, TOLD)
    assert loaded.codec is None
    assert all(text in loaded.report.codec for text in ("'fast_tokenizer'", str(copy / "fast_tokenizer")))


def test_a_text_tokenizer_that_is_only_named_is_found_in_the_folder_by_the_last_part_of_its_name(copy: Path):
    def name(value: str) -> None:
        def change(values: dict) -> None:
            for step in values["steps"]:
                if step["registry_name"] == "tokenizer_processor":
                    step.pop("artifacts", None)
                    step["config"]["tokenizer_name"] = value

        edit(copy / "policy_preprocessor.json", change)

    for named in ("text_tokenizer", "somebody/text_tokenizer", "/home/somebody/text_tokenizer"):
        name(named)
        assert vlafit.load_checkpoint(copy, TOLD).codec is not None
        declared = checkpoints.declaration(copy)
        assert (declared.own_tokenizer, declared.tokenizer) == (copy / "text_tokenizer", "")
    for named in ("google/paligemma-3b-pt-224", "..", "."):
        name(named)
        loaded = vlafit.load_checkpoint(copy, TOLD)
        assert loaded.codec is None and f"its tokenizer {named!r} is not in the folder" in loaded.report.codec


def test_special_tokens_of_another_tokenizer_are_an_error_with_the_keys_to_set(copy: Path):
    config = copy / "text_tokenizer" / "tokenizer_config.json"
    edit(config, lambda values: values.update(bos_token="<eos>", eos_token="<bos>"))
    with pytest.raises(WeightsError, match="--config bos=1 --config eos=2"):
        vlafit.load_checkpoint(copy, TOLD)
    assert codec_in(vlafit.load_checkpoint(copy, TOLD | {"bos": 1, "eos": 2}))


def test_where_lerobot_decodes_otherwise_a_note_says_so(copy: Path):
    edit(copy / "config.json", lambda values: values.update(n_action_steps=5, max_decoding_steps=20))
    notes = vlafit.load_checkpoint(copy, TOLD).report.notes
    (note,) = [note for note in notes if "n_action_steps" in note]
    assert all(text in note for text in ("n_action_steps is 5", "chunks of 10", "--replan 5"))
    assert any("max_decoding_steps is 20" in note and "48" in note for note in notes)


# ------------------------------------------------------------------------------------------------- writing


def answers(loaded: Loaded) -> Tensor:
    return loaded.policy.logits(stack([codec_in(loaded).encode(sample) for sample in samples()]))


def test_what_is_written_back_is_the_same_checkpoint(opened: Loaded, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lerobot_export, "size_refusals", lambda policy: [])  # no tiny size has a name
    checkpoints.save(opened.policy, tmp_path / "native", opened.codec)
    export(tmp_path / "native", "lerobot", tmp_path / "out")
    again = tmp_path / "out"
    edit(again / "config.json", lambda values: values.update(paligemma_variant="tiny"))
    loaded = vlafit.load_checkpoint(again, TOLD)
    assert loaded.policy.config == opened.policy.config
    assert codec_in(loaded).config == codec_in(opened).config
    assert load_file(again / "model.safetensors").keys() == load_file(RECORDED / "model.safetensors").keys()
    assert torch.equal(answers(loaded), answers(opened))
    stated = json.loads((RECORDED / "config.json").read_text())
    wrote = json.loads((again / "config.json").read_text())
    places = ("text_tokenizer_name", "action_tokenizer_name", "paligemma_variant", "action_expert_variant")
    read = (
        *("type", "chunk_size", "max_state_dim", "max_action_dim", "max_action_tokens", "temperature"),
        *("tokenizer_max_length", "max_decoding_steps", "fast_skip_tokens", "image_resolution"),
        *("input_features", "output_features", "normalization_mapping", "use_relative_actions"),
    )
    assert {key: wrote[key] for key in read} == {key: stated[key] for key in read}
    assert set(places) <= set(wrote) and wrote["action_tokenizer_name"] == str(again / "action_tokenizer")
    assert (again / "action_tokenizer" / "processing_action_tokenizer.py").is_file()


def test_a_tied_policy_is_written_with_both_tensors_and_rules_of_openpi_are_refused(opened: Loaded):
    policy = opened.policy
    assert "gemma_2b" in " ".join(lerobot_export.refusals(policy, opened.codec))
    tied = pi0_fast.build(replace(policy.config, tied=True), "cpu")
    wrote = lerobot_export._tensors(tied)
    assert (
        torch.equal(wrote[HEAD], wrote[EMBEDDING]) and wrote[HEAD].data_ptr() != wrote[EMBEDDING].data_ptr()
    )
    other_rules = pi0_fast.build(replace(policy.config, rules="openpi"), "meta")
    assert any("begins the action part" in reason for reason in lerobot_export.refusals(other_rules, None))


def test_adapters_go_out_as_a_peft_folder_and_come_back(tmp_path: Path, monkeypatch, copy: Path):
    monkeypatch.setattr(lerobot_export, "size_refusals", lambda policy: [])
    loaded = vlafit.load_checkpoint(copy, TOLD)
    head = {"select": {"pattern": "lm_head.*"}, "mode": "full"}
    plan = vlafit.apply_strategy(loaded.policy, [head, *rules("lora")[1:]])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in loaded.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    checkpoints.save(loaded.policy, tmp_path / "native", loaded.codec, plan=plan)
    export(tmp_path / "native", "lerobot", tmp_path / "out")
    for path in (tmp_path / "out").rglob("config.json"):
        edit(path, lambda values: values.update(paligemma_variant="tiny"))
    again = vlafit.load_checkpoint(tmp_path / "out", TOLD)
    torch.testing.assert_close(answers(again), answers(loaded), atol=1e-5, rtol=1e-5)
    bare = vlafit.load_checkpoint(copy, TOLD)
    assert (answers(bare) - answers(loaded)).abs().max() > 1e-2  # the adapters have a say
