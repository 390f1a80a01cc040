"""The picture and the video of a recorded episode."""

import ast
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vlafit.cli import main
from vlafit.datasets import EpisodeStore, open_dataset
from vlafit.errors import DataError
from vlafit.report import episode
from vlafit.report.episode import FILM_SIDE, TILE, draw_film, draw_strip, position_of

DATASET = "tests/fixtures/lerobot_datasets/image"  # 5 episodes, 48x64, cameras front and wrist


@pytest.fixture(scope="module")
def store() -> EpisodeStore:
    return open_dataset(DATASET)


def test_a_strip_shows_frames_of_every_camera_from_first_to_last_and_the_curves(
    store: EpisodeStore, tmp_path: Path
):
    draw_strip(store, 2, tmp_path / "strip.png")
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    high = TILE * 48 // 64
    for row, camera in enumerate(("front", "wrist")):
        shown = picture[36 + row * high : 36 + (row + 1) * high, : 8 * TILE]
        for tile, step in ((0, 0), (7, store.episodes[2].length - 1)):
            part = shown[:, tile * TILE : (tile + 1) * TILE]
            frame = Image.fromarray(store.image(2, step, camera)).resize(
                (TILE, high), Image.Resampling.NEAREST
            )
            np.testing.assert_array_equal(part, np.asarray(frame))
    curves = picture[36 + 2 * high :]
    coloured = np.ptp(curves.astype(int), axis=2) > 60
    assert coloured[:220].any() and coloured[220:].any()


def test_a_video_has_a_frame_a_step_and_its_cursor_moves_to_the_right(store: EpisodeStore, tmp_path: Path):
    draw_film(store, 3, tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 10
    assert len(frames) == store.episodes[3].length
    below = 36 + FILM_SIDE * 48 // 64 + 40
    red = [f[below : below + 100, :, 0] - f[below : below + 100, :, 1] for f in frames]
    columns = [int((part > 80).sum(axis=0).argmax()) for part in red]
    assert columns == sorted(columns) and columns[-1] - columns[0] > 200


def test_an_episode_is_named_by_number_or_id(store: EpisodeStore):
    assert position_of(store, "3") == position_of(store, "episode_000003") == 3
    with pytest.raises(DataError, match="episodes 0 to 4, no 9"):
        position_of(store, "9")
    with pytest.raises(DataError, match="'episode_9'"):
        position_of(store, "episode_9")


def test_the_verb_draws_both_and_refuses_a_name_of_the_other_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    view = ["data", "view", DATASET, "--episode", "4", "--out"]
    (tmp_path / ".a.png.41.partial").touch()  # of a process that was killed
    assert main([*view, str(tmp_path / "a.png")]) == 0
    assert "episode_000004, 10 steps" in capsys.readouterr().out
    assert main([*view, str(tmp_path / "a.mp4")]) == 2
    assert ".png" in capsys.readouterr().err
    assert main([*view, str(tmp_path / "a.png"), "--video"]) == 2
    assert ".mp4" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_it_imports_matplotlib_only_when_it_draws():
    tree = ast.parse(Path(episode.__file__).read_text())
    at_import = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert at_import and not any("matplotlib" in line for line in at_import)
