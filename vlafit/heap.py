"""Have the C library return freed blocks to the system, where memory is what a run is short of."""

import ctypes
import os
import sys

LARGE = 2**20
"""Bytes. Between small blocks that stay in use, freed ones of less than this remain with the process."""
M_MMAP_THRESHOLD = -3  # glibc's malloc.h
ENVIRONMENT = "MALLOC_MMAP_THRESHOLD_"  # mallopt(3)


def return_freed_blocks() -> None:
    """Map each block of `LARGE` bytes or more by itself, from now on, so that freeing returns it at once.

    glibc does so for blocks of 32 MiB and more once such were freed; smaller ones come from a heap that only
    shrinks from its end. A user's own MALLOC_MMAP_THRESHOLD_ holds. Does nothing where the C library has no
    such setting.
    """
    if sys.platform != "linux" or ENVIRONMENT in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def trim() -> None:
    """Return the free pages of the heap to the system, once; nothing where the C library cannot."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
