"""Two evaluations are compared start by start, and one may end as soon as they are told apart."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.rollout.actors import Obedient, Saying, Trained
from vlafit.errors import ConfigError
from vlafit.execution import Execution
from vlafit.rollout import Protocol, evaluate, load_protocol
from vlafit.rollout.against import compare, require_comparable, stop_after
from vlafit.rollout.earlier import Earlier, read_earlier

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


def test_every_published_evaluation_can_be_compared_with_and_another_width_is_only_listed() -> None:
    folders = sorted({rows.parent for rows in PUBLISHED.rglob("episodes*.jsonl")})
    folders.remove(PUBLISHED / "latency")  # episodes of many policies in one file
    for folder in folders:
        earlier = read_earlier(folder)
        asked = replace(load_protocol(earlier.protocol_name), width=10, trials=7, timeout_s=7.0)
        asked = replace(asked, first_seed=min(seed for _, seed in earlier.outcomes))
        differs = require_comparable(earlier, asked, earlier.wrong_instruction, earlier.outcomes)
        assert differs == ("width (16 there, 10 here)",), folder
    kinds = {folder.relative_to(PUBLISHED).parts[0] for folder in folders}
    assert {"metaworld-mt50", "libero-full", "compare", "compare-untrained", "quickstart"} <= kinds


def test_of_a_published_run_the_evaluation_of_the_protocol_is_compared_with() -> None:
    run = PUBLISHED / "few-demonstrations" / "strategies" / "lora-seed0"
    assert len(read_earlier(run).outcomes) == 50
    assert len(read_earlier(run, protocol=load_protocol("metaworld-faucet")).outcomes) == 50
    more = read_earlier(run, protocol=load_protocol("metaworld-faucet-84"))
    assert (len(more.outcomes), more.protocol_name) == (168, "metaworld-faucet-84")


class Narrow(Trained):
    width = 2


def published(out: Path, played: Path) -> Path:
    """Write what is published of a run: report.json, with its protocol's hash alone, and the episodes."""
    result = json.loads((played / "result.json").read_text())
    rows = [json.loads(line) for line in (played / "episodes.jsonl").read_text().splitlines()]
    facts = {
        "protocol": result["protocol"]["name"],
        "protocol_sha256": result["protocol_sha256"],
        "actor": result["actor"],
        "episodes": [{key: row[key] for key in ("task", "seed", "success", "steps")} for row in rows],
    }
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"evaluations": {"after": facts}}))
    shutil.copyfile(played / "episodes.jsonl", out / "episodes_after.jsonl")
    return out


def test_a_run_that_published_only_its_protocols_hash_is_compared_at_fewer_starts_and_another_width(
    make: Make, tmp_path: Path
) -> None:
    evaluate(Trained(identity="width=4"), make(trials=3), tmp_path / "wide", workers=1, videos=0)
    run = published(tmp_path / "run", tmp_path / "wide")
    fewer = evaluate(
        Narrow(), make(), tmp_path / "narrow", trials=2, workers=1, videos=0, against=run, timeout_s=60
    )
    kept = json.loads((fewer.folder / "result.json").read_text())["against"]
    assert kept["starts"] == 4 and kept["differs_in"] == ["width (4 there, 2 here)"]
    other = replace(make(), replan=5)
    with pytest.raises(ConfigError, match="protocol 'toy' is not published"):
        evaluate(Narrow(), other, tmp_path / "other", workers=1, videos=0, against=run)


def test_how_chunks_were_executed_is_listed(make: Make, idle: Path, tmp_path: Path) -> None:
    ensemble = Execution(mode="ensemble", replan=2)
    evaluate(Obedient(), make(), tmp_path, trials=1, workers=1, videos=0, against=idle, execution=ensemble)
    kept = json.loads((tmp_path / "result.json").read_text())["against"]
    assert kept["differs_in"][:2] == [
        "execution.mode (chunk there, ensemble here)",
        "execution.replan (4 there, 2 here)",
    ]


def test_a_folder_of_evaluations_names_them_and_an_arm_that_was_edited_is_refused(tmp_path: Path) -> None:
    arm = tmp_path / "compare" / "arms" / "full-lr0.001-seed0"
    shutil.copytree(PUBLISHED / "compare" / "arms" / arm.name, arm)
    shutil.copyfile(PUBLISHED / "compare" / "compare.json", tmp_path / "compare" / "compare.json")
    with pytest.raises(ConfigError, match=f"holds no evaluation.*these folders do: {arm}"):
        read_earlier(tmp_path / "compare")
    with pytest.raises(ConfigError, match="no such folder"):
        read_earlier(tmp_path / "compared")
    rows = arm / "episodes_after.jsonl"
    rows.write_text(rows.read_text().replace('"success": false', '"success": true', 1))
    with pytest.raises(ConfigError, match=r"episodes_after\.jsonl: .*compare\.json says otherwise"):
        read_earlier(arm)
