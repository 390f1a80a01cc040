"""Begin or continue a training run of an experiment in this folder, and keep what a reader needs of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vlafit import files, parent

KEPT = ("recipe.toml", "report.json", "run.json", "metrics.jsonl")


def is_finished(run: Path) -> bool:
    """Return whether a run has ended, its evaluations too."""
    facts = run / "run.json"
    return facts.is_file() and bool(json.loads(facts.read_text(encoding="utf-8")).get("finished"))


def words_of(recipe: str, seed: int, run: Path, *fields: str) -> list[str]:
    """Return the words of `vlafit train` that begin a run, or continue one that was stopped."""
    begun = ["--resume"] if (run / "recipe.toml").is_file() else []
    return ["train", recipe, "--out", str(run), "--train.seed", str(seed), *fields, *begun]


def carry_out(words: Sequence[str], run: Path) -> int:
    """Carry out `vlafit` with these words on one core; return its exit status.

    What it prints goes to `log_of` the run; its status and processor time are a line of `cpu_of` it.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    print("+ vlafit", *words, flush=True)
    with log_of(run).open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "vlafit", *words],
            stdin=parent.STDIN,  # if this process is killed, the run saves and ends
            env={**os.environ, "OMP_NUM_THREADS": "1", parent.VARIABLE: "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(child.pid, 0)  # with what its own children used
    child.returncode = os.waitstatus_to_exitcode(status)
    with cpu_of(run).open("a", encoding="utf-8") as times:
        line = {"status": child.returncode, "cpu_s": round(used.ru_utime + used.ru_stime, 1)}
        times.write(json.dumps(line) + "\n")
    return child.returncode


def log_of(run: Path) -> Path:
    """Return the file with what a run printed."""
    return run.parent / f"{run.name}.log"


def cpu_of(run: Path) -> Path:
    """Return the file with the processor time of each process that worked on a run."""
    return run.parent / f"{run.name}.cpu.jsonl"


def keep(run: Path, folder: Path) -> None:
    """Copy what a reader needs of a run: recipe, facts, metrics, every episode's outcome."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        keep_text(run / name, folder / name)
    for episodes in sorted(run.glob("eval/*/episodes.jsonl")):
        shutil.copy(episodes, folder / f"episodes_{episodes.parent.name}.jsonl")


def keep_text(source: Path, target: Path) -> None:
    """Copy a text without the paths of this machine."""
    files.write_atomic(target, source.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", ""))
