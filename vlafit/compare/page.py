"""Write the page of a comparison as one self-contained HTML text, from the values of `summary`."""

from collections.abc import Sequence
from typing import Any

from vlafit.compare import charts, summary
from vlafit.compare.arm_record import AFTER, HELD_OUT, WRONG
from vlafit.compare.arms import rate
from vlafit.compare.comparison import Comparison
from vlafit.compare.pairs import ALPHA
from vlafit.compare.standing import Standing
from vlafit.report import markup
from vlafit.report.markup import Content, Raw, count, duration, join, muted, section, table, tag
from vlafit.score import Score

FOOTER = (
    "compare.json, next to this page, holds the same facts and the full record of every arm. Intervals of "
    "single rates are 95 % Wilson intervals over the episodes of all seeds, widened if seeds differ by more "
    "than chance; strategies are ranked by their paired differences only. An episode with an environment "
    "error counts neither as success nor as failure."
)
KINDS: tuple[charts.Axis, ...] = ("step", "samples", "time")
TITLES = {AFTER: "success", WRONG: "success with the wrong instruction"}


def page(comparison: Comparison) -> str:
    """Return the whole page."""
    content = summary.to_json(comparison)
    strategies = content["strategies"]
    body = join(
        [
            _header(comparison, content),
            _verdict(comparison, content),
            markup.notices(markup.CAVEATS, tuple(content["caveats"])),
            markup.notices(markup.MISSING, tuple(content["missing"])),
            _overview(comparison.standings, strategies),
            _success(comparison.standings),
            _differences(content["verdict"]["pairs"]),
            _curves(comparison.standings),
            _validation(strategies),
            _memory(strategies),
            _rates(comparison, strategies),
            _commands(comparison, content),
            tag("footer", FOOTER),
        ]
    )
    return markup.document(f"{comparison.recipe.name}: strategies compared", body, charts.style())


def _header(comparison: Comparison, content: dict[str, Any]) -> Raw:
    recipe, options = comparison.recipe, comparison.options
    train = recipe.train
    budget = f"{duration(train.max_seconds)} of training" if train.max_seconds else f"{train.steps} steps"
    items = [
        ("strategies", str(len(comparison.standings))),
        ("seeds", " ".join(map(str, options.seeds))),
        ("budget of each arm", f"{budget}, batches of {train.samples}"),
        ("learning rates", " ".join(map(rate, options.lr_grid)) or f"{rate(recipe.optim.lr)} for all"),
        ("arms finished", str(len(comparison.records) - len(comparison.broken))),
        *([("arms failed", str(len(comparison.broken)))] if comparison.broken else []),
        ("protocol", recipe.eval.protocol or "none"),
        ("hash", content["identity"]["sha256"][:12]),
    ]
    return markup.header("vlafit compare", recipe.name, recipe.purpose, items)


def _verdict(comparison: Comparison, content: dict[str, Any]) -> Raw:
    verdict = content["verdict"]
    parts: list[Content] = [tag("p", tag("b", verdict["sentence"]))]
    if verdict["recommended"]:
        parts.append(tag("p", "Recommended: ", tag("b", verdict["recommended"]), ": ", verdict["reason"]))
    parts += [tag("p", note, class_="muted") for note in (*verdict["notes"], *content["notes"])]
    rows = [
        cell
        for index, standing in enumerate(comparison.standings)
        if (score := standing.pooled()) is not None
        for cell in markup.rate_row(standing.strategy, score, charts.tone(index))
    ]
    return tag("section", *parts, tag("div", *rows, class_="rates") if rows else "", class_="card")


def _overview(standings: Sequence[Standing], strategies: Sequence[dict[str, Any]]) -> Raw:
    heads = ("strategy", "learning rate", "trained", "of", "checkpoint, MB", "peak memory, MB", "samples/s",
             "training", "to best", "last loss", "action error", "forgetting", "merge error")  # fmt: skip
    wrapped = ("training", "to best")
    kinds = [f"number{' wrapped' if head in wrapped else ''}" for head in heads]
    kinds[0], kinds[-2] = "name", "long"
    rows = []
    for standing, values in zip(standings, strategies, strict=True):
        held_out = values["validation"].get(HELD_OUT, {})
        forgetting = "; ".join(f"{name} {_signed(value)}" for name, value in values["forgetting"].items())
        state = [] if values["seeds_finished"] else [Raw("<br>"), muted(_state(values))]
        rows.append(
            (
                join([standing.strategy, *state]),
                _or_dash(values["lr"], rate),
                _or_dash(values["trainable"], count),
                _or_dash(values["parameters"], count),
                _or_dash(values["checkpoint_mb"], _number),
                _or_dash(values["memory"], lambda m: _number(m["peak_mb"])),
                _or_dash(values["samples_per_s"], _three_digits),
                _or_dash(values["train_seconds"], duration),
                _or_dash(values["seconds_to_best"], duration),
                _or_dash(held_out.get("last"), _three_digits),
                _or_dash(held_out.get("last_action_error"), _three_digits),
                forgetting,
                _or_dash(values["merge_error"], lambda e: f"{e:.1e}"),
            )
        )
    legend = (
        "Means over seeds; memory is the maximum. Forgetting is the increase of the loss on a named "
        "validation set from step 0 to the end."
    )
    return section("At a glance", table(heads, rows, kinds), tag("p", muted(legend)))


def _state(strategy: dict[str, Any]) -> str:
    reason = strategy["did_not_finish"]
    return f"did not finish: {reason}" if reason else "unfinished"


def _success(standings: Sequence[Standing]) -> Raw:
    parts: list[Content] = []
    for name, title in TITLES.items():
        shown = [(i, standing) for i, standing in enumerate(standings) if standing.pooled(name) is not None]
        if not shown:
            continue
        tasks = dict.fromkeys(task for _, standing in shown for task in standing.tasks(name))
        seeds = sorted({seed for _, standing in shown for seed in standing.scores(name)})
        heads = ["strategy", *tasks, "all tasks", *(f"seed {seed}" for seed in seeds)]
        rows = []
        for index, standing in shown:
            by_task = [standing.tasks(name).get(task) for task in tasks]
            by_seed = [standing.scores(name).get(seed) for seed in seeds]
            scores: list[Score | None] = [*by_task, standing.pooled(name), *by_seed]
            cells = [markup.rate_cell(score, charts.tone(index)) for score in scores]
            rows.append([standing.strategy, *cells])
        parts += [
            tag("h3", title.capitalize()),
            markup.wide_table(heads, rows, ("name", *("rate" for _ in heads[1:]))),
        ]
        if name == WRONG:
            legend = "Each task with its partner's instruction: a policy that follows it fails here."
            parts.append(tag("p", muted(legend)))
    svg = charts.success_against_memory(standings)
    if svg:
        chart = markup.figure("Success against memory", "95 % intervals; up and left is better", svg)
        parts.append(tag("div", chart, class_="charts"))
    return section("Success", *parts) if parts else Raw("")


def _differences(pairs: Sequence[dict[str, Any]]) -> Raw:
    heads = (
        "pair",
        "difference",
        "95 %, new starts",
        "95 %, new training runs too",
        "first better at",
        "second better at",
        "starts",
        "p",
        "p, Holm",
        "anytime p",
        "told apart",
    )
    rows = [
        (
            f"{pair['first']} − {pair['second']}",
            f"{100 * pair['difference']:+.1f}",
            _points(pair["interval"]),
            _or_dash(pair["interval_new_runs"], _points),
            pair["first_only"],
            pair["second_only"],
            pair["starts"],
            _two_digits(pair["p"]),
            _two_digits(pair["p_holm"]),
            _two_digits(pair["p_anytime"]),
            "yes" if pair["p_holm"] <= ALPHA else "no",
        )
        for pair in pairs
    ]
    legend = (
        "Differences of success in percentage points at the starts that both strategies played. p: exact "
        "paired test by start (McNemar's test with one seed). The first interval holds for new starts and "
        "these training runs; the second also for new training runs, and is wide because there are few "
        "seeds. The anytime p-value stays valid if trials are added and the comparison is looked at again."
    )
    shown = table(heads, rows, ("name", *("number" for _ in heads[1:])))
    return section("Differences at shared starts", shown, tag("p", muted(legend))) if rows else Raw("")


def _points(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _curves(standings: Sequence[Standing]) -> Raw:
    sets = dict.fromkeys(name for standing in standings for f in standing.figures for name in f.validation)
    drawn = []
    for name in sets:
        for axis in KINDS:
            svg = charts.losses(standings, name, axis)
            if svg:
                chart = markup.figure(f"Validation loss, {name}", f"against {charts.LABELS[axis]}", svg)
                drawn.append(chart)
    if not drawn:
        return Raw("")
    colours = [
        tag("span", standing.strategy, class_=f"tone-{charts.tone(i)}")
        for i, standing in enumerate(standings)
    ]
    legend = (
        "Line: the mean of a strategy's seeds at the chosen learning rate; band: from the lowest to the "
        "highest seed. Validation samples, noise and flow times are the same at every step and in all arms."
    )
    return section(
        "Loss",
        tag("p", muted(legend)),
        tag("div", *colours, class_="legend"),
        tag("div", *drawn, class_="charts"),
    )


def _validation(strategies: Sequence[dict[str, Any]]) -> Raw:
    heads = ("strategy", "set", "seed", "at step 0", "best", "at step", "after", "last", "action error")
    rows = [
        (
            strategy["strategy"], name, seed, _three_digits(v["first"]), _three_digits(v["best"]),
            v["best_step"], duration(v["best_seconds"]), _three_digits(v["last"]),
            _or_dash(v["last_action_error"], _three_digits),
        )
        for strategy in strategies
        for name, validation in strategy["validation"].items()
        for seed, v in validation["seeds"].items()
    ]  # fmt: skip
    shown = table(heads, rows, ("", "", *("number" for _ in heads[2:])))
    return section("Validation", markup.folded("Every seed and set", shown)) if rows else Raw("")


def _memory(strategies: Sequence[dict[str, Any]]) -> Raw:
    measured = [strategy for strategy in strategies if strategy["memory"]]
    if not measured:
        return Raw("")
    names = list(dict.fromkeys(name for strategy in measured for name in strategy["memory"]["parts_mb"]))
    on_gpu = any(strategy["memory"]["allocated_mb"] for strategy in measured)
    heads = ["strategy", "peak", *names, *(["reserved", "process"] if on_gpu else [])]  # MB
    rows = []
    for strategy in measured:
        memory = strategy["memory"]
        gpu_only = [_number(memory["reserved_mb"]), _number(memory["rss_mb"])] if on_gpu else []
        parts = [_number(memory["parts_mb"].get(name, 0.0)) for name in names]
        rows.append([strategy["strategy"], _number(memory["peak_mb"]), *parts, *gpu_only])
    legend = (
        "MB (10^6 bytes), of the training process during training. Program: resident before the policy was "
        "created (0 on a GPU, where the peak is the allocator's). Rest: activations and other memory."
    )
    shown = markup.wide_table(heads, rows, ("name", *("number" for _ in heads[1:])))
    return section("Memory", shown, tag("p", muted(legend)))


def _rates(comparison: Comparison, strategies: Sequence[dict[str, Any]]) -> Raw:
    rows = [
        (
            strategy["strategy"],
            rate(tried["lr"]),
            "failed" if tried["last_loss"] is None else _three_digits(tried["last_loss"]),
            "chosen" + (f", the {strategy['lr_at_edge']} of the grid" if strategy["lr_at_edge"] else "")
            if tried["lr"] == strategy["lr"]
            else "",
        )
        for strategy in strategies
        for tried in strategy["lr_tried"]
    ]
    if not rows:
        return Raw("")
    n = comparison.options.grid_seeds
    legend = f"Last validation loss over {n} seed{'s' if n > 1 else ''}; the lowest is chosen for all seeds."
    shown = table(("strategy", "learning rate", "loss", ""), rows, ("", "number", "number", ""))
    return section("Learning rates tried", tag("p", muted(legend)), shown)


def _commands(comparison: Comparison, content: dict[str, Any]) -> Raw:
    failed = [
        markup.folded(f"{record.name} failed", tag("pre", record.error))
        for record in comparison.records
        if record.error
    ]
    hashes = [
        (f"strategy {s.strategy}", s.records[0].strategy_sha256) for s in comparison.standings if s.records
    ]
    pinned = [(k, str(v)) for k, v in content["identity"].items() if k in ("data", "base", "protocol") and v]
    return section(
        "Commands and provenance",
        tag("pre", comparison.command) if comparison.command else "",
        *failed,
        tag("h3", "SHA-256"),
        table([], [*pinned, *hashes], ("", "hash")),
    )


def _or_dash(value: Any, write: Any) -> str:
    return "–" if value is None else write(value)


def _two_digits(value: float) -> str:
    return f"{value:.2g}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}"
