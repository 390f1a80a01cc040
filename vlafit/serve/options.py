"""Options of the server, checked when they are made."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from vlafit.credentials import checked_token
from vlafit.errors import ConfigError, quoted
from vlafit.execution import Execution

AT_MOST = {
    "port": 65535,
    "max_clients": 10_000,
    "max_frame": 2**32,
    "max_rate": 10**6,
    "timeout_s": 7 * 86_400,
}
"""More of these is a slip: no machine has the connections, the memory or the patience."""


@dataclass(frozen=True)
class Options:
    """How a server meets the network."""

    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    token: str = field(default="", repr=False)
    """The key that `Authorization: Api-Key ...` must hold; empty: anybody may ask, which is refused beyond
    this machine."""
    max_clients: int = 64
    """Connections at a time."""
    max_frame: int = 32 * 2**20
    """Bytes of the largest frame that is read."""
    max_rate: float = 1000.0
    """Frames a second of each client, on average; a faster one is slowed down."""
    timeout_s: float = 30.0
    """Seconds until an answer must be computed, and until a client must have taken it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Keys of openpi's and vla-eval's observations -> the robot's cameras, or "state"."""
    execution: Execution | None = None
    """How chunks are executed for clients that take one action at a time (vla-eval's); None: the whole
    chunk."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", checked_token(self.token, "server: token"))
        for name, least in (("port", 0), ("max_clients", 1), ("max_frame", 1024), ("max_rate", 0.001)):
            if getattr(self, name) < least:
                raise ConfigError(f"server: {name} must be at least {least}, not {getattr(self, name)}")
        for name, most in AT_MOST.items():
            if not getattr(self, name) <= most:
                raise ConfigError(f"server: {name} must be at most {most}, not {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ConfigError(f"server: timeout_s must be positive, not {self.timeout_s}")
        if not self.token and not _is_loopback(self.host):
            raise ConfigError(
                f"server: host {quoted(self.host)} can be reached from other machines, and whoever reaches "
                "it can ask for actions; give a token (--token-file), or listen at 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
