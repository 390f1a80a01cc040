"""What verbs print with."""

import logging

import pytest

from vlafit.cli import console
from vlafit.cli.console import Line, duration, size, table, wrapped


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1:00"), (3725, "1:02:05")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999"),
        (1500, "1.5 k"),
        (2_400_000, "2.4 M"),
        (3e9, "3.0 G"),
    ],
)
def test_counts_have_a_prefix(count, text):
    assert size(count) == text


def test_a_table_puts_numbers_flush_right():
    assert table(("name", "n"), [("a", 5), ("bcdef", 10)]) == "name    n\na       5\nbcdef  10"


def test_where_stdout_is_no_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Line("training", 100) as line:
        for step in range(1, 101):
            now = float(step)
            line.update(step, "loss 1")
    assert capsys.readouterr().out.splitlines() == [
        f"training {step}/100  loss 1  {duration(100 - step)} left" for step in (15, 30, 45, 60, 75, 90)
    ] + ["training 100/100  loss 1  in 1:40"]


def test_time_left_counts_from_where_a_resumed_run_began(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Line("training", 100, start=80) as line:
        now = 20.0
        line.update(90)
    assert "training 90/100  20 s left" in capsys.readouterr().out


def test_warnings_of_the_library_go_to_stderr_on_the_main_process_alone(capsys):
    for main_process, shown in ((True, "warning: careful 3\n"), (False, "")):
        with console.logging_to_stderr(main_process):
            logging.getLogger("vlafit.somewhere").warning("careful %d", 3)
            logging.getLogger("vlafit.somewhere").info("fine")
        assert capsys.readouterr().err == shown


def test_a_warning_that_a_command_meets_again_is_printed_once(capsys):
    with console.logging_to_stderr(True):
        for layers in (16, 16, 8, 16):
            logging.getLogger("vlafit.tuning").warning("rank 16 is too large for %d layers", layers)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-2] for line in lines] == ["16", "8"]


def test_what_imports_of_peft_make_others_say_is_kept_back_and_nothing_else(caplog):
    with console.logging_to_stderr(True), console.logging_to_stderr(True):
        for name, noise in console.IMPORT_NOISE.items():
            assert len([f for f in logging.getLogger(name).filters if getattr(f, "noise", "") == noise]) == 1
            logging.getLogger(name).warning("%s and more", noise)
            logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"] * 3


def test_many_names_are_shown_in_several_lines_and_all_of_them():
    names = [f"kLeftShoulderPitch{i}" for i in range(26)]
    line = f"state: 26 dimensions ({', '.join(names)})"
    shown = wrapped(line)
    assert len(shown) > 1 and max(map(len, shown)) <= 110
    assert " ".join(part.strip() for part in shown) == line
    assert wrapped("state: 2 dimensions (x, y)") == ["state: 2 dimensions (x, y)"]
