"""The text a policy is asked with, exactly as the references write it.

pi0 and pi05 are openpi's (models/tokenizer.py); line is LeRobot's, for pi0 and SmolVLA: the instruction as it
is, made to end in a newline, tokenised in one piece.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Prompt = Literal["pi0", "pi05", "text", "line"]

BIN_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]  # openpi: 256 bins over [-1, 1]


def clean(text: str) -> str:
    """Return the instruction as the reference cleans it: stripped, underscores and newlines as spaces."""
    return text.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: NDArray) -> NDArray[np.int64]:
    """Return the bin of each normalised value [s]: 0 to 255, below -1 gives -1, from 1 on 255."""
    return np.digitize(state, BIN_EDGES) - 1


def needs_bos(kind: Prompt) -> bool:
    """Whether the prompt begins with the beginning-of-sequence token."""
    return kind in ("pi0", "pi05")


def pieces(kind: Prompt, instruction: str, state: NDArray) -> tuple[str, ...]:
    """Return the pieces of the prompt; each is tokenised on its own, then they are joined.

    `state` is the normalised state [s] with the robot's real dimensions; only pi05 writes it.
    """
    match kind:
        case "pi0":
            return clean(instruction), "\n"
        case "pi05":
            bins = " ".join(map(str, state_bins(state).tolist()))
            return (f"Task: {clean(instruction)}, State: {bins};\nAction: ",)
        case "text":
            return (instruction,)
        case "line":
            return (instruction if instruction.endswith("\n") else f"{instruction}\n",)


def vocabulary(kind: Prompt) -> tuple[str, ...]:
    """Return what prompts hold beside instructions, for training a small tokenizer that knows it."""
    match kind:
        case "pi05":
            return ("Task: , State: -1 " + " ".join(map(str, range(256))) + ";\nAction: ",)
        case "pi0" | "line":
            return ("\n",)
        case "text":
            return ()
