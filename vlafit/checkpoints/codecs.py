"""The codec that belongs to a loaded policy: the checkpoint's own, or one made of its statistics."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vlafit.checkpoints import lerobot_processors, openpi_assets
from vlafit.checkpoints.found import Found
from vlafit.codec import Codec
from vlafit.codec.tokenizer import Tokenizer
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy


def choose(
    found: Found,
    policy: Policy,
    config: Mapping[str, object] | None,
    tokenizer: str | Path | Tokenizer | None,
    assets: str | Path | None,
) -> tuple[Codec | None, str, tuple[str, ...]]:
    """Return the codec of a checkpoint, why there is none, and notes.

    `config`, `tokenizer` and `assets` are the user's, as `load` takes them. Raises WeightsError where they do
    not go with the checkpoint, or its codec not with the policy.
    """
    words = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if found.processors is not None:
        if assets is not None:
            raise WeightsError(f"{found.path}: a {found.form} checkpoint takes no assets")
        codec, why = lerobot_processors.read(found.processors, policy.needs(), words)
        if codec is not None:
            _require_vocabulary(codec, policy, found.path)
        return codec, why, ()
    if found.codec is not None:
        for name, value in (("tokenizer", tokenizer), ("assets", assets)):
            if value is not None:
                raise WeightsError(f"{found.path}: has a codec of its own; it takes no {name}")
        return _suit(found.codec, policy, config, found.path), "", ()
    if found.assets is None:
        if assets is not None:
            raise WeightsError(f"{found.path}: a {found.form} checkpoint takes no assets")
        return (
            None,
            "fine-tuning fits one" if found.form == "native" else "no statistics in the checkpoint",
            (),
        )
    if tokenizer is None and assets is None:
        listed = ", ".join(found.assets) or "none"
        return None, f"no tokenizer in the checkpoint: give one (statistics in it: {listed})", ()
    asset = openpi_assets.choose(found.assets, assets, found.path)
    if asset is None:
        return None, f"no assets/*/{openpi_assets.FILE} beside the weights: give assets", ()
    if words is None:
        return None, f"no tokenizer in the checkpoint: give one (statistics: {asset[1]})", ()
    needs, options = policy.needs(), found.options or {}
    made, notes = openpi_assets.make_codec(asset, needs, words, policy.config.pi05, options)
    _require_vocabulary(made, policy, found.path)
    return made, "", notes


def _require_vocabulary(codec: Codec, policy: Policy, where: str) -> None:
    have, room = codec.tokenizer.vocab_size, policy.needs().vocabulary
    if have > room:
        raise WeightsError(f"{where}: the tokenizer has {have} tokens, the policy knows {room}")


def _suit(codec: Codec, policy: Policy, config: Mapping[str, object] | None, where: str) -> Codec:
    """Return the codec in the sizes of the policy, which only a `config` of the user may have changed."""
    needs = policy.needs()
    wanted = replace(
        codec.config,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        max_tokens=needs.max_tokens,
    )
    if (needs.prompt == "pi05") != (wanted.prompt == "pi05"):
        wanted = replace(wanted, prompt=needs.prompt)  # the state moves into the prompt, or out of it
    _require_vocabulary(codec, policy, where)
    if wanted == codec.config:
        return codec
    if not config:
        raise WeightsError(f"{where}: codec.json does not fit policy.json: {codec.config} against {wanted}")
    return Codec(wanted, codec.embodiment, codec.statistics, codec.tokenizer)
