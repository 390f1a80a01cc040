"""What goes out comes back: identical tensors, the same inputs, the same outputs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vlafit
from tests.checkpoints.test_lerobot import FIXTURE, RAW, TASKS, robot_view
from tests.policies.tiny import random_batch, random_draws, random_policy
from vlafit import checkpoints
from vlafit.agreement import Party, agree
from vlafit.checkpoints.changes import answers
from vlafit.checkpoints.export import export, write
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.checkpoints.formats.lerobot import write_config as lerobot_config
from vlafit.checkpoints.formats.lerobot import write_processors as lerobot_pipelines
from vlafit.checkpoints.formats.lerobot.read_processors import read as read_codec
from vlafit.checkpoints.formats.openpi import write as openpi_export
from vlafit.codec import Codec, CodecConfig, fast, train_word_tokenizer
from vlafit.codec.action_text import ActionTokenConfig
from vlafit.codec.normaliser import Normalisation, Normaliser
from vlafit.codec.prompts import Prompt
from vlafit.errors import WeightsError
from vlafit.nn.rng import sample_rng
from vlafit.policies import pi0, pi0_fast, smolvla
from vlafit.recipe import AdaptRecipe
from vlafit.types import Embodiment, Feature, Observation, Sample

GIVEN = {"vision.heads": 2, "language.head_dim": 8}
TOO_SMALL = {"expert.mlp": 20}  # LeRobot would make it wider, so a file of it is only believed if one says so


def robot(side: int = 8) -> Embodiment:
    return Embodiment(
        name="arm",
        cameras=(Feature("top", (side, side, 3)), Feature("wrist", (side, side, 3))),
        state=Feature("state", (4,)),
        action=Feature("action", (3,), labels=("x", "gripper", "y")),
        hz=10.0,
        control="position",
    )


def codec_for(
    policy, normalisation: Normalisation = "mean_std", relative=(), prompt: Prompt | None = None
) -> Codec:
    """A codec fitted by us, with a dimension that hardly moves and one that never does."""
    needs, rng = policy.needs(), np.random.default_rng(0)
    states, actions = rng.normal(3.0, 2.0, (200, 4)), rng.normal(0.0, 0.2, (200, 3))
    states[:, 1], actions[:, 2], actions[7, 2] = 5.0, 0.0, 40.0
    prompt = prompt or needs.prompt
    words = ["pick up the red block", "open_the drawer", "Task: , State: -1 0 7 255;\nAction: "]
    config = CodecConfig(
        ("top", "", "wrist"),
        needs.image_size,
        needs.state_dim,
        needs.action_dim,
        needs.chunk,
        normalisation=normalisation,
        relative=relative,
        prompt=prompt,
        max_tokens=needs.max_tokens,
        framing=needs.framing,
    )
    return Codec.fit(config, robot(needs.image_size), states, actions, train_word_tokenizer(words, 300))


def sample_of(codec: Codec, instruction: str = "pick up the red block") -> Sample:
    rng, side = np.random.default_rng(1), codec.config.image_size
    images = {name: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for name in ("top", "wrist")}
    observation = Observation(images, rng.normal(3.0, 2.0, 4).astype(np.float32), instruction)
    actions = rng.normal(0, 1, (codec.config.chunk, 3)).astype(np.float32)
    return Sample(observation, actions, np.ones(len(actions), bool), ("", "", 0))


def roomy(size: str):
    """A tiny policy whose prompts may be long enough for our byte-level tokens."""
    config = {**pi0.SIZES, **smolvla.SIZES}[size]
    return random_policy(replace(config, max_tokens=64))


# ---------------------------------------------------------------------------------------------- LeRobot


def test_the_fixture_exports_to_the_config_the_processors_and_the_keys_it_had(tmp_path: Path):
    loaded = vlafit.load_checkpoint(FIXTURE)
    lerobot_export.write(tmp_path, loaded.policy, loaded.codec)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (tmp_path, FIXTURE))
    assert theirs.pop("vlm_model_name") == "tiny_vlm" and ours.pop("vlm_model_name") == "vlm"
    for key in ours:  # ours has no opinion on how to train
        assert ours[key] == theirs[key], key
    left = {key for key in theirs if key not in ours}
    assert all(
        key.startswith(("optimizer_", "scheduler_", "rtc_", "compile_", "pretrained_")) for key in left
    )
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((FIXTURE / name).read_text())
    with (
        safe_open(FIXTURE / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "model.safetensors", "pt") as two,
    ):
        assert set(one.keys()) == set(two.keys())
        for key in one.keys():  # noqa: SIM118 - a handle, not a dict
            assert "lm_head" in key or torch.equal(one.get_tensor(key), two.get_tensor(key))
    name = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    statistics, recorded = load_file(tmp_path / name), load_file(FIXTURE / name)
    assert statistics and all(torch.equal(value, recorded[key]) for key, value in statistics.items())


def test_an_exported_smolvla_loads_again_and_acts_the_same(tmp_path: Path):
    one = vlafit.load_checkpoint(FIXTURE)
    lerobot_export.write(tmp_path, one.policy, one.codec)
    two = vlafit.load_checkpoint(tmp_path)
    assert one.policy.config == two.policy.config
    assert all(torch.equal(p, two.policy.get_parameter(n)) for n, p in one.policy.named_parameters())
    assert one.codec is not None and two.codec is not None
    assert (one.codec.config, one.codec.embodiment) == (two.codec.config, two.codec.embodiment)
    for i, task in enumerate(TASKS):
        here, there = (c.encode(robot_view(i, RAW, task)) for c in (one.codec, two.codec))
        assert np.array_equal(here.tokens, there.tokens) and np.array_equal(here.state, there.state)


@pytest.mark.parametrize("normalisation", ["mean_std", "quantile"])
@pytest.mark.parametrize("size", ["pi0-tiny", "pi05-tiny", "smolvla-tiny"])
def test_what_we_fitted_ourselves_means_the_same_in_lerobot(
    tmp_path: Path, size: str, normalisation: Normalisation
):
    policy = roomy(size)
    codec = codec_for(policy, normalisation, relative=() if "smolvla" in size else (True, False, True))
    assert lerobot_pipelines.codec_refusals(codec, lerobot_export.kind_of(policy)) == []
    lerobot_export.write(tmp_path, policy, codec)
    again = vlafit.load_checkpoint(tmp_path, config=GIVEN | TOO_SMALL if "smolvla" in size else GIVEN)
    assert again.policy.config == policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    assert again.codec is not None
    sample = sample_of(codec)
    one, two = codec.encode(sample), again.codec.encode(sample)
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.token_mask, two.token_mask)
    np.testing.assert_allclose(one.state, two.state, atol=2e-5, rtol=1e-5)  # statistics in float32
    np.testing.assert_allclose(one.actions, two.actions, atol=2e-5, rtol=1e-5)
    order = [again.codec.config.cameras.index(name) for name in codec.config.cameras]
    assert np.array_equal(one.images, two.images[order])
    assert np.array_equal(one.image_mask, two.image_mask[order])
    out = np.random.default_rng(2).normal(0, 1, one.actions.shape).astype(np.float32)
    here, there = (c.decode(out, sample.observation).actions for c in (codec, again.codec))
    np.testing.assert_allclose(here, there, atol=2e-5)


def test_openpis_cleaning_of_instructions_goes_into_the_exported_tokenizer(tmp_path: Path):
    policy = roomy("pi0-tiny")
    codec = codec_for(policy)
    lerobot_export.write(tmp_path, policy, codec)
    again, _ = read_codec(tmp_path, policy.needs())
    assert again is not None
    for text in ("open_the drawer", "pick up the red block"):
        one, two = (c.encode(sample_of(codec, text)) for c in (codec, again))
        assert np.array_equal(one.tokens, two.tokens)


@pytest.mark.parametrize("relative", [(True, False, True), (True, True, True), (False, False, True), ()])
def test_relative_dimensions_survive(tmp_path: Path, relative: tuple[bool, ...]):
    policy = roomy("pi0-tiny")
    lerobot_export.write(tmp_path, policy, codec_for(policy, relative=relative))
    again, _ = read_codec(tmp_path, policy.needs())
    assert again is not None and again.config.relative == relative


NAMES = {
    "names that tell the mask": (("x", "gripper", "y"), (True, False, True)),
    "a name within another": (("grip", "gripper", "y"), (False, True, True)),  # an export makes up names
    "no names": ((), (True, False, True)),
    "all relative": (("x", "gripper", "y"), (True, True, True)),
    "absolute": (("x", "gripper", "y"), ()),
}


@pytest.mark.case(
    section="checkpoints",
    report="an exported policy moves to wrong places",
    user_has="a run with relative actions, exported to LeRobot and fine-tuned again",
    now="its processors carry the mask, and the reopened folder agrees with the same card only",
)
@pytest.mark.parametrize("case", NAMES)
def test_an_exported_folder_agrees_with_the_card_that_its_run_had(tmp_path: Path, case: str):
    labels, mask = NAMES[case]
    policy = roomy("pi0-tiny")
    codec = codec_for(policy, relative=mask)
    own = replace(codec.embodiment, action=replace(codec.embodiment.action, labels=labels))
    codec = Codec(codec.config, own, codec.statistics, codec.tokenizer)
    lerobot_export.write(tmp_path, policy, codec)
    declared = checkpoints.declaration(tmp_path)
    assert declared.relative == mask and declared.overruled == () and declared.slots == ("top", "wrist", "")
    assert declared.embodiment is not None
    assert declared.embodiment.action.labels == (labels if case != "a name within another" else ())
    there = Party("checkpoint", "exported", declared.embodiment, declared.relative, declared.slots)
    for relative in {mask, (), (True, True, True)}:
        agreement = agree(Party("dataset", "own", own, relative), there, AdaptRecipe(), fresh_statistics=True)
        wrong = [] if relative == mask else ["relative actions"]
        assert [item.name for item in agreement.conflicts] == wrong


def test_the_smallest_pi0_that_lerobot_can_name_takes_relative_actions():
    public = pi0.SIZES["pi0"]  # gemma_300m for both: 1.3 billion weights, too many to write in a test
    sizes = {
        name: getattr(public.expert, name) for name in vars(public.expert) if hasattr(public.language, name)
    }
    small = replace(public, language=replace(public.language, **sizes))
    policy = pi0.build(small, "meta")
    assert lerobot_export.refusals(policy, codec_for(policy, relative=(True, False, True))) == []
    config = lerobot_config.describe(policy, codec_for(policy, relative=(True, False, True)), "pi0")
    assert (config["paligemma_variant"], config["action_expert_variant"]) == ("gemma_300m", "gemma_300m")
    assert config["use_relative_actions"] and config["relative_exclude_joints"] == ["gripper"]


def test_the_public_smolvla_is_written_as_the_model_that_lerobot_knows():
    policy = smolvla.build(smolvla.SIZES["smolvla"], "meta")
    assert lerobot_config.size_refusals(policy) == []
    config = lerobot_config.describe(policy, codec_for(policy), "smolvla")
    assert config["vlm_model_name"] == "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    assert (config["num_vlm_layers"], config["expert_width_multiplier"]) == (16, 0.75)


def test_the_public_sizes_of_pi0_have_their_names():
    for name in ("pi0", "pi05"):
        policy = pi0.build(pi0.SIZES[name], "meta")
        assert lerobot_config.size_refusals(policy) == openpi_export.refusals(policy, None) == []
        config = lerobot_config.describe(policy, codec_for(policy), name)
        assert (config["paligemma_variant"], config["action_expert_variant"]) == ("gemma_2b", "gemma_300m")


# ----------------------------------------------------------------------------------------------- openpi


@pytest.mark.parametrize("size", ["pi0-tiny", "pi05-tiny"])
def test_openpis_form_loads_again_with_the_same_statistics(tmp_path: Path, size: str):
    policy = random_policy(replace(pi0.SIZES[size], state_dim=5, max_tokens=64))
    codec = codec_for(policy, "quantile" if policy.config.pi05 else "mean_std")
    assert openpi_export.codec_refusals(codec, "it", "quantile" if policy.config.pi05 else "mean_std") == []
    openpi_export.write(tmp_path, policy, codec)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any("embed_tokens" in name for name in file.keys())  # noqa: SIM118 - a handle, not a dict
        assert any("embed_tokens" in name for name in file.metadata())
    codec.tokenizer.save(tmp_path.parent / "words")
    given = GIVEN | {"codec.relative": [], "max_tokens": 64}
    again = vlafit.load_checkpoint(tmp_path, config=given, tokenizer=tmp_path.parent / "words")
    assert again.report.form == "openpi"
    assert again.policy.config == policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    assert again.codec is not None
    for name, values in (("state", sample_of(codec).observation.state), ("action", sample_of(codec).actions)):
        one = Normaliser.fit(codec.statistics[name], codec.config.normalisation)
        two = Normaliser.fit(again.codec.statistics[name], again.codec.config.normalisation)
        np.testing.assert_allclose(one.encode(values), two.encode(values), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------- transformers


@pytest.mark.parity
def test_transformers_loads_what_we_export_and_computes_the_same(tmp_path: Path):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    policy = random_policy("pi0-tiny")
    codec = codec_for(policy)
    notes = write(policy, codec, "transformers", tmp_path / "out", "here").notes
    assert notes == (
        "transformers reads no codec: normalise states and actions, and tokenise, as codec.json says",
    )
    theirs, info = transformers.PI0ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config, draws=1)
    c = policy.config
    patches = (c.vision.image_size // c.vision.patch) ** 2
    images = torch.where(batch.image_mask, c.language.vocab, 0).repeat_interleave(patches, 1)
    with torch.no_grad():
        out = theirs.eval()(
            state=batch.state,
            input_ids=torch.cat([images, batch.tokens], 1),
            attention_mask=torch.cat([images > 0, batch.token_mask], 1).long(),
            pixel_values=batch.images.float() / 255 * 2 - 1,
            pixel_attention_mask=batch.image_mask,
            noise=noise[0],
            timestep=time[0] * 0.2,
            actions=batch.actions,
        )
        ours = policy.velocity(batch, noise[0], time[0] * 0.2)
    assert (ours - out.logits).abs().max() < 1e-4
    again = vlafit.load_checkpoint(tmp_path / "out")
    assert again.report.form == "transformers"
    assert again.codec is not None and again.codec.config == codec.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())


# --------------------------------------------------------------------------------------------- refusals


def test_sizes_that_a_target_cannot_express_are_refused_with_every_reason(tmp_path: Path):
    policy = roomy("pi0-tiny")
    for target, reasons in {
        "lerobot": (
            "builds the language model as gemma_2b or gemma_300m",
            "one image tower",
            "257152 tokens",
        ),
        "openpi": ("images have 224 pixels a side, this policy's 8", "pads states as wide as actions"),
    }.items():
        with pytest.raises(WeightsError) as caught:
            write(policy, codec_for(policy), target, tmp_path / "out", "here")
        assert all(reason in str(caught.value) for reason in reasons)
    with pytest.raises(WeightsError, match="MLP.* 256.* 20"):
        write(roomy("smolvla-tiny"), None, "lerobot", tmp_path / "out", "here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "target", "reason"),
    [
        ("smolvla-tiny", "openpi", "openpi has no such family"),
        ("smolvla-tiny", "transformers", "transformers only supports pi0"),
        ("pi05-tiny", "transformers", "transformers only supports pi0"),
        ("pi0-tiny", "jax", "there is no target 'jax'"),
        ("smolvla-tiny", "lerobot", "has no codec, and LeRobot needs its processors"),
    ],
)
def test_a_family_that_a_target_does_not_hold_is_refused(tmp_path: Path, size: str, target: str, reason: str):
    with pytest.raises(WeightsError, match=reason):
        write(random_policy(size), None, target, tmp_path / "out", "here")


def test_openpi_builds_pi0_fast_in_one_size_by_its_own_rules(tmp_path: Path):
    config = replace(pi0_fast.SIZES["pi0-fast-tiny"], rules="lerobot", tied=False)
    with pytest.raises(WeightsError, match="gemma_2b") as caught:
        write(pi0_fast.build(config, "cpu"), None, "openpi", tmp_path / "out", "here")
    for fact in ("images have 224 pixels", "its own rules of tokens", "output layer is the token embedding"):
        assert fact in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_codecs_that_lerobot_cannot_repeat_are_refused():
    policy = roomy("smolvla-tiny")
    relative = codec_for(policy, relative=(True, False, False))
    [reason] = lerobot_pipelines.codec_refusals(relative, "smolvla")
    assert "processors without a step for relative actions" in reason
    asked = codec_for(policy, prompt="text")
    assert (
        "with a prompt of the form 'line', this codec with 'text'"
        in lerobot_pipelines.codec_refusals(asked, "smolvla")[0]
    )
    small = roomy("pi05-tiny")
    assert (
        "normalises pi0.5 by quantile"
        in openpi_export.codec_refusals(codec_for(small), "pi0.5", "quantile")[0]
    )


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    shutil.copytree(FIXTURE, tmp_path / "out")
    with pytest.raises(WeightsError, match="out exists already"):
        export(FIXTURE, "lerobot", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(folder: Path, policy: object, codec: object) -> tuple[str, ...]:
        (folder / "half").write_text("written")
        raise WeightsError("the disk is full")

    monkeypatch.setattr(lerobot_export, "refusals", lambda policy, codec: [])
    monkeypatch.setattr(lerobot_export, "write", fails)
    with pytest.raises(WeightsError, match="the disk is full"):
        export(FIXTURE, "lerobot", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports_and_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from vlafit.cli import main

    vlafit.save_checkpoint(random_policy("pi0-tiny"), tmp_path / "native")
    assert (
        main(["export", str(tmp_path / "native"), "--to", "transformers", "--out", str(tmp_path / "out")])
        == 0
    )
    assert "for transformers, 3 files: README.md, config.json, model.safetensors" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "native"), "--to", "openpi", "--out", str(tmp_path / "no")]) == 2
    assert "cannot be written for openpi" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- a model nobody published


def unpublished():
    """A SmolVLA whose expert is as LeRobot makes it, on a vision-language model of a size of its own."""
    config = smolvla.SIZES["smolvla-tiny"]
    return random_policy(replace(config, expert=replace(config.expert, mlp=256), max_tokens=64))


def test_a_smolvla_of_an_unpublished_size_takes_its_vision_language_model_along(tmp_path: Path):
    policy = unpublished()
    made = write(policy, codec_for(policy), "lerobot", tmp_path / "out", "here")
    vlm = tmp_path / "out" / "vlm"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vlm_model_name"] == str(vlm)
    assert any(f"by its absolute path: {vlm}" in note for note in made.notes)
    assert {f"vlm/{name}" for name in ("config.json", "processor_config.json", "tokenizer.json")} <= set(
        made.files
    )
    marks = json.loads((vlm / "tokenizer_config.json").read_text())["extra_special_tokens"]
    ids = {
        token["content"]: token["id"]
        for token in json.loads((vlm / "tokenizer.json").read_text())["added_tokens"]
    }
    assert set(marks.values()) <= set(ids) and len(set(ids.values())) == len(ids)
    (tmp_path / "out").rename(tmp_path / "moved")
    again = vlafit.load_checkpoint(tmp_path / "moved")  # its heads are in vlm/config.json
    assert again.policy.config == policy.config
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())


def test_the_public_smolvla_names_the_public_model():
    policy = smolvla.build(smolvla.SIZES["smolvla"], "meta")
    assert lerobot_config.size_refusals(policy) == []
    assert lerobot_config._has_public_vlm(policy.config) and not lerobot_config._has_public_vlm(
        unpublished().config
    )


# ------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.case(
    section="checkpoints",
    report="a bfloat16 export differs more than it said",
    user_has="weights that are rounded, and a program that computes in bfloat16",
    now="both are measured on 32 observations, as shares of the largest action and in the robot's units",
)
def test_what_bfloat16_changes_is_what_the_exported_files_give(tmp_path: Path):
    policy = random_policy(replace(pi0.SIZES["pi0-tiny"], max_tokens=64, state_dim=5))
    codec = codec_for(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", codec)
    made = export(tmp_path / "c", "vlafit", tmp_path / "out", dtype="bfloat16")
    before = answers(policy)
    assert len(before) == 32
    still, real = Observation({}, np.zeros(4, np.float32), ""), slice(3)
    decode = lambda rows: np.stack([codec.decode(row, still).actions for row in rows.numpy()])  # noqa: E731
    for change, dtype in ((made.rounded, "float32"), (made.narrow, "bfloat16")):
        after = answers(vlafit.load_policy(tmp_path / "out", dtype=dtype))
        assert change is not None and change.normalised == float((after - before)[..., real].abs().max()) > 0
        assert change.largest == float(before[..., real].abs().max())
        assert change.robot == float(np.abs(decode(after) - decode(before)).max())
        assert f"{change.relative:.1e} of the largest ({change.robot:.1e} in the robot's units" in made.text()
    assert made.cast_error == max(made.rounded.relative, made.narrow.relative)  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["lerobot", "openpi", "transformers", "vlafit"])
def test_bfloat16_weights_are_rounded_once_and_kept_as_the_target_keeps_them(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (lerobot_export, openpi_export):
        monkeypatch.setattr(module, "refusals", lambda policy, codec: [])  # no tiny size has a name there
    policy = random_policy(replace(pi0.SIZES["pi0-tiny"], max_tokens=64, state_dim=5))  # as wide as actions
    vlafit.save_checkpoint(policy, tmp_path / "c", codec_for(policy))
    made = export(tmp_path / "c", target, tmp_path / "out", dtype="bfloat16")
    assert made.cast_error is not None and 0 < made.cast_error < 0.1
    assert "weights rounded once, to bfloat16; on 32 random observations" in made.text()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    precise = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert {t.dtype for t in stored.values()} <= {torch.float32, torch.bfloat16}
    kept = {
        "lerobot": ("vision_tower", "multi_modal", "layernorm", "norm.weight", "action_", "state_"),
        "openpi": ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm",
                   "model.norm", "state_proj", "action_"),
        "transformers": (),
        "vlafit": ("norm", "patch_embedding", "position_embedding", "state_proj", "action_"),
    }[target]  # fmt: skip
    own = ("self_attn", "mlp.")  # matrices of the decoders, which have such words in their names, too
    wanted = {
        name
        for name in stored
        if any(word in name for word in kept)
        and (not any(word in name for word in own) or (target == "lerobot" and "vision_tower" in name))
    }
    assert precise == wanted
    if target in ("lerobot", "openpi", "transformers"):
        told = json.loads((tmp_path / "out" / "config.json").read_text())
        key = "precision" if target == "openpi" else "dtype"
        assert told[key] == "bfloat16"
    again = vlafit.load_checkpoint(
        tmp_path / "out", config=None if target == "vlafit" else GIVEN | {"max_tokens": 64}
    )
    for name, parameter in policy.named_parameters():
        ours = again.policy.get_parameter(name)
        assert torch.equal(ours, parameter) or torch.equal(ours, parameter.bfloat16().float())


def test_the_command_line_takes_a_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from vlafit.cli import main

    vlafit.save_checkpoint(random_policy("pi0-tiny"), tmp_path / "c")
    line = ["export", str(tmp_path / "c"), "--to", "transformers", "--out", str(tmp_path / "out"), "--dtype"]
    assert main([*line, "float16"]) == 2
    assert "give 'float32' or torch.float32" in capsys.readouterr().err
    assert main([*line, "bfloat16"]) == 0
    assert "weights rounded once, to bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["LeRobot", "openpi"])
def test_a_pi05_with_a_token_loss_is_written_without_it_and_acts_the_same(tmp_path: Path, program: str):
    config = replace(pi0.SIZES["pi05-tiny"], state_dim=5, max_tokens=64, action_tokens=24)
    lang = replace(config.language, vocab=1100)
    policy = random_policy(replace(config, language=lang))
    codec = codec_for(policy, "quantile")
    actions = fast.fit([np.random.default_rng(n).normal(0, 1, (4, 3)) for n in range(20)], 270)
    tokens = ActionTokenConfig(24, 1100)
    codec = codec.with_changes(config=replace(codec.config, action_tokens=tokens), action_tokenizer=actions)
    codec.required_tokenizer.save(tmp_path.parent / "words")
    form = lerobot_export if program == "LeRobot" else openpi_export
    notes = form.write(tmp_path, policy, codec)
    assert f"{program}'s pi0.5 has no token loss" in " ".join(notes)
    assert not list(tmp_path.glob("**/processor_config.json"))  # FAST's
    given = GIVEN | {"max_tokens": 64} | ({"codec.relative": []} if program == "openpi" else {})
    words = tmp_path.parent / "words" if program == "openpi" else None
    again = vlafit.load_checkpoint(tmp_path, config=given, tokenizer=words)
    assert again.policy.config == replace(policy.config, action_tokens=0)
    assert all(torch.equal(p, again.policy.get_parameter(n)) for n, p in policy.named_parameters())
    assert again.codec is not None and again.codec.action_tokenizer is None
    batch, keys = random_batch(policy.config, 2), [(0, 0), (0, 1)]
    one, two = (p.act(batch, sample_rng(keys, seed=0)) for p in (policy, again.policy))
    assert torch.equal(one, two)
