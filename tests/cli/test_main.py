"""The command line as a stranger meets it: help, wrong words, exit statuses."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from tests.variants import variants
from vlafit import cli, files, locks
from vlafit.errors import VlafitError

HEAVY = {"torch", "transformers", "accelerate", "numpy", "mujoco", "h5py", "matplotlib"}


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, timeout=60
    )


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["list"], ["eval", "--help"], ["serve", "--help"], ["nonsense"]],
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
            "argument --workers: must be a whole number from 1 to 1024, not 'two'",
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_asks_to_end_is_as_ctrl_c_so_that_nothing_half_written_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def write(_: list[str]) -> int:
        with locks.creating(tmp_path / "out", "test"), files.new_folder(tmp_path / "out") as partial:
            (partial / "half").touch()
            signal.raise_signal(getattr(signal, name))
        return 0

    monkeypatch.setattr(cli, "_run", write)
    asked = getattr(signal, name)
    before = signal.signal(asked, signal.SIG_DFL)  # under nohup the tests themselves ignore a hang-up
    try:
        assert cli.main(["list"]) == 130
        assert signal.getsignal(asked) is signal.SIG_DFL
    finally:
        signal.signal(asked, before)
    assert capsys.readouterr().err == "vlafit: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_hang_up_that_nohup_has_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_run", lambda _: signal.raise_signal(signal.SIGHUP) or 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["list"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize("words", variants([["--version"], ["train", "--help"], ["list"]], [["list"]]))
def test_a_reader_that_closed_the_pipe_before_anything_was_printed_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vlafit", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_to_another_process_is_a_failure(monkeypatch):
    def broken(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("vlafit.cli.verbs.list.run", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["list"])


def test_a_full_disk_behind_standard_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vlafit", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "standard output: No space left" in done.stderr


def test_no_file_takes_the_place_of_a_standard_output_that_is_closed():
    code = (
        "import os, sys; from vlafit import cli; cli.main(['list'])\n"
        "import subprocess; number = os.open(os.devnull, os.O_RDONLY)\n"
        "child = subprocess.run(['readlink', '/proc/self/fd/1'], stderr=subprocess.PIPE)\n"
        "sys.exit(number if child.returncode == 0 else 1)"
    )
    command = f'{sys.executable} -c "$CODE" <&- >&-'
    done = subprocess.run(
        command, shell=True, env=os.environ | {"CODE": code}, capture_output=True, timeout=60
    )
    assert done.returncode > 2, done.stderr.decode()


@pytest.mark.case(
    section="machines",
    report="`no such file` for a file that is there, with LC_ALL=C",
    user_has="PYTHONUTF8=0, or a locale other than UTF-8, and a name that is not ASCII",
    now="one sentence: set PYTHONUTF8=1",
)
def test_a_name_that_the_locale_cannot_hold_is_refused_with_the_remedy():
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "vlafit", "data", "inspect", "data/é.toml"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(fact in done.stderr for fact in ("\\udcc3\\udca9", "ascii", "PYTHONUTF8=1"))


def test_everything_that_ships_is_listed(capsys):
    from vlafit import shipped

    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for kind in shipped.KINDS:
        assert all(f"\n  {name} " in shown or f"\n  {name}\n" in shown for name in shipped.names(kind))
    assert cli.main(["list", "strategy"]) == 0
    assert "\n  full " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["train", "quickstart"], ["eval", "nowhere", "--protocol", "pusht"]])
def test_an_empty_out_is_an_error(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main([*words, "--out", ""]) == 2
    assert "--out is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["data", "inspect", "b\udcff"], ["train", "quickstart", "--out", "b\udcff"]]
)
def test_a_path_that_is_not_utf8_is_refused_with_the_remedy(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert all(fact in message for fact in (r"b'b\xff'", "not UTF-8", "rename"))


@pytest.mark.parametrize("value", ["0", "-3"])
@pytest.mark.parametrize(
    "words",
    [
        "eval metaworld-base --data metaworld-faucet --steps",
        "eval metaworld-base --protocol metaworld-faucet --trials",
        "eval metaworld-base --protocol metaworld-faucet --max-batch",
        "serve metaworld-base --steps",
        "serve metaworld-base --replan",
        "inspect metaworld-base --strategy lora --batch 8 --cameras",
        "data replay metaworld-faucet --episodes",
    ],
)
def test_a_number_below_the_least_is_refused_and_never_taken_for_the_default(words: str, value: str, capsys):
    assert cli.main([*words.split(), value]) == 2
    error = capsys.readouterr().err
    assert re.search(f"{words.split()[-1]}: must be a whole number from 1 to .*, not '{value}'", error)
