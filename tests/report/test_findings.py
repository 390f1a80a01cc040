"""The page of `vlafit data check --out`: each finding with the picture that shows it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.datasets.arm_recordings import HEIGHT, WIDTH, Recording, recorded
from tests.datasets.layouts import demos, in_file_order
from tests.datasets.lerobot_files import write
from vlafit.cli import main
from vlafit.datasets.checks import Checked, Finding, NotTested
from vlafit.errors import StorageError
from vlafit.report.finding_pictures import CAPTION, CONCERNED, TILES, draw_finding
from vlafit.report.finding_pictures import WIDTH as SHEET
from vlafit.report.findings import MOST_PICTURES, write_findings

SIDE = SHEET // TILES
ROW = SIDE * HEIGHT // WIDTH
STORE = Recording(recorded(episodes=3))


def finding(kind: str, step: int | None = None, episode: str = "episode_1", **shown: object) -> Finding:
    return replace(Finding("error", kind, episode, step, "what", "so", "do"), **shown)  # pyright: ignore[reportArgumentType]


def tile(picture: NDArray, row: int, number: int) -> NDArray:
    """A frame of a picture, without the number in its corner and the border."""
    top = row * (ROW + CAPTION) + CAPTION
    return picture[top : top + ROW, number * SIDE : (number + 1) * SIDE][16:-4, 4:-4]


def frame(episode: int, step: int, camera: str) -> NDArray:
    image = Image.fromarray(STORE.image(episode, step, camera))
    return np.asarray(image.resize((SIDE, ROW), Image.Resampling.NEAREST))[16:-4, 4:-4]


def test_a_whole_episode_is_shown_beside_a_sound_one_and_a_swap_beside_both_cameras():
    picture = draw_finding(STORE, finding("cameras_swapped", cameras=("front", "wrist")), sound=2)
    assert picture is not None and picture.shape == (3 * (ROW + CAPTION), SHEET, 3)
    for row, (episode, camera) in enumerate([(1, "front"), (2, "front"), (2, "wrist")]):
        for number, step in ((0, 0), (7, 89)):
            assert np.array_equal(tile(picture, row, number), frame(episode, step, camera))


def test_frames_around_a_step_have_a_border_where_they_are_concerned():
    picture = draw_finding(STORE, finding("black_frames", 30, cameras=("wrist",), steps=2), sound=2)
    assert picture is not None and picture.shape[0] == ROW + CAPTION
    borders = []
    for number in range(TILES):
        assert np.array_equal(tile(picture, 0, number), frame(1, 28 + number, "wrist"))
        corner = picture[CAPTION + ROW - 1, number * SIDE + SIDE // 2]
        borders.append(tuple(corner) == CONCERNED)
    assert borders == [number in (2, 3) for number in range(TILES)]


def curve(picture: NDArray, colour: tuple[int, int, int], top: int, bottom: int) -> dict[int, float]:
    """The mean height of pixels of a colour, by column, inside the axes of a chart."""
    alike = np.abs(picture[top:bottom, 60:-60].astype(int) - colour).sum(axis=2) < 40
    return {int(x): float(np.flatnonzero(alike[:, x]).mean()) for x in np.flatnonzero(alike.any(axis=0))}


def test_curves_show_the_action_that_moves_against_its_state_in_this_episode_only():
    episodes = recorded(episodes=3)
    episodes[1] = replace(episodes[1], actions=episodes[1].actions * np.float32([1, 1, -1]))
    shown = finding("action_sign", columns=(("action", 2), ("state", 2)))
    picture = draw_finding(Recording(episodes), shown, sound=2)
    assert picture is not None
    middle = picture.shape[0] // 2
    for top, bottom, together in ((20, middle - 25, False), (middle + 20, middle * 2 - 25, True)):
        action = curve(picture, (0x0B, 0x72, 0x85), top, bottom)
        state = curve(picture, (0xB3, 0x59, 0x00), top, bottom)
        rises = [line[min(line)] - line[max(line)] for line in (action, state)]
        assert (rises[0] > 0) == together and rises[1] > 0


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("action_lag", {"columns": (("action", 0), ("state", 0))}),
        ("spike", {"step": 7, "columns": (("action", 1),)}),
        ("not_finite", {"step": 7, "columns": (("state", 1),)}),
        ("frozen_frames", {"step": 80, "steps": 10, "cameras": ("front",)}),
        ("video_shift", {"cameras": ("front",)}),
        ("cut", {"step": 88, "cameras": ("front",)}),
        ("duplicate_frames", {"cameras": ("front",), "other": "episode_0"}),
        ("duplicate_episode", {"other": "episode_0"}),
        ("zero_rows", {"step": 0, "steps": 90, "columns": (("state", 0), ("action", 0))}),
    ],
)
def test_every_kind_has_a_picture(kind: str, shown: dict):
    episodes = recorded(episodes=3)
    state = episodes[1].state.copy()
    state[7, 1] = np.nan
    episodes[1] = replace(episodes[1], state=state)
    picture = draw_finding(Recording(episodes), finding(kind, **shown), sound=2)
    assert picture is not None and picture.shape[1] == SHEET and picture.shape[0] >= ROW + CAPTION
    blamed = finding(kind, **shown)
    without = draw_finding(Recording(episodes), blamed, sound=2, frames=False)
    assert (without is None) == (not blamed.columns)


def test_a_sentence_has_no_picture():
    assert draw_finding(STORE, finding("placeholder_task"), sound=2) is None


def test_one_kind_has_a_limited_number_of_pictures_and_the_page_says_so(tmp_path: Path):
    many = [finding("looks_different", episode="episode_1", cameras=("front",)) for _ in range(15)]
    many.append(finding("black_frames", 3, episode="episode_2", cameras=("wrist",)))
    page = write_findings(STORE, "my data", Checked(tuple(many), ()), tmp_path / "out")
    text = page.read_text()
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == MOST_PICTURES + 1
    assert "3 of them without a picture" in text and text.count("<img") == MOST_PICTURES + 1
    assert "vlafit data view &#x27;my data&#x27; --episode episode_1 --out view.png" in text
    listed = json.loads((tmp_path / "out" / "findings.json").read_text())["findings"]
    assert [entry["picture"] is not None for entry in listed] == [True] * 12 + [False] * 3 + [True]
    assert all((tmp_path / "out" / entry["picture"]).is_file() for entry in listed if entry["picture"])


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("vlafit.report.findings.write_png", fails)
    with pytest.raises(StorageError, match="the disk is full"):
        found = Checked((finding("black_frames", 3, cameras=("wrist",)),), ())
        write_findings(STORE, "x", found, tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--no-pixels"], ["--json"]])
def test_check_writes_the_page_into_a_new_folder_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    everything = in_file_order(demos(3))
    write(tmp_path / "twice", [*everything, everything[0]])
    command = ["data", "check", str(tmp_path / "twice"), "--out", str(tmp_path / "found"), *options]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "index.html" in (shown.err if options == ["--json"] else shown.out)
    if options == ["--json"]:
        assert json.loads(shown.out)["findings"][0]["other"] == "episode_000000"
    pictures = list((tmp_path / "found").glob("pictures/*.png"))
    assert len(pictures) == (0 if options == ["--no-pixels"] else 1)
    assert "duplicate episode" in (tmp_path / "found" / "index.html").read_text()
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_page_of_a_clean_dataset_says_so_and_what_was_not_tested(tmp_path: Path):
    gap = NotTested("video_shift", ("video_shift",), ("camera 'front'",), "nothing moves", "a motion")
    page = write_findings(STORE, "x", Checked((), (gap,)), tmp_path / "out").read_text()
    assert "Nothing suspicious was found" in page
    assert all(text in page for text in ("Not tested", "video shift", "nothing moves", "a motion"))
    listed = json.loads((tmp_path / "out" / "findings.json").read_text())["not_tested"]
    assert [entry["test"] for entry in listed] == ["video_shift"]
