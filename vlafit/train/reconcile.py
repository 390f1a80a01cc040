"""Collect what data, checkpoint and recipe say about the robot, and agree on what the codec is built from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlafit import checkpoints
from vlafit.agreement import INVALID, Agreement, Forms, Item, Party, agree, join, propose, shared_slots
from vlafit.agreement.columns import by_number
from vlafit.codec import Codec, CodecSet
from vlafit.codec.action_bins import BINS
from vlafit.datasets import Card, camera_keys, value_faults
from vlafit.datasets.order import BLOCK, shares
from vlafit.errors import ConfigError
from vlafit.nn.policy import Needs
from vlafit.recipe import Recipe
from vlafit.train import action_layout, action_tokenizer, data_statistics, readings
from vlafit.train.data import Data, open_data
from vlafit.train.prompts import require_prompts
from vlafit.train.tokenizer import SMALLEST_SHARE


def dataset_party(card: Card) -> Party:
    """Return what a data card says."""
    relative, keys = tuple(card.robot.relative), camera_keys.keys_of(card)
    forms = Forms(card.robot.state.form, card.robot.action.form)
    return Party("dataset", card.name, card.embodiment, relative, keys=keys, forms=forms)


def checkpoint_party(
    name: str, codec: Codec | None, declared: checkpoints.Declaration, recipe: Recipe
) -> Party | None:
    """Return what a checkpoint says: its codec, else its files; None where neither says anything.

    openpi's own files do not tell whether actions are relative; `policy.config."codec.relative"` then speaks
    for them, or an agreement.json beside them.
    """
    embodiment = codec.embodiment if codec is not None else declared.embodiment
    slots = codec.config.cameras if codec is not None else declared.slots
    relative = declared.relative
    if not declared.says_relative:
        table = checkpoints.parse_config(recipe.policy.config).table("codec")
        relative = tuple(map(bool, table["relative"])) if table.get("relative") else declared.relative
    elif codec is not None:
        relative = codec.config.relative
    forms = None
    if codec is not None and (declared.says_relative or not recipe.fits_statistics):
        forms = Forms(codec.config.state_form, codec.config.action_form)
    if embodiment is None and not slots and relative is None and not declared.conversions:
        return None
    return Party(
        "checkpoint",
        name,
        embodiment,
        relative,
        slots=slots,
        frame_sizes_known=declared.says_frame_sizes,
        room=None if codec is None else (codec.config.state_dim, codec.config.action_dim),
        conversions=declared.conversions,
        relative_inside=declared.relative_inside,
        forms=forms,
    )


def agree_on(
    recipe: Recipe,
    card: Card,
    codec: Codec | None,
    declared: checkpoints.Declaration | None,
    slots: Sequence[str] = (),
) -> Agreement:
    """Compare the card with the recipe's checkpoint, if it has one (`declared`). Conflicts are not raised.

    `slots` are the camera slots of a run on several embodiments, where the checkpoint names none.
    """
    dataset, checkpoint = dataset_party(card), None
    if declared is not None:
        checkpoint = checkpoint_party(recipe.policy.checkpoint, codec, declared, recipe)
    agreement = agree(dataset, checkpoint, recipe.adapt, fresh_statistics=recipe.fits_statistics, slots=slots)
    if agreement.conflicts and checkpoint is not None and dataset.embodiment is not None:
        recorded = [camera.name for camera in dataset.embodiment.cameras]
        pairs = propose(checkpoint.slots, recorded, recipe.adapt.cameras)
        sources, learned = {s: name or "" for s, name in pairs.items()}, readings.learned_by(declared, codec)
        made = [readings.frames(recipe, (card,), learned, checkpoint.slots, sources, "")]
        made += readings.items(recipe, (card,), learned, codec)
        agreement = agreement.with_items(
            [one for one in made if one.status == "conflict"]
        )  # all in one error
    return agreement.with_items(
        [
            Item(
                f"{one.name} in the checkpoint's files",
                {"checkpoint": one.stated},
                one.used,
                "differs",
                one.reason,
            )
            for one in (declared.overruled if declared else ())
        ]
    )


def other_cards(cards: Sequence[Card]) -> Iterator[Item]:
    """Yield what further cards leave unsaid of the robot that the first describes.

    What cards say differently is refused when they are opened.
    """
    first, *others = cards
    for card in others:
        pairs = (
            ("state", first.robot.state, card.robot.state),
            ("action", first.robot.action, card.robot.action),
        )
        for column, mine, other in pairs:
            for what, here, there in (
                ("names", ", ".join(mine.labels), ", ".join(other.labels)),
                ("unit", mine.unit, other.unit),
            ):
                if bool(here) != bool(there):
                    silent = card.name if here else first.name
                    stated = [
                        f"{one.name}: {text or 'not stated'}" for one, text in ((first, here), (card, there))
                    ]
                    reason = f"card {silent} does not say: taken to be the same"
                    sides = {"dataset": "; ".join(stated)}
                    yield Item(f"{column} {what} of {card.name}", sides, here or there, "assumed", reason)


def codecs_before(recipe: Recipe, data: Data, own: CodecSet | None, checkpoint: Path) -> dict[str, Codec]:
    """Return the checkpoint's codec that each embodiment of the data is compared with; none if it has none.

    It is that of the same name, if the recipe names embodiments, else `policy.embodiment`, or the only one.
    Raises ConfigError where none is named of several, or `policy.embodiment` has no effect.
    """
    chosen = recipe.policy.embodiment
    if own is None:
        if chosen:
            raise ConfigError(f"policy.embodiment {chosen!r} has no effect: {checkpoint} has no codec")
        return {}
    unknown = [name for name in data.names if not data.embodiments or name not in own]
    if chosen and not unknown:
        raise ConfigError(
            f"policy.embodiment {chosen!r} has no effect: the checkpoint has every embodiment of the data "
            f"({', '.join(data.names)}); remove it"
        )
    option = (
        'policy.embodiment = "NAME"; or name the embodiment of each card as the checkpoint does: '
        "data.embodiments"
    )
    other = own.choose(chosen, where=str(checkpoint), option=option) if unknown else None
    pairs = {name: other if name in unknown else own[name] for name in data.names}
    return {name: codec for name, codec in pairs.items() if codec is not None}


def agree_on_parts(
    recipe: Recipe,
    data: Data,
    before: Mapping[str, Codec],
    declared: checkpoints.Declaration | None,
) -> dict[str, Agreement]:
    """Return the agreement of each embodiment of the data with the recipe's checkpoint, if it has one.

    `before` is the checkpoint's codec for each. Raises EmbodimentError for the conflicts of an embodiment,
    and ConfigError for an `adapt.embodiments` that names none of them.
    """
    parts = data.parts()
    for name in recipe.adapt.embodiments:
        if name not in parts or not data.embodiments:
            listed = ", ".join(data.embodiments.values()) or "none; for one robot, use [adapt]"
            raise ConfigError(f"adapt.embodiments.{name} has no effect: data.embodiments names {listed}")
    slots: Sequence[str] = ()
    if len(parts) > 1 and not before and not (declared and declared.slots):
        slots = shared_slots({name: (p.embodiment, recipe.adapt.of(name)) for name, p in parts.items()})
    agreements = {}
    for name, part in parts.items():
        card = part.cards[0]
        agreement = agree_on(recipe.of(name), card, before.get(name), declared, slots)
        if len(parts) > 1:
            agreement = agreement.for_embodiment(name)
        if recipe.policy.checkpoint:
            agreement.require(sides([card], recipe.policy.checkpoint))
        else:
            agreement.require()
        agreements[name] = agreement
    return agreements


def joined(recipe: Recipe, data: Data, agreements: Mapping[str, Agreement]) -> Agreement:
    """Return the agreement of a run: that of its embodiments, and the share of each dataset."""
    whole, asked, before = join(agreements), dict[str, str](), list[Card]()
    for name, part in data.parts().items():
        texts = camera_keys.across(part.cards, before)
        asked |= {f"{name}: {camera_keys.TITLE}{camera}": text for camera, text in texts.items()}
        before += part.cards
    items = [
        replace(item, status="differs", reason=f"embodiments differ: {asked[item.name]}")
        if item.name in asked
        else item
        for item in whole.items
    ]
    return replace(whole, items=tuple(items)).with_items([*_weights(recipe, data)])


def _weights(recipe: Recipe, data: Data) -> Iterator[Item]:
    if not data.weights:
        return
    samples = recipe.train.steps * recipe.train.samples
    every = shares([*data.weights, *(one.weight for one in data.vision_language)])
    for store, ids, share in zip(data.stores, data.training, every[: len(data.stores)], strict=True):
        steps = sum(store.episodes[store.index(i)].length for i in ids)
        seen = share / BLOCK * samples / steps
        yield Item(
            f"weight of {store.card.name}",
            {"dataset": f"{steps} steps in {len(ids)} training episodes"},
            f"{share / BLOCK:.4g} of the samples, {seen:.3g} epochs",
            "chosen",
            "data.weights",
        )


def outlook(
    recipe: Recipe,
    codec: Codec,
    agreement: Agreement,
    needs: Needs,
    own_chunk: int | None,
    owner: str,
    declared: checkpoints.Declaration,
) -> Agreement:
    """Return the agreement with what training on the recipe's data would add, as a checkpoint's codec has it.

    `needs` are those of the policy, `own_chunk` that of the checkpoint's files, `owner` whose codec it is,
    `declared` what its files say. The dataset is opened: files that are not what the card says are a
    DataError. Nothing is fitted.
    """
    codec = codec.with_changes(config=replace(codec.config, chunk=needs.chunk))
    data = open_data(recipe.data, recipe.train.seed)
    if agreement.conflicts:
        return agreement
    require_prompts((store, codec) for store in data.stores)
    text, given = codec.action_text, recipe.policy.tokenizer
    words = f"policy.tokenizer {given!r}" if given else tokenizer_of(owner)
    tokens = None if text is None else action_tokenizer.Origin(kept=True).item(text)
    items = [
        *other_cards(data.cards),
        *codec_items(
            recipe,
            data,
            codec,
            codec,
            words,
            own_chunk,
            owner,
            action_tokens=tokens,
            declared=declared,
            rows=needs.vocabulary,
        ),
        *action_layout.items(needs.action_layout, codec, recipe.policy.checkpoint),
    ]
    return agreement.with_items(
        [
            *items,
            *value_faults.of_run(
                data.stores, data.training, data.validation, codec, outside(recipe, agreement), False
            ),
        ]
    )


def outside(recipe: Recipe, agreement: Agreement) -> tuple[str, ...]:
    """Return `adapt.outside` with names that only the checkpoint gives its dimensions as numbers."""
    named = {
        column: item.sides["checkpoint"].split(", ")
        for item in agreement.items
        for column in ("state", "action")
        if item.name == f"{column} names" and set(item.sides) == {"checkpoint"}
    }
    return by_number(recipe.adapt.outside, named)


def sides(cards: Sequence[Card], checkpoint: str) -> str:
    """Return the sides of an agreement, for the first line of an error; `checkpoint` may be empty."""
    names = ", ".join(repr(card.name) for card in cards)
    other = f"checkpoint {checkpoint!r}" if checkpoint else "the recipe" if len(cards) == 1 else ""
    return " and ".join(filter(None, (f"card{'s' * (len(cards) > 1)} {names}", other)))


def codec_items(
    recipe: Recipe,
    data: Data,
    before: Codec | None,
    codec: Codec,
    tokenizer: str,
    own_chunk: int | None = None,
    owner: str = "the checkpoint",
    answers: bool = False,
    action_tokens: Item | None = None,
    declared: checkpoints.Declaration | None = None,
    rows: int = 0,
) -> Iterator[Item]:
    """Return what holds for statistics, normalisation, prompt, tokenizer and chunk, and why.

    `before` is the checkpoint's codec and `owner` whose files give it, `tokenizer` where the tokenizer comes
    from, `own_chunk` the steps of a chunk in the checkpoint's files, `answers` whether the policy answers
    with tokens; `action_tokens` is the item of those, `declared` what the checkpoint's files say, None
    without a checkpoint, and `rows` how many its embedding has.
    """
    form = declared.form if declared is not None else None
    episodes = sum(len(ids) for ids in data.training)
    text = f"fitted to {episodes} training episodes"
    if recipe.data.statistics == "file":
        text = data_statistics.described(data, codec)
        yield Item("statistics", {"dataset": text}, "of the dataset's file", "chosen", data_statistics.CHOICE)
    elif (other := data.described_by) is not None:
        text = f"fitted to all {len(other.episodes)} episodes of {other.card.name!r}"
        yield Item(
            "statistics", {"dataset": text}, f"of {other.card.name!r}", "chosen", "data.statistics_from"
        )
    elif recipe.fits_statistics:
        status, reason = ("chosen", 'data.statistics = "data"') if declared else ("same", "no checkpoint")
        yield Item("statistics", {"dataset": text}, "of the dataset", status, reason)
    else:
        assert before is not None
        own = f"of {before.embodiment.name!r}, {before.statistics['state'].count or '?'} values"
        value, status, reason = f"of {owner}", "same", 'data.statistics = "checkpoint"'
        if recipe.policy.assets:
            value, status = f"{recipe.policy.assets} {value}", "chosen"
            reason = f'policy.assets = "{recipe.policy.assets}", {reason}'
        yield Item("statistics", {"checkpoint": own}, value, status, reason)
    states, actions = (form.normalisation, form.action_normalisation) if form is not None else (None, None)
    if before is not None:
        states, actions = before.config.normalisation, before.config.of_actions
    for column, method, old in (
        ("state", codec.config.normalisation, states),
        ("action", codec.config.of_actions, actions),
    ):
        stated = {"checkpoint": old} if old else {}
        reason = ""
        if old and old != method:
            chosen = bool(recipe.data.normalisation)
            reason = "data.normalisation" if chosen else "fitted statistics are divided by a floor"
        yield Item(f"{column} normalisation", stated, method, "chosen" if reason else "same", reason)
    slots = codec.config.cameras if before is None else before.config.cameras
    pairs = dict(zip(slots, codec.config.cameras, strict=False))  # a new camera takes no slot of the old
    size = codec.config.image_size
    padded = ", padded to squares (letter box)" if codec.config.letter_box else ""
    framed = f"{size}x{size}, framed as {codec.config.framing}{padded}"
    learned = readings.learned_by(declared, before)
    yield readings.frames(recipe, data.cards, learned, slots, pairs, framed)
    yield from readings.items(recipe, data.cards, learned, before)
    if codec.config.prompt is not None:
        prompt = f"{codec.config.prompt}, at most {codec.config.max_tokens} tokens"
        old = before.config.prompt if before is not None else None
        yield Item("prompt", {"checkpoint": old} if old else {}, prompt, "same")
        yield _tokenizer(codec, tokenizer, declared, rows)
    if action_tokens is not None:
        yield action_tokens
    if (bins := codec.config.action_bins) is not None:
        value = f"{BINS} bins over [-1, 1] (normalised), tokens {bins.end - BINS} to {bins.end - 1}"
        yield Item("action tokens", {}, value, "same")
    if answers:
        yield Item(INVALID, {}, codec.config.fate_of_invalid, "same", "what the robot executes then")
    lengths = sorted(
        s.episodes[s.index(i)].length for s, ids in zip(data.stores, data.training, strict=True) for i in ids
    )
    recorded = {"dataset": f"episodes of {lengths[0]} to {lengths[-1]} steps"}
    yield _chunk(recipe, codec, recorded, own_chunk)


def tokenizer_of(owner: str) -> str:
    """Return whose tokenizer a codec has that is the `owner`'s; see `LoadReport.owner`."""
    return "the checkpoint's" if owner == "the checkpoint" else f"that of {owner}"


def _tokenizer(codec: Codec, owner: str, declared: checkpoints.Declaration | None, rows: int) -> Item:
    """Return the item of the tokenizer: a difference where the checkpoint's own leaves many rows unused."""
    words = codec.required_tokenizer.vocab_size
    item = Item("tokenizer", {}, f"{owner}, {words} tokens", "same")
    if declared is None or declared.own_tokenizer is None or words >= SMALLEST_SHARE * rows:
        return item
    sides = {"checkpoint": f"an embedding of {rows} rows"}
    reason = "the checkpoint's files hold it; is it the one that the weights were trained with?"
    return replace(item, sides=sides, status="differs", reason=reason)


def _chunk(recipe: Recipe, codec: Codec, recorded: Mapping[str, str], own: int | None) -> Item:
    """Return the item of the chunk: a conflict where the statistics in use are of chunks of other steps."""
    chunk = codec.config.chunk
    sides = {**recorded, "checkpoint": f"{own} steps"} if own is not None else recorded
    if own in (None, chunk):
        return Item("chunk", sides, f"{chunk} steps", "same")
    if recipe.fits_statistics or not codec.columns.is_relative:
        return Item("chunk", sides, f"{chunk} steps", "chosen", "policy.config.chunk")
    sides = {
        "recipe": f"policy.config.chunk = {chunk}",
        "checkpoint": f"{own} steps; its statistics of relative actions are of differences over {own} steps",
    }
    fix = f'data.statistics = "data" fits statistics over {chunk} steps; or leave out policy.config.chunk'
    return Item("chunk", sides, "", "conflict", fix=fix, accept=("--data.statistics data",))
