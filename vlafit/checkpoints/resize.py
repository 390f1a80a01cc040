"""Build a checkpoint's policy without storage, in the widths that the caller asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vlafit.checkpoints.formats.base import OpenedCheckpoint
from vlafit.checkpoints.options import LoadOptions
from vlafit.errors import ConfigError, WeightsError
from vlafit.nn.construct import require_restorable
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import Policy
from vlafit.policies import family, override
from vlafit.policies._common import select

EMBODIMENT = "embodiment:"
"""In `fresh`, before the number of an embodiment."""
SHOWN = 8  # names of tensors in an error


@dataclass(frozen=True)
class Sized:
    """The policy's config in the widths that the caller asks for, and what that does to its weights."""

    config: object
    fresh: Sequence[str]
    """Parts and name patterns to draw anew, those resized with "fresh" among them."""
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    """Shapes in the file of the weights that have another one in the policy."""
    changes: tuple[str, ...] = ()


def _resize(opened: OpenedCheckpoint, options: LoadOptions) -> Sized:
    """Give the policy the widths that the caller asks for, and say what that does to its projections."""
    fields, widths = options.config.fields, options.config.widths
    config = opened.config
    wanted = override(config, widths, f"{opened.path}: config") if widths else config
    changes = []
    if "chunk" in fields and opened.chunk not in (None, wanted.chunk):
        changes.append(f"chunk: {wanted.chunk} actions at once, {opened.chunk} in the checkpoint")
    changed = [key for key in widths if getattr(wanted, key) != getattr(config, key)]
    if not changed:
        return Sized(config, options.fresh, changes=tuple(changes))
    changes += [f"{k}: {getattr(wanted, k)}, {getattr(config, k)} in the checkpoint" for k in changed]
    build = family(opened.family).build
    old = {n: p.shape for n, p in build(config, "meta").named_parameters()}
    policy = build(wanted, "meta")
    new = {n: p.shape for n, p in policy.named_parameters()}
    resized = {name: shape for name, shape in old.items() if name in new and new[name] != shape}
    fresh = [*options.fresh, *(resized if options.resize == "fresh" else ())]
    drawn = set(selected(policy, fresh))
    tables = [i.name for i in policy.parts() if i.kind == "embedding" and i.name in resized]
    if options.resize == "keep" and not set(tables) <= drawn:
        raise WeightsError(
            f"{opened.path}: resize='keep' cannot slice {', '.join(tables)}: each row is an embodiment's "
            "matrix. Draw them anew: resize='fresh'"
        )
    if options.resize == "refuse" and not set(resized) <= drawn:
        more = f" and {len(resized) - SHOWN} more" if len(resized) > SHOWN else ""
        raise WeightsError(
            f"{opened.path}: {', '.join(changed)} in config is not the checkpoint's, and changes"
            f" {', '.join([*resized][:SHOWN])}{more}. Say what becomes of them: resize='keep' (what both"
            " widths have stays, the rest begins with zeros) or resize='fresh'"
        )
    for name, shape in resized.items():
        pair = f"{tuple(shape)} to {tuple(new[name])}"
        grown = any(n > o for n, o in zip(new[name], shape, strict=True))
        how = "fresh" if name in drawn else "padded with zeros" if grown else "sliced"
        changes.append(f"{name}: {how}, {pair}")
    return Sized(wanted, fresh, resized, tuple(changes))


def bare_policy(opened: OpenedCheckpoint, options: LoadOptions) -> tuple[Sized, Policy]:
    """Return the sizes of an opened checkpoint's policy, and the policy on the meta device."""
    sized = _resize(opened, options)
    policy = family(opened.family).build(sized.config, "meta")
    require_restorable(policy)
    if opened.steps is not None and policy.steps is not None:
        policy.steps = opened.steps
    if opened.max_delay and isinstance(policy, FlowPolicy):
        policy.max_delay = min(opened.max_delay, policy.needs().chunk - 1)
    return sized, policy


def split_embodiments(fresh: Sequence[str]) -> tuple[list[str], list[int]]:
    """Split `fresh` into parts and patterns, and the numbers of embodiments (``"embodiment:3"``).

    Raises WeightsError for one that is no number.
    """
    if isinstance(fresh, str):
        raise ConfigError(f"fresh is a list of parts and patterns: [{fresh!r}], not {fresh!r}")
    names, numbers = [], []
    for name in fresh:
        number = name.removeprefix(EMBODIMENT)
        if number == name:
            names.append(name)
        elif number.isdecimal():
            numbers.append(int(number))
        else:
            raise WeightsError(f"fresh: {name!r} must be {EMBODIMENT}N, with the number of an embodiment")
    return names, numbers


def draw_embodiments(
    policy: Policy, family_name: str, numbers: Sequence[int], generator: torch.Generator | None
) -> dict[str, list[int]]:
    """Draw the weights of single embodiments anew; return the names of the tensors that hold them, each with
    the rows that were drawn, or none where all of the tensor was.

    Raises WeightsError where the policy has none of that number.
    """
    if not numbers:
        return {}
    draw, needs = vars(family(family_name)).get("init_embodiment"), policy.needs()
    room, used = needs.embodiments, needs.embodiment_rows
    if draw is None or not room:
        raise WeightsError(f"fresh: {family_name} has no weights of single embodiments; name parts instead")
    generator = generator or torch.Generator().manual_seed(0)
    tables = {info.name for info in policy.parts() if info.kind == "embedding"}  # a row for each embodiment
    drawn: dict[str, list[int]] = {}
    for number in numbers:
        if number >= room:
            raise WeightsError(
                f"fresh: there is no embodiment {number}; the policy has weights for embodiments 0 to "
                f"{room - 1}"
            )
        if used and number not in used:
            raise WeightsError(
                f"fresh: {EMBODIMENT}{number} would have no effect: the config's {needs.embodiment_field} is "
                f"{list(used)}; name {number} there, too: policy.config.{needs.embodiment_field} = [{number}]"
            )
        for name in draw(policy, number, generator):
            drawn.setdefault(name, []).extend([number] if name in tables else [])
    return drawn


def selected(policy: Policy, fresh: Sequence[str]) -> list[str]:
    """Return the parameters that parts and name patterns select."""
    return [info.name for info in select(policy.parts(), fresh)] if fresh else []
