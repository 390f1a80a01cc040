"""The contract of a checkpoint format: detect, open, codec, refusals, write.

A format knows one program's files and nothing else: `load` assigns the tensors, `infer` finds the config, and
`export` asks for refusals before it calls `write`. docs/extending.md tells how to write one outside the
package.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlafit.checkpoints.assign import stored_as
from vlafit.checkpoints.codecs import ChosenCodec, fit_codec, refuse_codec_arguments
from vlafit.checkpoints.declaration import Declaration, Overruled
from vlafit.checkpoints.hub import Place
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap, Translated
from vlafit.checkpoints.options import LoadOptions, OptionTable
from vlafit.checkpoints.tensor_files import has_weight_files, open_tensors, weight_files
from vlafit.codec import Codec, CodecSet
from vlafit.errors import WeightsError
from vlafit.files import irregular, require_regular_files
from vlafit.nn.policy import ParameterInfo, Policy, Source
from vlafit.tuning import Plan

COMMON_FILES = ("*.safetensors", "*.json", "*.toml", "tokenizer/*")
"""Patterns of files that any format may read; `*` matches folders, too."""


SUFFIXES = (".json", ".jsonl", ".md", ".model", ".safetensors", ".toml", ".txt")
"""Of files that some format reads or asks for."""


class CheckpointFiles:
    """The files at a path, of which the tensors are mapped once when a format first asks for them.

    Raises VlafitError for a folder, pipe, socket or device in the place of a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        if self.folder == path:
            require_regular_files(path, SUFFIXES, deep=2)
        elif kind := irregular(path):
            raise WeightsError(f"{path}: not a regular file but {kind}; name a checkpoint's folder or file")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the safetensors files, by their names there; no number is read before it is used.

        Raises WeightsError where there are no such files, or one is damaged.
        """
        return open_tensors(weight_files(self.path))

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of the tensors; empty where there are no safetensors files."""
        return self.tensors.keys() if has_weight_files(self.path) else ()


class StoredAdapters(ABC):
    """Adapters (and quantisation) of a checkpoint that are put into the policy once its weights are
    filled.
    """

    @abstractmethod
    def plan(self, policy: Policy) -> Plan:
        """Return where they sit. The bare `policy` may be on the meta device."""

    @abstractmethod
    def attach(self, policy: Policy, plan: Plan) -> None:
        """Put them into the filled `policy`. Raises WeightsError naming every tensor that is wrong."""


@dataclass(frozen=True)
class AdapterSettings:
    """Settings that files beside adapters state and that no tensor of the base depends on: they hold."""

    config: Mapping[str, object] = field(default_factory=dict)
    """Fields of the policy's config."""
    source: str = ""
    """The file that names the embodiment in `config`; empty where none does."""
    steps: int | None = None
    """Steps in which the policy samples actions; None where no file says."""
    overruled: tuple[Overruled, ...] = ()
    """The base's own settings that do not hold."""


class AdapterSupport(ABC):
    """How a program loads PEFT adapters on a policy of this format."""

    @abstractmethod
    def names(self, family: str) -> NameMap | None:
        """Return the program's module names for a family; None where it does not have that family."""

    def refusals(self, policy: Policy, layers: Sequence[str]) -> list[str]:
        """Return the reasons why the program cannot load adapters on these layers (the policy's names)."""
        return []

    def settings(self, folder: Path, base: Path) -> "AdapterSettings":
        """Return the settings of the policy in the files beside the adapters.

        Raises WeightsError where they are not of the policy in `base`.
        """
        return AdapterSettings()

    def codec_folder(self, folder: Path, base: Path) -> Path:
        """Return the folder of the codec's files: that of the adapters, or that of their base."""
        return base

    def write_beside(self, folder: Path, base: Path) -> None:  # noqa: B027 - most programs want nothing
        """Write into the adapters' `folder` the files that the program wants there, too."""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose headers are read: its tensors under the policy's names, its family and config."""

    path: str
    format: "Format"
    family: str
    tensors: Translated
    evidence: ConfigEvidence = field(default_factory=ConfigEvidence)
    """Statements of the files about the config, beside the shapes; not used where `config` is complete."""
    config: Any = None
    """The policy's config where the format records it; `load` fills it in elsewhere."""
    contents: Callable[[frozenset[str]], Iterable[tuple[str, Tensor]]] | None = None
    """Reads the numbers of at least the given names where `tensors` are on the meta device."""
    chunk: object = None
    """Actions at once that the checkpoint itself records; None where it does not."""
    steps: int | None = None
    """Steps in which its policy samples actions; None where it does not say: the family's own number."""
    max_delay: int = 0
    """Most steps of a chunk that its policy was trained to be given; see `vlafit.nn.clean_prefix`."""
    codec_folder: Path | None = None
    """Where the files lie that make its codec, for `Format.codec`."""
    statistics_of: str = ""
    """The base whose statistics and tokenizer its codec has; empty: its own."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of the file that are no weights and make its codec, for `Format.codec`."""
    own_codec: Codec | CodecSet | None = None
    """The codec in our own format that lies in the checkpoint; a set, if it has several embodiments."""
    codec_hint: str = ""
    """How to get a codec, for a report that is made without one."""
    plan: Plan | None = None
    adapters: StoredAdapters | None = None
    on_base: bool = False
    """Whether it sits on another checkpoint, so that the caller may say where that is."""
    source: Source | None = None
    """Where the weights below the adapters lie."""
    sha256: str = ""
    """A hash that stands for the checkpoint, where it is known without reading all files."""
    notes: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    """Lines that say what contradicts the tensors; reported together with all that is wrong."""


@dataclass(frozen=True)
class Opener:
    """Opens the checkpoint that another one sits on."""

    place: Callable[[str | Path], Place]
    """Find a checkpoint; see `vlafit.checkpoints.place`."""
    digest: Callable[[Path], str]
    """Hash a checkpoint; see `vlafit.checkpoints.digest`."""
    open: Callable[[Path, LoadOptions], OpenedCheckpoint]
    """Detect and open one with its config complete."""
    options: Callable[[Mapping[str, object] | None], LoadOptions]
    """Make options from a config in the form that `load` takes."""


class Format(ABC):
    """One program's checkpoints. A module of a format has one as `FORMAT`."""

    name: str
    """In reports and messages, such as "LeRobot"."""
    target: str = ""
    """After `vlafit export --to`; empty where vlafit does not write this format."""
    files: Sequence[str] = ()
    """Patterns of its files beside COMMON_FILES, for downloads from the Hub."""
    options: Sequence[OptionTable] = ()
    """Its own tables in the argument `config` of `load`."""
    layouts: Mapping[str, tuple[str, ...]] = {}
    """Kinds of tensor names in its files -> how each begins. Two kinds in one checkpoint are refused as a
    mix.
    """
    adapters: AdapterSupport | None = None
    """How its program loads PEFT adapters; None where it does not."""
    holds_columns: bool = False
    """Whether its own `refusals` look at what a codec learns of columns: poses, grippers, angles, steps.
    Other formats hold none of these.
    """
    takes_deferred = False
    """Whether `write` saves by `vlafit.nn.deferred.save_tensors`, which takes weights that are not in
    memory.
    """
    no_codec = "no statistics in the checkpoint"
    """Why a checkpoint without a codec has none."""

    @abstractmethod
    def detect(self, files: CheckpointFiles) -> bool:
        """Whether these files are of this format, whole or damaged, by their contents only."""

    @abstractmethod
    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Read the headers. Raises WeightsError for what vlafit cannot repeat exactly."""

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Return the codec of an opened checkpoint for its policy: the one it holds, unless overridden."""
        if opened.own_codec is None:
            refuse_codec_arguments(
                options, opened.path, f"a {self.name} checkpoint takes no {{name}}: {self.no_codec}"
            )
            return ChosenCodec(None, self.no_codec)
        refuse_codec_arguments(options, opened.path, "has a codec of its own; it takes no {name}")
        resized = bool(options.config.fields or options.config.widths)
        own = CodecSet.of(opened.own_codec)
        numbers = [codec.embodiment_id for codec in own if codec.embodiment_id is not None]
        needs = policy.needs()
        if numbers and not needs.embodiment_rows and needs.embodiment_field in options.config.fields:
            raise WeightsError(
                f"{opened.path}: config: {needs.embodiment_field} would have no effect: "
                "codec.json names the embodiment "
                f"{', '.join(map(str, numbers))}; change `id` there"
            )
        return ChosenCodec(CodecSet([fit_codec(codec, policy, resized, opened.path) for codec in own]))

    def base_of(self, files: CheckpointFiles, base: str | Path | None, opener: Opener) -> Path | None:
        """Return the checkpoint of another program that this one sits on, and None where it sits on none.

        `base` is where the user says that it lies. Raises WeightsError where it is not there.
        """
        return None

    def codec_of_headers(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Return the codec as far as it can be told without weights; the policy may be on the meta device."""
        if opened.own_codec is not None:
            return Format.codec(self, opened, policy, options)
        hint = f"; {opened.codec_hint}" if opened.codec_hint else ""
        return ChosenCodec(None, f"none in the checkpoint itself{hint}")

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether the checkpoint holds statistics that make a codec once the caller gives a tokenizer."""
        return False

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return what the files say of robot, actions and tokenizer."""
        return Declaration()

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what of the policy or codec this format cannot hold; empty where it can be written."""
        return [f"vlafit does not write {self.name} checkpoints"]

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write everything into the empty `folder`, which will lie at `final`; return notes for the user.

        The policy has no adapters, and `refusals` is empty.
        """
        raise WeightsError(f"vlafit does not write {self.name} checkpoints")

    def keeps_float32(self, info: ParameterInfo, policy: Policy) -> bool:
        """Whether the program keeps a parameter in float32 when the policy is bfloat16."""
        return stored_as(info, torch.bfloat16) == torch.float32
