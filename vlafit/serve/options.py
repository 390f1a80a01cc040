"""Options of the server, checked when they are made."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from vlafit import arguments
from vlafit.config import LONGEST_S
from vlafit.credentials import checked_token
from vlafit.errors import ConfigError, quoted
from vlafit.execution import Execution
from vlafit.observations import short

# More of these is a slip: no machine has the connections, the memory or the patience.
MOST_CLIENTS = 10_000
SMALLEST_FRAME = 1024
LARGEST_FRAME = 2**32
SLOWEST_RATE = 0.001
MOST_RATE = 10**6


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
    resize: bool = False
    """Whether frames of openpi's and vla-eval's observations are scaled to the robot's camera, if they have
    another size and the same ratio of height and width."""
    execution: Execution | None = None
    """How chunks are executed for clients that take one action at a time (vla-eval's); None: the whole
    chunk."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the option, its value and what is allowed."""
        checked = {
            "host": arguments.text("server: host", self.host, empty=False),
            "port": arguments.whole("server: port", self.port, 0, 65_535),
            "token": checked_token(self.token, "server: token"),
            "max_clients": arguments.whole("server: max_clients", self.max_clients, 1, MOST_CLIENTS),
            "max_frame": arguments.whole("server: max_frame", self.max_frame, SMALLEST_FRAME, LARGEST_FRAME),
            "max_rate": arguments.number("server: max_rate", self.max_rate, SLOWEST_RATE, MOST_RATE),
            "timeout_s": arguments.number("server: timeout_s", self.timeout_s, 0, LONGEST_S, above=True),
            "names": arguments.table("server: names", self.names),
            "resize": arguments.flag("server: resize", self.resize),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.execution is not None and not isinstance(self.execution, Execution):
            raise ConfigError(
                f"server: execution must be a vlafit.Execution, or None, not {short(self.execution)}"
            )
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
