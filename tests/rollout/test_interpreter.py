"""Environments in an interpreter of the user's choice play what vlafit's own plays, and fail as clearly."""

import json
import os
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.rollout.actors import Obedient
from tests.rollout.conftest import FAULTS, TOY, require_errors_of_their_tasks
from vlafit import envs
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError, SimulationError
from vlafit.rollout import Protocol, Result, evaluate

Make = Callable[..., Protocol]
LIBRARIES = Path(np.__file__).parents[1]


def make_venv(folder: Path, *packages: str) -> str:
    """Make an environment in which only `packages`, as they are installed here, can be imported."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/*/site-packages"))
    for package in packages:
        for path in LIBRARIES.glob(f"{package}*"):
            (site / path.name).symlink_to(path)
    return str(folder / "bin/python")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_venv(tmp_path_factory.mktemp("other"), "numpy", "msgpack")


def in_other(protocol: Protocol, python: str, name: str = TOY) -> Protocol:
    return replace(protocol, env=EnvSpec(name, size=16, python=python))


def rows(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_s"} for line in lines]


def play(protocol: Protocol, out: Path, **options: object) -> Result:
    return evaluate(Obedient(), protocol, out, **({"workers": 1, "videos": 0} | options))  # type: ignore[arg-type]


def test_episodes_films_and_hash_are_those_of_vlafits_own_interpreter_for_any_number_of_workers(
    protocol: Make, other: str, tmp_path: Path
) -> None:
    here = protocol(trials=3)
    play(here, tmp_path / "here", videos=1)
    for workers in (1, 2):
        out = tmp_path / f"there-{workers}"
        play(in_other(here, other), out, videos=1, workers=workers)
        assert rows(out) == rows(tmp_path / "here")
        films = sorted(path.name for path in (out / "videos").iterdir())
        assert films == sorted(path.name for path in (tmp_path / "here/videos").iterdir()) != []
        for name in films:
            assert (out / "videos" / name).read_bytes() == (tmp_path / "here/videos" / name).read_bytes()
    assert in_other(here, other).hashes() == here.hashes(), "where it is played decides no result"


def test_the_result_says_which_interpreter_and_packages_it_was(
    protocol: Make, other: str, tmp_path: Path
) -> None:
    play(in_other(protocol("left", trials=1), other), tmp_path / "out")
    result = json.loads((tmp_path / "out/result.json").read_text())
    python = ".".join(map(str, sys.version_info[:3]))
    assert result["versions"] == {"toy": "1.0", "python": python, "numpy": np.__version__}
    assert result["protocol"]["env"]["python"] == other


def test_it_needs_numpy_and_msgpack_and_nothing_else_of_vlafits_dependencies(
    protocol: Make, other: str, tmp_path: Path
) -> None:
    site = next(Path(other).parents[1].glob("lib/*/site-packages"))
    assert {path.name.partition("-")[0].partition(".")[0] for path in site.iterdir()} == {"numpy", "msgpack"}
    assert play(in_other(protocol("left", trials=2), other), tmp_path / "out").overall.episodes == 2


def without_last(log: Path) -> None:
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    (log.parent / "result.json").unlink()


def test_crashes_hangs_and_bad_values_there_are_errors_of_their_episodes_which_resume_keeps(
    protocol: Make, other: str, tmp_path: Path
) -> None:
    hard = in_other(protocol("left", *FAULTS, trials=2), other)
    got = play(hard, tmp_path / "out", timeout_s=1.0, workers=2)
    require_errors_of_their_tasks(got)
    log = tmp_path / "out/episodes.jsonl"
    whole = rows(tmp_path / "out")
    log.write_text(
        "".join(f"{json.dumps(row)}\n" for row in map(json.loads, log.read_text().splitlines()[:-1]))
    )
    (tmp_path / "out/result.json").unlink()
    play(hard, tmp_path / "out", timeout_s=1.0)
    assert rows(tmp_path / "out") == whole
    with pytest.raises(ConfigError, match="cannot resume: versions changed"):
        log.write_text(
            "".join(f"{json.dumps(row)}\n" for row in map(json.loads, log.read_text().splitlines()[:-1]))
        )
        play(in_other(hard, ""), tmp_path / "out", timeout_s=1.0)


NOISY = """
from tests.rollout.toy_env import ToyEnv

class Noisy(ToyEnv):
    def step(self, action, *, render=True):
        print("x" * 200_000, flush=True)
        return super().step(action, render=render)

def make(spec):
    return Noisy(spec)
"""


def test_what_an_environment_prints_disturbs_nothing(
    protocol: Make, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy_env.py").write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    here = protocol("left", trials=2)
    play(here, tmp_path / "here")
    play(in_other(here, other, "noisy_env"), tmp_path / "there")
    assert rows(tmp_path / "there") == rows(tmp_path / "here")


def script(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def junk(folder: Path) -> str:
    """Make a program that answers with four bytes which are no message."""
    lines = "\n".join(
        [
            f"#!{sys.executable}",
            "import os, re, sys, time",
            "socket = int(re.search(r'main\\((\\d+)\\)', sys.argv[2])[1])",
            "os.write(socket, bytes([0, 0, 0, 4, 193, 193, 193, 193]))",
            "time.sleep(60)",
        ]
    )
    return script(folder, lines + "\n")


WRONG: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: str(folder / "none/bin/python"), "none/bin/python does not exist"),
    "folder": (str, "is no program"),
    "not on PATH": (lambda folder: "no-such-python", "no program 'no-such-python' on PATH"),
    "text": (lambda folder: script(folder, "no program\n"), "cannot be started"),
    "another program": (lambda folder: script(folder, "#!/bin/sh\nexit 3\n"), "ended with status 3"),
    "no msgpack": (lambda folder: make_venv(folder / "bare", "numpy"), "lacks msgpack"),
    "junk": (junk, "a message of 4 bytes is not msgpack"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_interpreter_is_named_before_the_first_episode_and_leaves_nothing(
    kind: str, protocol: Make, tmp_path: Path
) -> None:
    make, fact = WRONG[kind]
    with pytest.raises(SimulationError, match="python") as caught:
        play(in_other(protocol("left", trials=1), make(tmp_path)), tmp_path / "out")
    assert fact in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_missing_there_is_named_with_the_interpreter(
    protocol: Make, other: str, tmp_path: Path
) -> None:
    with pytest.raises(SimulationError) as caught:
        play(in_other(protocol("left", trials=1), other, "vlafit.envs.metaworld"), tmp_path / "out")
    assert other in str(caught.value) and "metaworld" in str(caught.value)


def test_only_an_evaluation_starts_another_interpreter() -> None:
    with pytest.raises(SimulationError, match=r"remove env\.python = 'x'"):
        envs.make(EnvSpec(TOY, python="x"))


def test_another_interpreter_inherits_neither_path_nor_environment_of_this_one(
    protocol: Make, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("PYTHONHOME", os.fspath(tmp_path / "nowhere"))
    got = play(in_other(protocol("left", trials=1), other), tmp_path / "out")
    assert got.overall.episodes == 1
