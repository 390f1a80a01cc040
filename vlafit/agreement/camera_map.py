"""Propose which camera of a dataset fills which slot of a policy, as far as their names tell."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from vlafit.agreement.values import PLACEHOLDER, Item
from vlafit.errors import nearest
from vlafit.types import Embodiment, Feature, differences

BY_NAME, BY_SIZE = "cameras", "frame_size"  # options that say of a policy's cameras what its files do not
NAME = r"[A-Za-z0-9_-]+"  # what a command line takes without quotes
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
KNOWN: Mapping[str, Mapping[str, str]] = {
    "libero-panda": {
        # LeRobot: src/lerobot/envs/libero.py; the third of its pi0 was never there
        "image": "agentview",
        "image2": "wrist",
        # openpi: src/openpi/policies/libero_policy.py
        "base_0_rgb": "agentview",
        "left_wrist_0_rgb": "wrist",
        "right_wrist_0_rgb": "",
        "wrist_image": "wrist",
        # openpi gives pi0-FAST the same three, and its slots are filled in their order
        "base_1_rgb": "wrist",
        "wrist_0_rgb": "",
    }
}
"""Robot -> camera as public programs name it -> the robot's name for it, "" for one that it does not have.
Only proposed, never applied."""
_LIMBS = ("wrist", "hand", "arm", "gripper", "cam", "camera")
_MOUNTED = {"wrist", "hand", "gripper"}
_SCENE = {"base", "scene", "main", "exterior", "external", "agentview", "third"}
_VIEWS = {"top", "high", "overhead", "head", "front"}
_SHORT = {
    short: {hand}
    for hand, letter in (("left", "l"), ("right", "r"))
    for short in (
        letter,
        *(f"{letter}{limb}" for limb in ("h", *_LIMBS)),
        *(f"{limb}{letter}" for limb in _LIMBS),
    )
}
"""Words that mean a hand in short: l, lh, lwrist, wristl; r likewise."""
_GENERAL = {"cam", "camera", "rgb", "image", "images", "img", "color", "view", "observation", "obs"} | {
    "left",
    "right",
    *_SHORT,
}
"""Words of a camera's name that do not tell it from another one."""


def propose(
    slots: Sequence[str], recorded: Collection[str], chosen: Mapping[str, str]
) -> dict[str, str | None]:
    """Return a complete `adapt.cameras` as far as names support it; None where they do not tell the camera.

    `chosen` is what the recipe maps. Two names support a pair where they are the same, where they alone have
    the same words and hand, and where they are all that is left and of one place (hand, or scene).
    """
    named = [slot for slot in slots if slot]
    pairs: dict[str, str | None] = {slot: chosen[slot] for slot in named if slot in chosen}
    pairs |= {s: s for s in named if s not in pairs and s in recorded and s not in chosen.values()}
    for alike in (_same_words, _same_hand):
        left, free = _left(named, pairs), _free(recorded, pairs)
        for slot in left:
            (one, *more) = [name for name in free if alike(slot, name)] or [""]
            if one and not more and [other for other in left if alike(other, one)] == [slot]:
                pairs[slot] = one
    left, free = _left(named, pairs), _free(recorded, pairs)
    if len(left) == len(free) == 1 and _same_place(left[0], free[0]):
        pairs[left[0]] = free[0]
    elif not free:
        pairs |= dict.fromkeys(left, "")
    return {slot: pairs.get(slot) for slot in named}


def _left(named: Sequence[str], pairs: Mapping[str, str | None]) -> list[str]:
    return [slot for slot in named if slot not in pairs]


def _free(recorded: Collection[str], pairs: Mapping[str, str | None]) -> list[str]:
    return [name for name in recorded if name not in pairs.values()]


def _words(name: str) -> set[str]:
    """Return the words of a camera's name that tell it from others; those of hands are left to `hands`."""
    return {word.lower() for word in _WORD.findall(name)} - _GENERAL


def _same_words(slot: str, name: str) -> bool:
    return bool(_words(slot)) and _words(slot) == _words(name) and hands(slot) == hands(name)


def _same_hand(slot: str, name: str) -> bool:
    """Whether two names mention the same one hand, and no places that differ."""
    one, other = _places(slot), _places(name)
    return len(hands(slot)) == 1 and hands(slot) == hands(name) and (one == other or not one or not other)


def _places(name: str) -> set[str]:
    """Return the words of a name that say where a camera is; wrist, hand and gripper are the same place."""
    words = _words(name)
    return words - _MOUNTED - {"arm"} | ({"wrist"} if words & _MOUNTED else set())


def _same_place(slot: str, name: str) -> bool:
    """Whether both are mounted on the same hand, or both see the scene and one does not say from where."""
    words = _words(slot), _words(name)
    if any(hands(one) or _words(one) & _MOUNTED for one in (slot, name)):
        return hands(slot) == hands(name) and all(one & _MOUNTED for one in words)
    return all(one & (_SCENE | _VIEWS) for one in words) and any(one & _SCENE for one in words)


def remedy(
    proposal: Mapping[str, str | None], recorded: Mapping[str, Feature], trained: Mapping[str, Feature]
) -> str:
    """Return how to write the proposal into a recipe, with what is left to the user."""
    free = _free(recorded, proposal)
    sizes = " and resize = true" if _resized(proposal, recorded, trained) else ""
    text = f'[adapt] cameras = {table(proposal)}{sizes} ("" leaves a slot empty)'
    if None not in proposal.values():
        return text
    return (
        f'{text}: put {"one of " * (len(free) > 1)}{", ".join(free)}, or "", in the place of each '
        f"{PLACEHOLDER}; the names do not tell which is which, and the order is not known"
    )


def _resized(
    proposal: Mapping[str, str | None], recorded: Mapping[str, Feature], trained: Mapping[str, Feature]
) -> bool:
    """Whether a slot gets frames of another size than it had, as far as the proposal tells."""
    free = _free(recorded, proposal)
    return any(
        trained[slot].shape != recorded[name].shape
        for slot, source in proposal.items()
        if slot in trained
        for name in (free if source is None else [source] if source else [])
    )


def camera_options(policy: Embodiment, robot: Embodiment, chosen: Sequence[Item] = ()) -> str:
    """Return how an evaluation gives a policy's cameras the robot's names and its frames their size.

    "" where they have the same, or the robots differ in anything else. What no name tells is left to the
    user. `chosen`: what the user has said of the policy before, with `BY_NAME` for a camera's name.
    """
    if any(not text.startswith(("cameras", "size of camera")) for text in differences(policy, robot)):
        return ""
    recorded, slots = {camera.name: camera for camera in robot.cameras}, [c.name for c in policy.cameras]
    sizes = {camera.shape for camera in robot.cameras}
    other = [camera for camera in policy.cameras if {camera.shape} != sizes]
    size = "".join(f" --frame-size {shape[0]}" for shape in sizes) if other and len(sizes) == 1 else ""
    if set(slots) == set(recorded):
        return f"If frames of this size are meant: {size.strip()} of eval and serve" if size else ""
    if any(BY_NAME in item.reason.split(", ") for item in chosen):
        wrong = [name for name in slots if name not in recorded]
        found = "; ".join(f"no camera {name!r}{nearest(name, recorded)}" for name in wrong)
        found += f"; it has: {', '.join(recorded)}" if wrong else ""
        left = ", ".join(name for name in recorded if name not in slots)
        return f"--cameras: the robot has {found or f'also {left}, which no camera of the policy is'}"
    known = KNOWN.get(robot.name, {})
    told = {slot: known[slot] for slot in slots if known.get(slot) in (*recorded, "")}
    taken = [name for name in told.values() if name]
    pairs = propose(slots, recorded, told if len(taken) == len(set(taken)) else {})
    given = " ".join(f"{slot}={PLACEHOLDER if name is None else name}" for slot, name in pairs.items())
    left = ", ".join(_free(recorded, pairs))
    choice = f" ({left}, or nothing, in the place of each {PLACEHOLDER})" if None in pairs.values() else ""
    return (
        "If it is this robot, whose cameras have other names there, say which is which: --cameras "
        f"{given}{size} of eval and serve{choice}; NAME= leaves a place empty. Arguments of load_actor: "
        "cameras, frame_size."
    )


def table(proposal: Mapping[str, str | None]) -> str:
    """Return a proposal as a TOML inline table."""
    return _inline((slot, PLACEHOLDER if source is None else source) for slot, source in proposal.items())


def accept(
    proposal: Mapping[str, str | None],
    recorded: Mapping[str, Feature],
    trained: Mapping[str, Feature],
    resize: bool,
) -> tuple[str, ...]:
    """Return a proposal as options of the command line.

    There are none if no camera would be used, or a name needs quotes.
    """
    sources = {slot: PLACEHOLDER if name is None else name for slot, name in proposal.items()}
    names = [*sources, *filter(None, sources.values())]
    if not any(sources.values()) or not all(re.fullmatch(NAME, name) for name in names):
        return ()
    options = [f"--adapt.cameras.{slot} {source or repr('')}" for slot, source in sources.items()]
    wanted = not resize and _resized(proposal, recorded, trained)
    return (*options, *["--adapt.resize true"] * wanted)


def to_themselves(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return how a recipe, and the options of a command, confirm that cameras read the right keys."""
    options = tuple(f"--adapt.cameras.{name} {name}" for name in names if re.fullmatch(NAME, name))
    entries = _inline((name, name) for name in names)
    return f"[adapt] cameras = {entries}", options if len(options) == len(names) else ()


def _inline(pairs: Iterable[tuple[str, str]]) -> str:
    """Return pairs of a camera and its source as a TOML inline table."""
    entries = (f"{_key(name)} = {json.dumps(source, ensure_ascii=False)}" for name, source in pairs)
    return "{ " + ", ".join(entries) + " }"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else json.dumps(name, ensure_ascii=False)


def hands(name: str) -> set[str]:
    """Return the hands that a camera's name mentions: "wrist_l" and "wristLeft" the left, "upright" none.

    A letter with a number at the end counts where nothing else tells: "l1" and "wrist_r2", but not the robot
    of "R1_head".
    """
    mentioned: set[str] = set()
    for part in re.split(r"[^A-Za-z0-9]+", name):
        mentioned |= _SHORT.get(part.lower(), set())
        for word in _WORD.findall(part):
            plain = word.lower()
            for hand in ("left", "right"):
                first = plain.startswith(hand) and plain.removeprefix(hand).startswith(_LIMBS)
                last = plain.endswith(hand) and plain.removesuffix(hand) in ("", *_LIMBS)
                if first or last:
                    mentioned.add(hand)
            # A letter of its own inside a word is a hand only beside lower case: "camL", but not "L515".
            if len(word) == 1 and word.isupper() and part.endswith(word) and part != word:
                mentioned |= _SHORT.get(plain, set())
    if mentioned:
        return mentioned
    numbered = re.search(r"(?<![A-Za-z0-9])([lr])\d{1,2}([_-](rgb|image|color|cam|camera))?$", name.lower())
    return {"left" if numbered[1] == "l" else "right"} if numbered else set()
