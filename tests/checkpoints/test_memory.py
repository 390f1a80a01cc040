"""Opening a large checkpoint makes no second copy: the peak of anonymous memory, measured in a new process.

pi0 at a quarter of its width in every direction, 0.9 GB in float32, filled at random; the files are removed.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vlafit.checkpoints.names import back
from vlafit.checkpoints.openpi import NAMES
from vlafit.policies.pi0 import SIZES, Pi0Config, build

PROGRAM = """
import json, sys, threading, time
import torch, safetensors, tensorstore, vlafit
import vlafit.checkpoints.load, vlafit.policies.pi0

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

vlafit.policies.pi0.build(vlafit.policies.pi0.SIZES["pi0-tiny"], "meta")  # torch now imports 70 MB of itself
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
look = getattr(vlafit.checkpoints, sys.argv[3])
loaded = look(sys.argv[1], config={"vision.heads": 16, "chunk": 50}, dtype=sys.argv[2])
done = True; thread.join()
print(json.dumps({"before": before, "peak": peak, "weights": loaded.report.bytes}))
"""


def quarter() -> Pi0Config:
    from vlafit.policies import override

    widths = {
        "vision": {"width": 288, "mlp": 1076},
        "language": {"width": 512, "mlp": 4096, "head_dim": 64, "vocab": 64288},
        "expert": {"width": 256, "mlp": 1024},
    }
    return override(SIZES["pi0"], widths, "here")


def numbers(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    for start in range(0, count, 1 << 22):
        yield rng.standard_normal(min(1 << 22, count - start), dtype=np.float32)


def write_safetensors(path: Path) -> None:
    """Write openpi's form piece by piece, without the tensors in memory."""
    shapes = {n: tuple(p.shape) for n, p in build(quarter(), "meta").named_parameters()}
    meta = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    header, end = {}, 0
    for name, tensor in back(meta, NAMES).items():
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in numbers(end // 4, rng):
            file.write(piece.tobytes())


def write_orbax(folder: Path) -> None:
    """Write openpi's tree with every leaf in one piece, which is what needs the most room to read."""
    import tensorstore

    fixture = Path(__file__).parents[1] / "fixtures" / "openpi_jax" / "full_layouts.json"
    leaves = json.loads(fixture.read_text())["pi0"]["leaves"]
    small = {1152: 288, 4304: 1076, 2048: 512, 16384: 4096, 1024: 256, 4096: 1024, 257152: 64288, 72: 18}
    rng = np.random.default_rng(0)
    folder.mkdir()
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    for name, shape in leaves.items():
        shape = [64 if n == 256 and "einsum" in name else small.get(n, n) for n in shape]
        spec = {
            "driver": "zarr",
            "kvstore": {**base, "path": f"params.{name.replace('/', '.')}/"},
            "metadata": {"shape": shape, "chunks": shape, "dtype": "<f4", "compressor": {"id": "zstd"}},
        }
        values = np.concatenate(list(numbers(int(np.prod(shape)), rng))).reshape(shape)
        tensorstore.open(spec, create=True).result().write(values).result()


def measure(path: Path, dtype: str, verb: str = "load") -> dict[str, int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), dtype, verb],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(path.name, dtype, verb, {k: round(v / 1e6) for k, v in found.items()}, "MB")
    return found


@pytest.mark.slow
def test_a_safetensors_file_is_loaded_with_one_copy_in_memory(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path)
    try:
        for dtype in ("float32", "bfloat16"):
            found = measure(path, dtype)
            assert found["peak"] - found["before"] < 1.15 * found["weights"], dtype
        found = measure(path, "float32", "inspect")
        assert found["peak"] - found["before"] < 0.05 * found["weights"]
    finally:
        path.unlink()


@pytest.mark.slow
def test_an_orbax_folder_is_loaded_with_half_a_copy_beside_the_weights(tmp_path: Path):
    folder = tmp_path / "params"
    write_orbax(folder)
    try:
        for dtype in ("float32", "bfloat16"):
            found = measure(folder, dtype)
            assert found["peak"] - found["before"] < 1.5 * found["weights"], dtype
        found = measure(folder, "float32", "inspect")
        assert found["peak"] - found["before"] < 0.05 * found["weights"]
    finally:
        shutil.rmtree(folder)
