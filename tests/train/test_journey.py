"""From a robot's dataset, without card or simulator, to a policy whose worth is known: by commands only."""

import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from tests.datasets import lerobot_files
from tests.datasets.layouts import demos
from tests.report.test_report import parsed
from vlafit import cli
from vlafit.datasets import open_dataset, split_episodes
from vlafit.datasets.content import content_of
from vlafit.offline import choose_episodes
from vlafit.pointers import in_run


def vlafit(*words: object) -> tuple[int, str, str]:
    """Run a command line; return the exit status and what it printed."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = cli.main(list(map(str, words)))
    return status, out.getvalue(), err.getvalue()


class Journey:
    """What each command of the journey printed, and where it wrote."""

    dataset: Path
    refused: str
    trained: str
    out: Path


@pytest.fixture(scope="module")
def journey(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    home = tmp_path_factory.mktemp("lab")
    trip = Journey()
    trip.dataset, trip.out = home / "my robot", home / "run"
    lerobot_files.write(trip.dataset, demos(3), "v2.1")
    base = ["train", trip.dataset, "--policy.checkpoint", whole, "--out", trip.out, "--eval.samples", "8"]
    base += ["--train.steps", "2", "--train.threads", "1", "--train.batch_size", "4", "--train.trackers"]
    status, _, trip.refused = vlafit(*base)
    assert status == 2 and not trip.out.exists()
    options = trip.refused.splitlines()[-1].split()
    status, trip.trained, errors = vlafit(*base, *options)
    assert status == 0, errors
    yield trip


def test_the_error_about_another_robot_ends_with_the_options_that_accept_all_of_it(journey: Journey) -> None:
    options = journey.refused.splitlines()[-1]
    assert "--adapt.robot true" in options and "--data.statistics data" in options
    assert "--adapt.cameras.front front" in options and "--adapt.resize true" in options
    assert "4 training episodes, 2 held out, from my robot" in journey.trained


def test_a_run_without_a_simulator_says_what_its_held_out_episodes_show(journey: Journey) -> None:
    assert "held-out episodes of my robot: The" in journey.trained
    facts = json.loads((journey.out / "report.json").read_text())
    result = facts["held_out"]["my_robot"]
    assert result["observations"] == 8 and result["draws"] == 4 and len(result["episodes"]) == 2
    assert facts["missing"] == []
    text = (journey.out / "report.html").read_text()
    assert "Held-out episodes: predicted against recorded" in text
    page = parsed(text)
    assert len(page.ids) == len(set(page.ids))


def test_eval_measures_the_episodes_that_training_held_out(journey: Journey, tmp_path: Path) -> None:
    words = ["eval", journey.out, "--data", journey.dataset, "--samples", "4", "--draws", "2"]
    status, printed, _ = vlafit(*words, "--out", tmp_path / "eval")
    assert status == 0 and "Held out from training" in printed and "mean chunk" in printed
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    _, held_out = split_episodes(open_dataset(journey.dataset), 0.1, 0)
    assert tuple(result["episodes"]) == held_out and result["draws"] == 2
    again, _, errors = vlafit(*words, "--out", tmp_path / "eval")
    assert again == 2 and "--resume" in errors
    assert vlafit(*words, "--out", tmp_path / "eval", "--resume")[0] == 0


def test_report_card_and_evaluation_agree_and_say_what_their_numbers_are_over(
    journey: Journey, tmp_path: Path
) -> None:
    words = ["eval", journey.out, "--data", journey.dataset, "--samples", "8", "--draws", "4"]
    status, printed, _ = vlafit(*words, "--device", "cpu", "--out", tmp_path / "eval")
    assert status == 0
    measured = json.loads((tmp_path / "eval" / "result.json").read_text())
    reported = json.loads((journey.out / "held_out" / "my_robot" / "result.json").read_text())
    assert {**measured, "seconds": 0, "agreement": 0} == {**reported, "seconds": 0, "agreement": 0}
    over = (
        "8 observations of 2 episodes, 4 draws of noise each (seeds 0 to 3), sampled in 2 steps; "
        "standard deviations over the training episodes (4)"
    )
    value = f"policy {measured['overall']['policy']['value']:.3f}"
    card = (in_run(journey.out) / "README.md").read_text()
    assert over in printed and over in (journey.out / "report.html").read_text()
    assert over in (tmp_path / "eval" / "report.html").read_text()
    assert over in card and value in card and "`--samples 8 --draws 4`" in card


def test_episodes_named_on_the_command_line_are_told_from_learned_ones(
    journey: Journey, tmp_path: Path
) -> None:
    training, _ = split_episodes(open_dataset(journey.dataset), 0.1, 0)
    words = ["eval", journey.out, "--data", journey.dataset, "--samples", "2", "--draws", "2"]
    status, printed, _ = vlafit(*words, "--episodes", training[0], "--out", tmp_path / "eval")
    assert status == 0 and "learned from some of these episodes" in printed
    status, _, errors = vlafit(*words, "--episodes", "episode_000099", "--out", tmp_path / "none")
    assert status == 2 and "episode_000099" in errors


def test_a_dataset_that_has_changed_since_training_is_not_taken_for_held_out(
    journey: Journey, tmp_path: Path
) -> None:
    changed = tmp_path / "my robot"
    lerobot_files.write(changed, demos(4), "v2.1")
    store, before = open_dataset(changed), open_dataset(journey.dataset)
    chosen = choose_episodes(store, in_run(journey.out))
    trained, _ = split_episodes(before, 0.1, 0)
    learned = {digest for i in trained for digest in content_of(before, before.index(i))}
    for ids, known in ((chosen.training, True), (chosen.evaluated, False)):
        assert ids and all(bool(learned & set(content_of(store, store.index(i)))) is known for i in ids)
    moved = [replace(one, position=one.position + 1, actions=one.actions / 2) for one in demos(4)]
    lerobot_files.write(tmp_path / "other" / "my robot", moved, "v2.1")
    status, _, errors = vlafit("eval", journey.out, "--data", tmp_path / "other" / "my robot")
    assert (
        status == 2
        and "'my robot'" in errors
        and "other rows or episodes" in errors
        and "--episodes" in errors
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--protocol P in simulation, or --data CARD"),
        (["--protocol", "pusht", "--data", "x"], "not both"),
        (["--data", "x", "--trials", "3"], "--trials has no effect with --data"),
        (["--data", "x", "--videos", "0"], "--videos has no effect with --data"),
        (["--protocol", "pusht", "--draws", "3"], "--draws has no effect with --protocol"),
        (["--data", "metaworld-faucet", "--draws", "1"], "argument --draws: must be a whole number from 2"),
    ],
)
def test_options_of_the_other_kind_of_evaluation_are_refused(words: list[str], message: str) -> None:
    status, _, errors = vlafit("eval", "metaworld-base", *words)
    assert status == 2 and message in errors and errors.count("\n") == 1


def test_a_folder_that_is_no_dataset_is_refused_as_a_recipe(tmp_path: Path) -> None:
    status, _, errors = vlafit("train", tmp_path)
    assert status == 2 and str(tmp_path) in errors and "quickstart" in errors
