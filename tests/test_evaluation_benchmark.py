"""The benchmark of evaluations: the plain loop plays the policy that it writes, and its parts add up."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("gym_pusht")

from gym_pusht.envs.pusht import PushTEnv  # noqa: E402

from benchmarks import evaluation_beside_lerobot as benchmark  # noqa: E402  # needs gym_pusht
from benchmarks.timed_pusht import timed_method  # noqa: E402


def test_a_plain_loop_plays_the_written_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "HORIZON", 12)
    for name in ("_render", "step", "reset"):  # timed from here on, until the test ends
        monkeypatch.setattr(PushTEnv, name, getattr(PushTEnv, name))
    benchmark.write_policy(tmp_path)
    assert (tmp_path / benchmark.EXPORTED / "policy_postprocessor.json").is_file()
    row = benchmark.played("loop", 0, tmp_path, episodes=1)
    assert row["steps"] == 12 and row["successes"] == 0
    assert all(row["parts"][part] > 0 for part in benchmark.PARTS)
    row |= {"side": "plain loop", "episodes": 1}
    faster = row | {"wall_s": row["wall_s"] / 2}
    line = benchmark.table([row, faster]).splitlines()[-1]
    assert line.startswith("| plain loop | ") and line.count("|") == 8


def test_a_part_leaves_out_the_part_inside_it() -> None:
    class Simulation:
        def draw(self) -> int:
            return sum(range(300_000))

        def step(self) -> int:
            return self.draw()

    seconds: dict[str, float] = {}
    timed_method(Simulation, "draw", seconds, "drawing")
    timed_method(Simulation, "step", seconds, "simulation", without="drawing")
    Simulation().step()
    assert 0 <= seconds["simulation"] < seconds["drawing"]
