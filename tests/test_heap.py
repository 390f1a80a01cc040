"""Freed blocks go back to the system, also those between small blocks that stay."""

import subprocess
import sys

BLOCKS, BYTES = 32, 8 * 2**20
PROGRAM = f"""
import ctypes, sys
from pathlib import Path
from vlafit.heap import return_freed_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(24 * 2**20))  # after which glibc takes blocks of less from its heap
if sys.argv[1] == "returned":
    return_freed_blocks()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {4096}


before, large = resident(), []
for _ in range({BLOCKS}):
    large.append(libc.malloc({BYTES}))
    ctypes.memset(large[-1], 1, {BYTES})
    ctypes.memset(libc.malloc(4096), 1, 4096)
for block in large:
    libc.free(block)
print(resident() - before)
"""


def left(how: str, **environment: str) -> int:
    """Return the bytes that remain resident once all large blocks are freed."""
    words = [sys.executable, "-c", PROGRAM, how]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=environment or None)
    return int(ran.stdout)


def test_large_blocks_that_are_freed_are_returned_although_small_ones_between_them_stay() -> None:
    # Half of all, because pages of the interpreter's own come and go.
    assert left("kept") > BLOCKS * BYTES / 2
    assert left("returned") < BLOCKS * BYTES / 2


def test_a_limit_of_the_users_own_holds() -> None:
    assert left("returned", MALLOC_MMAP_THRESHOLD_=str(24 * 2**20)) > BLOCKS * BYTES / 2
