"""Options of `load`, checked before the checkpoint is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from vlafit import config as configuration
from vlafit.checkpoints.assign import DTYPES, Dtype
from vlafit.codec.tokenizer import Tokenizer
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.errors import ConfigError, WeightsError, did_you_mean, quoted

WIDTHS = ("state_dim", "action_dim")  # what `resize` may change of a checkpoint

Resize = Literal["refuse", "keep", "fresh"]


@dataclass(frozen=True)
class OptionTable:
    """A table of `load`'s config that belongs to a format instead of the policy."""

    name: str
    purpose: str
    """Which checkpoints it is for and what it does, for messages."""
    for_weights: bool = False
    """Whether the same weights can only be read again with it."""


@dataclass(frozen=True)
class ConfigOverrides:
    """The argument `config` of `load`, nested and split."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the policy's config, without the widths."""
    widths: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Option tables of formats, by name."""
    for_weights: frozenset[str] = frozenset()
    """Names of the tables without which the same weights cannot be read again."""

    @property
    def for_a_codec(self) -> bool:
        """Whether there is a table that only decides about a codec."""
        return bool(set(self.tables) - self.for_weights)

    def table(self, name: str) -> Mapping[str, Any]:
        """Return an option table; empty where the caller gives none."""
        return self.tables.get(name, {})

    def to_read_again(self) -> dict[str, Any]:
        """Return the config with which `load` reads the same weights again."""
        return {
            **self.fields,
            **{name: self.tables[name] for name in sorted(self.for_weights & set(self.tables))},
        }

    def of_weights(self) -> dict[str, Any]:
        """Return the config without the tables that only decide about a codec."""
        return {**self.to_read_again(), **self.widths}

    def refuse(self, table: str, where: str, reason: str) -> None:
        """Raise ConfigError if the caller gives the option table `table`, which has no effect here."""
        if self.table(table):
            keys = ", ".join(f"{table}.{key}" for key in self.table(table))
            raise ConfigError(f"{where}: config: {keys} would have no effect: {reason}")


@dataclass(frozen=True)
class LoadOptions:
    """Everything that the caller of `load` may ask for, but the device and the generator; see `load`."""

    config: ConfigOverrides = field(default_factory=ConfigOverrides)
    base: str | Path | None = None
    tokenizer: str | Path | Tokenizer | None = None
    assets: str | Path | None = None
    dtype: Dtype = "float32"
    fresh: Sequence[str] = ()
    resize: Resize = "refuse"
    hash_weights: bool = True
    """Whether the hashes of weight files are compared where the format keeps them; every byte is read
    then.
    """

    adapters: Path | None = None
    """The folder of the adapters that are put on this checkpoint; a format may read files beside them."""
    trust: Sequence[str] = ()
    """Packages from which the module of a checkpoint's policy family may be imported."""
    relative: tuple[bool, ...] | None = None
    """Which actions the agreement.json beside the weights calls relative; None: there is none."""

    def __post_init__(self) -> None:
        if isinstance(self.trust, str):
            raise ConfigError(f"trust is a list of packages: [{self.trust!r}], not {self.trust!r}")
        if self.resize not in (ways := get_args(Resize)):
            raise WeightsError(f"resize {self.resize!r} is not known{did_you_mean(self.resize, ways)}")
        if isinstance(self.fresh, str):
            raise ConfigError(f"fresh is a list of parts and patterns: [{self.fresh!r}], not {self.fresh!r}")

    def open_tokenizer(self) -> Tokenizer | None:
        """Return the caller's tokenizer, loaded if a folder was given."""
        words = self.tokenizer
        return load_tokenizer(words) if isinstance(words, str | Path) else words


def split_config(config: Mapping[str, object] | None, tables: Mapping[str, OptionTable]) -> ConfigOverrides:
    """Split `config`, with nested or dotted keys, into policy fields, widths and the option `tables` of
    formats.

    Raises ConfigError where an option table is given as a value, or a key twice, or is no text.
    """
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"config is a mapping such as {{'vision.heads': 2}}, not {config!r}")
    nested: dict[str, Any] = {}
    leaves: dict[str, object] = {}
    for key, value in (config or {}).items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise ConfigError(f"config: {key!r} is no key; keys are text such as 'chunk' or 'vision.heads'")
        for dotted, leaf in _leaves(key, value):
            if dotted in leaves:
                raise ConfigError(f"config: {dotted} is given twice: {leaves[dotted]!r} and {leaf!r}")
            leaves[dotted] = leaf
            configuration.put(nested, dotted, leaf, "config")
    for name in tables:
        if name in nested and not isinstance(nested[name], Mapping):
            raise _not_a_table("config", name, nested[name])
    widths = {key: nested.pop(key) for key in WIDTHS if key in nested}
    options = {name: nested.pop(name) for name in tables if name in nested}
    return ConfigOverrides(nested, widths, options, frozenset(n for n, t in tables.items() if t.for_weights))


def require_known_keys(given: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a key that the policy's `config` (as nested values) does not have."""
    for key, value in given.items():
        if key not in config:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, config)}")
        if not isinstance(config[key], Mapping):
            continue
        if not isinstance(value, Mapping):
            raise _not_a_table(where, key, value)
        require_known_keys(value, config[key], f"{where}: {key}")


def _not_a_table(where: str, name: str, value: object) -> ConfigError:
    return ConfigError(f"{where}: {name} is a table, as in {{'{name}.name': ...}}, not {value!r}")


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the values below `key` with their dotted keys; an empty table is a value."""
    if not isinstance(value, Mapping) or not value:
        yield key, value
        return
    for name, inner in value.items():
        if not isinstance(name, str):
            raise ConfigError(f"config: {key}: {name!r} is no key; keys are text")
        yield from _leaves(f"{key}.{name}", inner)


def parse_dtype(dtype: str | torch.dtype) -> Dtype:
    """Return the name of a dtype, given by name or as torch's. Raises WeightsError where it is not
    supported.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if not isinstance(name, str) or name not in DTYPES:
        ways = ", ".join(f"{known!r} or torch.{known}" for known in DTYPES)
        raise WeightsError(
            f"dtype {quoted(dtype)} is not one that policies are loaded or written in: give {ways}"
        )
    return cast(Dtype, name)
