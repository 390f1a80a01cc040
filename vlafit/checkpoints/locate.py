"""Where a checkpoint lies: a path, the name of one that ships, or an id of the Hugging Face Hub.

Every verb asks `place`. An id is ``org/name`` or ``org/name@revision``; only a string that is no path here
can be one. `huggingface_hub` downloads what is not in its cache (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and
logins are its own affair), and of a repository only the files that are read here. What is wholly in the cache
is used without asking the Hub: a branch stays where it was, until ``hf download`` moves it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from vlafit import shipped
from vlafit.errors import ConfigError, WeightsError

READ = ("*.safetensors", "*.json", "*.toml", "tokenizer/*", "params/*", "*/params/*")
"""Files of a checkpoint of any form that we read; `*` goes over folders, too."""
LEFT = (".*", "train_state/*", "*/train_state/*", "training_state/*", "*/training_state/*", "checkpoints/*")
"""Those among them that are no part of it: a trainer's state, checkpoints of earlier steps."""

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES = (".safetensors", ".json", ".toml", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Place:
    """A checkpoint that is there."""

    path: Path
    name: str
    """What finds it again from any folder: an absolute path, a shipped one's name, or ``org/name@commit``."""
    note: str = ""
    """What a load report says of where it comes from."""


def place(said: str | Path) -> Place:
    """Return where the checkpoint `said` lies, downloaded if it is on the Hub alone.

    A path that exists comes first, then one that ships, then the Hub (for a string, never for a Path). Raises
    ConfigError where it can be none of them, and WeightsError where the Hub has it not or cannot be asked.
    """
    local = Path(said).expanduser()
    if local.exists() and str(said):
        return Place(local, str(local.resolve()))
    try:
        return Place(shipped.find("checkpoint", said), str(said))
    except ConfigError:
        if not isinstance(said, str) or parse(said) is None:
            raise
    return _on_hub(said)


def parse(said: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision of what is written like an id; None for anything else."""
    found = _ID.fullmatch(said)
    if found is None or said.endswith(_FILES) or ".." in said or "--" in said:
        return None
    return found["repo"], found["revision"]


def is_read(name: str) -> bool:
    """Whether the file `name`, relative to its checkpoint, can be part of it."""
    return _matches(name, READ) and not _matches(name, LEFT)


def parts_of(names: Collection[str]) -> list[str]:
    """Return those of a foreign checkpoint's files that make it what it is, sorted.

    A text beside the weights, and another program's download of it, change nothing. Where nothing among the
    files is known to hold weights, all count.
    """
    read = sorted(name for name in names if is_read(name))
    whole = any(name.endswith(".safetensors") or "params" in PurePosixPath(name).parts for name in read)
    return read if whole else sorted(names)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _on_hub(said: str) -> Place:
    parsed = parse(said)
    assert parsed is not None
    repo, revision = parsed
    from huggingface_hub import constants, errors

    tried = (
        f"{said}: there is no such path here, and none so called ships; asked as a repository of the Hugging "
        f"Face Hub ({constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}): "
    )
    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    mend = f". Give the path of a local folder, or, where there is a network: {fetch}"
    try:
        folder = _cached(repo, revision) or _download(repo, revision)
    except errors.GatedRepoError as error:
        why = f"it is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in (hf auth login)"
        raise WeightsError(tried + why + mend) from error
    except errors.RepositoryNotFoundError as error:
        why = "there is none, or it is private and you are not logged in (hf auth login)"
        raise WeightsError(f"{tried}{why}. Give the right id, or the path of a local folder") from error
    except errors.RevisionNotFoundError as error:
        why = f"it has no revision {revision or constants.DEFAULT_REVISION!r}"
        raise WeightsError(f"{tried}{why}. Name a branch, tag or commit of it: {repo}@...") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise WeightsError(f"{tried}it is not wholly in the cache, and {offline}{mend}") from error
    except Exception as error:  # the clients that huggingface_hub is built on have errors of their own
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{tried}{type(error).__name__}: {reason}{mend}") from error
    if not folder.is_dir():
        raise WeightsError(f"{tried}it holds no file of a checkpoint ({', '.join(READ)})")
    pinned = f"{repo}@{folder.name}"
    return Place(folder, pinned, f"{repo} of the Hugging Face Hub, {_revision(revision)}commit {folder.name}")


def _revision(said: str | None) -> str:
    from huggingface_hub import constants

    return "" if said and re.fullmatch(r"[0-9a-f]{40}", said) else f"{said or constants.DEFAULT_REVISION} at "


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot in the cache, if its listing, which lies there too, says that it is whole."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(READ),
            ignore_patterns=list(LEFT),
            local_files_only=True,
        )
    except errors.LocalEntryNotFoundError:
        return None
    folder = Path(found)
    return folder if (folder.parents[1] / "trees" / f"{folder.name}.json").is_file() else None


def _download(repo: str, revision: str | None) -> Path:
    """Download what the cache lacks. Where the Hub cannot be asked the cache must do."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=list(READ), ignore_patterns=list(LEFT))
    )
