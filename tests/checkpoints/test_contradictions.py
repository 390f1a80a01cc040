"""A dimension that the tensors tell is compared with all else in the checkpoint that states it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints.forms import FORMS, SMOLVLA, Form, cut, save
from tests.variants import variants
from vlafit.checkpoints import inspect
from vlafit.checkpoints.formats.lerobot import smolvla_config
from vlafit.checkpoints.infer import ConfigEvidence, infer_config
from vlafit.checkpoints.voting import Witness, contradictions, vote
from vlafit.errors import WeightsError
from vlafit.policies import groot, pi0, smolvla

FIXTURES = Path(__file__).parents[1] / "fixtures"
ALWAYS = ("openpi pi05", "LeRobot pi0", "SmolVLA")


@pytest.fixture(
    params=variants(FORMS, always=[f for f in FORMS if f.name in ALWAYS]), ids=lambda form: form.name
)
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


def test_a_file_cut_so_that_it_agrees_with_itself_is_refused_by_what_lies_beside_it(
    form: Form, tmp_path: Path
):
    tensors = form.write(tmp_path)
    save(tensors, tmp_path)
    vlafit.load_policy(tmp_path, config=form.told)  # whole, it loads
    for what in form.cut:
        save(cut(form, tensors, what), tmp_path)
        for look in (inspect, vlafit.load_checkpoint):
            with pytest.raises(WeightsError, match=r"contradicted: \S+ is \d+ by \S.*, \d+"):
                look(tmp_path, config=form.told)


@pytest.mark.parametrize("size", ["pi0", "pi05", "smolvla", "groot-small"])
def test_every_axis_of_every_parameter_has_its_word(size: str):
    module = {"smolvla": smolvla, "groot-small": groot}.get(size, pi0)
    axes, made = module.SHAPES.axes, module.build(module.SIZES[size], "meta")
    weights = {name: p.detach() for name, p in made.named_parameters()}
    for name, tensor in weights.items():
        assert len(axes[re.sub(r"\.layers\.\d+\.", ".layers.*.", name)].split()) == tensor.ndim
    assert all(len(counts) == 1 for counts in vote(weights, axes).counts.values())


# -------------------------------------------------------------------------------------------------- SmolVLA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMOLVLA, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "max_state_dim",
            16,
            r"state_dim is 32 by model.state_proj.weight, 16 by config.json \(max_state_dim\)",
        ),
        ("max_action_dim", 16, r"action_dim is 32 by model.action_in_proj.weight, 16 by config.json"),
        ("num_vlm_layers", 5, r"language.depth is 4 by the tensors, 5 by config.json \(num_vlm_layers\)"),
        ("expert_width_multiplier", 0.5, r"expert.width is 48 by .*, 32 by config.json \(expert_width_mult"),
        ("self_attn_every_n_layers", 3, r"expert.self_every is 2 by the tensors, 3 by config.json"),
    ],
)
def test_config_json_must_agree(folder: Path, key: str, value: object, message: str):
    edit(folder / "config.json", **{key: value})
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(folder)


def test_what_the_user_says_wins_over_the_file_and_never_over_the_tensors(folder: Path):
    edit(folder / "config.json", max_action_dim=16, num_vlm_layers=5)
    assert vlafit.load_policy(folder, config={"action_dim": 32, "language.depth": 4}).config.action_dim == 32
    with pytest.raises(WeightsError, match=r"missing \(18\): .*text_model.layers.4.\* \(9 tensors\)"):
        vlafit.load_policy(folder, config={"action_dim": 32, "language.depth": 5})


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "vision_config",
            "image_size",
            32,
            r"vision.image_size is 64 by \S*position_embedding.weight, 32 by tiny_vlm/",
        ),
        ("vision_config", "hidden_size", 32, r"vision.width is 48 .*, 32 by"),
        ("text_config", "num_key_value_heads", 4, r"language.kv_heads is 2 by \S*k_proj.weight, 4 by"),
        ("text_config", "rms_norm_eps", 1e-6, r"rms_norm_eps is 1e-06; only 1e-05 is supported"),
        ("text_config", "hidden_act", "gelu", r"text_config.hidden_act is 'gelu'; only 'silu'"),
        ("vision_config", "hidden_act", "relu", r"vision_config.hidden_act is 'relu'"),
    ],
)
def test_the_config_of_the_vision_language_model_must_agree(
    folder: Path, section: str, key: str, value: object, message: str
):
    path = folder / "tiny_vlm" / "config.json"
    values = json.loads(path.read_text())
    edit(path, **{section: values[section] | {key: value}})
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(folder)


def test_an_epsilon_that_is_not_written_is_the_one_that_transformers_takes(folder: Path):
    path = folder / "tiny_vlm" / "config.json"
    values = json.loads(path.read_text())
    del values["text_config"]["rms_norm_eps"]
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="rms_norm_eps is 1e-06"):
        vlafit.load_policy(folder)


def test_the_unused_head_has_the_rows_and_columns_of_the_embedding(folder: Path):
    path, name = folder / "model.safetensors", "model.vlm_with_expert.vlm.lm_head.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"lm_head\.weight.*\(511, 64\).*\(512, 64\).*embed_tok"):
        vlafit.load_policy(folder)


def test_a_public_model_that_config_json_names_has_its_public_size(folder: Path):
    edit(folder / "config.json", vlm_model_name=smolvla_config.PUBLIC_VLM)
    with pytest.raises(WeightsError, match=r"language\.vocab.* 512 .* 49280 .*config\.json.*vlm_model_name"):
        vlafit.load_policy(folder, config={"vision.heads": 4, "language.head_dim": 16})


def test_as_wide_as_the_public_smolvla_and_less_deep_must_be_meant_so():
    weights = {n: p.detach() for n, p in smolvla.build(smolvla.SIZES["smolvla"], "meta").named_parameters()}
    inferred = infer_config("smolvla", weights, ConfigEvidence(), {}, "here")
    assert (inferred.config, inferred.conflicts) == (smolvla.SIZES["smolvla"], ())
    less = {n: t for n, t in weights.items() if ".layers.15." not in n}
    inferred = infer_config("smolvla", less, ConfigEvidence(), {}, "here")
    assert inferred.conflicts[0].startswith(
        "contradicted: language.depth is 15 by the tensors, 16 by the public SmolVLA"
    )
    given = {"language.depth": 15}
    assert not infer_config("smolvla", less, ConfigEvidence(), given, "here").conflicts


# ------------------------------------------------------------------------------------------ pi0 and pi0.5


@pytest.mark.parametrize(
    ("rows", "said"), [(225, "contradicted: vision.image_size is 210"), (200, "misshapen")]
)
def test_patches_of_14_make_images_of_224_in_openpi(rows: int, said: str, tmp_path: Path):
    tensors = load_file(FIXTURES / "openpi_pi0" / "model.safetensors")
    name = next(n for n in tensors if "position_embedding" in n)
    tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{said}.*position_embedding|{said}"):
        vlafit.load_policy(tmp_path, config={"vision.heads": 2, "chunk": 6})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", 1e-5, "dit_config.rms_norm_eps is 1e-05; only 1e-06 is supported"),
        ("rope_parameters", {"rope_theta": 1e6}, "dit_config.rope_theta is not 10000"),
    ],
)
def test_another_config_json_of_transformers_is_refused_where_we_would_compute_otherwise(
    key: str, value: object, message: str, tmp_path: Path
):
    form = next(f for f in FORMS if f.name == "transformers")
    save(form.write(tmp_path), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path / "config.json", dit_config=values["dit_config"] | {key: value})
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(tmp_path)


def test_a_size_that_only_lost_tensors_tell_hides_no_other_damage(tmp_path: Path):
    form = next(f for f in FORMS if f.name == "LeRobot pi0")
    tensors = form.write(tmp_path)
    (tmp_path / "config.json").unlink()
    lost = [n for n in tensors if "action_" in n or "patch_embedding" in n or "embed_tokens" in n]
    for name in lost:
        del tensors[name]
    tensors["model.state_proj.weight"] = tensors["model.state_proj.weight"].flatten()
    tensors["model.extra"] = torch.ones(2)
    save(tensors, tmp_path)
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(tmp_path)  # neither chunk nor heads are told: that comes later
    found = caught.value.tensors
    assert set(found["missing"]) == {form.names.stored(form.names.policy_name(name)) for name in lost}
    assert (found["surplus"], found["misshapen"]) == (("model.extra",), ("model.state_proj.weight",))
    assert "no tensor determines vision.patch, state_dim, action_dim" in str(caught.value)


def test_projections_that_are_lost_may_be_fresh_where_their_width_is_said(tmp_path: Path):
    form = next(f for f in FORMS if f.name == "openpi pi05")
    tensors = form.write(tmp_path)
    (tmp_path / "config.json").unlink()
    save({n: t for n, t in tensors.items() if not n.startswith("action_")}, tmp_path)
    given = {**form.told, "chunk": 4, "language.head_dim": 16}
    loaded = vlafit.load_checkpoint(tmp_path, config={**given, "action_dim": 3}, fresh=["action_*"])
    assert loaded.policy.config.action_dim == 3 and len(loaded.report.fresh) == 4
    with pytest.raises(WeightsError, match="no tensor determines action_dim; give .* action_dim=32 of"):
        vlafit.load_checkpoint(tmp_path, config=given, fresh=["action_*"])


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("form", ["openpi pi0", "SmolVLA"])
@pytest.mark.parametrize(
    ("dtype", "wide", "number"), [("float32", torch.float64, 1e300), ("bfloat16", torch.float32, 3.4e38)]
)
def test_a_number_that_the_dtype_asked_for_does_not_hold_is_named(
    form: str, dtype: str, wide: torch.dtype, number: float, tmp_path: Path
):
    made = next(f for f in FORMS if f.name == form)
    tensors = made.write(tmp_path)
    name = next(n for n in tensors if n.endswith("mlp.gate_proj.weight"))
    tensors[name] = tensors[name].to(wide)
    tensors[name][1, 2] = number
    save(tensors, tmp_path)
    kinds = rf"{str(wide).removeprefix('torch.')} numbers beyond {dtype}"
    with pytest.raises(WeightsError, match=rf"too large \(1\): {name} .*{kinds}"):
        vlafit.load_policy(tmp_path, config=made.told, dtype=dtype)  # type: ignore[arg-type]
    if wide == torch.float32:
        vlafit.load_policy(tmp_path, config=made.told)


def test_shapes_that_make_no_policy_are_all_named(tmp_path: Path):
    form = next(f for f in FORMS if f.name == "openpi pi0")
    tensors = form.write(tmp_path)
    keys = [n for n in tensors if n.endswith(("k_proj.weight", "v_proj.weight")) and "vision" not in n]
    one = "action_out_proj.weight"
    short = {n: t[:-1] for n, t in tensors.items() if n in keys or n == one}
    save({n: t for n, t in (tensors | short).items() if n != "state_proj.bias"}, tmp_path)
    with pytest.raises(WeightsError, match="go together.*head_dim 15") as caught:
        vlafit.load_policy(tmp_path, config=form.told)
    assert (caught.value.tensors["missing"], caught.value.tensors["misshapen"]) == (
        ("state_proj.bias",),
        (one,),
    )


def test_layers_that_are_lost_at_the_end_are_named_where_something_says_how_many_there_were(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    lost = [n for n in tensors if re.search(r"(text_model|lm_expert).layers.[23]\.|vision_model", n)]
    save_file({n: t for n, t in tensors.items() if n not in lost}, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"language\.depth.* 2 by the tensors.* 4 by config\.json"
    ) as caught:
        vlafit.load_policy(folder)
    assert set(caught.value.tensors["missing"]) == set(lost)


@pytest.mark.parametrize("rows", [512, 511])
def test_a_head_that_feeds_nothing_and_lost_an_axis_is_contradicted(rows: int):
    votes = vote({"language.embed_tokens.weight": torch.empty(512, 64)}, pi0.SHAPES.axes)
    read = {"language": {"vocab": 512, "width": 64}}
    head = Witness("lm_head", (rows,), "language.vocab language.width")
    (said,) = contradictions(read, (), {}, votes, [head])
    assert said == f"contradicted: lm_head is ({rows},), and has 2 axes elsewhere"
