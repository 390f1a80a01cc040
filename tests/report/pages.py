"""Every kind of page that the package writes, with more columns and longer names than usual."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.datasets.arm_recordings import Recording, recorded
from tests.offline.actors import Sampling
from tests.report.synthetic import RECIPE, write_run
from tests.train.world import write_dots
from vlafit import report
from vlafit.compare import stored
from vlafit.compare.page import page as compare_page
from vlafit.datasets import open_dataset
from vlafit.datasets.checks import Checked, Finding
from vlafit.offline import Episodes, Settings, evaluate
from vlafit.report import findings, offline, training_data
from vlafit.sweep.report import SweepResult, Trial
from vlafit.sweep.report import page as sweep_page
from vlafit.sweep.study import Dimension, Study
from vlafit.sweep.worker import Sweep

PUBLISHED = Path(__file__).parents[2] / "eval" / "results"
SEARCH = (
    "optim.lr", "rule.rank", "rule.alpha", "optim.warmup_steps", "optim.weight_decay", "train.batch_size",
    "data.augment.brightness", "optim.ema", "rule.select.kind", "train.noise_draws", "optim.clip_norm",
)  # fmt: skip


def write_pages(folder: Path) -> dict[str, Path]:
    """Write a page of each kind into a folder, and return their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    published = stored.read(PUBLISHED / "compare")
    (folder / "compare.html").write_text(compare_page(published))
    (folder / "sweep.html").write_text(sweep_page(_sweep(folder)))
    return {
        "run": _run(folder),
        "offline": _offline(folder),
        "compare": folder / "compare.html",
        "sweep": folder / "sweep.html",
        "findings": _findings(folder),
    }


def _findings(folder: Path) -> Path:
    store = Recording(recorded(episodes=3))
    some = [
        Finding("error", "cameras_swapped", "episode_1", None, "what", "so", "do", ("front", "wrist")),
        Finding("warning", "jump", "episode_2", 7, "what", "so", "do", columns=(("action", 1),)),
    ]
    path = f"/a/long/path/{'without-a-gap-' * 20}/dataset"
    return findings.write_findings(store, path, Checked(tuple(some), ()), folder / "findings")


def _run(folder: Path) -> Path:
    run, dots = write_run(folder / "run"), open_dataset(write_dots(folder / "learned", episodes=3))
    names = [info.id for info in dots.episodes]
    training_data.write(run, [(dots, names[1:], names[:1])])
    return report.build(run)


def _offline(folder: Path) -> Path:
    dots = open_dataset(write_dots(folder / "dots"))
    names = [info.id for info in dots.episodes]
    split = Episodes(tuple(names[::2]), tuple(names[1::2]), "Held out.")
    settings = Settings(samples=8, draws=3)
    evaluate(Sampling(dots, 0.1), dots, split, folder / "offline", settings, identity="sampling" * 12)
    return offline.build(folder / "offline")


def _sweep(folder: Path) -> SweepResult:
    """Return twelve made-up trials of eleven searched names: complete, pruned and failed ones."""
    rng = np.random.default_rng(0)
    trials = []
    for number in range(12):
        state = "broke" if number == 5 else "pruned" if number % 4 == 3 else "whole"
        end = 500 if state == "whole" else 200
        curve = tuple(
            (step, float(np.exp(-step / 200) + 0.1 * rng.random() + 0.05)) for step in range(0, end + 1, 100)
        )
        values = {name: float(10 ** rng.uniform(-5, -3)) for name in SEARCH}
        loss = None if state == "broke" else curve[-1][1]
        error = "the loss is not finite at step 12" if state == "broke" else ""
        name = f"trials/{number:04d}-0123456789abcdef/run"
        trials.append(Trial(number, state, dict(values), loss, name, error, None, curve if loss else ()))
    study = Study({name: Dimension(1e-5, 1e-3, log=True) for name in SEARCH}, trials=12)
    recipe = replace(RECIPE, name="a-name-that-is-as-long-as-names-of-recipes-become-in-practice")
    return SweepResult(
        Sweep(recipe, study, folder), tuple(trials), "vlafit sweep quickstart --study many.toml"
    )
