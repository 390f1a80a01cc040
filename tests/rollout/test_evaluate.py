import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from tests.rollout.actors import Interrupting, Obedient, Saying, Stammering, Trained
from tests.rollout.toy_env import robot
from tests.variants import variants
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError, EmbodimentError, SimulationError, VlafitError
from vlafit.rollout import Protocol, Record, evaluate
from vlafit.score import Score

Make = Callable[..., Protocol]
TIMES = ("wall_s", "seconds")


def records(folder: Path) -> list[dict]:
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def result(folder: Path) -> dict:
    content = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in content.items() if k not in TIMES}


def test_an_evaluation_plays_every_episode_and_scores_it(protocol: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int, Record]] = []
    out = tmp_path / "eval"
    got = evaluate(Obedient(), protocol(), out, workers=1, videos=1, progress=lambda *p: seen.append(p))
    # seeds 100 to 103: the actor stands still at 102
    assert got.tasks == {"left": Score(3, 4), "right": Score(3, 4)}
    assert got.overall == Score(6, 8) and got.rate == 0.75 and not got.notices
    assert [(r["task"], r["trial"], r["seed"]) for r in records(out)] == [
        (task, i, 100 + i) for task in ("left", "right") for i in range(4)
    ]
    assert {r["steps"] for r in records(out) if not r["success"]} == {20}
    assert all(
        3 <= r["steps"] < 20 and r["replans"] == -(-r["steps"] // 4) for r in records(out) if r["success"]
    )
    assert [p[:2] for p in seen] == [(i + 1, 8) for i in range(8)]
    content = result(out)
    assert content["overall"]["successes"] == 6 and content["complete"] is True
    assert content["tasks"]["left"]["instruction"] == "go to the left"
    assert content["versions"] == {"toy": "1.0"} and content["renderer"] == "ray"


def test_answers_that_are_no_chunk_are_counted_in_each_episode_and_kept_when_it_resumes(
    protocol: Make, tmp_path: Path
) -> None:
    class Stopped(Stammering):
        left = 4

        def act(self, observations, keys):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().act(observations, keys)

    whole = evaluate(Stammering(), protocol(), tmp_path / "whole", workers=1, videos=0)
    for record in whole.records:
        assert record.invalid_answers == (record.replans // 2 if record.seed % 2 else 0)
    answers = sum(record.replans for record in whole.records)
    invalid = sum(record.invalid_answers or 0 for record in whole.records)
    assert 0 < invalid < answers
    said = {"answers": answers, "invalid": invalid, "rate": round(invalid / answers, 6)}
    assert result(tmp_path / "whole")["invalid_answers"] == said
    assert f"{invalid} of {answers} answers were no chunk of actions ({invalid / answers:.1%})" in str(whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopped(), protocol(), tmp_path / "resumed", workers=1, videos=0)
    header = tmp_path / "resumed" / "evaluation.json"
    header.write_text(header.read_text().replace("Stopped", "Stammering"))
    done = len(records(tmp_path / "resumed"))
    evaluate(Stammering(), protocol(), tmp_path / "resumed", workers=1, videos=0)
    assert done < 8 and records(tmp_path / "resumed") == records(tmp_path / "whole")
    assert result(tmp_path / "resumed")["invalid_answers"] == said
    evaluate(Obedient(), protocol(), tmp_path / "numbers", workers=1, videos=0)
    assert "invalid_answers" not in result(tmp_path / "numbers")
    assert {record["invalid_answers"] for record in records(tmp_path / "numbers")} == {None}


def test_the_result_does_not_depend_on_the_number_of_workers(protocol: Make, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        evaluate(Obedient(), protocol(), tmp_path / str(workers), workers=workers, videos=0)
    assert records(tmp_path / "1") == records(tmp_path / "2") == records(tmp_path / "3")
    assert result(tmp_path / "1") == result(tmp_path / "2") == result(tmp_path / "3")


def test_filming_changes_nothing_and_leaves_videos_strips_and_a_sheet(protocol: Make, tmp_path: Path) -> None:
    import av
    from PIL import Image

    filmed = evaluate(Obedient(), protocol(), tmp_path / "filmed", workers=1, videos=3)
    plain = evaluate(Obedient(), protocol(), tmp_path / "plain", workers=1, videos=0)
    assert [(r.success, r.steps) for r in filmed.records] == [(r.success, r.steps) for r in plain.records]
    shown = [r for r in filmed.records if r.video]
    assert [(r.task, r.seed) for r in shown] == [(t, s) for t in ("left", "right") for s in (100, 101, 102)]
    assert all(r.video is None for r in plain.records)
    for record in shown:
        path = tmp_path / "filmed" / str(record.video)
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            assert stream.codec_context.name == "h264" and (stream.width, stream.height) == (256, 256)
            assert sum(1 for _ in film.decode(stream)) == record.steps + 1  # the start, and after each step
        with Image.open(path.with_suffix(".png")) as strip:
            red, green, _ = strip.convert("RGB").getpixel((0, strip.height - 1))  # type: ignore[misc]
            assert (green > red) == record.success  # the frame's colour
    with Image.open(tmp_path / "filmed" / "sheet.png") as sheet:
        assert sheet.height > 6 * 100
    assert not (tmp_path / "plain" / "sheet.png").exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("raise", "RuntimeError: the dot fell off the line"),
        ("die", "ended by SIGKILL"),
        ("die-in-reset", "ended with status 7"),
    ],
)
def test_an_environment_that_breaks_is_an_error_of_that_episode_alone(
    task: str, said: str, protocol: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        got = evaluate(Obedient(), protocol("left", task), tmp_path / "eval", workers=2, videos=0)
    assert got.tasks["left"] == Score(3, 4)
    assert got.tasks[task] == Score(
        1, 2, errors=2
    )  # odd seeds, 101 and 103, broke; 100 worked, 102 stood still
    errors = {r.seed: r.error for r in got.records if r.error}
    assert set(errors) == {101, 103} and all(said in text for text in errors.values())
    assert all((r.success is None) == (r.error is not None) for r in got.records)
    assert "2 of 8 episodes" in got.notices[0] and got.notices[0] in str(got)
    assert result(tmp_path / "eval")["complete"] is False
    assert "seed 101" in caplog.text and "INCOMPLETE" in caplog.text


def test_an_environment_that_hangs_is_ended_and_an_error_of_that_episode_alone(
    protocol: Make, tmp_path: Path
) -> None:
    many = protocol("left", "hang", trials=2)
    got = evaluate(Obedient(), many, tmp_path / "eval", workers=1, videos=0, timeout_s=2)
    assert got.tasks == {"left": Score(2, 2), "hang": Score(1, 1, errors=1)}
    assert "did not answer within 2 s" in str(next(r.error for r in got.records if r.error))


def test_errors_are_not_retried_when_an_evaluation_is_resumed(protocol: Make, tmp_path: Path) -> None:
    first = evaluate(Obedient(), protocol("raise"), tmp_path / "eval", workers=1, videos=0)
    again = evaluate(Obedient(), protocol("raise"), tmp_path / "eval", workers=1, videos=0)
    assert first.records == again.records and again.overall.errors == 2


def test_an_evaluation_of_which_every_episode_broke_has_no_result(protocol: Make, tmp_path: Path) -> None:
    all_odd = protocol("raise", trials=1, first_seed=101)
    facts = rf"(?s)all 1 episodes.*fell off the line.*remove the folder {tmp_path / 'eval'}"
    with pytest.raises(SimulationError, match=facts):
        evaluate(Obedient(), all_odd, tmp_path / "eval", workers=1, videos=0)
    assert not (tmp_path / "eval" / "result.json").exists()


def test_interrupted_and_resumed_equals_uninterrupted(protocol: Make, tmp_path: Path) -> None:
    evaluate(Obedient(), protocol(trials=6), tmp_path / "whole", workers=1, videos=0)
    ended = []
    for calls in (4, 4):
        out = tmp_path / "pieces"
        with pytest.raises(KeyboardInterrupt):
            evaluate(Slow(calls), protocol(trials=6), out, workers=1, videos=0)
        ended.append(len(records(out)))
        assert not (out / "result.json").exists()
    assert 0 < ended[0] < ended[1] < 12
    with open(tmp_path / "pieces" / "episodes.jsonl", "a") as file:
        file.write('{"task": "left", "tri')  # a line that a crash cut off
    strays = [tmp_path / "pieces" / name for name in (".result.json.7.partial", "videos/.a.mp4.7.partial")]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("")
    evaluate(Slow(1000), protocol(trials=6), tmp_path / "pieces", workers=2, videos=0)
    assert records(tmp_path / "pieces") == records(tmp_path / "whole")
    assert not any(stray.exists() for stray in strays)


class Slow(Interrupting):
    """Two episodes at a time, so that an interruption finds some ended and some not begun."""

    width = 2
    embodiment = robot()
    seeds: Mapping[str, Collection[int]] = {}

    def fingerprint(self) -> str:
        return "Obedient"


def test_a_finished_evaluation_is_read_and_not_played_again(protocol: Make, tmp_path: Path) -> None:
    first = evaluate(Obedient(), protocol(), tmp_path / "eval", workers=1, videos=1)
    again = evaluate(Saying([[0, 0]]), protocol(), tmp_path / "other", workers=1, videos=0)
    assert again.overall.successes == 0
    mute = Obedient()
    again = evaluate(mute, protocol(), tmp_path / "eval", workers=1, videos=1)
    assert again.records == first.records and not mute.heard and again.seconds == first.seconds


@pytest.mark.parametrize("text", variants(["{", "[]", "{}", '{"seconds": "long"}'], always=["{", "{}"]))
def test_a_damaged_result_is_named_and_can_be_made_again(protocol: Make, tmp_path: Path, text: str) -> None:
    evaluate(Obedient(), protocol(), tmp_path, workers=1, trials=1, videos=0)
    whole = result(tmp_path)
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=r"result\.json: damaged .*; remove this file"):
        evaluate(Obedient(), protocol(), tmp_path, workers=1, trials=1, videos=0)
    (tmp_path / "result.json").unlink()
    evaluate(Obedient(), protocol(), tmp_path, workers=1, trials=1, videos=0)
    assert result(tmp_path) == whole


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": [1], "environment": {}}'])
def test_a_damaged_header_is_named(protocol: Make, tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ConfigError, match=r"evaluation\.json: damaged .*another folder"):
        evaluate(Obedient(), protocol(), tmp_path, workers=1, trials=1, videos=0)


class HalfTrained(Obedient):
    """Has only a robot and a width, but not the other attributes of a TrainedActor."""

    width = 2
    embodiment = robot()


def test_an_actor_that_tells_half_of_its_training_is_refused(protocol: Make, tmp_path: Path) -> None:
    facts = "HalfTrained has embodiment, width but lacks seeds, fingerprint"
    with pytest.raises(ConfigError, match=facts):
        evaluate(HalfTrained(), protocol(), tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("change", ["actor", "protocol", "trials", "instruction", "resume"])
def test_a_folder_that_holds_another_evaluation_is_refused(
    change: str, protocol: Make, tmp_path: Path
) -> None:
    evaluate(Trained(), protocol(), tmp_path, workers=1, trials=1, videos=0)
    before = (tmp_path / "evaluation.json").read_bytes(), (tmp_path / "result.json").read_bytes()
    actor = Trained(identity="weights 2") if change == "actor" else Trained()
    what = protocol(horizon=19) if change == "protocol" else protocol()
    with pytest.raises(ConfigError, match="choose another folder"):
        evaluate(
            actor,
            what,
            tmp_path,
            workers=1,
            trials=2 if change == "trials" else 1,
            videos=0,
            wrong_instruction=change == "instruction",
            resume=change != "resume",
        )
    assert before == ((tmp_path / "evaluation.json").read_bytes(), (tmp_path / "result.json").read_bytes())


def test_purpose_and_references_do_not_make_another_protocol(protocol: Make, tmp_path: Path) -> None:
    evaluate(Obedient(), protocol(), tmp_path, workers=1, trials=1, videos=0)
    evaluate(Obedient(), protocol(purpose="words"), tmp_path, workers=1, trials=1, videos=0)


def test_a_wrong_instruction_is_the_partners_and_success_is_the_tasks_own(
    protocol: Make, tmp_path: Path
) -> None:
    right, wrong = Obedient(), Obedient()
    evaluate(right, protocol(), tmp_path / "right", workers=1, videos=0)
    got = evaluate(wrong, protocol(), tmp_path / "wrong", workers=1, videos=0, wrong_instruction=True)
    assert right.heard == {"left": {"go to the left"}, "right": {"go to the right"}}
    assert wrong.heard == {"left": {"go to the right"}, "right": {"go to the left"}}
    assert got.overall == Score(0, 8)  # it obeys, and so never does what the scene's own task asks for
    assert result(tmp_path / "wrong")["tasks"]["left"]["instruction"] == "go to the right"
    assert result(tmp_path / "wrong")["wrong_instruction"] is True


def test_only_tasks_with_a_partner_take_part_in_the_wrong_instruction_probe(
    protocol: Make, tmp_path: Path
) -> None:
    some = protocol(tasks=("left", "right"), swapped={"left": "right"})
    got = evaluate(Obedient(), some, tmp_path, workers=1, videos=0, wrong_instruction=True)
    assert got.tasks == {"left": Score(0, 4)}


def test_the_actor_is_asked_for_at_most_its_width(protocol: Make, tmp_path: Path) -> None:
    actor = Trained()
    evaluate(actor, protocol(), tmp_path, workers=3, videos=0)
    assert actor.widest == actor.width == 4


def test_chunks_shorter_than_the_replan_interval_are_executed_whole(protocol: Make, tmp_path: Path) -> None:
    got = evaluate(Saying([[-1, 0]]), protocol("left", trials=2), tmp_path, workers=1, videos=0)
    assert all(r.steps == r.replans for r in got.records) and got.rate == 1


def test_settling_steps_come_before_the_policy_and_are_not_counted(protocol: Make, tmp_path: Path) -> None:
    def begun(name: str, **changes: object) -> Record:
        short = protocol("left", trials=1, horizon=6, replan=6, **changes)
        return evaluate(Saying([[-1, 0]] * 6), short, tmp_path / name, workers=1, videos=1).records[0]

    assert begun("at its start").success is False
    settled = begun("nearer", settle_steps=4, settle_action=(-1.0, 0.0))
    assert settled.success is True and 1 <= settled.steps <= 6  # it was pushed there before the first look


def test_another_renderer_is_told_and_the_evaluation_goes_on(
    protocol: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    actor = Trained(robot(renderer="egl"))
    got = evaluate(actor, protocol(), tmp_path, workers=1, trials=1, videos=0)
    facts = "trained on images rendered by 'egl', it is evaluated on images rendered by 'ray'"
    assert facts in got.notices[0] and facts in result(tmp_path)["notices"][0] and facts in caplog.text
    again = evaluate(actor, protocol(), tmp_path, workers=1, trials=1, videos=0)
    assert again.notices == got.notices


def test_an_evaluation_never_starts_where_a_demonstration_did(protocol: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 seeds.*'right'.*\(102, 103\).*first_seed"):
        evaluate(Trained(seeds={"left": {5}, "right": range(102, 200)}), protocol(), tmp_path)
    fine = evaluate(Trained(seeds={"right": {102}}), protocol(), tmp_path, videos=0, trials=2)
    assert fine.overall.episodes == 4


def test_environment_processes_do_not_load_torch(protocol: Make, tmp_path: Path, real_starts: None) -> None:
    import torch  # loaded here, so that a fork, or an import of this script, would carry it over

    assert torch.__version__
    spy = protocol(env=EnvSpec("tests.rollout.toy_env", size=16, cameras=("torch",)))
    with pytest.raises(SimulationError, match="torch is not loaded"):
        evaluate(Obedient(), spy, tmp_path, workers=1, videos=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"versions": {"toy": "2.0"}}, SimulationError, "toy 1.0 is installed, 2.0 is required"),
        ({"versions": {"mujoco": "3"}}, SimulationError, "mujoco unknown.* 3 is required"),
        (
            {"tasks": ("lift", "right"), "swapped": {}},
            ConfigError,
            "tasks: .* no task 'lift'; did you mean 'left'",
        ),
        ({"swapped": {"left": "ride"}}, ConfigError, "swapped: .* no task 'ride'"),
        ({"env": EnvSpec("tests.no.such")}, SimulationError, "'tests.no.such': there is no such module"),
        ({"env": EnvSpec("metawold")}, SimulationError, "did you mean 'metaworld'"),
        ({"env": EnvSpec("tests.rollout.toy_env", size=32)}, EmbodimentError, "size of camera 'front'"),
        (
            {"settle_steps": 1, "settle_action": (1.0,)},
            ConfigError,
            "settle_action has 1 numbers, .*'dot' has 2",
        ),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused_with_a_reason(
    change: dict, error: type[VlafitError], message: str, protocol: Make, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        evaluate(Trained(), protocol(**change), tmp_path / "eval", workers=1, videos=0)
    assert not (tmp_path / "eval" / "result.json").exists()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[0.0, float("nan")]], "not finite.*step 0 of the chunk"),
        ([0.0, 1.0], r"shape \(2,\)"),
        ([[0.0, 1.0, 2.0]], r"shape \(1, 3\); a chunk is \[steps, 2\]"),
        ([], "shape"),
        ([[0.0, 1e300]], "beyond float32"),
        ([[0.0, 1j]], "must be numbers"),
    ],
)
def test_actions_that_are_no_chunk_end_the_evaluation_and_are_nobodys_failure(
    actions: list, message: str, protocol: Make, tmp_path: Path
) -> None:
    with pytest.raises(SimulationError, match=message):
        evaluate(Saying(actions), protocol(), tmp_path, workers=1, videos=0)
    assert records_if_any(tmp_path) == []


def records_if_any(folder: Path) -> list[dict]:
    return records(folder) if (folder / "episodes.jsonl").exists() else []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be a whole number from 0 to 1024, not -1"),
        ({"workers": 1.5}, "workers must be a whole number"),
        ({"workers": None}, "workers must be a whole number"),
        ({"trials": 0}, "trials must be a whole number from 1"),
        ({"trials": "3"}, "trials must be a whole number"),
        ({"videos": -1}, "videos must be a whole number from 0"),
        ({"timeout_s": 0}, "timeout_s must be a number above 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be a number above 0"),
        ({"resume": "no"}, "resume must be True or False, not 'no'"),
        ({"stop_early": None}, "stop_early must be True or False"),
        ({"execution": "real_time"}, "execution must be Execution, or None, not 'real_time'"),
        ({"shard": "1/2"}, "shard must be Shard, or None, not '1/2'"),
        ({"against": 5}, "against must be a path"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict, message: str, protocol: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(Obedient(), protocol(), tmp_path, **options)


def test_a_folder_with_other_things_in_it_is_refused(protocol: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=f"{tmp_path} is not empty"):
        evaluate(Obedient(), protocol(), tmp_path)


def test_a_place_that_cannot_be_written_to_is_refused(protocol: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VlafitError, match="is a file, not a folder"):
        evaluate(Obedient(), protocol(), tmp_path / "file" / "eval")
