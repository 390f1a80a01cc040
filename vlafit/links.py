"""Where a file lies once symbolic links are followed."""

from pathlib import Path


def is_inside(folder: Path, file: Path) -> bool:
    """Whether a file lies in `folder` once links are followed.

    A download of the Hub (models--ORG--NAME/snapshots/REVISION, and datasets--ORG--NAME) consists of links to
    the blobs of its own repository, which count as inside.
    """
    path, own = file.resolve(), folder.resolve()
    caches = [one for one in own.parents if one.name.startswith(("models--", "datasets--"))]
    blobs = [one / "blobs" for one in caches if (one / "snapshots") in own.parents]
    return any(path.is_relative_to(one) for one in (own, *blobs))
