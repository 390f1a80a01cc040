"""LeRobot's checkpoints of GR00T N1.7.

Its config.json has no sizes: they are those of `base_model_path`, which LeRobot opens first. They are read
from that folder's config.json where it lies in the checkpoint or beside it, known for NVIDIA's public
checkpoint, and else told by the tensors.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlafit.checkpoints.codecs import ChosenCodec, require_vocabulary
from vlafit.checkpoints.declaration import Declaration, InputForm
from vlafit.checkpoints.formats.base import AdapterSettings, CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.groot import config, names
from vlafit.checkpoints.formats.groot.format import FIXED
from vlafit.checkpoints.formats.lerobot import features, groot_gripper, groot_grouped
from vlafit.checkpoints.formats.lerobot import groot_processors as processors
from vlafit.checkpoints.formats.lerobot.families import require_type
from vlafit.checkpoints.formats.lerobot.format import LeRobotAdapters
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, executed_steps, read_config
from vlafit.checkpoints.formats.lerobot.write_groot import NAMES, PREFIX
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.options import LoadOptions
from vlafit.checkpoints.voting import Stated, depth_of
from vlafit.errors import WeightsError
from vlafit.nn.policy import MOST_SAMPLING_STEPS, Policy, is_sampling_steps
from vlafit.policies import merge_dotted
from vlafit.policies._groot_shapes import PROJECTORS
from vlafit.policies.groot import SIZES

FORM = NAMES.form
TYPE = "groot"
LAYOUT = {"LeRobot's GR00T": (PREFIX,)}
PUBLIC = "nvidia/GR00T-N1.7"  # how the names of NVIDIA's checkpoints of these sizes begin
REWRITTEN = {"max_state_dim": 64, "max_action_dim": 32, "chunk_size": 50}
"""Values of config.json for which LeRobot takes those of the base without a word: N1.5's defaults."""
UNREAD_SIZES = ([256, 256], [224, 224])  # LeRobot's defaults of image_size, a field that nothing reads


class GrootAdapters(LeRobotAdapters):
    """LeRobot's PEFT folders of GR00T, in which processors beside the adapters name the embodiment."""

    def settings(self, folder: Path, base: Path) -> AdapterSettings:
        """Return the settings of config.json and processors beside adapters, which LeRobot runs them with."""
        made, here = super().settings(folder, base), read_config(folder)
        own = {k: v for k, v in made.config.items() if (k, v) != ("chunk", REWRITTEN["chunk_size"])}
        pack = processors.step_of(processors.steps_in(folder)[0], processors.PACK)
        if here is None or pack is None:
            return replace(made, config=own)
        row, _ = processors.row_of(here, [pack], sys.maxsize)  # the policy itself refuses one that it lacks
        return replace(made, config={**own, "embodiment_rows": [row]}, source=pack.where)


class LeRobotGroot(Format):
    """LeRobot's checkpoints of GR00T; `formats.lerobot` writes them through `write_groot`."""

    name = FORM
    layouts = LAYOUT
    adapters = GrootAdapters()

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are those of LeRobot's class."""
        return names.recognise(files.tensor_names, PREFIX)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names, read config.json, the processors' sizes and those of the base."""
        lerobot = read_config(files.folder)
        require_type(lerobot, TYPE, files.folder, str(files.path))
        words = options.open_tokenizer() or config.own_tokenizer(files.folder)
        tensors = names.read(files.tensors, NAMES)
        given = "embodiment_rows" in options.config.fields
        rows = None if given else depth_of(tensors.weights, *PROJECTORS)
        values, stated, steps, notes = _evidence(files.folder, lerobot, words, rows)
        values.setdefault("max_tokens", config.MAX_TOKENS)
        return OpenedCheckpoint(
            str(files.path),
            self,
            "groot",
            tensors,
            ConfigEvidence(values, stated, fixed=FIXED, remedies=config.REMEDIES),
            steps=steps,
            codec_folder=files.folder,
            notes=notes + features.notes(lerobot),
        )

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Read the processors; the caller's tokenizer is used where the checkpoint does not hold its own."""
        assert opened.codec_folder is not None
        folder, words = opened.codec_folder, options.open_tokenizer()
        own = config.own_tokenizer(folder)
        if own is not None and words is not None:
            raise WeightsError(f"{folder}: has a tokenizer of its own (tokenizer/); it takes no tokenizer")
        codec, reason = processors.read(folder, policy.needs(), words or own, options.assets)
        if codec is not None:
            require_vocabulary(codec, policy, opened.path)
            return ChosenCodec(codec)
        tells_chat = policy.config.chat != config.CHAT
        for name in ("assets",) if words is None or tells_chat else ("tokenizer", "assets"):
            if getattr(options, name) is not None:
                raise WeightsError(f"{opened.path}: {name} would have no effect: {reason}")
        return ChosenCodec(None, reason)

    def codec_of_headers(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Read the processors, as `codec` does: they hold no weights."""
        return self.codec(opened, policy, options)

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether statistics are there and their tokenizer is not."""
        return read_config(files.folder) is not None and processors.lacks_tokenizer(files.folder)

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return what config.json and the processors say."""
        lerobot = read_config(files.folder)
        if lerobot is None:
            return Declaration()
        features.require_inputs(lerobot)
        pre, post = processors.steps_in(files.folder)
        processors.require_repeated(lerobot, pre, post)
        try:
            slots, robot = processors.robot_of(lerobot, pre)
        except WeightsError:  # without features it says nothing of the robot; `load` needs none
            slots, robot = (), None
        pack, encode = (processors.step_of(pre, name) for name in (processors.PACK, processors.ENCODE))
        sets = {} if pack is None else processors.sets_of(pack)
        frames = processors.framing_of(encode, processors.image_size(pre) or 0)
        grouped = processors.step_of(post, processors.GROUPED)
        relative: tuple[bool, ...] = ()
        if pack is not None and grouped is not None:
            relative = groot_grouped.relative_mask(pack, grouped)
        own = files.folder / "tokenizer"
        base = str(lerobot.values.get("base_model_path"))
        place = config.find_folder(files.folder, base)
        found = None if place is None else config.read_config(place)
        named = "" if found is None else str(found[1].get("model_name") or "").removeprefix("./")
        if encode is not None:
            named = str(encode.config.get("model_name", ""))
        tells = not base.startswith(PUBLIC)
        if found is not None and place is not None:
            tells = config.tokenizer_tells(place)
        return Declaration(
            embodiment=robot,
            relative=None if robot is None else relative,
            slots=slots,
            tokenizer_tells=tells and not own.is_dir(),
            tokenizer="" if own.is_dir() else named,
            own_tokenizer=own if own.is_dir() else None,
            executed=executed_steps(lerobot),
            named_statistics=() if "" in sets else tuple(sorted(sets)),
            overruled=features.unread(lerobot),
            form=InputForm(processors.prompt_of(pack), frames.name, "prompt", frames.crop, frames.letter_box),
        )


def _evidence(
    folder: Path, lerobot: LeRobotConfig | None, words: Any, rows: int | None
) -> tuple[dict[str, Any], list[Stated], int | None, tuple[str, ...]]:
    """Return config values, stated sizes, sampling steps and notes of the checkpoint's files.

    The tables of embodiments have `rows`; None: the caller names those that are used.
    """
    if lerobot is None:
        return {}, [], None, ()
    base = str(lerobot.values.get("base_model_path"))
    place = config.find_folder(folder, base)
    values: dict[str, Any] = {}
    stated: list[Stated] = []
    steps: int | None = None
    if place is not None and config.read_config(place) is not None:
        values, stated, steps = config.evidence(place, words)
    elif base.startswith(PUBLIC):
        values, stated = _public(f"{lerobot.path.name} (base_model_path {base!r})")
    keys = {"max_state_dim": "state_dim", "max_action_dim": "action_dim"}
    kept = {key: field for key, field in keys.items() if lerobot.values.get(key) != REWRITTEN[key]}
    stated = [*(one for one in stated if one.key not in kept.values()), *lerobot.state(kept)]
    chunk = lerobot.get("chunk_size", int)
    if chunk is not None and chunk != REWRITTEN["chunk_size"]:
        values = merge_dotted(values, {"chunk": chunk})
    pre, post = processors.steps_in(folder)
    if (side := processors.image_size(pre)) is not None:
        values["image_size"] = side
    note = ""
    if rows is not None:
        row, note = processors.row_of(lerobot, pre, rows)
        values["embodiment_rows"] = [row]
    own = lerobot.get("num_inference_timesteps", int)
    if own is not None and not is_sampling_steps(own):
        raise WeightsError(
            f"{lerobot.path}: num_inference_timesteps is {own}; a policy samples in 1 to "
            f"{MOST_SAMPLING_STEPS} steps"
        )
    notes = ((note,) if note else ()) + groot_gripper.notes(lerobot, post) + _size_note(lerobot, side)
    return values, stated, own or steps, notes


def _size_note(lerobot: LeRobotConfig, side: int | None) -> tuple[str, ...]:
    """Return a note where config.json says another size of images than LeRobot makes them."""
    stated = lerobot.get("image_size", list)
    if stated is None or side is None or stated in ([side] * 2, *UNREAD_SIZES):
        return ()
    return (
        f"{lerobot.path}: image_size is {stated}; LeRobot does not read it and makes images of {side} pixels "
        f"(image_target_size of {processors.PRE}), and so does vlafit",
    )


def _public(source: str) -> tuple[dict[str, Any], list[Stated]]:
    """Return the values and sizes of NVIDIA's public checkpoint."""
    public: Mapping[str, Any] = asdict(replace(SIZES["groot"]))
    values: dict[str, Any] = {}
    stated: list[Stated] = []
    shapeless = ("vision.heads", "vision.deepstack", "language.sections", "language.rope_base",
                 "expert.heads", "expert.memory_heads", "expert.text_every", "expert.dropout")  # fmt: skip
    for part in ("vision", "language", "expert"):
        for key, value in public[part].items():
            if f"{part}.{key}" in shapeless:
                values = merge_dotted(values, {f"{part}.{key}": value})
            else:
                stated.append(Stated(f"{part}.{key}", value, source))
    for key in ("chat", "image_size", "chunk", "state_dropout"):
        values[key] = public[key]
    return values, stated


FORMAT = LeRobotGroot()
