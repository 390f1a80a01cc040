"""A run of mixed batches computes no padding, and has the losses of the run that does."""

import logging
from pathlib import Path

import pytest

from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.test_two_processes import run_in_two
from tests.train.world import assert_same, learned, losses, metrics, tiny, write_dots
from vlafit import config
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe
from vlafit.train import run


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of dots whose instructions have 4 and 12 words."""
    tasks = ("left", "right and then on to where the blue cup stands")
    return write_dots(tmp_path_factory.mktemp("mixed"), tasks=tasks)


def recipe(card: Path, packing: str, **train: object) -> Recipe:
    return tiny(card, train={"packing": packing, "batch_size": 8, **train})


@pytest.fixture(scope="module")
def runs(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    for name in ("none", "auto"):
        run(recipe(mixed, name), out / name)
    return out


def test_losses_are_those_of_padded_batches(runs: Path) -> None:
    for name in ("train/loss", "train/grad_norm", "validation/loss"):
        padded, packed = (
            {event["step"]: event[name] for event in metrics(runs / out) if name in event}
            for out in ("none", "auto")
        )
        assert packed == pytest.approx(padded, rel=1e-5), name
        assert len(padded) > 2


def test_the_choice_and_what_it_leaves_out_are_shown(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, runs: Path
) -> None:
    with caplog.at_level(logging.INFO):
        run(recipe(mixed, "auto", steps=2, validate_every=0, save_every=0), tmp_path / "run")
    (line,) = [line for line in caplog.messages if line.startswith("train.packing")]
    assert "2 of 2 micro-batches were computed row after row (attention padded)" in line
    assert config.read(Recipe, runs / "auto" / "recipe.toml", "recipe").train.packing == "rows"
    tokens = [event["train/tokens_per_s"] / event["train/samples_per_s"] for event in metrics(runs / "auto")
              if "train/tokens_per_s" in event]  # fmt: skip
    padded = [event["train/tokens_per_s"] / event["train/samples_per_s"] for event in metrics(runs / "none")
              if "train/tokens_per_s" in event]  # fmt: skip
    assert max(tokens) < min(padded)


def test_a_resumed_run_keeps_what_it_began_with(mixed: Path, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(recipe(mixed, "auto"), tmp_path / "run", callbacks=Until(5, crash))
    run(recipe(mixed, "auto"), tmp_path / "run", resume=True)
    assert_same(learned(tmp_path / "run", 8), learned(runs / "auto", 8))
    run(recipe(mixed, "auto", steps=9), runs / "none", resume=True)
    assert config.read(Recipe, runs / "none" / "recipe.toml", "recipe").train.packing == "none"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(mixed: Path, runs: Path, tmp_path: Path) -> None:
    cases = {
        "copies": recipe(mixed, "rows"),
        "sharded": recipe(mixed, "rows", sharding="full", recompute="selective"),
    }
    run_in_two([(one, tmp_path / name) for name, one in cases.items()], tmp_path)
    for name in cases:
        assert losses(tmp_path / name) == pytest.approx(losses(runs / "auto"), rel=1e-5)


def test_packed_rows_of_a_family_that_takes_none_and_of_compiled_blocks_are_refused(
    mixed: Path, tmp_path: Path
) -> None:
    act = tiny(
        mixed,
        policy={"family": "act", "size": "act-tiny", "config": {}},
        train={"packing": "rows", "steps": 1},
    )
    with pytest.raises(ConfigError, match=r"train\.packing = \"rows\": the family 'act'"):
        run(act, tmp_path / "act")
    with pytest.raises(ConfigError, match=r"train\.packing = \"rows\" makes batches of as many lengths"):
        run(recipe(mixed, "rows", compile="blocks"), tmp_path / "compiled")
