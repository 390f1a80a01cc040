"""Measure peak anonymous memory while a pi0 checkpoint with random weights is opened.

    python benchmarks/load_memory.py FOLDER [--divide 1] [--form safetensors|orbax] [--dtype bfloat16]

Writes pi0 in openpi's format, every width divided by `--divide`, into FOLDER (which must not exist), inspects
and loads it in a new process, prints one line of JSON, and removes FOLDER. `ratio` is the peak above the
process's memory before, divided by the size of the weights in the requested dtype. Full size (1) takes 7 GB
of disk and memory for safetensors in bfloat16, and 2 GB of disk and 8 GB of memory for Orbax.
"""

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlafit.checkpoints.formats.openpi.names import NAMES
from vlafit.checkpoints.name_map import back
from vlafit.policies import override
from vlafit.policies.pi0 import SIZES, Pi0Config, build

LAYOUT = Path(__file__).parents[1] / "tests" / "fixtures" / "openpi_jax" / "full_layouts.json"
BLOCK = 1 << 22  # numbers that are drawn once, and repeated

WATCH = """
import json, sys, threading, time
import torch, safetensors, tensorstore, vlafit
import vlafit.checkpoints.load, vlafit.policies.pi0

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def measured(look):
    before, found = anonymous(), {"peak": 0, "done": False}
    def watch():
        while not found["done"]:
            found["peak"] = max(found["peak"], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    loaded = look(sys.argv[1], config=json.loads(sys.argv[3]), dtype=sys.argv[2])
    found["done"] = True
    thread.join()
    peak = found["peak"] - before
    weights = loaded.report.bytes
    return {"peak": peak, "weights": weights, "ratio": round(peak / weights, 4),
            "seconds": round(time.perf_counter() - began, 2)}

vlafit.policies.pi0.build(vlafit.policies.pi0.SIZES["pi0-tiny"], "meta")  # torch now imports 70 MB of itself
found = {look: measured(getattr(vlafit.checkpoints, look)) for look in ("inspect", "load")}
print(json.dumps(found))
"""


def sizes(divide: int, layers: int = 18) -> Pi0Config:
    """Return pi0 with every width divided by `divide`, and `layers` layers in each decoder."""
    full = asdict(SIZES["pi0"])
    less = {
        "vision": {key: full["vision"][key] // divide for key in ("width", "mlp")}
        | {"depth": layers * 3 // 2},
        "language": {key: full["language"][key] // divide for key in ("width", "mlp", "head_dim", "vocab")}
        | {"depth": layers},
        "expert": {key: full["expert"][key] // divide for key in ("width", "mlp")},
    }
    return override(SIZES["pi0"], less, "divided")


def write_safetensors(path: Path, config: Pi0Config, dtype: str) -> None:
    """Write openpi's PyTorch form piece by piece, the tensors never in memory; norms and the like too."""
    width = {"bfloat16": 2, "float32": 4}[dtype]
    meta = {n: torch.empty(p.shape, device="meta") for n, p in build(config, "meta").named_parameters()}
    header, end = {}, 0
    for name, tensor in back(meta, NAMES).items():
        size = width * tensor.numel()
        code = "BF16" if width == 2 else "F32"
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.from_numpy(_block()).to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(block)):
            file.write(memoryview(block)[: end - start])


def write_orbax(folder: Path, config: Pi0Config) -> None:
    """Write openpi's JAX form in float32, every leaf one piece, which is what needs the most room to read."""
    import tensorstore

    full, less = asdict(SIZES["pi0"]), asdict(config)
    folder.mkdir()
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    listed: dict[str, Any] = {}
    for name, shape in json.loads(LAYOUT.read_text())["pi0"]["leaves"].items():
        shape = _shrunk(name, shape, full, less)
        spec = {
            "driver": "zarr",
            "kvstore": {**base, "path": f"params.{name.replace('/', '.')}/"},
            "metadata": {"shape": shape, "chunks": shape, "dtype": "<f4", "compressor": {"id": "zstd"}},
        }
        values = np.empty(math.prod(shape), np.float32)
        block = _block()
        for start in range(0, values.size, BLOCK):
            values[start : start + BLOCK] = block[: values.size - start]
        tensorstore.open(spec, create=True).result().write(values.reshape(shape)).result()
        keys = [{"key": piece, "key_type": 2} for piece in ("params", *name.split("/"))]
        listed[name] = {"key_metadata": keys, "value_metadata": {"value_type": "jax.Array"}}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": listed}))


def _shrunk(name: str, shape: list[int], full: dict[str, Any], less: dict[str, Any]) -> list[int]:
    divide = full["language"]["width"] // less["language"]["width"]
    tower = "/img/" in name
    layered = "encoderblock" in name or "/llm/layers/" in name
    kept = {32, 3, 14, 16, 8, 1, 2}  # action width, colours, patch, heads, pairs
    rest = shape[1:] if layered else shape
    small = [n if n in kept or (n == 256 and tower) else n // divide for n in rest]
    return [less["vision" if tower else "language"]["depth"], *small] if layered else small


def _block() -> np.ndarray:
    """Return random numbers of few values, which keep the compressed files small."""
    return (np.random.default_rng(0).integers(-4, 4, BLOCK) / 64).astype(np.float32)


def measure(path: Path, dtype: str, config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Inspect and load `path` in a new process; return peak, size of the weights, their ratio and seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", WATCH, str(path), dtype, json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def run(folder: Path, form: str, dtype: str, config: Pi0Config) -> dict[str, dict[str, float]]:
    """Write a file, measure how it is opened, and remove it."""
    folder.mkdir(parents=True)
    try:
        path = folder / ("params" if form == "orbax" else "model.safetensors")
        if form == "orbax":
            write_orbax(path, config)
        else:
            write_safetensors(path, config, dtype)
        told = {"vision.heads": config.vision.heads, "chunk": config.chunk}
        if config.language.head_dim != SIZES["pi0"].language.head_dim or config.language.depth != 18:
            told |= {"language.head_dim": config.language.head_dim}
        return measure(path, dtype, told)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure what the command line says, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--form", choices=("safetensors", "orbax"), default="safetensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    began = time.perf_counter()
    found = run(options.folder, options.form, options.dtype, sizes(options.divide))
    print(json.dumps({**vars(options), "folder": "", **found, "wall": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
