"""Write the charts of a page as SVG files for papers: light colours, with title and legend, in one width.

A chart in a page takes its colours from the page; here they are filled in, so that LaTeX and Inkscape read
the files. Texts stay texts.
"""

import html
import re
from pathlib import Path

from vlafit import files
from vlafit.errors import VlafitError

CHART = re.compile(
    r'<figure class="chart[^"]*"><figcaption>(.*?)</figcaption>(<svg.*?</svg>)</figure>', re.DOTALL
)
BLOCK = re.compile(r":root \{(.*?)\}", re.DOTALL)
COLOUR = re.compile(r"--([\w-]+): (#[0-9a-fA-F]{6})")
LEGEND = re.compile(r'<div class="legend">(.*?)</div>', re.DOTALL)
ENTRY = re.compile(r'<span class="tone-([\w-]+)">(.*?)</span>')
VIEW_BOX = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
NAME = re.compile(r'\bid="([^"]*?)-figure_1"')
TITLE, LINE, FONT = 18.0, 13.0, "Helvetica, Arial, sans-serif"  # points


def write_figures(page: str, folder: Path) -> list[Path]:
    """Write the charts of a page's HTML into a folder, and return their paths.

    Raises VlafitError if the page has none.
    """
    charts = CHART.findall(page)
    if not charts:
        raise VlafitError("the page has no charts to write; nothing was logged or evaluated yet")
    colours = light_colours(page)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for caption, svg in charts:
        name = NAME.search(svg)
        assert name is not None, "matplotlib names its figure"
        drawn = [(tone, text) for tone, text in _legend(page) if f"var(--{tone})" in svg]
        texts = {_text(text) for text in re.findall(r"<text.*?</text>", svg, re.DOTALL)}
        labelled = texts.issuperset(text for _, text in drawn)  # beside its points
        title, _, unit = caption.partition("<span>")
        path = folder / f"{name[1]}.svg"
        legend = [] if labelled else drawn
        files.write_atomic(path, standalone(svg, _text(title), _text(unit), legend, colours))
        paths.append(path)
    return paths


def light_colours(page: str) -> dict[str, str]:
    """Return the colours of a page by name, those for light paper."""
    colours: dict[str, str] = {}
    for block in BLOCK.findall(page):  # the dark ones repeat the names, later
        colours = {**dict(COLOUR.findall(block)), **colours}
    return colours


def standalone(
    svg: str, title: str, about: str, legend: list[tuple[str, str]], colours: dict[str, str]
) -> str:
    """Return an inline <svg> as a file of its own, with a title above and `legend` (colour, text) below.

    `about` says in the file, where readers of SVG show it, what is drawn.
    """
    size = VIEW_BOX.search(svg)
    assert size is not None, "matplotlib writes a viewBox"
    width, height = float(size[1]), float(size[2])
    inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    rows = [
        f'<rect x="6" y="{TITLE + height + LINE * i + 4:g}" width="14" height="4" fill="var(--{tone})"/>'
        f'<text x="26" y="{TITLE + height + LINE * i + 9:g}" font-size="9">{html.escape(text)}</text>'
        for i, (tone, text) in enumerate(legend)
    ]
    whole = TITLE + height + LINE * len(legend)
    text = "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width:g}pt" height="{whole:g}pt" viewBox="0 0 {width:g} {whole:g}" '
            f'font-family="{FONT}">',
            f"<desc>{html.escape(about)}</desc>",
            f'<text x="6" y="12" font-size="10" fill="var(--ink)">{html.escape(title)}</text>',
            f'<g transform="translate(0 {TITLE:g})">{inner}</g>',
            *rows,
            "</svg>\n",
        ]
    )
    text = text.replace("px inherit", f"px {FONT}").replace(' href="#', ' xlink:href="#')
    return re.sub(r"var\(--([\w-]+)\)", lambda match: colours[match[1]], text)


def _legend(page: str) -> list[tuple[str, str]]:
    block = LEGEND.search(page)
    return [(tone, _text(text)) for tone, text in ENTRY.findall(block[1])] if block else []


def _text(content: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", content)).strip()
