"""LeRobot's checkpoints of pi0, pi0.5 and SmolVLA: names, and what config.json says that shapes do not.

pi0 and pi0.5 come in two layouts: as `save_pretrained` writes them (every name begins with ``model.``, and
both of the tied pair are there), or as on the Hub (openpi's names, which only config.json tells apart from
openpi's).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.assign import complain
from vlafit.checkpoints.formats.lerobot.smolvla_names import infer_smolvla
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.infer.gemma_variants import stated_by_variants
from vlafit.checkpoints.infer.pi0 import Inferred, Told, infer_config, of_each
from vlafit.checkpoints.infer.voting import Stated, Witness
from vlafit.checkpoints.name_map import NameMap, Translated, translate
from vlafit.checkpoints.tensor_files import read_object
from vlafit.errors import WeightsError

_WITH_EXPERT = "model.vlm_with_expert."
_IN_MODEL = f"model.{openpi.PREFIX}"
_VLM = f"{_WITH_EXPERT}vlm.model."
_PROJECTIONS = (
    "state_proj.",
    "action_in_proj.",
    "action_out_proj.",
    "action_time_mlp_in.",
    "action_time_mlp_out.",
    "time_mlp_in.",
    "time_mlp_out.",
)

FORM = "LeRobot"

SMOLVLA = NameMap(
    form=FORM,
    prefixes=(
        ("vision.layers.", f"{_VLM}vision_model.encoder.layers."),
        ("vision.patch_embedding.", f"{_VLM}vision_model.embeddings.patch_embedding."),
        ("vision.position_embedding.", f"{_VLM}vision_model.embeddings.position_embedding."),
        ("vision.post_layernorm.", f"{_VLM}vision_model.post_layernorm."),
        ("projector.", f"{_VLM}connector.modality_projection."),
        ("language.", f"{_VLM}text_model."),
        ("expert.", f"{_WITH_EXPERT}lm_expert."),
        *((name, f"model.{name}") for name in _PROJECTIONS),
    ),
    unused=(f"{_WITH_EXPERT}vlm.lm_head.weight",),
)

PI0 = NameMap(  # as save_pretrained writes it
    form=FORM,
    prefixes=(
        *((ours, f"model.{theirs}") for ours, theirs in openpi.NAMES.prefixes),
        *((name, f"model.{name}") for name in _PROJECTIONS),
    ),
    ties={ours: f"model.{theirs}" for ours, theirs in openpi.NAMES.ties.items()},
    unused=tuple(f"model.{name}" for name in openpi.NAMES.unused),
)

BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""Statistics that LeRobot stored among the weights until its processors came (0.4)."""

TYPES = ("pi0", "pi05", "smolvla")
ALWAYS: dict[str, object] = {
    "min_period": 4e-3,
    "max_period": 4.0,
}  # of the time embedding; no other is written


@dataclass(frozen=True)
class Described:
    """config.json of a LeRobot checkpoint."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value of `key`, or None where there is none. Raises WeightsError for another type."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise WeightsError(f"{self.path}: {key} is {value!r}, which is not what LeRobot writes there")
        return value

    def state(self, keys: Mapping[str, str]) -> list[Stated]:
        """Return the sizes that the file states; `keys` are its own, with ours."""
        values = {key: self.get(key, int) for key in keys}
        return [
            Stated(keys[key], value, f"{self.path.name} ({key})")
            for key, value in values.items()
            if value is not None
        ]


def describe(folder: Path) -> Described | None:
    """Return config.json in `folder` if it is one that LeRobot wrote, whatever the policy.

    Raises WeightsError where it cannot be read: what it says would be missed without a word.
    """
    path = folder / "config.json"
    values = read_object(path)
    if values is not None and "type" in values and {"input_features", "chunk_size"} & set(values):
        return Described(path, values)
    return None


def recognise(tensors: Mapping[str, Any], folder: Path) -> bool:
    """Whether these tensor names are LeRobot's, or openpi's with LeRobot's config.json beside them."""
    count = _count(map(_plain, tensors))
    if count[_WITH_EXPERT] + count[_IN_MODEL] > count[openpi.PREFIX]:
        return True
    return openpi.recognise(tensors) and describe(folder) is not None


def _count(names: Iterable[str]) -> dict[str, int]:
    """Return how many of `names` begin as each of the layouts has them: a stray one makes no other layout."""
    every = list(names)
    return {sign: sum(n.startswith(sign) for n in every) for sign in (_WITH_EXPERT, _IN_MODEL, openpi.PREFIX)}


def open_weights(
    tensors: Mapping[str, Tensor],
    folder: Path,
    given: Mapping[str, object],
    where: str,
    widths: Mapping[str, object] | None = None,
) -> tuple[Inferred, Translated]:
    """Return the policy's config, and the weights under our names; `widths` as in `infer_config`.

    Raises WeightsError where config.json asks for something that we do not compute, or another family's
    weights lie beside it, or a key of `config` must be given.
    """
    stored = {_plain(name): name for name in tensors}
    twice = sorted(name for name in tensors if stored[_plain(name)] != name)
    if twice:
        complain(where, {"surplus": [f"{name} beside {stored[_plain(name)]}" for name in twice]})
    buffers = tuple(name for name in stored if name.startswith(BUFFERS))
    rest = {name: tensors[stored[name]] for name in stored if name not in buffers}
    told = describe(folder)
    count = _count(rest)
    is_smolvla = count[_WITH_EXPERT] > count[_IN_MODEL] + count[openpi.PREFIX]
    in_model = count[_IN_MODEL] > count[openpi.PREFIX]
    names = SMOLVLA if is_smolvla else PI0 if in_model else replace(openpi.NAMES, form=FORM)
    of_pi0, of_pi05 = of_each(map(names.ours, rest))
    kind = "smolvla" if is_smolvla else "pi05" if len(of_pi05) > len(of_pi0) else "pi0"
    mixed = not is_smolvla and of_pi0 and of_pi05  # which is said when all are compared
    if told is not None and told.values["type"] != kind and not mixed:
        raise WeightsError(
            f"{where}: config.json says type {told.values['type']!r}, the tensors are those of {kind}: "
            "config.json "
            "or the weights are another checkpoint's"
        )
    # Once LeRobot has trained a policy its head and embedding are two tensors, and the head feeds nothing.
    heads = tuple(
        theirs for ours, theirs in names.ties.items() if theirs in rest and names.theirs(ours) in rest
    )
    axes = dict.fromkeys(heads, "language.vocab language.width")
    axes |= dict.fromkeys(names.unused, f"language.vocab {'language' if is_smolvla else 'expert'}.width")
    witnesses = [Witness(n, tuple(rest[n].shape), words) for n, words in axes.items() if n in rest]
    rest = {name: tensor for name, tensor in rest.items() if name not in heads}
    plain = translate(rest, names)

    def theirs(ours: str) -> str:
        name = plain.theirs(ours)
        return stored.get(name, name)

    translated = replace(plain, unused=plain.unused + heads + buffers, theirs=theirs)
    if told is not None:
        _require_always(told)
    if is_smolvla:
        say = Told(witnesses=witnesses, theirs=theirs)
        return infer_smolvla(translated.weights, told, folder, say, given, where, widths), translated
    values, stated = _told_by_pi0(told, kind)
    say = Told(values, stated, witnesses, theirs)
    return infer_config(translated.weights, say, given, where, widths), translated


def _plain(name: str) -> str:
    """Return a tensor's name without what torch.compile puts into it."""
    return name.replace("._orig_mod.", ".")


def _told_by_pi0(told: Described | None, kind: str) -> tuple[dict[str, object], list[Stated]]:
    """Return what config.json says that shapes do not, and what they do."""
    if told is None:
        return {}, []
    found: dict[str, object] = {
        "chunk": told.get("chunk_size", int),
        "max_tokens": told.get("tokenizer_max_length", int),
        "state_dim": told.get("max_state_dim", int) if kind == "pi05" else None,
    }
    stated = told.state({"max_action_dim": "action_dim"})
    stated += told.state({"max_state_dim": "state_dim"}) if kind == "pi0" else []
    sides = told.get("image_resolution", list)
    if sides is not None:
        if len(sides) != 2 or sides[0] != sides[1]:
            raise WeightsError(f"{told.path}: image_resolution is {sides}; only squares are supported here")
        stated.append(Stated("vision.image_size", sides[0], f"{told.path.name} (image_resolution)"))
    stated += stated_by_variants(told.values, told.path.name)
    return {key: value for key, value in found.items() if value is not None}, stated


def _require_always(told: Described) -> None:
    for key, value in ALWAYS.items():
        if told.values.get(key, value) != value:
            raise WeightsError(
                f"{told.path}: {key} is {told.values[key]!r}; only {value!r} is supported here"
            )
    if re.fullmatch(r"pi0|pi05|smolvla", str(told.values["type"])) is None:
        raise WeightsError(
            f"{told.path}: type {told.values['type']!r} is not one that is supported here "
            f"({', '.join(TYPES)})"
        )
