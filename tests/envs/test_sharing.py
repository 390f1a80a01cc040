"""Environments and renderers in one process do not disturb each other; a check finds those that would."""

import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vlafit import entry_points
from vlafit.envs import EnvSpec, garbage, names, shares_process
from vlafit.envs.messages import Play, Reset
from vlafit.envs.sharing import check_sharing
from vlafit.errors import SimulationError
from vlafit.rollout import memory
from vlafit.rollout.env_pool import Advanced, EnvPool, EnvSlot

pytestmark = pytest.mark.sim

NEEDS = {"metaworld": "metaworld", "libero": "libero"}
LIBERO = pytest.param("libero", marks=pytest.mark.slow)
LIBERO_RENDERER = pytest.param("libero", "robosuite", marks=pytest.mark.slow)
CARELESS = EnvSpec("tests.envs.careless_gl", 32, "egl")
UNSEEDED = """
import numpy as np
from tests.rollout import toy_env

class Global(toy_env.ToyEnv):
    def reset(self, task, seed):
        super().reset(task, seed)
        self._at = np.random.uniform(-.3, .3, 2).astype(np.float32)
        return self._observe(True)

def make(spec):
    return Global(spec)
"""


@pytest.fixture
def egl() -> None:
    from vlafit.envs.gl import gl_context

    try:
        gl_context("egl", 8).free()
    except SimulationError:
        pytest.skip("no EGL here")


def play(pool: EnvPool, task: str, seed: int) -> list[np.ndarray]:
    """Return the pictures of an episode: of its start and of four steps."""
    slot, films = EnvSlot(0, 0), []
    for command in (
        Reset(0, task, seed, 0, (), 0, True, True),
        Play(0, np.full((4, 2), 0.5, np.float32), True, True, 1),
    ):
        pool.send(slot, command)
        while not (events := pool.wait()):
            pass
        assert isinstance(events[0], Advanced), events
        films += events[0].moved.frames
    return films


@pytest.mark.usefixtures("egl")
def test_a_renderer_that_dies_late_does_not_break_the_pictures_of_the_next_episode() -> None:
    with EnvPool(CARELESS, 60.0) as pool:
        pool.describe()
        pool.fill(1, 1)
        alone = play(pool, "red", 3)
        play(pool, "blue", 4)
        again = play(pool, "red", 3)  # whose steps collect the renderers of both episodes before
    assert len(alone) == 5 and np.std(alone[4]) > 10
    np.testing.assert_array_equal(np.stack(again), np.stack(alone))


@pytest.fixture(params=[False, True])
def guarded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether this process has the guard of environment processes, as one that has recorded does."""
    was = list(gc.callbacks)
    gc.callbacks[:] = [one for one in was if one is not garbage._around]  # in place: Python reads this list
    if request.param:
        garbage.keep_contexts()
    yield
    assert (garbage._around in gc.callbacks) == request.param
    gc.callbacks[:] = was


@pytest.mark.usefixtures("guarded")
def test_the_check_takes_the_guard_away_for_as_long_as_it_runs() -> None:
    with garbage.unguarded():
        assert garbage._around not in gc.callbacks


@pytest.mark.usefixtures("egl")
def test_the_check_finds_renderers_that_disturb_each_other() -> None:
    """In a process of its own: which moment disturbs which depends on every renderer that it has had."""
    command = [
        sys.executable,
        "-m",
        "vlafit.envs.sharing",
        CARELESS.name,
        "--renderer",
        "egl",
        "--size",
        "32",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 1
    assert re.search(r"'side' differs .* grey levels.*make .* current", ended.stderr)
    assert "task 'red', seed 0, in a second episode, after a garbage collection" in ended.stderr


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EnvSpec]:
    """An environment of another package, whose starts global random numbers decide."""
    (tmp_path / "unseeded_dot.py").write_text(UNSEEDED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(entry_points, "_OUTSIDE", dict(entry_points._OUTSIDE))  # it outlives this test
    yield EnvSpec("unseeded_dot", 16)
    sys.modules.pop("unseeded_dot", None)


def test_the_check_finds_starts_that_global_random_numbers_decide(outside: EnvSpec) -> None:
    with pytest.raises(SimulationError, match="task 'left', seed 0, reset a second time.* task, its seed"):
        check_sharing(outside)


@pytest.mark.parametrize("name", [LIBERO if name == "libero" else name for name in names()])
def test_every_environment_of_the_package_passes_and_shares_processes(name: str) -> None:
    pytest.importorskip(NEEDS.get(name, "gym_pusht"))
    assert shares_process(name)
    check_sharing(EnvSpec(name, 24, "auto"))


@pytest.mark.usefixtures("egl")
@pytest.mark.parametrize(("name", "renderer"), [("metaworld", "egl"), LIBERO_RENDERER])
def test_their_opengl_renderers_pass(name: str, renderer: str) -> None:
    pytest.importorskip(NEEDS[name])
    check_sharing(EnvSpec(name, 24, renderer))  # type: ignore[arg-type]


def test_an_environment_of_another_package_has_its_process_alone_unless_it_says_that_it_shares(
    outside: EnvSpec,
) -> None:
    for spec, expected in ((outside, (2, 1)), (EnvSpec("tests.rollout.toy_env", 16), (2, 4))):
        with EnvPool(spec, 60.0) as pool:
            ready = pool.describe()
        assert memory.places(ready, 0, cores=2, wanted=8, free=1 << 40) == expected


def test_the_command_says_what_it_found() -> None:
    command = [sys.executable, "-m", "vlafit.envs.sharing"]
    passed = subprocess.run([*command, "tests.rollout.toy_env"], capture_output=True, text=True)
    assert passed.returncode == 0 and "tests.rollout.toy_env draws alike" in passed.stderr
    wrong = subprocess.run([*command, "nowhere.at_all"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "no such module" in wrong.stderr
