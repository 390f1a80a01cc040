"""Sections of a run's page: success by task, instruction probe, films, curves, tuning table."""

from collections.abc import Iterator

from vlafit.agreement.values import read as read_agreement
from vlafit.errors import ConfigError
from vlafit.report import plots
from vlafit.report.facts import AFTER, BEFORE, STAGE, WRONG, Evaluation, Facts
from vlafit.report.films import Films
from vlafit.report.markup import (
    Content,
    Raw,
    errors,
    figure,
    folded,
    interval,
    join,
    muted,
    percent,
    rate_cell,
    section,
    table,
    tag,
)
from vlafit.rollout.records import Record
from vlafit.tuning import Plan

TITLES = {BEFORE: "before", AFTER: "after", WRONG: "after, wrong instruction"}
TONES = {BEFORE: "before", AFTER: "after", WRONG: "wrong"}
OUTCOMES = {True: ("success", "good"), False: ("failure", "bad"), None: ("error", "warn")}
LOSS = "smoothed; band: 80 % of the batches logged around each step"
CHARTS = {  # metric -> title, unit, whether to smooth it
    "validation/action_error": ("Action error", "mean absolute, normalised units, held-out episodes", False),
    "train/lr": ("Learning rate", "of rules without a factor of their own", False),
    "train/grad_norm": ("Gradient norm", "before clipping", True),
    "train/samples_per_s": ("Throughput", "samples per second", True),
    "train/tokens_per_s": ("Tokens", "per second, padding included", True),
    "train/mfu": ("Model FLOPs utilisation", "share of the device's peak", True),
    "train/tflops_per_s": ("Arithmetic", "TFLOP/s that the model needs", True),
    "train/data_share": ("Waiting for data", "share of the time", True),
    "train/peak_memory_gb": ("Peak memory", "GB (10^9 bytes)", False),
}


MEMORY = "train/memory/"
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "optimiser states",
    "average": "EMA",
    "program": "the program itself (only on a CPU)",
    "rest": "activations, workspace and fragmentation",
}


def title(evaluation: Evaluation) -> str:
    """Return the title of an evaluation."""
    return TITLES.get(evaluation.name) or (f"step {evaluation.step}" if evaluation.step else evaluation.name)


def tone(evaluation: Evaluation) -> str:
    """Return the CSS colour name of an evaluation."""
    return TONES.get(evaluation.name, "other")


def shown(facts: Facts) -> list[Evaluation]:
    """Return the evaluations to show in full: before, after, wrong instruction; without these the newest."""
    named = [facts.evaluations[name] for name in TITLES if name in facts.evaluations]
    return named or list(facts.evaluations.values())[-1:]


def agreement(facts: Facts) -> Raw:
    """Return what data, checkpoint and recipe agreed on before training; empty for older runs."""
    title = "What data and checkpoint agreed on"
    try:
        agreed = read_agreement(facts.folder)
    except ConfigError as error:  # it only documents, so a damaged file must not cost the page
        return section(title, tag("p", muted(str(error))))
    if agreed is None:
        return Raw("")
    rows = [list(row) for row in agreed.rows()]
    return section(title, table(list(agreed.heads), rows, [""] * 5))


def tasks(facts: Facts) -> Raw:
    """Return the table of success by task and evaluation."""
    evaluations = shown(facts)
    if not evaluations:
        return Raw("")

    def name(task: str) -> Raw:
        instructions = [
            e.instructions[task] for e in evaluations if task in e.tasks and not e.wrong_instruction
        ]
        return join([task, *([Raw("<br>"), muted(f"“{instructions[0]}”")] if instructions else [])])

    names = dict.fromkeys(task for evaluation in evaluations for task in evaluation.tasks)
    rows: list[list[Content]] = [
        [name(task), *(rate_cell(e.tasks.get(task), tone(e)) for e in evaluations)] for task in names
    ]
    rows.append(["all tasks", *(rate_cell(e.overall, tone(e)) for e in evaluations)])
    heads = ["task", *(title(evaluation) for evaluation in evaluations)]
    kinds = ["", *("rate" for _ in evaluations)]
    counts = [(title(e), e.invalid_answers) for e in evaluations if e.invalid_answers is not None]
    invalid = [tag("p", muted("; ".join(f"{name}: {count}" for name, count in counts)))] if counts else []
    return section("Success by task", table(heads, rows, kinds, total=True), *invalid)


def probe(facts: Facts) -> Raw:
    """Return the result of the wrong-instruction probe, with an explanation."""
    evaluation = facts.evaluations.get(WRONG)
    if evaluation is None:
        return Raw("")
    total = evaluation.overall
    counts = f" ({total.successes} of {total.episodes}; 95 %: {interval(total)}{errors(total)})."
    text = tag(
        "p",
        "This control runs each task again from the same starts, but with the instruction of its partner "
        "task in the same scene; success is still measured for the task itself. A policy that follows its "
        "instruction ",
        tag("em", "fails"),
        " here; a policy that succeeds ignores it. Success: ",
        tag("b", percent(total)),
        counts,
    )
    rows = [
        (task, f"“{sentence}”", percent(evaluation.tasks[task]))
        for task, sentence in evaluation.instructions.items()
    ]
    heads = ("scored as", "instruction", "success")
    return section("Does it follow the instruction?", text, table(heads, rows, ("", "", "number")))


def episodes(facts: Facts) -> Raw:
    """Return film strips and videos of the filmed episodes: each start under every evaluation."""
    evaluations, films = shown(facts), Films()
    starts = dict.fromkeys((record.task, record.seed) for e in evaluations for record in e.filmed)
    order = list(dict.fromkeys(task for task, _ in starts))

    def records_of(task: str, seed: int) -> Iterator[tuple[Evaluation, Record]]:
        for evaluation in evaluations:
            for record in evaluation.filmed:
                if (record.task, record.seed) == (task, seed):
                    yield evaluation, record

    def strip(evaluation: Evaluation, record: Record) -> Raw:
        word, kind = OUTCOMES[record.success]
        details = f"after {record.steps} steps; instruction “{record.instruction}”"
        chips = [
            tag("b", title(evaluation)),
            tag("span", word, class_=f"chip {kind}"),
            tag("span", details, class_="muted"),
        ]
        heading = tag("div", *chips, class_=f"who tone-{tone(evaluation)}")
        return join([heading, films.strip(evaluation, record)])

    parts = []
    for task, seed in sorted(starts, key=lambda pair: order.index(pair[0])):
        filmed = list(records_of(task, seed))
        parts += [tag("h3", f"{task}, start {seed}"), *(strip(*pair) for pair in filmed)]
        videos = [films.video(evaluation, record, title(evaluation)) for evaluation, record in filmed]
        if any(video.html for video in videos):
            parts.append(folded("Videos", tag("div", *videos, class_="videos")))
    if not parts:
        return Raw("")
    legend = "The first episodes of each task (not selected) under every policy. Time runs to the right."
    left_out = films.left_out()
    return section(
        "Episodes", tag("p", legend, class_="muted"), *parts, tag("p", muted(left_out)) if left_out else ""
    )


def curves(facts: Facts) -> Raw:
    """Return charts of all logged metrics, against steps or training time."""
    drawn = [_success_curve(facts)]
    axes: tuple[plots.Axis, ...] = ("step", "time")
    others = [
        n
        for n in facts.metrics
        if n not in CHARTS
        and n != STAGE
        and not n.startswith(("eval/", "train/loss", "validation/loss", "train/rank/", MEMORY))
    ]
    for axis in axes:
        lines = [
            plots.Curve("training", facts.metrics.get("train/loss", ()), noisy=True),
            plots.Curve(
                "validation, held-out episodes", facts.metrics.get("validation/loss", ()), second=True
            ),
        ]
        svg = plots.curves(f"loss-{axis}", lines, axis, log=True, marks=_marks(facts))
        drawn.append(figure("Loss", LOSS, svg, f"by-{axis}") if svg else Raw(""))
        drawn.append(_ranks(facts, axis))
        for metric in (*CHARTS, *others):
            name, unit, noisy = CHARTS.get(metric, (metric, "", False))
            line = plots.Curve(metric, facts.metrics.get(metric, ()), noisy=noisy)
            svg = plots.curves(f"{plots.html_id(metric)}-{axis}", [line], axis)
            drawn.append(figure(name, unit, svg, f"by-{axis}") if svg else Raw(""))
    if not any(chart.html for chart in drawn):
        return Raw("")
    return section(
        "Training",
        Raw('<input class="axis" type="radio" name="axis" id="by-step" checked>'),
        Raw('<input class="axis" type="radio" name="axis" id="by-time">'),
        tag("label", "by step", class_="tab", for_="by-step"),
        tag("label", "by time", class_="tab", for_="by-time"),
        tag("div", *drawn, class_="charts"),
    )


def memory(facts: Facts) -> Raw:
    """Return the table of the peak memory by kind, as it was last logged; empty for older runs."""
    last = {kind: points[-1].value for kind in KINDS if (points := facts.metrics.get(f"{MEMORY}{kind}_gb"))}
    if not last:
        return Raw("")
    rows = [(KINDS[kind], f"{size:.3f}") for kind, size in last.items() if size]
    peak = facts.metrics["train/peak_memory_gb"][-1].value  # logged with its parts
    return section(
        "Memory", table(("kind", "GB"), [*rows, ("peak", f"{peak:.3f}")], ("", "number"), total=True)
    )


def _ranks(facts: Facts, axis: plots.Axis) -> Raw:
    """Return the chart of AdaLoRA's ranks, if they were logged."""
    names = {"most": "max", "mean": "mean", "least": "min"}
    lines = [
        plots.Curve(label, facts.metrics.get(f"train/rank/{name}", ()), second=name == "mean")
        for label, name in names.items()
    ]
    svg = plots.curves(f"ranks-{axis}", lines, axis, marks=_marks(facts))
    return figure("Ranks of AdaLoRA", "kept by each layer", svg, f"by-{axis}") if svg else Raw("")


def _success_curve(facts: Facts) -> Raw:
    """Return the chart of success over steps, if the run was evaluated during training."""
    during = [(e.step, e.overall) for e in facts.evaluations.values() if e.step is not None]
    if not during:
        return Raw("")
    ends = [(0, BEFORE), (facts.steps, AFTER)]
    points = [*during, *((step, facts.evaluations[n].overall) for step, n in ends if n in facts.evaluations)]
    svg = plots.success_curve("success", sorted(points, key=lambda point: point[0]))
    return figure("Success while training", "95 % intervals", svg)


def tuning(facts: Facts) -> Raw:
    """Return the tuning table of each stage: which rule applies to which parameters."""
    if not facts.plan:
        return Raw("")
    strategy = facts.plan.strategy
    dead = " Dead parameters are in the checkpoint but do not affect the loss, so no rule trains them."
    parts = [
        tag(
            "p",
            "Strategy ",
            tag("b", strategy.name),
            f". {strategy.purpose} The first rule that matches a parameter applies.",
            dead if facts.plan.rows()[-1]["dead"] else "",
        )
    ]
    for plan, start in facts.stages:
        if len(strategy.stages) > 1:
            stage = strategy.stages[plan.stage]
            words = [f"Stage {plan.stage + 1}", *([stage.name] if stage.name else [])]
            timing = "from the first step" if stage.begin is None else f"starts after {stage.begin}"
            if stage.begin is not None:
                timing += f"; started after step {start.step}" if start else "; has not started"
            parts.append(tag("h3", ": ".join(words), " ", muted(timing)))
        parts.append(_rules(plan))
    ranks = facts.run.get("ranks")
    if isinstance(ranks, dict) and ranks:
        rows = table(("layer", "rank"), list(ranks.items()), ("", "number"))
        parts.append(folded("Final AdaLoRA rank of each layer", rows))
    return section("Tuned parameters", *parts)


def _rules(plan: Plan) -> Raw:
    """Return the tuning table of one stage."""
    columns = ("tensors", "parameters", "adapter", "trainable", "dead")
    cells = []
    for row in plan.rows():
        decay = "recipe’s" if row["weight_decay"] is None else f"{row['weight_decay']:g}"
        numbers = [f"{row[column]:,}" for column in columns]
        low, high = row["lr_lowest"], row["lr"]
        times = f"{high:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        rate = [f"× {times}", decay] if high else ["", ""]
        size = f"{row['optimiser_bytes'] / 1e6:,.1f} MB"
        cells.append([row["rule"] or "", row["select"], row["mode"], *numbers, *rate, size])
    heads = ("rule", "selects", "mode", *columns, "learning rate", "weight decay", "optimiser state")
    return table(heads, cells, ("", "", "", *("number" for _ in heads[3:])), total=True)


def _marks(facts: Facts) -> list[plots.Mark]:
    """Return the moments at which later stages started."""
    return [
        plots.Mark(plan.strategy.stages[plan.stage].name or f"stage {plan.stage + 1}", start)
        for plan, start in facts.stages
        if start and plan.stage
    ]
