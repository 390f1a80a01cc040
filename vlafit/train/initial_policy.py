"""Make the policy and codec that a run starts with: from a checkpoint, fresh, or from the run itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlafit import checkpoints, shipped
from vlafit.codec import Codec, CodecConfig, prompts
from vlafit.codec.tokenizer import Tokenizer, train_word_tokenizer
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.datasets import blocks_for_statistics
from vlafit.errors import CodecError, ConfigError, EmbodimentError
from vlafit.nn.batch import stack
from vlafit.nn.policy import Needs, Policy
from vlafit.nn.rng import VALIDATION, sample_rng
from vlafit.policies import build_family
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train.data import Data
from vlafit.tuning import Plan
from vlafit.tuning.merge import merge
from vlafit.types import Embodiment, Observation


@dataclass(frozen=True)
class InitialPolicy:
    """A policy with its codec, and where they come from."""

    policy: Policy
    codec: Codec
    report: str
    history: checkpoints.Lineage
    source: str
    """Its name in messages."""
    plan: Plan | None = None
    """The plan of a resumed run, already in force; None: the strategy still has to be applied."""
    robot: Embodiment | None = None
    """The robot that the checkpoint was trained on; None: that of its codec."""
    base: checkpoints.Base | None = None
    """The checkpoint that holds the weights; None if no checkpoint does."""
    changed: frozenset[str] = frozenset()
    """Weights that differ from those of `base`."""
    warnings: tuple[str, ...] = ()


def resume(folder: Path, trust: Sequence[str] = ()) -> InitialPolicy:
    """Load the checkpoint of a run to resume, `trust`ing packages. Raises as `checkpoints.load` does."""
    policy, codec, plan, report = checkpoints.load(folder, trust=trust)
    assert codec is not None and plan is not None  # the trainer saves both
    base = checkpoints.read_base(folder)
    changed = frozenset(checkpoints.names_on_base(folder)) if base else frozenset()
    return InitialPolicy(
        policy,
        codec,
        report.text(),
        checkpoints.read_lineage(folder),
        f"checkpoint {folder}",
        plan,
        base=base,
        changed=changed,
    )


def initialise(recipe: Recipe, data: Data) -> InitialPolicy:
    """Load or build the recipe's policy; fit a codec unless the checkpoint's is to be used.

    Raises as `checkpoints.load` does, and ConfigError for fields that exclude each other.
    """
    generator = torch.Generator().manual_seed(recipe.train.seed)
    if recipe.policy.checkpoint:
        return _from_checkpoint(recipe, data, generator)
    policy = _from_scratch(recipe.policy, generator)
    history = checkpoints.Lineage().followed_by("", data.learned, data.seeds())
    codec = _fit_codec(recipe, policy, data, None)
    return InitialPolicy(policy, codec, "all weights are fresh", history, "the policy")


def probe(policy: Policy, codec: Codec, data: Data, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that computes the policy's actions [1, t, a] for the first training frame."""
    store, ids = next((s, i) for s, i in zip(data.stores, data.training, strict=True) if i)
    number = store.index(ids[0])
    images = {c.name: np.zeros(c.shape, np.uint8) for c in data.embodiment.cameras}
    seen = Observation(images, store.state(number)[0], store.episodes[number].instruction)
    batch = stack([codec.encode(seen)]).to(device)

    @torch.no_grad()
    def actions() -> Tensor:
        policy.eval()
        answer = policy.act(batch, sample_rng([(0, 0)], seed=0, stream=VALIDATION))
        policy.train()
        return answer

    return actions


def merge_error(folder: Path, data: Data, device: torch.device) -> float:
    """Return the largest change of an action that merging makes to the adapted checkpoint `folder`."""
    policy, codec, _, _ = checkpoints.load(folder, device=device)
    assert codec is not None
    actions = probe(policy, codec, data, device)
    before = actions()
    merge(policy)
    return float((actions() - before).abs().max())


def _from_checkpoint(recipe: Recipe, data: Data, generator: torch.Generator) -> InitialPolicy:
    place, chosen = checkpoints.place(recipe.policy.checkpoint), recipe.policy
    path = place.path
    foreign = not (path / "policy.json").is_file()
    use_statistics = chosen.assets or recipe.data.statistics == "checkpoint"
    needs_tokenizer = foreign and use_statistics and (chosen.assets or checkpoints.wants_tokenizer(path))
    tokenizer = shipped.find("tokenizer", chosen.tokenizer) if chosen.tokenizer and needs_tokenizer else None
    policy, codec, plan, report = checkpoints.load(
        path,
        config=chosen.config or None,
        tokenizer=tokenizer,
        assets=chosen.assets or None,
        fresh=chosen.fresh,
        resize=chosen.resize,
        generator=generator,
        trust=chosen.trust,
    )
    digest = checkpoints.digest(path)
    options = checkpoints.parse_config(chosen.config).to_read_again() if foreign else {}
    base: checkpoints.Base | None = checkpoints.Base(place.name, digest, options)
    warnings: tuple[str, ...] = ()
    if plan is not None and (plan.adapted or plan.quantised):
        merge(policy)
        base = None  # no file holds the merged weights
        layers = "adapters" if plan.adapted else "quantised layers"
        warnings = (
            f"the {layers} of {recipe.policy.checkpoint} were merged into its weights before training",
        )
    if codec is not None and not foreign:
        _require_effect(recipe, codec, path)
    if codec is None and foreign and policy.needs().vocabulary:
        _require_tokenizer(chosen)
    robot, before = codec.embodiment if codec is not None and codec.embodiment.hz else None, codec
    if codec is not None and not codec.embodiment.hz and recipe.data.statistics == "checkpoint":
        codec = _declare_robot(codec, data)
    elif codec is None or recipe.data.statistics == "data":
        codec = _fit_codec(recipe, policy, data, codec)
    return InitialPolicy(
        policy,
        codec,
        "\n".join(
            [report.text(), *([f"note: {place.note}"] if place.note else []), *_camera_slots(before, codec)]
        ),
        checkpoints.read_lineage(path).followed_by(digest, data.learned, data.seeds()),
        f"checkpoint {path}",
        robot=robot,
        base=base,
        changed=frozenset((*report.fresh, *report.resized)),
        warnings=warnings,
    )


def _require_tokenizer(recipe: PolicyRecipe) -> None:
    """Raise ConfigError if a new tokenizer would be trained for pretrained word embeddings."""
    if not recipe.tokenizer and "language" not in recipe.fresh:
        raise ConfigError(
            f"checkpoint {recipe.checkpoint} comes without a tokenizer, and its word embeddings only fit the "
            "one that it was trained with: set policy.tokenizer to that tokenizer's folder, or train new "
            'embeddings with policy.fresh = ["language"]'
        )


def _require_effect(recipe: Recipe, codec: Codec, base: Path) -> None:
    """Raise ConfigError for fields that the codec of the checkpoint `base` would silently override."""
    if recipe.policy.tokenizer:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} has no effect: the weights of checkpoint {base} "
            "only "
            'work with their own tokenizer; set policy.tokenizer = ""'
        )
    requested, used = recipe.data.normalisation, codec.config.normalisation
    if requested not in ("", used) and recipe.data.statistics == "checkpoint":
        raise ConfigError(
            f"data.normalisation {requested!r} has no effect with the statistics of checkpoint {base}, which "
            f'normalises by {used!r}; set it to "", or fit new statistics: data.statistics = "data"'
        )


def _declare_robot(codec: Codec, data: Data) -> Codec:
    """Return the codec, whose file names no robot, with the robot of the data and its own statistics.

    The card's cameras fill the camera slots in order, and the card decides which actions are relative.
    """
    slots = len(codec.config.cameras)
    names = [camera.name for camera in data.embodiment.cameras]
    if len(names) > slots:
        raise EmbodimentError(
            f"the checkpoint has {slots} camera slots, but the dataset has {len(names)} cameras "
            f"({', '.join(names)}); declare fewer cameras in the card"
        )
    cameras = tuple(names + [""] * (slots - len(names)))
    config = replace(codec.config, cameras=cameras, relative=data.cards[0].robot.relative)
    try:
        return Codec(config, data.embodiment, codec.statistics, codec.tokenizer)
    except CodecError as error:
        raise EmbodimentError(
            f"{error}\nThe checkpoint's statistics do not fit this robot: fit new ones with"
            ' data.statistics = "data".'
        ) from error


def _camera_slots(before: Codec | None, after: Codec) -> list[str]:
    """Return a line of the load report about changed cameras."""
    own = ", ".join(name or "(none)" for name in after.config.cameras)
    if before is None:
        return [f"adapted: cameras {own}"]
    if before.config.cameras == after.config.cameras:
        return []
    old = ", ".join(name or "(none)" for name in before.config.cameras)
    return [f"adapted: cameras {own}, in the checkpoint {old}"]


def _from_scratch(recipe: PolicyRecipe, generator: torch.Generator) -> Policy:
    if not recipe.family:
        raise ConfigError("policy: give either `checkpoint` or `family` (with `size` or `config`)")
    return build_family(recipe.family, recipe.size, recipe.config, generator)


def _fit_codec(recipe: Recipe, policy: Policy, data: Data, old: Codec | None) -> Codec:
    """Fit a codec to the training episodes; the codec `old`, if any, provides the tokenizer."""
    needs = policy.needs()
    if recipe.policy.tokenizer and needs.prompt is None:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} has no effect: the policy reads no instruction; "
            'make it ""'
        )
    tokenizer = old.tokenizer if old is not None else _tokenizer(recipe.policy.tokenizer, data, needs)
    config = CodecConfig(
        cameras=tuple(camera.name for camera in data.embodiment.cameras),
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=recipe.data.normalisation or (old.config.normalisation if old else "mean_std"),
        relative=data.cards[0].robot.relative,
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        framing=needs.framing,
        history=needs.history,
    )
    if old is not None:  # images and prompts keep the checkpoint's form, too
        kept = old.config
        config = replace(
            config,
            mask_padding=kept.mask_padding,
            prompt=kept.prompt,
            framing=kept.framing,
            special_tokens=kept.special_tokens,
        )
        if set(filter(None, old.config.cameras)) == set(config.cameras):
            config = replace(config, cameras=old.config.cameras)  # the same slots
    states, windows = blocks_for_statistics(data.stores, data.training, config.chunk, config.relative)
    try:
        return Codec.fit(config, data.embodiment, states, windows, tokenizer)
    except CodecError as error:
        raise CodecError(f"card {data.cards[0].name!r} does not fit the policy: {error}") from error


def _tokenizer(name: str, data: Data, needs: Needs) -> Tokenizer | None:
    if needs.prompt is None:
        return None
    if name:
        return load_tokenizer(shipped.find("tokenizer", name))
    words = [*data.instructions(), *prompts.vocabulary(needs.prompt)]
    return train_word_tokenizer(words, needs.vocabulary)
