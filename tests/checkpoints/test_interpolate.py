"""Between base and fine-tuned weights, part by part; the base is the one that training began with."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vlafit
from tests.checkpoints.test_export import codec_for
from tests.policies.tiny import random_policy
from vlafit import checkpoints
from vlafit.checkpoints.export import export
from vlafit.checkpoints.history import Lineage
from vlafit.checkpoints.interpolate import codec_notes, interpolate
from vlafit.cli import main
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.policies import pi0


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(vlafit.load_policy(path).named_parameters())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and one that says that it was fine-tuned from it."""
    folder = tmp_path_factory.mktemp("pair")
    base = random_policy("pi0-tiny", seed=0)
    seeds = {"reach": (1, 2)}
    vlafit.save_checkpoint(base, folder / "base", history=Lineage(seeds=seeds))
    history = Lineage(base=checkpoints.digest(folder / "base"), seeds={"reach": (1, 2), "push": (7,)})
    recipe = f'[policy]\ncheckpoint = "{folder / "base"}"\n'
    tuned = random_policy(replace(pi0.SIZES["pi0-tiny"], max_tokens=64), seed=1)
    vlafit.save_checkpoint(tuned, folder / "tuned", codec_for(tuned), recipe=recipe, history=history)
    return folder / "base", folder / "tuned"


# ------------------------------------------------------------------------------------------- the function


def test_0_is_the_base_and_1_the_fine_tuned_bit_for_bit_and_a_half_their_mean():
    base, tuned = random_policy("pi0-tiny", 0), random_policy("pi0-tiny", 1)
    made = interpolate(
        random_policy("pi0-tiny", 1),
        base,
        {"vision": 0.0, "language": 0.5, "expert": 1.0, "projections": 0.8},
    )
    for info in made.parts():
        own, one, two = (p.get_parameter(info.name) for p in (made, base, tuned))
        match info.part:
            case "vision":
                assert torch.equal(own, one)
            case "language":
                torch.testing.assert_close(own, (one + two) / 2, rtol=1e-6, atol=1e-7)
            case "projections":
                torch.testing.assert_close(own, one + 0.8 * (two - one), rtol=1e-6, atol=1e-6)
            case _:
                assert torch.equal(own, two)


def test_the_sum_is_made_in_float32_and_cast_once():
    base, tuned = random_policy("pi0-tiny", 0), random_policy("pi0-tiny", 1).bfloat16()
    name = "language.layers.0.mlp.up_proj.weight"
    want = torch.lerp(base.get_parameter(name), tuned.get_parameter(name).float(), 0.3).bfloat16()
    assert torch.equal(interpolate(tuned, base, {"language": 0.3}).get_parameter(name), want)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (
            {"lnguage": 0.5},
            r"no part 'lnguage'; its parts are vision, .*, projections; did you mean 'language'\?$",
        ),
        ({"language": 1.5}, "the share of language must be a number from 0 .* to 1 .*, not 1.5"),
        ({"language": "half"}, "must be a number"),
        ({"language": float("nan")}, "must be a number"),
    ],
)
def test_parts_and_shares_that_mean_nothing_are_refused(shares: dict, message: str):
    with pytest.raises(WeightsError, match=message):
        interpolate(random_policy("pi0-tiny"), random_policy("pi0-tiny"), shares)


def test_shapes_that_differ_are_refused_where_they_are_to_be_mixed_and_only_there():
    config = pi0.SIZES["pi0-tiny"]
    base = random_policy(replace(config, action_dim=9))
    tuned = random_policy(config)
    with pytest.raises(WeightsError, match=r"misshapen \(3\): action_in_proj\.weight.*\(16, 9\)"):
        interpolate(tuned, base, {"projections": 0.5})
    interpolate(tuned, base, {"language": 0.0})
    name = "language.layers.0.mlp.up_proj.weight"
    assert torch.equal(tuned.get_parameter(name), base.get_parameter(name))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("smolvla-tiny", "this policy is a pi0, the base a smolvla"),
        ("pi05-tiny", "pi05 is True in the base, False in this policy"),
        (
            replace(
                pi0.SIZES["pi0-tiny"],
                language=replace(pi0.SIZES["pi0-tiny"].language, heads=2, kv_heads=1, head_dim=16),
            ),
            "language is .* in the base",
        ),
    ],
)
def test_a_base_of_another_form_is_refused(other, message: str):
    with pytest.raises(WeightsError, match=message):
        interpolate(random_policy("pi0-tiny"), random_policy(other), {"language": 0.5})


# ---------------------------------------------------------------------------------------------- the export


@pytest.mark.parametrize("target", ["vlafit", "transformers"])
def test_the_base_is_found_by_the_recipe_and_its_hash(target, pair: tuple[Path, Path], tmp_path: Path):
    base, tuned = pair
    made = export(tuned, target, tmp_path / "out", interpolate={"language": 0.0, "vision": 0.25})
    assert any("0 of language, 0.25 of vision; of other parts everything" in note for note in made.notes)
    found, one, two = weights(tmp_path / "out"), weights(base), weights(tuned)
    for info in random_policy("pi0-tiny").parts():
        name = info.name
        share = {"language": 0.0, "vision": 0.25}.get(info.part, 1.0)
        torch.testing.assert_close(found[name], torch.lerp(one[name], two[name], share), rtol=0, atol=0)


def test_projections_for_numbers_normalised_otherwise_are_mixed_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = random_policy(replace(pi0.SIZES["pi0-tiny"], max_tokens=64))
    own, same, other = (codec_for(policy), codec_for(policy), codec_for(policy, "quantile"))
    assert codec_notes(own, same, {"projections": 0.5}) == ()
    assert codec_notes(own, other, {"language": 0.5}) == codec_notes(own, other, {"projections": 1.0}) == ()
    assert "no codec" in codec_notes(own, None, {"projections": 0.5})[0]
    wider = dict(own.statistics)
    wider["action"] = replace(wider["action"], std=wider["action"].std * 2)
    moved = Codec(own.config, own.embodiment, wider, own.tokenizer)
    assert codec_notes(own, moved, {"projections": 0.5})[0].startswith("action are normalised otherwise")
    vlafit.save_checkpoint(policy, tmp_path / "base", other)
    vlafit.save_checkpoint(policy, tmp_path / "tuned", own)
    command = ["export", str(tmp_path / "tuned"), "--to", "vlafit", "--base", str(tmp_path / "base")]
    assert main([*command, "--out", str(tmp_path / "out"), "--interpolate", "projections=0.5"]) == 0
    assert "note: state and action are normalised otherwise in the base" in capsys.readouterr().out


def test_what_comes_out_remembers_what_it_learned_from_and_how_it_was_made(
    pair: tuple[Path, Path], tmp_path: Path
):
    base, tuned = pair
    export(tuned, "vlafit", tmp_path / "out", interpolate={"expert": 0.5})
    history = checkpoints.read_lineage(tmp_path / "out")
    assert history.seeds == {"push": (7,), "reach": (1, 2)} and history.base == checkpoints.digest(base)
    digest = checkpoints.digest(base)[:12]
    assert history.made == f"interpolated: from checkpoint {digest} on, 0.5 of expert"
    assert vlafit.load_checkpoint(tmp_path / "out").codec is not None


def test_a_base_that_is_not_there_or_another_one_is_never_taken_silently(
    pair: tuple[Path, Path], tmp_path: Path
):
    base, tuned = (shutil.copytree(path, tmp_path / path.name) for path in pair)
    (tuned / "recipe.toml").unlink()
    manifest = json.loads((tuned / "manifest.json").read_text())
    del manifest["files"]["recipe.toml"]
    (tuned / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=f"^{tuned}: .*which checkpoint.*--base"):
        export(tuned, "vlafit", tmp_path / "out", interpolate={"expert": 0.5})
    assert export(tuned, "vlafit", tmp_path / "a", interpolate={"expert": 0.5}, base=base).notes[1:] == ()
    vlafit.save_checkpoint(random_policy("pi0-tiny", seed=5), tmp_path / "other")
    made = export(tuned, "vlafit", tmp_path / "b", interpolate={"expert": 0.5}, base=tmp_path / "other")
    assert "is not the checkpoint that training began with, by its hash" in made.text()
    with pytest.raises(WeightsError, match="'nowhere' is not there.*--base"):
        export(tuned, "vlafit", tmp_path / "c", interpolate={"expert": 0.5}, base="nowhere")


def test_a_recipe_whose_checkpoint_has_changed_since_is_refused(tmp_path: Path):
    vlafit.save_checkpoint(random_policy("pi0-tiny", 0), tmp_path / "base")
    history = Lineage(base=checkpoints.digest(tmp_path / "base"))
    recipe = f'[policy]\ncheckpoint = "{tmp_path / "base"}"\n'
    vlafit.save_checkpoint(random_policy("pi0-tiny", 1), tmp_path / "tuned", recipe=recipe, history=history)
    vlafit.save_checkpoint(random_policy("pi0-tiny", 2), tmp_path / "base")
    with pytest.raises(WeightsError, match=f"^{tmp_path}/tuned: .*{tmp_path}/base now.*SHA-256.*--base"):
        export(tmp_path / "tuned", "vlafit", tmp_path / "out", interpolate={"expert": 0.5})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "on its base"])
def test_adapters_are_merged_first(whole: bool, tmp_path: Path):
    base = random_policy("pi0-tiny", 0)
    vlafit.save_checkpoint(base, tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    rules = [{"select": {"part": "language", "kind": "mlp"}, "mode": "lora", "rank": 2}, {"mode": "frozen"}]
    plan = vlafit.apply_strategy(policy, rules)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    history = Lineage(base=checkpoints.digest(tmp_path / "base"))
    below = None if whole else tmp_path / "base"
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=below, history=history)
    merged = vlafit.merge(policy)
    given = tmp_path / "base" if whole else None
    made = export(tmp_path / "c", "vlafit", tmp_path / "out", interpolate={"language": 0.5}, base=given)
    assert made.merge_error is not None and made.merge_error < 1e-5
    name = "language.layers.0.mlp.up_proj.weight"
    want = (base.get_parameter(name) + merged.get_parameter(name)) / 2
    torch.testing.assert_close(weights(tmp_path / "out")[name], want, rtol=1e-6, atol=1e-6)


def test_the_command_line_interpolates(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, (base, tuned) = tmp_path / "out", pair
    command = ["export", str(tuned), "--to", "vlafit", "--out", str(out)]
    assert main([*command, "--interpolate", "language=0,vision=0.5", "--base", str(base)]) == 0
    assert "0 of language, 0.5 of vision" in capsys.readouterr().out
    name = "language.embed_tokens.weight"
    assert torch.equal(weights(out)[name], weights(base)[name])
    command[-1] = str(tmp_path / "no")
    for wrong, message in {
        "lnguage=0.5": "its parts are vision, projector, language, expert, projections",
        "language": "'language' is not KEY=VALUE",
        "language=0.5,language=1": "names a part twice",
    }.items():
        assert main([*command, "--interpolate", wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
