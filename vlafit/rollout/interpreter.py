"""How an environment process is started: in vlafit's own interpreter, or in one of the user's choice.

Another interpreter needs Python 3.11, numpy, msgpack and what the environment imports. vlafit need not be
installed there: its source is loaded from where this process has it, and nothing else of this process's path.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import vlafit
from vlafit.envs import host
from vlafit.errors import SimulationError

NEEDED = ("numpy", "msgpack")  # packages that the worker imports; vlafit.envs.worker is tested for it
MINE = ("PYTHONHOME", "PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__", "VIRTUAL_ENV")  # would mislead another one
OTHER = """\
import sys
if sys.version_info < (3, 11):
    sys.exit("%s is Python %d.%d; an environment needs Python 3.11 or newer"
             % (sys.executable, sys.version_info[0], sys.version_info[1]))
from importlib import util
missing = [name for name in {needed!r} if util.find_spec(name) is None]
if missing:
    sys.exit(sys.executable + " lacks " + " and ".join(missing) + ", which an environment process needs; "
             "install with: " + sys.executable + " -m pip install " + " ".join(missing))
spec = util.spec_from_file_location("vlafit", {file!r}, submodule_search_locations=[{folder!r}])
sys.modules["vlafit"] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["vlafit"])
"""


def command(python: str, handle: int) -> list[str]:
    """Return the command that serves the open socket `handle`. Raises SimulationError without the program."""
    if not python:
        return [sys.executable, "-c", host.OWN.format(handle=handle)]
    package = Path(vlafit.__file__ or "").resolve()
    other = OTHER.format(needed=NEEDED, file=str(package), folder=str(package.parent))
    return [find(python), "-c", other + host.OWN.format(handle=handle)]


def environment(python: str) -> dict[str, str]:
    """Return the variables of an environment process."""
    variables: Mapping[str, str] = os.environ
    if python:
        return {key: value for key, value in variables.items() if key not in MINE} | host.THREADS
    return host.environment()


def find(python: str) -> str:
    """Return the absolute path of an interpreter; a link, as in .venv/bin, stays one."""
    path = os.path.expanduser(python)
    found = shutil.which(path) if os.sep not in path else os.path.abspath(path)
    if found is None:
        raise SimulationError(
            f"env.python: there is no program {python!r} on PATH; give the path of a Python"
        )
    if not os.path.isfile(found) or not os.access(found, os.X_OK):
        what = "is no program" if os.path.exists(found) else "does not exist"
        raise SimulationError(
            f"env.python: {found} {what}; give the path of a Python, such as .venv/bin/python"
        )
    return found
