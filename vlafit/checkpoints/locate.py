"""Find a checkpoint by the name that a user gives it, and tell one checkpoint from another by a hash."""

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vlafit import arguments, files, pointers, shipped
from vlafit.checkpoints import hub
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.native.adapters import Base, read_base
from vlafit.checkpoints.formats.native.read import MANIFEST
from vlafit.checkpoints.hub import Place
from vlafit.errors import ConfigError, brief, quoted


def place(reference: str | Path) -> Place:
    """Return where the checkpoint `reference` lies, downloaded if it is only on the Hub; see `hub.place`.

    The folder of a run means its last checkpoint.
    """
    hub.refuse_address(str(arguments.path("checkpoint", reference)))
    try:
        return _place(reference)
    except OSError as error:  # a name that is too long, or a loop of links
        problem = error.strerror or brief(error)
        raise ConfigError(f"checkpoint {quoted(str(reference))}: cannot be looked for: {problem}") from None


def _place(reference: str | Path) -> Place:
    inside = pointers.in_run(files.expand_user(reference)) if str(reference) else None
    if inside is not None:
        return hub.place(inside, ())
    if files.expand_user(reference).exists() and str(reference):
        return hub.place(reference, ())
    with suppress(ConfigError):
        shipped.find("checkpoint", reference)
        return hub.place(reference, ())
    return hub.place(reference, registry.download_patterns())


def lasting_base(folder: Path, moved: str | Path | None = None) -> Base | None:
    """Return the base of the native checkpoint `folder`, with a name that finds it from any folder.

    `moved` is where it lies now. None where the checkpoint holds every weight itself.
    """
    base = read_base(folder)
    if base is None:
        return None
    reference = base.checkpoint if moved is None else str(moved)
    if moved is None and reference.startswith("."):
        reference = str(folder.resolve() / reference)
    return replace(base, checkpoint=place(reference).name)


def digest(path: Path) -> str:
    """Return a SHA-256 that stands for the whole checkpoint at `path`.

    It is the manifest's, which holds the SHA-256 of every file; where another program wrote the checkpoint,
    that of its files' names and hashes. A text beside the weights, and another program's download, change
    nothing. Where no file is known to hold weights, all count.
    """
    if (path / MANIFEST).is_file():
        return files.sha256(path / MANIFEST)
    names = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    parts = {name: names[name] for name in parts_of(sorted(names))} if path.is_dir() else {".": path}
    hashes = {name: files.sha256(p) for name, p in parts.items()}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def parts_of(names: list[str]) -> list[str]:
    """Return those of a foreign checkpoint's files that make up its hash, sorted."""
    patterns = registry.hash_patterns()
    parts = sorted(name for name in names if hub.is_part(name, patterns))
    whole = any(name.endswith(".safetensors") or "params" in PurePosixPath(name).parts for name in parts)
    return parts if whole else sorted(names)
