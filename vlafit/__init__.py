"""vlafit: fine-tune pretrained vision-language-action policies, and show what it bought."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlafit.tuning import apply_strategy as apply_strategy

# What the package offers at its top, and where that lives: imported when asked for, since torch is slow.
_HOMES = {
    "apply_strategy": "vlafit.tuning",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlafit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
