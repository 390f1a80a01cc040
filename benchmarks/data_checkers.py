"""The damages of benchmarks.data_check: which `vlafit data check`, `rdq` and `lerobot-doctor` find.

    python3.12 -m venv .venv-checkers
    .venv-checkers/bin/pip install 'rdq[video]==0.3.4' lerobot-doctor==0.2.0
    python -m benchmarks.data_checkers --python .venv-checkers/bin/python --out checkers.jsonl
    python -m benchmarks.data_checkers --table checkers.jsonl

Each damage is in one of eight episodes of a LeRobot v3.0 folder (H.264, near lossless). All three tools read
the same folder: `vlafit data check` with pixels, `rdq check --video-full`, and `lerobot-doctor check`.
A tool finds a damage if its report has a finding that the report on the undamaged folder has not. Percentages
and decimals in messages do not count; nor do findings that a tool calls information.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path

from benchmarks import rows
from benchmarks.data_check import DAMAGES, _clean, damaged
from benchmarks.rows import Row
from tests.datasets.arm_recordings import Recording
from vlafit.datasets import EpisodeStore, open_dataset
from vlafit.datasets.checks import check_store
from vlafit.datasets.convert.lerobot import write_lerobot
from vlafit.errors import VlafitError

TOOLS = ("vlafit", "rdq", "lerobot-doctor")
SEVERITIES = ("slight", "middle", "severe")

PEERS = """
import contextlib, io, json, sys, traceback

def rdq(path):
    from rdq.cli import main
    with contextlib.redirect_stdout(io.StringIO()):
        main(["check", path, "--video-full", "--no-color", "--json", path + ".json"])
    report = json.load(open(path + ".json"))["findings"]
    findings = [f for f in report if f["severity"] != "info"]
    return [[f["check"], f["severity"], f"{f['message']} {f['episodes']}"] for f in findings]

def doctor(path):
    from lerobot_doctor.dataset_loader import load_dataset
    from lerobot_doctor.report import report_to_json
    from lerobot_doctor.runner import run_checks
    report = json.loads(report_to_json(run_checks(load_dataset(path))))
    return [[c["name"], m["severity"], m["message"]] for c in report["checks"] for m in c["messages"]
            if m["severity"] != "PASS"]

for line in sys.stdin:
    answer = {}
    for name, check in (("rdq", rdq), ("lerobot-doctor", doctor)):
        try:
            answer[name] = check(line.strip())
        except BaseException as error:
            answer[name] = [["crash", "crash", type(error).__name__]]
    print("ANSWER" + json.dumps(answer), flush=True)
"""
"""Run by the tools' own Python: a folder a line, answered by the findings of both."""


def findings_of_vlafit(folder: Path) -> list[list[str]]:
    """Return check, severity and message of each finding; a folder that is refused is one."""
    try:
        findings = check_store(open_dataset(str(folder))).findings
    except VlafitError as error:
        return [["refused", "error", str(error).replace(str(folder), "")]]
    return [[f.kind, f.severity, f"{f.message} {f.episode}"] for f in findings]


class Peers:
    """The process of the other tools."""

    def __init__(self, python: str) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([python, "-c", PEERS], stdin=pipe, stdout=pipe, text=True)

    def findings(self, folder: Path) -> Mapping[str, list[list[str]]]:
        """Return the findings of each tool."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(folder, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        raise RuntimeError(f"the other tools ended with status {self._process.wait()}")


def written(store: EpisodeStore, folder: Path) -> Path:
    """Write the recordings as LeRobot v3.0, without reading them back, as damages may forbid it."""
    folder.mkdir()
    write_lerobot(store, folder, "h264", lambda frames: None)
    return folder


def plain(finding: list[str]) -> tuple[str, ...]:
    """Return a finding without the percentages and decimals of its message."""
    return tuple(re.sub(r"\d*\.\d+|\d+ ?%", "#", part) for part in finding)


def measured(python: str, only: str, levels: list[int], out: Path | None) -> list[Row]:
    """Return a row for each damage and severity: the kinds of new findings, by tool."""
    peers, taken = Peers(python), []
    with tempfile.TemporaryDirectory() as name:
        folder = written(Recording(list(_clean(0))), Path(name) / "clean")
        clean = {"vlafit": findings_of_vlafit(folder), **peers.findings(folder)}
        taken.append({"damage": "", "severity": "", **{tool: clean[tool] for tool in TOOLS}})
        rows.write(taken[0], out)
        known = {tool: {plain(finding) for finding in clean[tool]} for tool in TOOLS}
        for number, (level, damage) in enumerate((n, d) for n in levels for d in DAMAGES if only in d):
            folder = written(damaged(damage, level, 0), Path(name) / f"set_{number}")
            findings = {"vlafit": findings_of_vlafit(folder), **peers.findings(folder)}
            new = {tool: [f for f in findings[tool] if plain(f) not in known[tool]] for tool in TOOLS}
            row = {"damage": damage, "severity": SEVERITIES[level], "size": DAMAGES[damage][1][level], **new}
            rows.write(row, out)
            taken.append(row)
    return taken


def table(taken: list[Row]) -> str:
    """Return the table, Markdown: the severities that each tool finds, and by what."""
    clean, *damages = taken
    severities = [s for s in SEVERITIES if any(row["severity"] == s for row in damages)]
    lines: dict[str, Row] = {}
    counts = dict.fromkeys(TOOLS, 0)
    for row in damages:
        line = lines.setdefault(row["damage"], {"damage": row["damage"], **{tool: [] for tool in TOOLS}})
        for tool in TOOLS:
            if row[tool]:
                line[tool].append(row["severity"])
                counts[tool] += 1
    for line in lines.values():
        for tool in TOOLS:
            line[tool] = _severities(line[tool], severities)
    total = len(damages)
    end = "; ".join(
        f"{tool} {counts[tool]} of {total}, {len(clean[tool])} on the clean folder" for tool in TOOLS
    )
    return f"{rows.table(list(lines.values()), ('damage', *TOOLS))}\n\nFound: {end}."


def _severities(severities: list[str], every: list[str]) -> str:
    if len(severities) == len(every):
        return "yes"
    return ", ".join(name for name in every if name in severities) or "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that has rdq and lerobot-doctor"
    )
    parser.add_argument("--only", default="", help="damages with this word in their name")
    parser.add_argument("--severities", nargs="+", default=list(SEVERITIES), choices=SEVERITIES)
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    parser.add_argument("--table", type=Path, help="print the table of an earlier run's file, and end")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return 0
    levels = [SEVERITIES.index(name) for name in options.severities]
    print(table(measured(options.python, options.only, levels, options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
