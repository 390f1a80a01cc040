"""A run that keeps the features of what is frozen is the run that computes them in every step, but faster."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.world import assert_same, learned, losses, metrics, tiny
from vlafit.errors import ConfigError, TrainingError
from vlafit.policies import build_family
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.batch_shape import BatchShape
from vlafit.train.feature_cache import CacheSize, require_room
from vlafit.train.flops import FlopCounter
from vlafit.tuning import load_strategy, preview

SEEN = {"steps": 8, "batch_size": 8}
"""Steps that see each sample of the dots more than once."""


def cached(card: Path, cache: str, strategy: str = "expert", **train: object) -> Recipe:
    return tiny(card, strategy=strategy, train={**SEEN, "cache": cache, **train})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features") / "kept"


@pytest.fixture(scope="module")
def runs(card: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a cache, with one in memory, and with one in a folder, by its name."""
    out = tmp_path_factory.mktemp("runs")
    for name, cache in (("off", "off"), ("memory", "memory"), ("folder", str(folder))):
        run(cached(card, cache), out / name)
    return out


def test_losses_of_training_and_validation_are_those_without_a_cache(runs: Path) -> None:
    for name in ("train/loss", "validation/loss"):
        off, memory = (
            {event["step"]: event[name] for event in metrics(runs / out) if name in event}
            for out in ("off", "memory")
        )
        assert len(off) > 2
        assert memory == pytest.approx(off, rel=1e-6), name


def test_a_folder_keeps_the_bits_that_memory_keeps(runs: Path) -> None:
    assert_same(learned(runs / "folder", 8), learned(runs / "memory", 8))


def test_another_run_computes_nothing_that_the_folder_keeps(
    card: Path, runs: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    with caplog.at_level(logging.INFO):
        run(cached(card, str(folder)), tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert "computed for 0 of " in caplog.text
    assert_same(learned(tmp_path / "again", 8), learned(runs / "folder", 8))


def test_a_run_that_is_resumed_with_an_empty_cache_or_in_another_place_has_the_same_bits(
    card: Path, runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(cached(card, "memory"), tmp_path / "run", callbacks=Until(5, crash))
    run(cached(card, str(tmp_path / "kept")), tmp_path / "run", resume=True)
    assert_same(learned(tmp_path / "run", 8), learned(runs / "folder", 8))


def test_a_run_without_a_cache_is_not_resumed_with_one(card: Path, runs: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.cache was 'off', is now 'memory'"):
        run(cached(card, "memory", steps=10), runs / "off", resume=True)


def test_the_size_is_named_before_training_and_is_at_least_that_of_the_files(
    card: Path, runs: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(cached(card, "memory", steps=1, validate_every=0), tmp_path / "run")
    (line,) = [line for line in caplog.messages if "at most" in line]
    assert "keys and values of the frozen prefix" in line and "free memory" in line
    assert line in json.loads((tmp_path / "run" / "run.json").read_text())["notices"]  # which the CLI prints
    files = list(folder.rglob("*.safetensors"))
    assert len(files) > 40
    largest = max(path.stat().st_size for path in files)
    named = float(line.split("(")[1].split(" MB each")[0]) * 1e6
    assert largest < named + 1e4  # what a file's header takes


def test_a_damaged_file_is_computed_again(
    card: Path, runs: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = min(folder.rglob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run(cached(card, str(folder)), tmp_path / "run")
    assert f"{path}: is damaged" in caplog.text
    assert path.read_bytes() == whole
    assert_same(learned(tmp_path / "run", 8), learned(runs / "folder", 8))


def test_other_frozen_weights_use_another_folder(
    card: Path, folder: Path, runs: Path, tmp_path: Path
) -> None:
    keys = set(folder.iterdir())
    run(cached(card, str(folder), seed=4, steps=1, validate_every=0), tmp_path / "run")
    (new,) = set(folder.iterdir()) - keys
    described = [json.loads((key / "key.json").read_text()) for key in (new, *keys)]
    assert {name for name in described[0] if described[0][name] != described[1][name]} == {"weights"}


def test_a_frozen_image_tower_is_kept_where_the_language_model_learns(card: Path, tmp_path: Path) -> None:
    for name, cache in (("without", "off"), ("with", str(tmp_path / "kept"))):
        run(cached(card, cache, "frozen-vision", steps=3), tmp_path / name)
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)
    (key,) = (tmp_path / "kept").glob("*/key.json")
    assert json.loads(key.read_text())["kind"] == "vision"


REFUSED = {
    "augmentation": ({"data": {"shift_pixels": 2}}, r"data\.shift_pixels = 2 changes the pixels"),
    "a strategy that trains the tower": ({"strategy": "full"}, r"strategy 'full' trains or adapts the image"),
    "a later stage that trains it": (
        {"strategy": "progressive"},
        r"adapts .* in one of its stages",
    ),
    "another family": (
        {"policy": {"family": "act", "size": "act-tiny", "config": {}}, "strategy": "full"},
        r"the family 'act' declares nothing",
    ),
    "shards": ({"train": {"sharding": "full"}}, r"train\.sharding = 'full'"),
    "a slip": ({"train": {"cache": "memry"}}, r"train\.cache 'memry'.*did you mean 'memory'.*\./memry"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_whose_features_would_change_is_refused_before_anything_is_written(
    card: Path, tmp_path: Path, name: str
) -> None:
    changes, message = REFUSED[name]
    recipe = cached(card, "memory", steps=40)
    for section, values in changes.items():
        new = values if isinstance(values, str) else replace(getattr(recipe, section), **values)
        recipe = replace(recipe, **{section: new})
    with pytest.raises(ConfigError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_features_without_room_are_refused_with_both_sizes() -> None:
    size = CacheSize("prefix", samples=270_000, sample_bytes=9_700_000)  # LIBERO, two cameras, pi0 in bf16
    require_room("train.cache", size, size.total, size.total, "free memory")
    with pytest.raises(ConfigError, match=r"270,000 samples, at most 2,619\.0 GB .* 128\.0 GB free memory"):
        require_room("train.cache", size, size.total, 128 * 10**9, "free memory")


def test_the_arithmetic_of_kept_features_is_not_counted() -> None:
    policy = build_family("pi0", "pi0-tiny", {}, device="meta")
    plan = preview(policy, load_strategy("expert"))
    shape = BatchShape(rows=2, cameras=2, tokens=8)
    whole, without_tower, without_prefix = (
        FlopCounter(policy, plan, draws=1, kept=kept)(shape) for kept in (None, "vision", "prefix")
    )
    assert 0 < without_prefix < without_tower < whole
