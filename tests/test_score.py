import pytest

from vlafit.score import Score, by_task, errors_notice, overall, score, table, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # scipy 1.17.1: binomtest(successes, n).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (1, 2, 0.0945312, 0.9054688),
        (21, 25, 0.6534638, 0.9359655),
        (51, 60, 0.7388541, 0.9190256),
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_the_interval_is_wilsons(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-7)


def test_the_interval_holds_the_rate_and_shrinks_with_more_episodes() -> None:
    for n in (1, 7, 50):
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            wider = wilson(successes, n)[1] - low
            narrower = wilson(successes * 4, n * 4)
            assert 0 <= low <= successes / n <= high <= 1
            assert narrower[1] - narrower[0] < wider


def test_nothing_is_known_of_no_episodes() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert Score(0, 0).rate is None


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 5), (0, -1)])
def test_counts_that_cannot_be_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes in {n} episodes"):
        wilson(successes, n)


def test_an_error_is_neither_a_success_nor_a_failure() -> None:
    counted = score([True, None, False, True, None])
    assert counted == Score(successes=2, episodes=3, errors=2)
    assert counted.interval == score([True, False, True]).interval


def test_tasks_are_counted_apart_and_together() -> None:
    scores = by_task(("b", "a", "c"), [("a", True), ("b", False), ("a", None), ("b", True)])
    assert list(scores) == ["b", "a", "c"]
    assert scores == {"b": Score(1, 2), "a": Score(1, 1, 1), "c": Score(0, 0)}
    assert overall(scores) == Score(2, 3, 1)


def test_a_foreign_task_is_refused() -> None:
    with pytest.raises(KeyError):
        by_task(("a",), [("b", True)])


def test_the_table_and_the_sentences_show_errors() -> None:
    scores = {"push": Score(21, 25), "pull": Score(0, 0, 3)}
    lines = table(scores).splitlines()
    assert lines[1].split() == ["push", "21/25", "84", "%", "65", "to", "94", "%", "0"]
    assert lines[2].split() == ["pull", "0/0", "-", "-", "3"]
    assert lines[3].split()[:3] == ["all", "tasks", "21/25"] and lines[3].endswith("3")
    assert str(scores["push"]) == "21/25 = 84 % (95 %: 65 to 94 %)"
    assert str(Score(1, 1, 2)).endswith(", 2 ERRORS")
    assert "3 of 28 episodes" in errors_notice(overall(scores))
    assert errors_notice(Score(1, 2)) == ""


def test_a_score_becomes_json_with_its_interval() -> None:
    assert Score(1, 2, 1).to_json() == {
        "successes": 1,
        "episodes": 2,
        "errors": 1,
        "rate": 0.5,
        "low": pytest.approx(0.0945312, abs=1e-6),
        "high": pytest.approx(0.9054688, abs=1e-6),
    }
