"""vlafit: fine-tune pretrained vision-language-action policies, and show what it bought."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlafit.actor import load_actor as load_actor
    from vlafit.checkpoints import load as load_checkpoint
    from vlafit.checkpoints import load_policy as load_policy
    from vlafit.checkpoints import save as save_checkpoint
    from vlafit.datasets import open_dataset as open_dataset
    from vlafit.execution import Execution as Execution
    from vlafit.execution import Limits as Limits
    from vlafit.nn.batch import Batch as Batch
    from vlafit.serve.client import connect as connect
    from vlafit.serve.control import Controller as Controller
    from vlafit.tuning import apply_strategy as apply_strategy
    from vlafit.tuning.merge import merge as merge

# What the package offers at its top, and where that lives: imported when asked for, since torch is slow.
_HOMES = {
    "Batch": ("vlafit.nn.batch", "Batch"),
    "Controller": ("vlafit.serve.control", "Controller"),
    "Execution": ("vlafit.execution", "Execution"),
    "Limits": ("vlafit.execution", "Limits"),
    "apply_strategy": ("vlafit.tuning", "apply_strategy"),
    "connect": ("vlafit.serve.client", "connect"),
    "load_actor": ("vlafit.actor", "load_actor"),
    "load_checkpoint": ("vlafit.checkpoints", "load"),
    "load_policy": ("vlafit.checkpoints", "load_policy"),
    "merge": ("vlafit.tuning.merge", "merge"),
    "open_dataset": ("vlafit.datasets", "open_dataset"),
    "save_checkpoint": ("vlafit.checkpoints", "save"),
}

__all__ = [
    "Batch",
    "Controller",
    "Execution",
    "Limits",
    "apply_strategy",
    "connect",
    "load_actor",
    "load_checkpoint",
    "load_policy",
    "merge",
    "open_dataset",
    "save_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlafit' has no attribute {name!r}")
    module, inside = _HOMES[name]
    return getattr(import_module(module), inside)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
