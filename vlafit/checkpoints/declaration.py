"""Read what a foreign checkpoint's files declare about robot, actions and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlafit.agreement import Agreement
from vlafit.codec.images import Framing
from vlafit.codec.normaliser import Normalisation
from vlafit.codec.prompts import Prompt
from vlafit.types import Embodiment


@dataclass(frozen=True)
class InputForm:
    """How a program made the policy's prompts and frames, and normalised; a codec fitted to data keeps it."""

    prompt: Prompt
    framing: Framing
    special_tokens: Literal["prompt", "tokenizer"]
    crop: float = 0.0
    letter_box: bool = False
    normalisation: Normalisation | None = None
    """Of states; None where the files do not say."""
    action_normalisation: Normalisation | None = None


@dataclass(frozen=True)
class Overruled:
    """A setting on which two files of a checkpoint differ, and its program follows the second."""

    name: str
    stated: str
    """The file and the value that is not used."""
    used: str
    """The file and the value that is."""
    reason: str = "its program follows this file"
    """Why the second holds."""


@dataclass(frozen=True)
class Declaration:
    """Statements that a run compares with its data before anything trains; the defaults say nothing."""

    embodiment: Embodiment | None = None
    """The robot as far as the files describe it; None where they do not."""
    relative: tuple[bool, ...] | None = None
    """For each action dimension: whether it is relative to the state. Empty: none is. None: not stated."""
    slots: tuple[str, ...] = ()
    """Names of the camera slots, "" for one that is always empty."""
    says_relative: bool = True
    """Whether this program's files, or a codec made of them, tell if actions are relative."""
    says_frame_sizes: bool = True
    """Whether the cameras' shapes are those of recorded frames."""
    conversions: tuple[str, ...] = ()
    """Changes that the program made to states or actions inside the policy; vlafit makes none of them."""
    relative_inside: str = ""
    """Which setting makes actions relative inside the policy, and which ones; vlafit does not repeat it."""
    tokenizer: str = ""
    """Name of the tokenizer that the files ask for and do not hold."""
    tokenizer_tells: bool = False
    """Whether the tokenizer tells something of the policy that the files do not: its chat turn."""
    own_tokenizer: Path | None = None
    """The tokenizer inside the checkpoint, a folder or file, which a codec without statistics does not
    open."""
    lost_tokenizer: Path | None = None
    """The folder that the files name as their own tokenizer, and that is not there."""
    codec_options: str = ""
    """Settings of a recipe without which its statistics make no codec, beside tokenizer and assets."""
    named_statistics: tuple[str, ...] = ()
    """Names of its sets of statistics, where none is applied unless the user chooses one (`assets`)."""
    action_tokenizer: str = ""
    """Name of the FAST action tokenizer that its weights were trained with; "" where nothing says it."""
    action_tokenizer_key: str = ""
    """Key of `load`'s config that names the action tokenizer of a codec made of its statistics."""
    form: InputForm | None = None
    """How prompts and frames are made; None: as the policy's family does it."""
    executed: int = 0
    """Steps of a chunk that its program executes before it asks again; 0 where its files do not say."""
    unsaid: Mapping[str, str] = field(default_factory=dict)
    """Items of an agreement that this program's files leave open -> who had which, and how to say so."""
    overruled: tuple[Overruled, ...] = ()
    """Settings on which its files differ, where the program follows one of them."""
    agreement: Agreement | None = None
    """What the checkpoint agreed on with the data that it learned from; None where it does not say."""
