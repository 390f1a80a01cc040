"""Encode and decode frames: msgpack with numpy arrays, as openpi and vla-eval write them; never pickle.

openpi marks arrays with byte keys (b"__ndarray__"), vla-eval with text keys and images as PNG or JPEG. Both
are read; openpi's form is written, or vla-eval's where `pack` is asked for text keys. A frame comes from
anybody, so its dtypes, sizes and number of containers are limited before memory is spent on them.
"""

import io
import math
import re
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from vlafit.errors import VlafitError

MAX_CONTAINERS = 100_000  # lists and maps in one frame; each costs 60 times its byte on the wire
MAX_LENGTH = 65_536  # elements of one list or map
MAX_AXES = 8
DTYPE = re.compile(
    r"[<>|=]?(b1|i[1248]|u[1248]|f[248])"
)  # no objects, records, text, dates or complex numbers


class WireError(VlafitError):
    """A frame that cannot be read."""


def pack(values: Any, *, text_keys: bool = False) -> bytes:
    """Encode plain values and arrays as one frame. Raises WireError for what has no place in it."""
    try:
        return msgpack.packb(values, default=_plain_text if text_keys else _plain_bytes)  # type: ignore[return-value]
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error


def unpack(frame: bytes) -> Any:
    """Decode one frame. Arrays are views of it, not to be written to. Raises WireError saying what is
    wrong."""
    reader = _Reader()
    try:
        return msgpack.unpackb(
            frame,
            object_hook=reader.map,
            list_hook=reader.list,
            ext_hook=_refuse_extension,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"a frame of {len(frame)} bytes is not msgpack: {reason}") from error


class _Reader:
    """Counts the containers of one frame, and turns marked maps into arrays."""

    def __init__(self) -> None:
        self.containers = 0

    def list(self, values: list[Any]) -> list[Any]:
        self._count()
        return values

    def map(self, values: dict[Any, Any]) -> Any:
        self._count()
        if b"__ndarray__" in values or "__ndarray__" in values:
            return _array(_text_keys(values))
        if b"__npgeneric__" in values:
            return _scalar(_text_keys(values))
        if "__image__" in values:
            return _image(values)
        return values

    def _count(self) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise WireError(
                f"more than {MAX_CONTAINERS} lists and maps in one frame; send arrays, not lists of numbers"
            )


def _text_keys(values: dict[Any, Any]) -> dict[str, Any]:
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): v for key, v in values.items()}


def _dtype(name: object) -> np.dtype[Any]:
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        raise WireError(f"an array of dtype {str(name)[:40]!r}; only booleans, integers and floats are read")
    return np.dtype(name)


def _shape(values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MAX_AXES:
        raise WireError(
            f"an array's shape must be a list of at most {MAX_AXES} lengths, not {str(values)[:80]}"
        )
    if not all(type(length) is int and length >= 0 for length in values):
        raise WireError(f"an array's shape must hold lengths, not {str(values)[:80]}")
    return tuple(values)


def _array(values: dict[str, Any]) -> NDArray:
    dtype, shape, data = _dtype(values.get("dtype")), _shape(values.get("shape")), values.get("data")
    wanted = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != wanted:
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array {dtype} {shape} holds {size}; it must hold {wanted} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(values: dict[str, Any]) -> np.generic:
    value = values.get("data")
    if not isinstance(value, bool | int | float):
        raise WireError(f"a number must be a number, not {type(value).__name__}")
    try:
        return _dtype(values.get("dtype")).type(value)
    except OverflowError as error:
        raise WireError(f"a number does not fit its dtype: {error}") from error


def _image(values: dict[Any, Any]) -> NDArray:
    """Read vla-eval's images: raw, PNG or JPEG. The shape is checked before pixels are decoded."""
    form = values.get("format")
    if form == "raw":
        return _array(_text_keys(values))
    shape, data = _shape(values.get("shape")), values.get("data")
    if form not in ("png", "jpeg") or not isinstance(data, bytes):
        raise WireError(f"an image of the format {str(form)[:40]!r}; raw, png and jpeg are read")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[form]) as picture:
            if (picture.height, picture.width) != shape[:2]:
                raise WireError(
                    f"an image says shape {shape}, and its {form} is {picture.height}x{picture.width}"
                )
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise WireError(f"an image that is no {form}: {error}") from error


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(
        f"msgpack's extension type {code} is not read; send numbers, text, lists, maps and arrays"
    )


def _plain_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": _bytes(value),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        _bytes(np.asarray(value))
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"values of type {type(value).__name__} have no form in a frame")


def _plain_text(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__ndarray__": True, "data": _bytes(value), "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"values of type {type(value).__name__} have no form in a frame")


def _bytes(array: NDArray) -> bytes:
    if not DTYPE.fullmatch(array.dtype.str):
        raise TypeError(f"arrays of dtype {array.dtype} have no form in a frame")
    return array.tobytes()
