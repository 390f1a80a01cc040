"""Refuse values of a data card that are invalid in every layout."""

from collections.abc import Iterator, Mapping

from vlafit.agreement.columns import CONTROL_FIX, is_delta, mispaired
from vlafit.codec.columns import Columns
from vlafit.datasets.card import Card, ColumnCard
from vlafit.datasets.columns import parse_key
from vlafit.errors import CodecError, ConfigError

LARGEST_SIDE = 2**14  # pixels
MOST_DIMENSIONS = 2**12
LEAST_SCALE = 1e-30  # below, values become 0 in float32
LONGEST_NAME, LONGEST_SHOWN = 500, 40  # characters
MOST_RECORDED = 10**6  # episodes of a task, or steps of one
SLOWEST_HZ, FASTEST_HZ = 1e-3, 10_000.0  # control rates beyond are units mixed up


def _names(card: Card) -> Iterator[tuple[str, str]]:
    """Yield every name that a card gives, which other people's files may hold, with what it names."""
    robot = card.robot
    yield from (("name", card.name), ("robot.name", robot.name), ("robot.control", robot.control))
    for camera in robot.cameras:
        yield from (("camera", camera.name), ("camera key", camera.key))
    for what, column in (("robot.state", robot.state), ("robot.action", robot.action)):
        yield f"{what}.unit", column.unit
        yield from ((f"{what}.keys", key) for key in column.keys)
        yield from ((f"{what}.labels", label) for label in column.labels)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."


def _require_forms(card: Card, where: str) -> None:
    """Raise ConfigError for poses, grippers and angles that do not fit the columns."""
    robot = card.robot
    try:
        columns = Columns(card.embodiment, robot.relative, robot.state.form, robot.action.form)
    except CodecError as error:
        raise ConfigError(f"{where}: robot.{error}") from error
    if columns.is_relative and any(p.relative for p in robot.action.poses) and is_delta(robot.control):
        raise ConfigError(
            f"{where}: robot.action.poses: control is {robot.control!r}, so that actions are differences "
            f"already; {CONTROL_FIX}"
        )


def check(card: Card, where: str) -> None:
    """Raise ConfigError, beginning with `where`, if a value of the card is invalid in every layout."""
    robot = card.robot
    if not card.name.strip():
        raise ConfigError(f"{where}: name is empty; samples, weights and statistics go by it")
    for what, count in (("episodes", card.expect.episodes), ("frames", card.expect.frames)):
        if count < 0:
            raise ConfigError(f"{where}: expect.{what} must be 0 (not checked) or more, is {count}")
    for what, name in _names(card):
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ConfigError(
                f"{where}: {what} {_shortened(name)!r}: a name is one line without control "
                f"characters, of at most {LONGEST_NAME}"
            )
    if not robot.cameras:
        raise ConfigError(f"{where}: robot.cameras is empty; a policy needs at least one camera")
    names = [camera.name for camera in robot.cameras]
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ConfigError(f"{where}: cameras need names of their own, got {names}")
    for camera in robot.cameras:
        if not (1 <= camera.height <= LARGEST_SIDE and 1 <= camera.width <= LARGEST_SIDE):
            raise ConfigError(
                f"{where}: camera {camera.name!r} is {camera.height}x{camera.width} pixels; each side "
                f"must be from 1 to {LARGEST_SIDE}"
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
        if column.dimensions > 1 and len(column.labels) > len(set(column.labels)) == 1:
            raise ConfigError(
                f"{where}: robot.{name}.labels: all {column.dimensions} dimensions are named "
                f"{column.labels[0]!r}; give each a name of its own, or write a card without labels"
            )
        if any(abs(factor) < LEAST_SCALE for factor in column.scale):
            least = min(column.scale, key=abs)
            raise ConfigError(f"{where}: robot.{name}.scale holds {least:g}, which would erase a dimension")
        if column.low and column.high:
            for d, (low, high) in enumerate(zip(column.low, column.high, strict=True)):
                if low > high:
                    raise ConfigError(
                        f"{where}: robot.{name}: low {low:g} of dimension {d} is above its high {high:g}"
                    )
    if robot.relative and len(robot.relative) != robot.action.dimensions:
        raise ConfigError(
            f"{where}: robot.relative has {len(robot.relative)} entries for "
            f"{robot.action.dimensions} action dimensions"
        )
    beyond = [d for d, on in enumerate(robot.relative) if on and d >= robot.state.dimensions]
    if beyond:
        raise ConfigError(f"{where}: robot.relative: there is no state for action dimensions {beyond}")
    if pair := mispaired(robot.relative, card.embodiment):
        raise ConfigError(f"{where}: robot.relative: {pair.text}; {pair.fix}")
    _require_forms(card, where)
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
