"""Messages as msgpack, and back: a message is [name, {field: value}], checked against its dataclass.

Neither side executes what the other sends: there is no pickle, and only the classes that are asked for are
built. A value of another type than the dataclass declares is a WireError that names it.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgpack
import numpy as np

from vlafit.errors import SimulationError, quoted

LARGEST = 2**30  # bytes of a message; a filmed chunk of 100 steps at 1024 px has 300 MiB
NUMBERS = "biuf"  # kinds of arrays: bool, int, unsigned, float
MAPPINGS = (Mapping, dict)
ARRAY = "\0array"  # key that marks an array

T = TypeVar("T")


class WireError(SimulationError):
    """A message that is damaged, or that has a value of a wrong type."""


def encode(message: object) -> bytes:
    """Return a message's bytes. Raises WireError if it holds what cannot be sent."""
    name = type(message).__name__
    fields = _plain(message, name)
    try:
        data: Any = msgpack.packb([name, fields], use_bin_type=True)
    except (OverflowError, TypeError, ValueError) as error:  # an integer of more than 64 bits, 4 GiB
        raise WireError(f"{name} cannot be sent: {error}") from error
    if len(data) > LARGEST:
        raise WireError(f"{name} cannot be sent: it has {len(data)} bytes, of which {LARGEST} are allowed")
    return data


def decode(data: bytes, kinds: tuple[type[T], ...]) -> T:
    """Return the message that `encode` made. Raises WireError unless it is a valid one of `kinds`."""
    try:
        read = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack has kinds of its own, and ValueError, and UnicodeDecodeError
        raise WireError(f"a message of {len(data)} bytes is not msgpack: {quoted(data, 60)}") from error
    names = {kind.__name__: kind for kind in kinds}
    if not isinstance(read, list) or len(read) != 2 or not isinstance(read[0], str) or read[0] not in names:
        raise WireError(f"a message must be one of {', '.join(names)}, got {quoted(read)}")
    name, fields = read
    return _built(names[name], fields, name)


def _plain(value: object, where: str) -> Any:
    """Return a value as what msgpack knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)
        }
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in NUMBERS:
            raise WireError(f"{where}: an array of {value.dtype} cannot be sent, only numbers and bools")
        return {ARRAY: value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise WireError(f"{where}: a {type(value).__name__} cannot be sent")


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _built(kind: type[T], fields: Any, where: str) -> T:
    """Return the dataclass of a message's fields, all of which must be there."""
    wanted = _hints(kind)
    if not isinstance(fields, dict) or fields.keys() != wanted.keys():
        raise WireError(f"{where}: needs {', '.join(wanted)}, got {quoted(fields)}")
    try:
        return kind(**{key: _value(wanted[key], fields[key], f"{where}.{key}") for key in wanted})
    except WireError:
        raise
    except Exception as error:  # a dataclass checks its own values
        raise WireError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return a value as its annotation declares it, or raise WireError."""
    origin: Any = get_origin(hint)
    of = get_args(hint)
    if origin in (Union, types.UnionType):
        for one in of:
            if one is type(None) and value is None:
                return None
        return _value(next(one for one in of if one is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _built(hint, value, where)
    if origin is np.ndarray:
        return _array(value, where)
    if origin is Literal and value in of:
        return value
    if origin is tuple and isinstance(value, list):
        if of[-1] is Ellipsis:
            return tuple(_value(of[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(of) == len(value):
            return tuple(
                _value(o, item, f"{where}[{i}]") for i, (o, item) in enumerate(zip(of, value, strict=True))
            )
    if origin in MAPPINGS and isinstance(value, dict):
        return {
            _value(of[0], key, f"a key of {where}"): _value(of[1], item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    allowed: Any = (int, float) if hint is float else hint
    if origin is None and isinstance(value, allowed) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise WireError(f"{where}: must be {expected or hint}, is {quoted(value)}")


def _array(value: Any, where: str) -> np.ndarray:
    """Return an array, which may be written to."""
    try:
        dtype, shape = np.dtype(value[ARRAY]), [int(size) for size in value["shape"]]
        if dtype.kind not in NUMBERS or min(shape, default=0) < 0:
            raise ValueError(f"an array of {dtype} in the shape {shape}")
        return np.frombuffer(bytearray(value["data"]), dtype).reshape(shape)
    except (TypeError, ValueError, KeyError) as error:
        raise WireError(f"{where}: is not an array: {quoted(value)} ({error})") from error
