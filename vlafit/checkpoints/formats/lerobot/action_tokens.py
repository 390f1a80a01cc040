"""Find the FAST action tokenizer that a LeRobot checkpoint of pi0-FAST names, and how it is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlafit.checkpoints import hub
from vlafit.checkpoints.formats.lerobot.processor_steps import ACTION_TOKENS, Step
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig
from vlafit.checkpoints.tensor_files import beside
from vlafit.codec import Tokenizer, fast
from vlafit.codec.action_text import ActionTokenConfig
from vlafit.codec.fast import FastTokenizer
from vlafit.errors import VlafitError, WeightsError
from vlafit.nn.policy import Needs

NAME = "action_tokenizer_name"
FILES = (fast.FILE, fast.CONFIG)


class Found(NamedTuple):
    """An action tokenizer, or the reason why there is none."""

    tokenizer: FastTokenizer | None
    reason: str = ""


def find(folder: Path, lerobot: LeRobotConfig, steps: Sequence[Step]) -> Found:
    """Return the action tokenizer that config.json and the step name.

    It is looked for in `folder` by the last part of its name, then on the Hub. Raises WeightsError where the
    two files contradict each other, CodecError where it is damaged.
    """
    step = next(one for one in steps if one.name == ACTION_TOKENS)
    for key, name in ((NAME, NAME), ("max_action_tokens", "max_action_tokens")):
        here, there = lerobot.values.get(key), step.config.get(name)
        if here is not None and there is not None and here != there:
            raise WeightsError(
                f"{lerobot.path}: {key} is {here!r}, and {there!r} in {step.where}: two files of one "
                "checkpoint contradict each other; correct the one that is wrong"
            )
    named = step.config.get(NAME) or lerobot.values.get(NAME)
    if not isinstance(named, str) or not named:
        raise WeightsError(f"{step.where}: {NAME} is {named!r}; it must name the action tokenizer")
    inside = beside(lerobot.path, Path(named).name)
    if inside.is_dir():
        return Found(fast.load(inside))
    copy = f"copy its {' and '.join(FILES)} into {inside}"
    if hub.parse(named) is None or Path(named).is_absolute():
        return Found(None, f"its action tokenizer {named!r} is not in the folder; {copy}")
    try:
        return Found(fast.load(hub.place(named, FILES).path))
    except VlafitError as error:
        return Found(None, f"its action tokenizer {named!r} is not in the folder ({error}); {copy}")


def settings(needs: Needs, words: Tokenizer) -> ActionTokenConfig:
    """Return how LeRobot writes action tokens; it counts them down from the end of the text tokenizer."""
    assert needs.action_tokens is not None
    return ActionTokenConfig(needs.action_tokens.longest, base_vocabulary(words), True, fit=True)


def base_vocabulary(words: Tokenizer) -> int:
    """Return the number of tokens that LeRobot counts in a text tokenizer: without those added later."""
    return words.backend.get_vocab_size(with_added_tokens=False)


def require_special(words: Tokenizer, needs: Needs, where: str) -> None:
    """Raise WeightsError where bos and eos of the tokenizer are not those of the policy."""
    tokens = needs.action_tokens
    if tokens is not None and (words.bos, words.eos) != (tokens.bos, tokens.eos):
        raise WeightsError(
            f"{where}: the tokenizer begins and ends a sequence with tokens {words.bos} and {words.eos}, the "
            f"policy with {tokens.bos} and {tokens.eos}; LeRobot takes the tokenizer's: give them, --config "
            f"bos={words.bos} --config eos={words.eos}"
        )
