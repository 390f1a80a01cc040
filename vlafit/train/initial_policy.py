"""What a run begins with: a checkpoint, fresh weights, or the last step of the run itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlafit import checkpoints, shipped
from vlafit.codec import Codec, CodecConfig, prompts
from vlafit.codec.tokenizer import Tokenizer, train_word_tokenizer
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.datasets import arrays_for_statistics
from vlafit.errors import CodecError, ConfigError, EmbodimentError
from vlafit.nn.batch import stack
from vlafit.nn.policy import Needs, Policy
from vlafit.policies import build_family
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train.noise import VALIDATION, noise_and_time
from vlafit.tuning import Plan
from vlafit.tuning.merge import merge
from vlafit.types import Embodiment, Observation

if TYPE_CHECKING:
    from vlafit.train.experiment import Data


@dataclass(frozen=True)
class Start:
    """A policy, and what is known of it."""

    policy: Policy
    codec: Codec
    report: str
    history: checkpoints.Lineage
    source: str
    """What to call it in messages."""
    plan: Plan | None = None
    """Of a run that goes on, its adapters in place; None: the strategy is still to be applied."""
    learned: Embodiment | None = None
    """The robot that the checkpoint knows; None: that of its codec."""
    base: checkpoints.Base | None = None
    anew: frozenset[str] = frozenset()
    """Weights that are not the checkpoint's as they are."""
    notices: tuple[str, ...] = ()


def resume(folder: Path) -> Start:
    """Load the checkpoint of a run that goes on. Raises as `checkpoints.load` does."""
    policy, codec, plan, report = checkpoints.load(folder)
    assert codec is not None and plan is not None  # the trainer saves both
    below = checkpoints.read_base(folder)
    anew = frozenset(checkpoints.names_on_base(folder)) if below else frozenset()
    return Start(
        policy,
        codec,
        report.text(),
        checkpoints.read_lineage(folder),
        f"checkpoint {folder}",
        plan,
        base=below,
        anew=anew,
    )


def begin(recipe: Recipe, data: "Data") -> Start:
    """Make what the recipe starts from, its codec fitted where the checkpoint has none that is wanted.

    Raises what `checkpoints.load` raises, and ConfigError for fields that mean nothing together.
    """
    generator = torch.Generator().manual_seed(recipe.train.seed)
    if recipe.policy.checkpoint:
        return _from_checkpoint(recipe, data, generator)
    policy = _from_scratch(recipe.policy, generator)
    history = checkpoints.Lineage().followed_by("", data.learned, data.seeds())
    codec = _fit_codec(recipe, policy, data, None)
    return Start(policy, codec, "all weights are fresh", history, "the policy")


def probe(policy: Policy, codec: Codec, data: "Data", device: torch.device) -> Callable[[], Tensor]:
    """Return a function that computes the policy's velocity [1, t, a] for the first training frame."""
    store, ids = next((s, i) for s, i in zip(data.stores, data.training, strict=True) if i)
    number = store.index(ids[0])
    images = {c.name: np.zeros(c.shape, np.uint8) for c in data.embodiment.cameras}
    seen = Observation(images, store.state(number)[0], store.episodes[number].instruction)
    batch = stack([codec.encode(seen)])
    c = policy.config
    noise, time = noise_and_time(
        [(0, 0)], seed=0, draws=1, chunk=c.chunk, action_dim=c.action_dim, stream=VALIDATION
    )
    actions = torch.zeros(1, c.chunk, c.action_dim)
    batch = replace(batch, actions=actions, action_mask=torch.ones_like(actions, dtype=torch.bool)).to(device)

    @torch.no_grad()
    def velocity() -> Tensor:
        policy.eval()
        answer = policy.velocity(batch, noise[0].to(device), time[0].to(device))
        policy.train()
        return answer

    return velocity


def merge_error(folder: Path, data: "Data", device: torch.device) -> float:
    """Return the largest change of the velocity that merging makes to the adapted checkpoint `folder`."""
    policy, codec, _, _ = checkpoints.load(folder, device=device)
    assert codec is not None
    velocity = probe(policy, codec, data, device)
    before = velocity()
    merge(policy)
    return float((velocity() - before).abs().max())


def _from_checkpoint(recipe: Recipe, data: "Data", generator: torch.Generator) -> Start:
    place, chosen = checkpoints.place(recipe.policy.checkpoint), recipe.policy
    path = place.path
    own = chosen.assets or recipe.data.statistics == "checkpoint"  # whether its statistics are asked for
    foreign = not (path / "policy.json").is_file()
    own = own and (chosen.assets or checkpoints.wants_tokenizer(path))
    words = shipped.find("tokenizer", chosen.tokenizer) if chosen.tokenizer and foreign and own else None
    policy, codec, plan, report = checkpoints.load(
        path,
        config=chosen.config or None,
        tokenizer=words,
        assets=chosen.assets or None,
        fresh=chosen.fresh,
        resize=chosen.resize,
        generator=generator,
    )
    digest = checkpoints.digest(path)
    again = checkpoints.parse_config(chosen.config).to_read_again() if foreign else {}
    base: checkpoints.Base | None = checkpoints.Base(place.name, digest, again)
    notices: tuple[str, ...] = ()
    if plan is not None and (plan.adapted or plan.quantised):
        merge(policy)
        base = None  # what training begins with lies nowhere as a file
        what = "adapters" if plan.adapted else "quantised layers"
        notices = (f"the {what} of {recipe.policy.checkpoint} were merged into its weights before training",)
    if codec is not None and not foreign:
        _require_meaning(recipe, codec, path)
    learned, before = codec.embodiment if codec is not None and codec.embodiment.hz else None, codec
    if codec is not None and not codec.embodiment.hz and recipe.data.statistics == "checkpoint":
        codec = _declare_robot(codec, data)
    elif codec is None or recipe.data.statistics == "data":
        codec = _fit_codec(recipe, policy, data, codec)
    return Start(
        policy,
        codec,
        "\n".join([report.text(), *([f"note: {place.note}"] if place.note else []), *_slots(before, codec)]),
        checkpoints.read_lineage(path).followed_by(digest, data.learned, data.seeds()),
        f"checkpoint {path}",
        learned=learned,
        base=base,
        anew=frozenset((*report.fresh, *report.resized)),
        notices=notices,
    )


def _require_meaning(recipe: Recipe, codec: Codec, base: Path) -> None:
    """Refuse fields that the codec of the checkpoint `base` would silently overrule."""
    if recipe.policy.tokenizer:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} means nothing beside checkpoint {base}, whose "
            'weights know their own tokenizer alone; make it ""'
        )
    given, used = recipe.data.normalisation, codec.config.normalisation
    if given not in ("", used) and recipe.data.statistics == "checkpoint":
        raise ConfigError(
            f"data.normalisation {given!r} means nothing with the statistics of checkpoint {base}, which "
            f'normalises by {used!r}; make it "", or fit statistics anew: data.statistics = "data"'
        )


def _declare_robot(codec: Codec, data: "Data") -> Codec:
    """Return a codec whose file told no robot as that of the data's, with its own statistics.

    The card's cameras fill the slots in their order, and the card says which actions are relative.
    """
    slots = len(codec.config.cameras)
    names = [camera.name for camera in data.embodiment.cameras]
    if len(names) > slots:
        raise EmbodimentError(
            f"the checkpoint has {slots} camera slots, the dataset {len(names)} cameras ({', '.join(names)}):"
            " declare fewer in the card"
        )
    cameras = tuple(names + [""] * (slots - len(names)))
    config = replace(codec.config, cameras=cameras, relative=data.cards[0].robot.relative)
    try:
        return Codec(config, data.embodiment, codec.statistics, codec.tokenizer)
    except CodecError as error:
        raise EmbodimentError(
            f"{error}\nThe checkpoint's statistics are not those of this robot: fit them anew with"
            ' data.statistics = "data".'
        ) from error


def _slots(before: Codec | None, after: Codec) -> list[str]:
    """Say in a load report's words how the cameras changed."""
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


def _fit_codec(recipe: Recipe, policy: Policy, data: "Data", old: Codec | None) -> Codec:
    """Fit a codec to the training episodes; the tokenizer is that of the codec `old` if there is one."""
    needs = policy.needs()
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
    )
    if old is not None:  # how the checkpoint was shown images and asked stays, too
        kept = old.config
        config = replace(
            config,
            mask_padding=kept.mask_padding,
            prompt=kept.prompt,
            framing=kept.framing,
            special_tokens=kept.special_tokens,
        )
        if set(filter(None, old.config.cameras)) == set(config.cameras):
            config = replace(config, cameras=old.config.cameras)  # their slots stay
    states, windows = [], []
    for store, ids in zip(data.stores, data.training, strict=True):
        if ids:
            columns = arrays_for_statistics(store, ids, config.chunk, config.relative)
            states.append(columns[0])
            windows.append(columns[1])
    try:
        return Codec.fit(config, data.embodiment, states, windows, tokenizer)
    except CodecError as error:
        raise CodecError(f"card {data.cards[0].name!r} and the policy do not fit: {error}") from error


def _tokenizer(name: str, data: "Data", needs: Needs) -> Tokenizer:
    if name:
        return load_tokenizer(shipped.find("tokenizer", name))
    words = [*data.instructions(), *prompts.vocabulary(needs.prompt)]
    return train_word_tokenizer(words, needs.vocabulary)
