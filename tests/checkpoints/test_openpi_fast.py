"""openpi's pi0-FAST in Orbax folders: every leaf finds its place, and the recorded losses come out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

import vlafit
from tests.checkpoints.orbax_folder import write_orbax
from tests.checkpoints.pi0_fast_folder import RECORDED
from tests.checkpoints.test_openpi_jax import LAYOUTS, _full_size
from tests.policies.test_pi0_fast import loaded, loss_of, openpi, rng
from vlafit.checkpoints.export import write
from vlafit.checkpoints.formats.openpi import jax as openpi_jax
from vlafit.checkpoints.formats.openpi import write as openpi_export
from vlafit.checkpoints.formats.openpi import write_jax
from vlafit.checkpoints.formats.openpi.orbax import open_leaves
from vlafit.checkpoints.infer import infer_config
from vlafit.codec import Codec
from vlafit.errors import CodecError
from vlafit.nn.batch import Batch
from vlafit.policies import pi0_fast
from vlafit.types import Observation, Sample

TOLD = {"chunk": 10, "max_tokens": 64, "action_tokens": 48, "vision.image_size": 28}
IMG, LLM = "PaliGemma/img", "PaliGemma/llm"
BLOCK = f"{IMG}/Transformer/encoderblock"
MHA = f"{BLOCK}/MultiHeadDotProductAttention_0"


def tree() -> dict[str, Tensor]:
    """The recorded weights as openpi's tree holds them, turned by hand."""
    w = {name: p.detach() for name, p in loaded(tied=True, rules="openpi").named_parameters()}

    def stack(name: str, depth: int) -> Tensor:
        return torch.stack([w[name.format(i)] for i in range(depth)])

    def vision(name: str) -> Tensor:
        return stack(f"vision.layers.{{}}.{name}", 2)

    def language(name: str) -> Tensor:
        return stack(f"language.layers.{{}}.{name}.weight", 3)

    made = {
        f"{IMG}/embedding/kernel": rearrange(w["vision.patch_embedding.weight"], "d c h w -> h w c d"),
        f"{IMG}/embedding/bias": w["vision.patch_embedding.bias"],
        f"{IMG}/pos_embedding": w["vision.position_embedding.weight"][None],
        f"{IMG}/head/kernel": w["projector.weight"].T,
        f"{IMG}/head/bias": w["projector.bias"],
        f"{IMG}/Transformer/encoder_norm/scale": w["vision.post_layernorm.weight"],
        f"{IMG}/Transformer/encoder_norm/bias": w["vision.post_layernorm.bias"],
        f"{LLM}/embedder/input_embedding": w["language.embed_tokens.weight"],
        f"{LLM}/final_norm/scale": w["language.norm.weight"],
        f"{LLM}/layers/pre_attention_norm/scale": language("input_layernorm"),
        f"{LLM}/layers/pre_ffw_norm/scale": language("post_attention_layernorm"),
        f"{LLM}/layers/mlp/linear": language("mlp.down_proj").transpose(1, 2),
        f"{LLM}/layers/mlp/gating_einsum": torch.stack(
            [language("mlp.gate_proj").transpose(1, 2), language("mlp.up_proj").transpose(1, 2)], 1
        ),
        f"{LLM}/layers/attn/q_einsum/w": rearrange(language("self_attn.q_proj"), "l (n h) d -> l n d h", n=8),
        f"{LLM}/layers/attn/kv_einsum/w": torch.stack(
            [language(f"self_attn.{n}_proj").transpose(1, 2)[:, None] for n in "kv"], 1
        ),
        f"{LLM}/layers/attn/attn_vec_einsum/w": rearrange(
            language("self_attn.o_proj"), "l d (n h) -> l n h d", n=8
        ),
    }
    for i in (0, 1):
        made[f"{BLOCK}/LayerNorm_{i}/scale"] = vision(f"layer_norm{i + 1}.weight")
        made[f"{BLOCK}/LayerNorm_{i}/bias"] = vision(f"layer_norm{i + 1}.bias")
        made[f"{BLOCK}/MlpBlock_0/Dense_{i}/kernel"] = vision(f"mlp.fc{i + 1}.weight").transpose(1, 2)
        made[f"{BLOCK}/MlpBlock_0/Dense_{i}/bias"] = vision(f"mlp.fc{i + 1}.bias")
    for name in ("query", "key", "value"):
        ours = f"self_attn.{name[0]}_proj"
        made[f"{MHA}/{name}/kernel"] = rearrange(vision(f"{ours}.weight"), "l (n h) d -> l d n h", n=4)
        made[f"{MHA}/{name}/bias"] = rearrange(vision(f"{ours}.bias"), "l (n h) -> l n h", n=4)
    made[f"{MHA}/out/kernel"] = rearrange(vision("self_attn.out_proj.weight"), "l d (n h) -> l n h d", n=4)
    made[f"{MHA}/out/bias"] = vision("self_attn.out_proj.bias")
    return {f"params/{name}": tensor.contiguous() for name, tensor in made.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of openpi's with statistics; nobody may change it."""
    made = tmp_path_factory.mktemp("openpi_fast") / "checkpoint"
    write_orbax(made / "params", tree())
    (made / "assets" / "arm").mkdir(parents=True)
    width = {"state": 7, "actions": 6}
    statistics = {
        name: {"mean": [0.0] * n, "std": [1.0] * n, "q01": [-2.0] * n, "q99": [1.5] * n}
        for name, n in width.items()
    }
    (made / "assets" / "arm" / "norm_stats.json").write_text(json.dumps({"norm_stats": statistics}))
    return made


def test_the_recorded_tree_is_the_one_that_openpi_lists():
    listed = json.loads((RECORDED / "jax_tree.json").read_text())
    ours = {name.removeprefix("params/"): list(tensor.shape) for name, tensor in tree().items()}
    assert ours == listed


@pytest.mark.parity
def test_every_leaf_finds_its_place_and_the_recorded_losses_come_out(folder: Path):
    loaded_again = vlafit.load_checkpoint(folder, TOLD)
    policy, wanted = loaded_again.policy, loaded(tied=True, rules="openpi")
    assert (loaded_again.report.form, loaded_again.report.family) == ("openpi JAX", "pi0_fast")
    assert policy.config == replace(wanted.config, state_dim=32, action_dim=32)
    for name, parameter in wanted.named_parameters():
        assert torch.equal(policy.get_parameter(name), parameter), name
    batch, io = openpi("openpi_order")
    batch.state = torch.nn.functional.pad(batch.state, (0, 25))
    for row in range(2):
        one = Batch(**{name: value[row : row + 1] for name, value in batch.present().items()})
        assert loss_of(policy, one).item() == pytest.approx(io["loss_per_sample"][row].item(), abs=1e-4)


def test_the_full_size_tree_maps_one_to_one_onto_the_public_size(monkeypatch: pytest.MonkeyPatch):
    full = _full_size(monkeypatch, "pi0_fast")
    assert full.family == "pi0_fast"
    policy = pi0_fast.build(pi0_fast.SIZES["pi0-fast"], "meta")
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    assert {name: t.shape for name, t in full.weights.items()} == shapes
    inferred = infer_config("pi0_fast", full.weights, full.evidence, {}, "here")
    assert (inferred.config, inferred.conflicts) == (policy.config, ())


def test_statistics_text_and_action_tokenizer_make_the_codec(folder: Path):
    given = TOLD | {"codec.action_tokenizer": str(RECORDED / "fast_tokenizer")}
    opened = vlafit.load_checkpoint(folder, given, tokenizer=RECORDED / "text_tokenizer")
    codec = opened.codec
    assert isinstance(codec, Codec) and codec.action_text is not None
    assert codec.config.normalisation == "quantile" and codec.config.prompt == "pi0_fast"
    assert codec.config.cameras == ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    frame = np.zeros((28, 28, 3), np.uint8)
    view = Observation({"base_0_rgb": frame}, np.zeros(7, np.float32), "Pick_up the Block ")
    actions = np.linspace(-1, 1, 60, dtype=np.float32).reshape(10, 6)
    encoded = codec.encode(Sample(view, actions, np.ones(10, bool), ("", "", 0)))
    assert encoded.tokens is not None and encoded.target_tokens is not None
    text = codec.required_tokenizer.decode(encoded.tokens[encoded.token_mask].tolist())
    # 0 between -2 and 1.5: 2 / 3.5 of 256 bins
    assert text == "Task: pick up the block, State: " + " ".join(["146"] * 7) + ";\n"
    chunk, valid = codec.detokenise(encoded.target_tokens)
    assert valid
    # Half a step of each of 10 coefficients, orthonormal: 0.05 * sqrt(10) at most of a range of 1.75.
    decoded = codec.decode(chunk.astype(np.float32), view).actions
    np.testing.assert_allclose(decoded, actions, atol=1.75 * 0.05 * 10**0.5)


def test_an_action_tokenizer_that_is_not_there_is_an_error_with_the_key_to_set(folder: Path, tmp_path: Path):
    given = TOLD | {"codec.action_tokenizer": str(tmp_path)}
    with pytest.raises(CodecError, match=r"tokenizer.json is missing.*codec.action_tokenizer=FOLDER"):
        vlafit.load_checkpoint(folder, given, tokenizer=RECORDED / "text_tokenizer")


def test_a_missing_camera_is_seen_as_a_black_image_where_openpi_trained_it():
    batch, _ = openpi("openpi_order")
    black = replace(batch, image_mask=batch.image_mask.clone())
    batch.image_mask[:, 1] = False
    batch.images[:, 1] = black.images[:, 1] = -1.0
    for rules, same in (("openpi", True), ("lerobot", False)):
        policy = loaded(rules=rules)
        masked, seen = (policy.loss(one, rng())["token"].item() for one in (batch, black))
        assert (masked == seen) is same, rules


def test_the_tree_that_is_written_is_the_one_turned_by_hand_and_reads_back_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = TOLD | {"codec.action_tokenizer": str(RECORDED / "fast_tokenizer")}
    opened = vlafit.load_checkpoint(folder, given, tokenizer=RECORDED / "text_tokenizer")
    monkeypatch.setattr(openpi_export, "size_refusals", lambda policy: [])  # no tiny size has a name
    made = write(opened.policy, opened.codec, "openpi", tmp_path / "out", "here")
    leaves = {name: leaf.read() for name, leaf in open_leaves(made.folder / "params").items()}
    assert leaves.keys() == tree().keys()
    assert all(torch.equal(leaves[name], tensor) for name, tensor in tree().items())
    notes = " ".join(made.notes)
    assert "Pi0FASTConfig(action_dim=6, action_horizon=10, max_token_len=112)" in notes
    assert "has 256 tokens: give openpi's FASTTokenizer" in notes
    given = {key: value for key, value in given.items() if key != "chunk"}  # config.json has it
    given["codec.action_tokenizer"] = str(made.folder / "action_tokenizer")
    again = vlafit.load_checkpoint(made.folder, given, tokenizer=RECORDED / "text_tokenizer")
    assert again.policy.config == opened.policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in opened.policy.named_parameters())
    assert isinstance(opened.codec, Codec) and isinstance(again.codec, Codec)
    for column in ("state", "action"):
        one, other = (codec.statistics[column] for codec in (opened.codec, again.codec))
        np.testing.assert_allclose(one.q01, other.q01, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.q99, other.q99, rtol=0, atol=1e-6)


def test_bfloat16_is_written_as_it_is(tmp_path: Path):
    policy = loaded(tied=True, rules="openpi").to(torch.bfloat16)
    write_jax.write_params(tmp_path / "params", policy)
    leaves = open_leaves(tmp_path / "params")
    assert {leaf.dtype for leaf in leaves.values()} == {"bfloat16"}
    name = f"params/{LLM}/embedder/input_embedding"
    assert torch.equal(leaves[name].read(), policy.language.embed_tokens.weight)


def test_the_full_size_tree_that_is_written_has_the_leaves_that_openpi_publishes():
    config = pi0_fast.SIZES["pi0-fast"]
    weights = dict(pi0_fast.build(config, "meta").named_parameters())
    made = {}
    for name, layers in write_jax.tree(config, weights).items():
        stack = [len(layers)] if openpi_jax.RULES[name].layered else []
        made[name] = [*stack, *layers[0].shape]
    assert made == LAYOUTS["pi0_fast"]["leaves"]
