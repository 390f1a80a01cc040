"""Make the policy and codec that a run starts with: from a checkpoint, fresh, or from the run itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlafit import checkpoints
from vlafit.agreement import Agreement
from vlafit.agreement.values import read as read_agreement
from vlafit.checkpoints.named_tokenizer import open_named
from vlafit.codec import Codec, CodecSet
from vlafit.datasets.leaks import learned_before
from vlafit.errors import ConfigError
from vlafit.nn.batch import stack
from vlafit.nn.policy import Policy
from vlafit.nn.rng import VALIDATION, sample_rng
from vlafit.policies import build_family
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import action_tokenizer as action_tokenizers
from vlafit.train import checkpoint_codec, reconcile
from vlafit.train import tokenizer as tokenizers
from vlafit.train.action_chunks import Chunks, faults_of
from vlafit.train.data import Data
from vlafit.train.embodiment_numbers import numbered, require_used
from vlafit.train.frozen import FrozenWeights
from vlafit.train.initial_codec import (
    adopt,
    camera_slots,
    fit_codec,
    fitted_config,
    floors,
    learned_tokenizer,
    renamed,
    with_codec,
)
from vlafit.tuning import Plan
from vlafit.tuning.merge import merge
from vlafit.types import Embodiment, Observation

LEARNED = "learned from the data's instructions"


@dataclass(frozen=True)
class InitialPolicy:
    """A policy with its codecs, and where they come from."""

    policy: Policy
    codecs: CodecSet
    report: str
    history: checkpoints.Lineage
    source: str
    """Its name in messages."""
    plan: Plan | None = None
    """The plan of a resumed run, already in force; None: the strategy still has to be applied."""
    robots: Mapping[str, Embodiment] = field(default_factory=dict)
    """Embodiment -> the robot that the checkpoint was trained on, where it is not that of its codec."""
    base: checkpoints.Base | None = None
    """The checkpoint that holds the weights; None if no checkpoint does."""
    changed: frozenset[str] = frozenset()
    """Weights that differ from those of `base`."""
    fresh: frozenset[str] = frozenset()
    """Weights that were drawn anew in a checkpoint's."""
    warnings: tuple[str, ...] = ()
    agreement: Agreement | None = None
    """The agreement of data and checkpoint; None for a resumed run that is older than agreements."""

    @property
    def codec(self) -> Codec:
        """The codec of the only embodiment. Raises ConfigError where there are several."""
        return self.codecs.choose(where=self.source)


def resume(
    folder: Path, trust: Sequence[str], frozen: FrozenWeights, moved: str | None = None
) -> InitialPolicy:
    """Load the checkpoint of a run to resume, `trust`ing packages. Raises as `checkpoints.load` does.

    `moved` is where its base lies now; a checkpoint without a base ignores it.
    """
    base = checkpoints.read_base(folder)
    at = moved if base is not None else None
    loaded = checkpoints.load_all(folder, base=at, trust=trust, narrow=frozen.at_load)
    policy, codecs, plan = loaded.policy, loaded.codecs, loaded.plan
    frozen.finish(policy)
    assert codecs is not None and plan is not None  # the trainer saves both
    if base is not None and moved:
        base = replace(base, checkpoint=checkpoints.place(moved).name)
    changed = frozenset(checkpoints.names_on_base(folder)) if base else frozenset()
    return InitialPolicy(
        policy,
        codecs,
        loaded.report.text(),
        checkpoints.read_lineage(folder),
        f"checkpoint {folder}",
        plan,
        base=base,
        changed=changed,
        agreement=read_agreement(folder),
    )


def initialise(recipe: Recipe, data: Data, frozen: FrozenWeights) -> InitialPolicy:
    """Load or build the recipe's policy; fit a codec unless the checkpoint's is to be used.

    What `frozen` chooses is loaded in bfloat16, or is to be made so when the strategy was applied.

    Raises as `checkpoints.load` does, and ConfigError for fields that exclude each other.
    """
    generator = torch.Generator().manual_seed(recipe.train.seed)
    if recipe.policy.checkpoint:
        return _from_checkpoint(recipe, data, generator, frozen)
    policy = _from_scratch(recipe.policy, generator)
    frozen.in_memory(policy)
    history = checkpoints.Lineage().followed_by("", data.learned, data.seeds(), data.contents)
    agreements = reconcile.agree_on_parts(recipe, data, {}, None)
    name, report = recipe.policy.tokenizer, "all weights are fresh"
    opened = open_named(name) if name and policy.needs().prompt is not None else None
    if opened is not None:
        tokenizers.require_fitting(opened, name, policy, pretrained=False)
    elif policy.needs().prompt is not None:
        report += f"\ntokenizer: {LEARNED}"
    words = f"policy.tokenizer {name!r}" if opened else LEARNED
    if opened is None:
        opened = learned_tokenizer(recipe, policy, data)
    actions = action_tokenizers.choose(
        recipe.policy.action_tokenizer,
        policy.needs(),
        {
            name: Chunks(part, fitted_config(recipe, policy, None, agreements[name]))
            for name, part in data.parts().items()
        },
        opened,
        None,
        pretrained="",
    )
    codecs = []
    for embodiment, part in data.parts().items():
        agreement = agreements[embodiment]
        codec = fit_codec(recipe, policy, part, None, agreement, opened, action_tokenizer=actions)
        agreements[embodiment] = with_codec(
            agreement,
            recipe,
            data,
            embodiment,
            None,
            codec,
            words,
            needs=policy.needs(),
            tokens=action_tokenizers.Origin(recipe.policy.action_tokenizer),
        )
        codecs.append(codec)
    agreement = reconcile.joined(recipe, data, agreements)
    warnings = faults_of(data.parts(), codecs)
    made, lines = numbered(codecs, policy)
    report = "\n".join([report, *lines])
    return InitialPolicy(policy, made, report, history, "the policy", warnings=warnings, agreement=agreement)


def probe(
    policy: Policy, codecs: CodecSet, data: Data, device: torch.device, *, bf16: bool = False
) -> Callable[[], Tensor]:
    """Return a function that computes the policy's actions [1, t, a] for the first training frame.

    With `bf16` it computes as training does where frozen weights are bfloat16.
    """
    store, ids = next((s, i) for s, i in zip(data.stores, data.training, strict=True) if i)
    number = store.index(ids[0])
    codec = codecs.of_data(data.name_of(store), where="the policy")
    images = {c.name: np.zeros(c.shape, np.uint8) for c in store.embodiment.cameras}
    seen = Observation(images, store.state(number)[0], store.episodes[number].instruction)
    batch = stack([codec.encode(seen)]).to(device)

    @torch.no_grad()
    def actions() -> Tensor:
        policy.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            answer = policy.probe(batch, sample_rng([(0, 0)], seed=0, stream=VALIDATION))
        policy.train()
        return answer

    return actions


def merge_error(folder: Path, data: Data, device: torch.device, *, bf16: bool = False) -> float:
    """Return the largest change of an action that merging makes to the adapted checkpoint `folder`.

    With `bf16` in the precision in which such a run is exported, which takes half of the memory.
    """
    loaded = checkpoints.load_all(folder, device=device, dtype="bfloat16" if bf16 else "float32")
    assert loaded.codecs is not None
    actions = probe(loaded.policy, loaded.codecs, data, device, bf16=bf16)
    before = actions()
    merge(loaded.policy)
    return float((actions() - before).abs().max())


def _from_checkpoint(
    recipe: Recipe, data: Data, generator: torch.Generator, frozen: FrozenWeights
) -> InitialPolicy:
    place, chosen = checkpoints.place(recipe.policy.checkpoint), recipe.policy
    path = place.path
    foreign = not (path / "policy.json").is_file()
    base_of, fitted = chosen.base or None, recipe.fits_statistics
    choice = checkpoint_codec.choose(recipe, path)
    declared = choice.declared
    named = chosen.action_tokenizer not in ("", action_tokenizers.FIT)
    key = declared.action_tokenizer_key if choice.makes_codec and named else ""
    loaded = checkpoints.load_all(
        path,
        config=(action_tokenizers.named_in(chosen, key) if key else chosen.config) or None,
        base=base_of,
        tokenizer=choice.passed,
        assets=chosen.assets or None,
        fresh=chosen.fresh,
        resize=chosen.resize,
        generator=generator,
        trust=chosen.trust,
        narrow=frozen.at_first_load,
    )
    policy, own_codecs, plan, report = loaded.policy, loaded.codecs, loaded.plan, loaded.report
    pretrained = not tokenizers.language_is_fresh(policy, report.fresh)
    befores = reconcile.codecs_before(recipe, data, own_codecs, path)
    for before in befores.values():
        checkpoint_codec.require_effect(recipe, before, path, own_tokenizer=not choice.makes_codec)
    opened = checkpoint_codec.require_tokenizer(
        recipe, policy, path, choice, report.fresh, own_codecs is not None
    )
    if own_codecs is None and not fitted:
        raise ConfigError(
            f'{path}: data.statistics = "checkpoint", and the checkpoint gives none: {report.codec}. To '
            'fit them to the dataset: data.statistics = "data"'
        )
    agreements = reconcile.agree_on_parts(recipe, data, befores, declared)
    digest = checkpoints.digest(path)
    options = checkpoints.parse_config(chosen.config).to_read_again() if foreign else {}
    base: checkpoints.Base | None = checkpoints.Base(place.name, digest, options)
    changed = {*report.fresh, *report.resized}
    warnings: tuple[str, ...] = ()
    if plan is not None and (plan.adapted or plan.quantised):
        warnings = (_merge_before_training(policy, plan, frozen, chosen.checkpoint),)
        base = None  # no file holds the merged weights
    elif not foreign and (below := checkpoints.lasting_base(path, base_of)) is not None:
        base = below  # not on the checkpoint of another run, which holds only what that run trained
        changed.update(checkpoints.names_on_base(path))
    tokenizer = (
        f"policy.tokenizer {chosen.tokenizer!r}" if chosen.tokenizer else reconcile.tokenizer_of(report.owner)
    )
    notes = [f"note: {place.note}"] if place.note else []
    if opened is None and own_codecs is None and policy.needs().prompt is not None:
        tokenizer = LEARNED
        notes.append(f"tokenizer: {LEARNED}, because the language weights are fresh")
        opened = learned_tokenizer(recipe, policy, data)
    past = checkpoints.read_lineage(path)
    warnings += tuple(learned_before(data.stores, data.validation, past.episodes, chosen.checkpoint))
    chunks = {
        name: Chunks(part, fitted_config(recipe, policy, befores.get(name), agreements[name], declared.form))
        if fitted or name not in befores
        else Chunks(part, befores[name].config, befores[name].statistics["action"])
        for name, part in data.parts().items()
    }
    actions = action_tokenizers.choose(
        "" if key else chosen.action_tokenizer,
        policy.needs(),
        chunks,
        opened,
        own_codecs,
        pretrained=str(path) if pretrained else "",
    )
    origin = action_tokenizers.origin(chosen, declared, own_codecs, pretrained)
    codecs, slots = [], []
    for embodiment, part in data.parts().items():
        before, agreement = befores.get(embodiment), agreements[embodiment]
        if fitted or before is None:
            codec = fit_codec(recipe, policy, part, before, agreement, opened, declared.form, actions)
            notes += floors(recipe, before, codec)
        else:
            codec = action_tokenizers.adopted(adopt(before, part, agreement), policy.needs(), actions)
        slots += camera_slots(before, codec)
        codecs.append(renamed(codec, embodiment, own_codecs) if data.embodiments else codec)
        agreements[embodiment] = with_codec(
            agreement,
            recipe,
            data,
            embodiment,
            before,
            codec,
            tokenizer,
            report.chunk,
            report.owner,
            needs=policy.needs(),
            tokens=origin,
            declared=declared,
        )
    warnings += faults_of(data.parts(), codecs)
    made, lines = numbered(codecs, policy, None if foreign else own_codecs)
    require_used(chosen.fresh, made, policy)
    return InitialPolicy(
        policy,
        made,
        "\n".join([report.text(), *dict.fromkeys(notes), *dict.fromkeys(slots), *lines]),
        past.followed_by(digest, data.learned, data.seeds(), data.contents),
        f"checkpoint {path}",
        robots={name: codec.embodiment for name, codec in befores.items() if codec.embodiment.hz},
        base=base,
        changed=frozenset(changed),
        fresh=frozenset(report.fresh),
        warnings=warnings,
        agreement=reconcile.joined(recipe, data, agreements),
    )


def _merge_before_training(policy: Policy, plan: Plan, frozen: FrozenWeights, name: str) -> str:
    """Merge the adapters or quantised layers of the checkpoint `name` into its weights; return a warning."""
    merge(policy)
    frozen.in_memory(policy)
    layers = "adapters" if plan.adapted else "quantised layers"
    return f"the {layers} of {name} were merged into its weights before training"


def _from_scratch(recipe: PolicyRecipe, generator: torch.Generator) -> Policy:
    if not recipe.family:
        raise ConfigError("policy: give either `checkpoint` or `family` (with `size` or `config`)")
    return build_family(recipe.family, recipe.size, recipe.config, generator)
