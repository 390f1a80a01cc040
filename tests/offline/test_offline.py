"""Offline evaluation: known actors get the numbers that they must get, whatever interrupts it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.offline.actors import CHUNK, Failing, Recalling, Sampling, Still
from tests.report.test_report import parsed
from vlafit import locks
from vlafit.datasets import EpisodeStore
from vlafit.errors import ConfigError, DataError, VlafitError
from vlafit.offline import Episodes, Settings, evaluate, read_checked, read_result
from vlafit.offline.baselines import HoldStill, MeanChunk, hold_still, matching_columns, spread_of_actions
from vlafit.offline.folder import file_name
from vlafit.offline.part import Part
from vlafit.report import offline as report
from vlafit.requests import Expected
from vlafit.types import ActionChunk, Feature

FEW = Settings(samples=8, draws=3)


def numbers(dots: EpisodeStore, split: Episodes, out: Path, actor: Recalling, **changes: int) -> dict:
    settings = replace(FEW, **changes)
    return evaluate(actor, dots, split, out, settings, identity=type(actor).__name__)


# ------------------------------------------------------------------------------------- errors and baselines


def test_a_policy_that_recalls_what_was_recorded_has_no_error_and_beats_both_baselines(dots, split, tmp_path):
    result = numbers(dots, split, tmp_path, Recalling(dots))
    assert result["overall"]["policy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert {result["compared"][who]["verdict"] for who in ("hold_still", "mean_chunk")} == {"beats"}
    assert result["calibration"]["deterministic"]


def test_a_constant_error_is_reported_in_each_joints_own_units_at_every_step(dots, split, tmp_path):
    result = numbers(dots, split, tmp_path, Recalling(dots, 0.25))
    assert [joint["policy"]["value"] for joint in result["joints"]] == pytest.approx([0.25, 0.25], abs=1e-6)
    deviation = np.array(result["deviation"])
    expected = float((0.25 / deviation).mean())
    assert result["overall"]["policy"]["value"] == pytest.approx(expected, abs=1e-6)
    assert [step["value"] for step in result["by_step"]["policy"]] == pytest.approx(
        [expected] * CHUNK, abs=1e-6
    )


def test_a_policy_that_never_moves_is_the_baseline_hold_still_where_actions_are_differences(
    dots, split, tmp_path
):
    result = numbers(dots, split, tmp_path, Still(dots))
    assert result["overall"]["policy"] == result["overall"]["hold_still"]
    assert result["compared"]["hold_still"] == {
        "difference": {"value": 0.0, "low": 0.0, "high": 0.0}, "better_at": 0.0, "verdict": "does not beat"
    }  # fmt: skip
    assert "delta_position" in result["hold_still"]


def test_the_mean_chunk_is_the_mean_of_all_windows_of_the_training_episodes(dots, split):
    windows = [
        dots.actions(dots.index(i))[step : step + CHUNK]
        for i in split.training
        for step in range(dots.episodes[dots.index(i)].length)
    ]
    expected = [np.mean([w[step] for w in windows if len(w) > step], axis=0) for step in range(CHUNK)]
    mean = MeanChunk(dots, split.training)
    np.testing.assert_allclose(mean.without("elsewhere", CHUNK), expected, atol=1e-6)
    others = MeanChunk(dots, (*split.training, split.evaluated[0]))
    np.testing.assert_allclose(others.without(split.evaluated[0], CHUNK), expected, atol=1e-6)
    assert np.isnan(MeanChunk(dots, split.training[:1]).without(split.training[0], CHUNK)).all()


def test_steps_past_an_episodes_end_do_not_count(dots, split, tmp_path):
    short = replace(split, evaluated=(split.evaluated[0],))

    class WrongAtTheEnd(Recalling):
        def _act(self, seen, key):
            chunk = super()._act(seen, key).actions.copy()
            left = dots.episodes[dots.index(short.evaluated[0])].length - key.replan
            chunk[left:] = 1e6
            return ActionChunk(chunk)

    assert numbers(dots, short, tmp_path, WrongAtTheEnd(dots), samples=6)["overall"]["policy"]["value"] == 0.0


def test_holding_still_follows_the_control_mode_else_the_names_and_the_recorded_rows(dots, split):
    deviation = np.ones(2)
    delta = hold_still(dots, split.training, deviation)
    assert isinstance(delta, HoldStill) and delta.columns is None

    class Other:
        """The dots under another control mode."""

        def __init__(self, control: str, near: bool = True) -> None:
            robot = dots.embodiment
            self.embodiment = replace(robot, control=control)
            self.near = near

        index, state = dots.index, staticmethod(dots.state)

        def actions(self, episode: int) -> np.ndarray:
            return dots.state(episode) + (0.0 if self.near else 9.0)

    stated = hold_still(Other("joint_position"), split.training, deviation)  # type: ignore[arg-type]
    assert isinstance(stated, HoldStill) and stated.columns == (0, 1)
    measured = hold_still(Other(""), split.training, deviation)  # type: ignore[arg-type]
    assert isinstance(measured, HoldStill) and "states no control mode" in measured.why
    for force in ("joint_torque", "torque", "motor effort", "delta_torque"):
        none = hold_still(Other(force), split.training, deviation)  # type: ignore[arg-type]
        assert isinstance(none, str) and f"not applicable: actions of the control mode {force!r}" in none
    joint = hold_still(Other("joint"), split.training, deviation)  # type: ignore[arg-type]
    assert isinstance(joint, HoldStill) and "no control mode that tells" in joint.why
    unknown = hold_still(Other("", near=False), split.training, deviation)  # type: ignore[arg-type]
    assert isinstance(unknown, str) and unknown.startswith("not applicable")


def test_state_dimensions_are_found_by_name_in_any_order(dots):
    robot = replace(
        dots.embodiment,
        state=Feature("state", (3,), labels=("b.pos", "extra", "a.pos")),
        action=Feature("action", (2,), labels=("a", "b")),
    )
    assert matching_columns(robot) == (2, 0)
    assert matching_columns(replace(robot, action=Feature("action", (2,), labels=("a", "c")))) is None


def test_a_joint_that_never_moves_has_no_deviation_whatever_its_offset():
    rows = np.stack([np.full(50, 1000.0), 1000 + np.arange(50.0)], axis=1).astype(np.float32)
    deviation = spread_of_actions([rows[:20], rows[20:]], Feature("action", (2,)))
    assert deviation[0] == 0 and deviation[1] == pytest.approx(np.arange(50.0).std())


# ------------------------------------------------------------------------------------- noise and inputs


def test_draws_from_the_recordings_own_distribution_are_calibrated_and_narrower_ones_are_too_sure(
    dots, tmp_path
):
    every = Episodes(tuple(info.id for info in dots.episodes), (), "All.")
    calm = numbers(dots, every, tmp_path / "honest", Sampling(dots, 0.3), samples=64, draws=8)
    rash = numbers(dots, every, tmp_path / "sure", Sampling(dots, 0.03), samples=64, draws=8)
    honest, sure = calm["calibration"], rash["calibration"]
    assert honest["inside"]["low"] < honest["inside_expected"] < honest["inside"]["high"]
    assert 0.8 < honest["spread_to_error"] < 1.25 and max(honest["ranks"]) < 2 / 9
    assert sure["inside"]["high"] < honest["inside_expected"] and sure["spread_to_error"] < 0.2
    assert all(0.8 < joint["spread_to_error"] < 1.25 for joint in calm["joints"])
    assert all(joint["spread_to_error"] < 0.2 for joint in rash["joints"])
    assert sum(sure["ranks"]) == pytest.approx(1) and sure["ranks"][0] + sure["ranks"][-1] > 0.5


def test_an_input_that_is_ignored_shows_and_one_that_decides_shows_too(dots, split, tmp_path):
    result = numbers(dots, split, tmp_path, Sampling(dots, 0.1))
    by_input = {one["input"]: one for one in result["sensitivity"]}
    assert set(by_input) == {"instruction", "camera front", "state"}
    assert by_input["camera front"]["ignored"] and by_input["state"]["ignored"]
    assert by_input["camera front"]["change"]["value"] == 0.0
    # Without its sentence it aims at 0 instead of 1 or -1 in one of two joints, whose deviation is about 1.
    assert by_input["instruction"]["error_change"]["value"] == pytest.approx(0.5, abs=0.15)


def test_what_the_policy_does_not_read_is_not_called_ignored(dots, split, tmp_path):
    actor = Sampling(dots, 0.1)
    actor.expected = Expected(dots.embodiment, instructed=False, cameras=())  # as one of another camera says
    result = numbers(dots, split, tmp_path, actor)
    assert [one["input"] for one in result["sensitivity"]] == ["state"]
    assert result["not_read"] == ["instruction", "camera front"]
    page = report.build(tmp_path).read_text()
    assert "does not read: instruction, camera front" in page


# ------------------------------------------------------------------------------- answers that are no chunk


def test_what_is_executed_in_place_of_a_chunk_is_counted_and_never_called_better_than_a_baseline(
    dots, split, tmp_path
):
    counted = numbers(dots, split, tmp_path / "same", Recalling(dots))
    assert counted["invalid_answers"] is None and counted["samples"][0]["invalid"] is None
    result = numbers(dots, split, tmp_path / "all", Failing(dots, lambda _: False))
    assert result["invalid_answers"] == {"answers": 24, "invalid": 24, "rate": 1.0}
    assert [sample["invalid"] for sample in result["samples"]] == [3] * 8
    for compared in result["compared"].values():
        assert compared["verdict"] == "does not beat" and compared["better_at"] == 0
    assert not any(one["ignored"] for one in result["sensitivity"])  # no answer, so nothing was looked at
    said = report.verdict(result)
    assert "24 of 24 answers were no chunk of actions (100.0%)" in said and "The policy beats" not in said
    page = report.build(tmp_path / "all").read_text()
    assert "24 of 24 answers were no chunk" in page and 'class="good"' not in page


def test_among_answers_that_are_chunks_one_that_is_none_counts_only_where_it_is_farther(
    dots, split, tmp_path
):
    whole = numbers(dots, split, tmp_path / "whole", Failing(dots, lambda _: True, 0.125))
    some = numbers(dots, split, tmp_path / "some", Failing(dots, lambda key: key.seed > 0, 0.125))
    assert whole["invalid_answers"] == {"answers": 24, "invalid": 0, "rate": 0.0}
    assert some["invalid_answers"]["invalid"] == 8 and [s["invalid"] for s in some["samples"]] == [1] * 8
    parts = [Part.load(path) for path in sorted((tmp_path / "some" / "samples").iterdir())]
    deviation = np.array(some["deviation"])
    for who in ("hold_still", "mean_chunk"):
        expected = []
        for part in parts:  # one part an episode
            rows = []
            for i in range(len(part.steps)):
                real = part.is_real[i]
                base = part.hold_still[i] if who == "hold_still" else part.mean_chunk
                each = [
                    ((np.abs(draw - part.recorded[i]) - np.abs(base - part.recorded[i])) / deviation)[real]
                    for draw in part.predicted[i].astype(np.float64)
                ]
                if each[0].sum() < 0:
                    each[0] = np.zeros_like(each[0])
                rows.append(np.mean(each, axis=0))
            expected.append(np.concatenate(rows).mean())
        assert some["compared"][who]["difference"]["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert some["compared"]["hold_still"]["verdict"] == whole["compared"]["hold_still"]["verdict"] == "beats"


def test_samples_of_an_earlier_version_say_nothing_of_invalid_answers(dots, split, tmp_path):
    numbers(dots, split, tmp_path, Failing(dots, lambda _: True))
    for path in (tmp_path / "samples").iterdir():
        with np.load(path) as arrays:
            earlier = {name: arrays[name] for name in arrays if "valid" not in name}
        np.savez_compressed(path, **earlier)
    result = json.loads((tmp_path / "result.json").read_text())
    del result["invalid_answers"]
    for sample in result["samples"]:
        del sample["invalid"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_checked(tmp_path)["compared"]["hold_still"]["verdict"] == "beats"


# ------------------------------------------------------------------------------------- what is kept


def test_an_interrupted_evaluation_resumes_to_the_same_numbers_without_asking_again(dots, split, tmp_path):
    whole = numbers(dots, split, tmp_path / "whole", Sampling(dots, 0.1))

    def stop(done: int, total: int, episode: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    first, second = Sampling(dots, 0.1), Sampling(dots, 0.1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, dots, split, tmp_path / "cut", FEW, identity="Sampling", progress=stop)
    resumed = evaluate(second, dots, split, tmp_path / "cut", FEW, identity="Sampling", resume=True)
    assert first.asked and second.asked and not {*first.asked} & {*second.asked}
    for result in (whole, resumed):
        del result["seconds"]
    assert resumed == whole


def test_another_evaluation_in_the_folder_is_refused_naming_what_differs(dots, split, tmp_path):
    numbers(dots, split, tmp_path, Still(dots))
    with pytest.raises(ConfigError, match="already holds an evaluation.*--resume"):
        numbers(dots, split, tmp_path, Still(dots))
    with pytest.raises(ConfigError, match="settings: .*'draws': 3.*'draws': 5"):
        evaluate(Still(dots), dots, split, tmp_path, replace(FEW, draws=5), identity="Still", resume=True)


def test_an_evaluation_is_made_by_one_command_at_a_time(dots, split, tmp_path):
    with locks.exclusive(tmp_path, "vlafit eval --data"), pytest.raises(VlafitError) as caught:
        numbers(dots, split, tmp_path, Recalling(dots))
    assert all(fact in str(caught.value) for fact in (str(tmp_path), f"process {os.getpid()}"))


def test_a_damaged_part_is_named_with_its_file(dots, split, tmp_path):
    numbers(dots, split, tmp_path, Still(dots))
    path = sorted((tmp_path / "samples").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ConfigError, match=rf"{path.name}: damaged .*--resume"):
        evaluate(Still(dots), dots, split, tmp_path, FEW, identity="Still", resume=True)


def test_a_part_that_holds_other_samples_is_named_with_its_file(dots, split, tmp_path):
    numbers(dots, split, tmp_path, Still(dots))
    first, second = sorted((tmp_path / "samples").iterdir())[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=rf"{second.name}.*other samples.*--resume"):
        evaluate(Still(dots), dots, split, tmp_path, FEW, identity="Still", resume=True)


def test_the_json_holds_every_sample_and_the_files_every_chunk(dots, split, tmp_path):
    actor = Recalling(dots, 0.25)
    numbers(dots, split, tmp_path, actor)
    result = read_result(tmp_path)
    assert len(result["samples"]) == result["observations"] == 8
    sample = result["samples"][0]
    assert sample["joints"] == pytest.approx([0.25, 0.25], abs=1e-6) and set(sample["blanked"]) == set(
        result["inputs"]
    )
    part = Part.load(tmp_path / "samples" / f"{file_name(sample['episode'])}.000.npz")
    assert part.predicted.shape == (2, 3, CHUNK, 2) and sample["step"] in part.steps
    assert len(actor.asked) == 8 * (3 + 3)


def test_more_episodes_than_samples_are_thinned_out_evenly_and_the_page_says_so(dots, tmp_path):
    every = Episodes(tuple(info.id for info in dots.episodes), (), "All.")
    result = numbers(dots, every, tmp_path, Still(dots), samples=4)
    assert len(result["episodes"]) == 2 and result["observations"] == 4
    assert "2 of 8, evenly spaced" in result["chosen"]


def test_answers_that_cannot_be_compared_are_refused(dots, split, tmp_path):
    class Narrow(Recalling):
        def _act(self, seen, key):
            return ActionChunk(np.zeros((CHUNK, 1), np.float32))

    class Broken(Recalling):
        def _act(self, seen, key):
            return ActionChunk(np.full((CHUNK, 2), np.nan, np.float32))

    with pytest.raises(DataError, match=r"shape \(\d+, 1\); a chunk is \[steps, 2\]"):
        numbers(dots, split, tmp_path / "narrow", Narrow(dots))
    with pytest.raises(DataError, match="not finite"):
        numbers(dots, split, tmp_path / "broken", Broken(dots))


# ------------------------------------------------------------------------------------- the page


def test_the_page_shows_verdict_joints_inputs_films_and_curves_and_links_to_nothing(dots, split, tmp_path):
    result = numbers(dots, split, tmp_path, Sampling(dots, 0.1))
    text = report.build(tmp_path).read_text()
    page = parsed(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "The policy beats “hold still”" in text and "ignored: the answer is the same" in text
    assert text.count("data:image/png;base64,") == 2 and text.count("<svg") == 2 + 2 * 2
    assert all(identity in text for identity in result["episodes"])


def test_text_from_outside_is_escaped_in_the_page(dots, split, tmp_path):
    evil = "\"><script>alert('$\\frac$')</script></style></svg><a href=javascript:alert(1)>"
    numbers(dots, split, tmp_path, Sampling(dots, 0.1))
    for episode in split.evaluated:  # film strips and chunks lie under their episode's name
        for path in tmp_path.glob(f"s*/{file_name(episode)}.*"):
            path.rename(path.with_name(path.name.replace(file_name(episode), file_name(episode + evil))))
    text = report.page(_marked(read_result(tmp_path), evil), tmp_path)
    assert "<script" not in text and "</style></svg>" not in text and "&lt;script&gt;" in text
    assert all(link.startswith(("#", "data:")) for link in parsed(text).links)
    assert text.count("data:image/png;base64,") == 2


def _marked(value: Any, evil: str) -> Any:
    """Return plain values with `evil` behind every text."""
    if isinstance(value, dict):
        return {key: _marked(inner, evil) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, evil) for inner in value]
    return value + evil if isinstance(value, str) else value


def test_one_episode_gives_no_interval_and_says_so(dots, split, tmp_path):
    one = replace(split, evaluated=split.evaluated[:1])
    result = numbers(dots, one, tmp_path, Sampling(dots, 0.1))
    assert result["overall"]["policy"]["low"] is None
    assert "One episode" in result["notices"][0] and "One episode" in report.build(tmp_path).read_text()
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("actor", [Recalling, Still])
def test_one_episode_is_no_verdict_neither_here_nor_in_an_earlier_result(dots, split, tmp_path, actor):
    one = replace(split, evaluated=split.evaluated[:1])
    result = numbers(dots, one, tmp_path, actor(dots))
    assert [compared["verdict"] for compared in result["compared"].values()] == ["not shown"] * 2
    said = report.verdict(result)
    assert said.count("One episode does not show whether the policy beats") == 2 and "The policy" not in said
    file = tmp_path / "result.json"
    file.write_text(file.read_text().replace('"not shown"', '"beats"'))
    assert (
        read_checked(tmp_path) == json.loads(json.dumps(result))
        and said in report.build(tmp_path).read_text()
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("overall", "policy", "value"), 0.001),
        (("overall", "policy", "high"), 0.002),
        (("observations",), 999),
        (("compared", "hold_still", "verdict"), "beats "),
        (("joints", 0, "policy", "value"), 0.001),
        (("calibration", "inside", "value"), 0.5),
        (("by_step", "policy", 1, "value"), 0.001),
    ],
)
def test_a_number_that_the_saved_samples_do_not_have_is_refused(dots, split, tmp_path, path, value):
    numbers(dots, split, tmp_path, Sampling(dots, 0.1))
    assert read_checked(tmp_path) == read_result(tmp_path)
    file = tmp_path / "result.json"
    result = part = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    assert part[path[-1]] != value
    part[path[-1]] = value
    file.write_text(json.dumps(result))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=rf"result\.json: {path[0]}.* is {value}, but by samples/ it is"):
        report.build(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
