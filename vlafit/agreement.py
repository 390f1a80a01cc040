"""Compare what dataset, checkpoint, recipe and protocol say about the robot, and decide which side holds.

Each item of an `Agreement` names what every side declares, the value that holds and the reason. A difference
that changes what the policy sees is a conflict, and a conflict is an error that names both sides, unless the
recipe's `[adapt]` section chooses a side. Nothing here reads files or changes a policy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from vlafit.errors import ConfigError, EmbodimentError, did_you_mean
from vlafit.recipe import AdaptRecipe
from vlafit.types import Embodiment, Feature

Status = Literal["same", "chosen", "assumed", "differs", "conflict"]
Role = Literal["dataset", "checkpoint", "protocol"]
HANDS = (("left", "right"), ("right", "left"))


@dataclass(frozen=True)
class Party:
    """One side's statement about the robot. None, "" or 0 where it does not say."""

    role: Role
    name: str
    embodiment: Embodiment
    relative: tuple[bool, ...] | None = None
    """For each action dimension: whether actions are relative to the state at the chunk's start."""
    slots: tuple[str, ...] = ()
    """Camera slots of a checkpoint, in order; "" is a slot that was always empty."""
    frame_sizes_known: bool = True
    """Whether the cameras' shapes are those of the recorded frames, and not of the policy's own images."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further items by name (chunk, prompt, tokenizer, normalisation, statistics): shown, compared as text."""

    @property
    def title(self) -> str:
        """The side's role and name, for messages."""
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True)
class Item:
    """One point that the sides must agree on."""

    name: str
    sides: Mapping[str, str]
    """Role -> that side's statement; a side that says nothing is left out."""
    value: str
    """The value that holds."""
    status: Status
    reason: str = ""
    """Why this value holds."""
    fix: str = ""
    """How to solve a conflict."""


@dataclass(frozen=True)
class Agreement:
    """Every item, and the decisions that a codec is built from."""

    items: tuple[Item, ...]
    cameras: tuple[str, ...]
    """The dataset's camera for each slot of the policy; "" leaves a slot empty."""
    relative: tuple[bool, ...]

    @property
    def conflicts(self) -> tuple[Item, ...]:
        """Items on which the sides contradict one another."""
        return tuple(item for item in self.items if item.status == "conflict")

    def require(self) -> None:
        """Raise EmbodimentError naming every conflict, both sides of it and its remedy."""
        if not self.conflicts:
            return
        lines = []
        for item in self.conflicts:
            sides = "; ".join(f"{role}: {text}" for role, text in item.sides.items())
            lines.append(f"  {item.name}: {sides}" + (f"\n    fix: {item.fix}" if item.fix else ""))
        raise EmbodimentError(
            f"dataset and checkpoint disagree on {len(lines)} point{'s' * (len(lines) > 1)}:\n"
            + "\n".join(lines)
        )

    def with_items(self, items: Sequence[Item]) -> "Agreement":
        """Return the agreement with further items."""
        return Agreement((*self.items, *items), self.cameras, self.relative)

    def to_json(self) -> dict[str, object]:
        """Return plain values, for a run's folder and a checkpoint."""
        return {
            "items": [asdict(item) | {"sides": dict(item.sides)} for item in self.items],
            "cameras": list(self.cameras),
            "relative": list(self.relative),
        }


def agree(
    dataset: Party,
    checkpoint: Party | None,
    adapt: AdaptRecipe,
    *,
    fresh_statistics: bool,
    protocol: Party | None = None,
) -> Agreement:
    """Compare the sides item by item; conflicts are items of the result, see `Agreement.require`.

    `checkpoint` is None where training starts from fresh weights, or the checkpoint says nothing about the
    robot. `fresh_statistics` says whether normalisation statistics are fitted to the dataset.
    Raises ConfigError for an `adapt` section that names cameras that do not exist.
    """
    items: list[Item] = []
    cameras, camera_items = _cameras(dataset, checkpoint, adapt)
    items += camera_items
    if checkpoint is not None:
        items += _columns(dataset, checkpoint, adapt)
    relative, relative_item = _relative(dataset, checkpoint, adapt, fresh_statistics)
    items.append(relative_item)
    if checkpoint is not None:
        items += _control(dataset, checkpoint, adapt)
        items.append(_renderer(dataset, checkpoint))
    items += _facts(dataset, checkpoint)
    if protocol is not None:
        items += _protocol(dataset, protocol)
    return Agreement(tuple(items), cameras, relative)


# ------------------------------------------------------------------------------------------------- cameras


def _cameras(
    dataset: Party, checkpoint: Party | None, adapt: AdaptRecipe
) -> tuple[tuple[str, ...], list[Item]]:
    recorded = {camera.name: camera for camera in dataset.embodiment.cameras}
    if checkpoint is None:
        if adapt.cameras:
            raise ConfigError("adapt.cameras maps a checkpoint's cameras, and no checkpoint names any")
        names = tuple(recorded)
        items = [
            Item(f"camera {n}", {"dataset": _frame(recorded[n])}, f"slot {i}", "same", "no checkpoint")
            for i, n in enumerate(names)
        ]
        return names, items
    slots, chosen = checkpoint.slots, dict(adapt.cameras)
    _require_known(chosen, slots, recorded, checkpoint, dataset)
    trained = {camera.name: camera for camera in checkpoint.embodiment.cameras}
    filled: list[str] = []
    items = []
    for number, slot in enumerate(slots):
        source = chosen.get(slot, slot if slot in recorded else "")
        filled.append(source)
        items.append(_slot(number, slot, source, recorded, trained, checkpoint, adapt))
    unused = [name for name in recorded if name not in filled]
    for name in unused:
        sides = {"dataset": _frame(recorded[name]), "checkpoint": "no slot of this name"}
        fix = f"map it: [adapt] cameras = {_proposal(slots, recorded)}"
        status: Status = "chosen" if chosen else "conflict"
        items.append(Item(f"camera {name}", sides, "not used", status, "adapt.cameras leaves it out", fix))
    return tuple(filled), items


def _require_known(
    chosen: Mapping[str, str],
    slots: Sequence[str],
    recorded: Mapping[str, Feature],
    checkpoint: Party,
    dataset: Party,
) -> None:
    for slot, source in chosen.items():
        if not slot or slot not in slots:
            listed = ", ".join(filter(None, slots)) or "none"
            raise ConfigError(
                f"adapt.cameras: {checkpoint.title} has no camera {slot!r}{did_you_mean(slot, slots)}; "
                f"it has: {listed}"
            )
        if source and source not in recorded:
            raise ConfigError(
                f"adapt.cameras: {dataset.title} has no camera {source!r}{did_you_mean(source, recorded)}; "
                f"it has: {', '.join(recorded)}"
            )
    sources = [source for source in chosen.values() if source]
    for source in sources:
        if sources.count(source) > 1:
            raise ConfigError(f"adapt.cameras: {source!r} is mapped to more than one camera")


def _slot(
    number: int,
    slot: str,
    source: str,
    recorded: Mapping[str, Feature],
    trained: Mapping[str, Feature],
    checkpoint: Party,
    adapt: AdaptRecipe,
) -> Item:
    name = f"camera slot {number}"
    if not slot:
        return Item(name, {"checkpoint": "always empty"}, "empty", "same", "the checkpoint never used it")
    size = _frame(trained[slot]) if slot in trained and checkpoint.frame_sizes_known else "any size"
    sides = {"checkpoint": f"{slot} {size}"}
    explicit = slot in adapt.cameras
    if not source:
        if explicit:
            return Item(name, sides, "empty", "chosen", "adapt.cameras leaves it empty")
        sides["dataset"] = f"no camera of this name (has: {', '.join(recorded)})"
        fix = f"[adapt] cameras = {_proposal((slot,), recorded)}"
        return Item(name, sides, "", "conflict", fix=fix)
    sides["dataset"] = f"{source} {_frame(recorded[source])}"
    for here, there in HANDS:
        if _mentions(slot, here) and _mentions(source, there):
            fix = f"the map puts a {there} camera where a {here} one was; correct adapt.cameras, or the name"
            return Item(name, sides, "", "conflict", fix=fix)
    differs = (
        checkpoint.frame_sizes_known and slot in trained and trained[slot].shape != recorded[source].shape
    )
    if differs and not adapt.resize:
        fix = "[adapt] resize = true, if frames of another size or shape are meant"
        return Item(name, sides, "", "conflict", fix=fix)
    reason = "adapt.cameras" if explicit else "same name"
    if differs:
        reason += ", adapt.resize"
    return Item(name, sides, source, "chosen" if explicit or differs else "same", reason)


def _proposal(slots: Sequence[str], recorded: Mapping[str, Feature]) -> str:
    named = [slot for slot in slots if slot]
    free = [name for name in recorded if name not in named]
    pairs = []
    for slot in named:
        if slot in recorded:
            continue
        pairs.append(f'{_key(slot)} = "{free.pop(0) if free else ""}"')
    return "{ " + ", ".join(pairs) + " }"


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else f'"{name}"'


def _mentions(name: str, word: str) -> bool:
    return word in name.lower()


def _frame(camera: Feature) -> str:
    return f"{camera.shape[0]}x{camera.shape[1]}"


# ------------------------------------------------------------------------------------------------- columns


def _columns(dataset: Party, checkpoint: Party, adapt: AdaptRecipe) -> Iterator[Item]:
    robot_fix = (
        'if this is another robot: [adapt] robot = true and data.statistics = "data" (and, where it has more '
        "dimensions than the policy takes, policy.config = { state_dim = N, action_dim = N } with "
        'policy.resize = "fresh")'
    )
    for name in ("state", "action"):
        here: Feature = getattr(dataset.embodiment, name)
        there: Feature = getattr(checkpoint.embodiment, name)
        sides = {"dataset": f"{here.shape[0]}", "checkpoint": f"{there.shape[0]}"}
        if here.shape == there.shape:
            yield Item(f"{name} dimensions", sides, str(here.shape[0]), "same")
        elif adapt.robot:
            yield Item(f"{name} dimensions", sides, str(here.shape[0]), "chosen", "adapt.robot")
        else:
            yield Item(f"{name} dimensions", sides, "", "conflict", fix=robot_fix)
        yield _labels(name, here, there, adapt, robot_fix)
        if here.unit or there.unit:
            yield _stated(f"{name} unit", here.unit, there.unit, adapt.robot, robot_fix)


def _labels(name: str, here: Feature, there: Feature, adapt: AdaptRecipe, fix: str) -> Item:
    item = f"{name} names"
    sides = {
        role: ", ".join(feature.labels)
        for role, feature in (("dataset", here), ("checkpoint", there))
        if feature.labels
    }
    if not here.labels or not there.labels:
        status: Status = "same" if not sides else "assumed"
        silent = "dataset" if not here.labels else "checkpoint"
        reason = "neither side names them" if not sides else f"the {silent} does not name them: same order"
        return Item(item, sides, ", ".join(here.labels or there.labels), status, reason)
    if here.labels == there.labels:
        return Item(item, sides, ", ".join(here.labels), "same")
    if adapt.robot:
        return Item(item, sides, ", ".join(here.labels), "chosen", "adapt.robot")
    if sorted(here.labels) == sorted(there.labels):
        fix = "the same dimensions in another order: reorder the columns in the card; else " + fix
    return Item(item, sides, "", "conflict", fix=fix)


def _stated(name: str, here: str, there: str, permitted: bool, fix: str) -> Item:
    sides = {role: text for role, text in (("dataset", here), ("checkpoint", there)) if text}
    if not here or not there:
        silent = "dataset" if not here else "checkpoint"
        return Item(name, sides, here or there, "assumed", f"the {silent} does not say")
    if here == there:
        return Item(name, sides, here, "same")
    if permitted:
        return Item(name, sides, here, "chosen", "adapt.robot")
    return Item(name, sides, "", "conflict", fix=fix)


# --------------------------------------------------------------------------------------- actions and control


def _relative(
    dataset: Party, checkpoint: Party | None, adapt: AdaptRecipe, fresh_statistics: bool
) -> tuple[tuple[bool, ...], Item]:
    name = "relative actions"
    here = dataset.relative
    there = checkpoint.relative if checkpoint is not None else None
    sides = {
        role: _mask(mask)
        for role, mask in (("dataset", here), ("checkpoint", there))
        if mask is not None
    }
    if adapt.actions and (here is None or there is None):
        silent = "dataset" if here is None else "checkpoint"
        raise ConfigError(
            f"adapt.actions = {adapt.actions!r} chooses between two sides, and the {silent} does not say "
            "whether actions are relative; leave it out"
        )
    if there is None:
        held = here if here is not None else ()
        status: Status = "same" if here is not None else "assumed"
        reason = "the checkpoint does not say" if checkpoint is not None else "no checkpoint"
        if checkpoint is not None:
            status = "assumed"
        return held, Item(name, sides, _mask(held), status, reason)
    if here is None:
        return there, Item(name, sides, _mask(there), "assumed", "the dataset does not say")
    if _same_mask(here, there):
        return here, Item(name, sides, _mask(here), "same")
    if adapt.actions == "checkpoint":
        return there, Item(name, sides, _mask(there), "chosen", 'adapt.actions = "checkpoint"')
    if adapt.actions == "data" and fresh_statistics:
        return here, Item(name, sides, _mask(here), "chosen", 'adapt.actions = "data"')
    fix = (
        '[adapt] actions = "checkpoint" keeps the meaning that the weights have learned; actions = "data" '
        'with data.statistics = "data" teaches them the card\'s'
    )
    return here, Item(name, sides, "", "conflict", fix=fix)


def _same_mask(one: tuple[bool, ...], other: tuple[bool, ...]) -> bool:
    return one == other or not (any(one) or any(other))


def _mask(mask: tuple[bool, ...]) -> str:
    if not any(mask):
        return "absolute"
    if all(mask):
        return "all relative"
    chosen = [str(number) for number, on in enumerate(mask) if on]
    return f"relative in dimensions {', '.join(chosen)}"


def _control(dataset: Party, checkpoint: Party, adapt: AdaptRecipe) -> Iterator[Item]:
    here, there = dataset.embodiment, checkpoint.embodiment
    fix = "[adapt] robot = true, if the policy is to learn this one"
    yield _stated("control mode", here.control, there.control, adapt.robot, fix)

    def rate(hz: float) -> str:
        return f"{hz:g} Hz" if hz else ""

    yield _stated("control rate", rate(here.hz), rate(there.hz), adapt.robot, fix)


def _renderer(dataset: Party, checkpoint: Party) -> Item:
    here, there = dataset.embodiment.renderer, checkpoint.embodiment.renderer
    sides = {role: text for role, text in (("dataset", here), ("checkpoint", there)) if text}
    if here and there and here != there:
        reason = "the policy learns the dataset's pictures; the difference may cost successes"
        return Item("renderer", sides, here, "differs", reason)
    if here and there:
        return Item("renderer", sides, here, "same")
    return Item("renderer", sides, here or there, "assumed", "not stated by every side")


def _facts(dataset: Party, checkpoint: Party | None) -> Iterator[Item]:
    parties = [dataset] if checkpoint is None else [dataset, checkpoint]
    for name in dict.fromkeys(key for party in parties for key in party.facts):
        sides = {party.role: party.facts[name] for party in parties if name in party.facts}
        yield Item(name, sides, next(reversed(sides.values())), "same" if len(sides) > 1 else "assumed")


def _protocol(dataset: Party, protocol: Party) -> Iterator[Item]:
    from vlafit.types import differences

    for text in differences(dataset.embodiment, protocol.embodiment):
        name, _, sides = text.partition(": ")
        yield Item(
            f"protocol {name}", {"dataset": sides}, "", "conflict",
            fix="choose a protocol of the same robot",
        )  # fmt: skip
