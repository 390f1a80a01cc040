"""NVIDIA's checkpoints of GR00T N1.7: config.json, weights, and the codec that vlafit puts beside them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlafit.checkpoints.codecs import ChosenCodec
from vlafit.checkpoints.formats.base import AdapterSupport, CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.groot import config, names
from vlafit.checkpoints.formats.groot import write as writing
from vlafit.checkpoints.formats.native.read import CODEC
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.options import LoadOptions
from vlafit.codec import Codec, CodecSet
from vlafit.nn.policy import Policy

FIXED = ("max_tokens",)  # no program limits an instruction
LAYOUT = {"NVIDIA's GR00T": ("action_head.", "backbone.model.")}


class GrootAdapters(AdapterSupport):
    """peft puts adapters on the modules of NVIDIA's classes."""

    def names(self, family: str) -> NameMap | None:
        """Return the names of the modules in memory."""
        return names.NAMES if family == "groot" else None

    def refusals(self, policy: Policy, layers: Sequence[str]) -> list[str]:
        """Say which layers are no modules there."""
        return names.table_refusals(layers)


class Groot(Format):
    """The checkpoints that NVIDIA publishes and its trainer saves; our export adds a codec."""

    name = names.FORM
    target = "groot"
    layouts = LAYOUT
    adapters = GrootAdapters()
    no_codec = "vlafit does not read NVIDIA's processors; fine-tuning fits a codec to the data"

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are NVIDIA's of N1.7."""
        every = list(files.tensor_names)
        return names.recognise(every)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names and read config.json, the backbone's, and our codec where it lies beside."""
        words = options.open_tokenizer()
        values, stated, steps = config.evidence(files.folder, words)
        codec = CodecSet.load(files.folder) if (files.folder / CODEC).is_file() else None
        values.setdefault("max_tokens", config.MAX_TOKENS if codec is None else codec.max_tokens)
        translated = names.read(files.tensors)
        return OpenedCheckpoint(
            str(files.path),
            self,
            "groot",
            translated,
            ConfigEvidence(values, stated, fixed=FIXED),
            steps=steps,
            own_codec=codec,
        )

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Return our own codec where it lies beside. A tokenizer only tells the tokens of a chat turn."""
        told = opened.own_codec is None and policy.config.chat != config.CHAT
        return super().codec(opened, policy, replace(options, tokenizer=None) if told else options)

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what NVIDIA's program cannot hold."""
        return writing.refusals(policy, codec)

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write config.json, weights, the backbone's config where it is not public, and our codec."""
        return writing.write(folder, policy, codec)


FORMAT = Groot()
