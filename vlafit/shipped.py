"""Find shipped files by name: recipes, strategies, cards, protocols, checkpoints and others.

An existing path comes first, then the checkout that this package runs from, then the copy in the wheel
(`vlafit/_shipped/`). Nothing here reads the files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vlafit.errors import ConfigError, did_you_mean
from vlafit.files import expand_user, irregular

Kind = Literal["recipe", "strategy", "study", "launcher", "card", "protocol", "checkpoint", "tokenizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class _Location:
    """The folder of one kind of file. With an empty `suffix`, items are folders that contain `mark`."""

    folder: str
    suffix: str = ".toml"
    mark: str = ""
    skip: tuple[str, ...] = ()  # subfolders that hold other kinds


_LOCATIONS: dict[str, _Location] = {
    "recipe": _Location("configs", skip=("strategies", "studies", "accelerate")),
    "strategy": _Location("configs/strategies"),
    "study": _Location("configs/studies"),
    "launcher": _Location("configs/accelerate", ".yaml"),
    "card": _Location("data", skip=("pretrained", "recorded", "sample", "tokenizers")),
    "protocol": _Location("eval", skip=("results",)),
    "checkpoint": _Location("data/pretrained", suffix="", mark="policy.json"),
    "tokenizer": _Location("data/tokenizers", suffix="", mark="tokenizer.json"),
}


def _location(kind: str) -> _Location:
    if kind not in _LOCATIONS:
        raise ConfigError(f"unknown kind of shipped file: {kind!r}{did_you_mean(kind, KINDS)}")
    return _LOCATIONS[kind]


def roots() -> list[Path]:
    """Return the folders that hold configs/, data/ and eval/: a checkout, then the wheel's copy."""
    checkout = PACKAGE.parent
    checkouts = [checkout] if (checkout / "pyproject.toml").is_file() else []
    return [*checkouts, PACKAGE / "_shipped"]


def find(kind: str, name_or_path: str | Path) -> Path:
    """Return the file (for a checkpoint: the folder) called `name_or_path`.

    Names have no suffix: ``find("recipe", "quickstart")``. An existing path takes precedence over a name.
    Raises ConfigError with the nearest name if nothing matches.
    """
    location = _location(kind)
    text = str(name_or_path)
    if not text:
        raise ConfigError(f"the name of the {kind} is empty{did_you_mean('', names(kind))}")
    candidates = [expand_user(text)]
    for root in roots():
        folder = root / location.folder
        candidates += [folder / text, folder / (text + location.suffix), root / text]
    for candidate in candidates:
        if candidate.is_file() if location.suffix else candidate.is_dir():
            return candidate
    looks_like_path = "/" in text or text.endswith(location.suffix or "/")
    fault = f"there is no {kind} {text!r}"
    if looks_like_path:
        start = "" if Path(text).is_absolute() else f" in the current directory, {Path.cwd()}"
        fault = f"there is no {kind} file or folder {text!r}{start}"
    if Path(text).is_dir():
        fault = f"{text!r} is a folder, but a {kind} is a {location.suffix} file"
    elif Path(text).is_file():
        fault = f"{text!r} is a file, but a {kind} is a folder"
    elif kind_of_entry := irregular(Path(text)):
        fault = f"{text!r} is not a regular file but {kind_of_entry}"
    near = did_you_mean(Path(text).name.removesuffix(location.suffix or ".toml"), names(kind))
    raise ConfigError(f"{fault}{near}" if near else f"{fault}, and none ships with vlafit")


def names(kind: str) -> list[str]:
    """Return the names that `find` knows for this kind, sorted."""
    location = _location(kind)
    unique: set[str] = set()
    for root in roots():
        folder = root / location.folder
        pattern = f"*{location.suffix}" if location.suffix else f"*/{location.mark}"
        for path in folder.rglob(pattern) if location.suffix else folder.glob(pattern):
            name = path.relative_to(folder) if location.suffix else path.parent.relative_to(folder)
            if name.parts[0] not in location.skip:
                unique.add(name.as_posix().removesuffix(location.suffix))
    return sorted(unique)
