"""Find a checkpoint by a path, the name of one that ships, or an id of the Hugging Face Hub.

An id is ``org/name`` or ``org/name@revision``; only a string that is no path here can be one.
`huggingface_hub` downloads what is not in its cache (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and logins are its
own affair), and of a repository only the files that some format reads. What is wholly in the cache is used
without asking the Hub: a branch stays where it was, until ``hf download`` moves it. See
`vlafit.checkpoints.locate` for the patterns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from vlafit import shipped
from vlafit.errors import ConfigError, WeightsError
from vlafit.files import expand_user

IGNORED = (
    ".*",
    "train_state/*",
    "*/train_state/*",
    "training_state/*",
    "*/training_state/*",
    "checkpoints/*",
)
"""Files that are no part of a checkpoint, whatever matches: a trainer's state, checkpoints of earlier
steps.
"""

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES = (".safetensors", ".json", ".toml", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies."""

    path: Path
    name: str
    """It finds the checkpoint again from any folder: an absolute path, a shipped one's name, or
    ``org/name@commit``.
    """
    note: str = ""
    """Where it comes from, for the load report."""


def place(reference: str | Path, patterns: Sequence[str]) -> Place:
    """Return where the checkpoint `reference` lies; download the files that match `patterns` if need be.

    A path that exists comes first, then one that ships, then the Hub (for a string, never for a Path). Raises
    ConfigError where it can be none of them, and WeightsError where the Hub does not have it or cannot be
    asked.
    """
    local = expand_user(reference)
    if local.exists() and str(reference):
        return Place(local, str(local.resolve()))
    try:
        return Place(shipped.find("checkpoint", reference), str(reference))
    except ConfigError as error:
        unknown = error
    if not isinstance(reference, str) or parse(reference) is None:
        raise unknown
    return _on_hub(reference, patterns)


def refuse_address(reference: str) -> None:
    """Raise WeightsError for an address such as gs:// or https://, and tell how to get its files."""
    scheme, mark, rest = reference.partition("://")
    if not mark or scheme not in ("gs", "s3", "http", "https", "hf"):
        return
    kind = r"(datasets/|spaces/|models/)?"
    match = re.match(
        rf"(?:https?://(?:www\.)?(?:huggingface|hf)\.co/|hf://){kind}([\w.-]+/[\w.-]+)", reference
    )
    if match and match[1] == "datasets/":
        raise WeightsError(
            f"{reference}: a dataset of the Hub, and no checkpoint; a recipe names it: "
            f'data.cards = ["{match[2]}"]'
        )
    if match and match[1] != "spaces/":
        revision = re.search(r"/(?:tree|resolve|blob)/([\w.-]+)", rest)
        name = match[2] + (f"@{revision[1]}" if revision and revision[1] != "main" else "")
        raise WeightsError(f"{reference}: name the repository of the Hub by its id: {name}")
    folder = rest.rstrip("/").rpartition("/")[2] or "checkpoint"
    way = {
        "gs": f"gcloud storage cp -r {reference.rstrip('/')} . (or, in openpi's environment, "
        f"openpi.shared.download.maybe_download({reference!r}))",
        "s3": f"aws s3 cp --recursive {reference} {folder}",
    }.get(scheme, f"download its files into a folder {folder}")
    raise WeightsError(
        f"{reference}: vlafit opens local folders and ids of the Hub. Get it: {way}; then name the folder"
    )


def parse(reference: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision of what is written like an id; None for anything else."""
    match = _ID.fullmatch(reference)
    if match is None or reference.endswith(_FILES) or ".." in reference or "--" in reference:
        return None
    return match["repo"], match["revision"]


def is_part(name: str, patterns: Sequence[str]) -> bool:
    """Whether the file `name`, relative to its checkpoint, matches and can be part of it."""
    return _matches(name, patterns) and not _matches(name, IGNORED)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _on_hub(reference: str, patterns: Sequence[str]) -> Place:
    parsed = parse(reference)
    assert parsed is not None
    repo, revision = parsed
    from huggingface_hub import constants, errors

    tried = (
        f"{reference}: there is no such path here, and no shipped checkpoint of that name; asked as a "
        "repository of the Hugging "
        f"Face Hub ({constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}): "
    )
    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    fix = f". Give the path of a local folder, or, where there is a network: {fetch}"
    try:
        folder = _cached(repo, revision, patterns) or _download(repo, revision, patterns)
    except errors.GatedRepoError as error:
        why = f"it is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in (hf auth login)"
        raise WeightsError(tried + why + fix) from error
    except errors.RepositoryNotFoundError as error:
        why = "there is none, or it is private and you are not logged in (hf auth login)"
        raise WeightsError(f"{tried}{why}. Give the right id, or the path of a local folder") from error
    except errors.RevisionNotFoundError as error:
        why = f"it has no revision {revision or constants.DEFAULT_REVISION!r}"
        raise WeightsError(f"{tried}{why}. Name a branch, tag or commit of it: {repo}@...") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise WeightsError(f"{tried}it is not wholly in the cache, and {offline}{fix}") from error
    except Exception as error:  # the clients that huggingface_hub is built on have errors of their own
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{tried}{type(error).__name__}: {reason}{fix}") from error
    if not folder.is_dir():
        raise WeightsError(f"{tried}it holds no file of a checkpoint ({', '.join(patterns)})")
    pinned = f"{repo}@{folder.name}"
    return Place(folder, pinned, f"{repo} of the Hugging Face Hub, {_revision(revision)}commit {folder.name}")


def _revision(name: str | None) -> str:
    from huggingface_hub import constants

    return "" if name and re.fullmatch(r"[0-9a-f]{40}", name) else f"{name or constants.DEFAULT_REVISION} at "


def _cached(repo: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """Return the snapshot in the cache, if its listing, which lies there too, says that it is whole."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORED),
            local_files_only=True,
        )
    except errors.LocalEntryNotFoundError:
        return None
    folder = Path(snapshot)
    return folder if (folder.parents[1] / "trees" / f"{folder.name}.json").is_file() else None


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download what the cache lacks. Where the Hub cannot be asked the cache must do."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(IGNORED)
        )
    )
