"""Read files of a web server by their addresses: size and version, a whole file, a range of bytes."""

import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from vlafit.datasets.downloads import FinalError

TIMEOUT_S = 60.0  # without a byte
GONE, REFUSED, EMPTY = (404, 410), (401, 403, 407), 416


class NoRangesError(FinalError):
    """A server that only sends whole files."""


class _SameProtection(urllib.request.HTTPRedirectHandler):
    """Follow no redirection from https:// to an address without encryption."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise PermissionError(f"{req.full_url} redirects to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class HttpFiles:
    """The methods of an fsspec file system that are needed, for paths that are addresses."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        """`headers` are sent to the addresses, and to no other that they redirect to."""
        self._headers = dict(headers or {})

    def info(self, path: str) -> dict[str, Any]:
        """Return the size and the ETag or date of a file, as fsspec's `info` does."""
        with self._get(path, "bytes=0-0") as answer:
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            return {"name": path, "type": "file", "size": _size(answer), "ETag": version}

    def info_or_none(self, path: str) -> dict[str, Any] | None:
        """Return what `info` does, or None if there is no such file."""
        try:
            return self.info(path)
        except FileNotFoundError:
            return None

    def get_file(self, path: str, target: str) -> None:
        """Copy a file."""
        with self._get(path) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise ConnectionError(f"the connection ended after {file.tell():,} of {expected} bytes")

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`. Raises NoRangesError if the server sends whole files."""
        with self._get(path, f"bytes={start}-{end - 1}") as answer:
            if answer.status == 206:
                return answer.read()
            if start == 0 and answer.headers.get("Content-Length") == str(end):
                return answer.read()
        raise NoRangesError(f"{path}: the server sends no ranges of bytes")

    def _get(self, path: str, some: str = "") -> http.client.HTTPResponse | urllib.error.HTTPError:
        request = urllib.request.Request(path, headers={"Accept-Encoding": "identity"})
        if some:
            request.add_header("Range", some)
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)
        try:
            return _opener().open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code == EMPTY:  # a file without a first byte
                return error
            error.close()
            if error.code in GONE:
                raise FileNotFoundError(f"{error.code} {error.reason}") from error
            if error.code in REFUSED:
                raise PermissionError(f"{error.code} {error.reason}") from error
            raise ConnectionError(f"{error.code} {error.reason}") from error


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Return what opens addresses; making one reads the certificates of this machine."""
    return urllib.request.build_opener(_SameProtection)


def _size(answer: http.client.HTTPResponse | urllib.error.HTTPError) -> int | None:
    """Return the size of a whole file, of an answer with its first byte, or with all of it."""
    if answer.status in (206, EMPTY):
        whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return int(whole) if whole.isdecimal() else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None
