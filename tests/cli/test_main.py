"""The command line as a stranger meets it: help, wrong words, exit statuses."""

import os
import subprocess
import sys
from typing import get_args

import pytest

from vlafit import cli
from vlafit.errors import VlafitError

HEAVY = {"torch", "transformers", "accelerate", "numpy", "mujoco", "h5py", "matplotlib"}


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, timeout=60
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["list"], ["eval", "--help"], ["nonsense"]]
)
def test_help_and_lists_import_nothing_heavy(words):
    code = (
        f"import sys; from vlafit.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    done = python(code)
    loaded = set(done.stdout.split("LOADED")[-1].split())
    assert "vlafit.cli" in loaded
    assert not loaded & HEAVY


def test_the_execution_modes_of_the_command_line_are_those_of_the_library():
    from vlafit.cli.parser import EXECUTION_MODES
    from vlafit.execution import Mode

    assert get_args(Mode) == EXECUTION_MODES


def test_help_takes_less_than_four_tenths_of_a_second_of_work():
    code = "import time; from vlafit.cli import main; main(['--help']); print('SECONDS', time.process_time())"
    assert float(python(code).stdout.split("SECONDS")[-1]) < 0.4


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vlafit {verb}")


def test_nothing_at_all_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vlafit ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train'?"),
        (["list", "recpe"], "argument kind: invalid choice: 'recpe'"),
        (["list", "recipe", "card"], "'card'; see vlafit list --help"),
        (["list", "--quite"], "there is no option '--quite'; --help lists all options"),
        (["eval", "x"], "name how to evaluate: --protocol P in simulation, or --data CARD"),
        (
            ["eval", "x", "--protocol", "y", "--workres", "2"],
            "there is no option '--workres'; did you mean '--workers'?",
        ),
        (
            ["eval", "x", "--protocol", "y", "--workers", "two"],
            "argument --workers: invalid int value: 'two'",
        ),
        (["report"], "the following arguments are required: FOLDER"),
        (["eval", "no-such", "--protocol", "y"], "there is no checkpoint 'no-such'"),
        (["record", "no-such"], "there is no card 'no-such'"),
        (["inspect", "no-such"], "there is no checkpoint 'no-such'"),
        (["report", "no-such"], "no-such"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_status_2(words, message, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vlafit: ") and message in shown.err
    assert "Traceback" not in shown.err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda _: {}["bug"])
    with pytest.raises(KeyError):
        cli.main(["list"])


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "vlafit: interrupted\n"


def test_the_other_processes_of_a_launch_speak_last_and_say_who_they_are(monkeypatch, capsys):
    def fail(_: list[str]) -> int:
        raise VlafitError("no")

    waited = []
    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["list"]) == 2
    assert waited and capsys.readouterr().err == "vlafit (process 1): no\n"


@pytest.mark.case(
    section="machines",
    report="training stops when the terminal closes its pipe",
    user_has="a run is piped into `head`",
    now="it goes on without output",
)
def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m vlafit list | true", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""


def test_everything_that_ships_is_listed(capsys):
    from vlafit import shipped

    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for kind in shipped.KINDS:
        assert all(f"\n  {name} " in shown or f"\n  {name}\n" in shown for name in shipped.names(kind))
    assert cli.main(["list", "strategy"]) == 0
    assert "\n  full " in capsys.readouterr().out
