"""The page of a run: `Facts` in, one self-contained HTML text out. It shows facts and computes none.

No script, no font, no picture from elsewhere: styles, curves, film strips and videos are all inside the text.
"""

from importlib import resources

from vlafit.report.facts import AFTER, BEFORE, Facts, verdict
from vlafit.report.markup import (
    Raw,
    bar,
    count,
    duration,
    errors,
    escape,
    folded,
    interval,
    join,
    muted,
    percent,
    section,
    table,
    tag,
)
from vlafit.report.sections import curves, episodes, probe, shown, tasks, title, tone, tuning

FOOTER = (
    "report.json beside this page holds the same facts. Intervals are 95 % Wilson intervals; an episode "
    "whose environment broke counts neither as success nor as failure."
)


def page(facts: Facts) -> str:
    """Return the whole page."""
    body = join(
        [
            _header(facts),
            _headline(facts),
            notices("Before you believe these numbers", facts.caveats),
            notices("Missing from this page", facts.missing),
            tasks(facts),
            probe(facts),
            episodes(facts),
            curves(facts),
            tuning(facts),
            _commands(facts),
            _provenance(facts),
            tag("footer", f"Written by vlafit from {facts.folder}. {FOOTER}"),
        ]
    )
    return document(facts.recipe.name, body)


def document(title: str, body: Raw, style: str = "") -> str:
    """Return a whole page: `body` in vlafit's style, to which `style` adds."""
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


def _header(facts: Facts) -> Raw:
    run, plan, policy = facts.run, facts.plan, facts.recipe.policy
    items = [
        ("state", "finished" if facts.finished else "unfinished"),
        ("optimiser steps", f"{facts.steps} of {facts.recipe.train.steps}"),
    ]
    if facts.train_seconds is not None:
        items.append(("training", duration(facts.train_seconds)))
    if isinstance(run.get("seconds"), int | float):
        items.append(("whole run", duration(run["seconds"])))
    items.append(("strategy", facts.recipe.strategy))
    if plan:
        items.append(
            ("trained parameters", f"{count(plan.trainable_parameters)} of {count(plan.parameters)}")
        )
    items.append(("started from", policy.checkpoint or f"an untrained {policy.size or policy.family}"))
    if policy.fresh:
        items.append(("fresh weights", ", ".join(policy.fresh)))
    if run.get("device"):
        items.append(("device", str(run["device"])))
    if run.get("processes", 1) != 1:
        items.append(("processes", str(run["processes"])))
    return tag(
        "header",
        tag("p", "vlafit run", class_="kind"),
        tag("h1", facts.recipe.name),
        tag("p", facts.recipe.purpose, class_="purpose") if facts.recipe.purpose else "",
        tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for what, value in items), class_="facts"),
    )


def _headline(facts: Facts) -> Raw:
    evaluations = shown(facts)
    if not evaluations:
        return Raw("")
    by_name = {one.name: one.overall for one in evaluations}
    if BEFORE in by_name and AFTER in by_name:
        big = [
            tag("span", percent(by_name[BEFORE]), class_="before"),
            tag("span", "→", class_="arrow"),
            tag("span", percent(by_name[AFTER]), class_="after"),
            tag("span", "success", class_="unit"),
        ]
    else:
        one = evaluations[0]
        said = "success" if one.name == AFTER else f"success, {title(one)}"
        big = [tag("span", percent(one.overall), class_="after"), tag("span", said, class_="unit")]
    rows = []
    for one in evaluations:
        counts = f"{one.overall.successes} of {one.overall.episodes} "
        ends = muted(f"95 %: {interval(one.overall)}{errors(one.overall)}")
        label = title(one).capitalize()
        rows += [tag("span", label), bar(one.overall, tone(one)), tag("span", counts, ends, class_="nowrap")]
    protocol = str(evaluations[0].protocol.get("name", "?"))
    pictures = evaluations[0].renderer or "camera"
    unseen = ", from starts that are in no demonstration" if facts.run.get("seeds_known") else ""
    return tag(
        "section",
        tag("div", *big, class_="headline"),
        tag(
            "p",
            "Closed-loop success under protocol ",
            tag("b", protocol),
            f": episodes in simulation ({pictures} pictures){unseen}. ",
            verdict(facts.success()),
            class_="muted",
        ),
        tag("div", *rows, class_="rates"),
        class_="card",
        aria_label="result",
    )


def notices(heading: str, lines: tuple[str, ...]) -> Raw:
    """Return a box of sentences that must be read first; nothing where there are none."""
    if not lines:
        return Raw("")
    return tag("div", tag("b", heading), tag("ul", *(tag("li", line) for line in lines)), class_="notice")


def _commands(facts: Facts) -> Raw:
    lines = [
        join([tag("p", muted(what.capitalize())), tag("pre", command)]) for what, command in facts.commands()
    ]
    load_report = str(facts.run.get("load_report") or "")
    return section(
        "Commands",
        *lines,
        folded("The resolved recipe", tag("pre", facts.recipe_toml)),
        folded("How the weights were loaded", tag("pre", load_report)) if load_report else "",
    )


def _provenance(facts: Facts) -> Raw:
    run = facts.run
    known = ("started", "ended", "resumed_from", "commit", "threads", "cpus")
    items = [(what.replace("_", " "), str(run[what])) for what in known if run.get(what)]
    versions = dict(run["versions"]) if isinstance(run.get("versions"), dict) else {}
    hashes = list(facts.hashes.items())
    for one in facts.evaluations.values():
        versions |= one.versions
        hashes.append((f"eval/{one.name}: protocol", one.protocol_sha256))
        hashes.append((f"eval/{one.name}: policy", one.actor))
    items += sorted((name, str(version)) for name, version in versions.items())
    about = [tag("h3", "Versions and machine"), table([], items, ("", ""))] if items else []
    return section("Provenance", *about, tag("h3", "SHA-256"), table([], hashes, ("", "hash")))
