"""What a user says of a checkpoint, judged before the checkpoint is looked at: `config` and `dtype`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from vlafit.checkpoints.assign import DTYPES, Dtype
from vlafit.errors import ConfigError, WeightsError

WIDTHS = ("state_dim", "action_dim")  # what `resize` may change of a checkpoint
SECTIONS = ("vision", "language", "expert")  # tables in the config of every family
OPTIONS = {  # tables that are not the policy's, and the form of checkpoint that each is for
    "codec": "openpi's checkpoints (PyTorch or JAX): how their statistics become a codec",
    "lora": "openpi's JAX checkpoints with LoRA: how their factors are merged",
}


@dataclass(frozen=True)
class Given:
    """The argument `config`, nested and taken apart."""

    fields: Mapping[str, Any]
    """Of the policy's config, the widths left out."""
    widths: Mapping[str, Any]
    codec: Mapping[str, Any]
    """See `openpi_assets.CodecOptions`."""
    lora: Mapping[str, Any]
    """See `openpi_jax.LoraConfig`."""

    def to_read_again(self) -> dict[str, Any]:
        """Return what it takes to read the same weights once more, as `load` takes it."""
        return {**self.fields, **({"lora": self.lora} if self.lora else {})}

    def refuse(self, table: str, where: str, why: str) -> None:
        """Raise ConfigError if something was given for `table` ("codec" or "lora"), which has no effect."""
        if getattr(self, table):
            keys = ", ".join(f"{table}.{key}" for key in getattr(self, table))
            raise ConfigError(f"{where}: config: {keys} would have no effect: {why}")

    def refuse_options(self, form: str, where: str) -> None:
        """Raise ConfigError for tables that a checkpoint of `form` has nothing to do with."""
        for table, use in OPTIONS.items():
            self.refuse(table, where, f"this is a {form} checkpoint, and {table}.* is for {use}")


def take_apart(config: Mapping[str, object] | None) -> Given:
    """Return what `config`, with nested or dotted keys, says.

    Raises ConfigError where a table is given as a value, or a key twice, or is no text.
    """
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"config is a mapping such as {{'vision.heads': 2}}, not {config!r}")
    nested: dict[str, Any] = {}
    for key, value in (config or {}).items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise ConfigError(f"config: {key!r} is no key; keys are text such as 'chunk' or 'vision.heads'")
        _put(nested, key.split("."), value, key)
    for table in (*SECTIONS, *OPTIONS):
        if table in nested and not isinstance(nested[table], Mapping):
            raise ConfigError(
                f"config: {table} is a table, as in {{'{table}.name': ...}}, not {nested[table]!r}"
            )
    widths = {key: nested.pop(key) for key in WIDTHS if key in nested}
    codec, lora = nested.pop("codec", {}), nested.pop("lora", {})
    return Given(nested, widths, codec, lora)


def _put(nested: dict[str, Any], words: list[str], value: object, key: str) -> None:
    head, *rest = words
    if isinstance(value, Mapping) and not rest:
        for name, one in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"config: {key}: {name!r} is no key; keys are text")
            _put(nested, [head, *name.split(".")], one, f"{key}.{name}")
        nested.setdefault(head, {})
    elif rest:
        inner = nested.setdefault(head, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"config: {head} is a table, as in {{'{key}': ...}}, not {inner!r}")
        _put(inner, rest, value, key)
    elif head in nested:
        raise ConfigError(f"config: {key} is given twice: {nested[head]!r} and {value!r}")
    else:
        nested[head] = value


def dtype_of(said: str | torch.dtype) -> Dtype:
    """Return the name of a dtype, given so or as torch's. Raises WeightsError where it is none of ours."""
    name = str(said).removeprefix("torch.") if isinstance(said, torch.dtype) else said
    if not isinstance(name, str) or name not in DTYPES:
        ways = ", ".join(f"{one!r} or torch.{one}" for one in DTYPES)
        raise WeightsError(f"dtype {said!r} is not one that policies are loaded or written in: give {ways}")
    return cast(Dtype, name)
