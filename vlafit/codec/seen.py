"""Give a codec's cameras the names of another program's, and its frames another size, to act on one robot.

Public checkpoints name their cameras as their own program does, and a simulation has names of its own. Which
one is which is said by the caller and never guessed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from vlafit.agreement import Item
from vlafit.agreement.camera_map import BY_NAME, BY_SIZE, hands
from vlafit.codec.codec import Codec
from vlafit.errors import ConfigError, nearest
from vlafit.types import Feature

LARGEST_FRAME = 2**13  # pixels of a side


def with_cameras(codec: Codec, cameras: Mapping[str, str], frame_size: int, where: str) -> Codec:
    """Return the codec for frames [frame_size, frame_size, 3] (0: as they are) of the robot's `cameras`.

    `cameras` maps a camera of the policy to the robot's; "" leaves its place empty, which masks it as a
    missing camera is. Those that are not in it keep their names. Frames are fitted to the policy's size as
    the codec always does, in one step. `where` begins an error.

    Raises ConfigError for a camera that the policy does not have, one that would take two places, none at
    all, or one of the other hand.
    """
    slots = [name for name in codec.config.cameras if name]
    for slot, name in cameras.items():
        if slot not in slots:
            listed = ", ".join(slots) or "none"
            raise ConfigError(
                f"{where}: cameras: the policy has no camera {slot!r}{nearest(slot, slots)}; it has: {listed}"
            )
        if len(hands(slot)) == len(hands(name)) == 1 and hands(slot) != hands(name):
            raise ConfigError(
                f"{where}: cameras: {slot}={name}: the policy's camera is of the {min(hands(slot))} hand, "
                f"the robot's of the {min(hands(name))} one; exchange the names"
            )
    named = {slot: cameras.get(slot, slot) for slot in slots}
    seen = [name for name in named.values() if name]
    if twice := [name for name in seen if seen.count(name) > 1]:
        raise ConfigError(f"{where}: cameras: {twice[0]!r} takes two places of the policy; use each once")
    if slots and not seen:
        raise ConfigError(f"{where}: cameras leaves every camera of the policy empty; name at least one")
    robot = codec.embodiment
    kept = [camera for camera in robot.cameras if named.get(camera.name, camera.name)]
    size = (frame_size, frame_size, 3)
    views = tuple(
        Feature(named.get(camera.name, camera.name), size if frame_size else camera.shape) for camera in kept
    )
    return codec.with_changes(
        config=replace(codec.config, cameras=tuple(named.get(name, "") for name in codec.config.cameras)),
        embodiment=replace(robot, cameras=views),
    )


def camera_items(before: Codec, after: Codec) -> Iterator[Item]:
    """Yield what was chosen for each camera of the policy, for the table of an evaluation."""
    for slot, name in zip(before.config.cameras, after.config.cameras, strict=True):
        if not slot:
            continue
        own = before.embodiment.camera(slot)
        there = after.embodiment.camera(name) if name else None
        if there == own:
            continue
        stated = {"checkpoint": f"{slot} {own.shape[0]}x{own.shape[1]}"}
        value = f"{name} {there.shape[0]}x{there.shape[1]}" if there else "empty, masked as a missing camera"
        by = [BY_NAME] * (name != slot) + [BY_SIZE] * (there is not None and there.shape != own.shape)
        yield Item(f"camera {slot}", stated, value, "chosen", ", ".join(by))
