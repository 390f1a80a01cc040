"""Resolve checkpoints named on the command line (folders, runs, shipped names, Hub ids), and name outputs."""

import re
from pathlib import Path

from vlafit import pointers, shipped
from vlafit.errors import ConfigError


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
    if foreign and path.exists():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{path} holds neither policy.json nor checkpoints/, so it is neither a checkpoint nor a run"
        )
    try:
        return shipped.find("checkpoint", text)
    except ConfigError:
        from vlafit.checkpoints import hub, locate

        if hub.parse(text) is None:
            raise
        return locate.place(text).name


def default_out(checkpoint: Path, protocol: Path, wrong_instruction: bool) -> Path:
    """Return runs/eval/CHECKPOINT/PROTOCOL; a run's checkpoint is named after run and step.

    Evaluations on recorded data have ``data-DATASET`` in the protocol's place.
    """
    parts = checkpoint.resolve().parts[-3:]
    name = f"{parts[0]}_{parts[2]}" if len(parts) == 3 and parts[1] == "checkpoints" else parts[-1]
    ending = "_wrong_instruction" if wrong_instruction else ""
    return Path("runs/eval") / re.sub(r"[^\w.-]", "_", name) / f"{protocol.stem}{ending}"
