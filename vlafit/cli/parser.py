"""argparse, with errors that are ours, and options for every field of a config class."""

import argparse
import dataclasses
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from vlafit import config
from vlafit.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, names the nearest option, and takes no abbreviations."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say."""
        raise ConfigError(f"{message}; {self.prog} --help shows how")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all of `arguments`. An option with a value is given once, unless it collects several."""
        once = {
            word
            for action in self._actions
            if action.nargs != 0 and not isinstance(action, argparse._AppendAction)
            for word in action.option_strings
        }
        require_once(word.partition("=")[0] for word in arguments if word.partition("=")[0] in once)
        found, unknown = self.parse_known_args(list(arguments))
        for word in unknown:
            if word.startswith("-"):
                known = [s for action in self._actions for s in action.option_strings]
                raise ConfigError(f"there is no option {word!r}{_near(word.split('=')[0], known)}")
            raise ConfigError(f"{word!r} is one argument too many; {self.prog} --help shows how")
        return found


def require_once(options: Iterable[str]) -> None:
    """Raise ConfigError for an option that is given twice: which of its values is meant, nobody can tell."""
    for option, times in Counter(options).items():
        if times > 1:
            raise ConfigError(f"{option} is given {times} times; give it once")


def _near(word: str, known: Sequence[str]) -> str:
    within = [k for k in known if k.endswith("." + word.lstrip("-"))]  # --lr for --optim.lr
    if within:
        return f"; did you mean {within[0]!r}?"
    near = did_you_mean(word, known)
    return near if "did you mean" in near else "; --help lists all options"


@dataclass(frozen=True)
class Field:
    """A leaf of a config class: its dotted name, type and help."""

    name: str
    kind: Any
    help: str
    default: Any

    @property
    def is_table(self) -> bool:
        origin = get_origin(self.kind)
        return (
            origin is not None
            and origin is not Literal
            and isinstance(origin, type)
            and issubclass(origin, Mapping)
        )


def fields(cls: type, values: Any, prefix: str = "") -> Iterator[Field]:
    """Yield every leaf field of a config class, with its value in the instance `values`."""
    hints, helps = typing.get_type_hints(cls), config.field_help(cls)
    for field in dataclasses.fields(cls):
        value, kind = getattr(values, field.name), hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from fields(typing.cast(type, kind), value, f"{prefix}{field.name}.")
        else:
            yield Field(prefix + field.name, kind, helps.get(field.name, ""), value)


def add_fields(parser: Parser, cls: type, values: Any) -> None:
    """Give `parser` an option for every field of `cls`; the help shows its value in `values`."""
    groups: dict[str, Any] = {}
    for field in fields(cls, values):
        section = field.name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(
                f"[{section}] in the recipe" if section else "in the recipe"
            )
        shown = field.default
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        shown = str(shown).lower() if isinstance(shown, bool) else shown
        now = f" [{shown}]" if shown not in ("", {}) else ""
        if field.is_table:
            groups[section].add_argument(
                f"--{field.name}.KEY",
                metavar="VALUE",
                dest=field.name,
                default=argparse.SUPPRESS,
                help=field.help + now,
            )
            continue
        many = get_origin(field.kind) is tuple
        groups[section].add_argument(
            f"--{field.name}",
            dest=field.name,
            default=argparse.SUPPRESS,
            nargs="*" if many else None,
            metavar=_metavar(field.kind),
            help=(field.help + now).replace("%", "%%"),
        )


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) in (typing.Union, types.UnionType):
        return _metavar(next(a for a in get_args(kind) if a is not type(None)))
    return {bool: "true|false", int: "N", float: "NUMBER"}.get(kind, "TEXT")


def split_tables(cls: type, values: Any, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the options of table fields (``--policy.config.KEY VALUE``) out of `arguments`.

    Returns the other arguments (dashes in names of fields made underscores), and the tables' values, nested.
    """
    tables = [f"--{f.name}." for f in fields(cls, values) if f.is_table]
    rest: list[str] = []
    nested: dict[str, Any] = {}
    given: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        table = next((t for t in tables if name.startswith(t)), "")
        if not table:
            dotted = name.startswith("--") and "." in name
            rest.append(("--" + name[2:].replace("-", "_") if dotted else name) + equals + value)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"option {name!r} needs a value")
        given.append(name)
        put(nested, name[2:], _toml_value(value))
    require_once(given)
    return rest, nested


def _toml_value(text: str) -> Any:
    """Read TOML's numbers, booleans, lists and inline tables; anything else is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def key_value(text: str) -> tuple[str, Any]:
    """Read ``KEY=VALUE``; the value is TOML's, or text."""
    key, equals, value = text.partition("=")
    if not (equals and key.strip()):
        raise ConfigError(f"{text!r} is not KEY=VALUE")
    return key.strip(), _toml_value(value)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option ``--config KEY=VALUE``, which `settings` reads."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the checkpoint does not tell of itself, such as vision.heads=16; may be given again",
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option ``--format``, which names the checkpoint's format instead of detecting it."""
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="format of CHECKPOINT, if its contents do not show it: a name, or a module (package.module)",
    )


def settings(pairs: Sequence[str]) -> dict[str, Any] | None:
    """Return what the options ``--config KEY=VALUE`` say; None where there is none."""
    read = [key_value(pair) for pair in pairs]
    twice = [key for i, (key, _) in enumerate(read) if key in dict(read[:i])]
    if twice:
        raise ConfigError(f"--config gives {twice[0]} twice")
    return dict(read) or None


def put(nested: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``nested["a"]["b"] = value`` for the name ``a.b``."""
    *sections, last = dotted.split(".")
    for section in sections:
        nested = nested.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--{dotted}: {section!r} has a value already and cannot hold keys, too")
    nested[last] = value


def overrides(cls: type, values: Any, namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the fields given on the command line, nested, as values that `config.build` judges."""
    given = vars(namespace)
    nested: dict[str, Any] = {}
    for field in fields(cls, values):
        if field.name in given and not field.is_table:
            put(nested, field.name, _typed(field.kind, given[field.name]))
    return nested


def _typed(kind: Any, text: Any) -> Any:
    """Make numbers and booleans of text where the field wants them; else it stays text, for the error."""
    if isinstance(text, list):
        return [_typed(get_args(kind)[0], one) for one in text]
    if get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(a for a in get_args(kind) if a is not type(None))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        if kind in (int, float):
            return float(text) if kind is float else int(text)
    except (KeyError, ValueError):
        return text
    return text
