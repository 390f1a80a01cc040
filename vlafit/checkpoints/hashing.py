"""What tells one checkpoint from another, whatever program wrote it: a hash that stands for all of it."""

import hashlib
import json
from pathlib import Path

from vlafit import files
from vlafit.checkpoints import locate as hub

MANIFEST = "manifest.json"
"""Of our own checkpoints: it holds the SHA-256 of every file, so its own stands for them all."""


def digest(path: Path) -> str:
    """Return a SHA-256 that stands for the whole checkpoint at `path`.

    It is the manifest's; where another program wrote the checkpoint, that of its files' names and hashes (see
    `hub.parts_of`).
    """
    if (path / MANIFEST).is_file():
        return files.sha256(path / MANIFEST)
    names = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    found = {name: names[name] for name in hub.parts_of(names)} if path.is_dir() else {".": path}
    listed = {name: files.sha256(p) for name, p in found.items()}
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
