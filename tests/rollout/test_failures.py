"""Filmed failures are on a sheet of their own, by task, those that ended alike side by side."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.rollout.actors import Obedient, Saying
from vlafit.rollout import Protocol, evaluate
from vlafit.rollout.failures import like_together
from vlafit.rollout.video import BORDER, FAILURE, strip, write_png, write_sheet

Make = Callable[..., Protocol]


@pytest.mark.parametrize("shuffled", range(3))
def test_strips_that_end_alike_are_neighbours(tmp_path: Path, shuffled: int) -> None:
    """Four ways to fail, a patch each, of five starts: they begin in many places, and end in one of four."""
    rng = np.random.default_rng(shuffled)
    kinds: dict[Path, int] = {}
    for number in rng.permutation(20):
        kind, start = divmod(int(number), 5)
        frames = rng.integers(0, 40, (9, 32, 32, 3)).astype(np.uint8)
        for i, frame in enumerate(frames):
            row, column = (4 + 20 * (kind // 2), 4 + 20 * (kind % 2)) if i > 4 else (start * 6, i * 4)
            frame[row : row + 8, column + start % 2 : column + 8] = 200
        path = tmp_path / f"{len(kinds)}.png"
        write_png(path, strip(frames, FAILURE, "a failure"))
        kinds[path] = kind
    order = [kinds[path] for path in like_together(list(kinds))]
    assert [kind for kind, _ in itertools.groupby(order)] == list(dict.fromkeys(order)) and len(order) == 20
    assert like_together(list(kinds)) == like_together(list(reversed(kinds)))


def test_the_filmed_failures_of_an_evaluation_are_on_a_sheet_of_their_own(
    protocol: Make, tmp_path: Path
) -> None:
    got = evaluate(Obedient(), protocol(trials=6), tmp_path, workers=1, videos=6)
    failed = [record for record in got.records if record.success is False]
    assert {record.task for record in failed} == {"left", "right"} and len(failed) == 4
    with Image.open(tmp_path / "failures.png") as sheet, Image.open(tmp_path / "sheet.png") as everything:
        assert sheet.height * 3 == everything.height  # 4 of 12 strips
        alone = tmp_path / "alone.png"
        of_task = [
            like_together([(tmp_path / str(r.video)).with_suffix(".png") for r in failed if r.task == task])
            for task in ("left", "right")
        ]
        write_sheet(alone, [*of_task[0], *of_task[1]])
        assert sheet.height > 4 * BORDER and (tmp_path / "failures.png").read_bytes() == alone.read_bytes()


def test_without_the_strip_of_a_failure_there_is_no_such_sheet(protocol: Make, tmp_path: Path) -> None:
    evaluate(Saying([[-8, 0]] * 4), protocol("left", trials=2), tmp_path / "won", workers=1, videos=2)
    assert (tmp_path / "won" / "sheet.png").is_file() and not (tmp_path / "won" / "failures.png").exists()
    still, lost = Saying([[0, 0]] * 4), tmp_path / "lost"
    evaluate(still, protocol(trials=1), lost, workers=1, videos=1)
    assert (lost / "failures.png").is_file()
    for film in (lost / "videos").glob("*.png"):
        film.unlink()
    evaluate(still, protocol(trials=1), lost, workers=1, videos=1)
    assert not (lost / "failures.png").exists()
