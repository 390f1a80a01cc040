"""Where shipped files are found by name: recipes, strategies, cards, protocols, checkpoints and others.

A path that exists comes first, then the checkout that this package runs from, then the copy inside the wheel
(`vlafit/_shipped/`). Nothing here reads the files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vlafit.errors import ConfigError, did_you_mean

Kind = Literal["recipe", "strategy", "study", "launcher", "card", "protocol", "checkpoint", "tokenizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class _Shelf:
    """A folder of one kind of file. `suffix` is empty where each item is itself a folder, known by `mark`."""

    folder: str
    suffix: str = ".toml"
    mark: str = ""
    skip: tuple[str, ...] = ()  # subfolders that hold something else


_SHELVES: dict[str, _Shelf] = {
    "recipe": _Shelf("configs", skip=("strategies", "studies", "accelerate")),
    "strategy": _Shelf("configs/strategies"),
    "study": _Shelf("configs/studies"),
    "launcher": _Shelf("configs/accelerate", ".yaml"),
    "card": _Shelf("data", skip=("pretrained", "recorded", "sample", "tokenizers")),
    "protocol": _Shelf("eval", skip=("results",)),
    "checkpoint": _Shelf("data/pretrained", suffix="", mark="policy.json"),
    "tokenizer": _Shelf("data/tokenizers", suffix="", mark="tokenizer.json"),
}


def _shelf(kind: str) -> _Shelf:
    if kind not in _SHELVES:
        raise ConfigError(f"there is no kind of shipped file called {kind!r}{did_you_mean(kind, KINDS)}")
    return _SHELVES[kind]


def roots() -> list[Path]:
    """Return the folders that hold configs/, data/ and eval/: a checkout, then the wheel's copy."""
    checkout = PACKAGE.parent
    places = [checkout] if (checkout / "pyproject.toml").is_file() else []
    return [*places, PACKAGE / "_shipped"]


def find(kind: str, name_or_path: str | Path) -> Path:
    """Return the file (for a checkpoint: the folder) called `name_or_path`.

    Names go without the suffix: ``find("recipe", "quickstart")``. A path that exists wins over a name.
    Raises ConfigError with the nearest name when there is nothing.
    """
    shelf = _shelf(kind)
    text = str(name_or_path)
    if not text:
        raise ConfigError(f"an empty name where a {kind} is expected{did_you_mean('', names(kind))}")
    places = [Path(text).expanduser()]
    for root in roots():
        places += [root / shelf.folder / text, root / shelf.folder / (text + shelf.suffix), root / text]
    for place in places:
        if place.is_file() if shelf.suffix else place.is_dir():
            return place
    looks_like_path = "/" in text or text.endswith(shelf.suffix or "/")
    what = (
        f"there is no {kind} file or folder {text!r}" if looks_like_path else f"there is no {kind} {text!r}"
    )
    if Path(text).is_dir():
        what = f"{text!r} is a folder, but a {kind} is a {shelf.suffix} file"
    elif Path(text).is_file():
        what = f"{text!r} is a file, but a {kind} is a folder"
    near = did_you_mean(Path(text).name.removesuffix(shelf.suffix or ".toml"), names(kind))
    raise ConfigError(f"{what}{near}" if near else f"{what}, and none ships with vlafit")


def names(kind: str) -> list[str]:
    """Return the names that `find` knows for this kind, sorted."""
    shelf = _shelf(kind)
    found: set[str] = set()
    for root in roots():
        folder = root / shelf.folder
        pattern = f"*{shelf.suffix}" if shelf.suffix else f"*/{shelf.mark}"
        for path in folder.rglob(pattern) if shelf.suffix else folder.glob(pattern):
            name = path.relative_to(folder) if shelf.suffix else path.parent.relative_to(folder)
            if name.parts[0] not in shelf.skip:
                found.add(name.as_posix().removesuffix(shelf.suffix))
    return sorted(found)
