"""An argparse parser that raises ConfigError, and options for every field of a config class."""

import argparse
import dataclasses
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from vlafit import config
from vlafit.errors import ConfigError, did_you_mean, quoted, shown_whole

EXECUTION_MODES = ("chunk", "ensemble", "real_time")  # vlafit.execution.Mode, which help must not import


MOST_STEPS = 10**9


def within(
    least: float, most: float, kind: type[int] | type[float] = int, *, above: bool = False
) -> Callable[[str], Any]:
    """Return the type of an option that is a number from `least` to `most`; `above` leaves out the least.

    Anything else is a slip, and refused by the option's name, with the value and what is allowed.
    """
    noun = "a whole number" if kind is int else "a number"
    low, high = (shown_whole(end) if isinstance(end, int) else f"{end:.16g}" for end in (least, most))
    span = f"above {low} and at most {high}" if above else f"from {low} to {high}"

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(f"must be {noun} {span}, not {quoted(text, 60)}")
        return value

    read.__name__ = kind.__name__
    return read


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, names the nearest option, and accepts no abbreviations."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        )

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all of `arguments`. An option with a value may occur once, unless it collects several."""
        once = {
            word
            for action in self._actions
            if action.nargs != 0 and not isinstance(action, argparse._AppendAction)
            for word in action.option_strings
        }
        require_once(word.partition("=")[0] for word in arguments if word.partition("=")[0] in once)
        options, unknown = self.parse_known_args(list(arguments))
        for word in unknown:
            if word.startswith("-"):
                known = [s for action in self._actions for s in action.option_strings]
                raise ConfigError(f"there is no option {word!r}{_near(word.split('=')[0], known)}")
            raise ConfigError(f"unexpected argument {word!r}; see {self.prog} --help")
        return options

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse an option that is given an empty text; only fields of a recipe may be empty."""
        if "" in arg_strings and action.default != argparse.SUPPRESS:
            name = next(iter(action.option_strings), action.metavar or action.dest)
            raise ConfigError(
                f"{name} is empty: a shell variable that is not set? Give it a value, or leave it out"
            )
        return super()._get_values(action, arg_strings)


def require_once(options: Iterable[str]) -> None:
    """Raise ConfigError for an option that is given twice, because it is unclear which value is meant."""
    for option, times in Counter(options).items():
        if times > 1:
            raise ConfigError(f"{option} is given {times} times; give it once")


def _near(word: str, known: Sequence[str]) -> str:
    fields_of_name = [k for k in known if k.endswith("." + word.lstrip("-"))]  # --lr for --optim.lr
    if fields_of_name:
        return f"; did you mean {fields_of_name[0]!r}?"
    near = did_you_mean(word, known)
    return near if "did you mean" in near else "; --help lists all options"


@dataclass(frozen=True)
class Field:
    """A leaf field of a config class: its dotted name, type and help."""

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
    """Add an option for every field of `cls` to `parser`; the help shows its value in `values`."""
    groups: dict[str, Any] = {}
    for field in fields(cls, values):
        section = field.name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(
                f"[{section}] in the recipe" if section else "in the recipe"
            )
        default = field.default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        default = str(default).lower() if isinstance(default, bool) else default
        suffix = f" [{default}]" if default not in ("", {}) else ""
        if field.is_table:
            groups[section].add_argument(
                f"--{field.name}.KEY",
                metavar="VALUE",
                dest=field.name,
                default=argparse.SUPPRESS,
                help=field.help + suffix,
            )
            continue
        many = get_origin(field.kind) is tuple
        groups[section].add_argument(
            f"--{field.name}",
            dest=field.name,
            default=argparse.SUPPRESS,
            nargs="*" if many else None,
            metavar=_metavar(field.kind),
            help=(field.help + suffix).replace("%", "%%"),
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
    """Split the options of table fields (``--policy.config.KEY VALUE``) from `arguments`.

    Returns the other arguments (with underscores for dashes in field names) and the tables' nested values.
    """
    tables = [f"--{f.name}." for f in fields(cls, values) if f.is_table]
    rest: list[str] = []
    table_options: list[tuple[str, str]] = []
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
        table_options.append((name, value))
    require_once(name for name, _ in table_options)
    nested: dict[str, Any] = {}
    for name, value in table_options:
        config.put(nested, name[2:], _toml_value(value), name)
    return rest, nested


def _toml_value(text: str) -> Any:
    """Parse a TOML number, boolean, list or inline table; anything else is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def key_value(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``; the value is TOML or text."""
    key, equals, value = text.partition("=")
    if not (equals and key.strip()):
        raise ConfigError(f"{text!r} is not KEY=VALUE")
    return key.strip(), _toml_value(value)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--config KEY=VALUE``, which `settings` reads."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a config value that the checkpoint does not record, such as vision.heads=16; may be repeated",
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option ``--format``, which names the checkpoint's format instead of detecting it."""
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="format of CHECKPOINT, if its contents do not show it: a name, or a module (package.module)",
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option ``--base``, which names the base of a checkpoint."""
    parser.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="the one that CHECKPOINT sits on (its base), if it moved since CHECKPOINT was saved",
    )


def add_embodiment(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option ``--embodiment``, which names one of those that a checkpoint learned."""
    parser.add_argument(
        "--embodiment",
        default="",
        metavar="NAME",
        help="the robot, if CHECKPOINT learned several [the only one]",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the option ``--trust``, which names packages whose policy families may be imported."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="import the checkpoint's policy family from this package, which runs its code; may be repeated",
    )


def settings(pairs: Sequence[str]) -> dict[str, Any] | None:
    """Return the values of the options ``--config KEY=VALUE``; None without any."""
    parsed = [key_value(pair) for pair in pairs]
    duplicates = [key for i, (key, _) in enumerate(parsed) if key in dict(parsed[:i])]
    if duplicates:
        raise ConfigError(f"--config sets {duplicates[0]} twice; set it once")
    return dict(parsed) or None


def overrides(cls: type, values: Any, namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the fields set on the command line as nested values, for `config.build` to check."""
    options = vars(namespace)
    nested: dict[str, Any] = {}
    for field in fields(cls, values):
        if field.name in options and not field.is_table:
            config.put(nested, field.name, _typed(field.kind, options[field.name]), f"--{field.name}")
    return nested


def _typed(kind: Any, text: Any) -> Any:
    """Convert text to the field's number or boolean type; keep invalid text for `config.build` to report."""
    if isinstance(text, list):
        if len(text) == 1 and text[0].startswith("[") and isinstance(listed := _toml_value(text[0]), list):
            return listed
        return [_typed(get_args(kind)[0], word) for word in text]
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
