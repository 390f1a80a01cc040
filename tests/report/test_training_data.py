"""The training data in a run's report: counted from the dataset, kept in the run's folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.synthetic import write_run
from tests.report.test_report import parsed
from tests.train.world import write_dots
from vlafit import report
from vlafit.datasets import EpisodeStore, open_dataset
from vlafit.report import training_data
from vlafit.report.page import page


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Four episodes of each of two tasks, of 6 to 9 steps."""
    return open_dataset(write_dots(tmp_path_factory.mktemp("dots")))


@pytest.fixture(scope="module")
def whole(dots: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    names = [info.id for info in dots.episodes]
    training_data.write(run, [(dots, names[1:], names[:1])])
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_the_summary_has_the_numbers_of_the_training_episodes_only(dots: EpisodeStore, whole: Path) -> None:
    (summary,) = report.read_facts(whole).data
    learned = list(range(1, len(dots.episodes)))
    assert (summary["episodes"], summary["held_out"], summary["hz"]) == (7, 1, 10.0)
    assert summary["lengths"] == [dots.episodes[i].length for i in learned]
    assert summary["cameras"] == {"front": [16, 16]} and sum(summary["tasks"].values()) == 7
    rows = np.concatenate([dots.actions(i) for i in learned]).astype(np.float64)
    for dimension, values in enumerate(summary["action"]):
        column = rows[:, dimension]
        assert values["mean"] == pytest.approx(column.mean(), rel=1e-12)
        assert (values["min"], values["max"]) == (column.min(), column.max())
        assert values["q99"] == pytest.approx(np.quantile(column, 0.99), rel=1e-12)


def test_pictures_are_those_of_the_recording_from_first_to_last_of_each_task(
    dots: EpisodeStore, whole: Path
) -> None:
    (summary,) = report.read_facts(whole).data
    assert [film["instruction"] for film in summary["films"]] == ["go to the left", "go to the right"]
    for film in summary["films"]:
        episode = dots.index(film["episode"])
        with Image.open(whole / "data" / film["file"]) as strip:
            assert strip.height == training_data.TILE
            first = np.asarray(strip.crop((0, 0, training_data.TILE, training_data.TILE)).resize((16, 16), 0))
        assert (first == dots.image(episode, 0, "front")).all()


def test_the_page_and_the_json_show_them_and_the_page_needs_nothing_from_elsewhere(whole: Path) -> None:
    text = page(report.read_facts(whole))
    assert "7 training episodes of dot, " in text and "1 episodes held out; front 16x16" in text
    assert "Length of the episodes" in text and text.count("pictures of ") == 2
    assert all(link.startswith(("data:", "#")) for link in parsed(text).links)
    assert json.loads(json.dumps(report.read_facts(whole).to_json()))["data"][0]["card"] == "dots"


def test_a_run_of_an_earlier_version_has_no_such_section(run: Path) -> None:
    shutil.rmtree(run / "data")
    assert "Training data" not in page(report.read_facts(run))


@pytest.mark.parametrize("content", ["{", "[]", '{"datasets": 3}', '{"datasets": [{"card": "x"}]}'])
def test_a_damaged_summary_costs_only_its_section(run: Path, content: str) -> None:
    (run / "data" / "summary.json").write_text(content)
    text = page(report.read_facts(run))
    assert "Success by task" in text and "data/summary.json" in text and "7 training episodes" not in text


def test_a_picture_that_is_gone_and_a_path_out_of_the_folder_are_left_out(run: Path) -> None:
    summary = json.loads((run / "data" / "summary.json").read_text())
    summary["datasets"][0]["films"][0]["file"] = "../result.png"
    (run / "result.png").write_bytes(b"secret")
    (run / "data" / "summary.json").write_text(json.dumps(summary))
    assert page(report.read_facts(run)).count("pictures of ") == 1


def test_data_that_cannot_be_read_end_no_report(
    dots: EpisodeStore, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training_data.write(run, [(dots, ["no such episode"], [])])
    assert report.read_facts(run).data == () and "nothing of dataset dots" in caplog.text
