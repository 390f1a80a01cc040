"""LeRobot checkpoints as they lie on the Hub: old names, statistics by dataset or among the weights."""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlafit
from tests.checkpoints.test_lerobot import FIXTURE, RAW, edit, robot_view, write_pi0
from tests.policies.tiny import random_batch, random_draws
from vlafit import checkpoints
from vlafit.errors import WeightsError

TOKENIZER = FIXTURE / "tokenizer"
STATE, ACTION = "observation.state", "action"


def statistics() -> dict[str, Tensor]:
    """Those of the robot in the fixture."""
    return load_file(FIXTURE / "policy_preprocessor_step_5_normalizer_processor.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy whose processors ask for a tokenizer of the Hub, as most do."""
    shutil.copytree(FIXTURE, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "tokenizer")
    edit(tmp_path / "copy" / "policy_preprocessor.json", lambda v: v["steps"][3].pop("artifacts"))
    return tmp_path / "copy"


def by_dataset(folder: Path, sets: dict[str, float], features: tuple[str, ...] = (STATE, ACTION)) -> None:
    """Give the processors the robot's statistics times a factor for each dataset, under its name."""
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        tensors = load_file(path)
        save_file(
            {
                f"{name}.buffer.{key}": factor * tensor
                for name, factor in sets.items()
                for key, tensor in tensors.items()
                if key.rpartition(".")[0] in features
            },
            path,
        )


def among_the_weights(folder: Path, prefix: str = "", **changed: Tensor) -> None:
    """Make it a checkpoint of LeRobot 0.3: no processors, statistics among the weights."""
    for path in folder.glob("policy_*"):
        path.unlink()
    tensors, stored = load_file(folder / "model.safetensors"), statistics()
    modules = {"normalize_inputs": STATE, "normalize_targets": ACTION, "unnormalize_outputs": ACTION}
    for module, feature in modules.items():
        owner = f"{module}.{prefix}buffer_{feature.replace('.', '_')}"
        tensors |= {f"{owner}.{name}": stored[f"{feature}.{name}"].clone() for name in ("mean", "std")}
    save_file(tensors | changed, folder / "model.safetensors")


# ------------------------------------------------------------------------------------- statistics by dataset


@pytest.mark.case(
    section="checkpoints",
    report="the robot gets actions that were never scaled back",
    user_has="statistics by dataset, as in `lerobot/smolvla_base`",
    now="none is applied unasked; `policy.assets` names one",
)
def test_statistics_of_several_datasets_are_listed_and_used_only_by_name(folder: Path):
    by_dataset(folder, {"so100": 1.0, "so100-red": 2.0})
    for look in (checkpoints.inspect, checkpoints.load):
        loaded = look(folder)
        assert loaded.codec is None
        for fact in ("so100 (action and observation.state)", "so100-red", "assets"):
            assert fact in loaded.report.codec
    assert checkpoints.declaration(folder).named_statistics == ("so100", "so100-red")
    own = vlafit.load_checkpoint(FIXTURE).codec
    assert own is not None
    for name, factor in (("so100", 1.0), ("so100-red", 2.0)):
        codec = checkpoints.load(folder, tokenizer=TOKENIZER, assets=name).codec
        assert codec is not None
        for column in ("state", "action"):
            mean = factor * own.statistics[column].mean
            assert np.allclose(codec.statistics[column].mean, mean, rtol=1e-6)
    without_effect = ("tokenizer would have no effect", "so100")
    for asset, facts in (("so101", ("'so101'", "so100")), (None, without_effect)):
        with pytest.raises(WeightsError) as caught:
            checkpoints.load(folder, tokenizer=TOKENIZER, assets=asset)
        assert all(fact in str(caught.value) for fact in facts)


@pytest.mark.case(
    section="checkpoints",
    report="the policy ignores its state",
    user_has="a set of statistics without `observation.state`",
    now="refused by name; LeRobot leaves the state as it is",
)
def test_a_set_without_the_state_is_refused_by_name_and_never_left_out(folder: Path):
    by_dataset(folder, {"so100": 1.0}, (ACTION,))  # as lerobot/smolvla_base has it
    assert "so100 (action)" in checkpoints.load(folder).report.codec
    with pytest.raises(WeightsError, match=r"'so100'.*no statistics.*observation\.state.* action"):
        checkpoints.load(folder, tokenizer=TOKENIZER, assets="so100")


def test_processors_that_hold_statistics_of_one_column_only_load_without_a_codec(folder: Path):
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        save_file({n: t for n, t in load_file(path).items() if n.startswith("action.")}, path)
    loaded = checkpoints.load(folder)
    assert loaded.codec is None and "no statistics of observation.state" in loaded.report.codec


# ------------------------------------------------------------------------------ statistics among the weights


@pytest.mark.case(
    section="checkpoints",
    report="`normalize_inputs.buffer_*` are unexpected keys",
    user_has="a checkpoint of LeRobot 0.1 to 0.3",
    now="its statistics are read from the weights",
)
@pytest.mark.parametrize("prefix", ["", "so100_"])
def test_statistics_among_the_weights_normalise_as_processors_do(folder: Path, prefix: str):
    among_the_weights(folder, prefix)
    asset = prefix.rstrip("_") or None
    assert checkpoints.load(folder).codec is None
    codec = checkpoints.load(folder, tokenizer=TOKENIZER, assets=asset).codec
    own = vlafit.load_checkpoint(FIXTURE).codec
    assert codec is not None and own is not None
    assert (codec.config.prompt, codec.config.framing) == ("line", "smolvla")
    seen = robot_view(0, RAW)
    one, other = codec.encode(seen), own.encode(seen)
    for field in ("images", "tokens", "token_mask", "state"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
    actions = np.linspace(-1, 1, 32 * 10).reshape(10, 32).astype(np.float32)
    assert np.array_equal(codec.decode(actions, seen).actions, own.decode(actions, seen).actions)


def test_a_range_among_the_weights_is_read(folder: Path):
    among_the_weights(folder)
    edit(folder / "config.json", lambda v: v["normalization_mapping"].update(ACTION="MIN_MAX"))
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "_action." not in n}
    for module in ("normalize_targets", "unnormalize_outputs"):
        tensors |= {f"{module}.buffer_action.min": torch.full((6,), -2.0)}
        tensors |= {f"{module}.buffer_action.max": torch.full((6,), 6.0)}
    save_file(tensors, folder / "model.safetensors")
    codec = checkpoints.load(folder, tokenizer=TOKENIZER).codec
    assert codec is not None and codec.config.of_actions == "lerobot_min_max"
    decoded = codec.decode(np.full((10, 32), 0.5, np.float32), robot_view(0, RAW)).actions
    assert np.allclose(decoded, 4.0)


def test_statistics_that_were_never_set_are_none(folder: Path):
    among_the_weights(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: torch.full_like(t, torch.inf) if "buffer_" in n else t for n, t in tensors.items()},
        folder / "model.safetensors",
    )
    loaded = checkpoints.load(folder)
    assert loaded.codec is None and not checkpoints.wants_tokenizer(folder)
    assert "never set: normalize_inputs.buffer_observation_state.mean is infinite" in loaded.report.codec


@pytest.mark.parametrize("kept", ["weights", "processors"])
def test_a_tokenizer_makes_no_codec_of_statistics_that_lack_a_column(folder: Path, kept: str):
    """So training with fitted statistics takes the tokenizer, and does not pass it on to be refused."""
    if kept == "weights":
        among_the_weights(folder)
        tensors = load_file(folder / "model.safetensors")
        assert checkpoints.wants_tokenizer(folder)
        save_file(
            {n: t for n, t in tensors.items() if "buffer_observation" not in n}, folder / "model.safetensors"
        )
    else:
        assert checkpoints.wants_tokenizer(folder)
        for path in folder.glob("policy_*normalizer_processor.safetensors"):
            save_file({n: t for n, t in load_file(path).items() if n.startswith("action.")}, path)
    assert not checkpoints.wants_tokenizer(folder)
    assert "no statistics of observation.state" in checkpoints.load(folder).report.codec


def with_config(folder: Path, change) -> None:
    among_the_weights(folder)
    edit(folder / "config.json", change)


OTHER_TARGETS = {"normalize_targets.buffer_action.mean": torch.ones(6)}
NO_WIDTH = {"normalize_inputs.buffer_observation_state.std": torch.zeros(7)}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda f: among_the_weights(f, **OTHER_TARGETS), ("normalize_targets", "action.mean")),
        (
            lambda f: among_the_weights(f, **NO_WIDTH),
            ("tokenizer would have no effect", "observation.state.std is 0", 'data.statistics = "data"'),
        ),
        (lambda f: with_config(f, lambda v: v.update(adapt_to_pi_aloha=True)), ("adapt_to_pi_aloha",)),
        (lambda f: with_config(f, lambda v: v.pop("normalization_mapping")), ("normalization_mapping",)),
    ],
)
def test_statistics_among_the_weights_that_cannot_be_repeated_are_refused(folder: Path, change, facts):
    change(folder)
    with pytest.raises(WeightsError) as caught:
        checkpoints.load(folder, tokenizer=TOKENIZER)
    assert all(fact in str(caught.value) for fact in facts)


# ----------------------------------------------------------------------------------------------- older names


def older(folder: Path, *, embedding: bool) -> None:
    """Rename a pi0 as LeRobot 0.1 to 0.3 wrote it, with `embedding` or with the head that is tied to it."""
    tensors = load_file(folder / "model.safetensors")
    model = "model.paligemma_with_expert.paligemma."
    table = [
        (f"{model}model.language_model.", f"{model}language_model.model."),
        (f"{model}lm_head.", f"{model}language_model.lm_head."),
        (f"{model}model.vision_tower.", f"{model}vision_tower."),
        (f"{model}model.multi_modal_projector.", f"{model}multi_modal_projector."),
    ]
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in table:
            if name.startswith(new):
                renamed[old + name.removeprefix(new)] = tensor
                break
        else:
            renamed[name] = tensor
    embed, head = f"{model}language_model.model.embed_tokens.weight", f"{model}language_model.lm_head.weight"
    renamed[head] = renamed[embed].clone()
    del renamed[head if embedding else embed]
    save_file(renamed, folder / "model.safetensors")
    edit(folder / "config.json", lambda v: v.update(resize_imgs_with_padding=[8, 8], proj_width=16))


@pytest.mark.case(
    section="checkpoints",
    report="`paligemma.language_model.model` is missing",
    user_has="pi0 of LeRobot 0.1 to 0.3, with the names of older transformers",
    now="loads by renaming",
)
@pytest.mark.parametrize("embedding", [True, False])
def test_pi0_of_lerobot_0_1_to_0_3_loads_by_renaming(tmp_path: Path, embedding: bool):
    policy = write_pi0(tmp_path / "x", "pi0-tiny", "save_pretrained")
    older(tmp_path / "x", embedding=embedding)
    loaded = vlafit.load_checkpoint(tmp_path / "x", config={"vision.heads": 2, "language.head_dim": 8})
    assert loaded.report.form == "LeRobot" and loaded.policy.config == policy.config
    assert all(torch.equal(p, loaded.policy.get_parameter(n)) for n, p in policy.named_parameters())
    batch, (noise, time) = random_batch(policy.config), random_draws(policy.config)
    assert torch.equal(policy.velocity(batch, noise, time), loaded.policy.velocity(batch, noise, time))
    form = checkpoints.declaration(tmp_path / "x").form
    assert form is not None and (form.prompt, form.framing) == ("line", "smolvla")


def test_a_lost_tensor_of_an_old_pi0_is_named_as_its_file_names_it(tmp_path: Path):
    write_pi0(tmp_path / "x", "pi0-tiny", "save_pretrained")
    older(tmp_path / "x", embedding=True)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    lost = "model.paligemma_with_expert.paligemma.vision_tower.vision_model.post_layernorm.bias"
    del tensors[lost]
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"missing \(1\): {lost}"):
        vlafit.load_policy(tmp_path / "x", config={"vision.heads": 2, "language.head_dim": 8})


# -------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.case(
    section="checkpoints",
    report="every tensor is missing, and every tensor is unexpected",
    user_has="names that begin with `module.`, `_orig_mod.`, `policy.` or `base_model.model.`",
    now="an error that names the prefix, with a command that takes it off",
)
@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        *product(("hub", "save_pretrained"), ("module.", "policy.", "_orig_mod.", "module._orig_mod.")),
        *product(("hub", "save_pretrained"), ("base_model.model.", "module._fsdp_wrapped_module.")),
        ("save_pretrained", "model."),  # before a name of the Hub it makes LeRobot's own
    ],
)
def test_the_prefix_of_a_wrapper_is_named_with_the_remedy(tmp_path: Path, layout: str, prefix: str):
    policy = write_pi0(tmp_path / "x", "pi0-tiny", layout)
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(tmp_path / "x")
    message = str(caught.value)
    for fact in (repr(prefix), f"{len(tensors)} of {len(tensors)} tensor names", "a LeRobot checkpoint"):
        assert fact in message
    command = message.partition('python -c "')[2].rpartition('"')[0]
    command = command.replace("OLD.safetensors", str(file)).replace("'model.safetensors'", repr(str(file)))
    exec(command)  # the remedy, as it stands in the message
    again = vlafit.load_policy(tmp_path / "x", config={"vision.heads": 2, "language.head_dim": 8})
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in policy.named_parameters())


def test_a_prefix_before_names_of_nobody_is_not_the_reason(tmp_path: Path):
    save_file({"module.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="of no known format"):
        vlafit.load_policy(tmp_path)
