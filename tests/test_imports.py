"""No module cycles in the package, whatever the form of the import.

import-linter does not see circles inside one layer or one package. This test builds the graph of all modules
from every import statement: at module level, inside functions and under TYPE_CHECKING.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import vlafit

ROOT = Path(vlafit.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module below the package folder `root`."""
    parts = {path: path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}


def imports(text: str, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the known modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                target = name if name in known else node.module
                if target in known:
                    yield target


def cycles(root: Path) -> set[frozenset[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    known = modules(root)
    edges = {name: set(imports(path.read_text("utf-8"), known)) - {name} for name, path in known.items()}
    reached = {name: _reachable(name, edges) for name in edges}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in edges}
    return {group for group in groups if len(group) > 1}


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        for name in edges[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def test_no_modules_import_each_other_in_a_circle():
    assert cycles(ROOT) == set()


def test_nn_never_imports_tuning_and_neither_imports_a_policy():
    known = modules(ROOT)
    for package, above in (("nn", ("tuning", "policies")), ("tuning", ("policies",))):
        for name in (n for n in known if n.startswith(f"vlafit.{package}")):
            upwards = {m for m in imports(known[name].read_text("utf-8"), known) if m.split(".")[1] in above}
            assert not upwards, f"{name} imports {upwards}"


def test_training_and_acting_start_without_a_decoder_of_videos():
    """PyAV is missing on some machines with a GPU, whose policies see no video (`benchmarks.gpu`)."""
    for name, path in modules(ROOT).items():
        statements = ast.parse(path.read_text("utf-8")).body
        named = [alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names]
        named += [node.module or "" for node in statements if isinstance(node, ast.ImportFrom)]
        assert not [one for one in named if one.split(".")[0] == "av"], name


def test_a_circle_is_found_in_functions_under_type_checking_and_through_a_third_module(tmp_path: Path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from pkg import b\n    return b\n")
    (package / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.c import C\n"
    )
    (package / "c.py").write_text("import pkg.a\nclass C: ...\n")
    (package / "d.py").write_text("from pkg import a\n")
    assert cycles(package) == {frozenset({"pkg.a", "pkg.b", "pkg.c"})}


def test_what_a_training_run_imports_starts_no_thread():
    """A loader's process is forked from it, and with the tests each command (tests/forked.py)."""
    code = "import os, vlafit.cli.verbs.train, vlafit.train; print(len(os.listdir('/proc/self/task')))"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr
