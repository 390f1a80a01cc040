"""Where things are that the command line names: checkpoints, and the runs that hold them."""

import json
from pathlib import Path

from vlafit import shipped
from vlafit.errors import ConfigError


def checkpoint_folder(text: str, foreign: bool = False) -> Path | str:
    """Return the checkpoint's folder for what a user may call it.

    That is a checkpoint's folder, a run's folder (its last checkpoint), ``RUN/checkpoints/best`` or ``last``,
    or the name of one that ships; with `foreign` also any folder or file of another program, to be judged by
    its contents. What is on the Hub is downloaded, and its id returned with the commit. Raises ConfigError
    when it is none of these, and WeightsError where the Hub has none.
    """
    path = Path(text)
    if not text:
        raise ConfigError("the checkpoint's name is empty")
    if (path / "policy.json").is_file():
        return path
    for pointer in (path / "checkpoints" / "last.json", path.parent / f"{path.name}.json"):
        if pointer.is_file() and pointer.parent.name == "checkpoints":
            return _follow(pointer)
    if foreign and path.exists():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{path} holds no policy.json and no checkpoints/: it is neither a checkpoint nor a run"
        )
    try:
        return shipped.find("checkpoint", text)
    except ConfigError:
        from vlafit.checkpoints import hub, locate

        if hub.parse(text) is None:
            raise
        return locate.place(text).name


def _follow(pointer: Path) -> Path:
    try:
        folder = pointer.parent / json.loads(pointer.read_text(encoding="utf-8"))["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{pointer}: damaged ({error!r}); name the checkpoint's own folder") from error
    if not (folder / "policy.json").is_file():
        raise ConfigError(f"{pointer} points to {folder}, which is no checkpoint; name another one")
    return folder
