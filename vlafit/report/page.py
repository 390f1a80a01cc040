"""Write the page of a run from its `Facts`, as one self-contained HTML text.

Styles, curves, film strips and videos are all inside the text: no script, font or picture is loaded.
"""

from vlafit.report import markup, training_data
from vlafit.report.facts import AFTER, BEFORE, OFFLINE, Facts, verdict
from vlafit.report.markup import Raw, count, duration, folded, join, muted, percent, section, table, tag
from vlafit.report.offline import summary
from vlafit.report.sections import (
    agreement,
    curves,
    episodes,
    memory,
    probe,
    shown,
    tasks,
    title,
    tone,
    tuning,
)

FOOTER = (
    "report.json, next to this page, holds the same facts. Intervals are 95 % Wilson intervals; an episode "
    "with an environment error counts neither as success nor as failure."
)


def page(facts: Facts) -> str:
    """Return the whole page."""
    body = join(
        [
            _header(facts),
            _headline(facts),
            markup.notices(markup.CAVEATS, facts.caveats),
            markup.notices(markup.MISSING, facts.missing),
            *(summary(result, facts.folder / OFFLINE / name) for name, result in facts.offline.items()),
            tasks(facts),
            _training_data(facts),
            probe(facts),
            episodes(facts),
            curves(facts),
            memory(facts),
            tuning(facts),
            agreement(facts),
            _commands(facts),
            _provenance(facts),
            tag("footer", f"Written by vlafit from {facts.folder}. {FOOTER}"),
        ]
    )
    return markup.document(facts.recipe.name, body)


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
        trained = max(stage.trainable_parameters for stage, start in facts.stages if start or not stage.stage)
        items.append(("trained parameters", f"{count(trained)} of {count(plan.parameters)}"))
    items.append(("started from", policy.checkpoint or f"an untrained {policy.size or policy.family}"))
    if policy.fresh:
        items.append(("fresh weights", ", ".join(policy.fresh)))
    if run.get("device"):
        items.append(("device", str(run["device"])))
    if run.get("processes", 1) != 1:
        items.append(("processes", str(run["processes"])))
    return markup.header("vlafit run", facts.recipe.name, facts.recipe.purpose, items)


def _headline(facts: Facts) -> Raw:
    evaluations = shown(facts)
    if not evaluations:
        return Raw("")
    by_name = {evaluation.name: evaluation.overall for evaluation in evaluations}
    if BEFORE in by_name and AFTER in by_name:
        big = [
            tag("span", percent(by_name[BEFORE]), class_="before"),
            tag("span", "→", class_="arrow"),
            tag("span", percent(by_name[AFTER]), class_="after"),
            tag("span", "success", class_="unit"),
        ]
    else:
        first = evaluations[0]
        unit = "success" if first.name == AFTER else f"success, {title(first)}"
        big = [tag("span", percent(first.overall), class_="after"), tag("span", unit, class_="unit")]
    rows = [
        cell
        for evaluation in evaluations
        for cell in markup.rate_row(title(evaluation).capitalize(), evaluation.overall, tone(evaluation))
    ]
    protocol = str(evaluations[0].protocol.get("name", "?"))
    renderer = evaluations[0].renderer or "camera"
    unseen = ", from starts that no demonstration has" if facts.run.get("seeds_known") else ""
    return tag(
        "section",
        tag("div", *big, class_="headline"),
        tag(
            "p",
            "Closed-loop success under protocol ",
            tag("b", protocol),
            f": episodes in simulation (images: {renderer}){unseen}. ",
            verdict(facts.success()),
            class_="muted",
        ),
        tag("div", *rows, class_="rates"),
        class_="card",
        aria_label="result",
    )


def _commands(facts: Facts) -> Raw:
    lines = [
        join([tag("p", muted(purpose.capitalize())), tag("pre", command)])
        for purpose, command in facts.commands()
    ]
    load_report = str(facts.run.get("load_report") or "")
    return section(
        "Commands",
        *lines,
        folded("The resolved recipe", tag("pre", facts.recipe_toml)),
        folded("How the weights were loaded", tag("pre", load_report)) if load_report else "",
    )


def _training_data(facts: Facts) -> Raw:
    """Return the section about the training data; where its file is damaged, a sentence."""
    try:
        return training_data.show(facts.folder, facts.data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # it only documents
        return section("Training data", tag("p", muted(f"data/summary.json is damaged ({error!r}).")))


def _provenance(facts: Facts) -> Raw:
    run = facts.run
    keys = ("started", "ended", "resumed_from", "commit", "threads", "cpus")
    items = [(key.replace("_", " "), str(run[key])) for key in keys if run.get(key)]
    versions = dict(run["versions"]) if isinstance(run.get("versions"), dict) else {}
    hashes = list(facts.hashes.items())
    for evaluation in facts.evaluations.values():
        versions |= evaluation.versions
        hashes.append((f"eval/{evaluation.name}: protocol", evaluation.protocol_sha256))
        hashes.append((f"eval/{evaluation.name}: policy", evaluation.actor))
    items += sorted((name, str(version)) for name, version in versions.items())
    machine = [tag("h3", "Versions and machine"), table([], items, ("", ""))] if items else []
    return section("Provenance", *machine, tag("h3", "SHA-256"), table([], hashes, ("", "hash")))
