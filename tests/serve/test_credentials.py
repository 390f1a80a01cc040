"""Tokens and passwords: taken as users give them, wrong ones named by what is wrong, and never shown."""

import logging
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.robots import seen
from vlafit.cli import main
from vlafit.errors import ConfigError, RemoteError, VlafitError, shown_url
from vlafit.serve.client import connect
from vlafit.serve.options import Options
from vlafit.serve.server import Running
from vlafit.types import EpisodeKey

Serve = Callable[..., Running]
TOKEN = "0123456789abcdef-SECRET"


@pytest.mark.parametrize("around", ["{}", "{}\n", "{}\r\n", "  {}\n\n"])
def test_white_space_around_a_token_is_that_of_its_file(serve: Serve, around: str) -> None:
    running = serve(token=around.format(TOKEN))
    for text in (TOKEN, around.format(TOKEN)):
        with connect(running.address, token=text) as remote:
            assert len(remote.act([seen()], [EpisodeKey(0, "pick", 0)])) == 1


@pytest.mark.parametrize(
    ("token", "fact"),
    [
        ("SECRET-012345\n6789", "character 14 of 18 is a line break"),
        ("SECRET-012345\r6789", "line break"),
        ("SECRET-01 2345", "character 10 of 14 is white space"),
        ("SECRET-\u00fc", "character 8 of 8 is U\\+00FC"),
        ("SECRET-\x00", "U\\+0000"),
        ("SECRET-" * 1000, "7000 characters; a token has at most 4096"),
        (b"SECRET", "must be a text, not bytes"),
        (None, "must be a text, not NoneType"),
    ],
)
def test_a_token_that_no_header_holds_is_named_by_what_is_wrong(token: str, fact: str) -> None:
    for refuse in (lambda: connect("ws://127.0.0.1:9", token=token), lambda: Options(token=token)):
        with pytest.raises(ConfigError, match=f"token: .*{fact}") as caught:
            refuse()
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_a_token_file_with_two_lines_is_named_by_its_line_break(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text("SECRET-0123456789\nSECRET-0123456789\n")
    file.chmod(0o600)
    for verb in (
        ["serve", "metaworld-base"],
        ["eval", "--actor", "ws://127.0.0.1:9", "--data", "metaworld-faucet"],
    ):
        assert main([*verb, "--token-file", str(file)]) == 2
        errors = capsys.readouterr().err
        assert f"--token-file {file}: character 18 of 35 is a line break" in errors and "SECRET" not in errors


def test_a_wrong_token_is_told_from_none(serve: Serve) -> None:
    address = serve(token=TOKEN).address
    with pytest.raises(RemoteError, match=r"refused \(401\): no token came"):
        connect(address)
    with pytest.raises(RemoteError, match=r"refused \(401\): the token is not this server's") as caught:
        connect(address, token="SECRET-of-another-server")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (f"Authorization: Api-Key {TOKEN}\r\nAuthorization: Api-Key {TOKEN}\r\n", "401"),
        ("Authorization: Api-Key \xff\xfe\r\n", "401"),
        ("Authorization: Basic dTpw\r\n", "401"),
        (f"Authorization: Api-Key {TOKEN}\r\n", "101"),
    ],
)
def test_headers_that_are_no_token_are_refused_and_not_an_internal_error(
    serve: Serve, headers: str, status: str
) -> None:
    port = serve(token=TOKEN).server.port  # type: ignore[union-attr]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
            + headers.encode("latin-1")
            + b"\r\n"
        )
        assert raw.recv(64).decode("latin-1").split()[1] == status


def test_a_password_or_query_of_an_address_is_never_shown(serve: Serve, tmp_path: Path) -> None:
    address = serve().address
    for url in (
        address.replace("ws://", "ws://me:SECRET@"),
        "ws://me:SECRET@127.0.0.1:9",
        "http://me:SECRET@x",
    ):
        with pytest.raises(RemoteError) as caught:
            connect(url)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    with_query = "ws://127.0.0.1:9/?token=SECRET"
    with pytest.raises(RemoteError, match="cannot be reached") as caught:
        connect(with_query)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert shown_url("wss://me:SECRET@host:1/a?b=SECRET#SECRET") == "wss://host:1/a"
    assert len(shown_url("ws://" + "x" * 10**5)) < 250


@pytest.mark.parametrize("url", ["", "127.0.0.1:9", "ws://", "ws://h:99999", "ws://[", None, 3, "ftp://x"])
def test_what_is_no_address_is_one_sentence(url: str) -> None:
    with pytest.raises(VlafitError, match="address of a server"):
        connect(url)


def test_debugging_the_connection_logs_no_token(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), connect(serve(token=TOKEN).address, token=TOKEN) as remote:
        remote.act([seen()], [EpisodeKey(0, "pick", 0)])
    assert TOKEN not in caplog.text and TOKEN not in repr(Options(token=TOKEN))
