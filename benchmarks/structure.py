"""Count the structure of a checkout: modules, circles, import layers, and what the checkpoint loader imports.

    python -m benchmarks.structure [CHECKOUT]     # this one, unless another is named

Every import statement counts: at module level, inside functions and under TYPE_CHECKING.
"""

import ast
import sys
from pathlib import Path

from tests.test_imports import cycles, imports, modules

PACKAGES = ("vlafit.checkpoints", "vlafit.train")
LOADER = "vlafit.checkpoints.load"


def layers(edges: dict[str, set[str]], circles: set[frozenset[str]], package: str) -> int:
    """Return the longest chain of imports inside `package`. Modules of one circle are one link of it."""
    groups = {name: next((g for g in circles if name in g), frozenset({name})) for name in edges}
    inside = {groups[name] for name in edges if name == package or name.startswith(f"{package}.")}
    depths: dict[frozenset[str], int] = {}

    def depth(group: frozenset[str]) -> int:
        if group not in depths:
            below = {groups[other] for name in group for other in edges[name]} & inside - {group}
            depths[group] = 1 + max(map(depth, below), default=0)
        return depths[group]

    return max(map(depth, inside))


if __name__ == "__main__":
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    known = modules(checkout / "vlafit")
    texts = {name: path.read_text("utf-8") for name, path in known.items()}
    edges = {name: set(imports(text, known)) - {name} for name, text in texts.items()}
    circles = cycles(checkout / "vlafit")
    docstrings = [ast.get_docstring(ast.parse(text)) or "" for text in texts.values()]
    print(f"{len(known)} modules, {sum(len(text.splitlines()) for text in texts.values())} lines")
    print(f"{len(circles)} circles of imports")
    for package in PACKAGES:
        print(f"{package}: {layers(edges, circles, package)} import layers")
    print(f"{LOADER} imports {len(edges[LOADER])} modules")
    print(f'{sum(text.startswith("What") for text in docstrings)} module docstrings begin with "What"')
    print(f"README: {len((checkout / 'README.md').read_text('utf-8').split())} words")
