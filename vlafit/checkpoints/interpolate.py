"""Interpolate between the weights that fine-tuning began with and its result, part by part.

    weight = base + share * (fine-tuned - base)

Fine-tuning on little data loses some of what the base could do; a share below 1 of some parts can give it
back (WiSE-FT, arXiv 2109.01903). Which shares are worth it is for rollouts to say.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlafit.checkpoints.assign import raise_mismatch, replace_parameter
from vlafit.checkpoints.formats.native import adapters as adapted
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.history import read_lineage
from vlafit.checkpoints.load import load_all
from vlafit.checkpoints.locate import digest, place
from vlafit.codec import Codec, CodecSet
from vlafit.codec.normaliser import MixedNormaliser, Normaliser
from vlafit.errors import ConfigError, WeightsError, did_you_mean
from vlafit.files import plain_text
from vlafit.nn.deferred import Deferred, defer
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.tuning.merge import merge

SHOWN_BY_SHAPES = ("state_dim", "action_dim")  # compared tensor by tensor
FREE = (*SHOWN_BY_SHAPES, "chunk", "max_tokens")  # may differ between a checkpoint and its base


class BaseCheckpoint(NamedTuple):
    """The checkpoint that fine-tuning began with, and notes about how it was found."""

    path: Path
    notes: tuple[str, ...]


@torch.no_grad()
def interpolate(policy: Policy, base: Policy, shares: Mapping[str, float]) -> Policy:
    """Move the weights of `policy` towards those of `base`, in place, and return it.

    `shares` gives for a part how much of the fine-tuning stays: 0 is the base's weights, 1 (parts that are
    not named) the policy's own, bit for bit. Sums are made in float32 and cast once. Neither policy may carry
    adapters. Raises WeightsError for a part that the policy has not, a share outside 0 to 1, and weights that
    differ in name or shape from the base's.
    """
    _require_shares(policy, shares)
    live, below = dict(policy.named_parameters()), dict(base.named_parameters())
    moved = [info for info in policy.parts() if shares.get(info.part, 1.0) != 1.0]
    _require_same_form(policy, base)
    raise_mismatch(
        "interpolation",
        {
            "missing in the base": [info.name for info in moved if info.name not in below],
            "misshapen": [
                f"{info.name} is {tuple(below[info.name].shape)} in the base, not"
                f" {tuple(live[info.name].shape)}"
                for info in moved
                if info.name in below and below[info.name].shape != live[info.name].shape
            ],
        },
    )
    for info in moved:
        own, share = live[info.name], float(shares[info.part])
        start = below[info.name].to(own.device)
        if isinstance(own, Deferred):
            between = _between(defer(start), own, share)
            replace_parameter(policy, info.name, Deferred(between, own.shape, torch.float32).cast(own.dtype))
        else:
            own.copy_(_between(start, own, share)())
    return policy


def _between(start: Tensor, own: Tensor, share: float) -> Callable[[], Tensor]:
    """Return what makes the weight between two, in float32."""
    return lambda: start.float() if share == 0.0 else torch.lerp(start.float(), own.float(), share)


def find_base(source: Path, given: str | Path | None = None) -> BaseCheckpoint:
    """Return the checkpoint that the training of the checkpoint `source` began with.

    It is the one it sits on, or the one that its recipe names, verified by the hash in its history; or the
    one `given`, and a note where that is another one. Raises WeightsError where there is none.
    """
    below = adapted.read_base(source) if native.recognise(source) else None
    recorded = read_lineage(source).base if native.recognise(source) else ""
    if below is not None and recorded in ("", below.sha256):
        return BaseCheckpoint(adapted.find_base(source, below, given, place, digest), ())
    if below is not None and given is not None and digest(place(given).path) == below.sha256:
        given = None  # it names what `source` sits on, and training began with what another run made of it
    if given is not None:
        path = _find(str(given), source)
        if recorded and digest(path) != recorded:
            return BaseCheckpoint(
                path, (f"{path} is not the checkpoint that training began with, by its hash",)
            )
        return BaseCheckpoint(
            path, () if recorded else (f"there is no record of whether training began with {path}",)
        )
    reference = _recipe_checkpoint(source)
    if not (recorded and reference):
        raise WeightsError(f"{source}: does not record which checkpoint its training began with: give --base")
    path = _find(reference, source)
    if digest(path) != recorded:
        raise WeightsError(
            f"{source}: its training began with another checkpoint than what lies at {path} now: the "
            f"SHA-256 is {digest(path)}, not {recorded}; give the right one: --base"
        )
    return BaseCheckpoint(path, ())


def load_base(path: Path, like: Policy) -> tuple[Policy, CodecSet | None]:
    """Load the checkpoint at `path`, of any format, with its adapters merged; its weights are deferred.

    What it does not record (heads, say) is taken from the config of the policy `like`. Its codec comes
    with it.
    """
    sizes: Mapping[str, Any] | None = None
    if not native.recognise(path):
        sizes = {k: v for k, v in asdict(like.config).items() if k not in SHOWN_BY_SHAPES}
    loaded = load_all(path, config=sizes, deferred=True)
    return merge(loaded.policy), loaded.codecs


def codec_notes(
    codecs: Codec | CodecSet | None, base: Codec | CodecSet | None, shares: Mapping[str, float]
) -> tuple[str, ...]:
    """Say where projections are mixed that were made for numbers of different units.

    They meet states and actions as their own codec normalises them; between two that differ, weights of the
    one see the numbers of the other.
    """
    if shares.get("projections", 1.0) == 1.0:
        return ()
    if codecs is None or base is None:
        return ("there is no codec to show whether both checkpoints normalise numbers alike",)
    notes, base = [], CodecSet.of(base)
    for codec in CodecSet.of(codecs):
        name = codec.embodiment.name
        below = base[name] if name in base else next(iter(base)) if len(base) == 1 else None
        if below is None:
            notes.append(f"the base has no embodiment {name!r} to compare the normalisation with")
        elif different := _differing(codec, below):
            of = f" of {name}" if codec.embodiment_id is not None else ""
            notes.append(
                f"{' and '.join(different)}{of} are normalised otherwise in the base: its projections are "
                "for other numbers than the codec gives, and weights between the two may be of use to neither"
            )
    return tuple(notes)


def _differing(codec: Codec, base: Codec) -> list[str]:
    columns: tuple[Literal["state", "action"], ...] = ("state", "action")
    return [
        name
        for name in columns
        if not _alike(codec.normaliser_of(name), base.normaliser_of(name))
        or (name == "action" and codec.config.unchanged != base.config.unchanged)
        or codec.columns.settings != base.columns.settings
    ]


def _alike(one: Normaliser | MixedNormaliser, other: Normaliser | MixedNormaliser) -> bool:
    if isinstance(one, Normaliser) and isinstance(other, Normaliser):
        pairs = [(one.offset, other.offset), (one.scale, other.scale)]
        return all(a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)
    if isinstance(one, Normaliser) or isinstance(other, Normaliser) or len(one.parts) != len(other.parts):
        return False
    return all(
        np.array_equal(a, b) and _alike(mine, its)
        for (a, mine), (b, its) in zip(one.parts, other.parts, strict=True)
    )


def _require_shares(policy: Policy, shares: Mapping[str, float]) -> None:
    parts = list(dict.fromkeys(info.part for info in policy.parts()))
    for part, share in shares.items():
        if part not in parts:
            raise WeightsError(
                f"interpolation: the policy has no part {part!r}; its parts are {', '.join(parts)}"
                f"{did_you_mean(part, parts, listed=False)}"
            )
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0.0 <= share <= 1.0:
            raise WeightsError(
                f"interpolation: the share of {part} must be a number from 0 (the base's weights) to 1 "
                f"(the fine-tuned ones), not {share!r}"
            )


def _require_same_form(policy: Policy, base: Policy) -> None:
    names = [family_name(p) for p in (policy, base)]
    if names[0] != names[1]:
        raise WeightsError(f"interpolation: this policy is a {names[0]}, the base a {names[1]}")
    sizes, base_sizes = (asdict(p.config) for p in (policy, base))
    # Sizes of tensors are compared tensor by tensor; heads, say, show in no tensor.
    different = [key for key in sizes if key not in FREE and not _same(sizes[key], base_sizes[key], _UNSEEN)]
    if different:
        raise WeightsError(
            f"interpolation: {different[0]} is {base_sizes[different[0]]} in the base, "
            f"{sizes[different[0]]} in this policy"
        )


_UNSEEN = ("heads", "kv_heads", "head_dim", "self_every", "shuffle", "patch")


def _same(one: Any, other: Any, keys: tuple[str, ...]) -> bool:
    if isinstance(one, dict):
        return all(one.get(key) == other.get(key) for key in keys)
    return one == other


def _recipe_checkpoint(source: Path) -> str:
    path = source / native.RECIPE
    if not path.is_file():
        return ""
    try:
        return str(tomllib.loads(plain_text(path))["policy"]["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _find(reference: str, source: Path) -> Path:
    try:
        return place(reference).path
    except ConfigError as error:
        raise WeightsError(
            f"{source}: its base {reference!r} is not there; give its place: --base"
        ) from error
