"""Describe an actor to those who connect, and read such a description back.

The first frame of a connection holds it. openpi's client takes any map as metadata; vla-eval's wants a
message of the type "hello": the frame is both.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from vlafit import config
from vlafit.agreement import Learned
from vlafit.errors import RemoteError, VlafitError, brief
from vlafit.requests import Expected
from vlafit.types import Embodiment

PROTOCOL = 1
"""Version of our own frames; a client refuses a server of another one."""


SILENT = Learned(silence="the server does not say")


@dataclass(frozen=True)
class Described:
    """Description of a served actor. `required` are the cameras that it looks at; `chunk` is 0 where nobody
    knows."""

    embodiment: Embodiment
    width: int
    fingerprint: str
    guided: bool = False
    """Whether it can continue a chunk that is being executed."""
    chunk: int = 0
    """Steps of its action chunks."""
    history: int = 1
    """Observations that it reads, the newest included."""
    instructed: bool = True
    """Whether it reads an instruction."""
    required: tuple[str, ...] = ()
    fate_of_invalid: str = ""
    """What is executed where its tokens make no chunk of actions; "": it answers with numbers."""
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Task -> recorded seeds that it has learned from."""
    normalisation: Mapping[str, str] = field(default_factory=dict)
    """How the server normalises each column; values on the wire are in the robot's units."""
    versions: Mapping[str, str] = field(default_factory=dict)
    learned: Learned = SILENT
    """What the policy says of the data that it learned from."""
    relative: tuple[bool, ...] | None = None
    """For each action dimension, whether it was learned relative to the state; None: it does not say."""
    max_frame: int = 0
    """Bytes of the largest frame that the server reads; 0: it does not say."""

    @property
    def expected(self) -> Expected:
        """What it can be asked."""
        fate = self.fate_of_invalid
        return Expected(self.embodiment, self.history, self.guided, self.instructed, self.required, fate)


def software() -> dict[str, str]:
    """Return the versions of what serves."""
    versions = {}
    for package in ("vlafit", "numpy", "torch", "websockets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from its source, or not installed
            continue
    return versions


def greeting(described: Described) -> dict[str, Any]:
    """Return the first frame of a connection."""
    robot = described.embodiment
    needs = {f"send_{name}_image": True for name in described.required}  # vla-eval drops those it has not
    payload = {
        "model_server": "vlafit",
        "harness_version": described.versions.get("vlafit", ""),
        "protocol_version": 1,  # of vla-eval's protocol, version 0.8
        "capabilities": {},
        "observation_params": {"send_state": True, **needs},
    }
    return {
        "type": "hello",
        "payload": payload,
        "seq": 0,
        "timestamp": time.time(),
        "server": "vlafit",
        "protocol": PROTOCOL,
        "embodiment": dataclasses.asdict(robot),
        "cameras": list(described.required),
        "action_horizon": described.chunk,
        "normalisation": dict(described.normalisation),
        "versions": dict(described.versions),
        "learned": described.learned.to_json(),
        "relative": None if described.relative is None else list(described.relative),
        "width": described.width,
        "max_frame": described.max_frame,
        "guided": described.guided,
        "history": described.history,
        "instructed": described.instructed,
        "invalid_answers": described.fate_of_invalid,
        "fingerprint": described.fingerprint,
        "seeds": {task: np.asarray(seeds, np.int64) for task, seeds in described.seeds.items()},
    }


def read_greeting(frame: Any, url: str) -> Described:
    """Read a server's first frame. Raises RemoteError if it is not from a vlafit server."""
    if not isinstance(frame, Mapping) or frame.get("server") != "vlafit":
        raise RemoteError(
            f"{url}: a policy server answers, but not vlafit's; it needs a client of its own (openpi-client, "
            "say)"
        )
    if frame.get("protocol") != PROTOCOL:
        raise RemoteError(
            f"{url}: the server speaks version {frame.get('protocol')} of vlafit's protocol, this client "
            f"version {PROTOCOL}; install the same vlafit on both sides"
        )
    try:
        return Described(
            embodiment=config.build(Embodiment, frame["embodiment"], f"{url}: embodiment"),
            width=int(frame["width"]),
            fingerprint=str(frame["fingerprint"]),
            guided=bool(frame["guided"]),
            chunk=int(frame["action_horizon"]),
            history=int(frame.get("history", 1)),  # a server of an earlier version has no such policy
            instructed=bool(frame.get("instructed", True)),
            fate_of_invalid=str(frame.get("invalid_answers", "")),
            required=tuple(frame["cameras"]),
            seeds={task: tuple(int(seed) for seed in seeds) for task, seeds in frame["seeds"].items()},
            normalisation=dict(frame["normalisation"]),
            versions=dict(frame["versions"]),
            max_frame=int(frame.get("max_frame", 0)),
            relative=None if frame.get("relative") is None else tuple(map(bool, frame["relative"])),
            learned=Learned.from_json(frame["learned"]) if "learned" in frame else SILENT,
        )
    except (KeyError, TypeError, ValueError, AttributeError, VlafitError) as error:
        raise RemoteError(
            f"{url}: the server's description of its policy cannot be read: {brief(error)}"
        ) from error
