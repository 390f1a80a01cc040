"""`vlafit data check`: recorded failures, one video of two cameras, and values that changed in a file."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from tests.datasets import hdf5_writers, lerobot_files
from tests.datasets.arm_recordings import EPISODES, Recording, recorded
from tests.datasets.layouts import demos, in_file_order
from vlafit.cli import main
from vlafit.datasets import Card, open_dataset
from vlafit.datasets.card import EpisodesCard
from vlafit.datasets.checks import Checked, check_store
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.pixels import check_pixels
from vlafit.datasets.write import card_text
from vlafit.errors import DataError

EVERYTHING = in_file_order(demos(3))


def checked(card: Card) -> Checked:
    return check_store(open_dataset(card), pixels=False)


def said(card: Card) -> list[str]:
    return [f"{f.message}; {f.fix}" for f in checked(card).findings if f.kind == "failed_episodes"]


def hdf5_with_success(folder: Path, failed: set[int]) -> Card:
    card = hdf5_writers.maniskill(folder, EVERYTHING)
    number = 0
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path, "a") as file:
            for group in file.values():
                if number in failed:
                    group["success"][:] = False
                number += 1
    return replace(card, episodes=EpisodesCard())


def lerobot_with_success(folder: Path, failed: set[int]) -> Card:
    card = lerobot_files.write(folder, EVERYTHING)
    info = folder / "meta" / "info.json"
    facts = json.loads(info.read_text())
    facts["features"]["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    info.write_text(json.dumps(facts))
    for path in sorted(folder.glob("data/*/*.parquet")):
        table = pq.read_table(path)
        succeeded = pa.array([number not in failed for number in table["episode_index"].to_pylist()])
        pq.write_table(table.append_column("next.success", succeeded), path)
    return card


WRITERS = pytest.mark.parametrize(
    ("write", "key"), [(hdf5_with_success, "success"), (lerobot_with_success, "next.success")]
)


@WRITERS
def test_failed_demonstrations_are_counted_where_the_card_does_not_leave_them_out(
    write, key: str, tmp_path: Path
):
    card = write(tmp_path / "set", {1, 4})
    (text,) = said(card)
    assert f"2 of {len(EVERYTHING)} episodes are recorded as failed ({key!r}" in text
    assert f'success = "{key}"' in text
    ids = [info.id for info in open_dataset(card).episodes]
    assert ids[1] in text and ids[4] in text and ids[0] not in text
    assert said(replace(card, episodes=EpisodesCard(success=key))) == []


@WRITERS
def test_all_or_none_may_have_failed(write, key: str, tmp_path: Path):
    (text,) = said(write(tmp_path / "failed", set(range(len(EVERYTHING)))))
    assert f"{len(EVERYTHING)} of {len(EVERYTHING)} episodes" in text
    assert said(write(tmp_path / "well", set())) == []


def test_a_dataset_that_records_no_success_says_so(tmp_path: Path):
    result = checked(lerobot_files.write(tmp_path / "set", EVERYTHING))
    (gap,) = [gap for gap in result.not_tested if gap.test == "failed_episodes"]
    assert "no success was found in the files" in gap.reason


def test_one_video_under_the_names_of_two_cameras_is_found_for_the_dataset_or_its_episodes():
    episodes = recorded()
    rng = np.random.default_rng(0)
    twice = [replace(e, wrist=e.front) for e in episodes]
    noisy = [
        replace(e, wrist=np.clip(e.front + rng.integers(-2, 3, e.front.shape), 0, 255).astype(np.uint8))
        for e in episodes
    ]
    for some in (twice, noisy):  # bit for bit, and as two encoders make it
        (found,) = [f for f in check_store(Recording(some)).findings if f.kind == "duplicate_cameras"]
        assert (found.severity, found.episode, found.cameras) == ("error", "", ("front", "wrist"))
        assert (
            f"cameras 'front' and 'wrist' show the same frames in {EPISODES} of {EPISODES}" in found.message
        )
    one = [*episodes[:5], twice[5], *episodes[6:]]
    found = [f for f in check_store(Recording(one)).findings if f.kind == "duplicate_cameras"]
    assert [f.episode for f in found] == ["episode_5"]


def test_a_value_that_changed_in_a_parquet_file_is_only_found_by_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "set"
    lerobot_files.write(folder, EVERYTHING)
    path = min(folder.glob("data/*/*.parquet"))
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    value = open_dataset(str(folder)).actions(0)[2, 1]
    assert main(["data", "stats", str(folder), "--checksums"]) == 0
    before, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(value.tobytes()) + 1] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert open_dataset(str(folder)).actions(0)[2, 1] != value  # nothing in the file tells
    capsys.readouterr()
    assert main(["data", "check", str(folder), "--no-pixels"]) == 2
    assert f"{path.name}: its bytes changed" in capsys.readouterr().err


def test_frames_that_cannot_be_read_are_findings_and_the_check_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    card = hdf5_writers.aloha_encoded(tmp_path / "set", EVERYTHING)
    paths = sorted((tmp_path / "set").rglob("*.hdf5"))
    with h5py.File(paths[2], "a") as file:  # a row inside; opening looks at the first
        rows = file[f"{card.robot.cameras[0].key}"]
        rows[2] = rows[2] * 0
    with h5py.File(paths[4], "a") as file:
        file["action"][1, 0] = 1e9
    opened = open_dataset(replace(card, episodes=EpisodesCard(on_bad="skip")))
    assert len(opened.episodes) == len(EVERYTHING)
    damaged = opened.episodes[2].id
    path = tmp_path / "my.toml"
    path.write_text(card_text(card))
    assert main(["data", "check", str(path), "--json"]) == 1
    found = {(f["kind"], f["episode"]): f for f in json.loads(capsys.readouterr().out)["findings"]}
    finding = found["unreadable_frames", damaged]
    assert (
        "step 2: the image is damaged (no JPEG or PNG: empty)" in finding["message"]
        and f'skip = ["{damaged}"]' in finding["fix"]
    )
    assert ("spike", opened.episodes[4].id) in found  # the others are checked
    assert main(["data", "check", str(path), "--out", str(tmp_path / "page")]) == 1
    without = open_dataset(replace(card, episodes=EpisodesCard(skip=(damaged,))))
    assert "unreadable_frames" not in {f.kind for f in check_store(without).findings}
    assert [left.id for left in without.left_out] == [damaged]


def test_frames_of_a_large_dataset_that_cannot_be_read_are_left_out_of_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Damaged(Recording):
        def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
            if episode == 3 and camera == "wrist":
                raise DataError("wrist of episode_3, step 7: is damaged")
            return super().images(episode, steps, camera)

    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    for fewest in (1, 10**9):  # on disk, and in memory
        findings = check_pixels(Damaged(recorded()), fewest=fewest, progress=None, untested=Untested())
        assert [(f.kind, f.episode) for f in findings] == [("unreadable_frames", "episode_3")]
