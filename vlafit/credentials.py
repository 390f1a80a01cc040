"""Check tokens and addresses before anything is sent; no message shows a token, a password or a query.

Nothing here imports torch or numpy.
"""

from urllib.parse import urlsplit

from vlafit.errors import ConfigError, RemoteError, quoted, shown_url

LONGEST = 4096  # characters of a token: with the header's name it must fit into 8 KiB
MAKE_ONE = "make one with python -c 'import secrets; print(secrets.token_urlsafe())'"


def checked_token(token: object, where: str = "token") -> str:
    """Return the token without the white space around it, such as the line break at the end of a file.

    Raises ConfigError for one that no header can hold. The message does not show it.
    """
    if not isinstance(token, str):
        raise ConfigError(f"{where}: must be a text, not {type(token).__name__}")
    token = token.strip()
    for number, character in enumerate(token, 1):
        if character in "\r\n":
            problem = "is a line break; a token is one line"
        elif character.isspace():
            problem = "is white space; a token has none"
        elif not character.isascii() or not character.isprintable():
            problem = f"is U+{ord(character):04X}; a token is printable ASCII"
        else:
            continue
        raise ConfigError(f"{where}: character {number} of {len(token)} {problem} (the token is not shown)")
    if len(token) > LONGEST:
        raise ConfigError(f"{where}: has {len(token)} characters; a token has at most {LONGEST}")
    return token


def checked_url(url: object, where: str = "url") -> str:
    """Return the address of a server. Raises RemoteError for what is none, or holds a name and a password."""
    if not isinstance(url, str):
        raise RemoteError(
            f"{where}: the address of a server is a text such as ws://HOST:PORT, not {quoted(url, 60)}"
        )
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("ws", "wss") or not parts.hostname or (parts.port, None) == (0, None)
    except ValueError:
        wrong, parts = True, None
    if parts is not None and "@" in parts.netloc:
        raise RemoteError(
            f"{shown_url(url)}: holds a user name or a password, which `vlafit serve` does not read; "
            "give the server's token (token=..., or --token-file)"
        )
    if wrong:
        raise RemoteError(f"{where} {shown_url(url)!r} is no address of a server; write ws://HOST:PORT")
    return url
