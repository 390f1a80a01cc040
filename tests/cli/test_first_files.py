"""A command that is ended when its first files appear goes on with the same command, to the same result."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.first_files import end_at, ended, listed
from tests.train.world import REPOSITORY, tiny, write_dots
from tests.variants import variants
from vlafit import cli, config

STUDY = 'trials = 1\n[search]\n"optim.lr" = { choices = [1e-3] }\n'
ARM, TRIAL = "arms/expert-lr0.001-seed3", "trials/0000/run"
VERBS = {
    "train": "train {home}/tiny.toml --out {out} --resume",
    "compare": "compare {home}/tiny.toml --strategies expert --seeds 1 --out {out}",
    "sweep": "sweep {home}/tiny.toml --study {home}/study.toml --out {out}",
    "eval": "eval {home}/start/checkpoints/step_000002 --protocol {home}/toy.toml --workers 1 --out {out}"
    " --resume",
    "data": "eval {home}/start/checkpoints/step_000002 --data {home}/dots.toml --samples 4 --out {out}"
    " --resume",
    "convert": "data convert {home}/dots.toml {out}/x --to lerobot",
    "export": "export {home}/start --to vlafit --out {out}/x",
}
RUN = {"train": "", "compare": f"{ARM}/", "sweep": f"{TRIAL}/"}
FIRST = {
    **{
        verb: [f"{run}{name}" for name in (".lock", "tensorboard", "recipe.toml", "plan.json", "run.json")]
        for verb, run in RUN.items()
    },
    "eval": [".lock", "evaluation.json", "videos", "episodes.jsonl"],
    "data": [".lock", "evaluation.json", "samples"],
    "convert": [".x.lock", ".x.partial"],
    "export": [".x.lock", ".x.partial", ".x.partial/model.safetensors"],
}


def run(home: Path, words: str, out: Path, env: dict[str, str] | None = None) -> int:
    """Return the exit status of a command; `compare` runs here, because its own processes are then forked."""
    arguments = words.format(home=home, out=out).split()
    if arguments[0] == "compare":
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            return cli.main(arguments)
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | (env or {})
    command = [sys.executable, "-m", "vlafit", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=surroundings).returncode


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("home")
    card = write_dots(folder)
    recipe = tiny(
        card,
        strategy="expert",
        train={"steps": 2, "validate_every": 2, "save_every": 0, "trackers": ("tensorboard",)},
        optim={"warmup_steps": 0, "ema": 0.0},
    )
    (folder / "tiny.toml").write_text(config.dump(recipe))
    (folder / "study.toml").write_text(STUDY)
    assert run(folder, "train {home}/tiny.toml --out {out}", folder / "start") == 0
    return folder


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Every loss of a run, with its step and name."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], k, v) for event in events for k, v in event.items() if k.endswith("/loss")]


def result(verb: str, folder: Path) -> object:
    """What a command has found out, without times."""
    if verb in RUN:
        return losses(folder / RUN[verb])
    if verb == "eval":
        rows = map(json.loads, (folder / "episodes.jsonl").read_text().splitlines())
        return [(row["task"], row["seed"], row["success"], row["steps"]) for row in rows]
    if verb == "data":
        return json.loads((folder / "result.json").read_text())["joints"]
    return {path.name: path.stat().st_size for path in (folder / "x").rglob("*") if path.is_file()}


@pytest.mark.case(
    section="runs",
    report="`not empty and does not hold a run` of a run that was just started, or of an arm of `compare`",
    user_has="a run, an arm or a trial that was killed or stopped while its first files were written",
    now="the same command goes on; `recipe.toml` is the first file",
)
@pytest.mark.parametrize(
    "case",
    variants(
        [
            (verb, path, how)
            for verb, paths in FIRST.items()
            for path in paths
            for how in (signal.SIGKILL, signal.SIGINT)
        ],
        always=[
            ("train", "tensorboard", signal.SIGINT),
            ("compare", f"{ARM}/tensorboard", signal.SIGKILL),
        ],
    ),
)
def test_a_command_that_ended_at_one_of_its_first_files_goes_on(
    home: Path, tmp_path: Path, case: tuple[str, str, signal.Signals]
) -> None:
    verb, path, how = case
    out, seen = tmp_path / "out", tmp_path / "seen.txt"
    assert run(home, VERBS[verb], out, end_at(out, seen, path, how)) != 0
    assert ended(seen), f"{path} is none of {listed(seen)}"
    if verb == "compare" and path.endswith("tensorboard"):
        (out / ARM / "recipe.toml").unlink()  # as an earlier version left it
        assert {file.name for file in (out / ARM).iterdir()} >= {"arm.json", "tensorboard"}
    assert run(home, VERBS[verb], out) == 0
    if verb in RUN:
        assert result(verb, out) == losses(home / "start")
    else:
        assert run(home, VERBS[verb], tmp_path / "undisturbed") == 0
        assert result(verb, out) == result(verb, tmp_path / "undisturbed")
    strays = [file.name for file in out.rglob("*") if file.name.endswith((".partial", ".lock"))]
    assert not strays
