"""Load a checkpoint of any format: locate, detect, open, assign, codec, report."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlafit import arguments
from vlafit.checkpoints import beside
from vlafit.checkpoints.assign import (
    DTYPES,
    Dtype,
    compare,
    fit,
    raise_mismatch,
)
from vlafit.checkpoints.declaration import Declaration
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.fresh import draw_fresh
from vlafit.checkpoints.hub import Place
from vlafit.checkpoints.infer import infer_config
from vlafit.checkpoints.load_report import make_report
from vlafit.checkpoints.loaded import Loaded, LoadedSet
from vlafit.checkpoints.locate import digest, place
from vlafit.checkpoints.options import ConfigOverrides, LoadOptions, Resize, parse_dtype, split_config
from vlafit.checkpoints.resize import bare_policy, draw_embodiments, selected, split_embodiments
from vlafit.codec import CodecSet
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import ConfigError, WeightsError
from vlafit.nn.construct import require_numbers
from vlafit.nn.policy import Policy, Source

Narrow = Callable[[Policy, Mapping[str, torch.Tensor], bool], Collection[str]]


def load(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    base: str | Path | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    assets: str | Path | None = None,
    dtype: Dtype | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    embodiment: str = "",
    fresh: Sequence[str] = (),
    resize: Resize = "refuse",
    generator: torch.Generator | None = None,
    format: str | None = None,
    trust: Sequence[str] = (),
    narrow: Narrow | None = None,
) -> Loaded:
    """Load the checkpoint `path` exactly, whatever program wrote it.

    It is a folder, one safetensors file, or a string that is an id of the Hugging Face Hub (``org/name`` or
    ``org/name@revision``; see `hub.place`). Its format is detected by its contents; `format` names one
    instead, as ``"lerobot"`` or as a module that has a FORMAT (``"package.module"``).

    `config` replaces fields of the policy's config (nested, or with dotted keys), or gives those that the
    checkpoint does not record; some formats have tables of their own in it (openpi's `codec` and `lora`).
    `tokenizer`, a folder, and `assets`, which of the checkpoint's normalisation statistics to use, make a
    codec where the checkpoint has none of its own. `base` is where the checkpoint lies that this one sits on,
    if it is not where it was when this one was saved; its hash must be the same. `embodiment` names the one
    whose codec is returned, where the checkpoint learned several: without a name there is then none.

    `fresh` names parts (``"expert"``) or name patterns (``"action_*"``) that start from weights drawn from
    `generator` (seed 0 without one), whatever the checkpoint holds for them; ``"embodiment:3"`` names the
    rows of embodiment 3 in the tables of a policy that has weights for each. Where `config` gives the policy
    another action_dim or state_dim, `resize` must say what becomes of the projections: ``"keep"`` what both
    widths have, and begin with zeros beyond, or ``"fresh"`` ones. Norms and projections stay float32 when
    `dtype` is ``"bfloat16"``. `narrow` chooses weights to keep in bfloat16 whatever the `dtype`: it is called
    with the bare policy on the meta device, the file's tensors by the policy's names, and whether adapters
    or quantised weights come on top.

    No code of a checkpoint runs. If its policy family is a module of a package that is not installed with an
    entry point "vlafit.policies", `trust` must name that package.

    Raises WeightsError naming every tensor that is missing, surplus, misshapen or not finite, and ConfigError
    for keys that do not exist.
    """
    return load_all(
        path,
        config,
        base,
        tokenizer,
        assets,
        dtype,
        device,
        fresh=fresh,
        resize=resize,
        generator=generator,
        format=format,
        trust=trust,
        narrow=narrow,
    ).of(embodiment)


def load_all(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    base: str | Path | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    assets: str | Path | None = None,
    dtype: Dtype | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    fresh: Sequence[str] = (),
    resize: Resize = "refuse",
    generator: torch.Generator | None = None,
    format: str | None = None,
    trust: Sequence[str] = (),
    narrow: Narrow | None = None,
    deferred: bool = False,
) -> LoadedSet:
    """Load a checkpoint as `load` does, with the codecs of all its embodiments.

    With `deferred` (in float32, on the CPU) weights stay in their files, and are made when they are used; see
    `vlafit.nn.deferred`. Those of a format that reads its numbers in pieces (Orbax) are loaded.
    """
    fresh, rows = split_embodiments(fresh)
    options = LoadOptions(
        parse_config(config, format),
        base,
        tokenizer,
        assets,
        parse_dtype(dtype),
        fresh,
        resize,
        trust=trust,
    )
    _require_device(device)
    where = _located(path)
    found = beside.stored(where.path)
    options = replace(options, relative=found and found.agreement.relative)
    beside.require_current(found, hash_weights=options.hash_weights)
    opened = open_checkpoint(where.path, options, format)
    sized, policy = bare_policy(opened, options)
    draw = draw_fresh(policy, opened.family, sized.fresh, options.dtype, device, generator)
    tensors = opened.tensors
    fit(
        policy,
        tensors.weights,
        where=opened.path,
        fresh=draw,
        dtype=DTYPES[options.dtype],
        narrow=() if narrow is None else narrow(policy, tensors.weights, opened.adapters is not None),
        device=device,
        contents=opened.contents,
        resized=sized.shapes,
        twins=tensors.twins,
        file_name=tensors.file_name,
        conflicts=opened.conflicts,
        deferred=deferred and opened.contents is None,
    )
    require_numbers(policy)
    drawn = draw_embodiments(policy, opened.family, rows, generator)
    if not deferred:
        policy.to(device)  # buffers, which `fit` leaves on the CPU
    codec, reason, notes = opened.format.codec(opened, policy, options)
    plan = opened.plan if opened.adapters is None else opened.adapters.plan(policy)
    notes = _place_note(where.note) + opened.notes + notes
    report = make_report(
        opened, policy, options.dtype, draw, drawn, sized.changes, sized.shapes, plan, notes, reason
    )
    if opened.adapters is not None and plan is not None:
        opened.adapters.attach(policy, plan)
    policy.source = opened.source
    if policy.source is None and not (plan is not None and plan.adapted):
        policy.source = Source(where.name, opened.sha256, options.config.to_read_again())
    codecs = None if codec is None else CodecSet.of(codec)
    codecs = beside.complete(codecs, found, chosen=assets is not None)
    return LoadedSet(policy, codecs, plan, report, found and found.agreement)


def inspect(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype = "float32",
    *,
    base: str | Path | None = None,
    fresh: Sequence[str] = (),
    resize: Resize = "refuse",
    format: str | None = None,
    trust: Sequence[str] = (),
    embodiment: str = "",
    tokenizer: str | Path | Tokenizer | None = None,
    assets: str | Path | None = None,
) -> Loaded:
    """Check a checkpoint by its headers only, as `load` would; see `inspect_all`."""
    return inspect_all(
        path,
        config,
        dtype,
        base=base,
        fresh=fresh,
        resize=resize,
        format=format,
        trust=trust,
        tokenizer=tokenizer,
        assets=assets,
    ).of(embodiment)


def inspect_all(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype = "float32",
    *,
    base: str | Path | None = None,
    fresh: Sequence[str] = (),
    resize: Resize = "refuse",
    format: str | None = None,
    trust: Sequence[str] = (),
    tokenizer: str | Path | Tokenizer | None = None,
    assets: str | Path | None = None,
) -> LoadedSet:
    """Check a checkpoint by its headers only, as `load_all` would; the policy stays on the meta device.

    No number of a weight is read: damage inside the numbers is only found by `load`. Codecs are read where
    the checkpoint has its own, or made where `tokenizer`, `assets` or the tables of `config` for one are
    given.
    """
    fresh, rows = split_embodiments(fresh)
    options = LoadOptions(
        parse_config(config, format),
        base,
        tokenizer,
        assets,
        parse_dtype(dtype),
        fresh=fresh,
        resize=resize,
        hash_weights=False,
        trust=trust,
    )
    where = _located(path)
    found = beside.stored(where.path)
    options = replace(options, relative=found and found.agreement.relative)
    beside.require_current(found, hash_weights=options.hash_weights)
    opened = open_checkpoint(where.path, options, format)
    sized, policy = bare_policy(opened, options)
    weights, fresh = opened.tensors.weights, selected(policy, sized.fresh)
    every = [info.name for info in policy.parts()] + list(weights)
    wrong = compare(policy, weights, fresh, sized.shapes)
    drawn = draw_embodiments(policy, opened.family, rows, None)
    raise_mismatch(opened.path, wrong, opened.tensors.file_name, every, opened.conflicts)
    plan = opened.plan if opened.adapters is None else opened.adapters.plan(policy)
    asked = options.tokenizer is not None or options.assets is not None or options.config.for_a_codec
    make = opened.format.codec if asked else opened.format.codec_of_headers
    codec, reason, more = make(opened, policy, options)
    notes = _place_note(where.note) + opened.notes + more
    report = make_report(
        opened, policy, options.dtype, fresh, drawn, sized.changes, sized.shapes, plan, notes, reason
    )
    codecs = None if codec is None else CodecSet.of(codec)
    codecs = beside.complete(codecs, found, chosen=assets is not None)
    return LoadedSet(policy, codecs, plan, report, found and found.agreement)


def load_policy(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    base: str | Path | None = None,
    trust: Sequence[str] = (),
) -> Policy:
    """Load only the policy of a checkpoint; see `load`."""
    return load(path, config, base, dtype=dtype, device=device, trust=trust).policy


def parse_config(config: Mapping[str, object] | None, format: str | None = None) -> ConfigOverrides:
    """Split `load`'s config into policy fields and the tables of formats, those of the named one included."""
    tables = registry.option_tables()
    if format is not None:
        tables |= registry.option_tables([registry.named(format)])
    return split_config(config, tables)


def wants_tokenizer(path: Path, base: str | Path | None = None) -> bool:
    """Whether the checkpoint holds statistics of another program, and no tokenizer beside them; see
    `declaration`.
    """
    format, files, _ = _describing(path, base)
    return format.wants_tokenizer(files)


def declaration(path: Path, base: str | Path | None = None) -> Declaration:
    """Return what a checkpoint's files say of robot, actions and tokenizer, whether it has a codec or not.

    Adapters say nothing of it: the files beside them do, or those of their base, which is `base` where
    they do not hold it. Of a checkpoint of ours the codec speaks, and only its agreement is read here.
    """
    found = beside.stored(path)
    if native.recognise(path):
        return beside.declared(Declaration(), found)
    format, files, below = _describing(path, base)
    declared = beside.declared(format.declaration(files), found)
    if below is None or format.adapters is None:
        return declared
    more = format.adapters.settings(path, below).overruled
    return replace(declared, overruled=(*declared.overruled, *more))


def _describing(path: Path, base: str | Path | None) -> tuple[Format, CheckpointFiles, Path | None]:
    """Return the files that describe a checkpoint's robot, their format, and the base of adapters."""
    files = CheckpointFiles(path)
    format = registry.detect(files)
    below = format.base_of(files, base, _opener(()))
    if below is None:
        return format, files, None
    lower = CheckpointFiles(below)
    format = registry.detect(lower)
    if format.adapters is None:
        return format, lower, below
    folder = format.adapters.codec_folder(path, lower.folder)
    return format, lower if folder == lower.folder else CheckpointFiles(folder), below


def open_checkpoint(path: Path, options: LoadOptions, format: str | None = None) -> OpenedCheckpoint:
    """Detect the format of a checkpoint, read its headers and find its config.

    Raises WeightsError where the config cannot be found or what the caller asks for does not go with the
    format.
    """
    files = CheckpointFiles(path)
    chosen = registry.detect(files) if format is None else registry.named(format)
    opened = chosen.open(files, options, _opener(options.trust))
    _refuse_other_tables(opened.format, options.config, opened.path)
    if options.base is not None and not opened.on_base:
        raise WeightsError(
            f"{path}: base={str(options.base)!r} only applies to a checkpoint that sits on another one "
            "(adapters, or what a run trained); this one holds every weight"
        )
    if opened.config is not None:
        return opened
    tensors, overrides = opened.tensors, options.config
    inferred = infer_config(
        opened.family,
        tensors.weights,
        opened.evidence,
        overrides.fields,
        opened.path,
        overrides.widths,
        tensors.file_name,
    )
    return replace(
        opened,
        config=inferred.config,
        chunk=opened.evidence.values.get("chunk"),
        notes=opened.notes + inferred.notes,
        conflicts=opened.conflicts + tensors.conflicts + inferred.conflicts,
    )


def _opener(trust: Sequence[str]) -> Opener:
    return Opener(
        place,
        digest,
        open_checkpoint,
        lambda config: LoadOptions(parse_config(config), trust=trust),
    )


def _refuse_other_tables(format: Format, config: ConfigOverrides, where: str) -> None:
    own = {table.name for table in format.options}
    for name, table in registry.option_tables().items():
        if name not in own:
            config.refuse(
                name, where, f"this is a {format.name} checkpoint, and {name}.* is for {table.purpose}"
            )


def _located(path: str | Path) -> Place:
    path = arguments.path("checkpoint", path)
    try:
        return place(path)
    except ConfigError as error:
        reason = str(error)
    if reason.startswith((f"{path}: ", f"{path} ")):  # it says itself what is there
        raise WeightsError(reason)
    raise WeightsError(f"{path}: there is no such checkpoint ({reason})")


def _place_note(note: str) -> tuple[str, ...]:
    return (note,) if note else ()


def _require_device(device: str | torch.device) -> None:
    try:
        usable = torch.empty(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has no one kind for it
        reason = str(error).split("\n")[0]
        raise WeightsError(f"device {device!r} cannot be used here: {reason}") from error
    if not usable:
        raise WeightsError("device 'meta' holds no numbers; to look only at headers: checkpoints.inspect")
