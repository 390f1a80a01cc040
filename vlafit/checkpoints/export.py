"""Take a checkpoint out of the house: to LeRobot, openpi's PyTorch code or transformers, or as our own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch

from vlafit import files
from vlafit.checkpoints import interpolate as between
from vlafit.checkpoints import locate as hub
from vlafit.checkpoints.assign import Dtype, stored_as
from vlafit.checkpoints.formats.hf_transformers import write as transformers_export
from vlafit.checkpoints.formats.lerobot import write as lerobot_export
from vlafit.checkpoints.formats.native import adapters as adapted
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.openpi import write as openpi_export
from vlafit.checkpoints.formats.peft import write as peft_export
from vlafit.checkpoints.history import Lineage, read_lineage
from vlafit.checkpoints.load import Loaded, load
from vlafit.checkpoints.options import dtype_of
from vlafit.checkpoints.precision import cast, round_weights
from vlafit.checkpoints.save import save
from vlafit.codec import Codec
from vlafit.errors import WeightsError, did_you_mean
from vlafit.nn.batch import Batch
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.tuning.merge import merge as merge_adapters
from vlafit.tuning.merge import remove

Target = Literal["lerobot", "openpi", "transformers", "vlafit"]
WRITERS: dict[str, ModuleType] = {
    "lerobot": lerobot_export,
    "openpi": openpi_export,
    "transformers": transformers_export,
}


@dataclass(frozen=True)
class Exported:
    """Where a checkpoint went; `notes` say what the target must be told, or does otherwise."""

    folder: Path
    target: Target
    files: tuple[str, ...]
    notes: tuple[str, ...]
    merge_error: float | None = None
    """Largest change of a velocity on a random batch through merging; see `merge_measured`."""
    cast_error: float | None = None
    """The same, through rounding weights to bfloat16; None where they are float32."""

    def text(self) -> str:
        """Return what a person wants to know, in a few lines."""
        lines = [f"{self.folder}: for {self.target}, {len(self.files)} files: {', '.join(self.files)}"]
        if self.merge_error is not None:
            lines.append(
                f"adapters merged in float32; on a random batch that changed velocities by at most "
                f"{self.merge_error:.1e} of the largest"
            )
        if self.cast_error is not None:
            lines.append(
                f"weights rounded once, to bfloat16; on a random batch that changed velocities by at most "
                f"{self.cast_error:.1e} of the largest"
            )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def export(
    source: str | Path,
    target: Target,
    out: str | Path,
    *,
    merge: bool = False,
    interpolate: Mapping[str, float] | None = None,
    base: str | Path | None = None,
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype = "float32",
) -> Exported:
    """Write the checkpoint `source`, of any form that `load` reads, into the new folder `out`.

    Weights are written in float32, or rounded once to `dtype` "bfloat16" where the target does not keep them
    in float32 itself (norms and projections, as a rule). Adapters are written as one PEFT folder in the
    target's module names, with the weights below them in `base/` (see `peft_export`); `merge` folds them into
    the weights instead. With `interpolate` (part -> share of the fine-tuning that stays) the weights lie
    between those that training began with and the checkpoint's own, adapters merged first. `base` is where
    the checkpoint lies that adapters sit on, or that training began with, where `source` does not tell or it
    has moved. `config` says what the checkpoint does not tell of itself, as in `load`.

    The folder appears whole or not at all. Raises WeightsError where `out` is there already, or the target
    cannot express the policy, its codec or its adapters: every reason is named.
    """
    out, dtype = Path(out), dtype_of(dtype)
    _require_free(target, out)
    place = hub.place(source)
    source = place.path
    is_native = native.recognise(source)
    sits_on = adapted.read_base(source) if is_native else None
    loaded = load(source, config, base=base if sits_on or not interpolate else None)
    error, notes = None, (f"from {place.note}",) if place.note else ()
    tuned = loaded.plan is not None and (loaded.plan.adapted or loaded.plan.quantised)
    if tuned and (merge or interpolate):
        error = merge_measured(loaded.policy)
        loaded = loaded._replace(plan=None)
    elif merge:
        notes += ("there were no adapters to merge",)
    history = read_lineage(source) if is_native else None
    if interpolate:
        found = between.find_base(source, base)
        below, codec = between.load_base(found.path, loaded.policy)
        between.interpolate(loaded.policy, below, interpolate)
        loaded = loaded._replace(plan=None)
        history = _interpolated(history, interpolate, found.path)
        notes += (f"{history.made}; of other parts everything", *found.notes)
        notes += between.codec_notes(loaded.codec, codec, interpolate)
    lost = round_measured(loaded.policy, target) if dtype == "bfloat16" else None
    if target == "vlafit":
        if lost is not None:
            cast_for(loaded.policy, target)
        recipe = source / native.RECIPE
        told = recipe.read_text(encoding="utf-8") if is_native and recipe.is_file() else None
        save(loaded.policy, out, loaded.codec, plan=loaded.plan, recipe=told, history=history)
        made = Exported(out, target, _listed(out), ())
    else:
        made = _write(loaded, target, out, str(source), dtype)
    return replace(made, notes=notes + made.notes, merge_error=error, cast_error=lost)


def write(policy: Policy, codec: Codec | None, target: Target, out: str | Path, where: str) -> Exported:
    """Write a policy without adapters, and its codec, into the new folder `out`; see `export`.

    `where` begins a refusal.
    """
    out = Path(out)
    _require_free(target, out)
    if target == "vlafit":
        save(policy, out, codec)
        return Exported(out, target, _listed(out), ())
    _require_expressible(policy, codec, target, where, [])
    with files.new_folder(out) as partial:
        notes = WRITERS[target].write(partial, policy, codec)
        if target == "lerobot":
            notes += lerobot_export.name_vlm(partial, out.resolve())
        written = _listed(partial)
    return Exported(out, target, written, notes)


def _write(loaded: Loaded, target: Target, out: Path, where: str, dtype: Dtype) -> Exported:
    policy, codec, plan, _ = loaded
    if plan is None or not plan.adapted:
        rounded = ("quantised weights are written as the floats they stand for",)
        notes = rounded if plan is not None and plan.quantised else ()
        policy = merge_adapters(policy)
        if dtype == "bfloat16":
            cast_for(policy, target)
        made = write(policy, codec, target, out, where)
        return replace(made, notes=notes + made.notes)
    _require_expressible(policy, codec, target, where, peft_export.refusals(policy, plan, target))
    taken = peft_export.take(policy, plan, target)
    remove(policy)
    if dtype == "bfloat16":
        cast_for(policy, target)
    with files.new_folder(out) as partial:
        base = partial / peft_export.BASE
        base.mkdir()
        notes = WRITERS[target].write(base, policy, codec)
        place = out.resolve() / peft_export.BASE
        if target == "lerobot":
            notes += lerobot_export.name_vlm(base, place)
        peft_export.write(partial, taken, place)
        if target == "lerobot":
            lerobot_export.repeat_beside_adapters(partial, base)
        written = _listed(partial)
    note = (
        f"adapters in peft's form; the weights below them are in {peft_export.BASE}/, and adapter_config.json"
        f" names that folder by its absolute path, for LeRobot and peft would look for a relative one in the"
        f" working directory: {place}. Where the folder moves, change base_model_name_or_path there (vlafit"
        f" itself looks inside the folder first)"
    )
    return Exported(out, target, written, (note, *notes))


@torch.no_grad()
def merge_measured(policy: Policy) -> float:
    """Merge the adapters of `policy` into its weights, in place, and return what that changed.

    It is the largest change of a velocity for a random batch, relative to the largest velocity.
    """
    batch, noise, time = _random_batch(policy)
    policy.eval()
    before = policy.velocity(batch, noise, time)
    merge_adapters(policy)
    return _change(before, policy.velocity(batch, noise, time))


@torch.no_grad()
def round_measured(policy: Policy, target: Target) -> float:
    """Round to bfloat16 what `target` keeps so, in place, and return what that changed, as `merge_measured`.

    The dtypes stay, so that it is the rounding of the weights alone that is measured.
    """
    batch, noise, time = _random_batch(policy)
    policy.eval()
    before = policy.velocity(batch, noise, time)
    round_weights(policy, lambda info: _precise(info, policy, target))
    return _change(before, policy.velocity(batch, noise, time))


def cast_for(policy: Policy, target: Target) -> None:
    """Cast to bfloat16 what `target` keeps so. Adapters are as they were."""
    cast(policy, lambda info: _precise(info, policy, target))


def _precise(info: ParameterInfo, policy: Policy, target: Target) -> bool:
    if target == "vlafit":
        return stored_as(info, torch.bfloat16) == torch.float32
    return WRITERS[target].precise(info, policy)


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))


def _random_batch(policy: Policy) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Return a batch of two samples that fits the policy, noise and time; always the same."""
    needs, rng, rows, cameras = policy.needs(), torch.Generator().manual_seed(0), 2, 2
    length, side = min(needs.max_tokens, 16), needs.image_size
    device = next(policy.parameters()).device
    shape = (rows, needs.chunk, needs.action_dim)
    batch = Batch(
        images=torch.rand(rows, cameras, 3, side, side, generator=rng) * 2 - 1,
        image_mask=torch.ones(rows, cameras, dtype=torch.bool),
        tokens=torch.randint(0, needs.vocabulary, (rows, length), generator=rng),
        token_mask=torch.ones(rows, length, dtype=torch.bool),
        state=torch.randn(rows, needs.state_dim, generator=rng),
        actions=torch.randn(shape, generator=rng),
    )
    noise, time = torch.randn(shape, generator=rng), torch.rand(rows, generator=rng)
    return batch.to(device), noise.to(device), time.to(device)


def _interpolated(history: Lineage | None, shares: Mapping[str, float], base: Path) -> Lineage:
    """Return the history of weights between those of `history` and of `base`."""
    told = ", ".join(f"{share:g} of {part}" for part, share in shares.items())
    before = read_lineage(base) if native.recognise(base) else Lineage()
    own = history or Lineage()
    seeds = {
        task: tuple(sorted({*own.seeds.get(task, ()), *before.seeds.get(task, ())}))
        for task in sorted({*own.seeds, *before.seeds})
    }
    made = f"interpolated: from checkpoint {adapted.digest(base)[:12]} on, {told}"
    return replace(own, seeds=seeds, made=f"{own.made}; {made}" if own.made else made)


def _require_free(target: str, out: Path) -> None:
    if target not in get_args(Target):
        raise WeightsError(f"there is no target {target!r}{did_you_mean(target, get_args(Target))}")
    if out.exists():
        raise WeightsError(f"{out} is there already; name a new folder, or remove it first")


def _require_expressible(
    policy: Policy, codec: Codec | None, target: str, where: str, more: list[str]
) -> None:
    reasons = WRITERS[target].refusals(policy, codec) + more
    if reasons:
        raise WeightsError(
            f"{where}: cannot go to {target}:\n" + "\n".join(f"  {reason}" for reason in reasons)
        )


def _listed(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
