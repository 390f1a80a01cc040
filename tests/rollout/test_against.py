"""Two evaluations are compared start by start, and one may end as soon as they are told apart."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.rollout.actors import Obedient, Saying
from vlafit.errors import ConfigError
from vlafit.rollout import Protocol, evaluate
from vlafit.rollout.against import Earlier, compare, read_earlier, stop_after

Make = Callable[..., Protocol]
PUBLISHED = Path(__file__).parents[2] / "eval" / "results"


@pytest.fixture(scope="module")
def idle(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of a policy that never moves: no success in 24 episodes."""
    out = tmp_path_factory.mktemp("idle")
    assert evaluate(Saying([[0, 0]] * 4), make(trials=12), out, workers=1, videos=0).rate == 0
    return out


def test_the_difference_is_paired_by_start(make: Make, idle: Path, tmp_path: Path) -> None:
    got = evaluate(Obedient(), make(trials=3), tmp_path, workers=1, videos=0, against=idle)
    kept = json.loads((tmp_path / "result.json").read_text())["against"]
    assert (kept["starts"], kept["here"], kept["there"]) == (
        6,
        4,
        0,
    )  # seeds 100, 101; it stands still at 102
    assert kept["here_only"] == 4 and kept["there_only"] == 0 and kept["difference"] == pytest.approx(4 / 6)
    assert kept["p"] == pytest.approx(stats.binomtest(4, 4).pvalue)  # McNemar's exact test
    assert "4 successes here, 0 there" in got.notices[0] and "not told apart: +67 points" in str(got)
    assert kept["differs_in"] == [] and not kept["stopped"]  # the number of trials is no difference


def test_an_evaluation_ends_as_soon_as_the_two_are_told_apart_whatever_the_workers(
    make: Make, idle: Path, tmp_path: Path
) -> None:
    texts = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        got = evaluate(
            Obedient(), make(trials=12), out, workers=workers, videos=0, against=idle, stop_early=True
        )
        lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
        texts.append([{**line, "wall_s": 0} for line in lines])
        assert got.overall.episodes == len(lines) < 24
        assert "STOPPED EARLY" in got.notices[0] and "was 5 %" in got.notices[1]
        result = json.loads((out / "result.json").read_text())
        assert result["against"]["stopped"] and result["against"]["p_anytime"] <= 0.05
        assert result["stop_early"]["alpha"] == 0.05
    assert texts[0] == texts[1]
    mute = Obedient()
    again = evaluate(
        mute, make(trials=12), tmp_path / "1", workers=1, videos=0, against=idle, stop_early=True
    )
    assert not mute.heard and again.overall == got.overall  # a stopped evaluation is finished


def test_policies_that_are_alike_are_rarely_told_apart_however_often_one_looks() -> None:
    rng = np.random.default_rng(0)
    order = [("task", seed) for seed in range(100)]
    ended_early = 0
    for _ in range(150):
        sides = [dict(zip(order, map(bool, rng.random(100) < 0.5), strict=True)) for _ in range(2)]
        earlier = Earlier(Path("earlier"), sides[1], {}, "", False)
        ended_early += stop_after(order, sides[0], earlier) is not None
    assert ended_early <= stats.binom.ppf(0.999, 150, 0.05)


def test_a_start_that_has_not_ended_holds_up_those_behind_it() -> None:
    order = [("task", seed) for seed in range(12)]
    earlier = Earlier(Path("earlier"), dict.fromkeys(order, False), {}, "", False)
    outcomes = dict.fromkeys(order, True)
    ended = stop_after(order, outcomes, earlier)
    assert ended is not None and 5 < ended < 12
    outcomes.pop(("task", ended - 1))
    assert stop_after(order, outcomes, earlier) is None
    with_error = {**dict.fromkeys(order, True), ("task", 0): None}
    assert stop_after(order, with_error, earlier) == ended + 1  # an error favours nobody


@pytest.mark.parametrize(
    ("change", "facts"),
    [({"horizon": 19}, "horizon: 20 there, 19 here"), ({"first_seed": 500}, "share no start")],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_played(
    change: dict, facts: str, make: Make, idle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=facts):
        evaluate(Obedient(), make(**change), tmp_path / "eval", against=idle)
    with pytest.raises(ConfigError, match="stop_early: needs .* --against"):
        evaluate(Obedient(), make(), tmp_path / "eval", stop_early=True)
    with pytest.raises(ConfigError, match="holds no evaluation to compare with"):
        evaluate(Obedient(), make(), tmp_path / "eval", against=tmp_path)
    assert not (tmp_path / "eval").exists()


def test_published_runs_can_be_compared_with() -> None:
    first = read_earlier(PUBLISHED / "quickstart-seeds" / "quickstart-seed1")
    second = read_earlier(PUBLISHED / "quickstart-seeds" / "quickstart-seed2")
    assert len(first.outcomes) == 50 and first.protocol_sha256 == second.protocol_sha256
    comparison = compare(first.outcomes, second, (), stopped=False)
    assert (comparison.here, comparison.there) == (44, 46)  # as eval/README.md says
    assert comparison.here_only - comparison.there_only == -2 and "not told apart" in str(comparison)
    control = read_earlier(PUBLISHED / "quickstart", wrong_instruction=True)
    assert control.wrong_instruction and not any(control.outcomes.values())
