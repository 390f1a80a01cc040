"""Pages on phones and screens: measured in headless Chromium where it is installed, else by structure."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.browser import Browser, browser, program
from tests.report.pages import write_pages
from vlafit.report.markup import wide_table

PHONE, TABLET, LAPTOP, DESKTOP = 390, 768, 1200, 1400  # CSS pixels
READABLE = 11  # CSS pixels
KINDS = ("run", "offline", "compare", "sweep", "findings")
VOID = ("meta", "br", "img", "input")
needs_chromium = pytest.mark.skipif(program() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind; tests only read them."""
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = program()
    assert executable is not None
    with browser(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@needs_chromium
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_its_window_its_tables_their_boxes_and_its_labels_side_by_side(
    pages: dict[str, Path], tab: Browser, kind: str
) -> None:
    tab.open(pages[kind])
    for width in (PHONE, TABLET, LAPTOP, DESKTOP):
        tab.resize(width)
        measured = tab.measure()
        assert measured.window == width and measured.errors == []
        assert measured.page <= width, f"{width} px: the page itself scrolls sideways"
        assert measured.tables and all(table["boxed"] for table in measured.tables)
        if width >= LAPTOP:
            cut = [table for table in measured.tables if table["table"] > table["box"]]
            assert not cut, f"{width} px: tables that are cut"
        assert measured.overlaps == [], f"{width} px: labels that overlap"
        if width <= TABLET and measured.smallest is not None:
            assert measured.smallest >= READABLE, f"{width} px: labels too small to read"


@needs_chromium
def test_a_page_that_is_too_wide_is_seen_to_be(tab: Browser, tmp_path: Path) -> None:
    text = '<div style="width: 700px">wide</div><table><tr><td>no box</td></tr></table>'
    labels = '<svg width="90" height="40"><text y="29">one</text><text y="29">two</text></svg>'
    script = "<script>console.error('a'); undefined_function()</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{text}{labels}{script}</body>")
    tab.open(tmp_path / "page.html")
    tab.resize(PHONE)
    measured = tab.measure()
    assert measured.page >= 700 and not measured.tables[0]["boxed"]
    assert measured.overlaps == [["one", "two"]] and len(measured.errors) == 2


class Tables(HTMLParser):
    """Collects the class of each table's parent, and the attributes that fix a width."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parents: list[str] = []
        self.fixed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag == "table":
            self.parents.append(self.open[-1])
        if "svg" not in self.open and (values.get("width") or "px" in values.get("style", "")):
            self.fixed.append(f"{tag} {values}")
        if tag not in VOID:
            self.open.append("svg" if tag == "svg" or "svg" in self.open else values.get("class", ""))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_is_in_a_box_that_scrolls_and_nothing_has_a_fixed_width(
    pages: dict[str, Path], kind: str
) -> None:
    text = pages[kind].read_text(encoding="utf-8")
    parser = Tables()
    parser.feed(text)
    assert parser.parents and set(parser.parents) == {"scroll"}
    assert parser.fixed == [] and 'content="width=device-width, initial-scale=1"' in text
    assert ".scroll { overflow-x: auto; }" in text and "overflow-wrap: break-word" in text


def test_a_table_of_many_columns_becomes_several_that_share_the_first() -> None:
    heads = ["name", *(f"task {i}" for i in range(20))]
    html = wide_table(heads, [["full", *range(20)]], [""] * 21, at_most=10).html
    assert html.count("<table>") == 3 and html.count("<th>name</th>") == html.count("<td>full</td>") == 3
    assert all(html.count(f"<th>task {i}</th>") == html.count(f"<td>{i}</td>") == 1 for i in range(20))
    assert wide_table(heads[:10], [], [""] * 10).html.count("<table>") == 1
