"""What the documents name is there: links, files, verbs, recipes, strategies."""

import re
import shlex
from pathlib import Path

import pytest

from vlafit import shipped
from vlafit.cli import VERBS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"]


PUBLISHED = ROOT / "eval" / "results"  # made by runs: checked as soon as there is a picture


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file(name: str):
    links = [ROOT / link for link in re.findall(r"\]\(([^)#]+)\)", text_of(name)) if "://" not in link]
    if not any(PUBLISHED.rglob("*.png")):
        links = [link for link in links if not link.is_relative_to(PUBLISHED)]
    assert [link for link in links if not link.exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_in_code_type_is_there(name: str):
    paths = re.findall(r"`((?:vlafit|configs|data|eval|tests)/[\w./-]+)`", text_of(name))
    assert [path for path in paths if "foo" not in path and not (ROOT / path).exists()] == []


def test_the_tree_in_the_readme_is_that_of_the_package():
    tree = text_of("README.md").split("vlafit/              the verbs")[1].split("tests/ ")[0]
    named = {
        word.rstrip("/")
        for line in tree.splitlines()[1:]
        for word in re.findall(r"[\w]+(?:/|\.py)", line[:20])
    }
    named |= set(re.findall(r"\w+\.py", tree))
    there = {p.name for p in (ROOT / "vlafit").iterdir() if not p.name.startswith("_")}
    assert named == there


def test_the_commands_in_the_readme_name_what_ships():
    blocks = re.findall(r"```sh\n(.*?)```", text_of("README.md"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("vlafit ")]
    assert len(commands) >= 6
    for line in commands:
        _, verb, *words = shlex.split(line, comments=True)
        assert verb in VERBS
        for option, kind in (("--protocol", "protocol"), ("--strategy", "strategy"), ("--study", "study")):
            if option in words:
                assert words[words.index(option) + 1] in shipped.names(kind)
        kinds = {"record": "card", "inspect": "checkpoint"}
        kind = kinds.get(verb) or ("recipe" if verb in ("train", "compare", "sweep") else None)
        if kind and shipped.names(kind):  # a checkpoint ships once a run has made a good one
            assert words[0] in shipped.names(kind), line


@pytest.mark.sim
@pytest.mark.parametrize("number", [0, 1])
def test_the_python_in_the_readme_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("metaworld")
    blocks = re.findall(r"```python\n(.*?)```", text_of("README.md"), flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[number], f"README.md, block {number}", "exec"), {})


def test_every_shipped_strategy_is_in_the_changelog():
    assert [name for name in shipped.names("strategy") if f"`{name}`" not in text_of("CHANGELOG.md")] == []
