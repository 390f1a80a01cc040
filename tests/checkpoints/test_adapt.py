"""Another action or state width, another chunk, another robot: declared, and listed in the report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import vlafit
from tests.codec import robots
from tests.policies.tiny import random_batch, random_draws, random_policy
from vlafit.checkpoints import inspect
from vlafit.checkpoints.formats.openpi import norm_stats as openpi_assets
from vlafit.codec import Codec
from vlafit.codec.tokenizer import train_word_tokenizer
from vlafit.errors import CodecError, ConfigError, WeightsError
from vlafit.policies.pi0 import SIZES
from vlafit.types import Observation

OPENPI = Path(__file__).parents[1] / "fixtures" / "openpi_pi0"
TOLD = {"vision.heads": 2, "chunk": 6}
TOKENIZER = train_word_tokenizer(["pick up the cube"], 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    vlafit.save_checkpoint(random_policy("pi0-tiny"), folder)
    return folder


def test_another_width_is_refused_until_it_is_said_what_becomes_of_the_projections(saved: Path):
    with pytest.raises(WeightsError, match="action_in_proj.weight, action_out_proj.weight.*resize='keep'"):
        vlafit.load_policy(saved, config={"action_dim": 9})


def test_wider_projections_keep_what_they_knew_and_add_zeros(saved: Path):
    narrow = vlafit.load_policy(saved)
    policy, _, _, report = vlafit.load_checkpoint(saved, config={"action_dim": 9}, resize="keep")
    assert report.adapted == (
        "action_dim: 9, 5 in the checkpoint",
        "action_in_proj.weight: padded with zeros, (16, 5) to (16, 9)",
        "action_out_proj.weight: padded with zeros, (5, 16) to (9, 16)",
        "action_out_proj.bias: padded with zeros, (5,) to (9,)",
    )
    small, config = random_batch(SIZES["pi0-tiny"]), policy.config
    wide = random_batch(config)
    assert small.actions is not None and wide.actions is not None
    for field in ("images", "image_mask", "tokens", "token_mask", "state"):
        setattr(wide, field, getattr(small, field))
    wide.actions = torch.nn.functional.pad(small.actions, (0, 4))
    noise, time = random_draws(SIZES["pi0-tiny"], draws=1)
    with torch.no_grad():
        old = narrow.velocity(small, noise[0], time[0])
        new = policy.velocity(wide, torch.nn.functional.pad(noise[0], (0, 4)), time[0])
    assert torch.allclose(new[..., :5], old, atol=1e-5)
    assert not new[..., 5:].any()


def test_narrower_projections_are_sliced(saved: Path):
    whole = vlafit.load_policy(saved)
    policy, _, _, report = vlafit.load_checkpoint(saved, config={"state_dim": 4}, resize="keep")
    assert report.adapted[1] == "state_proj.weight: sliced, (16, 6) to (16, 4)"
    kept, before = (dict(p.named_parameters())["state_proj.weight"] for p in (policy, whole))
    assert torch.equal(kept, before[:, :4])


def test_fresh_projections_are_named_as_fresh(saved: Path):
    report = vlafit.load_checkpoint(saved, config={"action_dim": 7}, resize="fresh").report
    assert report.fresh == ("action_in_proj.weight", "action_out_proj.weight", "action_out_proj.bias")
    assert "fresh (3): action_in_proj.weight" in report.text()


def test_another_chunk_length_is_listed(saved: Path):
    report = vlafit.load_checkpoint(saved, config={"chunk": 7}).report
    assert report.adapted == ("chunk: 7 actions at once, 4 in the checkpoint",)


def test_inspect_tells_the_same_without_a_number_read(saved: Path):
    loaded = inspect(saved, config={"action_dim": 9}, resize="keep")
    assert all(p.is_meta for p in loaded.policy.parameters())
    whole = vlafit.load_checkpoint(saved, config={"action_dim": 9}, resize="keep").report
    assert loaded.report.adapted == whole.adapted
    assert loaded.report.bytes == whole.bytes == 4 * whole.parameters
    assert json.loads(json.dumps(loaded.report.facts()))["bytes_to_train"] == 16 * whole.parameters


def test_openpis_statistics_become_a_codec_that_normalises_as_openpi_does():
    codec = vlafit.load_checkpoint(OPENPI, config=TOLD, tokenizer=TOKENIZER).codec
    assert codec is not None
    recorded = json.loads((OPENPI / "assets/my_robot/norm_stats.json").read_text())["norm_stats"]
    assert codec.embodiment.name == "my_robot"
    assert (codec.embodiment.state.shape, codec.embodiment.action.shape) == ((8,), (7,))
    state = np.linspace(-3, 3, 8).astype(np.float32)
    image = np.zeros((224, 224, 3), np.uint8)
    seen = Observation({"base_0_rgb": image}, state, "pick up the cube")
    encoded = codec.encode(seen)
    mean, std = (np.array(recorded["state"][name]) for name in ("mean", "std"))
    assert np.allclose(encoded.state[:8], (state - mean) / (std + 1e-6), rtol=1e-6)
    assert not encoded.state[8:].any()
    assert encoded.image_mask.tolist() == [True, False, False]
    decoded = codec.decode(np.ones((6, 32), np.float32), seen).actions
    mean, std = (np.array(recorded["actions"][name]) for name in ("mean", "std"))
    assert np.allclose(decoded, mean + std + 1e-6, rtol=1e-6)


def test_quantiles_normalise_where_the_user_says_so(tmp_path: Path):
    config = {**TOLD, "codec.normalisation": "quantile"}
    codec = vlafit.load_checkpoint(OPENPI, config=config, tokenizer=TOKENIZER).codec
    assert codec is not None
    low = codec.statistics["state"].q01
    assert low is not None
    image = np.zeros((224, 224, 3), np.uint8)
    encoded = codec.encode(Observation({"base_0_rgb": image}, low.astype(np.float32), "pick"))
    assert np.allclose(encoded.state[:8], -1, atol=1e-3)
    codec.save(tmp_path)
    again = Codec.load(tmp_path).statistics["state"]
    assert np.array_equal(again.mean, codec.statistics["state"].mean) and again.min is None


def test_without_a_tokenizer_there_is_no_codec_and_the_report_says_why():
    loaded = vlafit.load_checkpoint(OPENPI, config=TOLD)
    assert loaded.codec is None
    reason = loaded.report.codec or ""
    assert "no tokenizer in the checkpoint: give one (statistics in it: my_robot)" in reason
    assert "--tokenizer" in reason


@pytest.fixture
def several(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(OPENPI, tmp_path / "copy"))
    shutil.copytree(folder / "assets" / "my_robot", folder / "assets" / "lab" / "other")
    return folder


def test_of_several_assets_one_must_be_named(several: Path):
    with pytest.raises(WeightsError, match=r"several assets \(lab/other, my_robot\)"):
        vlafit.load_checkpoint(several, config=TOLD, tokenizer=TOKENIZER)
    codec = vlafit.load_checkpoint(several, config=TOLD, tokenizer=TOKENIZER, assets="lab/other").codec
    assert codec is not None and codec.embodiment.name == "lab/other"
    with pytest.raises(WeightsError, match="did you mean 'my_robot'"):
        vlafit.load_checkpoint(several, config=TOLD, tokenizer=TOKENIZER, assets="my_robt")
    assert vlafit.load_checkpoint(several, config=TOLD).codec is None  # the policy alone needs no choice


def test_padded_statistics_are_cut_to_the_robots_own_dimensions(tmp_path: Path):
    path = tmp_path / "norm_stats.json"
    values = json.loads((OPENPI / "assets/my_robot/norm_stats.json").read_text())
    for one in values["norm_stats"].values():
        for name, numbers in one.items():
            one[name] = numbers + [0.0] * (32 - len(numbers))
    path.write_text(json.dumps(values))
    loaded = vlafit.load_checkpoint(OPENPI, config=TOLD, tokenizer=TOKENIZER, assets=tmp_path)
    assert loaded.codec is not None
    assert loaded.codec.embodiment.state.shape == (8,)
    assert any("last 24 of 32 state statistics are padding" in note for note in loaded.report.notes)
    wide = {**TOLD, "codec.state_dims": 10}
    codec = vlafit.load_checkpoint(OPENPI, config=wide, tokenizer=TOKENIZER, assets=tmp_path).codec
    assert codec is not None and codec.embodiment.state.shape == (10,)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("actions"),
        lambda s: s["state"].pop("std"),
        lambda s: s["state"]["std"].pop(),
        lambda s: s["state"]["mean"].__setitem__(0, float("nan")),
        lambda s: s["state"]["std"].__setitem__(0, -1.0),
        lambda s: s.update(state=[1, 2]),
    ],
)
def test_damaged_statistics_are_one_clear_error(damage, tmp_path: Path):
    values = json.loads((OPENPI / "assets/my_robot/norm_stats.json").read_text())
    damage(values["norm_stats"])
    (tmp_path / "norm_stats.json").write_text(json.dumps(values))
    with pytest.raises(CodecError, match="norm_stats.json"):
        openpi_assets.read(tmp_path / "norm_stats.json")


def test_an_option_that_codecs_have_not_is_refused():
    with pytest.raises(ConfigError, match="codec.*relativ"):
        vlafit.load_checkpoint(OPENPI, config={**TOLD, "codec.relativ": [True]}, tokenizer=TOKENIZER)


def test_a_checkpoint_with_its_own_codec_takes_no_other(tmp_path: Path):
    from tests.checkpoints.test_native import CONFIG

    vlafit.save_checkpoint(random_policy(CONFIG), tmp_path / "c", robots.codec(np.random.default_rng(0)))
    with pytest.raises(WeightsError, match=f"^{tmp_path}/c: .*codec of its own.*tokenizer"):
        vlafit.load_checkpoint(tmp_path / "c", tokenizer=TOKENIZER)
