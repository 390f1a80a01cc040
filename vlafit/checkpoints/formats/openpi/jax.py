"""Read openpi's JAX checkpoints of pi0, pi0.5 and pi0-FAST: their tree becomes our parameters by layers.

A leaf below a stack of layers has the layers as its first axis. LoRA factors, of which both are random at
the start, are merged into the weight beside them. What a leaf becomes is written once, as a function on one
layer's tensor; on tensors of the meta device the same function gives the shapes.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit import config as configuration
from vlafit.checkpoints.formats.openpi import turns
from vlafit.checkpoints.formats.openpi.names import PADDED
from vlafit.checkpoints.formats.openpi.orbax import Leaf, open_leaves
from vlafit.checkpoints.formats.openpi.turns import Turn
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.errors import WeightsError
from vlafit.policies import merge_dotted

IMG, _LLM = "PaliGemma/img/", "PaliGemma/llm/"
_BLOCK = f"{IMG}Transformer/encoderblock/"
_MHA = f"{_BLOCK}MultiHeadDotProductAttention_0/"


@dataclass(frozen=True)
class Rule:
    """The conversion of one leaf. `dims`: of one layer. `names` has a place for the layer if `layered`."""

    names: tuple[str, ...]
    turn: Turn
    dims: int
    layered: bool


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}

    def add(leaf: str, name: str, turn: Turn, dims: int) -> None:
        rules[leaf] = Rule(tuple(name.split(" ")), turn, dims, "{}" in name)

    def norm(leaf: str, name: str) -> None:
        add(f"{leaf}/scale", f"{name}.weight", turns.SAME, 1)
        add(f"{leaf}/Dense_0/kernel", f"{name}.dense.weight", turns.TRANSPOSED, 2)
        add(f"{leaf}/Dense_0/bias", f"{name}.dense.bias", turns.SAME, 1)

    def linear(leaf: str, name: str) -> None:
        add(f"{leaf}/kernel", f"{name}.weight", turns.TRANSPOSED, 2)
        add(f"{leaf}/bias", f"{name}.bias", turns.SAME, 1)

    add(f"{IMG}embedding/kernel", "vision.patch_embedding.weight", turns.PATCHES, 4)
    add(f"{IMG}embedding/bias", "vision.patch_embedding.bias", turns.SAME, 1)
    add(f"{IMG}pos_embedding", "vision.position_embedding.weight", turns.POSITIONS, 3)
    for i in (0, 1):
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            add(
                f"{_BLOCK}LayerNorm_{i}/{leaf}", f"vision.layers.{{}}.layer_norm{i + 1}.{name}", turns.SAME, 1
            )
        linear(f"{_BLOCK}MlpBlock_0/Dense_{i}", f"vision.layers.{{}}.mlp.fc{i + 1}")
    for leaf, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        add(f"{_MHA}{leaf}/kernel", f"vision.layers.{{}}.self_attn.{name}.weight", turns.INTO_HEADS, 3)
        add(f"{_MHA}{leaf}/bias", f"vision.layers.{{}}.self_attn.{name}.bias", turns.HEADS, 2)
    add(f"{_MHA}out/kernel", "vision.layers.{}.self_attn.out_proj.weight", turns.OUT_OF_HEADS, 3)
    add(f"{_MHA}out/bias", "vision.layers.{}.self_attn.out_proj.bias", turns.SAME, 1)
    for leaf, name in (("scale", "weight"), ("bias", "bias")):
        add(f"{IMG}Transformer/encoder_norm/{leaf}", f"vision.post_layernorm.{name}", turns.SAME, 1)
    linear(f"{IMG}head", "projector")
    add(f"{_LLM}embedder/input_embedding", "language.embed_tokens.weight", turns.SAME, 2)
    for part, s in (("language", ""), ("expert", "_1")):
        attention, mlp = f"{part}.layers.{{}}.self_attn.", f"{part}.layers.{{}}.mlp."
        add(f"{_LLM}layers/attn/q_einsum{s}/w", f"{attention}q_proj.weight", turns.QUERY, 3)
        both = f"{attention}k_proj.weight {attention}v_proj.weight"
        add(f"{_LLM}layers/attn/kv_einsum{s}/w", both, turns.KEY_VALUE, 4)
        add(f"{_LLM}layers/attn/attn_vec_einsum{s}/w", f"{attention}o_proj.weight", turns.OUT_OF_HEADS, 3)
        both = f"{mlp}gate_proj.weight {mlp}up_proj.weight"
        add(f"{_LLM}layers/mlp{s}/gating_einsum", both, turns.GATE_UP, 3)
        add(f"{_LLM}layers/mlp{s}/linear", f"{mlp}down_proj.weight", turns.TRANSPOSED, 2)
        norm(f"{_LLM}layers/pre_attention_norm{s}", f"{part}.layers.{{}}.input_layernorm")
        norm(f"{_LLM}layers/pre_ffw_norm{s}", f"{part}.layers.{{}}.post_attention_layernorm")
        norm(f"{_LLM}final_norm{s}", f"{part}.norm")
    for name in ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in"):
        linear(name, name)
    for name in ("action_time_mlp_out", "time_mlp_in", "time_mlp_out"):
        linear(name, name)
    return rules


RULES = _rules()
MOST_LAYERS = 10_000
UNKNOWN = "jax:"  # begins our name of a leaf that we do not know
_LAYER = re.compile(r"\.layers\.\d+\.")
_LEAVES = {name: leaf for leaf, rule in RULES.items() for name in rule.names}
_HEAD_AXES: dict[str, dict[str, int]] = {
    "vision.heads": {
        **{f"{_MHA}{leaf}/kernel": 2 for leaf in ("query", "key", "value")},
        **{f"{_MHA}{leaf}/bias": 1 for leaf in ("query", "key", "value")},
        f"{_MHA}out/kernel": 1,
    },
    "language.head_dim": {
        f"{_LLM}layers/attn/{leaf}_einsum{s}/w": axis
        for s in ("", "_1")
        for leaf, axis in (("q", 3), ("kv", 4), ("attn_vec", 2))
    },
}
"""The axes of leaves that are heads, or as long as one."""


@dataclass(frozen=True)
class LoraConfig:
    """How LoRA factors were scaled, which no tensor tells. None: alpha is the rank, as openpi has it."""

    language_alpha: float | None = None
    expert_alpha: float | None = None
    rslora: bool = False
    """Whether alpha is divided by the square root of the rank, instead of the rank."""


@dataclass(frozen=True)
class Lora:
    """Two factors beside a weight. `scale` multiplies their product; `across_heads`: attn_vec's odd form."""

    a: Leaf
    b: Leaf
    scale: float
    across_heads: bool

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """Return what is added to one layer's weight, in float32."""
        a, b = a.float(), b.float()
        if self.across_heads:  # openpi contracts the heads of either factor on its own: a sum over b's
            b = b.sum(0, keepdim=True)
        return (a @ b) * self.scale


@dataclass(frozen=True)
class Tree:
    """An openpi JAX checkpoint, not read yet. `weights` has our names and shapes, on the meta device."""

    params: Path
    weights: dict[str, Tensor]
    leaves: dict[str, Leaf]
    lora: dict[str, Lora]
    trained: bool
    conflicts: tuple[str, ...] = ()
    """Lines about leaves that are not weights: LoRA's factors."""

    @property
    def family(self) -> str:
        """The family of these leaves: pi0-FAST has neither an expert nor projections of actions."""
        shared = ("vision.", "projector.", "language.", UNKNOWN)
        own = [name for name in self.weights if not name.startswith(shared)]
        return "pi0" if len(own) > 1 else "pi0_fast"

    def file_name(self, name: str) -> str:
        """Return the leaf that holds one of our parameters, or an unknown leaf."""
        leaf = _LEAVES.get(_LAYER.sub(".layers.{}.", name)) or name.removeprefix(UNKNOWN)
        return f"{leaf}/value" if self.trained else leaf

    @property
    def evidence(self) -> ConfigEvidence:
        """Facts beside the parameters' shapes: heads, which have an axis here, and JAX's rounding."""
        fast = self.family == "pi0_fast"
        values: dict[str, Any] = {"rules": "openpi", "tied": True} if fast else {"time_angles": "float32"}
        axes = {key: _on_axis(self.leaves, places) for key, places in _HEAD_AXES.items()}
        lines = [
            f"contradicted: {key} is {', '.join(f'{size} by {leaf}' for size, leaf in sizes.items())}"
            for key, sizes in axes.items()
            if len(sizes) > 1
        ]
        for key, sizes in axes.items():
            if sizes:
                values = merge_dotted(values, {key: next(iter(sizes))})
        return ConfigEvidence(values, padded_as={} if fast else PADDED, conflicts=(*self.conflicts, *lines))

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts about the checkpoint beside its tensors."""
        lines = []
        if self.trained:
            lines.append("params of a training checkpoint: the moving average where its run kept one")
        for part, s in (("language", ""), ("expert", "_1")):
            scales = {(f.b.shape[-2], f.scale) for n, f in self.lora.items() if (_stream(n) == s)}
            lines += [f"LoRA of the {part} merged: rank {r}, scale {scale:g}" for r, scale in sorted(scales)]
        return tuple(lines)

    def contents(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Read and yield the parameters, to be copied before the next; first what needs most room beside.

        A leaf that holds none of the `wanted` ones is not read: its shape may be anything. Another is
        unpacked once and copied from, where it is below layers, or there twice for a moment.
        """

        def room(name: str) -> int:
            return math.prod(self.leaves[name].shape) * (1 if RULES[name].layered else 2)

        for name in sorted(self.leaves, key=room, reverse=True):
            leaf, rule, factors = self.leaves[name], RULES[name], self.lora.get(name)
            layers = range(leaf.shape[0]) if rule.layered else (0,)
            if wanted.isdisjoint(n.format(i) for n in rule.names for i in layers):
                continue
            if not rule.layered:
                yield from zip(rule.names, rule.turn.to_vlafit(leaf.read()), strict=True)
                continue
            pairs = zip(factors.a.slices(), factors.b.slices(), strict=True) if factors else None
            for i, tensor in enumerate(leaf.slices()):
                if factors and pairs:
                    tensor = tensor.float() + factors.delta(*next(pairs))
                for name, turned in zip(rule.names, rule.turn.to_vlafit(tensor), strict=True):
                    yield name.format(i), turned


def open_tree(params: Path, lora: Mapping[str, object]) -> Tree:
    """Read the tree's metadata. `lora` has the fields of `LoraConfig`.

    Leaves that cannot be what their names say are left to be compared. Raises WeightsError for other
    families.
    """
    leaves = {name.removeprefix("params/"): leaf for name, leaf in open_leaves(params).items()}
    if any(name.split("/")[0] in ("opt_state", "ema_params", "step") for name in leaves):
        raise WeightsError(
            f"{params}: the state of a trainer; its weights, averaged, are in the folder params beside it"
        )
    trained = bool(leaves) and all(name.endswith("/value") for name in leaves)
    if trained:
        leaves = {name.removesuffix("/value"): leaf for name, leaf in leaves.items()}
    _refuse_others(leaves, params)
    options = configuration.build(LoraConfig, lora, f"{params}: config: lora")
    factors, used, wrong = _factors(leaves, options)
    weights: dict[str, Tensor] = {}
    known: dict[str, Leaf] = {}
    shapeless: list[str] = []
    for name, leaf in leaves.items():
        if name in used:
            continue
        rule = RULES.get(name)
        if rule is None:
            weights[f"{UNKNOWN}{name}"] = leaf.meta()
        elif len(leaf.shape) != rule.dims + rule.layered or _uneven(rule, leaf):
            shapeless.append(name)
        elif not rule.layered:
            known[name] = leaf
            weights |= zip(rule.names, rule.turn.to_vlafit(leaf.meta()), strict=True)
        else:
            known[name] = leaf
            if leaf.shape[0] > MOST_LAYERS:
                raise WeightsError(
                    f"{params}: {name} is {leaf.shape}: {leaf.shape[0]} layers; copy or download it again"
                )
            turned = rule.turn.to_vlafit(leaf.meta()[0])
            names = [[name.format(i) for name in rule.names] for i in range(leaf.shape[0])]
            weights |= {name: t for row in names for name, t in zip(row, turned, strict=True)}
    for name in shapeless:  # under our names, with a shape that none of them can have: all are compared
        stack = name.split("layers/")[0] if "layers/" in name else _BLOCK
        depth = max(
            (leaf.shape[0] for n, leaf in known.items() if n.startswith(stack) and RULES[n].layered),
            default=1,
        )
        layers = range(depth) if RULES[name].layered else (0,)
        weights |= {weight.format(i): leaves[name].meta() for weight in RULES[name].names for i in layers}
    conflicts = tuple(f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in wrong.items() if names)
    return Tree(params, weights, known, factors, trained, conflicts)


def writes_tokens(leaves: Collection[str]) -> bool:
    """Whether the arrays are those of pi0-FAST, which has no projections of actions."""
    pieces = {piece for name in leaves for piece in name.split("/")}
    return "PaliGemma" in pieces and "action_in_proj" not in pieces


def _on_axis(leaves: Mapping[str, Leaf], places: Mapping[str, int]) -> dict[int, str]:
    """Return the sizes of these axes, with the first leaf that has each."""
    sizes: dict[int, str] = {}
    for leaf, axis in places.items():
        if leaf in leaves:
            sizes.setdefault(leaves[leaf].shape[axis], leaf)
    return sizes


def _refuse_others(leaves: Mapping[str, Leaf], where: Path) -> None:
    if any(name.startswith("octo_transformer/") for name in leaves):
        raise WeightsError(f"{where}: these are the weights of Octo, and vlafit has no such family")
    tower = any(name.startswith(IMG) for name in leaves)
    language = any(name.startswith(f"{_LLM}layers/") for name in leaves)
    heads = any(name.split("/")[0] in ("action_in_proj", "action_out_proj") for name in leaves)
    if not tower and not language and not heads:
        first = min(leaves, default="-")
        raise WeightsError(f"{where}: not openpi's tree: {len(leaves)} arrays, such as {first!r}")


def _factors(
    leaves: Mapping[str, Leaf], options: LoraConfig
) -> tuple[dict[str, Lora], set[str], dict[str, list[str]]]:
    """Pair LoRA's factors. Returns them by the weight they change, their names, and what is wrong."""
    pairs: dict[str, Lora] = {}
    used: set[str] = set()
    wrong: dict[str, list[str]] = {}
    stems = {n.removesuffix(end) for n in leaves for end in ("lora_a", "lora_b") if n.endswith(end)}
    for stem in sorted(stems):
        attention = stem.endswith("/")
        weight = f"{stem}w" if attention else stem.removesuffix("_")
        pair = f"{stem}lora_a", f"{stem}lora_b"
        used |= set(pair)
        if weight not in RULES:
            wrong.setdefault("surplus", []).extend(n for n in pair if n in leaves)
            continue
        lost = [n for n in (*pair, weight) if n not in leaves]
        if lost:
            wrong.setdefault("missing", []).extend(lost)
            continue
        whole = [f"{n} is {leaves[n].dtype}" for n in pair if not leaves[n].meta().is_floating_point()]
        if whole:
            wrong.setdefault("not floating-point", []).extend(whole)
            continue
        base, a, b = leaves[weight].shape, leaves[pair[0]].shape, leaves[pair[1]].shape
        rank = b[-2] if len(b) > 1 else 0
        if rank < 1 or a != (*base[:-1], rank) or b != (*base[:-2], rank, base[-1]):
            # A feed-forward output has no heads: the axes before the last two are only the layers.
            wrong.setdefault("misshapen", []).append(
                f"{pair[0]} {a} and {pair[1]} {b} beside {weight} {base}"
            )
            continue
        alpha = options.expert_alpha if _stream(weight) == "_1" else options.language_alpha
        alpha = float(rank) if alpha is None else alpha
        scale = alpha / (math.sqrt(rank) if options.rslora else rank) if attention else 1.0
        pairs[weight] = Lora(leaves[pair[0]], leaves[pair[1]], scale, "attn_vec_einsum" in weight)
    for s in ("", "_1"):  # openpi adapts all of a stream's attention or none, and all of its MLP or none
        for group in (
            [f"{_LLM}layers/attn/{n}_einsum{s}/" for n in ("q", "kv", "attn_vec")],
            [f"{_LLM}layers/mlp{s}/{n}_" for n in ("gating_einsum", "linear")],
        ):
            if stems & set(group):
                lost = [f"{stem}lora_a and lora_b" for stem in group if stem not in stems]
                wrong.setdefault("missing", []).extend(lost)
    return pairs, used, wrong


def _stream(name: str) -> str:
    """Return ``_1`` for a leaf of the action expert, else nothing."""
    return "_1" if any(piece.endswith("_1") for piece in name.split("/")[2:]) and _LLM in name else ""


def _uneven(rule: Rule, leaf: Leaf) -> bool:
    """Whether an axis that holds layers, a pair (keys and values, gate and up) or one image does not."""
    shape = leaf.shape[1:] if rule.layered else leaf.shape
    if rule.layered and not leaf.shape[0]:
        return True
    paired = rule.turn in (turns.KEY_VALUE, turns.GATE_UP)
    return (paired and shape[0] != 2) or (rule.turn is turns.POSITIONS and shape[0] != 1)
