"""Read the logged values of a run, for its report. A damaged line is left out, and said."""

from dataclasses import dataclass
from pathlib import Path

from vlafit.files import parse_json, plain_bytes

LARGEST = 3e38  # about that of float32, in which training computes; matplotlib fails near that of float64


@dataclass(frozen=True)
class Point:
    """One logged value. `time_s` is training time without evaluations; None if it was not logged."""

    step: int
    time_s: float | None
    value: float


def read_metrics(path: Path) -> tuple[dict[str, tuple[Point, ...]], list[str]]:
    """Return the points of each name in a metrics.jsonl, and a sentence for each kind of value left out.

    A missing file gives none. Text after the last line break, which a crash cut off, is ignored.
    """
    by_name: dict[str, list[Point]] = {}
    not_finite: dict[str, int] = {}
    damaged: list[int] = []
    lines = plain_bytes(path).split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            event = parse_json(line.decode())
        except ValueError:  # UnicodeDecodeError is one
            event = None
        step = event.get("step") if isinstance(event, dict) else None
        if not isinstance(event, dict) or not isinstance(step, int):
            damaged.append(number)
            continue
        time_s = event.get("time_s")
        for name, value in event.items():
            if name in ("step", "time_s"):
                continue
            points = by_name.setdefault(name, [])
            if isinstance(value, int | float) and abs(value) <= LARGEST:
                points.append(Point(step, time_s if isinstance(time_s, int | float) else None, float(value)))
            else:
                not_finite[name] = not_finite.get(name, 0) + 1
    caveats = [
        f"{count} logged values of {name} were not finite, or beyond {LARGEST:g}, and are not drawn."
        for name, count in not_finite.items()
    ]
    if damaged:
        listed = ", ".join(map(str, damaged[:8])) + (", ..." if len(damaged) > 8 else "")
        caveats.append(f"{len(damaged)} lines of metrics.jsonl are damaged and left out (line {listed}).")
    return {name: tuple(points) for name, points in by_name.items()}, caveats
