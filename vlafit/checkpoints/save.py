"""Save a policy in vlafit's own format, whole or not at all, alone or on a base checkpoint."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from vlafit import files
from vlafit.agreement import Agreement
from vlafit.checkpoints import model_card
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.native.adapters import Base
from vlafit.checkpoints.formats.native.write import write_folder
from vlafit.checkpoints.history import Lineage
from vlafit.checkpoints.hub import Place
from vlafit.checkpoints.load import load
from vlafit.checkpoints.locate import digest, place
from vlafit.checkpoints.options import WIDTHS
from vlafit.codec import Codec, CodecSet
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies import merge_dotted
from vlafit.tuning import Plan
from vlafit.tuning.inject import adapter_tensors, base_name, is_residual
from vlafit.tuning.quantise import is_rounded_from, quantised_names


def save(
    policy: Policy,
    folder: str | Path,
    codec: Codec | CodecSet | None = None,
    *,
    plan: Plan | None = None,
    recipe: str | None = None,
    history: Lineage | None = None,
    weights: Mapping[str, Tensor] | None = None,
    base: str | Path | Base | None = None,
    changed: Collection[str] | None = None,
    agreement: Agreement | None = None,
    results: tuple[str, ...] = (),
    new: bool = False,
) -> None:
    """Write a checkpoint; `folder` appears whole, and an older one there is replaced, unless it has to be
    `new`.

    `codec` is a set where the policy learned several embodiments. `plan` says what learned, and where
    adapters sit; a policy with adapters needs it. `recipe` is the resolved recipe's TOML, `history` what the
    weights learned from, `agreement` what data and checkpoint agreed on, `results` the model card's sentences
    on evaluations. `weights` replace the policy's own
    (a moving average, or what sharded processes gathered) and must have exactly its names and shapes; those
    that are not written (quantised ones, and what a Base holds that is given with `changed`) may be left out.

    `base` names a checkpoint that the policy sits on (a path, or one that ships), and then only adapters are
    written and those weights that differ from it: those named in `changed`, or found by comparison. A
    quantised policy sits on the checkpoint that it was loaded from where no other is named. Any other one
    without `base` is written whole.

    Raises WeightsError when the pieces do not belong together, when quantised weights are not those of the
    base, rounded (they would be lost), or when a quantised policy has no base.
    """
    folder = Path(folder)
    live = dict(policy.named_parameters())
    adapters = adapter_tensors(policy)
    rounded = {f"{layer}.weight" for layer in quantised_names(policy)}
    unsaved = set(rounded)
    if isinstance(base, Base) and changed is not None:
        unsaved |= {n for n in live if n not in adapters and base_name(n) not in changed}
    given = live if weights is None else {**{n: live[n] for n in unsaved}, **weights}
    if {n: t.shape for n, t in given.items() if n not in rounded} != {
        n: p.shape for n, p in live.items() if n not in rounded
    }:
        different = sorted(
            n for n in {*given, *live} if n not in given or n not in live or given[n].shape != live[n].shape
        )
        raise WeightsError(
            f"{folder}: the weights to save are not the policy's; they differ in {different[:5]}"
        )
    own = {base_name(name): tensor for name, tensor in given.items() if name not in adapters}
    quantised = {base_name(name) for name in rounded}
    _require_belonging(folder, plan, adapters, own)
    if base is None and quantised:
        base = policy.source.checkpoint if policy.source else None
        if base is None:
            raise WeightsError(_NOWHERE.format(folder=folder, count=len(quantised)))
    if isinstance(base, str | Path):
        below = place(base)
        if below.path.resolve() == folder.resolve():
            raise WeightsError(
                f"{folder}: is the checkpoint that the policy sits on; save it beside that, not over it"
            )
        base, differing = _base(policy, own, below, plan)
        changed = differing if changed is None else changed
    if base is not None and changed is not None:
        own = {name: tensor for name, tensor in own.items() if name in changed and name not in quantised}
    with files.new_folder(folder, new=new) as partial:
        write_folder(partial, policy, own, codec, plan, recipe, history, given, base, agreement)
        text = model_card.card(
            policy,
            codec,
            recipe=recipe,
            history=history,
            agreement=agreement,
            results=results,
            adapters=bool(adapters),
            holders=registry.holders(policy, codec),
        )
        (partial / model_card.FILE).write_text(text, encoding="utf-8")


def _require_belonging(
    folder: Path,
    plan: Plan | None,
    adapters: Collection[str],
    own: Collection[str],
) -> None:
    if adapters and plan is None:
        raise WeightsError(
            f"{folder}: a policy with adapters is saved with the plan that apply_strategy returned"
        )
    if plan is not None:
        planned = {e.name for e in plan.entries}
        if planned != {*own, *adapters}:
            different = sorted(planned ^ {*own, *adapters})
            raise WeightsError(
                f"{folder}: the plan is not of this policy; they differ in {different[:3]}. A policy whose "
                "adapters were merged is saved without a plan"
            )


_NOWHERE = (
    "{folder}: cannot save: {count} quantised weights have no full-precision source in a checkpoint, "
    "because the "
    "policy was built or merged, not loaded. Save the policy before a strategy quantises it, and load that "
    "checkpoint; or name the checkpoint that holds them as `base`; or merge (vlafit.merge), which keeps the "
    "rounded values"
)


def _base(
    policy: Policy, own: Mapping[str, Tensor], location: Place, plan: Plan | None
) -> tuple[Base, set[str]]:
    """Return the checkpoint at `location` as a base, and the names of the weights that are not its, bit for
    bit.

    The config to read it is remembered from when the policy was loaded. Raises WeightsError where it is
    the base of another policy.
    """
    path, source = location.path, policy.source
    config = {} if source is None or native.recognise(path) else source.config
    base = Base(location.name, digest(path), config)
    if source is not None and location.name == source.checkpoint and source.sha256 not in ("", base.sha256):
        raise WeightsError(
            f"{path}: is not the checkpoint any more that the policy was loaded from: its SHA-256 was "
            f"{source.sha256}; bring it back, or give its place now: base=..."
        )
    sizes = None
    if not native.recognise(path):
        sizes = merge_dotted({k: v for k, v in asdict(policy.config).items() if k not in WIDTHS}, base.config)
    base_policy = load(path, sizes).policy
    below = dict(base_policy.named_parameters())
    layers = {base_name(f"{n}.weight"): policy.get_submodule(n) for n in quantised_names(policy)}
    apart = {n for n in own.keys() & below.keys() if n not in layers and own[n].shape != below[n].shape}
    widths = any(getattr(base_policy.config, key) != getattr(policy.config, key) for key in WIDTHS)
    if own.keys() != below.keys() or (apart and not widths):
        raise WeightsError(f"{path}: is not the base of this policy: names or shapes differ")
    changed = [name for name, layer in layers.items() if not is_rounded_from(layer, below[name])]
    if changed:
        raise WeightsError(
            f"{path}: {len(changed)} quantised weights of the policy, such as {changed[0]}, are not those "
            "of this "
            "checkpoint, rounded: what they were would be lost. They changed before the strategy rounded "
            "them: save the policy before it, load that checkpoint and apply the strategy to it"
        )
    # From what PiSSA adapts it took its initial factors, which are saved, too; unless it was trained since.
    kept = {
        f"{layer}.weight"
        for layer, a in (plan.adapted if plan else {}).items()
        if a.init == "pissa" and is_residual(policy, layer, below[f"{layer}.weight"])
    }
    differing = {
        name
        for name, tensor in own.items()
        if name not in kept
        and name not in layers
        and (name in apart or not torch.equal(tensor.detach().cpu(), below[name].to(tensor.dtype)))
    }
    return base, differing
