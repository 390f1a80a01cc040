"""The folder of one offline evaluation.

evaluation.json  what is evaluated; written first, and compared when an evaluation resumes
samples/         the arrays of each part (vlafit.offline.part), written as each is answered
result.json      the numbers, with every sample; written last
report.html      the page; film strips are in strips/
"""

import glob
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlafit import files
from vlafit.errors import ConfigError
from vlafit.offline.part import Part

FORMAT = 1
HEADER, RESULT = "evaluation.json", "result.json"
KIND = "offline"
SAMPLES = "samples"


class OfflineFolder:
    """Reads and writes the folder of one offline evaluation."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = {"kind": KIND, "format": FORMAT, **identity}

    def open(self, resume: bool) -> None:
        """Open a new folder, or one of the same evaluation; raise ConfigError for any other."""
        header = self.path / HEADER
        if not header.is_file():
            if self.path.is_dir() and not files.is_empty(self.path):
                raise ConfigError(f"{self.path} is not empty and is not an evaluation; choose another --out")
            files.require_writable(self.path)
            files.write_atomic(header, json.dumps(self.identity, indent=2) + "\n")
            return
        if not resume:
            raise ConfigError(
                f"{self.path} already holds an evaluation; resume it with --resume, or choose another --out"
            )
        written = read_object(header)
        different = [
            f"{key}: {_short(written.get(key))} there, {_short(value)} here"
            for key, value in self.identity.items()
            if written.get(key) != value
        ]
        if different:
            listed = "\n  ".join(different)
            raise ConfigError(f"{self.path} holds another evaluation; choose another --out:\n  {listed}")

    def tidy(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path / SAMPLES, self.path / "strips"):
            files.tidy(folder)

    def part(self, episode: str, number: int) -> Path:
        """Return the file of a part."""
        return self.path / SAMPLES / f"{file_name(episode)}.{number:03d}.npz"

    def finished(self, episode: str, number: int) -> Part | None:
        """Return a part that was answered earlier; None if it was not."""
        path = self.part(episode, number)
        return Part.load(path) if path.is_file() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        text = json.dumps({**self.identity, **result}, indent=1, allow_nan=False)
        files.write_atomic(self.path / RESULT, text + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """Return result.json of an offline evaluation.

    Raises ConfigError if it is missing, damaged, or of something else.
    """
    path = Path(folder) / RESULT
    result = read_object(path)
    if result.get("kind") != KIND or result.get("format") != FORMAT:
        raise ConfigError(f"{path}: is no result of an offline evaluation that this version reads")
    return result


def load_parts(folder: Path, episode: str) -> list[Part]:
    """Return the parts of an episode, in order. Raises ConfigError if there are none, or one is damaged."""
    paths = sorted((Path(folder) / SAMPLES).glob(f"{glob.escape(file_name(episode))}.[0-9][0-9][0-9].npz"))
    if not paths:
        raise ConfigError(f"{folder}: holds no samples of episode {episode!r}; evaluate again")
    return [Part.load(path) for path in paths]


def file_name(episode: str) -> str:
    """Return an episode's id as a file's name; ids that would share one are told apart by a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", episode)
    return plain if plain == episode else f"{plain}-{hashlib.sha256(episode.encode()).hexdigest()[:8]}"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError if it is missing or damaged."""
    return files.read_json_object(path, ConfigError, "evaluate again into another folder")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"
