"""An error in code from outside vlafit is one sentence that names the module; the traceback is an option."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

import vlafit
from tests.policies.tiny import random_policy
from tests.train.world import CARD
from vlafit import cli, entry_points
from vlafit.entry_points import blame
from vlafit.errors import SimulationError
from vlafit.rollout.env_pool import _summed_up

LAB = """
from vlafit.checkpoints.formats.base import Format
from vlafit.policies.pi0 import SIZES, init_weights

class Broken(Format):
    name = target = "broken"
    def detect(self, files): return False
    def open(self, files, options, opener): return {}["tensors"]
    def refusals(self, policy, codec): return []
    def write(self, folder, policy, codec, final): return [][3]

FORMAT = Broken()
INSTRUCTIONS = ("",)
Config = type(SIZES["pi0-tiny"])
Section = __import__("dataclasses").make_dataclass("Section", [], frozen=True)
def recognise(path): return True
def open(card): return {}["rows"]
def build(config, device="cpu", generator=None): return 1 / 0
def make(spec): raise KeyError("robot")
"""
FORMAT = "checkpoint format 'broken_lab'"
COMMANDS = {  # what breaks -> the command, what it names
    "open": ("inspect checkpoint --format broken_lab", [FORMAT, "KeyError: 'tensors'"]),
    "write": ("export checkpoint --to broken_lab --out x", [FORMAT, "IndexError"]),
    "layout": ("data inspect card.toml", ["layout 'broken_lab'", "KeyError: 'rows'"]),
    "family": ("inspect broken_lab --size pi0-tiny", ["policy family 'broken_lab'", "ZeroDivisionError"]),
    "import": ("inspect checkpoint --format unimportable", ["'unimportable'", "NameError", "nonsense"]),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a checkpoint, a card, and a module of every kind that vlafit imports by its name."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "broken_lab.py").write_text(LAB)
    (folder / "unimportable.py").write_text("nonsense\n")
    vlafit.save_checkpoint(random_policy("pi0-tiny"), folder / "checkpoint")
    card = CARD.replace('layout = "libero"', 'layout = "broken_lab"')
    (folder / "card.toml").write_text(card.replace('source = "attrs"', 'source = "card"\ntext = "go"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder
        sys.modules.pop("broken_lab", None)


@pytest.mark.case(
    section="machines",
    report="a traceback out of a layout, format, family or simulation of one's own",
    user_has="a module named in a card or by an option, which raises",
    now="one sentence: module, line and error; `vlafit --traceback` shows the rest",
)
@pytest.mark.parametrize("kind", COMMANDS)
def test_an_error_in_outside_code_is_one_sentence_that_names_the_module(
    lab: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line, facts = COMMANDS[kind]
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlafit: ") and error.count("\n") == 1
    assert all(fact in error for fact in facts)
    if kind != "import":
        assert f"{lab}/broken_lab.py, line" in error and f"vlafit --traceback {line.split()[0]}" in error
    assert cli.main(["--traceback", *line.split()]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert not (lab / "x").exists()


def test_outside_code_in_a_dataloaders_process_is_named_too(lab: Path) -> None:
    from vlafit.datasets import layouts

    layout = layouts.load("broken_lab")
    try:
        layout.open(None)
    except KeyError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(KeyError) as caught:
        wrapped.reraise()
    assert "layout 'broken_lab'" in blame(caught.value) and f"{lab}/broken_lab.py" in blame(caught.value)


def test_a_bug_of_ours_is_not_blamed_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_points, "_OUTSIDE", {"tests.rollout.toy_env": "an environment"})
    try:
        blame(None)  # type: ignore[arg-type]
    except AttributeError as error:
        assert blame(error) == ""


def test_a_simulation_that_raises_is_named_by_line_and_its_traceback_is_the_cause() -> None:
    frame = '  File "/lab/env.py", line 7, in make\n    x'
    text = f"Traceback (most recent call last):\n{frame}\nKeyError: 'robot'\nGL: ok"
    error = _summed_up(SimulationError, "environment 'lab' cannot be created", text)
    facts = ("environment 'lab' cannot be created", "KeyError: 'robot'", "make, /lab/env.py, line 7")
    assert all(fact in str(error) for fact in facts) and "\n" not in str(error)
    assert text in str(error.__cause__)
    died = _summed_up(SimulationError, "environment 'lab' cannot be created", "ended by SIGABRT\nno display")
    assert "ended by SIGABRT\nno display" in str(died)
