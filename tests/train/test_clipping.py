"""The norm of a gradient in bfloat16 is computed without a float32 copy of it."""

import subprocess
import sys

import pytest
import torch

from vlafit.train.clipping import PIECE, norm_of

GROWTH = """
import torch
from pathlib import Path
from vlafit.train.clipping import PIECE, norm_of

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

gradient = torch.ones(16 * PIECE, dtype=torch.bfloat16)
norm_of(gradient[:PIECE])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
norm_of(gradient)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_norm_of_a_large_gradient_takes_the_memory_of_few_pieces():
    """Small results between the copies of pieces kept each of them from the place of the one before."""
    said = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True).stdout
    assert int(said) <= 4 * 4 * PIECE  # a copy of the whole has 16 pieces


def test_it_is_the_norm_in_float32():
    gradient = torch.randn(3 * PIECE + 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    lanes, half_ulp = 8, 2**-24  # each lane of a sum of squares rounds once a number; the root halves it
    bound = PIECE / lanes * half_ulp / 2
    assert norm_of(gradient).item() == pytest.approx(gradient.double().norm().item(), rel=bound)
