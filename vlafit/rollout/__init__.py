"""Closed-loop evaluation: a protocol, a pool of environment processes, and what came out.

Environment processes import this package, so nothing here imports torch.
"""

from vlafit.rollout.folder import Record, Result
from vlafit.rollout.protocol import Protocol, load_protocol
from vlafit.rollout.run import evaluate, preflight

__all__ = [
    "Protocol",
    "Record",
    "Result",
    "evaluate",
    "load_protocol",
    "preflight",
]
