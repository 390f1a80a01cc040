"""openpi's checkpoints: PyTorch files of pi0 and pi0.5, and JAX's Orbax folders."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from vlafit.checkpoints.codecs import GIVE_TOKENIZER, ChosenCodec, require_vocabulary
from vlafit.checkpoints.declaration import Declaration
from vlafit.checkpoints.formats import stated_type, unsupported
from vlafit.checkpoints.formats.base import AdapterSupport, CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.openpi import jax, names, norm_stats
from vlafit.checkpoints.formats.openpi import write as writing
from vlafit.checkpoints.formats.openpi.orbax import find_params, open_leaves
from vlafit.checkpoints.name_map import NameMap, Translated, translate
from vlafit.checkpoints.options import ConfigOverrides, LoadOptions, OptionTable
from vlafit.codec import Codec
from vlafit.errors import ConfigError, WeightsError
from vlafit.nn.policy import ParameterInfo, Policy

CODEC = OptionTable("codec", "openpi's checkpoints (PyTorch or JAX): how their statistics become a codec")
LORA = OptionTable(
    "lora", "openpi's JAX checkpoints with LoRA: how their factors are merged", for_weights=True
)


class OpenPiAdapters(AdapterSupport):
    """Adapters that peft put on openpi's modules are read; openpi itself loads none."""

    def names(self, family: str) -> NameMap | None:
        """Return the names of openpi's modules."""
        return names.NAMES if family == "pi0" else None

    def refusals(self, policy: Policy, layers: Sequence[str]) -> list[str]:
        """Return that openpi loads no adapters."""
        return ["openpi's PyTorch code loads no adapters: add --merge"]


RELATIVE = (
    "openpi's files do not tell; those of its pi0_libero and pi0_fast_libero are relative: --config "
    "'codec.relative=[true, true, true, true, true, true, false]'"
)
STATE = "openpi's files do not tell; its pi05_libero has no state in the prompt: --config state_input=none"
DECLARED = Declaration(
    slots=norm_stats.CAMERAS,
    says_relative=False,
    says_frame_sizes=False,
    unsaid={"relative actions": RELATIVE, "prompt": STATE},
)
"""The declaration of every checkpoint of openpi, whose files do not describe the robot."""


class OpenPi(Format):
    """The checkpoints that openpi's PyTorch code saves. Its target also writes pi0-FAST's Orbax folders."""

    name = "openpi"
    target = "openpi"
    takes_deferred = True
    options = (CODEC,)
    layouts = names.LAYOUT
    adapters = OpenPiAdapters()

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are openpi's."""
        return names.recognise(files.tensor_names)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names; openpi's own config.json is believed where it lies beside the weights."""
        unsupported.refuse(files.tensors, str(files.path))
        stated_type.require(files.folder, str(files.path), "pi0 or pi05", "pi0", "pi05")
        evidence = names.config_evidence(files.tensors, files.folder)
        translated = translate(files.tensors, names.NAMES)
        return with_statistics(
            OpenedCheckpoint(str(files.path), self, "pi0", translated, evidence), files.folder
        )

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Make a codec of the statistics that the caller chooses, with the caller's tokenizer."""
        return codec_of_statistics(opened, policy, options)

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether there are statistics."""
        return bool(norm_stats.find_assets(files.folder))

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return openpi's three camera slots."""
        return DECLARED

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what openpi cannot hold."""
        return writing.refusals(policy, codec)

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write weights and norm_stats.json."""
        return writing.write(folder, policy, codec)  # type: ignore[arg-type] # refusals looked at it

    def keeps_float32(self, info: ParameterInfo, policy: Policy) -> bool:
        """Return what openpi's `precision` setting leaves in float32."""
        return writing.keeps_float32(info, policy)


class OpenPiJax(Format):
    """The Orbax folders that openpi publishes and its JAX code saves; of pi0-FAST they are also written."""

    name = "openpi JAX"
    files = ("params/*", "*/params/*")
    options = (CODEC, LORA)

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the path, or the folder params in it, holds an Orbax checkpoint."""
        return find_params(files.path) is not None

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Read the tree's metadata; numbers are read layer by layer when they are assigned."""
        params = find_params(files.path)
        assert params is not None
        tree = jax.open_tree(params, options.config.table("lora"))
        require_factors(params, tree.lora, options.config)
        chunk, notes = _chunk_beside(params, options.config)
        evidence = tree.evidence
        values = evidence.values if chunk is None else {**evidence.values, "chunk": chunk}
        opened = OpenedCheckpoint(
            path=str(params),
            format=self,
            family=tree.family,
            tensors=Translated(tree.weights, file_name=tree.file_name),
            evidence=replace(evidence, values=values),
            contents=tree.contents,
            notes=(*tree.notes, *notes),
        )
        return with_statistics(opened, params.parent)

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Make a codec of the statistics that the caller chooses, with the caller's tokenizer."""
        return codec_of_statistics(opened, policy, options)

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether there are statistics."""
        params = find_params(files.path)
        return params is not None and bool(norm_stats.find_assets(params.parent))

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return openpi's three camera slots, and how pi0-FAST's action tokenizer is named."""
        params = find_params(files.path)
        if params is None or not jax.writes_tokens(open_leaves(params)):
            return DECLARED
        return replace(
            DECLARED,
            slots=norm_stats.FAST_CAMERAS,
            action_tokenizer=norm_stats.PUBLISHED,
            action_tokenizer_key="codec.action_tokenizer",
        )


def with_statistics(opened: OpenedCheckpoint, folder: Path) -> OpenedCheckpoint:
    """Return the checkpoint with the folder of its statistics, and how they make a codec."""
    assets = norm_stats.find_assets(folder)
    hint = (
        f"its statistics ({', '.join(assets)}) make one when it is loaded with a tokenizer" if assets else ""
    )
    return replace(opened, codec_folder=folder, codec_hint=hint)


def codec_of_statistics(opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
    """Make a codec of a checkpoint's norm_stats.json. Raises WeightsError for arguments without effect."""
    assert opened.codec_folder is not None
    assets, words = norm_stats.find_assets(opened.codec_folder), options.open_tokenizer()
    if words is None:
        available = ", ".join(assets) or "none"
        reason = f"no tokenizer in the checkpoint: give one (statistics in it: {available}): {GIVE_TOKENIZER}"
        options.config.refuse("codec", opened.path, reason)
        if options.assets is not None:
            raise WeightsError(f"{opened.path}: assets would have no effect: {reason}")
        return ChosenCodec(None, reason)
    asset = norm_stats.choose(assets, options.assets, opened.path)
    if asset is None:
        raise WeightsError(
            f"{opened.path}: tokenizer would have no effect: no assets/*/{norm_stats.FILE} beside the "
            "weights: "
            "give assets, too"
        )
    chosen = options.config.table("codec")
    stated = options.relative if asset[0] in assets else None  # of the statistics beside it
    codec, notes = norm_stats.make_codec(asset, policy.needs(), words, chosen, stated)
    require_vocabulary(codec, policy, opened.path)
    return ChosenCodec(codec, notes=notes)


def _chunk_beside(params: Path, config: ConfigOverrides) -> tuple[object, tuple[str, ...]]:
    """Return the chunk that a config.json says of the Orbax checkpoint `params`, None without; and notes.

    Orbax holds no config. openpi's config.json counts where a converter left it, beside `params` or one
    folder up.
    """
    for folder in params.parents[:2]:
        values = names.read_config(folder)
        if values is not None and values["action_horizon"] is not None:
            chunk = values["action_horizon"]
            note = f"chunk is {chunk}, the action_horizon in {folder / 'config.json'}"
            return chunk, () if "chunk" in config.fields else (note,)
    return None, ()


def require_factors(params: Path, weights: Collection[str], config: ConfigOverrides) -> None:
    """Raise ConfigError for options of LoRA factors that are not there; `weights` have some."""
    where, lora = str(params), config.table("lora")
    if not weights:
        config.refuse("lora", where, "the checkpoint has no LoRA factors")
    scaled = {"expert" if "_1/" in name else "language" for name in weights if "/attn/" in name}
    for part in ("language", "expert"):
        if f"{part}_alpha" in lora and part not in scaled:
            raise ConfigError(
                f"{where}: config: lora.{part}_alpha would have no effect: the attention of the {part} has no"
                " LoRA factors (those of its MLP are not scaled)"
            )
    if not scaled:
        config.refuse("lora", where, "factors of MLPs are not scaled, and there are no others")


FORMAT = OpenPi()
JAX = OpenPiJax()
