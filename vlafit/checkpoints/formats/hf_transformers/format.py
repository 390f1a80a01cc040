"""transformers' checkpoints of pi0, as PI0ForConditionalGeneration saves them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from vlafit.checkpoints.formats import stated_type, unsupported
from vlafit.checkpoints.formats.base import AdapterSupport, CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.hf_transformers import names
from vlafit.checkpoints.formats.hf_transformers import write as writing
from vlafit.checkpoints.formats.native.read import CODEC
from vlafit.checkpoints.name_map import NameMap, translate
from vlafit.checkpoints.options import LoadOptions
from vlafit.codec import Codec, CodecSet
from vlafit.nn.policy import ParameterInfo, Policy


class TransformersAdapters(AdapterSupport):
    """peft puts adapters on transformers' own modules, of which some are of another kind than vlafit's."""

    def names(self, family: str) -> NameMap | None:
        """Return the names of the modules in memory."""
        return names.LIVE if family == "pi0" else None

    def refusals(self, policy: Policy, layers: Sequence[str]) -> list[str]:
        """Say which layers transformers has as modules of another kind, or under names that peft changes."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = dict(writing.skeleton(policy.config).named_modules())

        def module_name(layer: str) -> str:
            return names.LIVE.file_name(f"{layer}.weight").removesuffix(".weight")

        renamed = [layer for layer in layers if module_name(layer).startswith("embed_action_time.")]
        if renamed:
            return [
                f"peft does not find the adapters of {', '.join(renamed)} again when it loads them (names "
                "that "
                "begin with embed_action_time are renamed twice there): add --merge"
            ]
        different = []
        for layer in layers:
            module = policy.get_submodule(layer)
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if not _is_alike(module, modules.get(module_name(layer))):
                different.append(layer)
        if different:
            return [
                f"transformers has no layer of the kind of {different[0]} ({len(different)} such): add "
                "--merge"
            ]
        return []


class Transformers(Format):
    """The checkpoints of pi0 that transformers' `save_pretrained` writes; our export adds a codec."""

    name = names.SAVED.form
    target = "transformers"
    takes_deferred = True
    layouts = names.LAYOUT
    adapters = TransformersAdapters()

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are those that transformers saves."""
        return names.recognise(files.tensor_names)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names and read config.json, and our codec where it lies beside."""
        unsupported.refuse(files.tensors, str(files.path))
        stated_type.require(files.folder, str(files.path), "pi0", "pi0")
        translated = translate(files.tensors, names.SAVED)
        evidence = names.config_evidence(files.tensors, files.folder)
        codec = CodecSet.load(files.folder) if (files.folder / CODEC).is_file() else None
        if codec is not None:
            evidence = replace(evidence, values={**evidence.values, "max_tokens": codec.max_tokens})
        return OpenedCheckpoint(str(files.path), self, "pi0", translated, evidence, own_codec=codec)

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what transformers cannot hold. It knows nothing of codecs."""
        return writing.refusals(policy, codec)

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write what transformers' own class saves, and our codec."""
        return writing.write(folder, policy, codec)  # type: ignore[arg-type] # refusals looked at it

    def keeps_float32(self, info: ParameterInfo, policy: Policy) -> bool:
        """Return that transformers keeps nothing of pi0 in float32."""
        return False


def _is_alike(module: nn.Module, other: nn.Module | None) -> bool:
    for kind in (nn.Linear, nn.Conv2d, nn.Embedding):
        if isinstance(module, kind):
            return isinstance(other, kind) and other.weight.shape == _shape(module)
    return False


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, also where its numbers are packed."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)  # type: ignore[union-attr]


FORMAT = Transformers()
