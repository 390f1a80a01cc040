"""One call for a checkpoint of any form, told from its contents alone."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlafit.checkpoints import codecs
from vlafit.checkpoints import locate as hub
from vlafit.checkpoints.assign import (
    DTYPES,
    Dtype,
    compare,
    complain,
    fit,
    open_tensors,
    replace_parameter,
    stored_as,
)
from vlafit.checkpoints.formats import unsupported as strangers
from vlafit.checkpoints.formats.hf_transformers import names as transformers
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.native import adapters as adapted
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.openpi import defaults as assumed
from vlafit.checkpoints.formats.openpi import jax as openpi_jax
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.formats.openpi import norm_stats as openpi_assets
from vlafit.checkpoints.formats.peft import read as peft_import
from vlafit.checkpoints.hashing import digest
from vlafit.checkpoints.infer.pi0 import infer_config
from vlafit.checkpoints.load_report import LoadReport
from vlafit.checkpoints.name_map import Translated, translate
from vlafit.checkpoints.opened import Found
from vlafit.checkpoints.options import WIDTHS, Given, dtype_of, take_apart
from vlafit.checkpoints.tensor_files import weight_files
from vlafit.codec import Codec
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import ConfigError, WeightsError, did_you_mean
from vlafit.nn.policy import Policy, Source
from vlafit.policies import family, family_of, merge, model_of, override
from vlafit.policies._common import select
from vlafit.tuning import Plan

Resize = Literal["refuse", "keep", "fresh"]


class Loaded(NamedTuple):
    """A policy and what belongs to it. What there is not is None; the report says why there is no codec."""

    policy: Policy
    codec: Codec | None
    plan: Plan | None
    report: LoadReport


def load(
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
) -> Loaded:
    """Load the checkpoint `path` exactly, whatever program wrote it.

    It is a folder, one safetensors file, or a string that is an id of the Hugging Face Hub (``org/name`` or
    ``org/name@revision``; see `hub.place`).
    `config` replaces fields of the policy's config (nested, or with dotted keys), or gives those that the
    checkpoint does not tell; its table `lora` (see `openpi_jax.LoraConfig`) and its table `codec` (see
    `openpi_assets.CodecOptions`) say the same of these. `tokenizer`, a folder, and `assets`, which of the
    checkpoint's normalisation statistics to use, make a codec where the checkpoint has none of its own.
    `base` is where the checkpoint lies that adapters sit on, if not where it lay when they were saved; its
    hash must be the same.

    `fresh` names parts (``"expert"``) or name patterns (``"action_*"``) that start from weights drawn from
    `generator` (seed 0 without one), whatever the checkpoint holds for them. Where `config` gives the policy
    another action_dim or state_dim, `resize` must say what becomes of the projections: ``"keep"`` what both
    widths have, and begin with zeros beyond, or ``"fresh"`` ones. Norms and projections stay float32 when
    `dtype` is ``"bfloat16"``.

    Raises WeightsError naming every tensor that is missing, surplus, misshapen or not finite, and ConfigError
    for keys that do not exist.
    """
    given, dtype = take_apart(config), dtype_of(dtype)
    _require_device(device)
    place = _place(path)
    found = _noted(_find(place.path, given, base, resize, fresh), place)
    policy, names = _on_meta(found, fresh, resize)
    for info in policy.parts():
        if info.name in names:
            shape = policy.get_parameter(info.name).shape
            replace_parameter(policy, info.name, torch.empty(shape, dtype=stored_as(info, DTYPES[dtype])))
    if names:
        family(found.family).init_weights(policy, generator or torch.Generator().manual_seed(0), names)
        for name in names:
            replace_parameter(policy, name, policy.get_parameter(name).detach().to(device))
    fit(
        policy,
        found.translated.weights,
        where=found.path,
        fresh=names,
        dtype=DTYPES[dtype],
        device=device,
        contents=found.contents() if found.contents else None,
        resized=found.resized,
        twins=found.translated.twins,
        theirs=found.translated.theirs,
        odd=found.odd,
    )
    codec, why, notes = codecs.choose(found, policy, given, tokenizer, assets)
    if found.adapters is not None:
        found = replace(found, plan=peft_import.plan_of(policy, found.adapters))
    report = _report(found, policy, dtype, names, why, notes)
    if found.adapters is not None:
        peft_import.attach(policy, found.adapters)
    elif found.plan is not None and (found.plan.adapted or found.plan.quantised):
        adapted.restore(place.path, policy, found.plan, found.below)
    policy.source = found.source or _source(place, found, given)
    return Loaded(policy, codec, found.plan, report)


def _source(place: hub.Place, found: Found, given: Given) -> Source | None:
    """Return where the weights of the checkpoint lie; None where they are not whole without its adapters."""
    if found.plan is not None and found.plan.adapted:
        return None
    known = digest(place.path) if native.recognise(place.path) else ""
    return Source(place.name, known, given.to_read_again())


def inspect(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype = "float32",
    *,
    base: str | Path | None = None,
    fresh: Sequence[str] = (),
    resize: Resize = "refuse",
) -> Loaded:
    """Judge a checkpoint by its headers alone, as `load` would; the policy stays on the meta device.

    No number of a weight is read: damage inside the numbers is found by `load` alone. Codecs are read where
    the checkpoint has its own.
    """
    place, given, dtype = _place(path), take_apart(config), dtype_of(dtype)
    found = _noted(_find(place.path, given, base, resize, fresh, hash_weights=False), place)
    given.refuse("codec", found.path, "no codec is made where headers alone are read")
    policy, names = _on_meta(found, fresh, resize)
    weights, theirs = found.translated.weights, found.translated.theirs
    every = [info.name for info in policy.parts()] + list(weights)
    complain(found.path, compare(policy, weights, names, found.resized), theirs, every, found.odd)
    if found.adapters is not None:
        found = replace(found, plan=peft_import.plan_of(policy, found.adapters))
    why = "" if found.codec else "none in the checkpoint itself"
    if found.codec is None and found.assets:
        why += f"; its statistics ({', '.join(found.assets)}) make one when it is loaded with a tokenizer"
    return Loaded(policy, found.codec, found.plan, _report(found, policy, dtype, names, why, ()))


def load_policy(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    dtype: Dtype | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> Policy:
    """Load a checkpoint's policy alone; see `load`."""
    return load(path, config, dtype=dtype, device=device).policy


def _place(path: str | Path) -> hub.Place:
    try:
        return hub.place(path)
    except ConfigError as error:
        raise WeightsError(f"{path}: there is no such checkpoint") from error


def _require_device(device: str | torch.device) -> None:
    try:
        usable = torch.empty(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has no one kind for it
        reason = str(error).split("\n")[0]
        raise WeightsError(f"device {device!r} cannot be used here: {reason}") from error
    if not usable:
        raise WeightsError("device 'meta' holds no numbers; to look at headers alone: checkpoints.inspect")


def _noted(found: Found, place: hub.Place) -> Found:
    return replace(found, notes=(place.note, *found.notes)) if place.note else found


def _find(
    path: Path,
    given: Given,
    base: str | Path | None,
    resize: str,
    fresh: Sequence[str],
    hash_weights: bool = True,
) -> Found:
    if resize not in (options := ("refuse", "keep", "fresh")):
        raise WeightsError(f"resize {resize!r} is not known{did_you_mean(resize, options)}")
    if isinstance(fresh, str):
        raise ConfigError(f"fresh is a list of parts and patterns: [{fresh!r}], not {fresh!r}")
    if path.is_dir() and native.recognise(path):
        found = _native(path, given, base, hash_weights)
    elif peft_import.recognise(path):
        adapters = peft_import.open_folder(path, base)
        found = peft_import.put_on(_foreign(adapters.base, given), adapters)
    else:
        found = _foreign(path, given)
    if base is not None and found.below is None and found.adapters is None:
        raise WeightsError(f"{path}: base={str(base)!r} is for adapters on a checkpoint, and these are none")
    return _resize(found, given, resize, fresh)


def _native(path: Path, given: Given, base: str | Path | None, hash_weights: bool) -> Found:
    given.refuse_options("native", str(path))
    opened = native.open_folder(path, hash_weights)
    made = override(opened.config, given.fields, f"{path}: config") if given.fields else opened.config
    own = open_tensors([opened.weights])
    found = Found(
        str(path), "native", opened.family, made, Translated(own, (), ()), opened.codec, opened.plan
    )
    found = replace(found, chunk=opened.config.chunk, below=opened.base)
    if opened.base is None:
        return found
    place = adapted.locate(path, opened.base, base)
    said = {k: v for k, v in asdict(opened.config).items() if k not in WIDTHS}
    said = merge(said, opened.base.config)
    below = _find(
        place, take_apart(None if native.recognise(place) else said), None, "refuse", (), hash_weights
    )
    weights = {n: t for n, t in below.translated.weights.items() if n not in own} | own

    def contents() -> Iterable[tuple[str, Tensor]]:
        assert below.contents is not None
        yield from ((n, t) for n, t in below.contents() if n not in own)
        yield from own.items()

    def theirs(name: str) -> str:
        return name if name in own else below.translated.theirs(name)

    return replace(
        found,
        translated=replace(below.translated, weights=weights, theirs=theirs, twins={}),
        odd=below.odd,
        contents=contents if below.contents else None,
        source=Source(str(place.resolve()), opened.base.sha256, opened.base.config),
        notes=(f"on {opened.base.checkpoint}, {len(own)} weights of its own",),
    )


def _foreign(path: Path, given: Given) -> Found:
    params = openpi_jax.recognise(path)
    if params is not None:
        return _jax(params, given)
    folder = path if path.is_dir() else path.parent
    tensors = open_tensors(weight_files(path))
    stranger = strangers.name_family(tensors)
    if stranger:
        raise WeightsError(f"{path}: these are the weights of {stranger}; we have no such family")
    strangers.refuse_mixed(tensors, str(path))
    if lerobot.recognise(tensors, folder):
        given.refuse_options(lerobot.FORM, str(path))
        made, translated = lerobot.open_weights(tensors, folder, given.fields, str(path), given.widths)
        name, odd = family_of(made.config), translated.odd + made.odd
        said = lerobot.describe(folder)
        chunk = said.get("chunk_size", int) if said is not None else None
        notes = ()
        if chunk is None and "chunk" not in given.fields:
            notes = (f"chunk is {made.config.chunk}: assumed, for no config.json of LeRobot tells it",)
        return Found(
            str(path),
            lerobot.FORM,
            name,
            made.config,
            translated,
            chunk=chunk,
            processors=folder,
            notes=notes,
            odd=odd,
        )
    for module, names in ((transformers, transformers.SAVED), (openpi, openpi.NAMES)):
        if not module.recognise(tensors):
            continue
        if module is openpi:
            given.refuse("lora", str(path), "openpi's PyTorch code has no LoRA")
        else:
            given.refuse_options(names.form, str(path))
        translated = translate(tensors, names)
        told = module.told_beside(tensors, folder, translated.theirs)
        # transformers reads no codec, and our export leaves ours beside its files.
        ours = module is transformers and (folder / native.CODEC).is_file()
        codec = Codec.load(folder) if ours else None
        if codec is not None:
            told = replace(told, values={**told.values, "max_tokens": codec.config.max_tokens})
        made = infer_config(translated.weights, told, given.fields, str(path), given.widths)
        chunk, odd = told.values.get("chunk"), translated.odd + made.odd
        notes = assumed.from_public(made.config, {**told.values, **given.fields})
        found = Found(
            str(path), names.form, "pi0", made.config, translated, codec, chunk=chunk, notes=notes, odd=odd
        )
        return replace(found, assets=openpi_assets.find_assets(folder)) if module is openpi else found
    raise WeightsError(
        f"{path}: its tensors ({len(tensors)}, such as {min(tensors, default='-')!r}) are neither those of"
        " a native checkpoint, nor of LeRobot's or openpi's pi0 or pi0.5, nor of SmolVLA, nor of "
        "transformers' pi0"
    )


def _jax(params: Path, given: Given) -> Found:
    tree = openpi_jax.open_tree(params, given.lora)
    assumed.require_factors(params, tree.lora, given)
    said, notes = assumed.chunk_of(params, given)
    told = replace(tree.told, values={**tree.told.values, **said})
    made = infer_config(tree.weights, told, given.fields, str(params), given.widths)
    notes += assumed.from_public(made.config, {**told.values, **given.fields})
    return Found(
        str(params),
        openpi_jax.FORM,
        "pi0",
        made.config,
        Translated(tree.weights, (), (), tree.theirs),
        contents=tree.contents,
        chunk=said.get("chunk"),
        assets=openpi_assets.find_assets(params.parent),
        notes=tree.notes + notes,
        odd=made.odd,
    )


def _resize(
    found: Found,
    given: Given,
    resize: str,
    fresh: Sequence[str],
) -> Found:
    """Give the policy the widths that the user wants, and say what that does to its projections."""
    where, widths = f"{found.path}: config", given.widths
    wanted = override(found.config, widths, where) if widths else found.config
    adapted = []
    if "chunk" in given.fields and found.chunk not in (None, wanted.chunk):
        adapted.append(f"chunk: {wanted.chunk} actions at once, {found.chunk} in the checkpoint")
    changed = [key for key in widths if getattr(wanted, key) != getattr(found.config, key)]
    if not changed:
        return replace(found, adapted=tuple(adapted))
    adapted += [f"{k}: {getattr(wanted, k)}, {getattr(found.config, k)} in the checkpoint" for k in changed]
    build = family(found.family).build
    old = {n: p.shape for n, p in build(found.config, "meta").named_parameters()}
    policy = build(wanted, "meta")
    new = {n: p.shape for n, p in policy.named_parameters()}
    resized = {name: shape for name, shape in old.items() if name in new and new[name] != shape}
    anew = {info.name for info in select(policy.parts(), fresh)} if fresh else set()
    anew |= set(resized) if resize == "fresh" else set()
    if resize == "refuse" and not set(resized) <= anew:
        raise WeightsError(
            f"{found.path}: {', '.join(changed)} in config is not the checkpoint's, and changes"
            f" {', '.join(resized)}. Say what becomes of them: resize='keep' (what both widths have stays,"
            " the rest begins with zeros) or resize='fresh'"
        )
    for name, shape in resized.items():
        pair = f"{tuple(shape)} to {tuple(new[name])}"
        grown = any(n > o for n, o in zip(new[name], shape, strict=True))
        how = "fresh" if name in anew else "padded with zeros" if grown else "sliced"
        adapted.append(f"{name}: {how}, {pair}")
    return replace(found, config=wanted, resized=resized, adapted=tuple(adapted))


def _on_meta(found: Found, fresh: Sequence[str], resize: str) -> tuple[Policy, list[str]]:
    """Build the policy without storage; return it and the names of its fresh parameters."""
    policy = family(found.family).build(found.config, "meta")
    chosen = [*fresh, *(found.resized or () if resize == "fresh" else ())]
    return policy, [info.name for info in select(policy.parts(), chosen)] if chosen else []


def _report(
    found: Found, policy: Policy, dtype: str, fresh: Sequence[str], why: str, notes: tuple[str, ...]
) -> LoadReport:
    parts: dict[str, int] = {}
    size = 0
    for info in policy.parts():
        count = policy.get_parameter(info.name).numel()
        parts[info.part] = parts.get(info.part, 0) + count
        size += count * stored_as(info, DTYPES[dtype]).itemsize
    used = {n: t for n, t in found.translated.weights.items() if n not in set(fresh)}
    notes += tuple(adapted.describe(found.plan)) if found.plan else ()
    return LoadReport(
        path=found.path,
        form=found.form,
        family=model_of(found.config),
        dtype=dtype,
        parts=parts,
        bytes=size,
        unused=found.translated.unused,
        tied=found.translated.tied,
        fresh=tuple(fresh),
        used=len(used),
        stored=dict(Counter(str(t.dtype).removeprefix("torch.") for t in used.values())),
        adapted=found.adapted,
        resized=tuple(found.resized or ()),
        notes=found.notes + notes,
        codec=why,
    )
