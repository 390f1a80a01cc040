"""Load a script of eval/ as a module, with the modules beside it that it imports."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EVAL = Path(__file__).parents[1] / "eval"


def script(name: str) -> ModuleType:
    """Return a new module of eval/NAME.py."""
    if str(EVAL) not in sys.path:
        sys.path.append(str(EVAL))
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
