"""A web server of this process whose files can be read by ranges, and that fails in the ways of a network."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Server:
    """What the server has, what it was asked for, and what goes wrong."""

    files: dict[str, bytes]
    address: str = ""
    read: list[tuple[str, int]] = field(default_factory=list)
    """Name and bytes of every answer with content, in the order of the requests."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Name -> what happens when its content is read: "drop", "503", "forbidden", "hang", one a time."""
    first: str = ""
    """What happens at the first request for each name and range, of any kind."""
    asked: set[tuple[str, str]] = field(default_factory=set)
    ranges: bool = True
    tokens: set[str] = field(default_factory=set)
    """What requests were authorised by."""
    lock: Lock = field(default_factory=Lock)

    def names(self) -> list[str]:
        """Return the names that were read, without the requests for the size of a file."""
        return [name for name, size in self.read if size > 1]

    def fault(self, name: str, size: int, some: str) -> str:
        with self.lock:
            if self.first and (name, some) not in self.asked:
                self.asked.add((name, some))
                return self.first
            if size <= 1:  # a request for the size of a file
                return ""
            return self.faults[name].pop(0) if self.faults.get(name) else ""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait; one more would be tried again after a second


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """Serve files at ``ADDRESS/NAME``, and to a client of S3 as those of the bucket ``bucket``."""
    server = Server(files)
    http = _Listener(("127.0.0.1", 0), _handler(server))
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by their names in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            server.tokens.add(self.headers.get("Authorization", ""))
            query = parse_qs(url.query)
            if "list-type" in query:
                self.answer(200, _listed(server, query), {"Content-Type": "application/xml"})
                return
            name = unquote(url.path).removeprefix("/").removeprefix("bucket/")
            content = server.files.get(name)
            if content is None:
                self.answer(404, b"")
                return
            headers = {
                "ETag": f'"{md5(content).hexdigest()}"',
                "Last-Modified": "Fri, 27 Nov 2026 10:00:00 GMT",
            }
            some = self.headers.get("Range", "") if server.ranges else ""
            status = 200
            if some:
                first, _, last = some.removeprefix("bytes=").partition("-")
                if int(first) >= len(content):
                    self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"} | headers)
                    return
                end = min(int(last) + 1 if last else len(content), len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                content, status = content[int(first) : end], 206
            if self.command == "HEAD":
                self.answer(status, content, headers)
                return
            fault = server.fault(name, len(content), some)
            with server.lock:
                server.read.append((name, len(content)))
            if fault in ("503", "forbidden"):
                self.answer(503 if fault == "503" else 403, b"")
                return
            if fault == "hang":
                time.sleep(1.5)
            self.answer(status, content, headers, drop=fault == "drop")

        def answer(
            self, status: int, content: bytes, headers: dict[str, str] | None = None, drop: bool = False
        ) -> None:
            try:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[: len(content) // 2] if drop else content)
            except OSError:
                return  # the client has enough
            if drop:
                self.wfile.flush()
                self.close_connection = True

    return Handler


def _listed(server: Server, query: dict[str, list[str]]) -> bytes:
    """Return the answer of S3's ListObjectsV2, in pages of five."""
    prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", [""])[0]
    names = sorted(name for name in server.files if name.startswith(prefix) and name > after)
    page = names[:5]
    entries = "".join(
        f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-27T10:00:00.000Z</LastModified>"
        f"<ETag>&quot;{md5(server.files[name]).hexdigest()}&quot;</ETag>"
        f"<Size>{len(server.files[name])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for name in page
    )
    more = "true" if len(names) > 5 else "false"
    token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(names) > 5 else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><MaxKeys>5</MaxKeys>"
        f"<IsTruncated>{more}</IsTruncated>{token}{entries}</ListBucketResult>"
    ).encode()
