"""The page of a comparison: one self-contained HTML text. It shows what `summary` says, judging nothing."""

from collections.abc import Sequence
from typing import Any

from vlafit.compare import charts, summary
from vlafit.compare.arms import rate
from vlafit.compare.judge import AFTER, WRONG, Standing
from vlafit.compare.record import HELD_OUT
from vlafit.compare.run import Comparison
from vlafit.report.markup import (
    Content,
    Raw,
    bar,
    count,
    duration,
    errors,
    figure,
    folded,
    join,
    muted,
    percent,
    section,
    table,
    tag,
)
from vlafit.report.page import document, notices
from vlafit.score import Score

FOOTER = (
    "compare.json beside this page holds the same facts, and every arm whole. Intervals are 95 % Wilson "
    "intervals over the episodes of all seeds, widened where seeds differ by more than chance; strategies "
    "whose intervals overlap are not ranked. An episode whose environment broke counts neither as success "
    "nor as failure."
)
KINDS: tuple[charts.Axis, ...] = ("step", "samples", "time")
TITLES = {AFTER: "success", WRONG: "success with the wrong instruction"}


def page(comparison: Comparison) -> str:
    """Return the whole page."""
    facts = summary.to_json(comparison)
    strategies = facts["strategies"]
    body = join(
        [
            _header(comparison, facts),
            _verdict(comparison, facts),
            notices("Before you believe these numbers", tuple(facts["caveats"])),
            notices("Missing from this page", tuple(facts["missing"])),
            _overview(comparison.standings, strategies),
            _success(comparison.standings),
            _curves(comparison.standings),
            _validation(strategies),
            _memory(strategies),
            _rates(comparison, strategies),
            _commands(comparison, facts),
            tag("footer", FOOTER),
        ]
    )
    return document(f"{comparison.recipe.name}: strategies compared", body, charts.style())


def _header(comparison: Comparison, facts: dict[str, Any]) -> Raw:
    recipe, options = comparison.recipe, comparison.options
    train = recipe.train
    budget = f"{duration(train.max_seconds)} of training" if train.max_seconds else f"{train.steps} steps"
    items = [
        ("strategies", str(len(comparison.standings))),
        ("seeds", " ".join(map(str, options.seeds))),
        ("budget of each arm", f"{budget}, batches of {train.batch_size}"),
        ("learning rates", " ".join(map(rate, options.lr_grid)) or f"{rate(recipe.optim.lr)} for all"),
        ("arms that finished", str(len(comparison.records) - len(comparison.broken))),
        *([("arms that broke", str(len(comparison.broken)))] if comparison.broken else []),
        ("protocol", recipe.eval.protocol or "none"),
        ("hash", facts["identity"]["sha256"][:12]),
    ]
    return tag(
        "header",
        tag("p", "vlafit compare", class_="kind"),
        tag("h1", recipe.name),
        tag("p", recipe.purpose, class_="purpose") if recipe.purpose else "",
        tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for what, value in items), class_="facts"),
    )


def _verdict(comparison: Comparison, facts: dict[str, Any]) -> Raw:
    verdict = facts["verdict"]
    parts: list[Content] = [tag("p", tag("b", verdict["sentence"]))]
    if verdict["recommended"]:
        parts.append(tag("p", "Recommended: ", tag("b", verdict["recommended"]), ": ", verdict["reason"]))
    parts += [tag("p", note, class_="muted") for note in (*verdict["notes"], *facts["notes"])]
    rows = []
    for index, one in enumerate(comparison.standings):
        score = one.pooled()
        if score is not None:
            low, high = one.interval
            ends = muted(f"95 %: {100 * low:.0f} to {100 * high:.0f} %{errors(score)}")
            counts = f"{score.successes} of {score.episodes} "
            rows += [
                tag("span", one.strategy),
                bar(score, charts.tone(index)),
                tag("span", counts, ends, class_="nowrap"),
            ]
    return tag("section", *parts, tag("div", *rows, class_="rates") if rows else "", class_="card")


def _overview(standings: Sequence[Standing], strategies: Sequence[dict[str, Any]]) -> Raw:
    heads = ("strategy", "learning rate", "trained", "of", "checkpoint", "peak memory", "samples/s",
             "training", "to best", "last loss", "action error", "forgetting", "merge error")  # fmt: skip
    rows = []
    for standing, one in zip(standings, strategies, strict=True):
        held_out = one["validation"].get(HELD_OUT, {})
        forgot = "; ".join(f"{name} {_signed(value)}" for name, value in one["forgetting"].items())
        rows.append(
            (
                join(
                    [
                        standing.strategy,
                        *([Raw("<br>"), muted(_state(one))] if not one["seeds_finished"] else []),
                    ]
                ),
                _known(one["lr"], rate),
                _known(one["trainable"], count),
                _known(one["parameters"], count),
                _known(one["checkpoint_mb"], _mb),
                _known(one["memory"], lambda m: _mb(m["peak_mb"])),
                _known(one["samples_per_s"], _three),
                _known(one["train_seconds"], duration),
                _known(one["seconds_to_best"], duration),
                _known(held_out.get("last"), _three),
                _known(held_out.get("last_action_error"), _three),
                forgot,
                _known(one["merge_error"], lambda e: f"{e:.1e}"),
            )
        )
    said = (
        "Means over seeds; memory is the highest. Forgetting is the rise of the loss on a named validation "
        "set from step 0 to the end."
    )
    return section(
        "At a glance", table(heads, rows, ("", *("number" for _ in heads[1:]))), tag("p", muted(said))
    )


def _state(strategy: dict[str, Any]) -> str:
    why = strategy["did_not_finish"]
    return f"did not finish: {why}" if why else "unfinished"


def _success(standings: Sequence[Standing]) -> Raw:
    parts: list[Content] = []
    for name, title in TITLES.items():
        shown = [(i, one) for i, one in enumerate(standings) if one.pooled(name) is not None]
        if not shown:
            continue
        tasks = dict.fromkeys(task for _, one in shown for task in one.tasks(name))
        seeds = sorted({seed for _, one in shown for seed in one.scores(name)})
        heads = ["strategy", *tasks, "all tasks", *(f"seed {seed}" for seed in seeds)]
        rows = []
        for index, one in shown:
            cells = [one.tasks(name).get(task) for task in tasks]
            by_seed = [one.scores(name).get(seed) for seed in seeds]
            tinted = charts.tone(index)
            rows.append([one.strategy, *(_cell(c, tinted) for c in [*cells, one.pooled(name), *by_seed])])
        parts += [tag("h3", title.capitalize()), table(heads, rows, ("", *("rate" for _ in heads[1:])))]
        if name == WRONG:
            said = "Each task once more, told its partner's sentence: a policy that listens fails here."
            parts.append(tag("p", muted(said)))
    svg = charts.success_against_memory(standings)
    if svg:
        chart = figure("Success against memory", "95 % intervals; up and left is better", svg)
        parts.append(tag("div", chart, class_="charts"))
    return section("Success", *parts) if parts else Raw("")


def _cell(score: Score | None, tinted: str) -> Raw:
    if score is None:
        return Raw("")
    counts = muted(f"{score.successes}/{score.episodes}{errors(score)}")
    return join([percent(score), " ", counts, bar(score, tinted)])


def _curves(standings: Sequence[Standing]) -> Raw:
    sets = dict.fromkeys(name for one in standings for f in one.figures for name in f.validation)
    drawn = []
    for name in sets:
        for axis in KINDS:
            svg = charts.losses(standings, name, axis)
            if svg:
                drawn.append(figure(f"Validation loss, {name}", f"against {charts.LABELS[axis]}", svg))
    if not drawn:
        return Raw("")
    legend = [tag("span", one.strategy, class_=f"tone-{charts.tone(i)}") for i, one in enumerate(standings)]
    said = (
        "One line a seed, at the chosen learning rate. Samples, noise and time are the same at every step "
        "and in all arms."
    )
    return section(
        "Loss",
        tag("p", muted(said)),
        tag("div", *legend, class_="legend"),
        tag("div", *drawn, class_="charts"),
    )


def _validation(strategies: Sequence[dict[str, Any]]) -> Raw:
    heads = ("strategy", "set", "seed", "at step 0", "best", "at step", "after", "last", "action error")
    rows = [
        (
            one["strategy"], name, seed, _three(v["first"]), _three(v["best"]), v["best_step"],
            duration(v["best_seconds"]), _three(v["last"]), _known(v["last_action_error"], _three),
        )
        for one in strategies
        for name, of in one["validation"].items()
        for seed, v in of["seeds"].items()
    ]  # fmt: skip
    shown = table(heads, rows, ("", "", *("number" for _ in heads[2:])))
    return section("Validation", folded("Every seed and set", shown)) if rows else Raw("")


def _memory(strategies: Sequence[dict[str, Any]]) -> Raw:
    found = [one for one in strategies if one["memory"]]
    if not found:
        return Raw("")
    names = list(dict.fromkeys(name for one in found for name in one["memory"]["parts_mb"]))
    on_gpu = any(one["memory"]["allocated_mb"] for one in found)
    heads = ["strategy", "peak", *names, *(["reserved", "process"] if on_gpu else [])]
    rows = []
    for one in found:
        memory = one["memory"]
        more = [_mb(memory["reserved_mb"]), _mb(memory["rss_mb"])] if on_gpu else []
        parts = [_mb(memory["parts_mb"].get(name, 0.0)) for name in names]
        rows.append([one["strategy"], _mb(memory["peak_mb"]), *parts, *more])
    said = (
        "Of the training process while it trains. Program: what was resident before the policy was made (0 "
        "on a GPU, where the peak is the allocator's). Rest: activations, and what the parts do not explain."
    )
    shown = table(heads, rows, ("", *("number" for _ in heads[1:])))
    return section("Memory", shown, tag("p", muted(said)))


def _rates(comparison: Comparison, strategies: Sequence[dict[str, Any]]) -> Raw:
    rows = [
        (
            one["strategy"],
            rate(tried["lr"]),
            "broke" if tried["last_loss"] is None else _three(tried["last_loss"]),
            "taken" + (f", the {one['lr_at_edge']} of the grid" if one["lr_at_edge"] else "")
            if tried["lr"] == one["lr"]
            else "",
        )
        for one in strategies
        for tried in one["lr_tried"]
    ]
    if not rows:
        return Raw("")
    n = comparison.options.grid_seeds
    said = f"Last validation loss over {n} seed{'s' if n > 1 else ''}; the lowest is taken for all seeds."
    shown = table(("strategy", "learning rate", "loss", ""), rows, ("", "number", "number", ""))
    return section("Learning rates tried", tag("p", muted(said)), shown)


def _commands(comparison: Comparison, facts: dict[str, Any]) -> Raw:
    broken = [
        folded(f"{record.name} broke", tag("pre", record.error))
        for record in comparison.records
        if record.error
    ]
    hashes = [(one.strategy, one.records[0].strategy_sha256) for one in comparison.standings if one.records]
    pinned = [(k, str(v)) for k, v in facts["identity"].items() if k in ("data", "base", "protocol") and v]
    return section(
        "Commands and provenance",
        tag("pre", comparison.command) if comparison.command else "",
        *broken,
        tag("h3", "SHA-256"),
        table([], [*pinned, *((f"strategy {name}", value) for name, value in hashes)], ("", "hash")),
    )


def _known(value: Any, write: Any) -> str:
    return "–" if value is None else write(value)


def _three(value: float) -> str:
    return f"{value:.3g}"


def _mb(value: float) -> str:
    return f"{value:,.1f} MB" if value < 100 else f"{value:,.0f} MB"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}"
