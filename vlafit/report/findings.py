"""Write the findings of a dataset check as a folder: a page, its pictures, and all findings as JSON."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from vlafit import files, locks
from vlafit.datasets.checks import Checked, Finding, NotTested, together
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import StorageError, command_line
from vlafit.report.finding_pictures import draw_finding
from vlafit.report.markup import Content, Raw, document, escape, header, join, muted, section, table, tag
from vlafit.rollout.video import write_png

PAGE, FACTS, PICTURES = "index.html", "findings.json", "pictures"
MOST_PICTURES = 12  # of one kind: the others look alike
NAMED = 5  # episodes of a kind that the summary names


def require_new(out: Path) -> Path:
    """Return the folder to write. Raises StorageError if something is there already."""
    out = files.expand_user(out).resolve()
    if out.exists() and (not out.is_dir() or not files.is_empty(out)):
        raise StorageError(f"{out}: already exists; name a new folder, or delete it")
    return out


def write_findings(
    store: EpisodeStore,
    path: str,
    checked: Checked,
    out: Path,
    *,
    frames: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the folder of a check of the dataset that the user calls `path`, and return its page.

    `frames` False draws curves only. `progress` is called with findings done and their number. The folder
    appears complete or not at all. Raises DataError where frames cannot be read, StorageError for an `out`
    that exists.
    """
    out, findings = require_new(out), checked.findings
    with locks.creating(out, "vlafit data check"):
        require_new(out)  # another process may just have created it
        with files.new_folder(out, new=True) as partial:
            drawn = _draw(store, findings, partial, frames, progress)
            listed = [
                dataclasses.asdict(finding) | {"picture": drawn.get(number)}
                for number, finding in enumerate(findings)
            ]
            facts = {**checked.facts(store.card.name), "findings": listed}
            files.write_atomic(partial / FACTS, json.dumps(facts, indent=2))
            files.write_atomic(partial / PAGE, page(store, path, checked, drawn))
    return out / PAGE


def _draw(
    store: EpisodeStore,
    findings: Sequence[Finding],
    folder: Path,
    frames: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[int, str]:
    """Write the pictures, and return their names by the findings' positions."""
    drawn: dict[int, str] = {}
    by_kind: Counter[str] = Counter()
    for number, finding in enumerate(findings):
        picture = None
        if by_kind[finding.kind] < MOST_PICTURES:
            picture = draw_finding(store, finding, sound_episode(store, findings, finding), frames=frames)
        if picture is not None:
            by_kind[finding.kind] += 1
            episode = re.sub(r"[^\w.-]+", "-", finding.episode or "all", flags=re.ASCII)[-80:]
            drawn[number] = f"{PICTURES}/{number + 1:03d}_{finding.kind}_{episode}.png"
            write_png(folder / drawn[number], picture)
        if progress is not None:
            progress(number + 1, len(findings))
    return drawn


def sound_episode(store: EpisodeStore, findings: Sequence[Finding], finding: Finding) -> int | None:
    """Return an episode to compare a finding's with: one without findings, if possible of its instruction."""
    blamed = {other.episode for other in findings}
    sound = [number for number, info in enumerate(store.episodes) if info.id not in blamed]
    if not finding.episode:
        return None
    sentence = store.episodes[store.index(finding.episode)].instruction
    alike = [number for number in sound if store.episodes[number].instruction == sentence]
    return next(iter([*alike, *sound]), None)


def page(store: EpisodeStore, path: str, checked: Checked, drawn: dict[int, str]) -> str:
    """Return the HTML page of findings, grouped by kind, and of the tests that could not run."""
    findings = checked.findings
    frames = sum(info.length for info in store.episodes)
    items = [
        ("dataset", store.card.name),
        ("episodes", f"{len(store.episodes):,}"),
        ("steps", f"{frames:,}"),
        ("cameras", ", ".join(camera.name for camera in store.embodiment.cameras)),
        ("errors", str(_count(findings, "error"))),
        ("warnings", str(_count(findings, "warning"))),
    ]
    purpose = (
        "What opens without an error and would spoil training, each compared with the other episodes."
        if findings
        else "Nothing suspicious was found by the tests that could run."
    )
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    parts: list[Content] = [header("vlafit data check", store.card.name, purpose, items)]
    if kinds:
        parts.append(_summary(findings, kinds))
    for kind in kinds:
        some = [(number, finding) for number, finding in enumerate(findings) if finding.kind == kind]
        cards = [_card(path, finding, drawn.get(number)) for number, finding in some]
        undrawn = len(some) - sum(number in drawn for number, _ in some)
        note = f"{undrawn} of them without a picture." if 0 < undrawn < len(some) else ""
        parts.append(section(f"{kind.replace('_', ' ')} ({len(some)})", muted(note) if note else "", *cards))
    if checked.not_tested:
        parts.append(_not_tested(checked.not_tested))
    parts.append(tag("footer", f"Written by vlafit. {FACTS}, next to this page, holds every finding."))
    return document(f"{store.card.name}: dataset check", join(parts))


def _summary(findings: Sequence[Finding], kinds: Sequence[str]) -> Raw:
    rows = []
    for kind in kinds:
        some = [finding for finding in findings if finding.kind == kind]
        blamed = list(dict.fromkeys(finding.episode or "all episodes" for finding in some))
        more = f" and {len(blamed) - NAMED} more" if len(blamed) > NAMED else ""
        rows.append((kind.replace("_", " "), some[0].severity, len(some), ", ".join(blamed[:NAMED]) + more))
    heads = ("finding", "severity", "number", "episodes")
    return section("Summary", table(heads, rows, ("", "", "number", "name")))


def _not_tested(tests: Sequence[NotTested]) -> Raw:
    rows = [
        (names.replace("_", " "), test.where or "everything", test.reason, test.needs)
        for names, test in together(tests)
    ]
    return section("Not tested", table(("test", "on", "because", "it needs"), rows, ("name", "", "", "")))


def _card(path: str, finding: Finding, picture: str | None) -> Raw:
    at = "" if finding.step is None else f", step {finding.step}"
    view = ""
    if finding.episode:
        command = command_line("data", "view", path, "--episode", finding.episode, "--out", "view.png")
        view = tag("p", muted("The whole episode: "), tag("code", command))
    return tag(
        "div",
        tag("h3", f"{finding.severity}: {finding.episode or 'all episodes'}{at}"),
        tag("p", finding.message),
        tag("p", muted("Effect: "), finding.effect),
        tag("p", muted("Fix: "), finding.fix),
        _image(picture, f"{finding.kind} in {finding.episode or 'all episodes'}") if picture else "",
        view,
        class_=f"card finding {finding.severity}",
    )


def _image(path: str, label: str) -> Raw:
    return Raw(f'<img src="{escape(path)}" alt="{escape(label)}" loading="lazy">')


def _count(findings: Sequence[Finding], severity: str) -> int:
    return sum(finding.severity == severity for finding in findings)
