"""Ranking and recommendation: pure functions over arms made for the test."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from vlafit.compare.arm_record import HELD_OUT, ArmRecord, Figures, Memory, ValidationPoint
from vlafit.compare.judge import judge, lower_losses, rank_correlation
from vlafit.compare.pairs import shared
from vlafit.compare.pooled_score import dispersion, interval
from vlafit.compare.standing import Standing, cheapest, choose_lr
from vlafit.compare.summary import strategy_json
from vlafit.score import Score, wilson
from vlafit.significance import independent_episodes_needed, starts_needed


def figures(
    success: tuple[int, int] | None = None,
    *,
    loss: float = 1.0,
    mb: float = 100.0,
    speed: float = 10.0,
    by_start: bool = True,
) -> Figures:
    """Return the figures of an arm that succeeded at the first so many of its starts."""
    wins, starts = success or (0, 0)
    outcomes: dict[str, bool | None] = {str(60_000 + i): i < wins for i in range(starts)}
    points = (ValidationPoint(0, 0, 0.0, 2.0), ValidationPoint(5, 20, 1.0, loss))
    return Figures(
        steps=5,
        samples=20,
        train_seconds=2.0,
        samples_per_s=speed,
        parameters=100,
        trainable=10,
        checkpoint_bytes=400,
        validation={HELD_OUT: points},
        success={} if success is None else {"after": {"task": Score(*success)}},
        outcomes={"after": {"task": outcomes}} if by_start and outcomes else {},
        memory=Memory(int(mb * 1e6), {"weights": 1}),
    )


def record(name: str, made: Figures | None, *, lr: float = 1e-3, seed: int = 0) -> ArmRecord:
    error = None if made else "it broke"
    return ArmRecord(f"{name}-{seed}", name, name, "0" * 64, lr, seed, "1" * 64, True, made, error)


def standing(name: str, seeds: Sequence[tuple[int, int] | None], **more: Any) -> Standing:
    made = tuple(record(name, figures(one, **more), seed=i) for i, one in enumerate(seeds))
    return Standing(name, 1e-3, made)


# ------------------------------------------------------------------------------------------- ranking


def test_strategies_that_differ_at_few_starts_are_not_ranked() -> None:
    verdict = judge([standing("full", [(18, 25), (20, 25)]), standing("expert", [(16, 25), (17, 25)])])
    assert not verdict.ranked and verdict.better == ()
    assert verdict.sentence.startswith("No ranking") and verdict.leaders == ("full", "expert")
    (pair,) = verdict.pairs
    assert (pair.first, pair.second, pair.seeds, pair.starts) == ("full", "expert", 2, 25)
    assert (pair.first_only, pair.second_only, pair.difference) == (4, 0, 0.1)
    assert pair.p == pair.p_holm == 2 / 2**4 and pair.better is None and pair.stopped_after is None


def test_a_difference_at_the_same_starts_is_ranked_though_the_intervals_overlap() -> None:
    """21 and 15 of 25: Wilson's intervals overlap, yet the second fails at six starts and wins at none."""
    full, expert = standing("full", [(21, 25)] * 2), standing("expert", [(15, 25)] * 2)
    assert full.interval[0] < expert.interval[1]
    verdict = judge([expert, full])
    assert verdict.better == (("full", "expert"),) and verdict.recommended == "full"
    (pair,) = verdict.pairs
    assert pair.p == 2 / 2**6 and pair.interval[0] > 0


def test_outcomes_are_compared_at_the_same_starts_and_not_only_counted() -> None:
    """Both succeed at 15 of 25 starts: one at the first, the other at the last ones."""
    same, other = standing("same", [(15, 25)] * 2), standing("other", [(15, 25)] * 2)
    reversed_records = tuple(
        replace(record, figures=replace(record.figures, outcomes={"after": {"task": outcomes}}))
        for record in other.records
        if record.figures
        for outcomes in [{str(60_000 + i): i >= 10 for i in range(25)}]
    )
    (pair,) = judge([same, replace(other, records=reversed_records)]).pairs
    assert (pair.first_only, pair.second_only, pair.difference) == (10, 10, 0.0)


def test_a_record_without_outcomes_by_start_is_not_ranked_and_says_what_to_do() -> None:
    old = [standing(name, [(n, 25)] * 2, by_start=False) for name, n in (("full", 24), ("expert", 3))]
    verdict = judge(old)
    assert not verdict.ranked and not verdict.recommended and verdict.pairs == ()
    assert "full, expert" in verdict.sentence and "vlafit report" in verdict.sentence
    mixed = judge([old[0], standing("lora", [(22, 25)] * 2), standing("dora", [(1, 25)] * 2)])
    assert mixed.better == (("lora", "dora"),) and any("Not ranked: full." in note for note in mixed.notes)


def test_a_difference_of_few_training_runs_is_said_to_be_one_of_these_runs() -> None:
    verdict = judge([standing("full", [(25, 25), (14, 25)]), standing("expert", [(12, 25)] * 2)])
    assert verdict.better == (("full", "expert"),)
    (pair,) = verdict.pairs
    assert pair.interval_new_runs is not None and pair.interval_new_runs[0] < 0
    assert any("for these training runs" in note and "2 seeds" in note for note in verdict.notes)


def test_clear_differences_are_ranked_and_the_others_are_named() -> None:
    verdict = judge(
        [
            standing("projections", [(1, 25), (2, 25)]),
            standing("full", [(24, 25), (23, 25)]),
            standing("expert", [(22, 25), (23, 25)]),
        ]
    )
    assert verdict.better == (("full", "projections"), ("expert", "projections"))
    assert verdict.leaders == ("full", "expert")
    assert "full is better than projections" in verdict.sentence
    assert "Not told apart, and so not ranked: full and expert" in verdict.sentence


def test_of_those_that_may_be_the_best_the_cheapest_is_recommended_with_its_reason() -> None:
    verdict = judge(
        [
            standing("full", [(24, 25)] * 2, mb=400.0),
            standing("expert", [(22, 25)] * 2, mb=150.0),
            standing("none", [(0, 25)] * 2),
        ]
    )
    assert verdict.recommended == "expert"
    assert "cheapest of the 2 that cannot be told apart" in verdict.reason
    assert "150 MB" in verdict.reason and "full 400 MB" in verdict.reason
    (note,) = verdict.notes
    needed = starts_needed(shared(*(standing(n, [(k, 25)] * 2) for n, k in (("full", 24), ("expert", 22)))))
    assert f"{needed} starts ({2 * needed} episodes" in note and "96 % against 88 %" in note
    assert f"{independent_episodes_needed(0.96, 0.88):,} episodes" in note


def test_the_best_alone_is_recommended_whatever_it_costs() -> None:
    verdict = judge([standing("full", [(25, 25)] * 2, mb=900.0), standing("expert", [(2, 25)] * 2, mb=1.0)])
    assert verdict.recommended == "full" and "better than every other" in verdict.reason


def test_a_strategy_with_one_finished_seed_is_neither_ranked_nor_recommended() -> None:
    verdict = judge([standing("full", [(25, 25)]), standing("expert", [(2, 25)], mb=1.0)])
    assert not verdict.ranked and verdict.better == () and verdict.recommended == ""
    assert "full, expert have one finished seed each" in verdict.sentence
    assert "variation between training runs is unknown" in verdict.sentence
    two = [standing("full", [(24, 25)] * 2), standing("expert", [(3, 25)] * 2)]
    verdict = judge([standing("lucky", [(25, 25), None], mb=1.0), *two])
    assert verdict.better == (("full", "expert"),) and verdict.recommended == "full"
    assert verdict.notes[0].startswith("Neither ranked nor recommended: lucky has one finished seed")
    unplayed = [
        Standing(name, 1e-3, (record(name, figures(loss=x)),)) for name, x in (("full", 0.1), ("expert", 0.9))
    ]
    by_loss = judge(unplayed)
    assert by_loss.by == "loss" and not by_loss.ranked and by_loss.recommended == ""
    assert "one finished seed each" in by_loss.sentence


def test_the_pooled_figure_has_one_interval_and_it_is_the_widened_one() -> None:
    one = standing("full", [(25, 25), (4, 25)])
    pooled, plain = one.pooled(), wilson(29, 50)
    assert pooled is not None and pooled.interval == one.interval == one.tasks()["task"].interval
    assert pooled.interval[0] < plain[0] and pooled.interval[1] > plain[1]
    low, high = (round(100 * end) for end in one.interval)
    assert str(pooled) == f"29/50 = 58 % (95 %: {low} to {high} %)"
    made = strategy_json(one)["success"]["after"]
    assert (made["overall"]["low"], made["overall"]["high"]) == one.interval
    assert made["overall"]["wilson"] == list(plain)
    assert made["seeds"]["0"]["low"] == wilson(25, 25)[0], "a seed's own is Wilson's"


def test_where_nothing_succeeds_nothing_is_recommended() -> None:
    verdict = judge([standing("full", [(0, 25)]), standing("expert", [(0, 25)])])
    assert not verdict.recommended and "No strategy succeeded" in verdict.sentence


def test_nothing_finished_is_said_and_not_ranked() -> None:
    broken = Standing("full", 1e-3, (record("full", None),))
    assert "No arm has finished" in judge([broken]).sentence


def test_one_strategy_alone_is_neither_ranked_nor_recommended() -> None:
    for seeds in ([(20, 25)], [None, None]):
        verdict = judge([standing("full", seeds)])
        assert not verdict.ranked and not verdict.recommended and "Only full has results" in verdict.sentence


def test_costs_within_5_per_cent_count_as_equal_and_speed_decides() -> None:
    slow, quick = standing("slow", [(1, 2)], mb=100.0), standing("quick", [(1, 2)], mb=104.0, speed=20.0)
    assert cheapest([slow, quick]).strategy == "quick"
    assert cheapest([slow, standing("large", [(1, 2)], mb=106.0, speed=20.0)]).strategy == "slow"


def test_seeds_that_differ_by_more_than_chance_widen_the_interval() -> None:
    alike, apart = [Score(15, 25), Score(14, 25)], [Score(25, 25), Score(4, 25)]
    assert dispersion(alike) == 1.0 and interval(alike) == wilson(29, 50)
    assert dispersion(apart) > 10
    low, high = interval(apart)
    assert low < wilson(29, 50)[0] and high > wilson(29, 50)[1]


def test_without_rollouts_the_loss_decides_only_where_seeds_agree() -> None:
    def by_loss(name: str, losses: Sequence[float]) -> Standing:
        made = tuple(record(name, figures(loss=loss), seed=i) for i, loss in enumerate(losses))
        return Standing(name, 1e-3, made)

    verdict = judge([by_loss("full", [0.50, 0.61, 0.40]), by_loss("expert", [0.60, 0.70, 0.51])])
    assert verdict.by == "loss" and verdict.better == (("full", "expert"),)
    assert "loss only, which is not success" in verdict.reason
    assert not judge([by_loss("full", [0.5, 0.6, 0.4]), by_loss("expert", [0.6, 0.5, 0.5])]).ranked
    assert lower_losses([("a", {0: 0.1}), ("b", {0: 0.9})]) == ((), 1.0), "one seed shows nothing"
    apart = [("a", {0: 0.1, 1: 0.1}), ("b", {2: 0.9, 3: 0.9})]
    assert lower_losses(apart) == ((), 1.0), "only shared seeds are compared"


def test_losses_of_equal_strategies_are_hardly_ever_ranked() -> None:
    draws = np.random.default_rng(0)
    trials, strategies, seeds = 400, 6, 3
    wrong = 0
    for _ in range(trials):
        drawn = draws.normal(1.0, 0.1, (strategies, seeds))
        better, lowest = lower_losses([(str(n), dict(enumerate(row))) for n, row in enumerate(drawn)])
        wrong += bool(better)
        assert bool(better) == (lowest <= 0.05)
    # At most 5 % of comparisons rank anything; three standard errors of the count of wrong ones.
    assert wrong <= 0.05 * trials + 3 * (0.05 * 0.95 * trials) ** 0.5


def test_the_loss_test_is_students_and_holms() -> None:
    losses = {"a": [0.50, 0.61, 0.40], "b": [0.60, 0.70, 0.51], "c": [0.9, 0.8, 0.7]}
    _, lowest = lower_losses([(name, dict(enumerate(row))) for name, row in losses.items()])
    expected = [ttest_rel(losses[x], losses[y]).pvalue for x, y in (("a", "b"), ("a", "c"), ("b", "c"))]
    assert lowest == pytest.approx(min(1.0, 3 * min(expected)))


# ------------------------------------------------------------------------------------ learning rates


def tried(losses: dict[float, Sequence[float | None]]) -> dict[float, list[ArmRecord]]:
    return {
        lr: [record("a", None if x is None else figures(loss=x), lr=lr, seed=i) for i, x in enumerate(found)]
        for lr, found in losses.items()
    }


def test_the_lowest_last_loss_over_all_seeds_that_tried_is_taken() -> None:
    choice = choose_lr(tried({1e-4: [0.5, 0.7], 3e-4: [0.4, 0.6], 1e-3: [0.3, 0.9]}))
    assert choice is not None and choice.lr == 3e-4 and choice.edge == ""
    assert choice.losses == pytest.approx({1e-4: 0.6, 3e-4: 0.5, 1e-3: 0.6})


@pytest.mark.parametrize(("best", "edge"), [(1e-4, "lowest"), (3e-4, ""), (1e-3, "highest")])
def test_the_best_on_the_edge_of_the_grid_is_said(best: float, edge: str) -> None:
    choice = choose_lr(tried({lr: [0.1 if lr == best else 0.5] for lr in (1e-3, 1e-4, 3e-4)}))
    assert choice is not None and (choice.lr, choice.edge) == (best, edge)


def test_one_learning_rate_has_no_edge() -> None:
    choice = choose_lr(tried({1e-3: [0.5]}))
    assert choice is not None and choice.edge == ""


def test_a_learning_rate_that_broke_a_seed_is_not_taken() -> None:
    choice = choose_lr(tried({1e-3: [0.5, 0.5], 1e-2: [0.1, None]}))
    assert choice is not None and choice.lr == 1e-3 and choice.losses[1e-2] is None
    assert choose_lr(tried({1e-3: [None]})) is None


# --------------------------------------------------------------------------------------- correlation


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([(1.0, 0.9), (2.0, 0.5), (3.0, 0.1)]) == pytest.approx(-1)
    assert rank_correlation([(1.0, 0.1), (2.0, 0.5), (30.0, 0.6)]) == pytest.approx(1)
    # scipy.stats.spearmanr([1, 2, 2, 4], [3, 1, 4, 2]).statistic
    assert rank_correlation([(1, 3), (2, 1), (2, 4), (4, 2)]) == pytest.approx(-0.316227766016838)
    assert rank_correlation([(1.0, 0.5), (2.0, 0.5), (3.0, 0.5)]) is None
    assert rank_correlation([(1.0, 0.5), (2.0, 0.6)]) is None
