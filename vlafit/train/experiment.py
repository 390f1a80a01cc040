"""Build what a recipe asks for: datasets, policy, codec, tuning plan. Nothing here trains or writes."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vlafit import checkpoints
from vlafit.agreement import Agreement
from vlafit.codec import Codec, CodecSet
from vlafit.datasets import EpisodeStore, checksums
from vlafit.errors import ConfigError, EmbodimentError, TrainingError
from vlafit.nn.policy import Policy
from vlafit.recipe import Recipe
from vlafit.train import (
    answers,
    in_backward,
    initial_policy,
    quantised_base,
    saved_weights,
    validation_agreement,
)
from vlafit.train.data import (
    Data,
    ValidationSets,
    declared_warnings,
    open_data,
    open_validation_sets,
    renderer_warnings,
)
from vlafit.train.delays import train_with_delays
from vlafit.train.episode_warnings import line_break_warnings, repeat_warnings, split_warnings
from vlafit.train.frozen import FrozenWeights
from vlafit.train.packer import chosen_packing
from vlafit.train.prompts import require_prompts
from vlafit.train.settle import with_field
from vlafit.tuning import UNCHANGED, UNCHANGED_BF16, Plan, apply, enter, load_strategy
from vlafit.tuning.inject import compute_adapters_in_bf16
from vlafit.types import Embodiment, renderer_notice, require_same


@dataclass(frozen=True)
class Experiment:
    """Everything that a recipe describes, ready to train."""

    recipe: Recipe
    policy: Policy
    codecs: CodecSet
    plan: Plan
    data: Data
    load_report: str
    history: checkpoints.Lineage
    warnings: tuple[str, ...] = ()
    """Warnings for readers of the run's results; `notices` in run.json."""
    base: checkpoints.Base | None = None
    """The base checkpoint of the run's checkpoints; None if they hold every weight."""
    changed: frozenset[str] = frozenset()
    """Weights that differ from `base` before the first step."""
    saved: str = ""
    """A sentence about the weights that checkpoints hold."""
    validation_sets: ValidationSets = field(default_factory=dict)
    """Named datasets to validate on besides the held-out episodes."""
    unquantised: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights before quantisation, if no file holds them; see `quantised_base`."""
    agreement: Agreement | None = None
    """The agreement of dataset and checkpoint; None for a resumed run that is older than agreements."""

    @property
    def codec(self) -> Codec:
        """The codec of the only embodiment. Raises ConfigError where there are several."""
        return self.codecs.choose(where="the run")

    @property
    def evaluated(self) -> str:
        """The embodiment that rollouts show; empty where there is only one."""
        return self.recipe.eval.embodiment if len(self.codecs) > 1 else ""

    def codec_of(self, store: EpisodeStore) -> Codec:
        """Return the codec of a dataset's embodiment."""
        return self.codecs.of_data(self.data.name_of(store), where="the run")

    def saved_on(self, plan: Plan) -> tuple[checkpoints.Base | None, frozenset[str] | None]:
        """Return the base of the run's checkpoints in a stage, and the weights that differ from it.

        Without a base they hold every weight; see `saved_weights.py`.
        """
        if self.base is None:
            return None, None
        stages = [plan.at(stage) for stage in range(plan.stage + 1)]
        trained = {e.name for stage in stages for e in stage.entries if e.trainable and not e.adapts}
        return self.base, self.changed | trained


def build(
    recipe: Recipe, device: torch.device, resumed: Path | None = None, data: Data | None = None
) -> Experiment:
    """Build the experiment of a recipe; the policy is on `device`, with the strategy applied.

    It is in fp32, except weights that the recipe keeps in bf16 (`frozen.py`).

    `resumed` is the checkpoint of the same run to resume from, which then provides policy and codec. `data`
    is the recipe's, where the caller has opened it already.
    """
    data = data or open_data(recipe.data, recipe.train.seed)
    sets = open_validation_sets(recipe.data, data)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        checksums.require_same([*data.stores, *chain.from_iterable(sets.values())])
    readings = validation_agreement.of_readings(sets, recipe, data)
    if resumed is None:
        validation_agreement.require(readings, "the training data")
    for part in data.parts().values():
        _require_room_to_shift(recipe.data.shift_pixels, part.embodiment)
    strategy = load_strategy(recipe.strategy)
    frozen = FrozenWeights(
        strategy, wanted=recipe.train.frozen == "bf16", trained=recipe.train.weights == "bf16"
    )
    initial = (
        initial_policy.resume(
            resumed, (recipe.policy.family, *recipe.policy.trust), frozen, recipe.policy.base or None
        )
        if resumed is not None
        else initial_policy.initialise(recipe, data, frozen)
    )
    policy = initial.policy
    recipe = with_field(recipe, "train.packing", chosen_packing(recipe, policy))
    train_with_delays(policy, recipe.train.max_delay)
    codecs, renderers = _for_data(initial, data, resumed)
    every = [*data.stores, *chain.from_iterable(sets.values())]
    require_prompts((store, codecs.of_data(data.name_of(store), where=initial.source)) for store in every)
    answers.require_learnable(data, policy, next(iter(codecs)))
    parts = (readings, validation_agreement.of_values(sets, recipe, data, codecs))
    if resumed is None:
        validation_agreement.require(parts[1], "the statistics in use")
    policy.to(device)
    warnings, unquantised, agreement = initial.warnings, {}, initial.agreement
    agreement = agreement and validation_agreement.joined(agreement, parts)
    if initial.plan is None:
        unquantised = quantised_base.weights_to_keep(policy, strategy, initial.base, initial.changed)
        warnings += (quantised_base.WARNING,) if unquantised else ()
        bf16 = "bf16" in (recipe.train.frozen, recipe.train.weights)
        probe = initial_policy.probe(policy, codecs, data, device, bf16=bf16)
        bound = UNCHANGED_BF16 if bf16 else UNCHANGED
        plan = apply(policy, strategy, seed=recipe.train.seed, probe=probe, bound=bound)
        warnings += tuple(never_learned(initial.fresh, plan))
        frozen.finish(policy)
        lines = [*frozen.items(), *in_backward.items(recipe.optim), *answers.items(recipe, data, policy)]
        agreement = agreement and agreement.with_items(lines)
    else:
        plan = initial.plan
        if strategy.expand(policy.parts()) != plan.strategy:
            raise TrainingError(
                f"{resumed}: strategy {recipe.strategy!r} changed since the run began; restore its file, or "
                "start a new run with --out"
            )
        enter(policy, plan)
    if recipe.train.precision == "bf16":
        compute_adapters_in_bf16(policy)
    wanted = recipe.train.checkpoints
    if resumed is not None and wanted == "auto":
        wanted = "whole" if initial.base is None else "trained"
    saved = saved_weights.choose(wanted, plan, initial.base, initial.changed)
    return Experiment(
        recipe=with_field(recipe, "train.checkpoints", saved.how),
        policy=policy,
        codecs=codecs,
        plan=plan,
        data=data,
        load_report=initial.report,
        history=initial.history,
        warnings=(
            *warnings,
            *renderers,
            *renderer_warnings(sets, data),
            *split_warnings(recipe.data, data),
            *declared_warnings(data),
            *repeat_warnings(data),
            *line_break_warnings(data),
            *chain.from_iterable(map(validation_agreement.warnings, parts)),
        ),
        base=saved.base,
        saved=saved.sentence,
        changed=initial.changed,
        validation_sets=sets,
        unquantised=unquantised,
        agreement=agreement,
    )


def never_learned(fresh: Collection[str], plan: Plan) -> Iterator[str]:
    """Say which weights were drawn anew and stay as they were drawn."""
    frozen = plan.never_trained(fresh)
    if not frozen:
        return
    parts = sorted({one.part for one in frozen})
    shown = ", ".join(one.name for one in frozen[:3]) + (f" and {len(frozen) - 3} more" * (len(frozen) > 3))
    yield (
        f"policy.fresh drew {shown} anew, and strategy {plan.strategy.name!r} never trains them: they keep "
        f"random values. Add a rule to the strategy, before that which freezes them: [[rule]] select = "
        f'{{ part = {json.dumps(parts if len(parts) > 1 else parts[0])} }}, mode = "full"'
    )


def _require_room_to_shift(pixels: int, robot: Embodiment) -> None:
    for camera in robot.cameras:
        height, width, _ = camera.shape
        if pixels >= min(height, width):
            raise ConfigError(
                f"data.shift_pixels {pixels} would shift the whole image of camera {camera.name!r} "
                f"({height}x{width}) out of view; use a few pixels, or 0 for none"
            )


def _for_data(
    initial: initial_policy.InitialPolicy, data: Data, resumed: Path | None
) -> tuple[CodecSet, list[str]]:
    """Return a codec for each embodiment of the data, with the renderer of its images, and warnings of them.

    Raises EmbodimentError or ConfigError where a codec is for another robot, or one is missing.
    """
    parts, codecs, warnings = data.parts(), [], []
    if len(parts) != len(initial.codecs):
        raise ConfigError(
            f"{initial.source}: has the embodiments {', '.join(initial.codecs.names)}, the data show "
            f"{', '.join(parts)}"
        )
    for name, part in parts.items():
        codec = initial.codecs.of_data(name, where=initial.source)
        robot = part.embodiment
        _require_one_robot(part, codec, initial.source, resumed)
        before = initial.robots.get(name) or codec.embodiment
        warnings.append(renderer_notice("the checkpoint was trained on", before, "the dataset shows", robot))
        warnings += _other_limits(part, codec, initial.source)
        codecs.append(_with_renderer(codec, robot))
    return CodecSet(codecs), list(filter(None, warnings))


def _require_one_robot(data: Data, codec: Codec, source: str, resumed: Path | None) -> None:
    try:
        require_same(data.embodiment, f"card {data.cards[0].name!r}", codec.embodiment, source)
    except EmbodimentError as error:
        if resumed is not None:
            raise
        remedy = "vlafit's agreement let this pass, which is a fault in vlafit: please report it."
        raise EmbodimentError(f"{error}\n{remedy}") from error


def _other_limits(data: Data, codec: Codec, source: str) -> Iterator[str]:
    """Yield a sentence where the card's limits are not those that the run's checkpoints keep."""
    card, robot, kept = data.cards[0], data.embodiment, codec.embodiment
    for mine, its in ((robot.state, kept.state), (robot.action, kept.action)):
        for name, here, there in (("low", mine.low, its.low), ("high", mine.high, its.high)):
            if tuple(here) != tuple(there):
                yield (
                    f"card {card.name!r}: robot.{mine.name}.{name} is {list(here) or 'not stated'}, in "
                    f"{source} {list(there) or 'not stated'}: the run's checkpoints keep the latter, which "
                    "vlafit.Limits.of reads"
                )


def _with_renderer(codec: Codec, data: Embodiment) -> Codec:
    """Return the codec with the renderer of the dataset's images, which the policy is trained on."""
    if not data.renderer or data.renderer == codec.embodiment.renderer:
        return codec
    robot = replace(codec.embodiment, renderer=data.renderer)
    return codec.with_changes(embodiment=robot)
