"""Bytes that change inside a frame are found by checksums, written on request and compared at start."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from tests.train.world import tiny, write_dots
from vlafit import cli, config
from vlafit.datasets import checksums, open_dataset
from vlafit.errors import ConfigError, DataError


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """The card of recorded dots whose checksums are written."""
    path = write_dots(tmp_path / "data", episodes=2)
    assert cli.main(["data", "stats", str(path), "--checksums"]) == 0
    return path


def flip_a_pixel(card: Path) -> Path:
    """Change one bit of a frame in place; size and time of the file stay."""
    path = card.parent / "dots" / "left_demo.hdf5"
    before = path.stat()
    with h5py.File(path) as file:
        at = file["data/demo_1/obs/front"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[at + 7] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


@pytest.mark.case(
    section="data",
    report="a policy learns from frames whose bytes changed on a disk or on the way",
    user_has="a bit that flipped inside a frame; size and time of the file are as before",
    now="`vlafit data stats CARD --checksums` once; train, `data check` and `eval --data` compare",
)
def test_a_bit_that_flipped_inside_a_frame_is_refused_wherever_the_dataset_is_used(
    card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    train = {"steps": 2, "validate_every": 2, "save_every": 0}
    recipe.write_text(config.dump(tiny(card, train=train, optim={"warmup_steps": 0})))
    assert cli.main(["train", str(recipe), "--out", str(out)]) == 0
    checkpoint = str(out / "checkpoints" / "step_000002")
    flip_a_pixel(card)
    capsys.readouterr()
    for words in (
        ["train", str(recipe), "--out", str(tmp_path / "other")],
        ["train", str(recipe), "--out", str(out), "--resume", "--train.steps", "3"],
        ["data", "check", str(card)],
        ["eval", checkpoint, "--data", str(card), "--out", str(tmp_path / "evaluation")],
    ):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "left_demo.hdf5: its bytes changed" in said and "right_demo" not in said
        assert f"vlafit data stats {card} --checksums" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run", "tiny.toml"]
    assert cli.main(["data", "stats", str(card), "--checksums"]) == 0  # where the change is meant
    assert cli.main(["data", "check", str(card), "--no-pixels"]) == 0


def test_the_list_is_of_the_form_that_sha256sum_reads(card: Path) -> None:
    path = card.parent / "dots" / checksums.NAME
    assert subprocess.run(["sha256sum", "--check", "--quiet", path.name], cwd=path.parent).returncode == 0
    store = open_dataset(card)
    assert checksums.list_of(store) == path and len(store.files()) == 2
    path.write_text("".join(f"{line[:64]} *{line[66:]}\n" for line in path.read_text().splitlines()))
    checksums.require_same([store])  # as `sha256sum --binary` writes it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + f"{'0' * 64}  gone_demo.hdf5\n", "gone_demo.hdf5: is missing"),
        (lambda text: text.splitlines(True)[0], "right_demo.hdf5: is new"),
        (lambda text: "f" + text, "line 1: is no checksum and name"),
        (lambda text: "\udcff", "not UTF-8 text"),
    ],
)
def test_a_list_that_differs_or_is_damaged_is_named(
    card: Path, change: Callable[[str], str], message: str
) -> None:
    path = card.parent / "dots" / checksums.NAME
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        checksums.require_same([open_dataset(card)])
    assert str(path) in str(caught.value) and "data stats" in str(caught.value)


def test_a_dataset_of_one_file_has_its_list_beside_it_and_a_remote_one_has_none(tmp_path: Path) -> None:
    card = write_dots(tmp_path / "data", episodes=2, tasks=("left",))
    text = card.read_text().replace('path = "dots"', 'path = "dots/left_demo.hdf5"')
    card.write_text(text)
    store = open_dataset(card)
    assert checksums.write(store).name == f".left_demo.hdf5{checksums.NAME}"
    flip_a_pixel(card)
    with pytest.raises(DataError, match=r"left_demo\.hdf5: its bytes changed"):
        checksums.require_same([store])
    object.__setattr__(store.card, "source", "s3://bucket/dots")
    checksums.require_same([store])
    with pytest.raises(ConfigError, match="s3://bucket/dots: the storage keeps checksums"):
        checksums.write(store)
