"""Show an offline evaluation: its own page, and the section of a run's page."""

import base64
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlafit import files
from vlafit.errors import VlafitError
from vlafit.files import plain_bytes
from vlafit.offline import read_checked
from vlafit.offline.strips import strip_file
from vlafit.report import markup, offline_charts
from vlafit.report.markup import Content, Raw, figure, folded, join, muted, section, table, tag
from vlafit.score import InvalidAnswers

PAGE = "report.html"
NAMES = {"policy": "the policy", "hold_still": "hold still", "mean_chunk": "mean chunk"}
SHOWN = {"policy": "the policy", "mean_of_draws": "mean of its draws", **NAMES}  # in the box of results
TONES = {"policy": "after", "mean_of_draws": "other", "hold_still": "before", "mean_chunk": "wrong"}
UNIT = "mean absolute error, in standard deviations of each joint"
FOOTER = (
    "result.json, next to this page, holds every number and every sample; samples/ holds every chunk. "
    "Intervals are 95 % (Student's t over episodes, each of which counts once). A small error is not "
    "success: on a robot, errors add up."
)
Result = Mapping[str, Any]
log = logging.getLogger(__name__)


def build(folder: Path) -> Path:
    """Write report.html into the folder of a finished offline evaluation; return its path."""
    folder = Path(folder)
    result = read_checked(folder)
    files.write_atomic(folder / PAGE, page(result, folder))
    return folder / PAGE


def page(result: Result, folder: Path) -> str:
    """Return the page of an offline evaluation."""
    settings = result["settings"]
    items = [
        ("dataset", result["dataset"]),
        ("robot", result["robot"]),
        ("episodes", str(len(result["episodes"]))),
        ("observations", str(result["observations"])),
        ("draws of noise", str(settings["draws"])),
        ("chunk", f"{result['chunk']} steps{_seconds(result)}"),
    ]
    title = f"{result['dataset']}: predicted against recorded"
    settings_line = f"{result['chosen']} Measured over {measured_over(result)}."
    body = join(
        [
            markup.header("vlafit eval --data", title, settings_line, items),
            headline(result),
            markup.notices(markup.CAVEATS, result["notices"]),
            details(result, folder),
            section("Policy", table([], [("policy", result["actor"])], ("", "hash"))),
            tag("footer", f"Written by vlafit. {FOOTER}"),
        ]
    )
    return markup.document(title, body)


def summary(result: Result, folder: Path) -> Raw:
    """Return the section of a run's page."""
    return section(
        "Held-out episodes: predicted against recorded",
        tag("p", muted(f"{result['chosen']} Measured over {measured_over(result)}.")),
        headline(result),
        *(tag("p", muted(notice)) for notice in result["notices"]),
        details(result, folder, inner=True),
    )


def measured_over(result: Result) -> str:
    """Return what the errors are means over; of a result of an earlier version, what it holds."""
    earlier = f"{result['observations']} observations, {result['draws']} draws each"
    return result.get("measured_over") or earlier


def verdict(result: Result) -> str:
    """Return what the comparison with the baselines shows, in a sentence for each."""
    sentences = []
    for who, compared in result["compared"].items():
        if compared is None:
            sentences.append(f"The baseline “{NAMES[who]}” is {result[who]}." if who == "hold_still" else "")
            continue
        share = f"it is nearer at {100 * compared['better_at']:.0f} % of the observations"
        words = {"beats": "The policy beats", "does not beat": "The policy does not beat"}
        what = "One episode" if compared["difference"]["low"] is None else "The interval"
        start = words.get(compared["verdict"], f"{what} does not show whether the policy beats")
        sentences.append(f"{start} “{NAMES[who]}”: {share}.")
    if (invalid := InvalidAnswers.of(result)) is not None:
        sentences.append(f"{invalid}{'; these never count as nearer' if invalid.invalid else ''}.")
    return " ".join(filter(None, sentences))


def headline(result: Result) -> Raw:
    """Return the box with the errors of policy and baselines."""
    single = {"mean_of_draws"} if result["calibration"]["deterministic"] else set()
    overall = {who: result["overall"][who] for who in SHOWN if who not in single and result["overall"][who]}
    largest = max(_high(mean) for mean in overall.values()) or 1.0
    rows = [
        cell
        for who, mean in overall.items()
        for cell in (
            tag("span", SHOWN[who].capitalize()),
            _bar(mean, largest, TONES[who]),
            tag("span", f"{mean['value']:.3f} ", muted(_interval(mean)), class_="nowrap"),
        )
    ]
    return tag(
        "section",
        tag("p", tag("b", verdict(result))),
        tag(
            "p",
            f"{UNIT.capitalize()}; less is better. A robot executes one draw: where the mean of the draws is "
            "much better, the difference is noise of sampling.",
            class_="muted",
        ),
        tag("div", *rows, class_="rates"),
        class_="card",
        aria_label="offline result",
    )


def details(result: Result, folder: Path, inner: bool = False) -> Raw:
    """Return curves, tables and films; `inner` within another section, so under smaller headings."""

    def part(title: str, *content: Content) -> Raw:
        return join([tag("h3", title), *content]) if inner else section(title, *content)

    charts = [
        figure("Error along the chunk", UNIT, offline_charts.by_step(result)),
        figure(
            "Rank of the recorded action", "among the draws; level: calibrated", offline_charts.ranks(result)
        ),
    ]
    parts = [
        part("How far ahead it can see", tag("div", *charts, class_="charts")),
        part("Does it look?", *_sensitivity(result)),
        part("Is its spread honest?", _calibration(result)),
        part("Joints", *_joints(result)),
        part("Episodes", *_episodes(result, folder)),
    ]
    return join(parts)


def _sensitivity(result: Result) -> list[Content]:
    rows = []
    unread = ", ".join(result.get("not_read", ()))
    more = [tag("p", muted(f"The policy does not read: {unread}."))] if unread else []
    for one in result["sensitivity"]:
        words = "ignored: the answer is the same" if one["ignored"] else ""
        rows.append((one["input"], _mean(one["change"]), _mean(one["error_change"]), words))
    if not rows:
        return [tag("p", muted("Not measured.")), *more]
    text = (
        "One input is blanked at a time (grey picture, mean state, an instruction that says nothing), under "
        "the same noise. An answer that hardly changes does not depend on that input."
    )
    heads = ("blanked", "change of the answer", "change of the error", "")
    return [tag("p", text, class_="muted"), table(heads, rows, ("", "number", "number", "")), *more]


def _calibration(result: Result) -> Raw:
    calibration = result["calibration"]
    if calibration["deterministic"]:
        return tag("p", "Every draw of noise gives the same chunk: the policy is deterministic.")
    inside, expected = calibration["inside"], calibration["inside_expected"]
    ratio = calibration["spread_to_error"]
    judged = "" if ratio is None else (
        f" Its spread is {ratio:.2f} times what its error calls for (1: honest, less: too sure of itself)."
    )  # fmt: skip
    return tag(
        "p",
        f"{100 * inside['value']:.0f} % of the recorded actions lie within the {result['draws']} draws; "
        f"{100 * expected:.0f} % would, if the draws were like the recordings.{judged}",
    )


def _joints(result: Result) -> list[Content]:
    baselines = [who for who in ("hold_still", "mean_chunk") if result["overall"][who] is not None]
    invalid = InvalidAnswers.of(result)
    judged = invalid is None or not invalid.invalid  # else an error may be that of what is executed instead
    unit = next((joint["unit"] for joint in result["joints"] if joint["unit"]), "")
    heads = [
        "joint",
        "policy",
        "95 %",
        *(NAMES[who] for who in baselines),
        "spread",
        "to error",
        "within the draws",
    ]
    kinds = ["", *("number" for _ in heads[1:])]
    rows: list[list[Content]] = []
    for joint in result["joints"]:
        best = min([joint[who]["value"] for who in baselines if joint[who]], default=None)
        value = joint["policy"]["value"]
        chip = "" if best is None or not joint["moves"] else "good" if value < best else "bad"
        chip = chip if judged or chip == "bad" else ""
        rows.append(
            [
                join([joint["name"], "" if joint["moves"] else muted(" does not move")]),
                tag("span", f"{value:.4g}", class_=chip),
                muted(_interval(joint["policy"], "")),
                *("–" if joint[who] is None else f"{joint[who]['value']:.4g}" for who in baselines),
                "–" if joint["spread"] is None else f"{joint['spread']:.3g}",
                "–" if joint.get("spread_to_error") is None else f"{joint['spread_to_error']:.2f}",
                "–" if joint["inside"] is None else f"{100 * joint['inside']:.0f} %",
            ]
        )
    text = (
        f"Mean absolute error in the actions' own units{f' ({unit})' if unit else ''}, over the whole chunk. "
        "Spread is that of the draws; to error: 1 is honest, less is too sure of itself."
    )
    return [tag("p", text, class_="muted"), table(heads, rows, kinds)]


def _episodes(result: Result, folder: Path) -> list[Content]:
    parts: list[Content] = []
    for identity in result["episodes"]:
        path = strip_file(folder, identity)
        if not path.is_file():
            continue
        parts.append(tag("h3", identity))
        try:
            data = base64.b64encode(plain_bytes(path)).decode()
            curves = offline_charts.joints(result, folder, identity)
        except (OSError, VlafitError) as error:
            log.warning("%s: episode %s is left out of the page (%s)", folder, identity, error)
            continue
        parts.append(Raw(f'<img class="strip" alt="film strip of {markup.escape(identity)}" '
                         f'src="data:image/png;base64,{data}">'))  # fmt: skip
        shown, rest = curves[: offline_charts.FIRST], curves[offline_charts.FIRST :]
        parts.append(tag("div", *shown, class_="charts"))
        if rest:
            parts.append(folded(f"{len(rest)} more joints", tag("div", *rest, class_="charts")))
    if not parts:
        return [tag("p", muted("No film strips were drawn."))]
    legend = (
        "Grey: recorded. Colour: predicted chunks, the mean of the draws and their range. Joints that move "
        "most come first."
    )
    rows = [
        (e["episode"], *("–" if e[who] is None else f"{e[who]:.3f}" for who in NAMES))
        for e in result["by_episode"]
    ]
    heads = ("episode", *NAMES.values())
    every = folded("Error of every episode", table(heads, rows, ("", "number", "number", "number")))
    return [tag("p", legend, class_="muted"), *parts, every]


def _bar(mean: Mapping[str, float | None], largest: float, tone: str) -> Raw:
    value = mean["value"] or 0.0
    low, high = (value if mean[end] is None else mean[end] for end in ("low", "high"))
    left, right = (100 * min(max(end or 0.0, 0.0) / largest, 1.0) for end in (low, high))
    band = tag("span", class_="band", style=f"left:{left:.1f}%;width:{right - left:.1f}%")
    dot = tag("span", class_="dot", style=f"left:{100 * value / largest:.1f}%")
    label = f"{value:.3f} {_interval(mean)}"
    return tag("span", band, dot, class_=f"bar tone-{tone}", role="img", aria_label=label, title=label)


def _high(mean: Mapping[str, float | None]) -> float:
    return max(mean["value"] or 0.0, mean["high"] or 0.0)


def _interval(mean: Mapping[str, float | None], none: str = "no interval") -> str:
    if mean["low"] is None or mean["high"] is None:
        return none
    return f"95 %: {mean['low']:.3g} to {mean['high']:.3g}"


def _mean(mean: Mapping[str, float | None] | None) -> Content:
    return "–" if mean is None else join([f"{mean['value']:.3f} ", muted(_interval(mean, ""))])


def _seconds(result: Result) -> str:
    return f", {result['chunk'] / result['hz']:.2g} s" if result["hz"] else ""
