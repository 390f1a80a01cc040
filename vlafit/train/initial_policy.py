"""Make the policy and codec that a run starts with: from a checkpoint, fresh, or from the run itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlafit import checkpoints
from vlafit.agreement import Agreement, same_actions
from vlafit.agreement.values import read as read_agreement
from vlafit.codec import Codec, CodecConfig, CodecSet
from vlafit.codec.statistics import FLOORED
from vlafit.codec.tokenizer import Tokenizer
from vlafit.datasets import value_faults
from vlafit.datasets.leaks import learned_before
from vlafit.datasets.statistics_cache import statistics_of
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.batch import stack
from vlafit.nn.policy import Policy
from vlafit.nn.rng import VALIDATION, sample_rng
from vlafit.policies import build_family
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import reconcile
from vlafit.train import tokenizer as tokenizers
from vlafit.train.data import Data
from vlafit.train.frozen import FrozenWeights
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
    opened = tokenizers.open_named(name) if name and policy.needs().prompt is not None else None
    if opened is not None:
        tokenizers.require_fitting(opened, name, policy, pretrained=False)
    elif policy.needs().prompt is not None:
        report += f"\ntokenizer: {LEARNED}"
    words = f"policy.tokenizer {name!r}" if opened else LEARNED
    if opened is None:
        opened = _learned_tokenizer(recipe, policy, data)
    codecs = []
    for embodiment, part in data.parts().items():
        agreement = agreements[embodiment]
        codec = _fit_codec(recipe, policy, part, None, agreement, opened)
        agreements[embodiment] = _with_codec(agreement, recipe, data, embodiment, None, codec, words)
        codecs.append(codec)
    agreement = reconcile.joined(recipe, data, agreements)
    return InitialPolicy(policy, CodecSet(codecs), report, history, "the policy", agreement=agreement)


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
            answer = policy.act(batch, sample_rng([(0, 0)], seed=0, stream=VALIDATION))
        policy.train()
        return answer

    return actions


def merge_error(folder: Path, data: Data, device: torch.device) -> float:
    """Return the largest change of an action that merging makes to the adapted checkpoint `folder`."""
    loaded = checkpoints.load_all(folder, device=device)
    assert loaded.codecs is not None
    actions = probe(loaded.policy, loaded.codecs, data, device)
    before = actions()
    merge(loaded.policy)
    return float((actions() - before).abs().max())


def _from_checkpoint(
    recipe: Recipe, data: Data, generator: torch.Generator, frozen: FrozenWeights
) -> InitialPolicy:
    place, chosen = checkpoints.place(recipe.policy.checkpoint), recipe.policy
    path = place.path
    foreign = not (path / "policy.json").is_file()
    base_of = chosen.base or None
    declared = checkpoints.declaration(path, base_of) if foreign else checkpoints.Declaration()
    fitted = recipe.fits_statistics
    passed = foreign and _takes_tokenizer(path, chosen, declared, fitted)
    opened = tokenizers.open_named(chosen.tokenizer) if chosen.tokenizer else None
    loaded = checkpoints.load_all(
        path,
        config=chosen.config or None,
        base=base_of,
        tokenizer=opened if passed else None,
        assets=chosen.assets or None,
        fresh=chosen.fresh,
        resize=chosen.resize,
        generator=generator,
        trust=chosen.trust,
        narrow=frozen.at_first_load,
    )
    policy, own_codecs, plan, report = loaded.policy, loaded.codecs, loaded.plan, loaded.report
    pretrained = not tokenizers.language_is_fresh(policy, report.fresh)
    own = declared.own_tokenizer
    if opened is None and own_codecs is None and own is not None and pretrained:
        opened = tokenizers.open_named(str(own))
    befores = reconcile.codecs_before(recipe, data, own_codecs, path)
    for before in befores.values():
        _require_effect(recipe, before, path, own_tokenizer=not passed)
    if policy.needs().prompt is not None:
        if opened is None and own_codecs is None and pretrained:
            tokenizers.require_given(policy, str(path), declared.tokenizer, declared.lost_tokenizer)
        if opened is not None:
            name = chosen.tokenizer or str(own)
            tokenizers.require_fitting(opened, name, policy, pretrained and bool(chosen.tokenizer))
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
    tokenizer = f"policy.tokenizer {chosen.tokenizer!r}" if chosen.tokenizer else "the checkpoint's"
    notes = [f"note: {place.note}"] if place.note else []
    if opened is None and own_codecs is None and policy.needs().prompt is not None:
        tokenizer = LEARNED
        notes.append(f"tokenizer: {LEARNED}, because the language weights are fresh")
        opened = _learned_tokenizer(recipe, policy, data)
    past = checkpoints.read_lineage(path)
    warnings += tuple(learned_before(data.stores, data.validation, past.episodes, chosen.checkpoint))
    codecs, slots = [], []
    for embodiment, part in data.parts().items():
        before, agreement = befores.get(embodiment), agreements[embodiment]
        if fitted or before is None:
            codec = _fit_codec(recipe, policy, part, before, agreement, opened, declared.form)
            notes += _floors(recipe, before, codec)
        else:
            codec = _adopt(before, part, agreement)
        slots += _camera_slots(before, codec)
        codecs.append(_named(codec, embodiment, own_codecs) if data.embodiments else codec)
        agreements[embodiment] = _with_codec(
            agreement, recipe, data, embodiment, before, codec, tokenizer, report.chunk
        )
    return InitialPolicy(
        policy,
        CodecSet(codecs),
        "\n".join([report.text(), *dict.fromkeys(notes), *dict.fromkeys(slots)]),
        past.followed_by(digest, data.learned, data.seeds(), data.contents),
        f"checkpoint {path}",
        robots={name: codec.embodiment for name, codec in befores.items() if codec.embodiment.hz},
        base=base,
        changed=frozenset(changed),
        warnings=warnings,
        agreement=reconcile.joined(recipe, data, agreements),
    )


def _named(codec: Codec, embodiment: str, before: CodecSet | None) -> Codec:
    """Return the codec under the name that the recipe gives the embodiment, with the checkpoint's number.

    A new embodiment gets no number that the checkpoint has given to another one.
    """
    robot, number = replace(codec.embodiment, name=embodiment), None
    if before is not None and embodiment in before:
        number = before[embodiment].embodiment_id
    elif before is not None and any(one.embodiment_id is not None for one in before):
        number = 1 + max(one.embodiment_id for one in before if one.embodiment_id is not None)
    return Codec(codec.config, robot, codec.statistics, codec.tokenizer, number)


def _learned_tokenizer(recipe: Recipe, policy: Policy, data: Data) -> Tokenizer | None:
    """Return a tokenizer of the instructions of all datasets; None if the policy reads none."""
    needs = policy.needs()
    if recipe.policy.tokenizer or needs.prompt is None:
        return None
    return tokenizers.learn(data, needs)


def _takes_tokenizer(
    path: Path, chosen: PolicyRecipe, declared: checkpoints.Declaration, fitted: bool
) -> bool:
    """Return whether the recipe's tokenizer makes a codec of what a foreign checkpoint declares."""
    # Statistics of several datasets become a codec only once the user chooses some.
    if not chosen.tokenizer or (declared.named_statistics and not chosen.assets):
        return False
    # Some checkpoints' statistics, and the form of their prompts, become a codec only with a tokenizer.
    if not checkpoints.wants_tokenizer(path, chosen.base or None):
        return False
    return bool(declared.tokenizer or chosen.assets or not fitted)


def _merge_before_training(policy: Policy, plan: Plan, frozen: FrozenWeights, name: str) -> str:
    """Merge the adapters or quantised layers of the checkpoint `name` into its weights; return a warning."""
    merge(policy)
    frozen.in_memory(policy)
    layers = "adapters" if plan.adapted else "quantised layers"
    return f"the {layers} of {name} were merged into its weights before training"


def _with_codec(
    agreement: Agreement,
    recipe: Recipe,
    data: Data,
    embodiment: str,
    before: Codec | None,
    codec: Codec,
    tokenizer: str,
    own_chunk: int | None = None,
) -> Agreement:
    """Return the agreement with the codec's items, and how far the data goes under its statistics."""
    part, recipe = data.of(embodiment), recipe.of(embodiment)
    whole = agreement.with_items(
        [
            *reconcile.other_cards(part.cards),
            *reconcile.codec_items(recipe, part, before, codec, tokenizer, own_chunk),
            *value_faults.of_run(
                part.stores,
                part.training,
                part.validation,
                codec,
                reconcile.outside(recipe, agreement),
                recipe.fits_statistics,
            ),
        ]
    )
    if len(data.names) > 1:
        whole = whole.for_embodiment(embodiment)
    whole.require("the dataset and the statistics in use")
    return whole


def _require_effect(recipe: Recipe, codec: Codec, base: Path, *, own_tokenizer: bool) -> None:
    """Raise ConfigError for fields that the codec of the checkpoint `base` would silently override."""
    if recipe.policy.tokenizer and own_tokenizer:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} has no effect: the weights of checkpoint {base} "
            'only work with their own tokenizer; set policy.tokenizer = ""'
        )
    requested, used = recipe.data.normalisation, codec.config.normalisation
    if requested not in ("", used) and recipe.data.statistics == "checkpoint":
        raise ConfigError(
            f"data.normalisation {requested!r} has no effect with the statistics of checkpoint {base}, which "
            f'normalises by {used!r}; set it to "", or fit new statistics: data.statistics = "data"'
        )


def _adopt(codec: Codec, data: Data, agreement: Agreement) -> Codec:
    """Return the checkpoint's codec with its statistics, for the robot and cameras that were agreed on."""
    same_mask = same_actions(codec.config.relative, agreement.relative)
    if codec.embodiment.hz and not agreement.chosen and same_mask:
        return codec
    relative = codec.config.relative if same_mask else agreement.relative
    config = replace(codec.config, cameras=agreement.cameras, relative=relative)
    return codec.with_changes(config=config, embodiment=data.embodiment)


def _camera_slots(before: Codec | None, after: Codec) -> list[str]:
    """Return a line of the load report about changed cameras."""
    own = ", ".join(name or "(none)" for name in after.config.cameras)
    if before is None:
        return [f"adapted: cameras {own}"]
    if before.config.cameras == after.config.cameras:
        return []
    old = ", ".join(name or "(none)" for name in before.config.cameras)
    return [f"adapted: cameras {own}, in the checkpoint {old}"]


def _floors(recipe: Recipe, before: Codec | None, codec: Codec) -> list[str]:
    """Return a line of the load report about a normalisation that fitted statistics do not repeat."""
    old, new = before and before.config.normalisation, codec.config.normalisation
    if not old or old == new or recipe.data.normalisation:
        return []
    return [f"adapted: fitted statistics normalise by {new}, which has a floor; in the checkpoint {old}"]


def _from_scratch(recipe: PolicyRecipe, generator: torch.Generator) -> Policy:
    if not recipe.family:
        raise ConfigError("policy: give either `checkpoint` or `family` (with `size` or `config`)")
    return build_family(recipe.family, recipe.size, recipe.config, generator)


def _fit_codec(
    recipe: Recipe,
    policy: Policy,
    data: Data,
    old: Codec | None,
    agreement: Agreement,
    tokenizer: Tokenizer | None,
    form: checkpoints.InputForm | None = None,
) -> Codec:
    """Fit a codec to the training episodes; the codec `old`, if any, provides tokenizer and forms.

    `form` is that of the checkpoint's program, where it has no codec.
    """
    needs = policy.needs()
    if recipe.policy.tokenizer and needs.prompt is None:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} has no effect: the policy reads no instruction; "
            'make it ""'
        )
    if old is not None:
        tokenizer = old.tokenizer
    chosen = recipe.data.normalisation
    config = CodecConfig(
        cameras=agreement.cameras,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=chosen or needs.normalisation,
        relative=agreement.relative,
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        framing=needs.framing,
        history=needs.history,
    )
    if old is None and form is not None and needs.prompt is not None:
        config = replace(config, prompt=form.prompt, framing=form.framing, special_tokens=form.special_tokens)
    if old is not None:  # images and prompts keep the checkpoint's form, too
        kept = old.config
        config = replace(
            config,
            mask_padding=kept.mask_padding,
            prompt=kept.prompt,
            framing=kept.framing,
            special_tokens=kept.special_tokens,
        )
        if not chosen:  # another program's formula has no floor for dimensions that hardly ever move
            states, actions = (FLOORED.get(one, one) for one in (kept.normalisation, kept.of_actions))
            config = replace(
                config, normalisation=states, action_normalisation=actions if actions != states else None
            )
    try:
        statistics = statistics_of(data.stores, data.training, config.chunk, config.relative)
        number = None if old is None else old.embodiment_id
        return Codec(config, data.embodiment, statistics, tokenizer, number)
    except CodecError as error:
        raise CodecError(f"card {data.cards[0].name!r} does not fit the policy: {error}") from error
