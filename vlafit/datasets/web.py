"""LeRobot datasets of a web server, whose files are those that their metadata names."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

from vlafit.datasets.downloads import UnreachableError, attempts
from vlafit.datasets.listing import INFO, Listing
from vlafit.datasets.storage import RemoteFile, version_of
from vlafit.datasets.web_files import HttpFiles
from vlafit.errors import DataError
from vlafit.files import parse_json

AT_ONCE = 32  # requests for sizes
FIX = "Check the address"
OTHERS = ("tasks.parquet", "tasks.jsonl", "episodes.jsonl", "stats.json", "episodes_stats.jsonl")
EPISODES = "meta/episodes/chunk-{chunk:03d}/file-{file:03d}.parquet"


def listing(url: str) -> Listing:
    """Return the metadata of the dataset at `url`; other files are looked up when their names are known.

    It has no files if there is no meta/info.json. Raises UnreachableError if the server does not answer.
    """
    look_up = partial(_look_up, url)
    files = dict(look_up([INFO, *(f"meta/{name}" for name in OTHERS)]))
    if INFO in files:
        files |= _episodes(url, _chunks_size(_read(files[INFO])))
    return Listing(url, files if INFO in files else {}, HttpFiles, look_up)


def _read(file: RemoteFile) -> bytes:
    return attempts(file.path, lambda: HttpFiles().cat_file(file.path, 0, file.size), FIX)


def _chunks_size(info: bytes) -> int:
    """Return how many files a folder of LeRobot v3.0 has at most; what is invalid is said once it is read."""
    try:
        size = parse_json(info).get("chunks_size", 1000)
    except (ValueError, AttributeError):
        return 1
    return size if isinstance(size, int) and size > 0 else 1


def _episodes(url: str, size: int) -> dict[str, RemoteFile]:
    """Return the files of meta/episodes, which are numbered without gaps, `size` in a folder."""
    found: dict[str, RemoteFile] = {}
    count = 1  # most datasets have one
    while True:
        numbers = range(len(found), len(found) + count)
        names = [EPISODES.format(chunk=number // size, file=number % size) for number in numbers]
        files = _look_up(url, names)
        for name in names:
            if name not in files:
                return found
            found[name] = files[name]
        count = AT_ONCE


def _look_up(url: str, names: Collection[str]) -> Mapping[str, RemoteFile]:
    """Return size and version of those of the files `names` that exist."""
    client = HttpFiles()

    def find(name: str) -> RemoteFile | None:
        path = f"{url}/{quote(name)}"
        try:
            info = attempts(path, lambda: client.info_or_none(path), FIX)
        except DataError as error:
            raise UnreachableError(str(error)) from error
        if info is None:
            return None
        if info["size"] is None or not version_of(info):
            lacking = "size" if info["size"] is None else "ETag or Last-Modified"
            raise DataError(
                f"{path}: the server tells no {lacking} of the file, so that a copy could not be checked; "
                "copy the files to a folder and name it"
            )
        return RemoteFile(path, info["size"], version_of(info), "")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(names, pool.map(find, names), strict=True))
    return {name: file for name, file in found.items() if file is not None}
