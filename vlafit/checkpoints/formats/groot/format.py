"""NVIDIA's checkpoints of GR00T N1.7: config.json, weights, and processors.

Exports of earlier versions have vlafit's codec in the place of processors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlafit.checkpoints.codecs import GIVE_ASSETS, GIVE_TOKENIZER, ChosenCodec, require_vocabulary
from vlafit.checkpoints.declaration import Declaration, InputForm
from vlafit.checkpoints.formats import stated_type
from vlafit.checkpoints.formats.base import AdapterSupport, CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.groot import config, names, processors
from vlafit.checkpoints.formats.groot import write as writing
from vlafit.checkpoints.formats.groot.groups import Unrepeated
from vlafit.checkpoints.formats.native.read import CODEC
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.options import LoadOptions
from vlafit.checkpoints.voting import depth_of
from vlafit.codec import Codec, CodecSet
from vlafit.codec.prompts import Prompt
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies._groot_shapes import PROJECTORS
from vlafit.policies.groot import SIZES

FIXED = ("max_tokens",)  # no program limits an instruction
(NEW_ROW,) = SIZES["groot"].embodiment_rows
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
    """The checkpoints that NVIDIA publishes and its trainer saves."""

    name = names.FORM
    target = "groot"
    takes_deferred = True
    layouts = LAYOUT
    adapters = GrootAdapters()
    holds_columns = True
    no_codec = "NVIDIA's processors are not there; fine-tuning fits a codec to the data"

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether the tensor names are NVIDIA's of N1.7."""
        every = list(files.tensor_names)
        return names.recognise(every)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Translate the names and read config.json, the backbone's, and our codec where it lies beside."""
        stated_type.require(files.folder, str(files.path), names.FORM, config.MODEL_TYPE)
        words = options.open_tokenizer()
        values, stated, steps = config.evidence(files.folder, words)
        codec = CodecSet.load(files.folder) if (files.folder / CODEC).is_file() else None
        values.setdefault("max_tokens", config.MAX_TOKENS if codec is None else codec.max_tokens)
        translated = names.read(files.tensors)
        tag = None if codec is not None else processors.chosen(files.folder, options.assets)
        if tag is not None and "embodiment_rows" not in options.config.fields:
            rows = depth_of(translated.weights, *PROJECTORS)
            values["embodiment_rows"] = [processors.row_of(files.folder, tag, rows)]
        return OpenedCheckpoint(
            str(files.path),
            self,
            "groot",
            translated,
            ConfigEvidence(values, stated, fixed=FIXED, remedies=config.REMEDIES),
            steps=steps,
            own_codec=codec,
            codec_folder=files.folder,
            notes=_unnamed(values, options, files.folder) if codec is None else (),
        )

    def codec(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Return our own codec where it lies beside, else that of NVIDIA's processors for an embodiment
        (`assets`, or the only one). A tokenizer then also tells the tokens of a chat turn.
        """
        folder = opened.codec_folder
        assert folder is not None
        every = () if opened.own_codec is not None else processors.tags(folder)
        if not every:
            has_own_chat = opened.own_codec is None and policy.config.chat != config.CHAT
            kept = replace(options, tokenizer=None) if has_own_chat else options
            return super().codec(opened, policy, kept)
        tag = processors.chosen(folder, options.assets)
        words = options.open_tokenizer() or config.own_tokenizer(folder)
        reason = ""
        if tag is None:
            reason = f"statistics of {len(every)} embodiments ({', '.join(every)}); choose one: {GIVE_ASSETS}"
        elif words is None:
            reason = f"its tokenizer is not in the folder; give that of its backbone: {GIVE_TOKENIZER}"
        if tag is None or words is None:
            if options.assets is not None:
                raise WeightsError(f"{opened.path}: {reason}")
            return ChosenCodec(None, reason)
        try:
            files = processors.read(folder)
            assert files is not None
            codec, notes = processors.make_codec(files, tag, policy.needs(), words)
        except Unrepeated as error:
            if options.assets is not None:
                raise
            return ChosenCodec(None, f"{error}; fine-tuning fits a codec to the data")
        require_vocabulary(codec, policy, opened.path)
        return ChosenCodec(codec, notes=notes)

    def codec_of_headers(self, opened: OpenedCheckpoint, policy: Policy, options: LoadOptions) -> ChosenCodec:
        """Read the processors, as `codec` does: they hold no weights."""
        if opened.own_codec is None and opened.codec_folder and processors.tags(opened.codec_folder):
            return self.codec(opened, policy, options)
        return super().codec_of_headers(opened, policy, options)

    def wants_tokenizer(self, files: CheckpointFiles) -> bool:
        """Whether there are statistics, and no tokenizer beside."""
        own = (files.folder / CODEC).is_file() or config.own_tokenizer(files.folder) is not None
        return not own and bool(processors.tags(files.folder))

    def declaration(self, files: CheckpointFiles) -> Declaration:
        """Return the names of the statistics, and how instructions are put; frames have no sizes there."""
        found = config.read_config(files.folder)
        if (files.folder / CODEC).is_file():
            return Declaration()
        every = processors.tags(files.folder)
        backbone = "" if found is None else str(found[1].get("model_name") or "")
        own = files.folder / "tokenizer"
        if every:
            prompt, frames = processors.formal(files.folder), processors.frames(files.folder)
            form = _form(prompt, frames)
            backbone = processors.backbone(files.folder)
        else:
            form = None if found is None else _form_of_config(*found)
        return Declaration(
            says_frame_sizes=False,
            tokenizer_tells=not own.is_dir() and config.tokenizer_tells(files.folder),
            tokenizer="" if own.is_dir() else backbone.removeprefix("./"),
            own_tokenizer=own if own.is_dir() else None,
            named_statistics=every if len(every) > 1 else (),
            form=form,
        )

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Say what NVIDIA's program cannot hold."""
        return writing.refusals(policy, codec)

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write config.json, weights, processors, and the backbone's config where it is not public."""
        return writing.write(folder, policy, codec)


def _form(formal: bool, frames: processors.Frames) -> InputForm:
    prompt: Prompt = "groot" if formal else "text"
    return InputForm(prompt, frames.name, "prompt", frames.crop, frames.letter_box)


def _form_of_config(path: Path, values: Mapping[str, Any]) -> InputForm | None:
    """Return how NVIDIA's trainer makes processors out of config.json; None where it does not say."""
    by_area = values.get("use_albumentations_transforms")
    if by_area is None:
        return None
    if not isinstance(by_area, bool):
        raise WeightsError(f"{path}: use_albumentations_transforms is {by_area!r}; it must be true or false")
    settings = {key: values[key] for key in ("image_crop_size", "crop_fraction") if key in values}
    side = config.image_side(path, values) or 0
    frames = processors.framing_of({"use_albumentations": by_area, **settings}, side, str(path))
    return _form(bool(values.get("formalize_language", True)), frames)


def _unnamed(values: Mapping[str, Any], options: LoadOptions, folder: Path) -> tuple[str, ...]:
    """Return a note where nothing tells the row of the embodiment tables: that of a new robot is taken."""
    if "embodiment_rows" in values or "embodiment_rows" in options.config.fields:
        return ()
    named = ", ".join(processors.tags(folder))
    lacking = (
        f"none of the embodiments {named} is chosen ({GIVE_ASSETS})" if named else "no file names a robot"
    )
    return (
        f"{lacking}: its weights are those of row {NEW_ROW} (new_embodiment); config embodiment_rows=[N]",
    )


FORMAT = Groot()
