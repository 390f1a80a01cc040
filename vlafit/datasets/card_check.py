"""Refuse values of a data card that are invalid in every layout."""

from collections.abc import Mapping

from vlafit.agreement.columns import PAIR_FIX, mispaired
from vlafit.datasets.card import Card, ColumnCard
from vlafit.datasets.columns import parse_key
from vlafit.errors import ConfigError

LARGEST_SIDE = 2**14  # pixels
MOST_DIMENSIONS = 2**12
MOST_RECORDED = 10**6  # episodes of a task, or steps of one
SLOWEST_HZ, FASTEST_HZ = 1e-3, 10_000.0  # control rates beyond are units mixed up


def check(card: Card, where: str) -> None:
    """Raise ConfigError, beginning with `where`, if a value of the card is invalid in every layout."""
    robot = card.robot
    if not robot.cameras:
        raise ConfigError(f"{where}: robot.cameras is empty; a policy needs at least one camera")
    names = [camera.name for camera in robot.cameras]
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"{where}: cameras need names of their own, got {names}")
    for camera in robot.cameras:
        if not (1 <= camera.height <= LARGEST_SIDE and 1 <= camera.width <= LARGEST_SIDE):
            raise ConfigError(
                f"{where}: camera {camera.name!r} is {camera.height}x{camera.width} pixels; each side "
                f"must be from 1 to {LARGEST_SIDE}"
            )
        if not camera.name.isprintable():
            raise ConfigError(
                f"{where}: camera {camera.name!r}: a name is one line without control characters"
            )
    if not SLOWEST_HZ <= robot.hz <= FASTEST_HZ:
        raise ConfigError(
            f"{where}: robot.hz must be above 0, from {SLOWEST_HZ} to {FASTEST_HZ}, is {robot.hz}"
        )
    columns: Mapping[str, ColumnCard] = {"state": robot.state, "action": robot.action}
    for name, column in columns.items():
        if not column.keys or column.dimensions < 1:
            raise ConfigError(f"{where}: robot.{name} needs at least one key and one dimension")
        if column.dimensions > MOST_DIMENSIONS:
            raise ConfigError(
                f"{where}: robot.{name}.dimensions must be at most {MOST_DIMENSIONS}, is {column.dimensions}"
            )
        for key in column.keys:
            parse_key(key, f"{where}: robot.{name}")
        per_dimension = {
            "labels": column.labels,
            "low": column.low,
            "high": column.high,
            "scale": column.scale,
            "offset": column.offset,
        }
        for what, values in per_dimension.items():
            if values and len(values) != column.dimensions:
                raise ConfigError(
                    f"{where}: robot.{name} has {len(values)} {what} for {column.dimensions} dimensions"
                )
        if not all(column.scale):
            raise ConfigError(f"{where}: robot.{name}.scale holds 0, which would erase a dimension")
    if robot.relative and len(robot.relative) != robot.action.dimensions:
        raise ConfigError(
            f"{where}: robot.relative has {len(robot.relative)} entries for "
            f"{robot.action.dimensions} action dimensions"
        )
    beyond = [d for d, on in enumerate(robot.relative) if on and d >= robot.state.dimensions]
    if beyond:
        raise ConfigError(f"{where}: robot.relative: there is no state for action dimensions {beyond}")
    if pair := mispaired(robot.relative, card.embodiment):
        raise ConfigError(f"{where}: robot.relative: {pair}; {PAIR_FIX}")
    instruction = card.instruction
    if instruction.source == "card" and not instruction.text.strip() and not instruction.files:
        raise ConfigError(f'{where}: instruction.source is "card": set instruction.text or .files')
    if instruction.source in ("demo", "beside") and not instruction.key:
        raise ConfigError(f"{where}: instruction.source is {instruction.source!r}: set instruction.key")
    if (instruction.source == "beside") != bool(instruction.file):
        raise ConfigError(f'{where}: instruction.source "beside" and instruction.file need each other')
    if instruction.source != "card" and (instruction.text or instruction.files):
        raise ConfigError(f'{where}: instruction.text and .files need instruction.source = "card"')
    record = card.record
    if record is not None:
        if not record.tasks or record.episodes_per_task < 1 or len(set(record.tasks)) != len(record.tasks):
            raise ConfigError(f"{where}: record needs tasks, each once, and at least one episode of each")
        if max(record.episodes_per_task, record.horizon, record.hold_steps) > MOST_RECORDED:
            raise ConfigError(
                f"{where}: record: episodes_per_task, horizon and hold_steps must be at most {MOST_RECORDED}"
            )
        if not 0 <= record.perturbed <= 1 or record.noise < 0 or record.horizon < 1 or record.hold_steps < 0:
            raise ConfigError(
                f"{where}: record: 0 <= perturbed <= 1, noise >= 0, horizon >= 1, hold_steps >= 0"
            )
