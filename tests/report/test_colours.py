"""Colours of the pages can be told apart by everybody, on light and dark paper."""

import re
from importlib import resources
from itertools import combinations

import numpy as np
import pytest

from vlafit.compare import charts
from vlafit.report import picture

# Linear RGB as colour blindness sees it: Machado, Oliveira and Fernandes 2009, severity 1.
SEEN = {
    "nobody": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                   (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                     (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
                   (0.004733, 0.691367, 0.303900)),
}  # fmt: skip
XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
ROLES = (("before", "after", "wrong"), ("good", "bad"), ("accent", "second"))
THEMES = ("light", "dark")


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = np.array(XYZ) @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(one: str, other: str, eye: str) -> float:
    """Return the CIELAB difference of two colours as an eye sees them; about 2 is just visible."""
    matrix = np.array(SEEN[eye])
    return float(np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other))))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2."""
    low, high = sorted(linear(colour) @ np.array(XYZ[1]) for colour in (one, other))
    return float((high + 0.05) / (low + 0.05))


def variables(theme: str) -> dict[str, str]:
    """Return the colours of a theme in page.css by name."""
    css = resources.files("vlafit.report").joinpath("page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[THEMES.index(theme)]))


@pytest.mark.parametrize("eye", SEEN)
@pytest.mark.parametrize("theme", THEMES)
def test_strategies_and_roles_are_told_apart_by_every_eye(theme: str, eye: str) -> None:
    strategies = [pair[THEMES.index(theme)] for pair in charts.COLOURS]
    assert min(difference(a, b, eye) for a, b in combinations(strategies, 2)) > 30
    colours = variables(theme)
    for roles in ROLES:
        for one, other in combinations(roles, 2):
            assert difference(colours[one], colours[other], eye) > 18, f"{one} and {other}"


@pytest.mark.parametrize("theme", THEMES)
def test_lines_and_text_stand_out_from_the_paper(theme: str) -> None:
    colours = variables(theme)
    drawn = [pair[THEMES.index(theme)] for pair in charts.COLOURS]
    drawn += [colours[role] for roles in ROLES for role in roles]
    assert min(contrast(colour, colours["card"]) for colour in drawn) >= 3  # WCAG 2.2, graphical objects
    assert (
        min(contrast(colours[name], colours["paper"]) for name in ("ink", "muted", "accent")) >= 4.5
    )  # text


def test_the_picture_has_the_colours_of_the_light_page() -> None:
    colours = variables("light")
    assert {"before": colours["before"], "after": colours["after"],
                               "wrong_instruction": colours["wrong"]} == picture.COLOURS  # fmt: skip


def test_strategies_beyond_the_colours_differ_by_line_and_by_the_shape_of_their_points() -> None:
    looks = [charts.look(index) for index in range(18)]
    assert len(set(looks)) == 18 and len({shape for _, _, shape in looks[:6]}) == 6
