"""Read vision-language data: questions about images with their answers, in a JSON file beside the pictures.

The file is a list (.json), or has an object a line (.jsonl). An object names its picture, or several, and has
a "prompt" and an "answer" (PaliGemma's files: "prefix" and "suffix"), or LLaVA's "conversations", whose every
answer is a sample that has what was said before it in its prompt. Paths are relative to the file's folder.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.pictures import decode_picture
from vlafit.errors import DataError, brief, quoted
from vlafit.files import expand_user, parse_json, plain_bytes, plain_text

PAIRS = (("prompt", "answer"), ("prefix", "suffix"))
CONVERSATIONS = "conversations"
IMAGE_MARK = "<image>"  # LLaVA: where the picture stands in the first question
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")
FORM = (
    '{"image": "kitchen.jpg", "prompt": "What is on the table?", "answer": "a cup"}, or LLaVA\'s '
    '"conversations"'
)
STREAM = 0x564C  # "VL": keeps the split's draws apart from others that use the same seed


@dataclass(frozen=True)
class Question:
    """A question about images, and its answer."""

    images: tuple[str, ...]
    """Paths of the pictures, relative to the file's folder."""
    prompt: str
    answer: str
    place: str
    """Where the file has it: "line 3"."""


@dataclass(frozen=True)
class VisionLanguageSet:
    """The questions of one file, in its order, and which of them are held out."""

    name: str
    file: Path
    weight: float
    """Its weight among those of the datasets (`data.weights`)."""
    questions: tuple[Question, ...]
    training: tuple[int, ...]
    """Positions of the questions that are trained on."""
    validation: tuple[int, ...]
    """Positions of those that are held out, whose pictures no training question shows."""

    def pictures(self, number: int) -> tuple[NDArray[np.uint8], ...]:
        """Return the pictures [h, w, 3] of a question. Raises DataError naming one that is damaged."""
        question = self.questions[number]
        made = []
        for name in question.images:
            path = self.file.parent / name
            try:
                data = plain_bytes(path)
            except OSError as error:
                raise DataError(f"{self.where(number)}: {path} cannot be read ({error.strerror})") from error
            made.append(decode_picture(data, f"{self.where(number)}: {path}"))
        return tuple(made)

    def where(self, number: int) -> str:
        """Return file and line of a question, for messages."""
        return f"{self.file}, {self.questions[number].place}"

    def texts(self) -> list[str]:
        """Return every prompt and answer once."""
        texts = (text for one in self.questions for text in (one.prompt, one.answer))
        return list(dict.fromkeys(texts))

    @property
    def sha256(self) -> str:
        """Hash of questions, answers, names of pictures and split; the pictures are not in it."""
        digest = hashlib.sha256()
        for number, one in enumerate(self.questions):
            held = number in self._held_out
            digest.update(repr((one.images, one.prompt, one.answer, held)).encode())
        return digest.hexdigest()

    @property
    def _held_out(self) -> frozenset[int]:
        return frozenset(self.validation)

    def stamps(self) -> list[tuple[int, int]]:
        """Return size and time of every file: the questions' own and each picture's."""
        names = dict.fromkeys(name for one in self.questions for name in one.images)
        found = [path.stat() for path in (self.file, *(self.file.parent / name for name in names))]
        return [(one.st_size, one.st_mtime_ns) for one in found]


def open_set(name: str, path: str, weight: float, held_out: float, seed: int) -> VisionLanguageSet:
    """Read the questions of a file, and hold out about a share of them, whole pictures at a time.

    Raises DataError naming the line that is no question, or whose picture is not there.
    """
    file = expand_user(path)
    questions = tuple(_questions(file))
    if not questions:
        raise DataError(f"{file}: holds no question about an image; it should have objects such as {FORM}")
    validation = _held_out(questions, held_out, seed)
    training = tuple(sorted(set(range(len(questions))) - set(validation)))
    return VisionLanguageSet(name, file, weight, questions, training, validation)


def _held_out(questions: tuple[Question, ...], share: float, seed: int) -> tuple[int, ...]:
    """Return the positions of about this share of the questions: any share holds out one picture of two."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, one in enumerate(questions):
        groups.setdefault(one.images, []).append(number)
    wanted = share * len(questions)
    chosen: list[int] = []
    order = np.random.default_rng([seed, STREAM]).permutation(len(groups))
    listed = list(groups.values())
    for at in order[: len(groups) - 1]:
        if len(chosen) >= wanted:
            break
        chosen.extend(listed[at])
    return tuple(sorted(chosen))


def _questions(file: Path) -> Iterator[Question]:
    known: dict[str, bool] = {}
    for place, record in _records(file):
        where = f"{file}, {place}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: is {quoted(record)}, not an object such as {FORM}")
        images = _images(record, where, file.parent, known)
        for prompt, answer in _pairs(record, where):
            if not prompt.strip() or not answer.strip():
                raise DataError(f"{where}: the question or its answer is empty; remove the line")
            yield Question(images, prompt, answer, place)


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = plain_text(file)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file of vision-language data (a .jsonl or .json)") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {brief(error)}") from error
    if file.suffix == ".json":
        try:
            records = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not valid JSON: {brief(error)}") from error
        if not isinstance(records, list):
            raise DataError(f"{file}: must be a list of objects such as {FORM}")
        yield from ((f"object {number}", record) for number, record in enumerate(records, start=1))
        return
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: vision-language data is a .jsonl, an object a line, or a .json with a list")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not valid JSON: {brief(error)}") from error


def _images(record: Mapping[str, Any], where: str, folder: Path, known: dict[str, bool]) -> tuple[str, ...]:
    keys = [key for key in ("image", "images") if key in record]
    names = record[keys[0]] if len(keys) == 1 else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f'{where}: "image" must be the path of a picture, or a list of some; texts without a picture '
            "cannot be mixed in, remove them"
        )
    for name in names:
        if name not in known:
            known[name] = _is_below(folder, name)
        if not known[name]:
            raise DataError(
                f"{where}: there is no picture {name!r} below {folder}; paths are relative to the file's "
                "folder, and stay in it"
            )
    return tuple(names)


def _is_below(folder: Path, name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and (folder / path).is_file()


def _pairs(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    forms = [pair for pair in PAIRS if any(key in record for key in pair)]
    if CONVERSATIONS in record:
        if forms:
            raise DataError(f'{where}: has both "{CONVERSATIONS}" and "{forms[0][0]}"; give one')
        yield from _turns(record[CONVERSATIONS], where)
        return
    if len(forms) != 1 or not all(isinstance(record.get(key), str) for key in forms[0]):
        have = ", ".join(sorted(map(str, record)))
        raise DataError(f"{where}: has {quoted(have)}; it should be such as {FORM}")
    prompt, answer = forms[0]
    yield record[prompt], record[answer]


def _turns(turns: object, where: str) -> Iterator[tuple[str, str]]:
    """Yield every answer of LLaVA's conversation with all that was said before it."""
    fault = f'{where}: "{CONVERSATIONS}" must be turns of {ASKS[0]} and {ANSWERS[0]}, one after the other'
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise DataError(fault)
    said: list[str] = []
    for number, turn in enumerate(turns):
        wanted = ANSWERS if number % 2 else ASKS
        if not isinstance(turn, dict) or turn.get("from") not in wanted:
            raise DataError(f"{fault}; turn {number + 1} is {quoted(turn)}")
        text = turn.get("value")
        if not isinstance(text, str):
            raise DataError(f'{fault}; turn {number + 1} has no text "value"')
        text = text.replace(IMAGE_MARK, "").strip()
        if number % 2:
            yield "\n".join(said), text
        said.append(text)
