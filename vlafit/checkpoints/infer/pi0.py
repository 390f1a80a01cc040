"""The config of a pi0 or pi0.5 policy that its tensors imply, given under our names."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from vlafit import config as configuration
from vlafit.checkpoints.assign import compare, complain
from vlafit.checkpoints.infer.voting import (
    Stated,
    Votes,
    Witness,
    contradictions,
    depth_of,
    first_stated,
    misfits,
    value_at,
    vote,
)
from vlafit.checkpoints.tensor_lists import listed
from vlafit.errors import ConfigError, WeightsError, did_you_mean
from vlafit.policies import family, family_of, merge, override
from vlafit.policies.pi0 import SIZES, Pi0Config

KV_HEADS = (
    1  # openpi and LeRobot have no other number, so the keys' rows are one head: reference implementation
)
HEADS = 8  # of openpi and LeRobot, both of which write the number into their code: reference implementation
IMAGE_SIZE, PATCH = 224, 14  # openpi and LeRobot know patches of 14 in images of 224 alone
PROMPT_TOKENS = {False: 48, True: 200}  # pi0, pi0.5: reference implementation
DEEPEST = 256  # layers that a file may state beyond those that are there; nobody has more
GUESS = 2  # stands for a size that nothing tells, until the missing tensors are named

_LAYER = re.compile(r"\.layers\.\d+\.")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def _linear(name: str, rows: str, columns: str) -> dict[str, str]:
    return {f"{name}.weight": f"{rows} {columns}", f"{name}.bias": rows}


def tower_axes() -> dict[str, str]:
    """Return the axes of the image tower, which all families share; see `dimensions.vote`."""
    w, mlp = "vision.width", "vision.mlp"
    axes = {
        "vision.patch_embedding.weight": f"{w} 3 vision.patch vision.patch",
        "vision.patch_embedding.bias": w,
        "vision.position_embedding.weight": f"patches {w}",
    }
    for norm in ("layers.*.layer_norm1", "layers.*.layer_norm2", "post_layernorm"):
        axes |= {f"vision.{norm}.{leaf}": w for leaf in ("weight", "bias")}
    for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
        axes |= _linear(f"vision.layers.*.self_attn.{leaf}", w, w)
    return axes | _linear("vision.layers.*.mlp.fc1", mlp, w) | _linear("vision.layers.*.mlp.fc2", w, mlp)


def decoder_axes(part: str) -> dict[str, str]:
    """Return the axes of the decoder `part` but for adaptive norms; `queries`, `keys`: rows of all heads."""
    w, mlp = f"{part}.width", f"{part}.mlp"
    attention, layers = f"{part}.layers.*.self_attn", f"{part}.layers.*"
    return {
        f"{attention}.q_proj.weight": f"queries {w}",
        f"{attention}.k_proj.weight": f"keys {w}",
        f"{attention}.v_proj.weight": f"keys {w}",
        f"{attention}.o_proj.weight": f"{w} queries",
        f"{layers}.mlp.gate_proj.weight": f"{mlp} {w}",
        f"{layers}.mlp.up_proj.weight": f"{mlp} {w}",
        f"{layers}.mlp.down_proj.weight": f"{w} {mlp}",
        **{f"{layers}.{norm}.weight": w for norm in _LAYER_NORMS},
        f"{part}.norm.weight": w,
    }


def action_axes(state_width: str) -> dict[str, str]:
    """Return the axes of the projections; the state is projected to `state_width`."""
    w = "expert.width"
    return {
        **_linear("state_proj", state_width, "state_dim"),
        **_linear("action_in_proj", w, "action_dim"),
        **_linear("action_out_proj", "action_dim", w),
        **_linear("action_time_mlp_in", w, f"2*{w}"),
        **_linear("action_time_mlp_out", w, w),
    }


EMBEDDING = {"language.embed_tokens.weight": "language.vocab language.width"}
_ADAPTIVE = {
    f"expert.{norm}.dense.{leaf}": words
    for norm in (*(f"layers.*.{n}" for n in _LAYER_NORMS), "norm")
    for leaf, words in (("weight", "3*expert.width expert.width"), ("bias", "3*expert.width"))
}
AXES: dict[str, str] = {
    **tower_axes(),
    **_linear("projector", "language.width", "vision.width"),
    **EMBEDDING,
    **decoder_axes("language"),
    **decoder_axes("expert"),
    **_ADAPTIVE,
    **action_axes("expert.width"),
    **_linear("time_mlp_in", "expert.width", "expert.width"),
    **_linear("time_mlp_out", "expert.width", "expert.width"),
}

_PI05 = {*_ADAPTIVE, *(name for name in AXES if name.startswith("time_mlp_"))}
_PI0 = {name.replace(".dense.", ".") for name in _ADAPTIVE if name.endswith("weight")}
_PI0 |= {name for name in AXES if name.startswith(("state_proj.", "action_time_mlp_"))}


@dataclass(frozen=True)
class Told:
    """What a checkpoint tells beside the tensors of the policy.

    `values` are those of the config that no shape has; `stated` those that shapes have, too; `witnesses`
    tensors that feed nothing. `theirs` gives the file's name of a parameter. `padded_alike`: the program pads
    states as wide as actions.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    stated: Sequence[Stated] = ()
    witnesses: Sequence[Witness] = ()
    theirs: Callable[[str], str] = str
    padded_alike: bool = False
    odd: tuple[str, ...] = ()
    """Lines that say what contradicts itself."""


@dataclass(frozen=True)
class Inferred:
    """A policy's config; `odd` says what contradicts it, to be named together with the tensors."""

    config: Any
    odd: tuple[str, ...] = ()


def infer_config(
    weights: Mapping[str, Tensor],
    told: Told,
    given: Mapping[str, object],
    where: str,
    widths: Mapping[str, object] | None = None,
) -> Inferred:
    """Read dimensions from the shapes of `weights`, and compare them with all else that states them.

    What shapes cannot tell comes from what is `told` or `given` (by the user, which wins over everything),
    else from the format's constants or the public size of the same widths. `widths` are state_dim and
    action_dim where the user says them. Raises WeightsError naming all tensors that are wrong where the
    sizes do not go together, or the key of `config` to give.
    """
    require_known(merge({}, given), asdict(SIZES["pi0"]), f"{where}: config")
    said = merge(told.values, given)
    wanted = merge(given, widths or {})
    votes = vote(weights, AXES, told.witnesses, told.theirs)
    of_pi0, of_pi05 = of_each(weights)
    pi05 = len(of_pi05) > len(of_pi0)
    public = SIZES["pi05" if pi05 else "pi0"]
    read, guessed = read_sizes(votes, told.stated, wanted, ("vision", "language", "expert"))
    read["vision"]["depth"] = depth_of(weights, "vision")
    read["language"]["depth"] = depth_of(weights, "language", "expert")
    head_dim = value_at(said, "language.head_dim")
    if head_dim is None:
        head_dim = (votes.most("keys") or GUESS) // KV_HEADS
    require_head_dim(head_dim, where)
    read["language"] |= read_heads(votes, told.stated, head_dim)
    if pi05:  # no state token; its codec needs the padded width alone, which is that of the actions
        read["state_dim"] = value_at(said, "state_dim") or read["action_dim"]
        guessed = [key for key in guessed if key != "state_dim"]
    stated = [
        *told.stated,
        *_stated_by_format(read, said, told),
        *_public(read, public, {one.key for one in told.stated}, said),
    ]
    stated = [one for one in stated if one.key not in guessed]  # a stand-in contradicts nothing
    odd = [*_mixed(weights, told.theirs), *told.odd, *untold(guessed)]
    odd += contradictions(read, stated, wanted, votes, told.witnesses, told.theirs)
    values: dict[str, Any] = {
        "pi05": pi05,
        "state_input": "prompt" if pi05 else "continuous",
        "max_tokens": PROMPT_TOKENS[pi05],
        **read,
    }
    if all(
        value_at(read, f"{p}.width") == getattr(public, p).width for p in ("vision", "language", "expert")
    ):
        values = merge({"chunk": public.chunk, "vision": {"heads": public.vision.heads}}, values)
    values = merge(merge(values, deeper(read, stated)), said)
    asked = {key: 1 for key in ("vision.heads", "chunk") if value_at(values, key) is None}
    models = public, SIZES["pi05-tiny" if pi05 else "pi0-tiny"]
    shapeless = misfits(weights, AXES, votes)
    return judge(weights, values, asked, given, models, (odd, shapeless), told.theirs, where)


def read_sizes(
    votes: Votes, stated: Sequence[Stated], given: Mapping[str, Any], parts: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the sizes that tensors tell, else the user or a file; and the keys that nobody tells."""
    read: dict[str, Any] = {part: {} for part in parts}
    guessed = []
    keys = [f"vision.{k}" for k in ("width", "mlp", "patch")] + ["state_dim", "action_dim"]
    keys += [f"language.{k}" for k in ("width", "mlp", "vocab")] + ["expert.width", "expert.mlp"]
    for key in keys:
        said = first_stated(stated, key)
        size = votes.most(key, said)
        if size is None:
            other = value_at(given, key)
            size = other if isinstance(other, int) else said
        if size is None:
            size = GUESS
            guessed.append(key)
        part, _, leaf = key.rpartition(".")
        (read[part] if part else read)[leaf] = size
    patches, said = votes.most("patches"), first_stated(stated, "vision.image_size")
    patch = read["vision"]["patch"]
    if patches is not None:
        read["vision"]["image_size"] = votes.made("vision.image_size", math.isqrt(patches) * patch, "patches")
    else:
        read["vision"]["image_size"] = said or patch
        guessed += [] if said else ["vision.image_size"]
    return read, guessed


def read_heads(votes: Votes, stated: Sequence[Stated], head_dim: int) -> dict[str, int]:
    """Return numbers of heads by the rows that tensors have, else as stated."""
    found = {"head_dim": head_dim}
    for key, rows in (("heads", "queries"), ("kv_heads", "keys")):
        size = votes.most(rows)
        known = first_stated(stated, f"language.{key}") or 1 if size is None else size // head_dim
        found[key] = votes.made(f"language.{key}", known, rows)
    return found


def deeper(read: Mapping[str, Any], stated: Sequence[Stated]) -> dict[str, Any]:
    """Return the depths that are stated beyond those of the tensors: the layers between are missing."""
    found: dict[str, Any] = {}
    for part in ("vision", "language"):
        said = first_stated(stated, f"{part}.depth")
        if said is not None and read[part]["depth"] < said <= DEEPEST:
            found[part] = {"depth": said}
    return found


def untold(keys: Sequence[str]) -> list[str]:
    """Say which sizes nothing tells."""
    return [f"no tensor tells {', '.join(keys)}"] if keys else []


def judge(
    weights: Mapping[str, Tensor],
    values: Mapping[str, Any],
    asked: Mapping[str, int],
    given: Mapping[str, object],
    models: tuple[Any, Any],
    wrong: tuple[Sequence[str], Sequence[str]],
    theirs: Callable[[str], str],
    where: str,
) -> Inferred:
    """Make the config out of `values`, or raise one error that names every tensor that is wrong.

    `asked` are keys that nothing tells, and what may stand for them while the tensors are compared: they are
    asked for, unless something else is wrong. `models` are
    configs of the family: the public one, and one that is quickly built, to name the parameters. `wrong` are
    lines that say what else is wrong, and tensors that have not the sizes that most others have.
    """
    odd, shapeless = wrong
    public, tiny = models
    module = family(family_of(public))
    try:
        config = configuration.build(type(public), merge(values, asked), f"{where}: config")
    except ConfigError as error:
        override(public, given, f"{where}: config")  # raises for what is wrong in itself with the user's
        depths = {f"{part}.depth": values[part]["depth"] for part in ("vision", "language")}
        policy = module.build(override(tiny, depths, where), "meta")
        found = compare(policy, weights) | {"misshapen": shapeless, "not floating-point": []}
        every = [info.name for info in policy.parts()] + list(weights)
        complain(where, found, theirs, every, [f"its tensors' shapes do not go together: {error}", *odd])
        raise AssertionError from error  # one line is always there
    if asked:
        policy = module.build(config, "meta")
        every = [info.name for info in policy.parts()] + list(weights)
        complain(where, compare(policy, weights), theirs, every, odd)
        first = next(iter(asked))
        raise WeightsError(
            f"{where}: neither the tensors nor a config beside them tell {first!r}; give it as config "
            f"{{{first!r}: ...}}"
        )
    return Inferred(config, tuple(odd))


def require_head_dim(head_dim: object, where: str) -> None:
    """Raise WeightsError where this can be no number of dimensions."""
    if not isinstance(head_dim, int) or head_dim < 1:
        raise WeightsError(
            f"{where}: config: language.head_dim must be a whole number above 0, not {head_dim!r}"
        )


def require_known(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a key of the user that no config has, before anything is found missing."""
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
        if isinstance(value, Mapping) and isinstance(fields[key], Mapping):
            require_known(value, fields[key], f"{where}: {key}")


def _mixed(weights: Iterable[str], theirs: Callable[[str], str]) -> list[str]:
    """Return a line where there are tensors of pi0 alone and of pi0.5 alone."""
    every = list(weights)
    names = [theirs(name) for name in every]
    both = [listed(alone, theirs, names) for alone in of_each(every)]
    if not all(both):
        return []
    return [f"a mix of two families: of pi0 alone {both[0]}; of pi0.5 alone {both[1]}"]


def of_each(weights: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the tensors that pi0 alone has, and those that pi0.5 alone has."""
    every = list(weights)
    of_pi0 = [name for name in every if name in _PI0 or _LAYER.sub(".layers.*.", name) in _PI0]
    return of_pi0, [name for name in every if name in _PI05 or _LAYER.sub(".layers.*.", name) in _PI05]


def _stated_by_format(read: Mapping[str, Any], said: Mapping[str, Any], told: Told) -> list[Stated]:
    """Return what openpi and LeRobot have as constants; other programs' configs state these sizes."""
    keys = {one.key for one in told.stated}
    found = []
    if read["vision"]["patch"] == PATCH and "vision.image_size" not in keys:
        found.append(Stated("vision.image_size", IMAGE_SIZE, f"the format (patches of {PATCH})"))
    if told.padded_alike and "state_dim" not in keys:
        found.append(Stated("state_dim", read["action_dim"], "the actions', as wide as which openpi pads it"))
    if value_at(said, "language.head_dim") is None and "language.heads" not in keys:
        found.append(Stated("language.heads", HEADS, "the format, with one head of keys"))
    return found


def _public(
    read: Mapping[str, Any], public: Pi0Config, known: set[str], said: Mapping[str, Any]
) -> list[Stated]:
    """Return what the public size has where a part is as wide, and nobody says otherwise.

    Number of layers, rows of the vocabulary and the like are free as far as the other tensors go.
    """
    found = []
    for part, sizes in asdict(public).items():
        if isinstance(sizes, dict) and read[part]["width"] == sizes["width"]:
            found += [
                Stated(f"{part}.{key}", value, f"the public pi0, whose {part} is as wide; say it in config if"
                       " it is meant so")
                for key, value in sizes.items()
                if f"{part}.{key}" not in known and value_at(said, f"{part}.{key}") is None
            ]  # fmt: skip
    return found
