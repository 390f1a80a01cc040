"""Two processes are one: the same losses, checkpoints that either can read and go on from."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.world import REPOSITORY, learned, losses, metrics, tiny
from tests.variants import variants
from vlafit import config, shipped
from vlafit.recipe import Recipe
from vlafit.train import run

STEPS = 12


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_in_two(
    recipes: Sequence[tuple[Recipe, Path]],
    folder: Path,
    processes: int = 2,
    environs: Sequence[Mapping[str, str]] = (),
) -> None:
    """Carry out recipes in two (or more) processes that talk over gloo, as torchrun starts them.

    `environs` are variables of each recipe, as a launcher's configuration sets them.
    """
    jobs = []
    for number, (recipe, out) in enumerate(recipes):
        path = folder / f"{number}.toml"
        path.write_text(config.dump(recipe))
        environ = {**(environs[number] if environs else {}), "MASTER_PORT": str(free_port())}
        jobs.append({"recipe": str(path), "out": str(out), "environ": environ})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    in_processes([sys.executable, "-m", "tests.train.launched", str(folder / "jobs.json")], processes)


def in_processes(command: Sequence[str], processes: int = 2, **env: str) -> None:
    """Run a command in several processes with the variables that torchrun sets."""
    shared = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true",
              "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"} | env  # fmt: skip
    started = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in map(str, range(processes))
    ]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)


def assert_close(one: Path, other: Path, key: str = "train/loss") -> None:
    pairs = [
        {event["step"]: event[key] for event in metrics(out) if key in event and event["step"] <= STEPS}
        for out in (one, other)
    ]
    assert pairs[0].keys() == pairs[1].keys()
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-5)


HOW = {  # what each recipe of the tests changes
    "copies": {},
    "sharded": {"train": {"sharding": "full"}},
    "sharded-gradients": {"train": {"sharding": "gradients", "validate_every": 4}},
    "frozen": {"strategy": "expert", "train": {"accumulate": 2}},
    "frozen-sharded": {"strategy": "expert", "train": {"sharding": "full", "accumulate": 2}},
    "cached": {"strategy": "expert", "train": {"cache": "memory"}},
    "lora": {"strategy": "lora"},
    "insulated-sharded": {"strategy": "insulated", "train": {"sharding": "full"}, "tokens": 24},
    "dora-sharded": {"strategy": "dora", "train": {"sharding": "full"}},
    "nf4": {"strategy": "qlora"},
    "int8": {"strategy": "int8.toml"},
    "nf4-sharded": {"strategy": "qlora", "train": {"sharding": "full"}},
    "int8-sharded": {"strategy": "int8.toml", "train": {"sharding": "gradients"}},
}


def selected(request: pytest.FixtureRequest) -> list[str]:
    """Return the names of the variants that this session runs of the module's tests."""
    tests = [item for item in request.session.items if item.path == request.path]
    specs = [spec for spec in (getattr(item, "callspec", None) for item in tests) if spec is not None]
    return sorted({spec.params["name"] for spec in specs if "name" in spec.params})


@pytest.fixture(scope="module")
def recipes(card: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    int8 = tmp_path_factory.mktemp("strategy") / "int8.toml"
    int8.write_text(shipped.find("strategy", "qlora").read_text().replace('"nf4"', '"int8"'))
    base = tiny(card, train={"steps": STEPS, "batch_size": 8, "save_every": 6, "validate_every": 0})
    made = {}
    for name, changes in HOW.items():
        train = replace(base.train, **changes.get("train", {}))
        strategy = changes.get("strategy", "full").replace("int8.toml", str(int8))
        made[name] = replace(base, strategy=strategy, train=train)
        if longest := changes.get("tokens"):
            sizes = base.policy.config | {"max_tokens": 40, "action_tokens": longest}
            sizes["language"] = {"depth": 2, "vocab": 700}
            policy = replace(base.policy, size="pi05-tiny", config=sizes)
            made[name] = replace(made[name], policy=policy)
    return made


# Each of the others has the same parts, in another combination.
NAMES = variants(HOW, always=["copies", "frozen-sharded"])


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    recipes: dict[str, Recipe],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folders one/NAME and two/NAME of the selected recipes in one process and in two.

    The folder resumed has the run "frozen-sharded" of one process, which two went on with from the middle.
    """
    folder = tmp_path_factory.mktemp("runs")
    chosen = {name: recipes[name] for name in [*selected(request), "frozen-sharded"]}
    for name, recipe in chosen.items():
        run(recipe, folder / "one" / name)
    (folder / "two").mkdir()
    shutil.copytree(folder / "one" / "frozen-sharded", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / f"step_{STEPS:06d}")
    fresh = [(recipe, folder / "two" / name) for name, recipe in chosen.items()]
    run_in_two([*fresh, (recipes["frozen-sharded"], folder / "resumed")], folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_losses_of_one(runs: Path, name: str) -> None:
    one, two = runs / "one" / name, runs / "two" / name
    assert len(losses(one)) == STEPS
    for key in ("train/loss", "train/grad_norm", "validation/loss", "validation/action_error"):
        assert_close(one, two, key)
    assert json.loads((two / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_write_the_checkpoint_of_one(runs: Path, name: str) -> None:
    files = ("policy.json", "codec.json", "plan.json", "tokenizer/tokenizer.json")
    folders = [runs / which / name / "checkpoints" / f"step_{STEPS:06d}" for which in ("one", "two")]
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    one, two = learned(runs / "one" / name, STEPS), learned(runs / "two" / name, STEPS)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    for key in one:
        if "k_proj.bias" in key:
            continue  # attention ignores it: its gradient is rounding alone, which AdamW then makes a step of
        assert two[key].allclose(one[key], rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("name", ["copies", "frozen-sharded"])
def test_two_processes_keep_half_of_the_average_each(runs: Path, name: str) -> None:
    def average(folder: str) -> int:
        return json.loads((runs / folder / name / "run.json").read_text())["memory"]["parts"]["average"]

    # Half; one tensor is at most a sixth of these policies, so that tensors as a whole do not halve exactly.
    assert 0.4 < average("two") / average("one") < 0.6


@pytest.mark.parametrize("name", ["copies", "frozen-sharded"])
def test_a_run_goes_on_in_another_number_of_processes(
    runs: Path, recipes: dict[str, Recipe], tmp_path: Path, name: str
) -> None:
    shutil.copytree(runs / "two" / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:06d}")
    run(recipes[name], tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed_from"] == "step_000006"
    assert_close(runs / "one" / name, tmp_path / "run")


def test_what_one_process_began_two_go_on_with(runs: Path) -> None:
    facts = json.loads((runs / "resumed" / "run.json").read_text())
    assert (facts["resumed_from"], facts["processes"]) == ("step_000006", 2)
    assert_close(runs / "one" / "frozen-sharded", runs / "resumed")


def test_accumulation_changes_nothing_but_memory(card: Path, tmp_path: Path) -> None:
    for accumulate in (1, 4):
        rare = {"save_every": 0, "validate_every": 0}
        recipe = tiny(card, train={"steps": 6, "batch_size": 8, "accumulate": accumulate, **rare})
        run(recipe, tmp_path / str(accumulate))
    assert_close(tmp_path / "1", tmp_path / "4")


@pytest.mark.slow
def test_compiled_blocks_that_are_sharded_have_the_losses_of_one_process(card: Path, tmp_path: Path) -> None:
    """By inductor, which takes four minutes."""
    recipe = tiny(card, train={"steps": 3, "batch_size": 8, "save_every": 0, "validate_every": 0})
    run(recipe, tmp_path / "one")
    train = replace(recipe.train, compile="blocks", sharding="full")
    run_in_two([(replace(recipe, train=train), tmp_path / "two")], tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_accelerate_launch_starts_them(card: Path, tmp_path: Path) -> None:
    recipe = tiny(card, train={"steps": 3, "sharding": "full", "report": True})
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    words = ["--config_file", "configs/accelerate/cpu2.yaml", "-m", "vlafit", "train"]
    words += [str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    surroundings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=REPOSITORY, env=os.environ | surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["processes"] == 2
    assert shlex.split(facts["command"]) == ["python", "-m", "accelerate.commands.launch", *words]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    again = next(one["command"] for one in report["commands"] if one["for"] == "the same run again")
    assert again.startswith(facts["command"].partition("train")[0])
    run(tiny(card, train={"steps": 3}), tmp_path / "one")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


STARTED_BY_SLURM = """#!/bin/bash
# As SLURM's srun: the same command on each machine, which has a number.
shift
for number in 0 1; do SLURM_NODEID=$number "$@" & started+=($!); done
for one in "${started[@]}"; do wait "$one" || exit 1; done
"""


@pytest.mark.slow
def test_a_job_of_slurm_starts_them(card: Path, tmp_path: Path) -> None:
    """By the shipped script, with stand-ins for SLURM's two programs; torchrun is the real one."""
    recipe = tiny(card, train={"steps": 3, "sharding": "full"})
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", STARTED_BY_SLURM), ("scontrol", "#!/bin/bash\necho localhost\necho other\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = {
        "PATH": path, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "some[1-2]", "PROCESSES": "1",
        "PORT": str(free_port()), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    script = REPOSITORY / "configs" / "accelerate" / "slurm.sh"
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), "--resume"],
        cwd=REPOSITORY, env=os.environ | surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["processes"] == 2 and facts["command"].startswith("torchrun --nnodes 2")
    run(tiny(card, train={"steps": 3}), tmp_path / "one")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
