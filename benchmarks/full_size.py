"""Fine-tune a pi0 of public size, with random weights from disk, on a CPU: time and memory of each command.

    python -m benchmarks.full_size FOLDER [--divide 1] [--rungs expert lora full] [--out full_size.jsonl]

Writes into FOLDER (which must not exist) a checkpoint in openpi's format in bfloat16, every width divided by
--divide, and a dataset of random frames of three cameras. Then, as a user would: `vlafit train` of two steps
of one sample with a checkpoint after each, the same with --resume for a third step, and `vlafit export` to
LeRobot's format (of other widths: to vlafit's own). Each command is a process of its own. FOLDER is
removed at the end.

rungs       expert, lora: those strategies, as they are in bf16. full: full fine-tuning on the last rung of
            the ladder: full recompute, 8-bit moments, weights in bf16, steps in the backward pass.
            untrained: LoRA with random adapters, which is only exported, to openpi's format.
peak        of the anonymous memory of the command and its children, read every 20 ms, in 10^9 bytes. A forked
            child that has not yet started its program is not counted.
resident    of their resident set, in which pages of files that are mapped count, too; the system takes those
            back where memory is short.
--limit     gigabytes of anonymous memory at which a command is ended, and its row says so. It is also ended
            when the machine has less than 2 GB left, because others may work on it.
step_s      seconds of each training step, loading of the sample included.
The full size takes 40 GB of disk, with the rung full 50.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import psutil
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from benchmarks import rows
from benchmarks.load_memory import sizes, write_safetensors
from benchmarks.rows import Row
from vlafit import checkpoints
from vlafit.codec.tokenizer import SPECIAL, Tokenizer
from vlafit.policies.pi0 import SIZES, Pi0Config
from vlafit.tuning import apply_strategy
from vlafit.tuning.inject import adapter_tensors

FREE_AT_LEAST = 2e9
EVERY_S = 0.02
CAMERAS, SIDE, STEPS = 3, 224, 60
INSTRUCTION = "put the bowl on the plate"
RUNGS = {
    "expert": ("expert", {}, {}),
    "lora": ("lora", {}, {}),
    "full": (
        "full",
        {"recompute": '"full"', "weights": '"bf16"'},
        {"states": '"8bit"', "in_backward": "true"},
    ),
}
"""Name -> strategy, fields of [train], fields of [optim]."""
UNTRAINED = "untrained"
COLUMNS = ("rung", "command", "peak_gb", "resident_gb", "seconds", "step_s", "disk_gb", "loss")
CARD = """
name = "random-frames"
layout = "libero"
path = "frames"

[instruction]
source = "attrs"

[robot]
name = "arm"
hz = 10.0
control = "delta_pose"
state = {{ keys = ["obs/state"], dimensions = 8 }}
action = {{ keys = ["actions"], dimensions = 7 }}
{cameras}
"""
CAMERA = """
[[robot.cameras]]
name = "camera{number}"
key = "obs/camera{number}"
height = {side}
width = {side}
"""
RECIPE = """
name = "full-size"
strategy = "{strategy}"

[policy]
checkpoint = "{checkpoint}"
tokenizer = "{tokenizer}"
config = {config}

[data]
cards = ["{card}"]
statistics = "data"
validation = 0.0

[adapt]
cameras = {{ {cameras} }}

[optim]
{optim}

[train]
steps = 2
batch_size = 1
precision = "bf16"
save_every = 1
validate_every = 0
log_every = 1
keep = 0
keep_best = false
trackers = []
report = false
{train}

[eval]
after = false
samples = 0
"""
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # openpi: cameras of pi0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=[*RUNGS, UNTRAINED])
    parser.add_argument("--limit", type=float, default=18.0, metavar="GB")
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        measured = []
        for row in measure_all(options):
            rows.write(row, options.out)
            measured.append(row)
    finally:
        shutil.rmtree(options.folder)
    print(rows.table(measured, COLUMNS))
    return 1 if any("error" in row for row in measured) else 0


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the row of each command; a rung whose command fails is left."""
    folder: Path = options.folder
    config = sizes(options.divide)
    write_inputs(folder, config)
    machine = rows.machine(torch.device("cpu"), "") | {"divide": options.divide}
    target = "lerobot" if options.divide == 1 else "vlafit"  # LeRobot builds none of other widths
    for name in options.rungs:
        out = folder / name
        if name == UNTRAINED:
            write_adapters(folder, config)
            words = ["export", str(out), "--to", "openpi", "--dtype", "bfloat16"]
            row = watched([*words, "--out", str(folder / "exported")], options.limit)
            yield machine | {"rung": name, "command": "export"} | row
            shutil.rmtree(folder / "exported", ignore_errors=True)
            continue
        recipe = folder / f"{name}.toml"
        recipe.write_text(recipe_of(name, folder, config))
        last = out / "checkpoints" / "step_000003"
        commands = {
            "train": ["train", str(recipe), "--out", str(out)],
            "resume": ["train", str(recipe), "--out", str(out), "--resume", "--train.steps", "3"],
            "export": ["export", str(last), "--to", target, "--out", str(folder / "exported")],
        }
        for command, words in commands.items():
            row = machine | {"rung": name, "command": command} | watched(words, options.limit)
            written = folder / "exported" if command == "export" else out
            row |= {"disk_gb": round(disk(written) / 1e9, 3)} | (of_steps(out) if command != "export" else {})
            yield row
            if "error" in row:
                break
        for written in (out, folder / "exported"):
            shutil.rmtree(written, ignore_errors=True)


def write_inputs(folder: Path, config: Pi0Config) -> None:
    """Write checkpoint, dataset and card."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_safetensors(checkpoint / "model.safetensors", config, "bfloat16")
    rng = np.random.default_rng(0)
    (folder / "frames").mkdir()
    with h5py.File(folder / "frames" / "random_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": INSTRUCTION})
        for number in range(2):
            group = data.create_group(f"demo_{number}")
            group.create_dataset("actions", data=rng.normal(size=(STEPS, 7)).astype(np.float32))
            group.create_dataset("obs/state", data=rng.normal(size=(STEPS, 8)).astype(np.float32))
            for camera in range(CAMERAS):
                frames = rng.integers(0, 256, (STEPS, SIDE, SIDE, 3), dtype=np.uint8)
                group.create_dataset(f"obs/camera{camera}", data=frames)
    cameras = "".join(CAMERA.format(number=number, side=SIDE) for number in range(CAMERAS))
    # Words, and names that no text has: as many as the embedding has rows, as a pretrained one's tokenizer.
    names = [*SPECIAL, *dict.fromkeys(INSTRUCTION.split())]
    names += [f"<unused{number}>" for number in range(config.language.vocab - len(names))]
    words = tokenizers.Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token=SPECIAL[0]))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    Tokenizer(words, 0, 1, 2).save(folder / "tokenizer")
    (folder / "card.toml").write_text(CARD.format(cameras=cameras))


def write_adapters(folder: Path, config: Pi0Config) -> None:
    """Write LoRA with random numbers onto the checkpoint, as a run's checkpoint is written."""
    file = folder / "checkpoint" / "model.safetensors"
    loaded = checkpoints.load_all(file, told_of(config), deferred=True)
    plan = apply_strategy(loaded.policy, "lora")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in adapter_tensors(loaded.policy):
            loaded.policy.get_parameter(name).normal_(0.0, 0.02, generator=rng)
    source = loaded.policy.source
    assert source is not None
    base = checkpoints.Base(source.checkpoint, checkpoints.digest(file), source.config)
    checkpoints.save(loaded.policy, folder / UNTRAINED, plan=plan, base=base, changed=())


def told_of(config: Pi0Config) -> dict[str, object]:
    """Return the sizes that no file of openpi's records."""
    told: dict[str, object] = {"vision.heads": config.vision.heads, "chunk": config.chunk}
    if config.language.head_dim != SIZES["pi0"].language.head_dim:
        told["language.head_dim"] = config.language.head_dim
    return told


def recipe_of(name: str, folder: Path, config: Pi0Config) -> str:
    """Return the recipe of a rung."""
    strategy, train, optim = RUNGS[name]
    told = told_of(config)
    return RECIPE.format(
        strategy=strategy,
        checkpoint=folder / "checkpoint",
        tokenizer=folder / "tokenizer",
        config="{ " + ", ".join(f'"{key}" = {value}' for key, value in told.items()) + " }",
        card=folder / "card.toml",
        cameras=", ".join(f'"{slot}" = "camera{number}"' for number, slot in enumerate(SLOTS)),
        optim="\n".join(f"{key} = {value}" for key, value in optim.items()),
        train="\n".join(f"{key} = {value}" for key, value in train.items()),
    )


def watched(words: Sequence[str], limit: float) -> Row:
    """Run a command of vlafit, and return its seconds, its peak and, where it failed, the last it said."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    began, peak, largest, why = time.perf_counter(), 0, 0, ""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlafit", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    own = psutil.Process(process.pid)
    while process.poll() is None:
        anonymous, everything = resident(own)
        peak, largest = max(peak, anonymous), max(largest, everything)
        free = psutil.virtual_memory().available
        if peak > limit * 1e9 or free < FREE_AT_LEAST:
            why = f"ended at {peak / 1e9:.2f} GB (limit {limit} GB; {free / 1e9:.2f} GB were free)"
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(EVERY_S)
    said = process.stdout.read() if process.stdout else ""
    row: Row = {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(peak / 1e9, 2)}
    row["resident_gb"] = round(largest / 1e9, 2)
    if process.returncode:
        row["error"] = why or " ".join(said.split())[-rows.LONGEST_ERROR :]
    return row


def resident(process: psutil.Process) -> tuple[int, int]:
    """Return the anonymous memory and the resident set of a process and its children.

    Until a forked child starts its program, it has the pages of its parent, which are there once.
    """
    anonymous = everything = 0
    for one in (process, *_children(process)):
        try:
            held = one.memory_info()
            if one is not process and one.cmdline() == process.cmdline():
                continue
        except psutil.Error:  # it has ended
            continue
        anonymous, everything = anonymous + held.rss - held.shared, everything + held.rss
    return anonymous, everything


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def of_steps(out: Path) -> Row:
    """Return seconds and losses of the steps that a run logged."""
    log = out / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    steps = [event for event in events if "train/loss" in event]
    times = [1 / event["train/samples_per_s"] for event in steps]
    return {"step_s": [round(seconds, 1) for seconds in times], "loss": [s["train/loss"] for s in steps]}


def disk(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    raise SystemExit(main())
