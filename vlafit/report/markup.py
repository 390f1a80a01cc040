"""Build HTML elements, pages and number formats. All text passes through `escape` here."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from vlafit.score import Score

CAVEATS, MISSING = "Before you use these numbers", "Missing from this page"  # headings of `notices`


@dataclass(frozen=True)
class Raw:
    """Finished HTML; any other content is escaped."""

    html: str


Content = Raw | str | int | float


def escape(value: Content) -> str:
    """Return the HTML of a text, a number or a Raw."""
    return value.html if isinstance(value, Raw) else html.escape(str(value))


def join(parts: Iterable[Content]) -> Raw:
    """Concatenate contents."""
    return Raw("".join(escape(part) for part in parts))


def tag(name: str, *content: Content, **attributes: str) -> Raw:
    """Return an element. `class_` and `for_` set the attributes `class` and `for`."""
    attributes_html = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{html.escape(v)}"' for k, v in attributes.items() if v
    )
    return Raw(f"<{name}{attributes_html}>{join(content).html}</{name}>")


def muted(*content: Content) -> Raw:
    """Return small grey text."""
    return tag("span", *content, class_="muted small")


def section(title: str, *content: Content) -> Raw:
    """Return a section of the page."""
    return Raw(f"{tag('section', tag('h2', title), *content).html}\n")


def table(
    heads: Sequence[Content], rows: Iterable[Sequence[Content]], kinds: Sequence[str], total: bool = False
) -> Raw:
    """Return a table that scrolls sideways if needed. `kinds` are the columns' CSS classes."""
    lines = list(rows)
    head = tag("tr", *(tag("th", h, class_=k) for h, k in zip(heads, kinds, strict=True))) if heads else ""
    body = [
        tag(
            "tr",
            *(tag("td", cell, class_=kind) for cell, kind in zip(line, kinds, strict=True)),
            class_="total" if total and i == len(lines) - 1 else "",
        )
        for i, line in enumerate(lines)
    ]
    return tag("div", tag("table", tag("thead", head) if heads else "", tag("tbody", *body)), class_="scroll")


def wide_table(
    heads: Sequence[Content], rows: Iterable[Sequence[Content]], kinds: Sequence[str], at_most: int = 10
) -> Raw:
    """Return a table, or where it has more than `at_most` columns several, which share the first column."""
    if len(heads) <= at_most:
        return table(heads, rows, kinds)
    lines = list(rows)
    count = -(-(len(heads) - 1) // (at_most - 1))
    size = -(-(len(heads) - 1) // count)
    parts = [slice(start, start + size) for start in range(1, len(heads), size)]
    return join(
        table([heads[0], *heads[part]], [[line[0], *line[part]] for line in lines], [kinds[0], *kinds[part]])
        for part in parts
    )


def figure(title: str, unit: str, svg: str, kind: str = "") -> Raw:
    """Return a chart with its caption."""
    caption = tag("figcaption", title, " ", tag("span", unit))
    return tag("figure", caption, Raw(svg), class_=f"chart {kind}".strip())


def folded(title: str, *content: Content) -> Raw:
    """Return content that opens on a click."""
    return tag("details", tag("summary", title), *content)


def percent(score: Score) -> str:
    """Return a success rate, or a dash if there is no valid episode."""
    return "–" if score.rate is None else f"{100 * score.rate:.0f} %"


def interval(score: Score) -> str:
    """Return the ends of a score's 95 % interval."""
    low, high = score.interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def errors(score: Score) -> str:
    """Return ", N errors", or "" without errors."""
    return f", {score.errors} error{'s' if score.errors > 1 else ''}" if score.errors else ""


def bar(score: Score, tone: str) -> Raw:
    """Return a bar from 0 to 100 % with the score as a dot on its interval."""
    low, high = (100 * end for end in score.interval)
    label = f"{percent(score)}, 95 % interval {interval(score)}"
    band = tag("span", class_="band", style=f"left:{low:.1f}%;width:{high - low:.1f}%")
    at = None if score.rate is None else f"left:{100 * score.rate:.1f}%"
    dot = tag("span", class_="dot", style=at) if at else ""
    return tag("span", band, dot, class_=f"bar tone-{tone}", role="img", aria_label=label, title=label)


def rate_cell(score: Score | None, tone: str) -> Raw:
    """Return a table cell with rate, counts and bar; empty without a score."""
    if score is None:
        return Raw("")
    counts = muted(f"{score.successes}/{score.episodes}{errors(score)}")
    return join([percent(score), " ", counts, bar(score, tone)])


def rate_row(label: str, score: Score, tone: str) -> list[Raw]:
    """Return the three cells of a row in the box of results: label, bar, counts with interval."""
    ends = muted(f"95 %: {interval(score)}{errors(score)}")
    counts = f"{score.successes} of {score.episodes} "
    return [tag("span", label), bar(score, tone), tag("span", counts, ends, class_="nowrap")]


def notices(heading: str, lines: Sequence[str]) -> Raw:
    """Return a box of sentences to read first; empty without sentences."""
    if not lines:
        return Raw("")
    return tag("div", tag("b", heading), tag("ul", *(tag("li", line) for line in lines)), class_="notice")


def header(command: str, name: str, purpose: str, items: Sequence[tuple[str, str]]) -> Raw:
    """Return a page's header: the command that made it, a name, a purpose, and (label, value) items."""
    return tag(
        "header",
        tag("p", command, class_="kind"),
        tag("h1", name),
        tag("p", purpose, class_="purpose") if purpose else "",
        tag(
            "dl", *(tag("div", tag("dt", label), tag("dd", value)) for label, value in items), class_="facts"
        ),
    )


def document(title: str, body: Raw, style: str = "") -> str:
    """Return a whole page: `body` in vlafit's style, to which `style` adds CSS."""
    shared = resources.files("vlafit.report").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · vlafit</title>",
            f"<style>\n{shared}{style}</style>",
            "</head>",
            f"<body>\n<main>\n{body.html}\n</main>\n</body>",
            "</html>\n",
        ]
    )


def count(number: float) -> str:
    """Return a number of parameters in three digits."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Return hours and minutes, or minutes and seconds."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
