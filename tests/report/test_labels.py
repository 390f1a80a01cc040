"""Labels of points are placed where they cover nothing."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from vlafit.report.labels import Box, place

FRAME = Box(200, 100, 400, 200)
PLACES = st.lists(st.tuples(st.floats(10, 390), st.floats(10, 190)), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(PLACES)
def test_no_label_covers_another_a_point_or_the_edge(anchors: list[tuple[float, float]]) -> None:
    points = [Box(x, y, 6, 6) for x, y in anchors]
    labels = place(anchors, [(60, 12)] * len(anchors), points, FRAME)
    assert len(labels) == len(anchors)
    assert all(label.inside(FRAME) for label in labels)
    assert not any(one.overlap(other) for one, other in combinations(labels, 2))
    assert not any(label.overlap(point) for label in labels for point in points)


def test_a_label_is_near_its_point_where_there_is_room() -> None:
    (label,) = place([(200, 100)], [(60, 12)], [Box(200, 100, 6, 6)], FRAME)
    assert label == Box(200 + 4 + 30, 100, 60, 12)


def test_where_there_is_no_room_the_label_covers_as_little_as_possible() -> None:
    (label,) = place([(50, 10)], [(60, 12)], [Box(50, 10, 100, 20)], Box(50, 10, 100, 20))
    assert label.inside(Box(50, 10, 100, 20))
