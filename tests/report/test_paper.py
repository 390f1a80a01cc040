"""Charts as SVG files for papers: whole files, with the light colours filled in and a legend."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.report.synthetic import write_run
from vlafit import report
from vlafit.cli.verbs.report import run as report_verb
from vlafit.compare import charts, stored
from vlafit.compare.page import page as compare_page
from vlafit.errors import VlafitError
from vlafit.report.paper import write_figures

PUBLISHED = Path(__file__).parents[2] / "eval" / "results" / "compare"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a comparison's charts by name."""
    paths = write_figures(compare_page(stored.read(PUBLISHED)), tmp_path_factory.mktemp("figures"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def test_every_chart_of_a_page_is_a_whole_svg_file_without_colours_of_the_page(
    compared: dict[str, str],
) -> None:
    assert len(compared) == 7 and {"success-memory", "loss-held-out-step"} <= set(compared)
    for text in compared.values():
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg" and root.get("width", "").endswith("pt")
        assert "var(--" not in text and "inherit" not in text
        used = set(re.findall(r"#[0-9a-f]{6}\b", text))
        assert used & {light for light, _ in charts.COLOURS} and not used & {
            dark for _, dark in charts.COLOURS
        }
        links = [value for e in root.iter() for key, value in e.attrib.items() if key.endswith("href")]
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert len(ids) == len(set(ids)) and all(link.removeprefix("#") in ids for link in links)


def test_a_legend_names_the_lines_where_the_chart_does_not(compared: dict[str, str]) -> None:
    names = [standing.strategy for standing in stored.read(PUBLISHED).standings]

    def texts(name: str) -> list[str]:
        return [(e.text or "").strip() for e in ElementTree.fromstring(compared[name]).iter(f"{SVG}text")]

    assert texts("loss-held-out-step")[0] == "Validation loss, held-out"
    assert texts("loss-held-out-step")[-len(names) :] == names
    labels = texts("success-memory")
    assert all(labels.count(name) == 1 for name in names)


def test_the_verb_writes_them_beside_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert report_verb([str(run), "--figures", str(tmp_path / "paper")]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == run / "report.html"
    assert sorted(printed[1:]) == sorted((tmp_path / "paper").iterdir()) and len(printed) > 3
    assert report.read_facts(run).recipe.name == "quickstart"


def test_a_page_without_charts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VlafitError, match="has no charts"):
        write_figures("<html></html>", tmp_path / "paper")
    assert not (tmp_path / "paper").exists()
