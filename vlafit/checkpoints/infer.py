"""Infer a policy's config from the shapes of its tensors, by the table that its family declares.

Sizes come from the tensors by vote; config files and the public size of the same widths fill in what no
tensor tells, and must agree with what they do.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from vlafit import config as configuration
from vlafit.checkpoints.assign import compare, raise_mismatch
from vlafit.checkpoints.options import require_known_keys
from vlafit.checkpoints.tensor_lists import list_tensors
from vlafit.checkpoints.voting import (
    Stated,
    Votes,
    Witness,
    contradictions,
    depth_of,
    misfits,
    value_at,
    vote,
)
from vlafit.errors import ConfigError, WeightsError
from vlafit.nn.shape_table import GUESS, ShapeTable, Sizes, Variant
from vlafit.policies import family, merge_dotted, override, require_bounded

DEEPEST = 256  # layers that a file may state beyond those that are there; nobody has more

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class ConfigEvidence:
    """Statements of a checkpoint about the policy's config, beside the shapes of its weights."""

    values: Mapping[str, object] = field(default_factory=dict)
    """Config values that no shape has, such as the chunk."""
    stated: Sequence[Stated] = ()
    """Sizes that config files state and shapes have, too."""
    witnesses: Sequence[Witness] = ()
    """Tensors that feed nothing and yet have the policy's dimensions."""
    padded_as: Mapping[str, str] = field(default_factory=dict)
    """Widths that the program pads to another one, such as state_dim to action_dim."""
    fixed: tuple[str, ...] = ()
    """Keys that the program's own code fixes at the public values: that they are assumed needs no note."""
    conflicts: tuple[str, ...] = ()
    """Lines that say where the checkpoint contradicts itself."""
    remedies: Mapping[str, str] = field(default_factory=dict)
    """Keys that are tables, and how the user gives them if nothing tells them."""


@dataclass(frozen=True)
class Inferred:
    """A policy's config; `conflicts` are to be reported together with wrong tensors."""

    config: Any
    conflicts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def shape_table(family_name: str) -> ShapeTable:
    """Return the family's table. Raises WeightsError where the family declares none."""
    table = getattr(family(family_name), "SHAPES", None)
    if not isinstance(table, ShapeTable):
        raise WeightsError(
            f"policy family {family_name!r} declares no SHAPES, so its config cannot be read from tensors: "
            "the format must give a complete config (see docs/extending.md)"
        )
    return table


def variant_tensors(table: ShapeTable, names: Iterable[str]) -> list[list[str]]:
    """Return, for each variant of the family, the tensors that no other variant has."""
    listed = list(names)
    return [
        [n for n in listed if n in variant.only or _LAYER.sub(".layers.*.", n) in variant.only]
        for variant in table.variants
    ]


def variant_of(table: ShapeTable, names: Iterable[str]) -> Variant:
    """Return the variant that most of the tensors `names` belong to; of several the first."""
    counts = [len(own) for own in variant_tensors(table, names)]
    return table.variants[counts.index(max(counts))]


def _to_give(unknown: Sequence[str], public: Mapping[str, Any]) -> str:
    """Say how the sizes that no tensor determines are given, by the public size's values."""
    given = ", ".join(f"{key}={value_at(public, key)}" for key in unknown)
    return f"; give them by config, such as {given} of the public size"


def infer_config(
    family_name: str,
    weights: Mapping[str, Tensor],
    evidence: ConfigEvidence,
    fields: Mapping[str, object],
    where: str,
    widths: Mapping[str, object] | None = None,
    file_name: Callable[[str], str] = str,
) -> Inferred:
    """Read sizes from the shapes of `weights`, and compare them with all else that states them.

    What shapes cannot tell comes from `evidence` or `fields` (the user's, which win over everything), else
    from the format's constants or the public size of the same widths. `widths` are state_dim and action_dim
    where the user gives them. `file_name` turns our tensor names into the file's.

    Raises WeightsError naming all tensors that are wrong where the sizes do not go together, or the key of
    `config` to give; ConfigError for keys that do not exist.
    """
    table, sizes = shape_table(family_name), family(family_name).SIZES
    variant = variant_of(table, weights)
    public = sizes[variant.public]
    require_known_keys(merge_dotted({}, fields), asdict(public), f"{where}: config")
    asserted = merge_dotted(evidence.values, fields)
    _require_whole(evidence.remedies, asserted, asdict(public), where)
    wanted = merge_dotted(fields, widths or {})
    votes = vote(weights, table.axes, evidence.witnesses, file_name)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}

    read, unknown = _voted_sizes(table, votes, evidence.stated, wanted, where)
    for key, stacks in table.depths.items():
        configuration.put(read, key, depth_of(weights, *stacks), where)
    for key, other in variant.padded_as.items():
        configuration.put(read, key, value_at(asserted, key) or value_at(read, other), where)
    stated = [*evidence.stated, *_public_sizes(table, variant, read, asdict(public), evidence, asserted)]
    stated += _constants(table, read, evidence, asserted)
    unknown += _derive(table, read, votes, shapes, evidence.stated, asserted, where)
    unknown = [key for key in unknown if key not in variant.padded_as]
    stated = [one for one in stated if one.key not in unknown]  # a stand-in contradicts nothing

    conflicts = [*_mixed_variants(table, weights, file_name), *evidence.conflicts]
    conflicts += (
        [f"no tensor determines {', '.join(unknown)}{_to_give(unknown, asdict(public))}"] if unknown else []
    )
    conflicts += contradictions(read, stated, wanted, votes, evidence.witnesses, file_name)

    assumed = _assumed(table, read, asdict(public))
    values = merge_dotted(
        merge_dotted(assumed, dict(variant.values)), {k: v for k, v in read.items() if v is not None}
    )
    values = merge_dotted(merge_dotted(values, _stated_depths(table, read, stated)), asserted)
    rules = Sizes(shapes, votes.most, _stated_for(evidence.stated), values)
    asked = {key: make(rules) for key, make in table.stand_ins.items() if value_at(values, key) is None}
    if asked:
        values = _with_stand_ins(table, values, asked, votes, shapes, evidence.stated)
    models = public, sizes[variant.tiny]
    shapeless = misfits(weights, table.axes, votes)
    wrong = conflicts, shapeless
    config = _checked(
        family_name, weights, values, asked, fields, models, wrong, file_name, where, evidence.remedies
    )
    return Inferred(config, tuple(conflicts), _assumption_notes(table, config, asserted, evidence))


def _require_whole(
    remedies: Mapping[str, str], asserted: Mapping[str, Any], public: Mapping[str, Any], where: str
) -> None:
    """Raise WeightsError for a table of which only some keys are given, and nothing tells the others."""
    for key, remedy in remedies.items():
        have = asserted.get(key)
        if isinstance(have, Mapping) and (lacking := [name for name in public[key] if name not in have]):
            listed = ", ".join(f"{key}.{name}" for name in lacking)
            raise WeightsError(
                f"{where}: config: of {key} only {', '.join(f'{key}.{name}' for name in have)} is given, and "
                f"nothing tells {listed}; give them, too, or {remedy}"
            )


def _voted_sizes(
    table: ShapeTable, votes: Votes, stated: Sequence[Stated], wanted: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the sizes that tensors tell, else the user or a config file; and the keys that nothing tells."""
    read: dict[str, Any] = {}
    unknown = []
    for key in table.keys:
        in_file = next((one.value for one in stated if one.key == key), None)
        size = votes.most(key, in_file)
        if size is None:
            by_user = value_at(wanted, key)
            size = by_user if isinstance(by_user, int) else in_file
        if size is None:
            size = GUESS
            unknown.append(key)
        configuration.put(read, key, size, where)
    return read, unknown


def _derive(
    table: ShapeTable,
    read: dict[str, Any],
    votes: Votes,
    shapes: Mapping[str, tuple[int, ...]],
    stated: Sequence[Stated],
    asserted: Mapping[str, Any],
    where: str,
) -> list[str]:
    """Add the derived sizes to `read`; return the keys that had to be guessed."""
    unknown = []
    rules = Sizes(shapes, votes.most, _stated_for(stated), read)
    for rule in table.derived:
        value: Any = value_at(asserted, rule.key) if rule.user_first else None
        if value is not None and (not isinstance(value, int) or value < 1):
            raise WeightsError(f"{where}: config: {rule.key} must be a whole number above 0, not {value!r}")
        value = rule.compute(rules) if value is None else value
        if value is None and rule.guess is not None:
            value = rule.guess(rules)
            unknown.append(rule.key)
        if value is not None:
            value = votes.derived(rule.key, value, rule.dimension) if rule.dimension else value
            configuration.put(read, rule.key, value, where)
    return unknown


def _with_stand_ins(
    table: ShapeTable,
    values: Mapping[str, Any],
    asked: Mapping[str, int],
    votes: Votes,
    shapes: Mapping[str, tuple[int, ...]],
    stated: Sequence[Stated],
) -> dict[str, Any]:
    """Return `values` with the keys derived from stand-ins, so that the tensors can be compared."""
    complete = dict(values)
    rules = Sizes(shapes, votes.most, _stated_for(stated), merge_dotted(values, asked))
    for rule in table.derived:
        if rule.key not in asked and value_at(values, rule.key) is None:
            complete = merge_dotted(complete, {rule.key: rule.compute(rules)})
    return complete


def _public_sizes(
    table: ShapeTable,
    variant: Variant,
    read: Mapping[str, Any],
    public: Mapping[str, Any],
    evidence: ConfigEvidence,
    asserted: Mapping[str, Any],
) -> list[Stated]:
    """Return the public size's sections of the same width, where nobody says otherwise.

    Number of layers, rows of the vocabulary and the like are free as far as the other tensors go.
    """
    known = {one.key for one in evidence.stated}
    expected = []
    for section, width in table.public_if.items():
        if value_at(read, width) != value_at(public, width):
            continue
        source = f"the public {variant.label} of the same {width}; set it in config if it is intended"
        expected += [
            Stated(key, value, source)
            for leaf, value in public[section].items()
            if (key := f"{section}.{leaf}") not in known and value_at(asserted, key) is None
        ]
    return expected


def _constants(
    table: ShapeTable, read: Mapping[str, Any], evidence: ConfigEvidence, asserted: Mapping[str, Any]
) -> list[Stated]:
    """Return what the programs have written into their code, where no config file states it."""
    known = {one.key for one in evidence.stated}
    fixed = [
        Stated(key, value_at(read, other), f"{other}, which the program pads it to")
        for key, other in evidence.padded_as.items()
        if key not in known
    ]
    return fixed + [
        Stated(c.key, c.value, c.source)
        for c in table.constants
        if c.key not in known
        and all(value_at(read, key) == size for key, size in c.when.items())
        and not (c.unless and value_at(asserted, c.unless) is not None)
    ]


def _assumed(table: ShapeTable, read: Mapping[str, Any], public: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public values of keys that no tensor tells, where the widths are the public ones."""
    if not all(value_at(read, key) == value_at(public, key) for key in table.assumed_if):
        return {}
    return merge_dotted({}, {key: value_at(public, key) for key in table.assumed})


def _assumption_notes(
    table: ShapeTable, config: Any, asserted: Mapping[str, Any], evidence: ConfigEvidence
) -> tuple[str, ...]:
    """Say which values of `config` come from the public size, because nothing states them."""
    made = asdict(config)
    taken = [
        f"{key} is {value_at(made, key)}"
        for key in table.assumed
        if key not in evidence.fixed and value_at(asserted, key) is None
    ]
    reason = "assumed, as in the public model of these widths; set it in config to change it"
    return (f"{' and '.join(taken)}: {reason}",) if taken else ()


def _stated_depths(table: ShapeTable, read: Mapping[str, Any], stated: Sequence[Stated]) -> dict[str, Any]:
    """Return the depths that are stated beyond those of the tensors: the layers between are missing."""
    deeper: dict[str, Any] = {}
    for key in table.depths:
        depth = next((one.value for one in stated if one.key == key), None)
        if depth is not None and value_at(read, key) < depth <= DEEPEST:
            deeper = merge_dotted(deeper, {key: depth})
    return deeper


def _mixed_variants(table: ShapeTable, weights: Iterable[str], file_name: Callable[[str], str]) -> list[str]:
    """Return a line where tensors that only one variant has lie beside those of another."""
    every = list(weights)
    names = [file_name(name) for name in every]
    own = variant_tensors(table, every)
    mixed = [
        f"of {variant.label} only {list_tensors(tensors, file_name, names)}"
        for variant, tensors in zip(table.variants, own, strict=True)
        if tensors
    ]
    return [f"a mix of two families: {'; '.join(mixed)}"] if len(mixed) > 1 else []


def _checked(
    family_name: str,
    weights: Mapping[str, Tensor],
    values: Mapping[str, Any],
    asked: Mapping[str, int],
    fields: Mapping[str, object],
    models: tuple[Any, Any],
    wrong: tuple[Sequence[str], Sequence[str]],
    file_name: Callable[[str], str],
    where: str,
    remedies: Mapping[str, str],
) -> Any:
    """Make the config out of `values`, or raise one error that names every tensor that is wrong.

    `asked` are keys that nothing tells with values that stand for them while the tensors are compared: the
    user is asked for them, unless something else is wrong. `models` are the public config and one that is
    quickly built to name the parameters. `wrong` are lines about conflicts, and tensors of unexpected sizes.
    """
    conflicts, shapeless = wrong
    public, tiny = models
    build = family(family_name).build
    try:
        config = configuration.build(type(public), merge_dotted(values, asked), f"{where}: config")
    except ConfigError as error:
        override(public, fields, f"{where}: config")  # raises for what is wrong in itself with the user's
        depths = {key: value_at(values, key) for key in shape_table(family_name).depths}
        policy = build(override(tiny, depths, where), "meta")
        differences = compare(policy, weights) | {"misshapen": shapeless, "not floating-point": []}
        every = [info.name for info in policy.parts()] + list(weights)
        lines = [f"its tensors' shapes do not go together: {error}", *conflicts]
        raise_mismatch(where, differences, file_name, every, lines)
        raise AssertionError from error  # one line is always there
    require_bounded(config, f"{where}: config")
    if asked:
        policy = build(config, "meta")
        every = [info.name for info in policy.parts()] + list(weights)
        raise_mismatch(where, compare(policy, weights), file_name, every, conflicts)
        told = [f"{key}: {remedies[key]}" for key in asked if key in remedies]
        numbers = [key for key in asked if key not in remedies]
        if numbers:
            given = " ".join(f"--config {key}=N" for key in numbers)
            trained = " ".join(f"--policy.config.{key} N" for key in numbers)
            recipe = f"policy.config.{numbers[0]} in a recipe, config={{{numbers[0]!r}: N}} in Python"
            told.insert(0, f"{given} of inspect, eval, serve and export (train: {trained}), {recipe}")
        raise WeightsError(
            f"{where}: neither the tensors nor a config beside them determine {', '.join(map(repr, asked))}; "
            f"give {'it' if len(asked) == 1 else 'them'}: {'; '.join(told)}"
        )
    return config


def _stated_for(stated: Sequence[Stated]) -> Callable[[str], list[int]]:
    return lambda key: [one.value for one in stated if one.key == key]
