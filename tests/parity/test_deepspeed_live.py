"""DeepSpeed's own engine against what a DeepSpeed configuration of accelerate becomes here: torch's FSDP2.

Two gloo processes each, the same recipe, samples and noise, and one DeepSpeed file that both read: ours
through the environment of `accelerate launch`. `make peers-deepspeed` makes the interpreter and runs this.

AdamW's epsilon is larger than the gradients, so that a step is nearly in proportion to its gradient: with the
usual one any factor would be lost, and a gradient that is rounding alone would become a whole step.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.rounding import ADAPTED_PATH, drift, unit_roundoff
from tests.train.test_launch import environment
from tests.train.test_two_processes import free_port, in_processes, run_in_two
from tests.train.world import REPOSITORY, metrics, tiny, write_dots
from vlafit import config
from vlafit.recipe import Recipe
from vlafit.train.experiment import build

PYTHON = os.environ.get("VLAFIT_DEEPSPEED_PYTHON", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON, reason="VLAFIT_DEEPSPEED_PYTHON names no interpreter that has DeepSpeed"),
]

STEPS, LR, EPS, CLIP, ACCUMULATE = 4, 1e-2, 1.0, 0.5, 2
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


class Case(NamedTuple):
    """One comparison."""

    stage: int
    precision: str
    strategy: str = "full"
    recompute: str = "none"

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


CASES = [
    Case(0, "fp32"),
    *(Case(stage, precision) for stage in (1, 2, 3) for precision in PRECISIONS),
    *(Case(stage, "fp32", "lora") for stage in (1, 2, 3)),
    *(Case(stage, "fp32", "full", "full") for stage in (2, 3)),
]


class Side(NamedTuple):
    """What one engine found."""

    losses: list[float]
    norms: list[float]
    began: dict[str, Tensor]
    ended: dict[str, Tensor]

    @property
    def moved(self) -> Tensor:
        """By how much all weights changed, as one vector."""
        return flat(self.ended) - flat(self.began)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def recipe_of(case: Case, card: Path) -> Recipe:
    train = {"steps": STEPS, "batch_size": 8, "save_every": 0, "validate_every": 0}
    recipe = tiny(
        card,
        strategy=case.strategy,
        data={"validation": 0.0},
        optim={"lr": LR, "eps": EPS, "ema": 0.0},
        train=train | ({"recompute": case.recompute} if case.recompute != "none" else {}),
    )
    return replace(recipe, name=case.name)


def file_of(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": ACCUMULATE,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case.stage}, "zero_allow_untested_optimizer": True,
        **PRECISIONS[case.precision],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ours/NAME and theirs/NAME of every case."""
    folder = tmp_path_factory.mktemp("engines")
    card = write_dots(folder / "data")
    recipes, environs, jobs = [], [], []
    for case in CASES:
        recipe, zero, toml = recipe_of(case, card), folder / f"{case.name}.json", folder / f"{case.name}.toml"
        zero.write_text(json.dumps(file_of(case)))
        toml.write_text(config.dump(recipe))
        launcher = environment(
            folder, distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": str(zero)}
        )
        environs.append({
            key: value for key, value in launcher.items()
            if key.startswith("ACCELERATE_") and key != "ACCELERATE_USE_CPU" and os.environ.get(key) != value
        })  # fmt: skip
        recipes.append((recipe, folder / "ours" / case.name))
        jobs.append({"recipe": str(toml), "zero": str(zero), "out": str(folder / "theirs" / case.name)})
    (folder / "ours").mkdir()
    run_in_two(recipes, folder, environs=environs)
    (folder / "theirs.json").write_text(json.dumps(jobs))
    port = {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
    in_processes([PYTHON, "-m", "tests.parity.deepspeed_side", str(folder / "theirs.json")], **port)
    return folder


def policy_of(case: Case, folder: Path) -> dict[str, Tensor]:
    """Return what is trained, as it is before the first step."""
    policy = build(recipe_of(case, folder / "data" / "dots.toml"), torch.device("cpu")).policy
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def ours(run: Path, began: dict[str, Tensor]) -> Side:
    events = [event for event in metrics(run) if "train/loss" in event]
    saved = load_file(run / "checkpoints" / f"step_{STEPS:06d}" / "training" / "state.safetensors")
    ended = {name: saved[f"weight/{name}"] for name in began}
    return Side([e["train/loss"] for e in events], [e["train/grad_norm"] for e in events], began, ended)


def theirs(out: Path) -> Side:
    found = json.loads((out / "found.json").read_text())
    began, ended = (load_file(out / f"{name}.safetensors") for name in ("began", "ended"))
    return Side(found["losses"], found["norms"], began, ended)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fsdp2_learns_what_deepspeeds_engine_does(folder: Path, case: Case) -> None:
    one, other = (
        ours(folder / "ours" / case.name, policy_of(case, folder)),
        theirs(folder / "theirs" / case.name),
    )
    assert one.ended.keys() == other.ended.keys()
    unit = unit_roundoff(torch.float32 if case.precision == "fp32" else torch.bfloat16)
    share = drift(unit, 2 * ADAPTED_PATH, 1.0)  # of a gradient, which goes forward and backward
    if case.stage:
        assert one.norms == pytest.approx(other.norms, rel=share)
    # AdamW's step changes by at most 2 / eps times as much as the gradients that it has seen: once by their
    # mean, once by the root of their mean square. Each result is rounded to fp32.
    rounded = unit_roundoff(torch.float32) * STEPS**0.5 * float(flat(one.ended).norm())
    bound = STEPS * LR * 2 / EPS * share * CLIP + rounded
    moved, apart = float(one.moved.norm()), float((one.moved - other.moved).norm())
    losses = max(abs(a / b - 1) for a, b in zip(one.losses, other.losses, strict=True))
    print(
        f"{case.name}: losses {losses:.1e} apart; weights moved by {moved:.1e}, {apart:.1e} apart, "
        f"bound {bound:.1e}"
    )
    assert one.losses == pytest.approx(other.losses, rel=share)
    assert apart < bound < moved


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_run_has_what_the_file_asks_for(folder: Path, case: Case) -> None:
    recipe = config.read(Recipe, folder / "ours" / case.name / "recipe.toml", "recipe")
    precision = "fp32" if case.precision == "fp32" else "bf16"
    sharding = ("none", "gradients", "gradients", "full")[case.stage]
    assert (recipe.train.precision, recipe.train.sharding) == (precision, sharding)
    assert (recipe.train.accumulate, recipe.optim.clip_norm) == (ACCUMULATE, CLIP)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_deepspeeds_bf16_begins_from_rounded_weights_and_ours_does_not(folder: Path, case: Case) -> None:
    whole = policy_of(case, folder)
    for name, began in theirs(folder / "theirs" / case.name).began.items():
        rounded = whole[name].bfloat16().float()
        assert torch.equal(began, rounded if case.precision == "bf16" else whole[name]), name


def test_accelerate_launch_with_deepspeed_installed_says_what_runs_instead(tmp_path: Path) -> None:
    case = Case(2, "fp32")
    recipe = recipe_of(case, write_dots(tmp_path / "data"))
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    (tmp_path / "zero.json").write_text(json.dumps(file_of(case)))
    words = [
        "--use_deepspeed",
        "--deepspeed_config_file",
        str(tmp_path / "zero.json"),
        "--num_processes",
        "2",
    ]
    words += ["--mixed_precision", "no", "--main_process_port", str(free_port()), "-m", "vlafit", "train"]
    words += [str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    shared = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [PYTHON, "-m", "accelerate.commands.launch", *words],
        cwd=REPOSITORY,
        env=os.environ | shared | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, said
    assert "DeepSpeed itself does not run. torch's FSDP2 does in its place, because its runs resume" in said
    settled = config.read(Recipe, tmp_path / "run" / "recipe.toml", "recipe")
    assert (settled.train.sharding, settled.train.accumulate) == ("gradients", ACCUMULATE)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
