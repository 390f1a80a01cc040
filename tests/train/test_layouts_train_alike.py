"""The same episodes train to the same result whatever layout they are stored in."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets import hdf5_writers, layouts, lerobot_files
from tests.train.world import metrics, tiny
from vlafit.datasets.card import InstructionCard
from vlafit.datasets.write import card_text
from vlafit.train import run

TASKS = {"turn_on_the_stove": "left", "open_the_drawer": "right"}  # one word: file, folder and sentence agree


def losses(card: Path, out: Path) -> list[float]:
    run(tiny(card, train={"steps": 2, "validate_every": 1, "save_every": 0}), out)
    return [event["validation/loss"] for event in metrics(out) if "validation/loss" in event]


def test_libero_aloha_and_lerobot_files_of_the_same_episodes_give_the_same_validation_loss(
    tmp_path: Path,
) -> None:
    episodes = sorted(
        (replace(demo, task=TASKS[demo.task]) for demo in layouts.demos(3)), key=lambda demo: demo.task
    )
    robot = lerobot_files.write(tmp_path / "lerobot", episodes)
    libero = layouts.card(layouts.write_libero(tmp_path / "libero", episodes))
    aloha = hdf5_writers.aloha(tmp_path / "aloha", episodes)
    aloha = replace(aloha, instruction=InstructionCard("card", files={word: word for word in TASKS.values()}))
    results = {}
    for name, card in (("lerobot", robot), ("libero", libero), ("aloha", aloha)):
        state = replace(card.robot.state, labels=())
        path = tmp_path / f"{name}.toml"
        path.write_text(card_text(replace(card, robot=replace(card.robot, state=state))))
        results[name] = losses(path, tmp_path / "runs" / name)
    assert len(results["libero"]) == 3
    assert results["lerobot"] == results["libero"] == results["aloha"]  # bit for bit
    assert results["libero"][0] != pytest.approx(results["libero"][-1], rel=1e-6)
