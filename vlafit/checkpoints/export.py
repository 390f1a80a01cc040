"""Export a checkpoint to another program's format, or to vlafit's own."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlafit import files, locks
from vlafit.agreement import Agreement
from vlafit.checkpoints import beside, model_card
from vlafit.checkpoints import interpolate as between
from vlafit.checkpoints.assign import Dtype
from vlafit.checkpoints.changes import Change, answers, changed, measure
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.base import Format
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.native.adapters import read_base
from vlafit.checkpoints.formats.native.format import FORMAT as NATIVE
from vlafit.checkpoints.formats.peft import write as peft
from vlafit.checkpoints.history import Lineage, join_seeds, read_lineage
from vlafit.checkpoints.load import load_all
from vlafit.checkpoints.loaded import LoadedSet
from vlafit.checkpoints.locate import digest, place
from vlafit.checkpoints.options import parse_dtype
from vlafit.checkpoints.precision import cast, round_weights
from vlafit.checkpoints.save import save
from vlafit.checkpoints.tensor_files import read_text
from vlafit.codec import Codec, CodecSet
from vlafit.codec.described import learned
from vlafit.errors import WeightsError
from vlafit.nn.deferred import materialise
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.tuning.merge import merge as merge_adapters
from vlafit.tuning.merge import remove


@dataclass(frozen=True)
class Exported:
    """The folder of an exported checkpoint; `notes` say how the target has to be used, or what it does
    otherwise.
    """

    folder: Path
    target: str
    files: tuple[str, ...]
    notes: tuple[str, ...]
    merged: Change | None = None
    """What merging changed; None where nothing was merged."""
    rounded: Change | None = None
    """What rounding weights to bfloat16 changed, computed in float32; None where they are float32."""
    narrow: Change | None = None
    """The same, computed in bfloat16, as by a program that loads the weights so."""

    @property
    def merge_error(self) -> float | None:
        """The largest change of an action through merging, as a share of the largest action."""
        return self.merged and self.merged.relative

    @property
    def cast_error(self) -> float | None:
        """The same, through rounding weights, and computing, in bfloat16: the larger of the two."""
        changes = [change.relative for change in (self.rounded, self.narrow) if change]
        return max(changes, default=None)

    def text(self) -> str:
        """Return a summary in a few lines."""
        lines = [f"{self.folder}: for {self.target}, {len(self.files)} files: {', '.join(self.files)}"]
        if (merged := self.merged) is not None:
            lines.append(
                f"adapters merged in float32; on {merged.observations} random observations that changed "
                f"actions by at most {merged.text()}"
            )
        if (rounded := self.rounded) is not None:
            narrow = f", and computed in bfloat16 by {self.narrow.text()}" if self.narrow else ""
            lines.append(
                f"weights rounded once, to bfloat16; on {rounded.observations} random observations that "
                f"changed actions by at most {rounded.text()}{narrow}. On recorded ones: vlafit eval "
                f"{self.folder} --data CARD"
            )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def export(
    source: str | Path,
    target: str,
    out: str | Path,
    *,
    merge: bool = False,
    interpolate: Mapping[str, float] | None = None,
    base: str | Path | None = None,
    embodiment: str = "",
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype | None = None,
    format: str | None = None,
    trust: Sequence[str] = (),
    results: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    assets: str | Path | None = None,
) -> Exported:
    """Write the checkpoint `source`, of any format that `load` reads, into the new folder `out`.

    `target` is a format that vlafit writes (`registry.writable`), or a module that has one as FORMAT;
    `format` names that of `source`, as in `load`. Every weight is written, also of a checkpoint that sits on
    another one: in `dtype`, which for "bfloat16" means rounded once, where the target does not keep them in
    float32 itself (norms and projections, as a rule). None is bfloat16 for a checkpoint of a run that
    computed in bfloat16, and says so, else float32.
    Adapters are written as one PEFT folder in the target's module names, with the weights below them in
    `base/` (see `peft.write`); `merge` folds them into the weights instead. With `interpolate` (part -> share
    of the fine-tuning that stays) the weights lie between those that training began with and the checkpoint's
    own, adapters merged first. `base` is where the checkpoint lies that adapters sit on, or that training
    began with, where `source` does not record it or it has moved. `embodiment` names the one whose codec is
    written; without a name vlafit's own format keeps all, and other formats, which hold one, refuse several.
    `config`, `tokenizer` and `assets` give what the checkpoint does not
    record, and `trust` names packages of policy families, as in `load`. `results` are the sentences of the
    model card about it (`vlafit.report.card_results`); interpolated weights have none yet.

    The folder appears whole or not at all. Raises WeightsError where `out` exists already or another process
    is writing it, or the target cannot hold the policy, its codec or its adapters: every reason is named.
    """
    out = Path(out)
    writer = registry.writer(target)
    _require_free(out)
    with locks.creating(out, "vlafit export"):
        _require_free(out)  # another process may just have created it
        return _export(
            source,
            target,
            out,
            writer,
            merge=merge,
            interpolate=interpolate,
            base=base,
            embodiment=embodiment,
            config=config,
            dtype=dtype,
            format=format,
            trust=trust,
            results=() if interpolate else tuple(results),
            tokenizer=tokenizer,
            assets=assets,
        )


def _export(
    source: str | Path,
    target: str,
    out: Path,
    writer: Format,
    *,
    merge: bool,
    interpolate: Mapping[str, float] | None,
    base: str | Path | None,
    embodiment: str,
    config: Mapping[str, object] | None,
    dtype: Dtype | torch.dtype | None,
    format: str | None,
    trust: Sequence[str],
    results: tuple[str, ...],
    tokenizer: str | Path | None,
    assets: str | Path | None,
) -> Exported:
    location = place(source)
    path = location.path
    is_native = native.recognise(path)
    named = None if dtype is None else parse_dtype(dtype)
    sits_on = read_base(path) if is_native else None
    loaded = load_all(
        path,
        config,
        base=base if sits_on or not interpolate else None,
        tokenizer=tokenizer,
        assets=assets,
        format=format,
        trust=trust,
        deferred=True,
    )
    every, agreement = loaded.codecs, loaded.agreement
    loaded = _of(loaded, embodiment, writer, str(path))
    recipe_file = path / native.RECIPE  # its hash has been verified
    recipe = read_text(recipe_file) if is_native and recipe_file.is_file() else None
    narrow = named is None and _computed_in_bf16(recipe, recipe_file)
    dtype = named or ("bfloat16" if narrow else "float32")
    merged, notes = None, (f"from {location.note}",) if location.note else ()
    tuned = loaded.plan is not None and (loaded.plan.adapted or loaded.plan.quantised)
    if tuned and (merge or interpolate):
        merged = merge_measured(loaded.policy, loaded.codecs)
        loaded = replace(loaded, plan=None)
    elif merge:
        notes += ("there were no adapters to merge",)
    if loaded.codecs is None and not is_native:
        why = loaded.report.codec
        way = "; vlafit export takes --tokenizer and --assets, too" if "--" in why else ""
        notes += (f"no codec.json is written: {why}{way}",)
    history = read_lineage(path) if is_native else None
    if interpolate:
        below = between.find_base(path, base)
        base_policy, base_codecs = between.load_base(below.path, loaded.policy)
        between.interpolate(loaded.policy, base_policy, interpolate)
        loaded = replace(loaded, plan=None)
        history = _interpolated(history, interpolate, below.path)
        notes += (f"{history.made}; of other parts everything", *below.notes)
        notes += between.codec_notes(loaded.codecs, base_codecs, interpolate)
    if narrow:
        notes += ("in bfloat16, because its run computed in bfloat16; --dtype float32 writes float32",)
    rounded = narrow_change = None
    if dtype == "bfloat16":
        rounded, narrow_change = round_measured(loaded.policy, loaded.codecs, writer)
    if writer is NATIVE:
        save(
            loaded.policy,
            out,
            loaded.codecs,
            plan=loaded.plan,
            recipe=recipe,
            history=history,
            agreement=agreement,
            results=results,
            new=True,
        )
        exported = Exported(out, target, _files_of(out), ())
    else:
        holders = registry.holders(loaded.policy, loaded.codecs)

        def readme(notes: Sequence[str]) -> str:
            return model_card.card(
                loaded.policy,
                loaded.codecs,
                recipe=recipe,
                history=history,
                agreement=agreement,
                results=results,
                target=target,
                adapters=loaded.plan is not None and bool(loaded.plan.adapted),
                holders=holders,
                notes=[note.replace(str(out.resolve()), model_card.PLACE) for note in notes],
            )

        if is_native or agreement is not None:
            agreement = beside.of_one(agreement, loaded.of().codec, every)
        exported = _write(loaded, writer, target, out, str(path), dtype, readme, agreement)
    return replace(
        exported, notes=notes + exported.notes, merged=merged, rounded=rounded, narrow=narrow_change
    )


def write(
    policy: Policy,
    codec: Codec | None,
    target: str,
    out: str | Path,
    where: str,
    readme: Callable[[Sequence[str]], str] | None = None,
    agreement: Agreement | None = None,
) -> Exported:
    """Write a policy without adapters, and its codec, into the new folder `out`; see `export`.

    `where` begins a refusal; `readme` returns the text of the model card, given what the format notes;
    `agreement` is that of the policy's data.
    """
    out, writer = Path(out), registry.writer(target)
    _require_free(out)
    _require_expressible(policy, codec, writer, target, where, [])
    _prepare(policy, writer)
    with files.new_folder(out, new=True) as partial:
        notes = writer.write(partial, policy, codec, out.resolve())
        if readme is not None:
            files.write_atomic(partial / model_card.FILE, readme(notes))
        beside.write(partial, agreement, codec and codec.embodiment)
        written = _files_of(partial)
    return Exported(out, target, written, notes)


def _of(loaded: LoadedSet, embodiment: str, writer: Format, where: str) -> LoadedSet:
    """Return the checkpoint with the codec of one embodiment, unless all of several are to be kept.

    Raises WeightsError where the target holds one, and none of several is named.
    """
    codecs = loaded.codecs
    if not embodiment and (codecs is None or len(codecs) == 1 or writer is NATIVE):
        return loaded
    if not embodiment and codecs is not None:
        raise WeightsError(
            f"{where}: learned {len(codecs)} embodiments ({', '.join(codecs.names)}), and a {writer.target} "
            "checkpoint holds one; name it: --embodiment NAME"
        )
    codec = loaded.of(embodiment).codec
    return replace(loaded, codecs=None if codec is None else CodecSet([codec]))


def _write(
    loaded: LoadedSet,
    writer: Format,
    target: str,
    out: Path,
    where: str,
    dtype: Dtype,
    readme: Callable[[Sequence[str]], str],
    agreement: Agreement | None,
) -> Exported:
    """Write a policy, its codec, `agreement` and the card that `readme` returns into the new folder `out`."""
    policy, codec, plan, _ = loaded.of()
    if plan is None or not plan.adapted:
        rounded = ("quantised weights are written as the floats that they stand for",)
        notes = rounded if plan is not None and plan.quantised else ()
        policy = merge_adapters(policy)
        if dtype == "bfloat16":
            cast_for(policy, writer)
        exported = write(policy, codec, target, out, where, readme, agreement)
        return replace(exported, notes=notes + exported.notes)
    reasons = peft.refusals(policy, plan, writer.adapters, target)
    _require_expressible(policy, codec, writer, target, where, reasons)
    assert writer.adapters is not None
    names = writer.adapters.names(family_name(policy))
    assert names is not None
    adapters = peft.take(policy, plan, names)
    remove(policy)
    if dtype == "bfloat16":
        cast_for(policy, writer)
    _prepare(policy, writer)
    with files.new_folder(out, new=True) as partial:
        below, final = partial / peft.BASE, out.resolve() / peft.BASE
        below.mkdir()
        notes = writer.write(below, policy, codec, final)
        peft.write(partial, adapters, final)
        writer.adapters.write_beside(partial, below)
        files.write_atomic(partial / model_card.FILE, readme(notes))
        for folder in (below, partial):
            beside.write(folder, agreement, codec and codec.embodiment)
        written = _files_of(partial)
    note = (
        f"adapters in peft's form; the weights below them are in {peft.BASE}/, and adapter_config.json "
        "names that"
        f" folder by its absolute path, because peft would look for a relative one in the working"
        f" directory: {final}. Where the folder moves, change base_model_name_or_path there (vlafit itself "
        "looks"
        f" inside the folder first)"
    )
    return Exported(out, target, written, (note, *notes))


def merge_measured(policy: Policy, codecs: CodecSet | None = None) -> Change:
    """Merge the adapters of `policy` into its weights, in place, and return what that changed."""
    return measure(policy, codecs, lambda: merge_adapters(policy))


def round_measured(policy: Policy, codecs: CodecSet | None, writer: Format) -> tuple[Change, Change]:
    """Make bfloat16, in place, of what `writer` keeps so.

    Return what the rounding changed, computed in float32, and what that and computing in bfloat16 changed.
    """
    before = answers(policy)
    precise = lambda info: writer.keeps_float32(info, policy)  # noqa: E731
    rounded = changed(policy, codecs, before, lambda: round_weights(policy, precise))
    return rounded, changed(policy, codecs, before, lambda: cast_for(policy, writer))


def cast_for(policy: Policy, writer: Format) -> None:
    """Cast to bfloat16 what `writer` keeps so. Adapters stay as they are."""
    cast(policy, lambda info: writer.keeps_float32(info, policy))


def _computed_in_bf16(recipe: str | None, path: Path) -> bool:
    """Whether the recipe that is saved with a checkpoint says that its run computed in bfloat16."""
    try:
        train = tomllib.loads(recipe or "").get("train", {})
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise WeightsError(f"{path}: is not TOML: {error}; name the precision by --dtype") from error
    return isinstance(train, dict) and train.get("precision") == "bf16"


def _interpolated(history: Lineage | None, shares: Mapping[str, float], base: Path) -> Lineage:
    """Return the history of weights between those of `history` and of `base`."""
    kept = ", ".join(f"{share:g} of {part}" for part, share in shares.items())
    before = read_lineage(base) if native.recognise(base) else Lineage()
    own = history or Lineage()
    seeds, episodes = join_seeds(own.seeds, before.seeds), tuple(sorted({*own.episodes, *before.episodes}))
    made = f"interpolated: from checkpoint {digest(base)[:12]} on, {kept}"
    return replace(
        own,
        seeds=seeds,
        episodes=episodes,
        complete=own.complete and before.complete,
        made=f"{own.made}; {made}" if own.made else made,
    )


def _prepare(policy: Policy, writer: Format) -> None:
    """Give the weights memory where the writer does not take them one at a time."""
    if not writer.takes_deferred:
        materialise(policy)


def _require_free(out: Path) -> None:
    if out.exists():
        raise WeightsError(f"{out} exists already; name a new folder, or remove it first")


def _require_expressible(
    policy: Policy, codec: Codec | None, writer: Format, target: str, where: str, more: list[str]
) -> None:
    reasons = writer.refusals(policy, codec) + more
    if codec is not None and not writer.holds_columns:
        reasons += [f"{target} does not repeat this of its codec: {point}" for point in learned(codec)]
    if reasons:
        raise WeightsError(
            f"{where}: cannot be written for {target}:\n" + "\n".join(f"  {reason}" for reason in reasons)
        )


def _files_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
