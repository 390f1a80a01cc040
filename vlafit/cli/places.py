"""Resolve checkpoints named on the command line (folders, runs, shipped names, Hub ids), and name outputs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlafit import pointers, shipped
from vlafit.errors import ConfigError, VlafitError

MOST_NAMED = 8  # checkpoints in a message


def checkpoint_folder(text: str, foreign: bool = False) -> Path | str:
    """Return the folder of the checkpoint named by `text`.

    `text` is a checkpoint's folder, a run's folder (meaning its last checkpoint), ``RUN/checkpoints/best`` or
    ``last``, or a shipped name; with `foreign` also any file or folder of another program. A Hub repository
    is downloaded, and its id with the commit is returned. Raises ConfigError for anything else, and
    WeightsError if the Hub does not have it.
    """
    if "://" in text:
        from vlafit.checkpoints import hub

        hub.refuse_address(text)
    path = Path(text)
    if not text:
        raise ConfigError("the checkpoint's name is empty")
    if (path / "policy.json").is_file():
        return path
    checkpoint = pointers.in_run(path)
    if checkpoint is not None:
        return checkpoint
    if len(below := pointers.below(path)) > 0:
        listed = "".join(f"\n  {inner}" for inner in below[:MOST_NAMED])
        more = f"\n  and {len(below) - MOST_NAMED} more" if len(below) > MOST_NAMED else ""
        raise ConfigError(f"{path} is no checkpoint, but holds {len(below)}; name one:{listed}{more}")
    if foreign and path.exists():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{path} holds neither policy.json nor checkpoints/, so it is neither a checkpoint nor a run"
        )
    try:
        return shipped.find("checkpoint", text)
    except ConfigError as error:
        unknown = error
    from vlafit.checkpoints import hub, locate

    if hub.parse(text) is None:
        raise unknown
    return locate.place(text).name


def default_out(checkpoint: Path, protocol: Path, wrong_instruction: bool) -> Path:
    """Return runs/eval/CHECKPOINT/PROTOCOL; a run's checkpoint is named after run and step.

    Evaluations on recorded data have ``data-DATASET`` in the protocol's place.
    """
    parts = checkpoint.resolve().parts[-3:]
    name = f"{parts[0]}_{parts[2]}" if len(parts) == 3 and parts[1] == "checkpoints" else parts[-1]
    ending = "_wrong_instruction" if wrong_instruction else ""
    return Path("runs/eval") / re.sub(r"[^\w.-]", "_", name) / f"{protocol.stem}{ending}"


@contextmanager
def checkpoint_stays(folder: Path) -> Iterator[None]:
    """Name the reason where this block fails because the checkpoint's run deleted it meanwhile."""
    try:
        yield
    except (VlafitError, OSError) as error:
        if deleted_by_run(folder):
            raise gone(folder) from error
        raise


def deleted_by_run(folder: Path) -> bool:
    """Whether `folder` was a checkpoint of a run and is no more."""
    return folder.parent.name == "checkpoints" and folder.parent.is_dir() and not folder.exists()


def gone(folder: Path) -> ConfigError:
    """Return the error for a checkpoint that its run deleted while it was read."""
    return ConfigError(
        f"{folder}: its run deleted this checkpoint while it was read (train.keep says how many stay): name "
        f"{folder.parent}/best or last, wait for the end of the run, or copy the checkpoint first"
    )


def base_folder(text: str) -> Path | str:
    """Return the folder of the checkpoint that ``--base`` names; an error names the option."""
    try:
        return checkpoint_folder(text, foreign=True)
    except ConfigError as error:
        raise ConfigError(f"--base: {error}") from error
