"""Links between the documents lead to files and headings that exist, and the site has every page."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md") if p.name[0] != "_")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "eval/README.md", *PAGES]
LINK = re.compile(r"\]\((?!\w+:)([^)\s]*)\)")


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as mkdocs and GitHub both make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+?) *$", prose, flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken(document: str, text: str) -> list[str]:
    """Return the links of the text, as part of this document, that lead nowhere."""
    lost = []
    for link in LINK.findall(without_code(text)):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists():
            lost.append(link)
        elif anchor:
            there = target.read_text(encoding="utf-8") if path else text
            if anchor not in anchors(there):
                lost.append(link)
    return lost


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_to_a_file_and_its_heading(document: str):
    assert broken(document, (ROOT / document).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", PAGES)
def test_a_page_of_the_site_links_only_to_pages_of_the_site(document: str):
    text = without_code((ROOT / document).read_text(encoding="utf-8"))
    outside = [link for link in LINK.findall(text) if link.startswith(("..", "/"))]
    assert outside == []  # mkdocs publishes only docs/


def test_a_broken_link_and_a_broken_anchor_are_noticed():
    text = (
        "# Two words\n[a](LICENSE) [b](gone.md) [c](#two-words) [d](#three) `[e](no-link)` [f](https://x.y)\n"
    )
    assert broken("README.md", text) == ["gone.md", "#three"]


def test_the_navigation_of_the_site_names_every_page_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [f"docs/{page}" for entry in site["nav"] for page in entry.values()]
    assert sorted(named) == PAGES
