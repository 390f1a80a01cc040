"""NVIDIA's tensor names of GR00T N1.7, and the tensors that lie there in another form.

A table of an embodiment-specific layer, [embodiments, in, out], becomes one layer for each of its rows. The
tower's patches are a 3-D convolution there and a linear layer here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlafit.checkpoints.name_map import NameMap, Translated, translate
from vlafit.policies._groot_shapes import PROJECTORS

FORM = "GR00T"
_BACKBONE, _HEAD = "backbone.model.model.", "action_head."
_PATCHES = "vision.patch_embedding.weight"
_TABLES = {"layer1": "first", "layer2": "second", "W1": "first", "W2": "second", "W3": "third"}
_TOWER = (
    ("self_attn.out_proj", "attn.proj"),
    ("self_attn", "attn"),
    ("mlp.fc1", "mlp.linear_fc1"),
    ("mlp.fc2", "mlp.linear_fc2"),
)
_MERGER = (("fc1", "linear_fc1"), ("fc2", "linear_fc2"))
_ATTENTION = (
    ("attn.out_proj", "attn1.to_out.0"),
    *((f"attn.{letter}_proj", f"attn1.to_{letter}") for letter in "qkv"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
)
_INSIDE = {  # first words of a policy's names -> pairs of what follows them: here, in the file
    "vision.layers.": _TOWER,
    "deepstack.layers.": _MERGER,
    "projector.": _MERGER,
    "memory.layers.": (("norm2", "norm3"), *_ATTENTION),
    "expert.layers.": (("norm.dense", "norm1.linear"), *_ATTENTION),
}


@dataclass(frozen=True)
class GrootNames(NameMap):
    """A name map with words that differ inside a stack of layers, too."""

    def file_name(self, name: str) -> str:
        """Return the file's name for a policy's parameter."""
        begin, number, rest = _split(name, _INSIDE)
        if begin:
            name = begin + number + _swapped(rest, _INSIDE[begin])
        return super().file_name(name)

    def policy_name(self, name: str) -> str:
        """Return the policy's name for a tensor of the file. An unknown one keeps its name."""
        own = super().policy_name(name)
        begin, number, rest = _split(own, _INSIDE)
        if not begin:
            return own
        return begin + number + _swapped(rest, [(there, here) for here, there in _INSIDE[begin]])


def _split(name: str, beginnings: Mapping[str, object]) -> tuple[str, str, str]:
    """Split a name into the beginning that it has, if any, a layer's number with its dot, and the rest."""
    begin = next((one for one in beginnings if name.startswith(one)), "")
    rest = name[len(begin) :]
    number, dot, inner = rest.partition(".")
    return (begin, number + dot, inner) if begin and number.isdecimal() else (begin, "", rest)


def _swapped(rest: str, pairs: object) -> str:
    for here, there in pairs:  # type: ignore[attr-defined]
        if rest == here or rest.startswith(f"{here}."):
            return there + rest[len(here) :]
    return rest


def _tables(prefix: str) -> list[tuple[str, str]]:
    pairs = []
    for layer in PROJECTORS:
        module, word = layer.split(".")
        words = ("W1", "W2", "W3") if module == "action_encoder" else ("layer1", "layer2")
        there = next(one for one in words if _TABLES[one] == word)
        pairs.append((f"{layer}.layers.", f"{prefix}{_HEAD}{module}.{there}.layers."))
    return pairs


def name_map(prefix: str = "", form: str = FORM) -> GrootNames:
    """Return the names in files whose every name begins with `prefix`."""
    backbone, head = prefix + _BACKBONE, prefix + _HEAD
    return GrootNames(
        form=form,
        prefixes=(
            ("vision.patch_embedding.", f"{backbone}visual.patch_embed.proj."),
            ("vision.position_embedding.", f"{backbone}visual.pos_embed."),
            ("vision.layers.", f"{backbone}visual.blocks."),
            ("projector.", f"{backbone}visual.merger."),
            ("deepstack.layers.", f"{backbone}visual.deepstack_merger_list."),
            ("language.", f"{backbone}language_model."),
            ("time_encoder.fc1.", f"{head}model.timestep_encoder.timestep_embedder.linear_1."),
            ("time_encoder.fc2.", f"{head}model.timestep_encoder.timestep_embedder.linear_2."),
            ("expert.layers.", f"{head}model.transformer_blocks."),
            ("expert.last_norm.", f"{head}model.proj_out_1."),
            ("expert.out_proj.", f"{head}model.proj_out_2."),
            ("memory.layers.", f"{head}vl_self_attention.transformer_blocks."),
            ("memory_norm.", f"{head}vlln."),
            ("action_position_embedding.", f"{head}position_embedding."),
            *_tables(prefix),
        ),
        ties={"language.embed_tokens.weight": f"{prefix}backbone.model.lm_head.weight"},
    )


NAMES = name_map()


def read(tensors: Mapping[str, Tensor], names: GrootNames = NAMES) -> Translated:
    """Return the file's tensors under our names. No number is read."""
    apart, stored = take_apart(tensors)
    plain = translate(apart, names)
    weights = dict(plain.weights)
    patches = weights.get(_PATCHES)
    if patches is not None and patches.ndim == 5:
        weights[_PATCHES] = patches.flatten(1)

    def file_name(name: str) -> str:
        return stored_name(stored.get(plain.file_name(name), plain.file_name(name)))

    return replace(plain, weights=weights, file_name=file_name)


def take_apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split the tables of embodiments into layers; return all tensors, and which table a layer is of."""
    apart: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("W", "b") or f".{layer}".rpartition(".")[2] not in _TABLES:
            apart[name] = tensor
            continue
        word, axes = ("weight", 3) if leaf == "W" else ("bias", 2)
        rows = tensor.unbind() if tensor.ndim == axes else (tensor,)  # another shape is named by `fit`
        for number, row in enumerate(rows):
            own = f"{layer}.layers.{number}.{word}"
            apart[own] = row.t() if row.ndim == 2 else row
            stored[own] = name
    return apart, stored


def stored_name(name: str) -> str:
    """Return the table that holds a layer of one embodiment, by its name; other names as they are."""
    layer, mark, rest = name.partition(".layers.")
    number, _, leaf = rest.partition(".")
    if mark and number.isdecimal() and leaf in ("weight", "bias") and layer.rpartition(".")[2] in _TABLES:
        return f"{layer}.{'W' if leaf == 'weight' else 'b'}"
    return name


def written(weights: Mapping[str, Tensor], patch: int, names: GrootNames = NAMES) -> dict[str, Tensor]:
    """Return a policy's tensors as files hold them, the token table by its own name."""
    files: dict[str, Tensor] = {}
    tables: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        there = names.file_name(name)
        table = stored_name(there)
        if table != there:
            tables.setdefault(table, []).append(tensor.t() if tensor.ndim == 2 else tensor)
        elif name == _PATCHES:
            files[there] = tensor.unflatten(1, (3, 2, patch, patch))
        else:
            files[there] = tensor
    return files | {table: torch.stack(rows) for table, rows in tables.items()}


def recognise(names: Collection[str], prefix: str = "") -> bool:
    """Whether most of these names are those of N1.7, with `prefix` before them."""
    begins = (f"{prefix}{_HEAD}", f"{prefix}{_BACKBONE}", f"{prefix}backbone.model.lm_head.")
    own = sum(name.startswith(begins) for name in names)
    return 2 * own > len(names) and any(name.startswith(f"{prefix}{_BACKBONE}") for name in names)


def table_refusals(layers: Sequence[str]) -> list[str]:
    """Say which layers are part of a larger tensor in NVIDIA's classes, where peft cannot adapt them."""
    inside = [
        layer
        for layer in layers
        if f"{layer}.weight" == _PATCHES or stored_name(there := NAMES.file_name(f"{layer}.weight")) != there
    ]
    if not inside:
        return []
    return [f"{inside[0]} is no linear layer there, but part of a tensor ({len(inside)} such): add --merge"]
