"""What a launcher's configuration asks of a run, and what its readers have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlafit.errors import ConfigError

Sharding = Literal["none", "gradients", "full"]

TRUE = ("true", "1", "yes", "y", "t", "on")  # as accelerate and DeepSpeed read them
FALSE = ("false", "0", "no", "n", "f", "off")
LESS_MEMORY = (
    "--train.recompute full, a higher --train.accumulate and, without sharding, --optim.states 8bit or cpu "
    "lower the memory on the GPU; --train.memory 24GB picks them for a card"
)


@dataclass(frozen=True)
class LaunchPlan:
    """The recipe's fields as the launcher's configuration sets them; None: it says nothing about a field."""

    launcher: str = ""
    """Its name in messages, such as "accelerate (FSDP 2)"; empty without a launcher's configuration."""
    precision: Literal["fp32", "bf16"] | None = None
    sharding: Sharding | None = None
    accumulate: int | None = None
    recompute: Literal["none", "full"] | None = None
    clip_norm: float | None = None
    compile: Literal["blocks"] | None = None
    replicas: int | None = None
    notes: tuple[str, ...] = ()
    """Sentences about settings that have no effect."""


def keys_asked_for(environ: Mapping[str, str], known: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[str]:
    """Return those of the `known` keys that ask for something."""
    return [
        key
        for variable, (key, nothing) in known.items()
        if environ.get(variable, "").lower() not in (*map(str.lower, nothing), "none")
    ]


def have_no_effect(keys: Sequence[str]) -> str:
    """Return the sentence that says so."""
    return f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect"


def precision_of(name: str, where: str) -> Literal["fp32", "bf16"] | None:
    """Return the precision; "no" is what accelerate writes for the default too, so it decides nothing."""
    match name.lower():
        case "bf16":
            return "bf16"
        case "no" | "":
            return None
    raise ConfigError(
        f"{where}: mixed_precision {name!r} cannot be honoured: vlafit computes in bf16 (--train.precision "
        "bf16), which needs no loss scaling, or fp32; set mixed_precision to 'bf16' or 'no'"
    )


def accumulation_of(value: Any, where: str) -> int | None:
    """Return how many micro-batches a step has; None where nobody chose."""
    if value in (None, "", "auto"):
        return None
    try:
        steps = int(value)
    except (TypeError, ValueError):
        steps = 0
    if steps < 1:
        raise ConfigError(f"{where}: gradient_accumulation_steps {value!r} is not a number of at least 1")
    return steps if steps > 1 else None  # 1 is what accelerate writes where nobody chose


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Tell whether a variable is set to true."""
    return environ.get(name, "false").lower() in TRUE
