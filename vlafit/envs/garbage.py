"""Collect garbage with no OpenGL context current, so that what is freed belongs to nobody else.

A simulator's dead renderer is often part of a reference cycle, so Python frees it at some later allocation.
It then deletes its buffers and textures by number, in whichever context is current, and those of a live
renderer have the same numbers: its next pictures are noise. mujoco's contexts also leave none current, and
robosuite's and gymnasium's renderers do not make theirs current again before they draw.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EGL_DRAW, EGL_READ = 0x3059, 0x305A  # of EGL's headers
LIBRARY = "libEGL.so.1"

_egl: Any = None
_kept: tuple[Any, ...] | None = None  # display, surfaces and context that were current before a collection


def keep_contexts() -> None:
    """From now on release EGL's current context before each garbage collection and restore it afterwards.

    It does so from when something has loaded EGL. Contexts of OSMesa and GLFW are not affected.
    """
    if sys.platform.startswith("linux") and _around not in gc.callbacks:
        gc.callbacks.append(_around)


@contextmanager
def unguarded() -> Iterator[None]:
    """Collect garbage as a process without `keep_contexts` does."""
    guarded = _around in gc.callbacks
    if guarded:
        gc.callbacks.remove(_around)
    try:
        yield
    finally:
        if guarded:
            gc.callbacks.append(_around)


def _around(phase: str, info: dict[str, int]) -> None:
    global _egl, _kept
    if phase == "start":
        _egl = _egl or _loaded()
        context = _egl and _egl.eglGetCurrentContext()
        _kept = None
        if context:
            display = _egl.eglGetCurrentDisplay()
            surfaces = _egl.eglGetCurrentSurface(EGL_DRAW), _egl.eglGetCurrentSurface(EGL_READ)
            _kept = display, *surfaces, context
            _egl.eglMakeCurrent(display, None, None, None)
    elif _kept:
        _egl.eglMakeCurrent(*_kept)  # answers false if the collection freed this context itself
        _kept = None


def _loaded() -> Any:
    """Return the EGL library if the process has loaded it."""
    try:
        library = ctypes.CDLL(LIBRARY, os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    for name in ("eglGetCurrentContext", "eglGetCurrentDisplay", "eglGetCurrentSurface"):
        getattr(library, name).restype = ctypes.c_void_p
    library.eglMakeCurrent.argtypes = [ctypes.c_void_p] * 4
    return library
