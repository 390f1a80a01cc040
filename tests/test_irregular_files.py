"""A folder, pipe, device or dangling link where a file is read is refused: never waited for, never absent."""

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vlafit
from tests.datasets.layouts import demos
from tests.datasets.lerobot_files import write
from tests.train.agreement_world import write_card, write_checkpoint
from vlafit import checkpoints, tuning
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.datasets import load_card, open_dataset
from vlafit.errors import VlafitError
from vlafit.rollout import load_protocol

FIXTURES = Path(__file__).parent / "fixtures"
SMOLVLA, OPENPI = FIXTURES / "lerobot_smolvla", FIXTURES / "openpi_pi0"
KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to": lambda path: path.symlink_to("nowhere"),
}
OTHER_WORDS = {"a folder": ("is a folder, but a",)}
STATE = "policy_preprocessor_step_5_normalizer_processor.safetensors"


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of waiting for a pipe that nobody writes to."""

    def late(*_: object) -> None:
        pytest.fail("it waited for the file")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(path: Path, read: Callable[[], object], kinds: Iterable[str] = KINDS) -> None:
    """Put each kind in the place of `path`; `read` must name the file and the kind, and nothing else."""
    kept = path.with_name(path.name + ".kept")
    path.rename(kept)
    for kind in kinds:
        KINDS[kind](path)
        try:
            with within(20), pytest.raises(VlafitError) as error:
                read()
        finally:
            path.rmdir() if kind == "a folder" else path.unlink()
        words = (f"not a regular file but {kind}", *OTHER_WORDS.get(kind, ()))
        assert any(text in str(error.value) for text in words), str(error.value)
        assert path.name in str(error.value) and "Errno" not in str(error.value)
    kept.rename(path)


@pytest.mark.case(
    section="checkpoints",
    report="hangs without a word, or fills the memory",
    user_has="a pipe, device, folder or dangling link in the place of a file",
    now="refused, naming the file and what lies there",
)
def test_nothing_but_a_regular_file_is_read_in_a_checkpoint(tmp_path: Path):
    lerobot = Path(shutil.copytree(SMOLVLA, tmp_path / "lerobot"))
    names = (
        "config.json",
        "policy_preprocessor.json",
        STATE,
        "model.safetensors",
        "tokenizer/tokenizer.json",
    )
    for name in names:
        refused(lerobot / name, lambda: checkpoints.inspect(lerobot))
        refused(lerobot / name, lambda: checkpoints.declaration(lerobot))
    openpi = Path(shutil.copytree(OPENPI, tmp_path / "openpi"))
    refused(openpi / "assets" / "my_robot" / "norm_stats.json", lambda: checkpoints.inspect(openpi))
    native = write_checkpoint(tmp_path / "native")
    for name in ("manifest.json", "policy.json", "codec.json", "model.safetensors"):
        refused(native / name, lambda: vlafit.load_checkpoint(native))
    one = native / "model.safetensors"
    refused(one, lambda: checkpoints.inspect(one), ["a pipe", "a device"])
    words = lerobot / "tokenizer"
    refused(words / "tokenizer.json", lambda: load_tokenizer(words))
    refused(words / "tokenizer.json", lambda: load_tokenizer(words / "tokenizer.json"), ["a pipe"])


def test_nothing_but_a_regular_file_is_read_in_a_dataset(tmp_path: Path):
    card = write_card(tmp_path / "hdf5")
    files = [kind for kind in KINDS if kind != "a folder"]  # a folder may be a dataset itself
    refused(card, lambda: load_card(card), files)
    refused(card.parent / "joints" / "reach_demo.hdf5", lambda: open_dataset(card))
    lerobot = write(tmp_path / "lerobot", demos(1)[:2], codec="mpeg4")
    folder = tmp_path / "lerobot"
    for pattern in ("meta/info.json", "data/**/*.parquet", "meta/episodes/**/*.parquet", "**/*.mp4"):
        path = next(iter(sorted(folder.glob(pattern))))

        def read() -> None:
            store = open_dataset(lerobot)
            store.state(0)
            store.frames(0, [0])

        refused(path, read)


def test_nothing_but_a_regular_file_is_a_recipe_protocol_or_strategy(tmp_path: Path):
    from vlafit import config
    from vlafit.recipe import Recipe

    for name in ("recipe.toml", "protocol.toml", "strategy.toml"):
        (tmp_path / name).write_text("")
    refused(tmp_path / "protocol.toml", lambda: load_protocol(tmp_path / "protocol.toml"))
    refused(tmp_path / "strategy.toml", lambda: tuning.load_strategy(str(tmp_path / "strategy.toml")))
    refused(tmp_path / "recipe.toml", lambda: config.read(Recipe, tmp_path / "recipe.toml", "recipe"))
