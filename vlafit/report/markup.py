"""Small pieces of HTML, and how numbers are written. All text from outside passes through `escape` here."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlafit.score import Score


@dataclass(frozen=True)
class Raw:
    """HTML that is ready: what is not wrapped in this is escaped."""

    html: str


Content = Raw | str | int | float


def escape(value: Content) -> str:
    """Return HTML for a text, a number, or what is HTML already."""
    return value.html if isinstance(value, Raw) else html.escape(str(value))


def join(parts: Iterable[Content]) -> Raw:
    """Put contents after one another."""
    return Raw("".join(escape(part) for part in parts))


def tag(name: str, *content: Content, **attributes: str) -> Raw:
    """Return an element. `class_` and `for_` stand for the attributes of those names."""
    written = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{html.escape(v)}"' for k, v in attributes.items() if v
    )
    return Raw(f"<{name}{written}>{join(content).html}</{name}>")


def muted(*content: Content) -> Raw:
    """Return small grey text."""
    return tag("span", *content, class_="muted small")


def section(title: str, *content: Content) -> Raw:
    """Return a section of the page."""
    return Raw(f"{tag('section', tag('h2', title), *content).html}\n")


def table(
    heads: Sequence[Content], rows: Iterable[Sequence[Content]], kinds: Sequence[str], total: bool = False
) -> Raw:
    """Return a table that scrolls sideways where it must. `kinds` are the columns' CSS classes."""
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


def figure(title: str, unit: str, svg: str, kind: str = "") -> Raw:
    """Return a chart with its caption."""
    caption = tag("figcaption", title, " ", tag("span", unit))
    return tag("figure", caption, Raw(svg), class_=f"chart {kind}".strip())


def folded(title: str, *content: Content) -> Raw:
    """Return content that opens at a click."""
    return tag("details", tag("summary", title), *content)


def percent(score: Score) -> str:
    """Return a success rate, or a dash where nothing was judged."""
    return "–" if score.rate is None else f"{100 * score.rate:.0f} %"


def interval(score: Score) -> str:
    """Return the ends of a score's 95 % interval."""
    low, high = score.interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def errors(score: Score) -> str:
    """Return the number of errors with a comma before it, or nothing."""
    return f", {score.errors} error{'s' if score.errors > 1 else ''}" if score.errors else ""


def bar(score: Score, tone: str) -> Raw:
    """Return a line from 0 to 100 % with the score as a dot on its interval."""
    low, high = (100 * end for end in score.interval)
    label = f"{percent(score)}, 95 % interval {interval(score)}"
    band = tag("span", class_="band", style=f"left:{low:.1f}%;width:{high - low:.1f}%")
    at = None if score.rate is None else f"left:{100 * score.rate:.1f}%"
    dot = tag("span", class_="dot", style=at) if at else ""
    return tag("span", band, dot, class_=f"bar tone-{tone}", role="img", aria_label=label, title=label)


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
