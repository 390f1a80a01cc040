"""The codec that belongs to a loaded policy: the checkpoint's own, or one made of its statistics."""

from dataclasses import replace
from pathlib import Path

from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot import read_processors as lerobot_processors
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.openpi import jax as openpi_jax
from vlafit.checkpoints.formats.openpi import norm_stats as openpi_assets
from vlafit.checkpoints.opened import Found
from vlafit.checkpoints.options import Given
from vlafit.codec import Codec
from vlafit.codec.tokenizer import Tokenizer
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy


def choose(
    found: Found,
    policy: Policy,
    given: Given,
    tokenizer: str | Path | Tokenizer | None,
    assets: str | Path | None,
) -> tuple[Codec | None, str, tuple[str, ...]]:
    """Return the codec of a checkpoint, why there is none, and notes.

    `given`, `tokenizer` and `assets` are the user's, as `load` takes them. Raises WeightsError where they do
    not go with the checkpoint or would have no effect, or its codec does not go with the policy.
    """
    words = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if found.processors is not None:
        if assets is not None:
            raise WeightsError(f"{found.path}: a {found.form} checkpoint takes no assets")
        codec, why = lerobot_processors.read(found.processors, policy.needs(), words)
        if codec is not None:
            _require_vocabulary(codec, policy, found.path)
        elif tokenizer is not None:
            raise WeightsError(f"{found.path}: tokenizer would have no effect: {why}")
        return codec, why, ()
    if found.codec is not None:
        for name, value in (("tokenizer", tokenizer), ("assets", assets)):
            if value is not None:
                raise WeightsError(f"{found.path}: has a codec of its own; it takes no {name}")
        return _suit(found.codec, policy, bool(given.fields or given.widths), found.path), "", ()
    if found.assets is None:
        why = "fine-tuning fits one" if found.form == "native" else "no statistics in the checkpoint"
        for name, value in (("tokenizer", tokenizer), ("assets", assets)):
            if value is not None:
                raise WeightsError(f"{found.path}: a {found.form} checkpoint takes no {name}: {why}")
        return None, why, ()
    if words is None:
        listed = ", ".join(found.assets) or "none"
        why = f"no tokenizer in the checkpoint: give one (statistics in it: {listed})"
        given.refuse("codec", found.path, why)
        if assets is not None:
            raise WeightsError(f"{found.path}: assets would have no effect: {why}")
        return None, why, ()
    asset = openpi_assets.choose(found.assets, assets, found.path)
    if asset is None:
        raise WeightsError(
            f"{found.path}: tokenizer would have no effect: no assets/*/{openpi_assets.FILE} beside the"
            " weights: give assets, too"
        )
    needs = policy.needs()
    made, notes = openpi_assets.make_codec(asset, needs, words, policy.config.pi05, given.codec)
    _require_vocabulary(made, policy, found.path)
    return made, "", notes


def wants_tokenizer(path: Path) -> bool:
    """Whether the checkpoint holds statistics of another program, and no tokenizer beside them."""
    folder = path if path.is_dir() else path.parent
    if native.recognise(folder):
        return False
    if lerobot.describe(folder) is not None:
        return lerobot_processors.lacks_tokenizer(folder)
    params = openpi_jax.recognise(path)
    return bool(openpi_assets.find_assets(folder if params is None else params.parent))


def _require_vocabulary(codec: Codec, policy: Policy, where: str) -> None:
    have, room = codec.tokenizer.vocab_size, policy.needs().vocabulary
    if have > room:
        raise WeightsError(f"{where}: the tokenizer has {have} tokens, the policy knows {room}")


def _suit(codec: Codec, policy: Policy, told: bool, where: str) -> Codec:
    """Return the codec in the sizes of the policy, which only a user who `told` others may have changed."""
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
    if not told:
        raise WeightsError(f"{where}: codec.json does not fit policy.json: {codec.config} against {wanted}")
    return Codec(wanted, codec.embodiment, codec.statistics, codec.tokenizer)
