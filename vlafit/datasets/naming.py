"""The name of a dataset that has no card: that of its folder, its file or its repository on the Hub."""

import re
from pathlib import Path, PurePosixPath

HUB_URL = re.compile(r"hf://datasets/[^/@]+/(?P<name>[^/@]+)(?:@[^/]+)?(?:/(?P<below>.+))?", re.IGNORECASE)
CACHED = re.compile(r"datasets--(?:.+--)?(?P<name>.+)")  # of datasets--ORG--NAME/snapshots/COMMIT
DATA_FILES = (".hdf5", ".h5")


def name_of(place: str | Path) -> str:
    """Return the name of the dataset at a path of this machine (Path), or at a URL or id of the Hub (str).

    A revision is no part of it. So a copy in the Hub's cache, whose folder is called by its commit, has the
    name of its repository.
    """
    if isinstance(place, Path):
        path = place.resolve()
        cached = CACHED.fullmatch(path.parent.parent.name) if path.parent.name == "snapshots" else None
        if cached is not None:
            return cached["name"]
        return path.stem if path.is_file() else path.name
    text = place.rstrip("/")
    at_hub = HUB_URL.fullmatch(text)
    if at_hub is not None:
        text = at_hub["below"] or at_hub["name"]
    elif "://" not in text:
        text = text.partition("@")[0]  # a revision may have slashes
    last = PurePosixPath(text).name
    return PurePosixPath(last).stem if last.lower().endswith(DATA_FILES) else last
