"""A run that is killed, stopped or broken goes on as if nothing had happened."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from tests.forked import ForkedPopen
from tests.train.world import assert_same, learned, losses, metrics, start
from tests.variants import variants
from tests.waiting import wait_until
from vlafit import checkpoints
from vlafit.errors import DataError, TrainingError, VlafitError
from vlafit.nn.policy import Policy
from vlafit.recipe import Recipe
from vlafit.train import checkpointer, run
from vlafit.train.callbacks import Callbacks
from vlafit.train.instruments import TIMED
from vlafit.train.loop import StepResult


class Interrupted(Exception):
    """Something that no code of ours expects."""


class Until(Callbacks):
    """Calls `then` after a step."""

    def __init__(self, step: int, then: Callable[[], None]) -> None:
        self.at, self.then = step, then

    def step(self, result: StepResult, total: int, values: dict[str, float]) -> None:
        if result.step == self.at:
            self.then()


def crash() -> None:
    raise Interrupted


def wait_for_step(process: "subprocess.Popen[str]", out: Path, step: int) -> None:
    log = out / "metrics.jsonl"
    wait_until(lambda: log.is_file() and f'"step": {step}' in log.read_text(), process)


def without_times(out: Path) -> list[dict]:
    """All metrics but those that measure time and memory, in order."""
    measured = ("time_s", *TIMED, "train/peak_memory_gb")
    return [
        {k: v for k, v in event.items() if k not in measured and not k.startswith("train/memory/")}
        for event in metrics(out)
    ]


def test_a_run_killed_at_any_moment_and_resumed_equals_an_uninterrupted_one(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(recipe, out)
    wait_for_step(
        process, out, 5
    )  # where in the step after it, and whether while saving, is up to the machine
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert len(losses(out)) < 8

    assert run(recipe, out, resume=True).finished
    assert_same(learned(out, 8), learned(whole, 8))
    assert without_times(out) == without_times(whole)


@pytest.mark.parametrize("step", variants([1, 4], always=[4]))
def test_a_crash_costs_the_steps_since_the_last_checkpoint(
    recipe: Recipe, whole: Path, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", callbacks=Until(step, crash))
    again = run(recipe, tmp_path / "run", resume=True)
    assert again.finished and again.steps == 8
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))
    assert without_times(tmp_path / "run") == without_times(whole)
    assert "Interrupted" in (tmp_path / "run" / "traceback.txt").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["resumed_from"] == (None if step == 1 else "step_000004") and record["finished"] is True


@pytest.mark.parametrize(
    "how", variants([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], always=[signal.SIGTERM])
)
def test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(
    recipe: Recipe, whole: Path, tmp_path: Path, how: signal.Signals
) -> None:
    summary = run(recipe, tmp_path / "run", callbacks=Until(4, lambda: os.kill(os.getpid(), how)))
    assert not summary.finished and summary.steps == 5
    assert (tmp_path / "run" / "checkpoints" / "step_000005" / "training").is_dir()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False
    assert run(recipe, tmp_path / "run", resume=True).finished
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))
    assert without_times(tmp_path / "run") == without_times(whole)


def test_a_forked_command_is_a_process_as_any_other(tmp_path: Path) -> None:
    """So that what is stopped and killed here is what a user would stop and kill (tests/forked.py)."""
    command = [sys.executable, "-m", "vlafit", "list"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, text=True, **pipes)
    assert type(process) is ForkedPopen
    assert psutil.Process(process.pid).ppid() == os.getpid() and os.getsid(process.pid) == process.pid
    assert "quickstart" in process.communicate()[0] and process.returncode == 0
    (tmp_path / "broken.toml").write_text("[policy")
    words = [*command[:3], "train", "broken.toml"]
    wrong = subprocess.run(words, cwd=tmp_path, **pipes, env=os.environ | {"COLUMNS": "80"})
    assert wrong.returncode == 2 and b"broken.toml" in wrong.stderr


def test_the_command_line_ends_with_130_after_sigterm_and_says_how_to_go_on(
    recipe: Recipe, tmp_path: Path
) -> None:
    endless = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=100_000, report=True))
    process = start(endless, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 2)
    process.terminate()
    said = "".join(process.communicate())
    assert process.returncode == 130, said
    assert "SIGTERM: saving after this step" in said and "--resume" in said
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_checkpoint_that_a_kill_left_half_written_is_ignored_and_cleared_away(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(recipe, out, callbacks=Until(5, crash))
    shelf = out / "checkpoints"
    half = shelf / ".step_000006.partial"
    shutil.copytree(shelf / "step_000004", half)
    (half / "model.safetensors").write_bytes(b"half of it")
    shutil.copytree(half, shelf / ".step_000003.removed")
    (shelf / "last.json").write_text('{"step": 3, "path": "step_000003"}\n')  # killed before it was written
    run(recipe, out, resume=True)
    assert sorted(p.name for p in shelf.iterdir() if p.is_dir()) == ["step_000006", "step_000008"]
    assert_same(learned(out, 8), learned(whole, 8))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = checkpoints.save, tmp_path / "run"

    def full_disk(policy: Policy, folder: Path, *args: object, **named: object) -> None:
        save(policy, folder, *args, **named)  # type: ignore[arg-type]
        if "step_000006" in folder.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", full_disk)
    with pytest.raises(TrainingError, match=r"step_000006.*No space left.*--resume"):
        run(recipe, out)
    monkeypatch.undo()
    assert json.loads((out / "checkpoints" / "last.json").read_text())["step"] == 4
    run(recipe, out, resume=True)
    assert_same(learned(out, 8), learned(whole, 8))


def test_lines_of_the_metrics_that_are_no_events_are_dropped(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step_000008")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"loss": 2}\n{"step": nul')
    assert run(recipe, out, resume=True).finished
    assert without_times(out) == without_times(whole)


def test_resuming_a_finished_run_changes_nothing(whole: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("step_*/**/*")}
    assert run(recipe, out, resume=True).finished
    assert {p: p.stat().st_mtime_ns for p in out.rglob("step_*/**/*")} == before
    assert without_times(out) == without_times(whole)


# ------------------------------------------------------------------------------------- what is refused


def half(recipe: Recipe, out: Path) -> None:
    with pytest.raises(Interrupted):
        run(recipe, out, callbacks=Until(4, crash))


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"already holds a run; .*--resume"):
        run(recipe, whole)


def test_a_changed_recipe_is_refused_by_the_name_of_the_field(recipe: Recipe, whole: Path) -> None:
    changed = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr=0.5))
    with pytest.raises(TrainingError, match=r"resume.*changed: optim\.lr .*0\.001.* 0\.5"):
        run(changed, whole, resume=True)


def test_what_changes_no_weight_may_change(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    half(recipe, tmp_path / "run")
    other = dataclasses.replace(
        recipe, purpose="another", train=dataclasses.replace(recipe.train, save_every=0, keep=0)
    )
    run(other, tmp_path / "run", resume=True)
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))


def test_other_data_is_refused(recipe: Recipe, card: Path, tmp_path: Path) -> None:
    shutil.copytree(card.parent, tmp_path / "data")
    moved = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, cards=(str(tmp_path / "data" / card.name),))
    )
    half(moved, tmp_path / "run")
    os.remove(tmp_path / "data" / "dots" / "right_demo.hdf5")
    with pytest.raises(TrainingError, match="data changed since the run began"):
        run(moved, tmp_path / "run", resume=True)


@pytest.mark.case(
    section="data",
    report="a resumed run learns from other frames",
    user_has="files of another size, or written again, since the run stopped",
    now="refused by size; a warning if only the time differs",
)
def test_frames_that_changed_while_a_run_was_stopped_are_noticed(
    recipe: Recipe, card: Path, tmp_path: Path
) -> None:
    shutil.copytree(card.parent, tmp_path / "data")
    moved = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, cards=(str(tmp_path / "data" / card.name),))
    )
    half(moved, tmp_path / "run")
    file = tmp_path / "data" / "dots" / "right_demo.hdf5"
    with h5py.File(file, "r+") as opened:  # the same states and actions
        opened["data/demo_0/obs/front"][0] = 0  # type: ignore[index]
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    run(moved, tmp_path / "run", resume=True)
    notices = json.loads((tmp_path / "run" / "run.json").read_text())["notices"]
    assert any("'dots' were written while the run was stopped" in notice for notice in notices)
    with h5py.File(file, "r+") as opened:
        opened["more"] = np.zeros(99)
    facts = [str(tmp_path / "run"), "data changed since the run began: dataset 'dots' had 2 files of"]
    with pytest.raises(TrainingError) as caught:
        run(moved, tmp_path / "run", resume=True)
    assert all(fact in str(caught.value) for fact in facts)


def test_data_that_is_cut_while_a_run_trains_on_it_is_one_sentence(
    recipe: Recipe, card: Path, tmp_path: Path
) -> None:
    shutil.copytree(card.parent, tmp_path / "data")
    moved = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, cards=(str(tmp_path / "data" / card.name),))
    )

    def cut() -> None:
        for file in (tmp_path / "data" / "dots").iterdir():
            os.truncate(file, 4096)

    with pytest.raises(DataError, match=r"demo\.hdf5: changed.* 4,096"):
        run(moved, tmp_path / "run", callbacks=Until(1, cut))


def test_another_strategy_of_the_same_name_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text('[[rule]]\nselect = { part = "expert" }\nmode = "full"\n[[rule]]\nmode = "frozen"\n')
    mine = dataclasses.replace(recipe, strategy=str(rules))
    half(mine, tmp_path / "run")
    rules.write_text(rules.read_text().replace('mode = "full"', 'mode = "full"\nlr = 2.0'))
    with pytest.raises(TrainingError, match="strategy .* changed since"):
        run(mine, tmp_path / "run", resume=True)


@pytest.mark.parametrize("file", ["training/state.safetensors", "training/state.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_not_resumed_from(
    recipe: Recipe, whole: Path, tmp_path: Path, file: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    path = out / "checkpoints" / "step_000008" / file
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(VlafitError) as error:
        run(recipe, out, resume=True)
    assert "step_000008" in str(error.value)
    assert "step_000006; to resume from it, run the same command with --resume-from 6" in str(error.value)
    assert run(recipe, out, resume_from=6).finished
    assert_same(learned(out, 8), learned(whole, 8))
    assert without_times(out) == without_times(whole)
    assert json.loads((out / "checkpoints" / "last.json").read_text())["step"] == 8


def test_what_a_damaged_state_holds_is_not_printed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_000008"
    path = state_of(whole, folder)
    content = bytearray(path.read_bytes())
    content[100] = 0xFF
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="not UTF-8 text: invalid start byte at byte 100") as error:
        checkpointer.read(folder, "")
    assert "sha256" not in str(error.value) and len(str(error.value)) < 800


def state_of(whole: Path, folder: Path, hashed: bool = True) -> Path:
    """Copy a checkpoint of step 8 to `folder`, without the hash of its numbers as early versions wrote it."""
    shutil.copytree(whole / "checkpoints" / "step_000008", folder)
    path = folder / checkpointer.FACTS
    content = json.loads(path.read_text())
    if not hashed:
        del content["facts_sha256"]
        path.write_text(json.dumps(content))
    assert folder.name != "step_000008" or checkpointer.read(folder, content["data"]).progress.step == 8
    return path


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"step": 8', '"step": 9'),
        ('"step": 8', '"step": 1e30'),
        ('"step": 8', '"step": -3'),
        ('"best_loss": ', '"best_loss": NaN, "old": '),
        ('"number": 0', '"number": -1'),
    ],
)
def test_a_changed_number_in_a_training_state_is_noticed(
    whole: Path, tmp_path: Path, before: str, after: str, hashed: bool
) -> None:
    path = state_of(whole, tmp_path / "step_000008", hashed)
    text, data = path.read_text(), json.loads(path.read_text())["data"]
    path.write_text(text.replace(before, after, 1))
    assert path.read_text() != text
    with pytest.raises(TrainingError, match=rf"{path.parent}: .*(state\.json|facts_sha256)"):
        checkpointer.read(tmp_path / "step_000008", data)


@pytest.mark.parametrize(("before", "after"), [('"seconds": ', '"seconds": 1'), ("facts_", "factr_")])
def test_a_number_that_could_be_right_is_compared_by_hash(
    whole: Path, tmp_path: Path, before: str, after: str
) -> None:
    path = state_of(whole, tmp_path / "step_000008")
    data = json.loads(path.read_text())["data"]
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(TrainingError, match=f"{path.parent}: .*{after[:6]}|facts_sha256"):
        checkpointer.read(tmp_path / "step_000008", data)


def test_a_step_that_the_optimiser_did_not_count_is_noticed(whole: Path, tmp_path: Path) -> None:
    path = state_of(whole, tmp_path / "step_000009", hashed=False)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"step": 9}))
    with pytest.raises(TrainingError, match="step 9, the optimiser counts 8"):
        checkpointer.read(tmp_path / "step_000009", content["data"])


@pytest.mark.parametrize("left", [b"", b"\0" * 300])
def test_an_emptied_recipe_of_a_run_is_named_with_the_copy_that_is_left(
    recipe: Recipe, whole: Path, tmp_path: Path, left: bytes
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "recipe.toml").write_bytes(left)
    copy = out / "checkpoints" / "step_000008" / "recipe.toml"
    with pytest.raises(TrainingError) as caught:
        run(recipe, out, resume=True)
    assert all(fact in str(caught.value) for fact in (f"{out / 'recipe.toml'}: is empty", f"copy {copy}"))
    shutil.copyfile(copy, out / "recipe.toml")
    assert run(recipe, out, resume=True).finished


def test_a_state_to_resume_from_must_be_there_and_whole_before_anything_is_removed(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(TrainingError, match="training state of step 5; available: 6, 8"):
        run(recipe, out, resume_from=5)
    (out / "checkpoints" / "step_000006" / "training" / "state.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match="no earlier training state.*--out"):
        run(recipe, out, resume_from=6)
    assert (out / "checkpoints" / "step_000008").is_dir()


# ------------------------------------------------------------------------------- two at once, lost processes


def test_a_second_run_in_the_folder_is_refused_resumed_or_fresh(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused: list[str] = []

    def again() -> None:
        for resume in (True, False):
            with pytest.raises(VlafitError, match=r"another .*process \d+") as error:
                run(recipe, out, resume=resume)
            refused.append(str(error.value))

    assert run(recipe, out, callbacks=Until(2, again)).finished
    assert all(f"{out}: another vlafit train (process {os.getpid()})" in said for said in refused)
    assert sorted(losses(out)) == list(range(1, 9)), "the first went on undisturbed"


def test_a_loader_process_that_is_killed_is_one_message_and_the_run_can_go_on(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    loading = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, workers=1),
        train=dataclasses.replace(recipe.train, validate_every=1),
    )

    def kill() -> None:
        (worker,) = [p for p in multiprocessing.active_children() if p.pid]
        os.kill(worker.pid or 0, signal.SIGKILL)

    with pytest.raises(TrainingError) as error:
        run(loading, tmp_path / "run", callbacks=Until(3, kill))
    said = str(error.value)
    assert not (tmp_path / "run" / "traceback.txt").exists()
    assert said.startswith("dataloader worker ") and "killed by SIGKILL" in said
    assert "data.workers (now 1" in said and "--resume continues from the last checkpoint" in said
    assert run(dataclasses.replace(recipe, train=loading.train), tmp_path / "run", resume=True).finished
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))
