"""PEFT folders come in: our own compute what they did, foreign ones what peft does, or are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints.test_export import GIVEN, codec_for
from tests.checkpoints.test_export_adapters import trained, velocity_of_theirs
from tests.policies.tiny import random_batch, random_draws, random_policy
from tests.tuning.world import METHODS, QUANTISED, make_policy, velocity
from tests.variants import variants
from vlafit import checkpoints
from vlafit.checkpoints.export import export, write
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.errors import WeightsError
from vlafit.policies import pi0, smolvla

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EXACT = {"time_angles": "float64"}  # transformers rounds them, so its form is read so


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def answer(policy) -> torch.Tensor:
    """The velocity with nothing to learn: what may learn takes another path through torch's kernels."""
    return velocity(policy.requires_grad_(False))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on transformers' pi0, with the weights below it in base/."""
    folder = tmp_path_factory.mktemp("exported")
    export(trained("lora", folder), "transformers", folder / "out")
    return folder / "out"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------ our own


IMPORTED = [n for n in (*METHODS, *QUANTISED) if n not in ("lora dropout", "gaussian", "int8")]


@pytest.mark.parametrize("name", variants(IMPORTED, always=["lora"]))
def test_what_we_exported_computes_the_same_again_bit_for_bit(name: str, tmp_path: Path):
    source = trained(name, tmp_path)
    before = vlafit.load_checkpoint(source)
    export(source, "transformers", tmp_path / "out")
    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)  # its own base/ is found wherever the folder is
    policy, _, plan, report = vlafit.load_checkpoint(moved, config=EXACT)
    assert plan is not None and before.plan is not None and plan.adapted.keys() == before.plan.adapted.keys()
    difference = (answer(policy) - answer(before.policy)).abs().max()
    # PiSSA and quantisation leave a base that is rounded anew.
    assert difference == 0 if name not in ("pissa", *QUANTISED) else difference < 1e-5
    stored = load_file(moved / TENSORS)
    assert any(note.startswith(f"adapters of peft ({len(stored)} tensors)") for note in report.notes)
    looked = checkpoints.inspect(moved, config=EXACT)
    assert looked.plan == plan and looked.report.notes == report.notes
    vlafit.save_checkpoint(policy, tmp_path / "native", plan=plan)
    assert torch.equal(answer(vlafit.load_policy(tmp_path / "native")), answer(policy))


@pytest.mark.parametrize("size", variants(["pi0-tiny", "pi05-tiny", "smolvla-tiny"], always=["pi05-tiny"]))
def test_the_folder_for_lerobot_loads_with_its_codec(size: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lerobot_export, "refusals", lambda policy, codec: [])  # no tiny size has a name there
    policy = random_policy(replace({**pi0.SIZES, **smolvla.SIZES}[size], max_tokens=64))
    codec = codec_for(policy, "quantile" if "pi05" in size else "mean_std")
    select = {"kind": ["attention", "mlp"]}
    expert = {"select": {"part": "expert", **select}, "mode": "lora", "rank": 3, "alpha": 6}
    rest = {"select": select, "mode": "lora", "rank": 2}
    plan = vlafit.apply_strategy(policy, [expert, rest, {"mode": "frozen"}])
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    vlafit.save_checkpoint(policy, tmp_path / "c", codec=codec, plan=plan)
    export(tmp_path / "c", "lerobot", tmp_path / "out")
    # LeRobot's rule makes another MLP of this expert's width, and config.json tells by that rule.
    given = GIVEN if size != "smolvla-tiny" else GIVEN | {"expert.mlp": policy.config.expert.mlp}
    again = vlafit.load_checkpoint(tmp_path / "out", config=given)
    batch, (noise, time) = random_batch(policy.config), random_draws(policy.config, draws=1)
    with torch.no_grad():
        both = (p.eval().requires_grad_(False) for p in (policy, again.policy))
        one, two = (p.velocity(batch, noise[0], time[0]) for p in both)
    assert torch.equal(one, two)
    assert again.codec is not None and again.plan is not None
    assert {n: (a.rank, a.scale) for n, a in again.plan.adapted.items()} == {
        n: (a.rank, a.scale) for n, a in plan.adapted.items()
    }
    assert again.report.owner == "the checkpoint"
    for file in (tmp_path / "out").glob("policy_p*"):
        file.rename(tmp_path / "out" / "base" / file.name)
    report = vlafit.load_checkpoint(tmp_path / "out", config=given).report
    assert report.owner == f"the base {tmp_path / 'out' / 'base'}"
    _settings_beside_adapters_hold_where_no_tensor_depends_on_them(tmp_path / "out", given)


def _settings_beside_adapters_hold_where_no_tensor_depends_on_them(folder: Path, given: dict[str, object]):
    """LeRobot runs adapters with the config.json beside them, whatever that of their base says."""
    config = json.loads((folder / "config.json").read_text())
    steps = "num_steps" if config["type"] == "smolvla" else "num_inference_steps"
    edit(folder / "config.json", chunk_size=99, **{steps: 3})
    policy = vlafit.load_policy(folder, config=given)
    assert (policy.config.chunk, policy.steps) == (99, 3)
    assert vlafit.load_policy(folder, config=given | {"chunk": 7}).config.chunk == 7
    stated = {one.name: (one.stated, one.used) for one in checkpoints.declaration(folder).overruled}
    for key, mine, other in (("chunk_size", config["chunk_size"], 99), (steps, 10, 3)):
        assert stated[key][0].endswith(f"base/config.json: {mine}")
        assert stated[key][1].endswith(f"out/config.json: {other}")
    edit(folder / "config.json", max_action_dim=3)
    with pytest.raises(WeightsError, match="max_action_dim is 3.*adapters.*base"):
        vlafit.load_policy(folder, config=given)


# ------------------------------------------------------------------------------------------------ foreign


@pytest.mark.parity
@pytest.mark.parametrize("target", [["q_proj", "v_proj"], r".*dit.*\.(q_proj|down_proj)"])
def test_what_peft_itself_saved_computes_what_peft_computes(target, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import PI0ForConditionalGeneration

    write(make_policy(), None, "transformers", tmp_path / "base", "here")
    theirs = PI0ForConditionalGeneration.from_pretrained(tmp_path / "base")
    saved = ["state_proj"]
    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
    }
    config = LoraConfig(r=2, lora_alpha=5, target_modules=target, modules_to_save=saved, **patterns)
    model = get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "adapters")
    edit(tmp_path / "adapters" / CONFIG, base_model_name_or_path=str(tmp_path / "base"))
    policy, _, plan, _ = vlafit.load_checkpoint(tmp_path / "adapters", base=tmp_path / "base")
    assert (velocity(policy) - velocity_of_theirs(model)).abs().max() < 5e-5
    assert plan is not None and {a.rank for a in plan.adapted.values()} == {2, 3}


@pytest.mark.case(
    section="checkpoints",
    report="adapters load another base than meant",
    user_has="`base_model_name_or_path` outside the folder, or a hub id",
    now="refused; name it with `--base`",
)
def test_the_base_is_inside_the_folder_or_named_by_the_user(copy: Path):
    base = copy.parent / "moved"
    with pytest.raises(WeightsError, match="adapters.*base/.*no base"):
        vlafit.load_checkpoint(copy, base=base)
    before = velocity(vlafit.load_policy(copy))
    (copy / "base").rename(base)
    (copy / "base").symlink_to(base)
    with pytest.raises(WeightsError, match=f"link to {base}"):
        vlafit.load_policy(copy)
    (copy / "base").unlink()
    edit(copy / CONFIG, base_model_name_or_path=str(copy / "base"))
    with pytest.raises(WeightsError, match="copy/base.*base="):
        vlafit.load_policy(copy)
    assert torch.equal(velocity(vlafit.load_checkpoint(copy, base=base).policy), before)
    for elsewhere in (str(base), "../moved", "lerobot/pi0_base"):
        edit(copy / CONFIG, base_model_name_or_path=elsewhere)
        with pytest.raises(WeightsError) as caught:
            vlafit.load_policy(copy)
        assert f"base={elsewhere!r}" in str(caught.value) and "not in this folder" in str(caught.value)
    (copy / "below").symlink_to(base)
    edit(copy / CONFIG, base_model_name_or_path=str(copy / "below"))
    with pytest.raises(WeightsError, match="not in this folder"):
        vlafit.load_policy(copy)
    (copy / "below").unlink()
    base.rename(copy / "below")
    assert torch.equal(velocity(vlafit.load_policy(copy)), before)
    (copy / "below").rename(base)
    edit(copy / CONFIG, base_model_name_or_path=None)
    with pytest.raises(WeightsError, match="adapter_config.json names no base.*base="):
        vlafit.load_policy(copy)
    vlafit.save_checkpoint(make_policy(), copy.parent / "ours")
    with pytest.raises(WeightsError, match="copy: .*base .*ours is no plain"):
        vlafit.load_checkpoint(copy, base=copy.parent / "ours")


# --------------------------------------------------------------------------------------------- refusals


def stored(copy: Path, change) -> None:
    tensors = load_file(copy / TENSORS)
    change(tensors, min(tensors))
    save_file(tensors, copy / TENSORS)


DAMAGE = {
    "missing": (lambda t, n: t.pop(n), r"missing \(1\)"),
    "surplus": (
        lambda t, n: t.update({"base_model.model.nowhere.lora_A.weight": t[n] + 1}),
        r"surplus \(1\)",
    ),
    "reshaped": (lambda t, n: t.update({n: t[n][:, :-1].contiguous()}), r"misshapen \(1\)"),
    "whole numbers": (lambda t, n: t.update({n: t[n].int()}), r"not floating-point \(1\)"),
    "NaN": (lambda t, n: t[n].fill_(float("nan")), "are not finite"),
    "other names": (lambda t, n: t.update({n.removeprefix("base_model."): t.pop(n)}), "not peft's names"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_adapters_are_refused_by_name(copy: Path, case: str):
    change, message = DAMAGE[case]
    stored(copy, change)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(copy)
    if case != "NaN":
        with pytest.raises(WeightsError, match=message):
            checkpoints.inspect(copy)


SETTINGS = {
    "no such module": (
        {"target_modules": ["q_proj", "qqq_proj"]},
        "target_modules .*qqq_proj",
    ),
    "no match": ({"target_modules": "nothing.*"}, "no module of the base matches target_modules 'nothing"),
    "all linear": ({"target_modules": "all-linear"}, "'all-linear' is not resolved here: list the modules"),
    "no target": ({"target_modules": []}, "target_modules must be a list of modules or a pattern"),
    "a bias": ({"bias": "all"}, "settings that are not supported here: bias is 'all'"),
    "pissa": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa', which changes the weights below",
    ),
    "another method": ({"peft_type": "VERA"}, "adapters of the kind VERA are not known here; merge them"),
    "a key of the future": ({"use_magic": True}, "use_magic is True"),
    "another rank": ({"r": 3}, r"misshapen \(\d+\)"),
    "chosen layers": ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
    "saved modules of another": ({"modules_to_save": ["lm_head"], "peft_type": ""}, "adapters of the kind"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_we_do_not_repeat_are_refused_by_name(copy: Path, case: str):
    values, message = SETTINGS[case]
    edit(copy / CONFIG, **values)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(copy)


def test_adapters_that_began_with_eva_load_because_it_leaves_the_weights_below_alone(copy: Path):
    before = answer(vlafit.load_policy(copy))
    edit(copy / CONFIG, init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99})
    assert torch.equal(answer(vlafit.load_policy(copy)), before)


def test_a_part_of_our_own_checkpoint_and_half_a_folder_are_refused(copy: Path, tmp_path: Path):
    source = trained("lora", tmp_path / "here")
    with pytest.raises(WeightsError, match="only the adapters.*load that"):
        vlafit.load_policy(source / "adapters" / "lora")
    (copy / TENSORS).unlink()
    with pytest.raises(WeightsError, match="vlafit convert-pickle"):
        vlafit.load_policy(copy)
    (copy / CONFIG).write_text("[]")
    with pytest.raises(WeightsError, match=CONFIG):
        vlafit.load_policy(copy)


@pytest.mark.case(
    section="checkpoints",
    report="`modules_to_save` are not of the base",
    user_has="`lm_head` in `modules_to_save` of a tied model",
    now="unused, with a note; the embedding stays the base's",
)
def test_an_output_head_beside_the_adapters_is_unused_and_the_embedding_stays_the_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """peft copies the heads that modules_to_save names, also a tied one; they feed no action."""
    monkeypatch.setattr(lerobot_export, "refusals", lambda policy, codec: [])
    policy = random_policy(replace(pi0.SIZES["pi0-tiny"], max_tokens=64))
    select = {"part": "expert", "kind": ["attention", "mlp"]}
    plan = vlafit.apply_strategy(policy, [{"select": select, "mode": "lora", "rank": 2}, {"mode": "frozen"}])
    vlafit.save_checkpoint(policy, tmp_path / "c", codec=codec_for(policy, "mean_std"), plan=plan)
    out = tmp_path / "out"
    export(tmp_path / "c", "lerobot", out)
    before = vlafit.load_policy(out, config=GIVEN)
    edit(out / CONFIG, modules_to_save=["lm_head"])
    rows = before.get_parameter("language.embed_tokens.weight")
    heads = [lerobot.PI0.ties["language.embed_tokens.weight"], lerobot.PI0.unused[0]]
    more = {f"base_model.model.{name}": torch.full_like(rows, 3.0) for name in heads}
    save_file(load_file(out / TENSORS) | more, out / TENSORS)
    (out / "agreement.json").unlink()  # it speaks of the adapters that were exported
    after = vlafit.load_checkpoint(out, config=GIVEN)
    mine, theirs = dict(before.named_parameters()), dict(after.policy.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    note = next(note for note in after.report.notes if "feed no action" in note)
    assert all(name in note for name in heads)
