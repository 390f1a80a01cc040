"""A dataset layout, a checkpoint format, a policy family and a simulation, each one file of another package.

`vlafit_outside` is installed into a folder of its own, and used through the command line only. The first run
is a process of its own; the other commands run in this one, because each process imports torch anew.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlafit import cli

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "vlafit_outside"
PAGE = HERE.parents[1] / "docs" / "extending.md"
FAMILY = "vlafit_outside.chunk_regression"
SIZE, STEPS = 16, 6

CARD = """\
name = "dots"
layout = "png_folders"
path = "dots"

[robot]
name = "dot"
hz = 10
control = "delta_position"
renderer = "ray"

[[robot.cameras]]
name = "top"
key = "top"
height = 16
width = 16

[robot.state]
keys = ["at"]
dimensions = 2

[robot.action]
keys = ["move"]
dimensions = 2
"""

RECIPE = """\
name = "dots"

[policy]
family = "vlafit_outside.chunk_regression"
size = "tiny"

[data]
cards = ["dots.toml"]
validation = 0.25

[train]
steps = 8
batch_size = 4
validation_batches = 1
save_every = 4
trackers = []
"""

STRATEGY = """\
purpose = "LoRA on the head's hidden layer; its output is trained in full."

[[rule]]
select = { part = "head", kind = "mlp" }
mode = "lora"
rank = 2

[[rule]]
select = { part = "head" }
mode = "full"

[[rule]]
mode = "frozen"
"""

PROTOCOL = """\
name = "dots"
purpose = "Move the dot up or down."
tasks = ["up", "down"]
trials = 2
first_seed = 1000
horizon = 8
replan = 2

[env]
name = "vlafit_outside.dot"
renderer = "ray"
cameras = ["top"]
size = 16
"""


def write_episodes(folder: Path) -> None:
    """Write demonstrations of a dot that moves up or down, as the layout has them."""
    rng = np.random.default_rng(0)
    for number in range(8):
        task, sign = ("up", 1.0) if number % 2 else ("down", -1.0)
        episode = folder / f"{task}-{number}"
        (episode / "top").mkdir(parents=True)
        (episode / "task.txt").write_text(f"move {task}\n")
        at = rng.uniform(-0.5, 0.5, 2)
        with (episode / "steps.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["at_0", "at_1", "move_0", "move_1"])
            for step in range(STEPS):
                image = np.zeros((SIZE, SIZE, 3), np.uint8)
                row, column = ((at + 1) / 2 * (SIZE - 1)).astype(int)
                image[row, column] = 255
                Image.fromarray(image).save(episode / "top" / f"{step:04d}.png")
                rows.writerow([*at, 0.0, sign])
                at = np.clip(at + np.array([0.0, 0.1 * sign]), -1, 1)


class World:
    """A folder with the reader's files, beside which the package is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
        words = [*pip, "--no-index", "--no-build-isolation", "--target", str(self.site), str(PACKAGE)]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
        write_episodes(folder / "dots")
        files = {"dots.toml": CARD, "recipe.toml": RECIPE, "lora.toml": STRATEGY, "protocol.toml": PROTOCOL}
        for name, text in files.items():
            (folder / name).write_text(text)

    def vlafit(self, line: str, fails: bool = False) -> str:
        """Run a vlafit command here; return what it printed, or its message if it has to fail."""
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            status = cli.main(line.split())
        assert status == (2 if fails else 0), f"{line}\n{out.getvalue()}\n{err.getvalue()}"
        return err.getvalue() if fails else out.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("outside"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        patch.syspath_prepend(made.site)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(made.site), str(HERE.parents[1])]))
        yield made


@pytest.fixture(scope="module")
def trained(world: World) -> str:
    """A run on the layout's dataset, of the family, as a user starts it."""
    words = [sys.executable, "-m", "vlafit", "train", "recipe.toml"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return "runs/dots"


@pytest.fixture(scope="module")
def exported(world: World, trained: str) -> str:
    """That run's policy in the format."""
    world.vlafit(f"export {trained} --to npz --out exported")
    return "exported"


def arrays(world: World, folder: str) -> dict[str, np.ndarray]:
    with np.load(world.folder / folder / "weights.npz") as file:
        return {name: file[name] for name in file}


def test_a_run_trains_the_outside_policy_on_the_outside_layout(world, trained):
    run = json.loads((world.folder / trained / "run.json").read_text())
    assert run["finished"] and run["datasets"][0]["card"] == "dots"
    assert run["datasets"][0]["episodes"] == 6 and run["datasets"][0]["frames"] == 6 * STEPS
    lines = (world.folder / trained / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert losses and all(np.isfinite(losses))


def test_a_run_of_the_outside_policy_resumes_to_the_same_weights(world, trained, exported):
    world.vlafit("train recipe.toml --out runs/stopped --train.steps 8 --train.keep 4")
    world.vlafit(
        "train recipe.toml --out runs/stopped --train.steps 8 --train.keep 4 --resume-from 4 --resume"
    )
    world.vlafit("export runs/stopped --to npz --out resumed")
    before, after = arrays(world, exported), arrays(world, "resumed")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_outside_format_is_detected_and_holds_every_weight(world, exported):
    shown = json.loads(world.vlafit(f"inspect {exported} --whole --json"))
    assert shown["family"] == FAMILY and "npz" in shown["load"]
    weights = arrays(world, exported)
    assert set(shown["parts"]) == {"eyes", "head"}
    assert sum(w.size for name, w in weights.items() if name != "config") == shown["parameters"]
    assert shown["embodiment"]["hz"] == 10.0 and shown["codec"]["chunk"] == 4


def test_weights_go_through_the_native_format_and_back_unchanged(world, exported):
    world.vlafit(f"export {exported} --to vlafit --out native")
    world.vlafit("export native --to npz --out again")
    before, after = arrays(world, exported), arrays(world, "again")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_training_starts_from_the_outside_format_with_lora(world, exported):
    words = "--policy.family= --policy.size= --train.steps 4 --strategy lora.toml --out runs/lora"
    world.vlafit(f"train recipe.toml --policy.checkpoint {exported} {words}")
    world.vlafit("export runs/lora --to npz --merge --out merged")
    before, after = arrays(world, exported), arrays(world, "merged")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"mlp/weight", "out/weight", "out/bias"}


def test_a_damaged_file_of_the_outside_format_is_refused_by_its_own_names(world, exported):
    weights = arrays(world, exported)
    del weights["mlp/bias"]
    (world.folder / "damaged").mkdir()
    np.savez(world.folder / "damaged" / "weights.npz", **weights)
    assert "mlp/bias" in world.vlafit("inspect damaged", fails=True)


def test_a_cut_file_of_the_outside_format_is_named_by_format_and_by_entry_point(world, exported):
    whole = (world.folder / exported / "weights.npz").read_bytes()
    (world.folder / "cut").mkdir()
    (world.folder / "cut" / "weights.npz").write_bytes(whole[: len(whole) // 2])
    for line in ("inspect cut", "inspect cut --format vlafit_outside.npz_weights"):
        assert "cut/weights.npz" in world.vlafit(line, fails=True)


def test_a_recipe_names_a_family_that_is_one_file_and_a_checkpoint_of_it_needs_trust(world, exported):
    package = world.site / "vlafit_outside"
    text = (package / "chunk_regression.py").read_text()
    (world.site / "lone_policy.py").write_text(text)
    words = "--policy.family lone_policy --train.steps 2 --train.save_every 2 --eval.samples 0"
    world.vlafit(f"train recipe.toml {words} --train.report false --out runs/lone")
    policy = json.loads((world.folder / "runs/lone/checkpoints/step_000002/policy.json").read_text())
    assert policy["family"] == "lone_policy"
    del sys.modules["lone_policy"]  # as in another process
    message = world.vlafit("inspect runs/lone", fails=True)
    assert "--trust lone_policy" in message and "--policy.trust lone_policy" in message
    assert "lone_policy" not in sys.modules
    facts = json.loads(world.vlafit("inspect runs/lone --trust lone_policy --json"))
    assert facts["family"] == "lone_policy" and facts["report"]["fresh"] == []


def test_a_family_is_inspected_with_a_strategy_before_anything_is_trained(world):
    line = f"inspect {FAMILY} --size tiny --strategy lora.toml --batch 4"
    shown = json.loads(world.vlafit(f"{line} --json"))
    assert set(shown["parts"]) == {"eyes", "head"} and shown["strategy"]["name"] == "lora"
    text = world.vlafit(line)
    assert "forecast in MB" in text and " GB)" not in text
    assert "small, tiny" in world.vlafit(f"inspect {FAMILY}", fails=True)
    assert "--whole" in world.vlafit(f"inspect {FAMILY} --size tiny --whole", fails=True)


def test_the_outside_format_refuses_what_it_cannot_hold(world):
    message = world.vlafit("export metaworld-base --to npz --out refused", fails=True)
    assert FAMILY in message and not (world.folder / "refused").exists()


def test_the_outside_simulation_evaluates_the_outside_policy(world, trained):
    shown = world.vlafit(f"eval {trained} --protocol protocol.toml --workers 1 --videos 0 --out played")
    assert "up" in shown and "down" in shown
    episodes = (world.folder / "played" / "episodes.jsonl").read_text().splitlines()
    assert len(episodes) == 4 and not any(json.loads(line).get("error") for line in episodes)


def test_a_card_is_drafted_from_the_outside_layouts_files_and_reads_them_once_filled_in(world):
    text = world.vlafit("data card dots --layout png_folders")
    drafted = tomllib.loads(text)
    robot, known = drafted["robot"], tomllib.loads(CARD)["robot"]
    assert all(robot[key] == known[key] for key in ("cameras", "state", "action"))
    assert "first columns" in text and "steps a second" in text
    filled = text.replace("hz = 0.0", "hz = 10").replace('control = ""', 'control = "delta_position"')
    (world.folder / "drafted.toml").write_text(filled)
    assert "8 episodes" in world.vlafit("data inspect drafted.toml")


def test_a_wrong_card_of_the_outside_layout_names_file_and_columns(world):
    (world.folder / "wrong.toml").write_text(CARD.replace("dimensions = 2", "dimensions = 3", 1))
    message = world.vlafit("train recipe.toml --data.cards wrong.toml --out runs/wrong", fails=True)
    assert "steps.csv" in message and "at_0, at_1" in message


@pytest.mark.parametrize("name", sorted(p.name for p in (PACKAGE / "vlafit_outside").glob("[a-z]*.py")))
def test_the_page_shows_the_files_as_they_are(name):
    shown = re.findall(rf"```python\n# vlafit_outside/{name}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert shown == [(PACKAGE / "vlafit_outside" / name).read_text()]
