"""Let pi0.5's prompt hold the state as LeRobot 0.4 wrote it: with zeros up to max_state_dim.

LeRobot 0.4 padded the state before it wrote it into the prompt (policies/pi05/processor_pi05.py: pad_vector),
0.6.1 does not, and the files of a checkpoint record neither its version nor this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlafit import config as configuration
from vlafit.codec import Codec
from vlafit.codec.prompts import holds_state
from vlafit.errors import WeightsError

PADDED = 32  # LeRobot's max_state_dim of pi0.5, which every public checkpoint has
HOW = f"LeRobot 0.4 wrote {PADDED} numbers, zeros behind the state: --config lerobot.prompt_state={PADDED}"


@dataclass(frozen=True)
class PromptOptions:
    """Settings that LeRobot's files do not record: the table `lerobot` of `load`'s config."""

    prompt_state: int = 0
    """Numbers of the state in the prompt, zeros at its end; 0: only the state's own, as LeRobot 0.6.1."""


def padded(codec: Codec | None, table: Mapping[str, Any], where: str, reason: str) -> Codec:
    """Return the codec with as many numbers in the prompt as the caller says.

    Raises WeightsError where there is no codec (for `reason`), or its prompt holds no state.
    """
    chosen = configuration.build(PromptOptions, table, f"{where}: config: lerobot")
    if codec is None:
        raise WeightsError(f"{where}: config: lerobot.prompt_state would have no effect: {reason}")
    if not holds_state(codec.config.prompt):
        raise WeightsError(f"{where}: config: lerobot.prompt_state: the prompt of this policy holds no state")
    return codec.with_changes(config=replace(codec.config, prompt_state=chosen.prompt_state))
