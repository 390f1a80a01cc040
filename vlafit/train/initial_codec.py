"""Fit a run's codecs to its data, or adopt those of the checkpoint."""

from dataclasses import replace

from vlafit import checkpoints
from vlafit.agreement import Agreement, same_actions
from vlafit.codec import Codec, CodecConfig, CodecSet
from vlafit.codec.codec_config import columns_of
from vlafit.codec.fast import FastTokenizer
from vlafit.codec.normaliser import FLOORED, OPENVLA, Normalisation
from vlafit.codec.tokenizer import Tokenizer
from vlafit.datasets import value_faults
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.policy import Needs, Policy
from vlafit.recipe import Recipe
from vlafit.train import action_layout, reconcile
from vlafit.train import action_tokenizer as action_tokenizers
from vlafit.train import tokenizer as tokenizers
from vlafit.train.data import Data
from vlafit.train.data_statistics import statistics_for
from vlafit.types import Embodiment


def fit_codec(
    recipe: Recipe,
    policy: Policy,
    data: Data,
    old: Codec | None,
    agreement: Agreement,
    tokenizer: Tokenizer | None,
    form: checkpoints.InputForm | None = None,
    action_tokenizer: FastTokenizer | None = None,
) -> Codec:
    """Fit a codec to the training episodes; the codec `old`, if any, provides tokenizer and forms.

    `form` is that of the checkpoint's program, where it has no codec.
    """
    if recipe.policy.tokenizer and policy.needs().prompt is None:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} has no effect: the policy reads no instruction; "
            'make it ""'
        )
    config = in_squares(fitted_config(recipe, policy, old, agreement, form), data.embodiment)
    try:
        columns = columns_of(config, data.embodiment)
        if len(config.unchanged) != columns.action_dimensions:  # a mask of another robot's grippers
            config = replace(config, unchanged=())
        statistics = statistics_for(data, config)
        number = None if old is None else old.embodiment_id
        words = tokenizer if old is None else old.tokenizer
        return Codec(config, data.embodiment, statistics, words, number, action_tokenizer)
    except CodecError as error:
        raise CodecError(f"card {data.cards[0].name!r} does not fit the policy: {error}") from error


def fitted_config(
    recipe: Recipe,
    policy: Policy,
    old: Codec | None,
    agreement: Agreement,
    form: checkpoints.InputForm | None = None,
) -> CodecConfig:
    """Return the config of a codec that is fitted to the data; the arguments are those of `fit_codec`."""
    needs, chosen = policy.needs(), recipe.data.normalisation
    config = CodecConfig(
        cameras=agreement.cameras,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=chosen or needs.normalisation,
        relative=agreement.relative,
        state_form=agreement.forms.state,
        action_form=agreement.forms.action,
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        framing=needs.framing,
        history=needs.history,
        action_tokens=action_tokenizers.settings(needs),
        action_bins=action_tokenizers.bins(needs),
    )
    declared = form if needs.prompt is not None else None
    inputs = old.config if old is not None else declared
    if inputs is not None:  # images and prompts keep the checkpoint's form
        config = replace(
            config,
            prompt=inputs.prompt,
            framing=inputs.framing,
            crop=inputs.crop,
            letter_box=inputs.letter_box,
            special_tokens=inputs.special_tokens,
        )
    if declared is not None and old is None and not chosen:
        stated = (
            declared.normalisation or config.normalisation,
            declared.action_normalisation or config.of_actions,
        )
        config = _normalised(config, *stated)
    if old is not None:
        kept = old.config
        config = replace(
            config,
            mask_padding=kept.mask_padding,
            action_tokens=action_tokenizers.settings(needs, kept.action_tokens),
        )
        if not chosen:
            config = _normalised(config, kept.normalisation, kept.of_actions)
        if config.of_actions in OPENVLA:
            config = replace(config, unchanged=kept.unchanged)
    return config


def _normalised(config: CodecConfig, states: Normalisation, actions: Normalisation) -> CodecConfig:
    """Return the config with a checkpoint's normalisations, as fitted statistics repeat them.

    Another program's formula has no floor for dimensions that hardly ever move.
    """
    states, actions = FLOORED.get(states, states), FLOORED.get(actions, actions)
    return replace(config, normalisation=states, action_normalisation=actions if actions != states else None)


def in_squares(config: CodecConfig, robot: Embodiment) -> CodecConfig:
    """Return the config with a letter box where frames are no squares and the framing does not squeeze them.

    NVIDIA's program keeps their aspect and makes wider images of them; a GR00T takes squares here.
    """
    shapes = [robot.camera(name).shape for name in config.cameras if name]
    wide = config.framing == "nvidia_area" and any(height != width for height, width, _ in shapes)
    return replace(config, letter_box=True) if wide else config


def adopt(codec: Codec, data: Data, agreement: Agreement) -> Codec:
    """Return the checkpoint's codec with its statistics, for the robot and cameras that were agreed on."""
    same_mask = same_actions(codec.config.relative, agreement.relative)
    if codec.embodiment.hz and not agreement.chosen and same_mask:
        return codec
    relative = codec.config.relative if same_mask else agreement.relative
    config = replace(codec.config, cameras=agreement.cameras, relative=relative)
    return codec.with_changes(config=config, embodiment=data.embodiment)


def renamed(codec: Codec, embodiment: str, before: CodecSet | None) -> Codec:
    """Return the codec under the name that the recipe gives the embodiment, with the checkpoint's number.

    A new embodiment has none yet; see `embodiment_numbers`.
    """
    robot, number = replace(codec.embodiment, name=embodiment), None
    if before is not None and embodiment in before:
        number = before[embodiment].embodiment_id
    made = (codec.config, robot, codec.statistics, codec.tokenizer, number, codec.action_tokenizer)
    return Codec(*made, codec.origin)


def with_codec(
    agreement: Agreement,
    recipe: Recipe,
    data: Data,
    embodiment: str,
    before: Codec | None,
    codec: Codec,
    tokenizer: str,
    own_chunk: int | None = None,
    owner: str = "the checkpoint",
    *,
    needs: Needs,
    tokens: action_tokenizers.Origin,
    declared: checkpoints.Declaration | None = None,
) -> Agreement:
    """Return the agreement with the codec's items, and how far the data goes under its statistics.

    The arguments are those of `reconcile.codec_items`; `needs` are the policy's, and
    `tokens` says where an action tokenizer comes from.
    """
    part, recipe = data.of(embodiment), recipe.of(embodiment)
    text = codec.action_text
    actions = None if text is None else tokens.item(text)
    values = list(
        value_faults.of_run(
            part.stores,
            part.training,
            part.validation,
            codec,
            reconcile.outside(recipe, agreement),
            recipe.fits_statistics,
        )
    )
    answers, start = needs.writes_tokens, recipe.policy.checkpoint
    items = reconcile.codec_items(
        recipe, part, before, codec, tokenizer, own_chunk, owner, answers, actions, declared, needs.vocabulary
    )
    layout = action_layout.items(needs.action_layout, codec, start)
    whole = agreement.with_items([*reconcile.other_cards(part.cards), *items, *layout, *values])
    of_values = {item.name for item in values}
    only_values = all(item.name in of_values for item in whole.conflicts)
    if len(data.names) > 1:
        whole = whole.for_embodiment(embodiment)
    both = "the dataset and the statistics in use"
    whole.require(both if only_values else reconcile.sides(part.cards, recipe.policy.checkpoint))
    return whole


def learned_tokenizer(recipe: Recipe, policy: Policy, data: Data) -> Tokenizer | None:
    """Return a tokenizer of the instructions of all datasets; None if the policy reads none."""
    needs = policy.needs()
    if recipe.policy.tokenizer or needs.prompt is None:
        return None
    return tokenizers.learn(data, needs)


def camera_slots(before: Codec | None, after: Codec) -> list[str]:
    """Return a line of the load report about changed cameras."""
    own = ", ".join(name or "(none)" for name in after.config.cameras)
    if before is None:
        return [f"adapted: cameras {own}"]
    if before.config.cameras == after.config.cameras:
        return []
    old = ", ".join(name or "(none)" for name in before.config.cameras)
    return [f"adapted: cameras {own}, in the checkpoint {old}"]


def floors(recipe: Recipe, before: Codec | None, codec: Codec) -> list[str]:
    """Return a line of the load report about a normalisation that fitted statistics do not repeat."""
    old, new = before and before.config.normalisation, codec.config.normalisation
    if not old or old == new or recipe.data.normalisation:
        return []
    return [f"adapted: fitted statistics normalise by {new}, which has a floor; in the checkpoint {old}"]
