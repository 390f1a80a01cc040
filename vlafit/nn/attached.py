"""Attach the adapters' description to a policy, and read it back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Attached:
    """Of a policy with adapters; empty of one without."""

    configs: "Mapping[str, PeftConfig]" = field(default_factory=dict)
    """peft's settings, by adapter name."""
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    """The factors that PiSSA took out of the weights when it began, by live name."""


def attached(policy: nn.Module) -> Attached:
    """Return what the policy carries."""
    return vars(policy).get("attached") or Attached()


def attach(policy: nn.Module, what: Attached | None) -> None:
    """Let the policy carry `what` instead of what it carried; None: nothing."""
    policy.attached = what  # type: ignore[assignment]  # declared by nn.Policy
