"""`train.batch_size = "auto"` is the most that fits by the forecast; it is chosen once and kept."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.test_interruptions import Interrupted, Until, crash
from tests.train.world import assert_same, learned, tiny
from vlafit import config
from vlafit.compare.arms import with_budget
from vlafit.errors import ConfigError
from vlafit.policies import build_family
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.auto_batch import SIZES, choose_rows
from vlafit.train.data import open_data
from vlafit.train.fit import fit
from vlafit.train.forecast import Forecast, Workload, forecast
from vlafit.train.memory_ladder import Rung
from vlafit.train.preflight import check, meta_policy
from vlafit.tuning import load_strategy

FULL = load_strategy("full")
SHALLOW = {"max_tokens": 16, "vision.depth": 1, "language.depth": 1}
FP32 = Workload(1, cameras=1, precision="fp32", frozen="fp32")


def made_up(rung: Rung, rows: int) -> Forecast:
    """100 bytes of weights; then gradients take 50, or activations 10 a row, 4 where they are recomputed."""
    each = {"none": 10, "full": 4}[rung.recompute]
    return Forecast(100, 50, 0, 0, each * rows, max(50, each * rows))


def test_it_is_the_largest_size_that_fits() -> None:
    assert SIZES[:6] == [1, 2, 3, 4, 6, 8] and SIZES[-1] == 256
    for room, rows in (
        (150, 4),
        (160, 6),
        (179, 6),
        (180, 8),
        (1060, 96),
        (2019, 128),
        (2020, 192),
        (10**6, 256),
    ):
        assert choose_rows(made_up, [Rung()], room, 256) == (Rung(), rows), room
    assert choose_rows(made_up, [Rung()], 149, 256) is None
    assert choose_rows(made_up, [Rung()], 10**6, 100) == (Rung(), 96)
    assert choose_rows(made_up, [Rung()], 10**6, 2) == (Rung(), 2)


def test_a_smaller_rung_is_used_before_a_batch_of_a_few_samples() -> None:
    def steep(rung: Rung, rows: int) -> Forecast:
        made = made_up(rung, rows)
        return replace(made, step=made.step + 100 * rows * (rung.recompute == "none"))

    ladder = [Rung("none"), Rung("full")]
    assert choose_rows(steep, ladder, 549, 256) == (Rung("full"), 96)
    assert choose_rows(steep, ladder, 550, 256) == (Rung("none"), 4)
    assert choose_rows(steep, ladder[:1], 250, 256) == (Rung("none"), 1)


def automatic(card: Path, **train: object) -> Recipe:
    short = {"batch_size": "auto", "steps": 3, "save_every": 1, "validate_every": 0}
    return tiny(card, policy={"config": SHALLOW}, train=short | train)


def test_a_run_writes_what_it_picked_and_keeps_it(
    card: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = build_family("pi0", "pi0-tiny", SHALLOW, device="meta")
    bytes_of_6 = forecast(policy, FULL, replace(FP32, rows=6, draws=2, ema=True)).total
    some, more = (f"{1.05 * (bytes_of_6 + spare) / 1e9:.7f}GB" for spare in (1000, 10**8))
    with caplog.at_level(logging.INFO), pytest.raises(Interrupted):
        run(automatic(card, memory=some), tmp_path / "run", callbacks=Until(2, crash))
    assert any("train.batch_size = auto picks 6: forecast" in text for text in caplog.messages)
    assert config.read(Recipe, tmp_path / "run" / "recipe.toml", "recipe").train.batch_size == 6
    run(automatic(card, memory=more), tmp_path / "run", resume=True)  # where more would fit
    assert config.read(Recipe, tmp_path / "run" / "recipe.toml", "recipe").train.batch_size == 6
    run(automatic(card, batch_size=6), tmp_path / "given")
    assert_same(learned(tmp_path / "run", 3), learned(tmp_path / "given", 3))


@pytest.mark.slow
def test_the_batch_is_that_of_all_processes_and_a_cpu_has_its_free_ram(card: Path) -> None:
    recipe = automatic(card, precision="fp32", sharding="none", frozen="fp32")
    data = open_data(recipe.data, 0)
    made = fit(recipe, meta_policy(recipe, data), data, processes=2, gigabytes=100.0, on_cpu=True)
    assert made.recipe.train.batch_size == 256 and made.forecast is not None
    with pytest.raises(ConfigError) as raised:
        fit(recipe, meta_policy(recipe, data), data, processes=2, gigabytes=0.0001, on_cpu=True)
    for fact in ("the free RAM", "train.batch_size = 2", "forecast", "no setting lowers it"):
        assert fact in str(raised.value)


def test_where_it_could_not_be_meant_it_is_refused(card: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = \"auto\".*train\.memory = \"ignore\""):
        check(automatic(card, memory="ignore"), 1)
    with pytest.raises(ConfigError, match=r"train\.batch_size = \"auto\".*between arms"):
        with_budget(automatic(card), steps=3)
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        config.build(Recipe, {"train": {"batch_size": "all"}}, "here")
