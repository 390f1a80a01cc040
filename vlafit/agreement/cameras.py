"""Decide which camera of the dataset fills which slot of the policy: by name, or by `adapt.cameras`."""

import re
from collections.abc import Mapping, Sequence

from vlafit.agreement.camera_map import NAME, accept, hands, propose, remedy, table
from vlafit.agreement.values import Item, Party
from vlafit.errors import ConfigError, did_you_mean, nearest
from vlafit.recipe import AdaptRecipe
from vlafit.types import Embodiment, Feature

HANDS = (("left", "right"), ("right", "left"))


def decide(
    dataset: Party, checkpoint: Party | None, adapt: AdaptRecipe, slots: Sequence[str] = ()
) -> tuple[tuple[str, ...], list[Item]]:
    """Return the dataset's camera for each slot ("" leaves it empty), and an item for each slot and camera.

    A checkpoint that names no slots takes those of the run (`shared_slots`), or without them the dataset's
    cameras in order. Raises ConfigError for an
    `adapt.cameras` that names cameras which do not exist.
    """
    assert dataset.embodiment is not None
    recorded = {camera.name: camera for camera in dataset.embodiment.cameras}
    if (checkpoint is None or not checkpoint.slots) and slots:
        return _shared(slots, recorded, adapt)
    if checkpoint is None or not checkpoint.slots:
        mapped = [slot for slot, name in adapt.cameras.items() if slot != name or name not in recorded]
        if mapped:
            owner = checkpoint.title if checkpoint else "this recipe has no checkpoint, so it"
            raise ConfigError(
                f"adapt.cameras.{mapped[0]} maps a checkpoint's cameras, and {owner} names none; remove it "
                "(a camera mapped to itself confirms the key that its card reads)"
            )
        names = tuple(recorded)
        reason = (
            "no checkpoint" if checkpoint is None else "the checkpoint names no cameras: the card's order"
        )
        status = "same" if checkpoint is None else "assumed"
        items = [
            Item(f"camera slot {i}", {"dataset": f"{n} {_frame(recorded[n])}"}, n, status, reason)
            for i, n in enumerate(names)
        ]
        exchanged = [(name, misnamed(name, dataset.keys)) for name in names if name not in adapt.cameras]
        items += [
            Item(f"camera {name}", {"dataset": text}, name, "differs", "are the cameras exchanged?")
            for name, text in exchanged
            if text
        ]
        return names, items
    slots, chosen = checkpoint.slots, dict(adapt.cameras)
    _require_known(chosen, slots, recorded, checkpoint, dataset)
    trained = {c.name: c for c in checkpoint.embodiment.cameras} if checkpoint.embodiment else {}
    proposal = propose(slots, recorded, chosen)
    sized = trained if checkpoint.frame_sizes_known else {}
    options = accept(proposal, recorded, sized, adapt.resize)
    fix = remedy(proposal, recorded, {} if adapt.resize else sized)
    filled: list[str] = []
    items = []
    for number, slot in enumerate(slots):
        source = chosen.get(slot, slot if slot in recorded and slot not in chosen.values() else "")
        filled.append(source)
        items.append(
            _slot(
                number,
                slot,
                recorded.get(source),
                sized.get(slot),
                recorded,
                adapt,
                fix,
                options,
                dataset.keys,
            )
        )
    for name in [name for name in recorded if name not in filled]:
        sides = {"dataset": f"{name} {_frame(recorded[name])}", "checkpoint": "no slot of this name"}
        if chosen:
            items.append(Item(f"camera {name}", sides, "not used", "chosen", "adapt.cameras leaves it out"))
            continue
        removal = f"remove it from the card, or name the cameras to use, {fix}"
        items.append(Item(f"camera {name}", sides, "", "conflict", fix=removal, accept=options))
    return tuple(filled), items


def shared_slots(robots: Mapping[str, tuple[Embodiment, AdaptRecipe]]) -> tuple[str, ...]:
    """Return the camera slots of a run on several embodiments, without a checkpoint that names them.

    Cameras of one name share a slot, and `adapt.cameras` of an embodiment puts a camera into the slot of
    another one's. `robots` holds what each embodiment records, and its adaptations. Raises ConfigError for a
    slot or camera that is not there, or a camera in two slots.
    """
    slots: list[str] = []
    for robot, adapt in robots.values():
        own = [camera.name for camera in robot.cameras]
        left_out = [slot for slot, source in adapt.cameras.items() if not source]
        taken = [*adapt.cameras.values(), *left_out]
        slots += [name for name in own if name not in slots and name not in taken]
    for name, (robot, adapt) in robots.items():
        recorded = {camera.name: camera for camera in robot.cameras}
        for slot, source in adapt.cameras.items():
            where = f"adapt.embodiments.{name}.cameras"
            if source and source not in recorded:
                raise ConfigError(
                    f"{where}: the data of {name!r} have no camera {source!r}"
                    f"{did_you_mean(source, recorded)}; they have: {', '.join(recorded)}"
                )
            if slot not in slots and not (slot in recorded and not source):
                raise ConfigError(
                    f"{where}: there is no slot {slot!r}{nearest(slot, slots)}; the slots are: "
                    f"{', '.join(slots)}"
                )
        sources = [source for source in adapt.cameras.values() if source]
        if len(set(sources)) < len(sources):
            raise ConfigError(f"adapt.embodiments.{name}.cameras: a camera is in two slots; use each once")
    return tuple(slots)


def _shared(
    slots: Sequence[str], recorded: Mapping[str, Feature], adapt: AdaptRecipe
) -> tuple[tuple[str, ...], list[Item]]:
    """Fill the slots that the embodiments of a run share."""
    filled, items = [], []
    for number, slot in enumerate(slots):
        source = adapt.cameras.get(
            slot, slot if slot in recorded and slot not in adapt.cameras.values() else ""
        )
        filled.append(source)
        chosen = slot in adapt.cameras
        sides = {"dataset": f"{source} {_frame(recorded[source])}" if source else "no camera of this name"}
        reason = "adapt.cameras" if chosen else "same name" if source else "a slot of another embodiment"
        status = "chosen" if chosen else "same"
        items.append(Item(f"camera slot {number} ({slot})", sides, source or "empty", status, reason))
    for name in [name for name in recorded if name not in filled]:
        sides = {"dataset": f"{name} {_frame(recorded[name])}"}
        items.append(Item(f"camera {name}", sides, "not used", "chosen", "adapt.cameras leaves it out"))
    if not any(filled):
        raise ConfigError("adapt.cameras leaves every camera of an embodiment out; keep at least one")
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
                f"adapt.cameras: {checkpoint.title} has no camera {slot!r}{nearest(slot, slots)}; "
                f"it has: {listed}"
            )
        if source and source not in recorded:
            raise ConfigError(
                f"adapt.cameras: {dataset.title} has no camera {source!r}{nearest(source, recorded)}; "
                f"it has: {', '.join(recorded)}"
            )
    sources = [source for source in chosen.values() if source]
    for source in sources:
        if sources.count(source) > 1:
            raise ConfigError(f"adapt.cameras: {source!r} is mapped to more than one camera; use each once")
    if chosen and not any(sources) and not (set(slots) - set(chosen)) & set(recorded):
        raise ConfigError("adapt.cameras leaves every camera of the checkpoint empty; map at least one")


def _slot(
    number: int,
    slot: str,
    source: Feature | None,
    trained: Feature | None,
    recorded: Mapping[str, Feature],
    adapt: AdaptRecipe,
    unfilled: str,
    options: tuple[str, ...],
    keys: Mapping[str, str],
) -> Item:
    name = f"camera slot {number}"
    if not slot:
        return Item(name, {"checkpoint": "always empty"}, "empty", "same", "the checkpoint never used it")
    sides = {"checkpoint": f"{slot} {_frame(trained) if trained else '(any size)'}"}
    if source is None:
        if slot in adapt.cameras:
            return Item(name, sides, "empty", "chosen", "adapt.cameras leaves it empty")
        taker = next((other for other, name in adapt.cameras.items() if name == slot), "")
        sides["dataset"] = (
            f"its {slot} takes the place of {taker} (adapt.cameras)"
            if taker
            else f"no camera of this name (has: {', '.join(recorded)})"
        )
        return Item(name, sides, "", "conflict", fix=unfilled, accept=options)
    sides["dataset"] = f"{source.name} {_frame(source)}"
    for here, there in HANDS:
        if hands(slot) == {here} and hands(source.name) == {there}:
            fix = (
                f"the {there} camera {source.name!r} would take the place of the {here} camera {slot!r}: "
                "correct adapt.cameras, or the camera's name in the card"
            )
            return Item(name, sides, "", "conflict", fix=fix)
    if slot not in adapt.cameras and (text := misnamed(source.name, keys)):
        fix = (
            f"correct the card; if it is right: [adapt] cameras = {table({slot: source.name})}, which "
            "confirms the key"
        )
        return Item(
            name,
            sides | {"dataset": text},
            "",
            "conflict",
            fix=fix,
            accept=(f"--adapt.cameras.{slot} {source.name}",)
            if re.fullmatch(NAME, slot + source.name)
            else (),
        )
    differs = trained is not None and trained.shape != source.shape
    if differs and not adapt.resize:
        fix = "[adapt] resize = true, if frames of another size or shape are meant; else correct the card"
        return Item(name, sides, "", "conflict", fix=fix, accept=("--adapt.resize true",))
    explicit = slot in adapt.cameras
    reason = ", ".join(["adapt.cameras" if explicit else "same name", *["adapt.resize"] * differs])
    status = "chosen" if differs or source.name != slot else "same"
    return Item(name, sides, source.name, status, reason)


def misnamed(name: str, keys: Mapping[str, str]) -> str:
    """Return how the key of the camera `name` names another one of the card; "" where it does not.

    "obs/cam_wrist_rgb" names cam_wrist, and not wrist where both are cameras. A key of the other hand is
    another camera's, too.
    """
    key = keys.get(name, "")
    for part in reversed(re.split(r"[/.]", key)):
        named = [one for one in keys if re.search(rf"(?<![A-Za-z0-9]){re.escape(one)}(?![A-Za-z0-9])", part)]
        nearest = [one for one in named if not any(one != other and one in other for other in named)]
        if nearest and name not in nearest:
            return f"camera {name} reads {key}, which has the name of camera {nearest[0]}"
        if nearest:
            return ""
        if hands(part) and hands(name) and not hands(part) & hands(name):
            return f"camera {name} reads {key}, which is of the other hand"
    return ""


def _frame(camera: Feature) -> str:
    return f"{camera.shape[0]}x{camera.shape[1]}"
