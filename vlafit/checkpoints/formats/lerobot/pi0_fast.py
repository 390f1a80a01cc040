"""Open LeRobot's pi0-FAST: pi0's names without an expert, and an output layer that is trained on its own.

Files that `save_pretrained` wrote hold both output layer and embedding. Base models on the Hub, whose names
do not begin with ``model.``, may hold only the output layer; LeRobot copies the embedding from it.
"""

from collections.abc import Collection
from dataclasses import replace

from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint
from vlafit.checkpoints.formats.lerobot import names
from vlafit.checkpoints.formats.lerobot.families import require_type
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, require_supported, stated_images
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.formats.openpi.variants import stated_by_variants
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap, translate
from vlafit.codec.action_text import SKIPPED
from vlafit.errors import WeightsError

TYPE = "pi0_fast"
FIELDS = {  # of config.json -> ours
    "chunk_size": "chunk",
    "max_state_dim": "state_dim",
    "max_action_dim": "action_dim",
    "tokenizer_max_length": "max_tokens",
    "max_action_tokens": "action_tokens",
}
EMBEDDING, HEAD = "language.embed_tokens.weight", "lm_head.weight"


def recognise(tensor_names: Collection[str], config: LeRobotConfig | None) -> bool:
    """Whether these are the names of pi0-FAST: LeRobot's, or openpi's where config.json says so."""
    plain = [names.plain(name) for name in tensor_names]
    begin = _beginning(plain)
    if begin == openpi.PREFIX and (config is None or config.values["type"] != TYPE):
        return False
    language = sum(name.startswith(f"{begin}paligemma.model.language_model.layers.") for name in plain)
    tower = any(name.startswith(f"{begin}paligemma.model.vision_tower.") for name in plain)
    expert = sum(name.startswith(f"{begin}gemma_expert.") for name in plain)
    # A stray tensor of an expert is surplus; pi0's expert has as many layers as its language model.
    return tower and 2 * expert < language


def open_checkpoint(format: Format, files: CheckpointFiles, config: LeRobotConfig | None) -> OpenedCheckpoint:
    """Translate the names and read config.json.

    Raises WeightsError where it is of another policy, or asks for something that vlafit does not compute.
    """
    tensors, where = files.tensors, str(files.path)
    require_type(config, TYPE, files.folder, where, "there is no action expert")
    if config is not None:
        _require_supported(config)
    stored = names.unmarked(tensors, where)
    rest = {name: tensors[stored[name]] for name in stored}
    name_map = _name_map(rest)
    translated = translate(rest, name_map)

    def file_name(name: str) -> str:
        name = translated.file_name(name)
        return stored.get(name, name)

    evidence = _evidence(config, tied=bool(name_map.ties))
    return OpenedCheckpoint(
        where,
        format,
        TYPE,
        replace(translated, file_name=file_name),
        evidence,
        codec_folder=files.folder,
        notes=() if config is None else _notes(config),
    )


def _beginning(plain: Collection[str]) -> str:
    own = sum(name.startswith(names.IN_MODEL) for name in plain)
    return names.IN_MODEL if own > sum(name.startswith(openpi.PREFIX) for name in plain) else openpi.PREFIX


def _name_map(plain: Collection[str]) -> NameMap:
    """Return the map of these names; with a tie where the file holds only the output layer, as may be."""
    if _beginning(plain) == names.IN_MODEL:
        return names.PI0_FAST
    prefixes = tuple((own, other.removeprefix("model.")) for own, other in names.PI0_FAST.prefixes)
    made = replace(names.PI0_FAST, prefixes=prefixes)
    head = made.file_name(HEAD)
    if head in plain and made.file_name(EMBEDDING) not in plain:
        return replace(made, prefixes=prefixes[:-1], ties={EMBEDDING: head})
    return made


def _require_supported(config: LeRobotConfig) -> None:
    require_supported(config)
    skipped = config.get("fast_skip_tokens", int)
    if skipped not in (None, SKIPPED):
        raise WeightsError(f"{config.path}: fast_skip_tokens is {skipped}; only {SKIPPED} is supported here")


def _evidence(config: LeRobotConfig | None, tied: bool) -> ConfigEvidence:
    values: dict[str, object] = {"rules": "lerobot", "tied": tied}
    fixed = ("vision.heads", "image_size", "max_tokens")  # LeRobot's code has no other
    if config is None:
        return ConfigEvidence(values, fixed=fixed)
    values |= {field: value for key, field in FIELDS.items() if (value := config.get(key, int)) is not None}
    temperature = config.get("temperature", (int, float))
    if temperature is not None:
        values["temperature"] = float(temperature)
    # There is an action_expert_variant, too, which LeRobot does not read.
    variant = {key: value for key, value in config.values.items() if key == "paligemma_variant"}
    stated = [*stated_images(config), *stated_by_variants(variant, config.path.name)]
    return ConfigEvidence(values, stated, fixed=fixed)


def _notes(config: LeRobotConfig) -> tuple[str, ...]:
    """Say where LeRobot's own decoding differs from what is done here."""
    notes = []
    steps, chunk = config.get("n_action_steps", int), config.get("chunk_size", int)
    if steps is not None and chunk is not None and steps != chunk:
        notes.append(
            f"n_action_steps is {steps}: LeRobot decodes tokens as a chunk of so many steps, although it is "
            f"trained on chunks of {chunk}; here they are decoded as {chunk}"
            + (f", and the protocol says how many are executed, or --replan {steps}" if steps < chunk else "")
        )
    most, longest = config.get("max_decoding_steps", int), config.get("max_action_tokens", int)
    if most is not None and longest is not None and most != longest:
        notes.append(
            f"max_decoding_steps is {most}; here decoding ends after {longest} tokens (max_action_tokens), "
            "the most that are trained"
        )
    return tuple(notes)
