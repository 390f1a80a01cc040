"""One call for a checkpoint of any form, told from its contents alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlafit.checkpoints import native, openpi, transformers
from vlafit.checkpoints.fit import DTYPES, Dtype, fit, open_tensors, replace_parameter, stored_as
from vlafit.checkpoints.names import Translated, translate
from vlafit.checkpoints.shapes import infer_config
from vlafit.codec import Codec
from vlafit.errors import WeightsError, did_you_mean
from vlafit.nn.policy import Policy
from vlafit.policies import family, override
from vlafit.policies._common import select
from vlafit.tuning import Plan

BYTES_TO_TRAIN = 16  # a trained fp32 parameter: weight, gradient, AdamW's two moments


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor. `parts` counts parameters; `unused` and `tied` are the file's names."""

    path: str
    form: str
    family: str
    dtype: str
    parts: dict[str, int]
    bytes: int
    unused: tuple[str, ...]
    tied: tuple[str, ...]
    fresh: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the policy."""
        return sum(self.parts.values())

    def text(self) -> str:
        """Return the report in a few lines."""
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parts.items())
        lines = [
            f"{self.path}: {self.form} checkpoint of {self.family}, loaded in {self.dtype}",
            f"{self.parameters:,} parameters: {parts}",
            f"memory: {self.bytes / 1e6:,.1f} MB of weights; to train all of them in fp32"
            f" {self.parameters * BYTES_TO_TRAIN / 1e6:,.1f} MB, activations not counted",
        ]
        for what, names in (("tied", self.tied), ("knowingly unused", self.unused), ("fresh", self.fresh)):
            if names:
                lines.append(f"{what} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines)


class Loaded(NamedTuple):
    """A policy and what belongs to it. Forms of other programs have no plan, and here no codec yet."""

    policy: Policy
    codec: Codec | None
    plan: Plan | None
    report: LoadReport


def load(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    *,
    fresh: Sequence[str] = (),
    generator: torch.Generator | None = None,
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load the checkpoint in the folder `path` (or one safetensors file) exactly, whatever program wrote it.

    `config` replaces fields of the policy's config (nested, or with dotted keys), or gives those that the
    checkpoint does not tell. `fresh` names parts (``"expert"``) or name patterns (``"action_*"``) that start
    from weights drawn from `generator` (seed 0 without one), whatever the checkpoint holds for them.
    Norms and projections stay float32 when `dtype` is ``"bfloat16"``.

    Raises WeightsError naming every tensor that is missing, surplus, misshapen or not finite, and ConfigError
    for keys that do not exist.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise WeightsError(
            f"dtype {dtype!r} is not one that policies are loaded in{did_you_mean(dtype, DTYPES)}"
        )
    if not path.exists():
        raise WeightsError(f"{path}: there is no such checkpoint")
    found = (
        _native(path, config) if path.is_dir() and native.recognise(path) else _foreign(path, config or {})
    )
    policy = family(found.family).build(found.config, "meta")
    names = [info.name for info in select(policy.parts(), fresh)] if fresh else []
    for info in policy.parts():
        if info.name in names:
            shape = policy.get_parameter(info.name).shape
            replace_parameter(policy, info.name, torch.empty(shape, dtype=stored_as(info, DTYPES[dtype])))
    if names:
        family(found.family).init_weights(policy, generator or torch.Generator().manual_seed(0), fresh)
        for name in names:
            replace_parameter(policy, name, policy.get_parameter(name).detach().to(device))
    weights = found.translated.weights
    fit(policy, weights, where=str(path), fresh=names, dtype=DTYPES[dtype], device=device)
    parts: dict[str, int] = {}
    for info in policy.parts():
        parts[info.part] = parts.get(info.part, 0) + policy.get_parameter(info.name).numel()
    report = LoadReport(
        path=str(path),
        form=found.form,
        family=found.family,
        dtype=dtype,
        parts=parts,
        bytes=sum(p.numel() * p.element_size() for p in policy.parameters()),
        unused=found.translated.unused,
        tied=found.translated.tied,
        fresh=tuple(names),
    )
    return Loaded(policy, found.codec and _suit(found.codec, policy, config, str(path)), found.plan, report)


def load_policy(
    path: str | Path,
    config: Mapping[str, object] | None = None,
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
) -> Policy:
    """Load a checkpoint's policy alone; see `load`."""
    return load(path, config, dtype=dtype, device=device).policy


@dataclass(frozen=True)
class _Found:
    form: str
    family: str
    config: Any
    translated: Translated
    codec: Codec | None = None
    plan: Plan | None = None


def _native(path: Path, config: Mapping[str, object] | None) -> _Found:
    opened = native.open_folder(path)
    made = override(opened.config, config, f"{path}: config") if config else opened.config
    tensors = open_tensors([opened.weights])
    return _Found("native", opened.family, made, Translated(tensors, (), ()), opened.codec, opened.plan)


def _foreign(path: Path, config: Mapping[str, object]) -> _Found:
    folder = path if path.is_dir() else path.parent
    tensors = open_tensors(_weight_files(path))
    for module, names in ((transformers, transformers.SAVED), (openpi, openpi.NAMES)):
        if module.recognise(tensors):
            translated = translate(tensors, names, str(path))
            known = module.known_config(folder)
            made = infer_config(translated.weights, known, config, str(path))
            return _Found(names.form, "pi0", made, translated)
    raise WeightsError(
        f"{path}: its tensors ({len(tensors)}, such as {min(tensors, default='-')!r}) are neither those of"
        " a native checkpoint, nor of openpi's PyTorch pi0 or pi0.5, nor of transformers' pi0"
    )


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path}: only safetensors files are opened, for a pickle can run any program")
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"{index}: not an index of safetensors files ({error!r})") from error
        return [path / name for name in sorted(set(listed))]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    for sign, what in (
        ("params/_METADATA", "an Orbax checkpoint of openpi's JAX code"),
        ("params/manifest.ocdbt", "an Orbax checkpoint of openpi's JAX code"),
        ("_METADATA", "the params folder of an Orbax checkpoint"),
        ("adapter_config.json", "an adapter, which needs its base"),
        ("pytorch_model.bin", "a pickle, which could run any program"),
    ):
        if (path / sign).exists():
            raise WeightsError(f"{path}: {what}; this version does not open that form")
    raise WeightsError(f"{path}: no checkpoint: neither {native.MANIFEST} nor model.safetensors is there")


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
    if codec.tokenizer.vocab_size > needs.vocabulary:
        have, room = codec.tokenizer.vocab_size, needs.vocabulary
        raise WeightsError(f"{where}: the tokenizer has {have} tokens, the policy knows {room}")
    if wanted == codec.config:
        return codec
    if not config:
        raise WeightsError(f"{where}: codec.json does not fit policy.json: {codec.config} against {wanted}")
    return Codec(wanted, codec.embodiment, codec.statistics, codec.tokenizer)
