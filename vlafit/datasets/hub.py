"""Datasets of the Hugging Face Hub: ``org/name``, ``org/name@revision``, or ``hf://datasets/org/name``.

A commit is looked up first and its files are copied into huggingface_hub's cache, whose folder names the
commit. The list of what was copied is kept, so that a copy is known to be whole where there is no network.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlafit.datasets.downloads import (
    FinalError,
    Needed,
    T,
    UnreachableError,
    announce,
    attempts,
    reason,
    require_inside,
)
from vlafit.datasets.hdf5_index import folder
from vlafit.datasets.listing import Listing
from vlafit.datasets.storage import RemoteFile
from vlafit.datasets.web_files import HttpFiles
from vlafit.errors import DataError, VlafitError
from vlafit.files import parse_json, plain_text, write_atomic

log = logging.getLogger(__name__)

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES = (".toml", ".hdf5", ".h5", ".parquet")
AT_ONCE = 8  # files
AGAIN = (408, 425, 429)  # answers after which a request is sent again, beside those of a server's failure
NO_ROUTE = ("ConnectError", "ConnectTimeout")  # of the client, httpx or httpx2: there is no network


class AnsweredError(FinalError):
    """The Hub has answered that it does not give this."""


class OfflineError(FinalError):
    """There is no connection to the Hub."""


def is_id(text: str) -> bool:
    """Whether `text` is written like an id, and not like a file."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILES) and ".." not in text


def fetch_id(text: str) -> Path:
    """Return the local copy of the dataset that an id names; see `fetch`."""
    match = _ID.fullmatch(text)
    assert match is not None
    return fetch(match["repo"], match["revision"] or "")


def url_of(text: str) -> str:
    """Return the URL of the dataset that an id names. A revision may have slashes: refs/pr/1."""
    repo, at, revision = text.partition("@")
    return f"hf://datasets/{repo}{at}{revision.replace('/', '%2F')}"


def at_commit(url: str, local: Path) -> str:
    """Return a URL of the Hub that names no revision with the commit of the files in `local`."""
    parts = url.split("/")  # hf:, "", datasets, org, name, folders below
    if parts[0] != "hf:" or "@" in parts[4] or "snapshots" not in local.parts:
        return url
    commit = local.parts[local.parts.index("snapshots") + 1]
    return "/".join([*parts[:4], f"{parts[4]}@{commit}", *parts[5:]])


def fetch(repo: str, revision: str, below: str = "", needed: Needed | None = None) -> Path:
    """Return a folder with the files of a dataset (`below` a folder of it): all, or those `needed`.

    Without a revision it is the default branch: LeRobot's own version tags are often missing or stale. Where
    the Hub cannot be reached, the copy in the cache is used, if it is whole. Raises DataError if the Hub has
    no such dataset, or a file of it is missing.
    """
    where = f"{repo}@{revision}" if revision else repo
    try:
        commit, listed = _listed(repo, revision, where)
    except (UnreachableError, OfflineError) as error:
        return _kept(repo, revision, where, error) / below
    inside = f"{below}/" if below else ""
    names = {name.removeprefix(inside) for name in listed if name.startswith(inside)}
    if not names:
        raise DataError(f"{where}: the dataset has no files in {below or 'its folder'}")
    if needed is not None:

        def copy(some: Collection[str]) -> Path:
            return _copy(repo, commit, {inside + name: listed[inside + name] for name in some}, where) / below

        names = set(needed.names(names, copy, where, inside))
    wanted = {name: size for name, size in listed.items() if name.removeprefix(inside) in names}
    root = _copy(repo, commit, wanted, where)
    _keep(repo, revision, commit, wanted, whole=len(wanted) == len(listed))
    return root / below


def listing(repo: str, revision: str, below: str) -> Listing:
    """Return the files of a dataset, or of a folder of it, to be read in place.

    Raises UnreachableError without a network, DataError if the Hub has no such dataset.
    """
    from huggingface_hub import hf_hub_url

    where = f"{repo}@{revision}" if revision else repo
    try:
        commit, listed = _listed(repo, revision, where)
    except OfflineError as error:
        raise UnreachableError(str(error)) from error
    inside = f"{below}/" if below else ""
    files = {
        name.removeprefix(inside): RemoteFile(
            hf_hub_url(repo, name, repo_type="dataset", revision=commit), size or 0, commit, ""
        )
        for name, size in listed.items()
        if name.startswith(inside)
    }
    url = f"hf://datasets/{repo}@{commit}" + (f"/{below}" if below else "")
    return Listing(url, files, connect, pinned=True)


def connect() -> HttpFiles:
    """Return access to the Hub's files, with the token of its own client if there is one."""
    from huggingface_hub.utils import build_hf_headers

    return HttpFiles(build_hf_headers())


def _listed(repo: str, revision: str, where: str) -> tuple[str, Mapping[str, int | None]]:
    """Return the commit that a revision names now, and its files with their sizes.

    Raises UnreachableError or OfflineError without an answer, DataError if there is no such dataset.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        try:
            return HfApi().dataset_info(repo, revision=revision or None, files_metadata=True)
        except Exception as error:
            if type(error).__name__ in NO_ROUTE:
                raise OfflineError(f"{where}: the Hub cannot be reached ({reason(error)})") from error
            raise

    try:
        info = _ask(where, ask, "Run the command again")
    except AnsweredError as error:
        raise _no_such(where, repo, error.__cause__ or error) from error
    files = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    for name in files:
        require_inside(name, repo)
    return info.sha or "", files


def _ask(where: str, read: Callable[[], T], fix: str) -> T:
    """Return what a call of huggingface_hub does; see `attempts`.

    Raises AnsweredError for a refusal and OfflineError in its offline mode: neither is tried again.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def call() -> T:
        try:
            return read()
        except LocalEntryNotFoundError as error:  # the file is not in the cache, and the Hub did not answer
            raise ConnectionError(reason(error.__cause__ or error)) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status >= 500 or status in AGAIN:
                raise
            raise AnsweredError(f"{where}: could not be read: {reason(error)}. {fix}") from error
        except OfflineModeIsEnabled as error:
            raise OfflineError(f"{where}: the Hub cannot be reached ({reason(error)})") from error

    return attempts(where, call, fix)


def _copy(repo: str, commit: str, files: Mapping[str, int | None], where: str) -> Path:
    """Return the cache's folder of a commit, once it has all `files` with the sizes of the list."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    paths = {name: try_to_load_from_cache(repo, name, revision=commit, repo_type="dataset") for name in files}
    missing = [name for name, path in paths.items() if not isinstance(path, str)]
    sizes = {name: size or 0 for name, size in files.items()}
    cache = Path(constants.HF_HUB_CACHE)
    announce(
        where, len(files), sum(sizes.values()), len(missing), sum(sizes[name] for name in missing), cache
    )

    def download(name: str) -> str:
        def read() -> str:
            return hf_hub_download(repo, name, revision=commit, repo_type="dataset")

        fix = "Run the command again: files that are complete are not copied again"
        return _ask(f"{where}: {name}", read, fix)

    if missing:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            paths |= dict(zip(missing, pool.map(download, missing), strict=True))
    for name, path in paths.items():
        size = Path(str(path)).stat().st_size if Path(str(path)).is_file() else -1
        if size < 0 or files[name] not in (None, size):
            raise DataError(
                f"{path}: has {size:,} bytes, the Hub lists {files[name]} for {name} of {where}; delete it "
                "and run the command again"
            )
    name, path = next(iter(paths.items()))
    return Path(*Path(str(path)).parts[: -len(Path(name).parts)])


def _record(repo: str) -> Path | None:
    """Return the file that says which commit each revision was, and which of its files are in the cache."""
    place = folder()
    return None if place is None else place.with_name("hub") / f"{repo.replace('/', '--')}.json"


def _keep(repo: str, revision: str, commit: str, sizes: Mapping[str, int | None], *, whole: bool) -> None:
    """Record that these files of a commit are in the cache, and whether they are all that it has."""
    path, before = _record(repo), _recorded(repo)
    if path is None:
        return
    known = before["commits"].get(commit, {"whole": False, "sizes": {}})
    entry = {"whole": whole or known["whole"], "sizes": {**known["sizes"], **sizes}}
    after = {
        "revisions": {**before["revisions"], revision: commit},
        "commits": {**before["commits"], commit: entry},
    }
    try:
        if after != before:
            write_atomic(path, json.dumps(after))
    except VlafitError as error:  # only matters without a network
        log.warning("the list of %s's files cannot be kept (%s)", repo, error)


def _recorded(repo: str) -> dict[str, Any]:
    path = _record(repo)
    try:
        values = parse_json(plain_text(path)) if path is not None else None
    except (OSError, ValueError):
        values = None
    return values if isinstance(values, dict) else {"revisions": {}, "commits": {}}


def _kept(repo: str, revision: str, where: str, cause: Exception) -> Path:
    """Return the copy in the cache, if it has every file. Raises DataError naming what is not known of it."""
    from huggingface_hub import snapshot_download

    recorded = _recorded(repo)
    commit = recorded["revisions"].get(revision, revision) or None
    try:
        kept = snapshot_download(repo, revision=commit, repo_type="dataset", local_files_only=True)
    except Exception as error:
        raise _no_such(where, repo, cause.__cause__ or cause) from error
    root, unreachable = Path(kept), f"{where}: the Hub cannot be reached ({reason(cause.__cause__ or cause)})"
    known = recorded["commits"].get(root.name, {"whole": False, "sizes": {}})
    sizes: Mapping[str, int | None] = known["sizes"]
    bad = [
        n for n, s in sizes.items() if not (root / n).is_file() or s not in (None, (root / n).stat().st_size)
    ]
    if bad:
        raise DataError(
            f"{unreachable}, and {len(bad)} files of the copy at {root} are missing or damaged, for example "
            f"{bad[0]}; run the command again with a network"
        )
    if not known["whole"] and not (root / "meta" / "info.json").is_file():  # LeRobot's names its files
        raise DataError(
            f"{unreachable}, and nothing tells whether the copy at {root} is whole; run the command again "
            "with a network, or, if you know that it is, name that folder"
        )
    log.warning("%s; reading the copy at %s", unreachable, root)
    return root


def _no_such(where: str, repo: str, error: BaseException) -> DataError:
    from huggingface_hub import constants

    return DataError(
        f"{where}: no such path exists here, no card of that name ships, and as a dataset of the Hugging "
        f"Face Hub ({constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}) it cannot be had: "
        f"{reason(error)}. Use the path of a local folder, or, with a network: "
        f"hf download --repo-type dataset {repo}"
    )
