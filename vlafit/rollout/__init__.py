"""Closed-loop evaluation: a protocol, a pool of environment processes, and the scored result.

Environment processes import this package, so nothing here imports torch.
"""

from vlafit.rollout.evaluation import evaluate, policy_width, preflight, robot_of
from vlafit.rollout.evaluation_folder import Result
from vlafit.rollout.protocol import Protocol, load_protocol
from vlafit.rollout.records import Record
from vlafit.rollout.shard import Shard
from vlafit.rollout.shards import merge

__all__ = [
    "Protocol",
    "Record",
    "Result",
    "Shard",
    "evaluate",
    "load_protocol",
    "merge",
    "policy_width",
    "preflight",
    "robot_of",
]
