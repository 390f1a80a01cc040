"""Datasets of the Hugging Face Hub: ``org/name`` or ``org/name@revision``."""

import re
from pathlib import Path

from vlafit.errors import DataError

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES = (".toml", ".hdf5", ".h5", ".parquet")


def is_id(text: str) -> bool:
    """Whether `text` is written like an id, and not like a file."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILES) and ".." not in text


def fetch(text: str) -> Path:
    """Return the local copy of a dataset, downloaded if the cache lacks it; its folder names the commit.

    A tag or branch that is not given is the default branch: LeRobot's own version tags are often missing or
    stale. Raises DataError if the Hub has no such dataset or cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download

    match = _ID.fullmatch(text)
    assert match is not None
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], repo_type="dataset"))
    except Exception as error:  # the clients that huggingface_hub is built on have errors of their own
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{text}: no such path exists here, no card of that name ships, and as a dataset of the Hugging "
            f"Face Hub ({constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}) it cannot be had: "
            f"{type(error).__name__}: {reason}. Use the path of a local folder, or, with a network: "
            f"hf download --repo-type dataset {match['repo']}"
        ) from error
