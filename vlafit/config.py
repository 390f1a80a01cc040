"""Convert TOML to frozen dataclasses and back; an unknown key or a wrong type is an error.

A file may name one `base` file, whose values it overrides. This module checks types, not meanings.
"""

import ast
import dataclasses
import inspect
import json
import math
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from vlafit import shipped
from vlafit.errors import ConfigError, VlafitError, did_you_mean, quoted
from vlafit.files import plain_text

T = TypeVar("T")

LARGEST = 2**63 - 1  # whole numbers of numpy and torch; seeds are among them
LONGEST_S = 7 * 86_400  # seconds of any waiting: more is a slip


# ---------------------------------------------------------------------------------------------- reading files


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(plain_text(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: its values are nested too deeply; write them as tables") from error


def _find_base(base: str, path: Path, kind: str) -> Path:
    """Prefer a file next to `path` to a shipped one, so that a file may extend a shipped file of its name."""
    for neighbour in (path.parent / base, path.parent / f"{base}.toml"):
        if neighbour.is_file() and neighbour.resolve() != path.resolve():
            return neighbour
    try:
        return shipped.find(kind, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from error


def merge_tables(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` overridden by `over`: tables are merged key by key, all else (lists too) is replaced."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge_tables(old, value)
        merged[key] = value
    return merged


def at(nested: Mapping[str, Any], dotted: str, default: object = None) -> Any:
    """Return ``nested["a"]["b"]`` for the key ``a.b``; `default` where there is no such value."""
    value: Any = nested
    for section in dotted.split("."):
        if not isinstance(value, Mapping) or section not in value:
            return default
        value = value[section]
    return value


def put(nested: dict[str, Any], dotted: str, value: object, where: str) -> None:
    """Set ``nested["a"]["b"] = value`` for the key ``a.b``.

    Raises ConfigError if a value is where a table is needed, or a table where a value is set.
    """
    *sections, last = dotted.split(".")
    for section in sections:
        nested = nested.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"{where}: {section} is a table, as in {{'{dotted}': ...}}, not {nested!r}")
    if isinstance(nested.get(last), dict) and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {dotted} is a table, as in {nested[last]!r}, not {value!r}")
    nested[last] = value


def load_toml(path: Path, kind: str) -> dict[str, Any]:
    """Read a TOML file merged over its chain of `base` files; the key `base` is removed.

    A base is a path relative to the file, or a name that `shipped.find(kind, ...)` knows.
    Raises ConfigError for a missing or malformed file and for a circular chain of bases.
    """
    path = Path(path)
    chain: list[Path] = []
    layers: list[dict[str, Any]] = []
    while True:
        if any(path.resolve() == seen.resolve() for seen in chain):
            circle = " -> ".join(str(p) for p in [*chain, path])
            raise ConfigError(f"{chain[0]}: circular base files: {circle}; remove one `base`")
        chain.append(path)
        values = _parse(path)
        layers.append(values)
        if "base" not in values:
            break
        base = values.pop("base")
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{path}: base: expected the name or path of one {kind}, got {quoted(base)}")
        path = _find_base(base, path, kind)
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = merge_tables(merged, layer)
    return merged


def read(cls: type[T], path: Path, kind: str) -> T:
    """Read a TOML file, with its bases, into a `cls`."""
    return build(cls, load_toml(path, kind), str(path))


# -------------------------------------------------------------------------------------------- building values


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Create the dataclass `cls` from plain TOML values.

    `where` (usually a file) starts every error message. Raises ConfigError for an unknown or missing key or
    a wrong type.
    """
    return _dataclass(cls, values, where, "")


def _dataclass(cls: type[T], values: Any, where: str, key: str) -> T:
    if not isinstance(values, Mapping):
        raise _wrong(where, key, "a table", values)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            inside = f" in [{key}]" if key else ""
            raise ConfigError(f"{where}: unknown key {quoted(name)}{inside}{did_you_mean(str(name), fields)}")
    arguments: dict[str, Any] = {}
    missing: list[str] = []
    for name, field in fields.items():
        at = f"{key}.{name}" if key else name
        if name in values:
            arguments[name] = _value(hints[name], values[name], where, at)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(f"{at!r} ({_name(hints[name])})")
    if missing:
        raise ConfigError(f"{where}: missing key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    try:
        return cls(**arguments)
    except VlafitError as error:  # from a __post_init__, which knows the value but not its file
        raise ConfigError(f"{where}: {f'[{key}]: ' if key else ''}{error}") from error


def _value(kind: Any, value: Any, where: str, key: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(args, value, where, key)
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            options = ", ".join(repr(a) for a in args)
            near = (
                did_you_mean(value, [a for a in args if isinstance(a, str)]) if isinstance(value, str) else ""
            )
            hint = near if "did you mean" in near else ""
            raise ConfigError(f"{where}: {key}: {quoted(value)} is not one of {options}{hint}")
        return value
    if origin is tuple:
        return _tuple(args, value, where, key)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, key, "a table", value)
        return {name: _value(args[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, key)  # type: ignore[arg-type]
    if kind in (object, Any):
        _plain(value, where, key)
        return value
    if kind is float and type(value) in (int, float):
        if not -LARGEST <= value <= LARGEST:  # infinity and NaN, too
            raise _wrong(where, key, "a number below 2^63", value)
        return float(value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind in (bool, int, str) and type(value) is kind:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise _wrong(where, key, "a whole number below 2^63", value)
        return value
    if kind in (bool, int, str, float, Path):
        raise _wrong(where, key, _name(kind), value)
    raise TypeError(f"config fields of type {kind} are not supported ({key})")


def _union(args: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    options = [a for a in args if a is not type(None)]
    if value is None and len(options) < len(args):
        return None
    errors = []
    for option in options:
        try:
            return _value(option, value, where, key)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(where, key, " or ".join(_name(a) for a in options), value)


def _tuple(args: tuple[Any, ...], value: Any, where: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, key, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        kinds = [args[0]] * len(value)
    elif len(args) == len(value):
        kinds = list(args)
    else:
        raise ConfigError(f"{where}: {key}: expected a list of {len(args)} values, got {len(value)}")
    return tuple(
        _value(k, v, where, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    )


def _plain(value: Any, where: str, key: str) -> None:
    """Accept only what both TOML and `dump` support: text, numbers, booleans, lists and tables of them."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _plain(item, where, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _plain(item, where, f"{key}[{i}]")
    elif type(value) not in (bool, int, float, str) or (isinstance(value, float) and math.isnan(value)):
        raise _wrong(where, key, "text, a number, a boolean, a list or a table", value)


def _name(kind: Any) -> str:
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if kind in plain:
        return plain[kind]
    origin = get_origin(kind)
    if origin is tuple:
        return "a list"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in get_args(kind) if a is not type(None))
    return "a table"


def _wrong(where: str, key: str, expected: str, value: Any) -> ConfigError:
    at = f"{where}: {key}: " if key else f"{where}: "
    return ConfigError(f"{at}expected {expected}, got {quoted(value)}")


# --------------------------------------------------------------------------------------------------- writing


def dump(value: Any) -> str:
    """Return a dataclass as TOML text; `build` reads it back as an equal value.

    A key whose value is None is left out. Raises ConfigError for a value that TOML cannot represent.
    """
    lines: list[str] = []
    _table(_items(value), "", lines)
    return "\n".join(lines).strip("\n") + "\n"


def _items(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return dict(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or dataclasses.is_dataclass(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(_is_table(v) for v in value)


def _table(items: Mapping[str, Any], at: str, lines: list[str]) -> None:
    """Write plain values first, because a TOML header ends the table above it."""
    subtables = []
    for name, value in items.items():
        if _is_table(value) or _is_tables(value):
            subtables.append((f"{at}.{_key(name)}" if at else _key(name), value))
        elif value is not None:
            lines.append(f"{_key(name)} = {_inline(value)}")
    for path, value in subtables:
        for table in value if _is_tables(value) else [value]:
            lines += ["", f"[[{path}]]" if _is_tables(value) else f"[{path}]"]
            _table(_items(table), path, lines)


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _inline(name)


def _inline(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case int():
            return str(value)
        case float() if not math.isnan(value):
            return repr(value)
        case list() | tuple():
            return "[" + ", ".join(_inline(v) for v in value) + "]"
        case _ if _is_table(value):
            pairs = (f"{_key(k)} = {_inline(v)}" for k, v in _items(value).items() if v is not None)
            return "{ " + ", ".join(pairs) + " }"
    raise ConfigError(f"{value!r} cannot be written as TOML")


# ------------------------------------------------------------------------------------------------------ help


def field_help(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, by the field's name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    help_texts: dict[str, str] = {}
    for statement, following in pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                help_texts[name] = inspect.cleandoc(text)
    return help_texts
