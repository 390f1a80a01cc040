"""Adapter methods, their options, and the kinds of layers that each supports.

`WORKS` was measured (peft 0.21, a policy of pi0's shape). OFT on a convolution, for example, is not the
identity at the start, and PiSSA only supports linear layers; such pairs are refused before training. This
file holds values; `inject.py` adds adapters to a policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal, cast, get_args

from vlafit.errors import StrategyError, did_you_mean

Method = Literal["lora", "dora", "loha", "lokr", "adalora", "oft", "ia3", "miss"]
METHODS: tuple[Method, ...] = get_args(Method)
Layer = Literal["linear", "conv", "embedding"]

WORKS: dict[Method, tuple[Layer, ...]] = {
    "lora": ("linear", "conv", "embedding"),
    "dora": ("linear", "conv", "embedding"),
    "loha": ("linear", "conv"),
    "lokr": ("linear", "conv"),
    "adalora": ("linear", "conv"),
    "oft": ("linear",),
    "ia3": ("linear", "conv"),
    "miss": ("linear",),
}
"""Layers on which a method is the identity at first, trains, saves, reloads and merges."""

Init = Literal["default", "gaussian", "pissa"]
INITS: tuple[Init, ...] = get_args(Init)
PISSA_WORKS: tuple[Layer, ...] = ("linear",)

Quantise = Literal["", "nf4", "int8"]
QUANTISE: tuple[Quantise, ...] = get_args(Quantise)


@dataclass(frozen=True)
class Adapter:
    """One method with its options; options that the method does not use keep their defaults."""

    method: Method
    rank: int = 16
    """Inner dimension. For AdaLoRA: the initial rank."""
    alpha: float = 0.0
    """Scales the update by alpha / rank, or alpha / sqrt(rank) with `rslora`. 0: equal to the rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    init: Init = "default"
    """Initial A: "default" (Kaiming), "gaussian", or "pissa" (the weight's singular vectors; the residual is
    rounded to the weight's dtype, so PiSSA is the identity, to 1e-6, only over float32)."""
    lr_b: float = 1.0
    """LoRA+ (arXiv 2402.12354): learning rate of B relative to A."""
    target_rank: int = 8
    """AdaLoRA: mean rank at the end."""
    orthogonal: float = 0.5
    """AdaLoRA: weight of the penalty that keeps singular vectors orthogonal."""
    factor: int = -1
    """LoKr: size of the smaller Kronecker factor. -1: as square as possible."""
    block: int = 32
    """OFT: size of the rotated blocks of a layer's inputs, or the next smaller divisor of them."""

    @property
    def scale(self) -> float:
        """Alpha, or the rank if alpha is 0."""
        return self.alpha or float(self.rank)

    def fit_to(self, shape: tuple[int, ...]) -> "Adapter":
        """Return the adapter for a weight of this shape [out, in, ...]."""
        if self.method != "oft" or len(shape) < 2:
            return self
        most = min(self.block, shape[1])
        return replace(self, block=next(b for b in range(most, 0, -1) if shape[1] % b == 0))


OPTIONS: dict[Method, tuple[str, ...]] = {
    "lora": ("rank", "alpha", "dropout", "rslora", "init", "lr_b"),
    "dora": ("rank", "alpha", "dropout", "rslora", "init", "lr_b"),
    "loha": ("rank", "alpha"),
    "lokr": ("rank", "alpha", "factor"),
    "adalora": ("rank", "alpha", "dropout", "target_rank", "orthogonal"),
    "oft": ("block",),
    "ia3": (),
    "miss": ("rank", "dropout"),
}
KEYS = tuple(f.name for f in fields(Adapter) if f.name != "method")


def build(method: str, values: Mapping[str, object], where: str) -> Adapter:
    """Build an adapter from a rule's keys; `where` prefixes every message.

    Raises StrategyError for a key that the method does not have, or an invalid value.
    """
    assert method in METHODS, method
    method = cast(Method, method)
    known = OPTIONS[method]
    for key in values:
        if key not in known:
            options = f"its options are {', '.join(known)}" if known else "it has no options"
            raise StrategyError(f"{where}: `{key}` is not an option of {method}; {options}")
    checked = {key: _CHECKS[key](value, key, where) for key, value in values.items()}
    adapter = Adapter(method, **checked)  # type: ignore[arg-type]  # each value was checked for its key
    if method == "adalora" and adapter.target_rank >= adapter.rank:
        if "target_rank" not in values:
            adapter = Adapter(method, **{**checked, "target_rank": max(1, adapter.rank // 2)})  # type: ignore[arg-type]
        if adapter.target_rank >= adapter.rank:
            raise StrategyError(
                f"{where}: AdaLoRA lowers `rank` {adapter.rank} to a mean of `target_rank` "
                f"{adapter.target_rank}; make `target_rank` smaller than `rank`"
            )
    if method == "dora" and adapter.init == "pissa":
        raise StrategyError(
            f"{where}: init = 'pissa' only works with mode 'lora'; with dora use 'default' or 'gaussian'"
        )
    return adapter


def plain(adapter: Adapter) -> dict[str, object]:
    """Return the options that differ from the defaults, as `build` reads them."""
    default = Adapter(adapter.method)
    values = {key: getattr(adapter, key) for key in OPTIONS[adapter.method]}
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def largest_rank(method: Method, shape: tuple[int, ...]) -> int | None:
    """Return the largest useful rank of a method for a weight [out, in, ...]; None if there is no limit.

    A larger rank is no richer than a full matrix. LoKr has no limit: its factors become full matrices.
    """
    if method not in ("lora", "dora", "loha", "adalora", "miss"):
        return None
    inputs = prod(shape[1:])
    return inputs if method == "miss" else min(shape[0], inputs)


def require_works(adapter: Adapter, layer: Layer | None, name: str, where: str) -> None:
    """Raise StrategyError, naming the methods that work, if a method does not support the layer of `name`."""
    works = PISSA_WORKS if adapter.init == "pissa" else WORKS[adapter.method]
    if layer in works:
        return
    method = f"{adapter.method} with init = 'pissa'" if adapter.init == "pissa" else adapter.method
    if layer is None:
        raise StrategyError(
            f"{where} selects {name}, which is not the weight of a linear layer, convolution or embedding, "
            "so it cannot carry an adapter; narrow the rule by `kind`, and give such tensors a rule of their "
            "own "
            '(mode = "full" or "frozen")'
        )
    others = [m for m in METHODS if layer in WORKS[m]]
    raise StrategyError(
        f"{where} selects {name}, the weight of a layer of type {layer}; {method} only works on: "
        f"{', '.join(works)}. Methods that work on {layer}: {', '.join(others)}"
    )


def _whole(value: object, key: str, where: str) -> int:
    least = -1 if key == "factor" else 1
    if type(value) is not int or value < least or value == 0:
        raise StrategyError(f"{where}: `{key}` must be a whole number of at least 1, not {value!r}")
    return value


def _share(value: object, key: str, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= cast(float, value) < 1:
        raise StrategyError(f"{where}: `{key}` must be at least 0 and below 1, not {value!r}")
    return float(cast(float, value))


def _positive(value: object, key: str, where: str) -> float:
    zero_ok = key == "orthogonal"
    if (
        type(value) not in (int, float)
        or not 0 <= cast(float, value) < float("inf")
        or not (value or zero_ok)
    ):
        lowest = "at least 0" if zero_ok else "above 0"
        raise StrategyError(f"{where}: `{key}` must be a number {lowest}, not {value!r}")
    return float(cast(float, value))


def _flag(value: object, key: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise StrategyError(f"{where}: `{key}` must be true or false, not {value!r}")
    return value


def _init(value: object, key: str, where: str) -> str:
    if value not in INITS:
        raise StrategyError(f"{where}: unknown {key} {value!r}{did_you_mean(str(value), INITS)}")
    return str(value)


_CHECKS = {
    "rank": _whole,
    "target_rank": _whole,
    "factor": _whole,
    "block": _whole,
    "alpha": _positive,
    "lr_b": _positive,
    "orthogonal": _positive,
    "dropout": _share,
    "rslora": _flag,
    "init": _init,
}
