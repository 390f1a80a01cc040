"""Pictures of results: long instructions and titles stay within the picture."""

import pytest
from matplotlib.figure import Figure

from vlafit.report.picture import SMALLEST, fit_texts


@pytest.mark.parametrize("words", [10, 60])
def test_a_text_that_would_leave_the_picture_becomes_smaller_and_then_shorter(words: int) -> None:
    figure = Figure(figsize=(5, 3))
    axes = figure.add_subplot()
    axes.set_title(" ".join(["grasp it"] * words), loc="left", fontsize=9.5)
    figure.draw_without_rendering()
    title = next(text for text in figure.findobj() if getattr(text, "get_text", str)().startswith("grasp"))
    assert title.get_window_extent().x1 > figure.bbox.width, "it fits already: the test shows nothing"
    fit_texts(figure)
    assert title.get_window_extent().x1 <= figure.bbox.width
    assert SMALLEST <= title.get_fontsize() < 9.5
    assert title.get_text().endswith("…") == (words == 60)
