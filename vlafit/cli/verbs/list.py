"""`vlafit list`: list shipped files by name, each with the first line of its opening comment."""

import re
from collections.abc import Sequence
from pathlib import Path

from vlafit import shipped
from vlafit.cli.parser import Parser

TITLES = {
    "recipe": "recipes (vlafit train NAME)",
    "card": "data cards (in a recipe: data.cards; vlafit record NAME)",
    "protocol": "protocols (vlafit eval CHECKPOINT --protocol NAME)",
    "strategy": "tuning strategies (in a recipe: strategy)",
    "study": "studies (vlafit sweep RECIPE --study NAME)",
    "checkpoint": "checkpoints (in a recipe: policy.checkpoint; vlafit eval NAME ...)",
    "tokenizer": "tokenizers (in a recipe: policy.tokenizer)",
    "launcher": "launcher files (accelerate launch --config_file PATH -m vlafit train NAME)",
}


def run(arguments: Sequence[str]) -> int:
    """List every kind of shipped file, or only the named kind."""
    parser = Parser("vlafit list", "List the files that ship with vlafit.")
    parser.add_argument("kind", nargs="?", choices=shipped.KINDS, help="only this kind")
    chosen = parser.read(arguments).kind
    for kind in [chosen] if chosen else shipped.KINDS:
        names = shipped.names(kind)
        if not names:
            continue
        print(TITLES[kind])
        width = max(len(name) for name in names)
        for name in names:
            print(f"  {name:<{width}}  {_first_sentence(shipped.find(kind, name))}".rstrip())
        print()
    return 0


def _first_sentence(path: Path) -> str:
    """Return the first sentence of a file's opening comment, and a launcher file's path; '' for a folder."""
    if not path.is_file():
        return ""
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip("# ").strip()
        if not text and not words:
            continue
        if not line.startswith("#") or not text:
            break
        words.append(text)
    sentence = re.split(r"(?<=[.])\s", " ".join(words), maxsplit=1)[0].rstrip(".")
    return f"{path}: {sentence}" if path.suffix == ".yaml" and sentence else sentence
