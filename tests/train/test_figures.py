"""Figures mean what they say, and decoration never costs a run."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.world import metrics
from vlafit import report
from vlafit.errors import VlafitError
from vlafit.recipe import Recipe
from vlafit.report.films import Films
from vlafit.report.logged import read_metrics
from vlafit.train import dataloader, run
from vlafit.train.experiment import build
from vlafit.train.metrics import Metrics

CPU = torch.device("cpu")


class OneProcess:
    """What `Metrics` asks of accelerate."""

    is_main_process = True

    def log(self, values: dict[str, float], step: int) -> None:
        pass


@pytest.mark.case(
    section="runs",
    report="validation losses of two runs do not compare",
    user_has="other batch sizes",
    now="the same samples, whatever the batch size",
)
def test_validation_is_on_the_same_samples_whatever_the_batch_size_and_the_processes(recipe: Recipe) -> None:
    experiment = build(recipe, CPU, None)

    def samples(batch_size: int, world: int) -> list[tuple[int, int]]:
        train = replace(recipe.train, batch_size=batch_size)
        other = replace(experiment, recipe=replace(recipe, train=train))
        shares = [dataloader.validation_batches(other, rank=rank, world=world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "each process must take part in every collective"
        assert all(len(keys) <= batch_size // world for share in shares for keys, _ in share)
        return sorted(key for share in shares for keys, _ in share for key in keys)

    expected = samples(4, 1)
    assert expected and len(set(expected)) == len(expected)
    for batch_size, world in ((1, 1), (2, 1), (6, 1), (8, 1), (64, 1), (4, 2), (6, 2), (6, 3)):
        assert samples(batch_size, world) == expected


def test_different_learning_rates_are_logged_by_rule(recipe: Recipe, tmp_path: Path) -> None:
    strategy = tmp_path / "two.toml"
    strategy.write_text(
        '[[rule]]\nselect = { part = "vision" }\nmode = "full"\nlr = 0.1\n\n'
        '[[rule]]\nselect = { part = "expert" }\nmode = "full"\n\n[[rule]]\nmode = "frozen"\n'
    )
    train = replace(recipe.train, steps=2, validate_every=0)
    run(replace(recipe, strategy=str(strategy), train=train), tmp_path / "run")
    event = next(e for e in metrics(tmp_path / "run") if "train/loss" in e)
    rates = {name: value for name, value in event.items() if name.startswith("train/lr/")}
    assert list(rates) == ["train/lr/1_vision", "train/lr/2_expert"]
    assert rates["train/lr/1_vision"] == pytest.approx(0.1 * rates["train/lr/2_expert"])
    assert event["train/lr"] == pytest.approx(rates["train/lr/2_expert"]), "the rate that the recipe says"


def test_a_run_that_cannot_begin_leaves_no_folder(recipe: Recipe, tmp_path: Path) -> None:
    policy = replace(recipe.policy, config={"max_tokens": 1})
    with pytest.raises(VlafitError):
        run(replace(recipe, policy=policy), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(VlafitError):
        run(replace(recipe, policy=policy), tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"], "a folder that was there stays"


@pytest.mark.case(
    section="runs",
    report="`UnicodeDecodeError` in `metrics.jsonl`",
    user_has="one flipped bit",
    now="that line is dropped, with a warning; lost history is reported",
)
def test_a_flipped_bit_in_the_metrics_loses_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"step": step, "train/loss": 1.0}).encode() for step in range(1, 5)]
    lines[1] = lines[1][:5] + bytes([lines[1][5] | 0x80]) + lines[1][6:]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    points, caveats = read_metrics(tmp_path / "metrics.jsonl")  # of `vlafit report`
    assert [point.step for point in points["train/loss"]] == [1, 3, 4]
    assert caveats == ["1 lines of metrics.jsonl are damaged and left out (line 2)."]
    Metrics(tmp_path, OneProcess()).rewind(4)  # type: ignore[arg-type]
    assert [e["step"] for e in metrics(tmp_path)] == [1, 3, 4]
    assert "not a valid event" in caplog.text


@pytest.mark.parametrize("damage", ["emptied", "removed", "cut"])
def test_metrics_that_lost_their_history_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    if damage != "removed":
        path.write_text("" if damage == "emptied" else '{"step": 1, "train/loss": 1.0}\n')
    with caplog.at_level(logging.WARNING):
        Metrics(tmp_path, OneProcess()).rewind(4)  # type: ignore[arg-type]
    assert "metrics.jsonl" in caplog.text and "lost" in caplog.text and "step 4" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"no picture"])
def test_a_damaged_film_strip_is_left_out_of_the_page(tmp_path: Path, content: bytes) -> None:
    class Filmed:
        name = "after"

        def strip(self, _: object) -> Path:
            return tmp_path / "strip.png"

    (tmp_path / "strip.png").write_bytes(content)
    films = Films()
    assert films.strip(Filmed(), None).html == ""  # type: ignore[arg-type]
    assert "1 films" in films.left_out()


@pytest.mark.case(
    section="runs",
    report="the run fails after all training",
    user_has="a damaged film strip or font, a full disk for the page",
    now="a warning; `vlafit report RUN` writes it again",
)
def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    recipe: Recipe,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(whole, tmp_path / "run")

    def broken(_: Path) -> Path:
        raise OSError("damaged")

    monkeypatch.setattr(report, "build", broken)
    summary = run(replace(recipe, train=replace(recipe.train, report=True)), tmp_path / "run", resume=True)
    assert summary.finished and summary.report is None
    assert "vlafit report" in caplog.text


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_checkpoint_between_two_logged_steps_loses_no_history(tmp_path: Path, caplog):
    lines = [{"step": step, "train/loss": 1.0} for step in range(2, 16, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Metrics(tmp_path, OneProcess()).rewind(15, 2)  # type: ignore[arg-type]
    assert events(tmp_path / "metrics.jsonl") == lines and not caplog.records
    Metrics(tmp_path, OneProcess()).rewind(18, 2)  # type: ignore[arg-type]
    assert "step 14" in caplog.text and "step 18" in caplog.text


def test_a_run_that_goes_on_has_no_event_of_where_it_stopped(tmp_path: Path):
    lines = [
        {"step": 6, "train/loss": 1.0},
        {"step": 7, "train/loss": 0.5},
        {"step": 7, "validation/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Metrics(tmp_path, OneProcess()).rewind(7, 2)  # type: ignore[arg-type]
    assert events(tmp_path / "metrics.jsonl") == lines, "it has ended there"
    Metrics(tmp_path, OneProcess()).rewind(7, 2, goes_on=True)  # type: ignore[arg-type]
    assert events(tmp_path / "metrics.jsonl") == [lines[0], lines[2]]
