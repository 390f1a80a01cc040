"""The table of Meta-World's 50 tasks: published evaluations by what the policy has learned of the tasks."""

import tomllib
from pathlib import Path
from typing import Any

from cells import read, table

from vlafit.score import wilson

HERE = Path(__file__).parent
COLUMNS = {"metaworld-base": "shipped checkpoint", "quickstart": "after the quickstart"}


def mt50(results: Path) -> str:
    """One row for each group of tasks, and one for each task beyond the learned ones that was ever solved."""
    runs = {
        name: read(path)["tasks"] for name in COLUMNS if (path := results / name / "result.json").is_file()
    }
    pretrained = _tasks("metaworld-pretrain")
    quickstart = _tasks("metaworld-faucet")
    others = [task for task in _tasks("metaworld-mt50") if task not in (*pretrained, *quickstart)]
    groups = {
        f"the {len(pretrained)} of pretraining": pretrained,
        f"the {len(quickstart)} of the quickstart": quickstart,
        f"the {len(others)} others": others,
    }
    rows = [[name, *(_sum(run, tasks) for run in runs.values())] for name, tasks in groups.items()]
    rows += [
        [f"of these, `{task}`", *(_sum(run, [task], interval=False) for run in runs.values())]
        for task in others
        if any(run[task]["successes"] for run in runs.values())
    ]
    rows.append(["**all 50**", *(_sum(run, _tasks("metaworld-mt50")) for run in runs.values())])
    return table(["tasks", *(COLUMNS[name] for name in runs)], rows)


def _tasks(protocol: str) -> list[str]:
    return tomllib.loads((HERE / f"{protocol}.toml").read_text(encoding="utf-8"))["tasks"]


def _sum(run: dict[str, dict[str, Any]], tasks: list[str], interval: bool = True) -> str:
    successes, episodes = (sum(run[task][key] for task in tasks) for key in ("successes", "episodes"))
    text = f"{successes} of {episodes}"
    if interval:
        low, high = wilson(successes, episodes)
        text += f" ({100 * low:.0f} to {100 * high:.0f} %)"
    return text
