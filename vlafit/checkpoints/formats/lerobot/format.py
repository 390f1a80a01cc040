"""LeRobot's checkpoints of pi0, pi0.5, pi0-FAST, SmolVLA and X-VLA.

pi0 and pi0.5 come in two layouts: as `save_pretrained` writes them (every name begins with ``model.``, and
both of the tied pair are there), or as on the Hub (openpi's names, which only config.json tells apart from
openpi's). pi0-FAST is opened by `pi0_fast`; X-VLA is read by `xvla`, the authors' own folders, too.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlafit.checkpoints.codecs import ChosenCodec, require_vocabulary
from vlafit.checkpoints.declaration import Declaration, Overruled
from vlafit.checkpoints.formats import unsupported
from vlafit.checkpoints.formats.base import (
    AdapterSettings,
    AdapterSupport,
    CheckpointFiles,
    Format,
    OpenedCheckpoint,
    Opener,
)
from vlafit.checkpoints.formats.lerobot import (
    declared,
    features,
    names,
    pi0_fast,
    prompt_state,
    read_buffers,
    read_processors,
    xvla,
    xvla_steps,
)
from vlafit.checkpoints.formats.lerobot import write as writing
from vlafit.checkpoints.formats.lerobot import write_groot as write_lerobot
from vlafit.checkpoints.formats.lerobot.families import require_type
from vlafit.checkpoints.formats.lerobot.read_config import (
    STEPS,
    LeRobotConfig,
    pi0_evidence,
    read_config,
    require_supported,
    sampling_steps,
)
from vlafit.checkpoints.formats.lerobot.smolvla_config import smolvla_evidence
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.infer import ConfigEvidence, shape_table, variant_of, variant_tensors
from vlafit.checkpoints.name_map import NameMap, Translated, translate
from vlafit.checkpoints.options import LoadOptions, OptionTable
from vlafit.checkpoints.voting import Witness, depth_of
from vlafit.codec import Codec
from vlafit.codec.described import learned
from vlafit.errors import WeightsError
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.policies.groot import Groot

DECIDING = (  # keys of config.json that decide what a policy computes from its weights
    "type",
    "max_state_dim",
    "max_action_dim",
    "paligemma_variant",
    "action_expert_variant",
    "image_resolution",
    "resize_imgs_with_padding",
    "attention_mode",
    "self_attn_every_n_layers",
    "num_vlm_layers",
    "num_expert_layers",
    "expert_width_multiplier",
    "florence_config",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_domains",
    "len_soft_prompts",
    "dim_time",
    "max_len_seq",
    "use_hetero_proj",
    "action_mode",
    "num_image_views",
)


OF_THE_ADAPTERS = {"chunk_size": "chunk", "tokenizer_max_length": "max_tokens"}
"""Keys of config.json on which no tensor depends, and their fields: those beside adapters hold."""


ANY = sys.maxsize  # of domains: the policy itself refuses one that it lacks
ADAPTED = "LeRobot runs adapters with the files beside them"


class LeRobotAdapters(AdapterSupport):
    """LeRobot loads a PEFT folder with its own files beside the adapters."""

    def names(self, family: str) -> NameMap | None:
        """Return the names of the modules in LeRobot's classes."""
        return write_lerobot.NAMES if family == "groot" else names.IN_MEMORY.get(family)

    def refusals(self, policy: Policy, layers: Sequence[str]) -> list[str]:
        """Say which of GR00T's layers peft cannot adapt there."""
        return write_lerobot.adapter_refusals(policy, layers) if isinstance(policy, Groot) else []

    def settings(self, folder: Path, base: Path) -> AdapterSettings:
        """Return the settings of config.json beside adapters, with which LeRobot runs them.

        Raises WeightsError where it is of another policy than the base's.
        """
        here, there = read_config(folder), read_config(base)
        if here is None:
            return AdapterSettings()
        require_supported(here)
        steps = sampling_steps(here)
        config: dict[str, object] = {
            field: value
            for key, field in OF_THE_ADAPTERS.items()
            if (value := here.get(key, int)) is not None
        }
        source, domain = "", xvla_steps.domain_in(folder, ANY)
        if domain is not None:
            source, config["domain"] = str(folder / read_processors.PRE), domain
        if there is None:
            return AdapterSettings(config, source, steps)
        for key in DECIDING:
            if here.values.get(key) != there.values.get(key):
                raise WeightsError(
                    f"{here.path}: {key} is {here.values.get(key)!r}, and {there.values.get(key)!r} in"
                    f" {there.path}: the adapters are not of this base"
                )
        overruled = [
            Overruled(key, f"{there.path}: {there.values[key]}", f"{here.path}: {here.values[key]}", ADAPTED)
            for key in (*OF_THE_ADAPTERS, *STEPS.get(here.values["type"], STEPS["pi0"]))
            if key in here.values and key in there.values and here.values[key] != there.values[key]
        ]
        before = xvla_steps.domain_in(base, ANY)
        if domain is not None and before is not None and before != domain:
            pre = read_processors.PRE
            overruled.append(Overruled("domain", f"{base / pre}: {before}", f"{source}: {domain}", ADAPTED))
        return AdapterSettings(config, source, steps, tuple(overruled))

    def codec_folder(self, folder: Path, base: Path) -> Path:
        """Return the folder of the processors, which LeRobot writes beside adapters."""
        return folder if (folder / read_processors.PRE).is_file() else base

    def write_beside(self, folder: Path, base: Path) -> None:
        """Repeat everything but the weights beside the adapters, where LeRobot looks for it."""
        writing.repeat_beside_adapters(folder, base)


class LeRobot(Format):
    """The checkpoints of LeRobot's `save_pretrained`, and those on the Hub."""

    name = names.FORM
    target = "lerobot"
    takes_deferred = True
    holds_columns = True  # of GR00T, LIBERO's gripper; `refusals` names everything else
    layouts = names.LAYOUTS
    options = (OptionTable("lerobot", "LeRobot's pi0.5: how many numbers of the state its prompt holds"),)
    adapters = LeRobotAdapters()

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are LeRobot's, or openpi's with LeRobot's config.json beside them."""
        if names.has_own_names(files.tensor_names) or xvla.recognise(files.tensor_names):
            return True
        config = read_config(files.folder)
        if config is None:
            return False
        return openpi.recognise(files.tensor_names) or pi0_fast.recognise(files.tensor_names, config)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names and read config.json.

        Raises WeightsError where config.json asks for something that vlafit does not compute, or another
        family's weights lie beside it.
        """
        config = read_config(files.folder)
        if pi0_fast.recognise(files.tensor_names, config):
            return pi0_fast.open_checkpoint(self, files, config)
        unsupported.refuse(files.tensors, str(files.path))
        if xvla.recognise(files.tensor_names):
            return xvla.open_checkpoint(self, files, config, options)
        return _open(self, files, config)

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Read the processors; the caller's tokenizer is used where the checkpoint does not hold its own."""
        assert opened.codec_folder is not None
        folder, needs, words, asset = (
            opened.codec_folder,
            policy.needs(),
            options.open_tokenizer(),
            options.assets,
        )
        if read_buffers.present(folder, opened.buffers):
            codec, reason = read_buffers.read(folder, opened.buffers, needs, words, asset)
        else:
            codec, reason = read_processors.read(folder, needs, words, asset)
        unset = sorted(name for name, tensor in opened.buffers.items() if bool(tensor.isinf().any()))
        if codec is None and unset:
            reason += (
                f"; the statistics among its weights were never set: {unset[0]} is infinite (and "
                f"{len(unset) - 1} more)"
            )
        if codec is not None:
            require_vocabulary(codec, policy, opened.path)
        elif words is not None:
            raise WeightsError(f"{opened.path}: tokenizer would have no effect: {reason}")
        elif asset is not None:
            raise WeightsError(f"{opened.path}: assets would have no effect: {reason}")
        if table := options.config.table("lerobot"):
            codec = prompt_state.padded(codec, table, opened.path, reason)
        chosen = ChosenCodec(codec, reason)
        return xvla.finish_codec(chosen, opened, policy, options) if opened.family == "xvla" else chosen

    def codec_of_headers(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Read the processors, as `codec` does: they hold no weights."""
        return self.codec(opened, policy, options)

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether statistics are there, in processors or among the weights, and their tokenizer is not."""
        if read_config(files.folder) is None:
            return False
        return read_processors.lacks_tokenizer(files.folder) or read_buffers.lacks_tokenizer(
            files.folder, buffers_of(files)
        )

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return what config.json and the processors say."""
        return declared.read(files.folder, buffers_of(files))

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what LeRobot has no names for."""
        reasons = writing.refusals(policy, codec)
        if codec is None or write_lerobot.holds_gripper(policy, codec):
            return reasons
        return reasons + [f"lerobot does not repeat this of its codec: {point}" for point in learned(codec)]

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write config.json, weights, both pipelines and the tokenizer."""
        assert codec is not None  # refusals ask for one
        if isinstance(policy, Groot):
            return write_lerobot.write(folder, policy, codec, final)
        return writing.write(folder, policy, codec) + writing.name_vlm(folder, final)

    def keeps_float32(self, info: ParameterInfo, policy: Policy) -> bool:
        """Return what LeRobot keeps in float32 when its dtype is bfloat16."""
        return writing.keeps_float32(info, policy)


def _open(format: LeRobot, files: CheckpointFiles, config: LeRobotConfig | None) -> OpenedCheckpoint:
    tensors, where = files.tensors, str(files.path)
    stored = names.unmarked(tensors, where)
    buffers = tuple(name for name in stored if name.startswith(names.BUFFERS))
    rest = {name: tensors[stored[name]] for name in stored if name not in buffers}
    layout = names.layout_of(rest)
    assert layout is not None  # detected by it
    family, name_map = layout
    parameters = [name_map.policy_name(name) for name in rest]
    kind = variant_of(shape_table(family), parameters).public
    mixed = sum(bool(own) for own in variant_tensors(shape_table(family), parameters)) > 1
    if not mixed:  # a mix is named with all tensors
        require_type(config, kind, files.folder, where)
    translated, witnesses = _translate(rest, name_map, stored, buffers, family)
    if config is not None:
        require_supported(config)
    if family == "smolvla":
        depth = depth_of(translated.weights, "language", "expert")
        values, stated = smolvla_evidence(config, files.folder, depth)
    else:
        values, stated = pi0_evidence(config, kind)
    fixed = ("vision.heads", "image_size", "max_tokens")  # LeRobot's code has no other
    evidence = ConfigEvidence(values, stated, witnesses, fixed=fixed)
    return OpenedCheckpoint(
        where,
        format,
        family,
        translated,
        evidence,
        steps=sampling_steps(config),
        codec_folder=files.folder,
        buffers=buffers_of(files),
        notes=features.notes(config),
    )


def buffers_of(files: CheckpointFiles) -> dict[str, Tensor]:
    """Return the statistics that lie among the weights."""
    return {name: files.tensors[name] for name in files.tensor_names if name.startswith(names.BUFFERS)}


def _translate(
    tensors: Mapping[str, Tensor],
    name_map: NameMap,
    stored: Mapping[str, str],
    buffers: tuple[str, ...],
    family: str,
) -> tuple[Translated, list[Witness]]:
    """Return the tensors under our names, and the unused heads as witnesses of the sizes.

    Once LeRobot has trained a policy its head and embedding are two tensors, and the head feeds nothing.
    """
    heads = tuple(
        tied
        for name, tied in name_map.ties.items()
        if tied in tensors and name_map.file_name(name) in tensors
    )
    axes = dict.fromkeys(heads, "language.vocab language.width")
    width = "language.width" if family == "smolvla" else "expert.width"
    axes |= dict.fromkeys(name_map.unused, f"language.vocab {width}")
    witnesses = [Witness(n, tuple(tensors[n].shape), words) for n, words in axes.items() if n in tensors]
    plain = translate({name: tensor for name, tensor in tensors.items() if name not in heads}, name_map)

    def file_name(name: str) -> str:
        name = plain.file_name(name)
        return stored.get(name, name)

    return replace(plain, unused=plain.unused + heads + buffers, file_name=file_name), witnesses


FORMAT = LeRobot()
