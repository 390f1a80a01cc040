"""The sections of the page that show results: tasks, instruction probe, films, curves, tuning table."""

from collections.abc import Iterator

from vlafit.report import plots
from vlafit.report.facts import AFTER, BEFORE, STAGE, WRONG, Evaluation, Facts
from vlafit.report.films import Films
from vlafit.report.markup import (
    Content,
    Raw,
    bar,
    errors,
    figure,
    folded,
    interval,
    join,
    muted,
    percent,
    section,
    table,
    tag,
)
from vlafit.rollout.run import Record
from vlafit.score import Score
from vlafit.tuning import Plan

TITLES = {BEFORE: "before", AFTER: "after", WRONG: "after, wrong instruction"}
TONES = {BEFORE: "before", AFTER: "after", WRONG: "wrong"}
OUTCOMES = {True: ("success", "good"), False: ("failure", "bad"), None: ("error", "warn")}
CHARTS = {  # metric -> title, unit, whether single values are noise around a trend
    "validation/action_error": ("Action error", "mean absolute, normalised units, held-out episodes", False),
    "train/lr": ("Learning rate", "of the first group of parameters", False),
    "train/grad_norm": ("Gradient norm", "before clipping", True),
    "train/samples_per_s": ("Throughput", "samples per second", True),
    "train/peak_memory_gb": ("Peak memory", "GiB on the device", False),
    "train/data_share": ("Waiting for data", "share of each step", True),
}


def title(evaluation: Evaluation) -> str:
    """Return what a reader calls an evaluation."""
    return TITLES.get(evaluation.name) or (f"step {evaluation.step}" if evaluation.step else evaluation.name)


def tone(evaluation: Evaluation) -> str:
    """Return the CSS colour name of an evaluation."""
    return TONES.get(evaluation.name, "other")


def shown(facts: Facts) -> list[Evaluation]:
    """Return the evaluations to show in full: before, after, wrong instruction; failing those, the newest."""
    named = [facts.evaluations[name] for name in TITLES if name in facts.evaluations]
    return named or list(facts.evaluations.values())[-1:]


def tasks(facts: Facts) -> Raw:
    """Success by task and evaluation."""
    evaluations = shown(facts)
    if not evaluations:
        return Raw("")

    def cell(one: Evaluation, score: Score | None) -> Raw:
        if score is None:
            return Raw("")
        counts = muted(f"{score.successes}/{score.episodes}{errors(score)}")
        return join([percent(score), " ", counts, bar(score, tone(one))])

    def name(task: str) -> Raw:
        told = [
            one.instructions[task] for one in evaluations if task in one.tasks and not one.wrong_instruction
        ]
        return join([task, *([Raw("<br>"), muted(f"“{told[0]}”")] if told else [])])

    names = dict.fromkeys(task for one in evaluations for task in one.tasks)
    rows: list[list[Content]] = [
        [name(task), *(cell(one, one.tasks.get(task)) for one in evaluations)] for task in names
    ]
    rows.append(["all tasks", *(cell(one, one.overall) for one in evaluations)])
    heads = ["task", *(title(one) for one in evaluations)]
    kinds = ["", *("rate" for _ in evaluations)]
    return section("Success by task", table(heads, rows, kinds, total=True))


def probe(facts: Facts) -> Raw:
    """What the wrong-instruction probe is, and what it found."""
    found = facts.evaluations.get(WRONG)
    if found is None:
        return Raw("")
    total = found.overall
    counts = f" ({total.successes} of {total.episodes}; 95 %: {interval(total)}{errors(total)})."
    text = tag(
        "p",
        "The wrong-instruction probe plays each task once more, from the same starts and judged as ever, but "
        "tells the policy the sentence of the partner task, which shares the scene. A policy that listens "
        "does what it was told, and so ",
        tag("em", "fails"),
        " here; one that succeeds goes by the scene alone. Here: ",
        tag("b", percent(total)),
        counts,
    )
    rows = [
        (task, f"“{sentence}”", percent(found.tasks[task])) for task, sentence in found.instructions.items()
    ]
    return section("Does it listen?", text, table(("judged as", "told", "success"), rows, ("", "", "number")))


def episodes(facts: Facts) -> Raw:
    """Film strips and videos of the filmed episodes, each start under every evaluation."""
    evaluations, films = shown(facts), Films()
    starts = dict.fromkeys((record.task, record.seed) for one in evaluations for record in one.filmed)
    order = list(dict.fromkeys(task for task, _ in starts))

    def of(task: str, seed: int) -> Iterator[tuple[Evaluation, Record]]:
        for one in evaluations:
            for record in one.filmed:
                if (record.task, record.seed) == (task, seed):
                    yield one, record

    def line(one: Evaluation, record: Record) -> Raw:
        word, kind = OUTCOMES[record.success]
        said = f"after {record.steps} steps; told “{record.instruction}”"
        chips = [
            tag("b", title(one)),
            tag("span", word, class_=f"chip {kind}"),
            tag("span", said, class_="muted"),
        ]
        return join([tag("div", *chips, class_=f"who tone-{tone(one)}"), films.strip(one, record)])

    parts = []
    for task, seed in sorted(starts, key=lambda pair: order.index(pair[0])):
        found = list(of(task, seed))
        parts += [tag("h3", f"{task}, start {seed}"), *(line(*one) for one in found)]
        videos = [films.video(one, record, title(one)) for one, record in found]
        if any(video.html for video in videos):
            parts.append(folded("Videos of these", tag("div", *videos, class_="videos")))
    if not parts:
        return Raw("")
    said = (
        "The first episodes of each task, not chosen ones, each under every policy. Time runs to the right."
    )
    left_out = films.left_out()
    return section(
        "Episodes", tag("p", said, class_="muted"), *parts, tag("p", muted(left_out)) if left_out else ""
    )


def curves(facts: Facts) -> Raw:
    """Everything that was logged, against steps or against training time."""
    drawn = [_success_curve(facts)]
    axes: tuple[plots.Axis, ...] = ("step", "time")
    others = [
        n
        for n in facts.metrics
        if n not in CHARTS
        and n != STAGE
        and not n.startswith(("eval/", "train/loss", "validation/loss", "train/rank/"))
    ]
    for axis in axes:
        lines = [
            plots.Curve("training", facts.metrics.get("train/loss", ()), noisy=True),
            plots.Curve(
                "validation, held-out episodes", facts.metrics.get("validation/loss", ()), second=True
            ),
        ]
        svg = plots.curves(f"loss-{axis}", lines, axis, log=True, marks=_marks(facts))
        drawn.append(figure("Loss", "flow matching", svg, f"by-{axis}") if svg else Raw(""))
        drawn.append(_ranks(facts, axis))
        for metric in (*CHARTS, *others):
            name, unit, noisy = CHARTS.get(metric, (metric, "", False))
            line = plots.Curve(metric, facts.metrics.get(metric, ()), noisy=noisy)
            identity = "".join(c if c.isalnum() else "-" for c in metric)
            svg = plots.curves(f"{identity}-{axis}", [line], axis)
            drawn.append(figure(name, unit, svg, f"by-{axis}") if svg else Raw(""))
    if not any(one.html for one in drawn):
        return Raw("")
    return section(
        "Training",
        Raw('<input class="axis" type="radio" name="axis" id="by-step" checked>'),
        Raw('<input class="axis" type="radio" name="axis" id="by-time">'),
        tag("label", "by step", class_="tab", for_="by-step"),
        tag("label", "by time", class_="tab", for_="by-time"),
        tag("div", *drawn, class_="charts"),
    )


def _ranks(facts: Facts, axis: plots.Axis) -> Raw:
    """The ranks of AdaLoRA, where it learned."""
    names = {"most": "max", "mean": "mean", "least": "min"}
    lines = [
        plots.Curve(label, facts.metrics.get(f"train/rank/{name}", ()), second=name == "mean")
        for label, name in names.items()
    ]
    svg = plots.curves(f"ranks-{axis}", lines, axis, marks=_marks(facts))
    return figure("Ranks of AdaLoRA", "kept by each layer", svg, f"by-{axis}") if svg else Raw("")


def _success_curve(facts: Facts) -> Raw:
    """Success over the steps, where the run was evaluated while it trained."""
    between = [(one.step, one.overall) for one in facts.evaluations.values() if one.step is not None]
    if not between:
        return Raw("")
    ends = [(0, BEFORE), (facts.steps, AFTER)]
    points = [*between, *((step, facts.evaluations[n].overall) for step, n in ends if n in facts.evaluations)]
    svg = plots.success_curve("success", sorted(points, key=lambda point: point[0]))
    return figure("Success while training", "95 % intervals", svg)


def tuning(facts: Facts) -> Raw:
    """The tuning table of each stage: which rule took what."""
    if not facts.plan:
        return Raw("")
    strategy = facts.plan.strategy
    dead = " Dead parameters belong to the checkpoint, but the loss never reaches them: no rule trains them."
    parts = [
        tag(
            "p",
            "Strategy ",
            tag("b", strategy.name),
            f". {strategy.purpose} The first rule that fits a parameter decides.",
            dead if facts.plan.rows()[-1]["dead"] else "",
        )
    ]
    for plan, began in facts.stages:
        if len(strategy.stages) > 1:
            stage = strategy.stages[plan.stage]
            words = [f"Stage {plan.stage + 1}", *([stage.name] if stage.name else [])]
            told = "from the first step" if stage.begin is None else f"to begin after {stage.begin}"
            if stage.begin is not None:
                told += f"; began after step {began.step}" if began else "; has not begun"
            parts.append(tag("h3", ": ".join(words), " ", muted(told)))
        parts.append(_rules(plan))
    ranks = facts.run.get("ranks")
    if isinstance(ranks, dict) and ranks:
        rows = table(("layer", "rank"), list(ranks.items()), ("", "number"))
        parts.append(folded("Rank that AdaLoRA left to each layer", rows))
    return section("What was tuned", *parts)


def _rules(plan: Plan) -> Raw:
    """The tuning table of one stage."""
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
    """The moments at which later stages began."""
    return [
        plots.Mark(plan.strategy.stages[plan.stage].name or f"stage {plan.stage + 1}", began)
        for plan, began in facts.stages
        if began and plan.stage
    ]
