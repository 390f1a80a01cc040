"""Place the labels of points in a chart so that none covers another, a point or its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin

DIRECTIONS = tuple((cos(angle * pi / 8), sin(angle * pi / 8)) for angle in (0, 8, 2, 6, 14, 10, 1, 7, 15, 9))
STEP, FARTHEST = 4.0, 400.0  # points, between a point and its label


@dataclass(frozen=True)
class Box:
    """A rectangle by its centre and size, in points."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: "Box") -> float:
        """Return the area that two boxes share."""
        wide = (self.width + other.width) / 2 - abs(self.x - other.x)
        high = (self.height + other.height) / 2 - abs(self.y - other.y)
        return max(wide, 0.0) * max(high, 0.0)

    def inside(self, frame: "Box") -> bool:
        """Whether the whole box is in a frame."""
        wide = abs(self.x - frame.x) + self.width / 2 <= frame.width / 2
        return wide and abs(self.y - frame.y) + self.height / 2 <= frame.height / 2


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
) -> list[Box]:
    """Return a box for the label of each anchor: the nearest free place, else the one that covers least."""
    placed: list[Box] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        best, least = Box(x, y, width, height), float("inf")
        distance = STEP
        while least > 0 and distance < FARTHEST:
            for right, up in DIRECTIONS:
                box = Box(x + right * (distance + width / 2), y + up * (distance + height / 2), width, height)
                if not box.inside(frame):
                    continue
                covered = sum(box.overlap(other) for other in (*placed, *obstacles))
                if covered < least:
                    best, least = box, covered
                if not covered:
                    break
            distance += STEP
        placed.append(best)
    return placed
