"""The adapters that a rule may ask for: their names, their options, and on which layers each of them works.

What works where was measured (peft 0.21, a policy of pi0's shape): `WORKS`. OFT on a convolution, for
example, is not the identity at the start, and PiSSA knows linear layers alone; such pairs are refused before
training. This file holds values; `inject.py` puts adapters into a policy.
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
"""Layers on which a method leaves the output unchanged at first, trains, saves, reloads and merges."""

Init = Literal["default", "gaussian", "pissa"]
INITS: tuple[Init, ...] = get_args(Init)
PISSA_WORKS: tuple[Layer, ...] = ("linear",)

Quantise = Literal["", "nf4", "int8"]
QUANTISE: tuple[Quantise, ...] = get_args(Quantise)


@dataclass(frozen=True)
class Adapter:
    """One method with its options; those that mean nothing for the method keep their defaults."""

    method: Method
    rank: int = 16
    """Inner dimension. For AdaLoRA, the one it begins with."""
    alpha: float = 0.0
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`. 0: the rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    init: Init = "default"
    """How A begins: "default" (Kaiming), "gaussian", or "pissa" (from the weight's own singular vectors; what
    is left of the weight is rounded to its dtype, so PiSSA is a no-op to 1e-6 over float32 alone)."""
    lr_b: float = 1.0
    """LoRA+ (arXiv 2402.12354): learning rate of B, times that of A."""
    target_rank: int = 8
    """AdaLoRA: mean rank at the end."""
    orthogonal: float = 0.5
    """AdaLoRA: weight of the penalty that keeps singular vectors orthogonal."""
    factor: int = -1
    """LoKr: size of the smaller Kronecker factor. -1: as square as it gets."""
    block: int = 32
    """OFT: size of the rotated blocks of a layer's inputs, or the next smaller one that divides them."""

    @property
    def scale(self) -> float:
        """Alpha, the rank where none is given."""
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
    """Make an adapter from a rule's keys; `where` begins every message.

    Raises StrategyError for a key that the method does not have, or a value that it cannot mean.
    """
    assert method in METHODS, method
    method = cast(Method, method)
    known = OPTIONS[method]
    for key in values:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has no options"
            raise StrategyError(f"{where}: `{key}` means nothing for {method}; {has}")
    made: dict[str, object] = {}
    for key, value in values.items():
        made[key] = _CHECKS[key](value, key, where)
    adapter = Adapter(method, **made)  # type: ignore[arg-type]  # each value was checked for its key
    if method == "adalora" and adapter.target_rank >= adapter.rank:
        if "target_rank" not in values:
            adapter = Adapter(method, **{**made, "target_rank": max(1, adapter.rank // 2)})  # type: ignore[arg-type]
        if adapter.target_rank >= adapter.rank:
            raise StrategyError(
                f"{where}: AdaLoRA goes from `rank` {adapter.rank} down to a mean of `target_rank` "
                f"{adapter.target_rank}; make it smaller than `rank`"
            )
    if method == "dora" and adapter.init == "pissa":
        raise StrategyError(f"{where}: DoRA begins with a default or gaussian A here; PiSSA is for lora")
    return adapter


def plain(adapter: Adapter) -> dict[str, object]:
    """Return the options that differ from the defaults, as `build` reads them."""
    default = Adapter(adapter.method)
    values = {key: getattr(adapter, key) for key in OPTIONS[adapter.method]}
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def largest_rank(method: Method, shape: tuple[int, ...]) -> int | None:
    """Return the rank beyond which a method cannot use more for a weight [out, in, ...]; None: there is none.

    A larger one is no richer than a full matrix. LoKr's is no rank in this sense: its factors are whole then.
    """
    if method not in ("lora", "dora", "loha", "adalora", "miss"):
        return None
    inputs = prod(shape[1:])
    return inputs if method == "miss" else min(shape[0], inputs)


def require_works(adapter: Adapter, layer: Layer | None, name: str, where: str) -> None:
    """Raise StrategyError, saying what works, where a method does not fit the layer of the tensor `name`."""
    works = PISSA_WORKS if adapter.init == "pissa" else WORKS[adapter.method]
    if layer in works:
        return
    method = f"{adapter.method} with init = 'pissa'" if adapter.init == "pissa" else adapter.method
    if layer is None:
        raise StrategyError(
            f"{where} takes {name}, which is no weight of a linear layer, a convolution or an embedding, so "
            f"no adapter fits it; narrow the rule by `kind`, and give such tensors a rule of their own "
            '(mode = "full" or "frozen")'
        )
    others = [m for m in METHODS if layer in WORKS[m]]
    raise StrategyError(
        f"{where} takes {name}, of a layer of kind {layer}; {method} works on: {', '.join(works)}. "
        f"On {layer} these work: {', '.join(others)}"
    )


def _whole(value: object, key: str, where: str) -> int:
    least = -1 if key == "factor" else 1
    if type(value) is not int or value < least or value == 0:
        raise StrategyError(f"{where}: `{key}` is a whole number from 1 on, not {value!r}")
    return value


def _share(value: object, key: str, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= cast(float, value) < 1:
        raise StrategyError(f"{where}: `{key}` is a number from 0 to below 1, not {value!r}")
    return float(cast(float, value))


def _positive(value: object, key: str, where: str) -> float:
    low_ok = key == "orthogonal"
    if type(value) not in (int, float) or not 0 <= cast(float, value) < float("inf") or not (value or low_ok):
        raise StrategyError(f"{where}: `{key}` is a number {'from' if low_ok else 'above'} 0, not {value!r}")
    return float(cast(float, value))


def _flag(value: object, key: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise StrategyError(f"{where}: `{key}` is true or false, not {value!r}")
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
