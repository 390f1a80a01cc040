"""Weights that are made when an operation uses them, and freed after it: only one is in memory at a time.

A policy of them computes what a policy of plain weights does, operation by operation, from what is mapped of
a file: a float32 weight from the file's bfloat16, a merged one from a layer and its adapter, a rounded one
from either. No gradient reaches them, and they live on the CPU.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_PLAIN = torch._C.DisableTorchFunctionSubclass
_PROPERTY: Any = Tensor  # of whose attributes the getters and setters are meant
_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "is_meta",
    "itemsize", "nbytes", "is_cuda", "is_sparse",
)  # fmt: skip
_DESCRIBE = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
    *(Tensor.is_contiguous, Tensor.get_device, Tensor.__len__, torch.numel),
    *(_PROPERTY.requires_grad.__set__, _PROPERTY.grad.__set__, Tensor.requires_grad_),
}
"""Of the tensor as it will be: nothing is made."""
_SAME = {Tensor.detach, Tensor.cpu, Tensor.contiguous, Tensor.clone, torch.clone, _PROPERTY.data.__get__}
"""Return the deferred tensor, whose numbers nobody can change."""
_ADDRESS = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage}
CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Of dtypes in the header of a safetensors file, in the order in which safetensors writes them."""
KEPT = ("__invert__", "__index__", "__int__")  # of the operators whose names begin as those in place
ALIGNED = 64  # bytes at which torch's own memory begins


@final
class Deferred(Tensor):
    """A tensor on the CPU whose numbers `make` returns, cast to each of `casts` in turn."""

    make: Callable[[], Tensor]
    casts: tuple[torch.dtype, ...]
    made_dtype: torch.dtype
    """What `make` returns."""

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: torch.Size,
        made_dtype: torch.dtype,
        casts: tuple[torch.dtype, ...] = (),
    ) -> "Deferred":
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=(made_dtype, *casts)[-1], device="cpu")  # type: ignore[attr-defined]
        self.make, self.casts, self.made_dtype = make, casts, made_dtype
        return self

    def value(self) -> Tensor:
        """Return the numbers. What `make` returns may be what others hold: do not change it."""
        made = self.make().detach()
        for dtype in self.casts:
            made = made.to(dtype)
        # Products of mapped numbers that begin elsewhere in a cache line may round otherwise.
        return made if made.data_ptr() % ALIGNED == 0 else made.clone()

    def cast(self, dtype: torch.dtype) -> "Deferred":
        """Return the tensor in `dtype`. What was only widened is narrowed again without a trace."""
        dtypes = (self.made_dtype, *self.casts)
        if dtype == dtypes[-1]:
            return self
        widened = len(dtypes) > 1 and dtypes[-2] == dtype and _holds(dtypes[-1], dtype)
        casts = self.casts[:-1] if widened else (*self.casts, dtype)
        return Deferred(self.make, self.shape, self.made_dtype, casts)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBE:
            with _PLAIN():
                return func(*args, **kwargs)
        if func in _SAME and isinstance(args[0], Deferred):
            return args[0]
        if func == _PROPERTY.data.__set__ and isinstance(args[0], Deferred):  # a library replaces the weight
            args[0]._replace(args[1])
            return None
        name = getattr(func, "__name__", "")
        if func in _ADDRESS or (_is_first(args) and _changes(name)):
            raise TypeError(
                f"{name}: a deferred weight has no memory of its own; see vlafit.nn.deferred.materialise"
            )
        if func is F.embedding and isinstance(args[1], Deferred):  # only the rows that are asked for
            rows = func(args[0], args[1].make(), *args[2:], **kwargs)
            for dtype in args[1].casts:
                rows = rows.to(dtype)
            return rows
        plain = tree_map_only(Deferred, _operand, (args, kwargs))
        return func(*plain[0], **plain[1])

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        plain = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({tuple(self.shape)}, {self.dtype})"

    def _replace(self, value: Tensor) -> None:
        if value is self:
            return
        if value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"a deferred weight {self!r} cannot become {tuple(value.shape)} {value.dtype}")
        if isinstance(value, Deferred):
            self.make, self.casts, self.made_dtype = value.make, value.casts, value.made_dtype
        else:
            self.make, self.casts, self.made_dtype = lambda: value, (), value.dtype


def defer(tensor: Tensor, dtype: torch.dtype | None = None) -> Deferred:
    """Return `tensor`, of a file or in memory, as a deferred one, in `dtype` if that is given."""
    if not isinstance(tensor, Deferred):
        held = tensor.detach()
        tensor = Deferred(held.contiguous, held.shape, held.dtype)
    return tensor if dtype is None else tensor.cast(dtype)


def rounded(tensor: Deferred, dtype: torch.dtype) -> Deferred:
    """Return the tensor rounded to `dtype`, in the dtype that it has."""
    return tensor.cast(dtype).cast(tensor.dtype)


def materialise(policy: nn.Module) -> None:
    """Give every deferred parameter of `policy` memory of its own."""
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, Deferred):
                setattr(module, name, nn.Parameter(parameter.value().clone()))


def is_deferred(policy: nn.Module) -> bool:
    """Whether any parameter is deferred."""
    return any(isinstance(parameter, Deferred) for parameter in policy.parameters())


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, the deferred tensors one at a time: bytes are those of `save_file`."""
    if not any(isinstance(tensor, Deferred) for tensor in tensors.values()):
        save_file(dict(tensors), path, dict(metadata) if metadata else None)
        return
    order = sorted(tensors, key=lambda name: (list(CODES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensors[name]
            value = tensor.value() if isinstance(tensor, Deferred) else tensor.detach().cpu()
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
            del value


def _operand(tensor: Deferred) -> Tensor:
    """Return the numbers; torch may fold a product otherwise if a factor could have a gradient."""
    return tensor.value().requires_grad_(tensor.requires_grad)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of `narrow` is one of `wide`."""
    return torch.promote_types(wide, narrow) == wide


def _changes(name: str) -> bool:
    """Whether a function of this name changes its first tensor: add_, __iadd__, __setitem__, __set__."""
    if name.startswith("__"):
        return (name.startswith("__i") and name not in KEPT) or name in ("__setitem__", "__set__")
    return name.endswith("_")


def _is_first(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Deferred)
