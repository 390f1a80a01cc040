"""The text a policy is asked with, exactly as the references write it.

A form is named after the reference that it was taken from, because codec.json stores the name: pi0 and pi05
are openpi's (models/tokenizer.py), pi0_fast is that of its FAST tokenizer, and
pi0_fast_lerobot LeRobot's; line is LeRobot's: the instruction as it is, made to end in a newline,
tokenised in one piece; groot is GR00T's, whose chat turn around the instruction is the policy's own; openvla
is OpenVLA's, where Llama's tokenizer makes a token of the last space, which its authors add if it is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Prompt = Literal["pi0", "pi05", "pi0_fast", "pi0_fast_lerobot", "text", "line", "groot", "openvla"]

BIN_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]  # openpi: 256 bins over [-1, 1]


@dataclass(frozen=True)
class PromptForm:
    """One form of the prompt."""

    pieces: Callable[[str, NDArray], tuple[str, ...]]
    """Makes the pieces of the prompt from the instruction and the normalised state [s]; each is tokenised on
    its own, then they are joined."""
    vocabulary: tuple[str, ...] = ()
    """Text in prompts beside the instructions, for training a small tokenizer that knows it."""
    begins_with_bos: bool = False
    """True if a beginning-of-sequence token comes first."""
    holds_state: bool = False
    """True if the prompt holds the state, which is then no other input of the policy."""
    announces_actions: bool = False
    """True if the prompt ends with "Action: ", so that tokens of actions follow at once."""
    question: Callable[[str], tuple[str, ...]] | None = None
    """Makes the pieces of the prompt from a question about images; None: the policy answers none."""


def clean(text: str) -> str:
    """Return the instruction as the reference cleans it: stripped, underscores and newlines as spaces."""
    return text.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: NDArray) -> NDArray[np.int64]:
    """Return the bin of each normalised value [s]: 0 to 255, below -1 gives -1, from 1 on 255."""
    return np.digitize(state, BIN_EDGES) - 1


def _with_state(instruction: str, state: NDArray) -> tuple[str, ...]:
    bins = " ".join(map(str, state_bins(state).tolist()))
    return (f"Task: {clean(instruction)}, State: {bins};\nAction: ",)


def _before_tokens(instruction: str, state: NDArray, *, clean: Callable[[str], str]) -> tuple[str, ...]:
    bins = " ".join(map(str, state_bins(state).tolist()))
    return (f"Task: {clean(instruction)}, State: {bins};\n",)


def clean_lower(text: str) -> str:
    """Return the instruction as openpi's FASTTokenizer cleans it: lower case, underscores as spaces."""
    return text.lower().strip().replace("_", " ")


def _as_line(instruction: str, _: NDArray) -> tuple[str, ...]:
    return (instruction if instruction.endswith("\n") else f"{instruction}\n",)


def formal(text: str) -> str:
    """Return the instruction as GR00T writes it: lower case, only letters, digits, blanks and underscores."""
    return "".join(c for c in text.lower() if c.isalnum() or c.isspace() or c == "_")


def _as_question(instruction: str, _: NDArray) -> tuple[str, ...]:
    return (f"In: What action should the robot take to {instruction.lower()}?\nOut: ",)


def _as_paligemma(text: str) -> tuple[str, ...]:
    return (text.strip(), "\n")  # PaliGemma: the newline is tokenised on its own


def _as_prismatic(text: str) -> tuple[str, ...]:
    return (f"In: {text.strip()}\nOut: ",)


_STATE_WORDS = ("Task: , State: -1 " + " ".join(map(str, range(256))) + ";\nAction: ",)

FORMS: Mapping[Prompt, PromptForm] = {
    "pi0": PromptForm(lambda text, _: (clean(text), "\n"), ("\n",), begins_with_bos=True),
    "pi05": PromptForm(
        _with_state,
        _STATE_WORDS,
        begins_with_bos=True,
        holds_state=True,
        announces_actions=True,
        question=_as_paligemma,
    ),
    "pi0_fast": PromptForm(
        partial(_before_tokens, clean=clean_lower),
        _STATE_WORDS,
        begins_with_bos=True,
        holds_state=True,
        question=_as_paligemma,
    ),
    "pi0_fast_lerobot": PromptForm(
        partial(_before_tokens, clean=clean),
        _STATE_WORDS,
        begins_with_bos=True,
        holds_state=True,
        question=_as_paligemma,
    ),
    "text": PromptForm(lambda text, _: (text,)),
    "line": PromptForm(_as_line, ("\n",)),
    "groot": PromptForm(lambda text, _: (formal(text),)),
    "openvla": PromptForm(
        _as_question,
        ("In: What action should the robot take to ?\nOut: ",),
        begins_with_bos=True,
        question=_as_prismatic,
    ),
}


def holds_state(prompt: Prompt | None) -> bool:
    """Return whether prompts of this form hold the state; None is a policy without a prompt."""
    return prompt is not None and FORMS[prompt].holds_state
