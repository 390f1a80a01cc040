"""Fit a codec that was read from a checkpoint to its policy, and refuse codec arguments without effect."""

from dataclasses import fields, replace
from typing import NamedTuple

from vlafit.checkpoints.options import LoadOptions
from vlafit.codec import Codec, CodecSet
from vlafit.codec.action_text import ActionTokenConfig
from vlafit.codec.codec_config import CodecConfig
from vlafit.codec.prompts import holds_state
from vlafit.errors import WeightsError, quoted
from vlafit.nn.policy import Needs, Policy

GIVE_TOKENIZER = (
    "policy.tokenizer in a recipe, --policy.tokenizer for train, --tokenizer for inspect, "
    "eval and serve, tokenizer= in Python"
)
GIVE_ASSETS = (
    "policy.assets in a recipe, --policy.assets for train, --assets for inspect, eval and serve, assets= in "
    "Python"
)


class ChosenCodec(NamedTuple):
    """The codec of a checkpoint (a set, if it has several embodiments), or the reason why there is none; and
    notes for the load report.
    """

    codec: Codec | CodecSet | None
    reason: str = ""
    notes: tuple[str, ...] = ()


def refuse_codec_arguments(options: LoadOptions, where: str, reason: str) -> None:
    """Raise WeightsError where the caller gives a tokenizer or assets; `reason` begins after the path."""
    for name in ("tokenizer", "assets"):
        if getattr(options, name) is not None:
            raise WeightsError(f"{where}: {reason.format(name=name)}")


def require_vocabulary(codec: Codec, policy: Policy, where: str) -> None:
    """Raise WeightsError where the tokenizer has more tokens than the policy."""
    if codec.tokenizer is None:
        return
    have, room = codec.tokenizer.vocab_size, policy.needs().vocabulary
    if have > room:
        raise WeightsError(f"{where}: the tokenizer has {have} tokens, the policy has only {room}")


def fit_codec(codec: Codec, policy: Policy, resized: bool, where: str) -> Codec:
    """Return the codec in the policy's sizes; only a caller who asks for others (`resized`) may change
    them.
    """
    needs = policy.needs()
    wanted = replace(
        codec.config,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        max_tokens=needs.max_tokens,
    )
    wanted = replace(wanted, action_tokens=_action_tokens(codec, needs))
    if holds_state(needs.prompt) != holds_state(wanted.prompt):
        wanted = replace(wanted, prompt=needs.prompt)  # the state moves into the prompt, or out of it
    require_vocabulary(codec, policy, where)
    if wanted == codec.config:
        return codec
    if not resized:
        raise WeightsError(
            f"{where}: codec.json does not fit policy.json: {_different(codec.config, wanted)}"
        )
    return codec.with_changes(config=wanted)


def _different(there: CodecConfig, wanted: CodecConfig) -> str:
    """Return the fields that differ, with the value of the codec and that of the policy."""
    pairs = [(one.name, getattr(there, one.name), getattr(wanted, one.name)) for one in fields(CodecConfig)]
    return "; ".join(
        f"{name} is {quoted(have)}, and the policy's is {quoted(want)}"
        for name, have, want in pairs
        if have != want
    )


def _action_tokens(codec: Codec, needs: Needs) -> ActionTokenConfig | None:
    """Return how the codec writes actions as tokens, if the policy learns them."""
    wanted, have = needs.action_tokens, codec.config.action_tokens  # what is lacking, training adds
    return None if wanted is None or have is None else replace(have, longest=wanted.longest)
