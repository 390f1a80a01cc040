"""Refuse a tokenizer that would ask for gigabytes: files that are too large, rules that multiply a text.

A tokenizer comes with a checkpoint, and the tokenizers library bounds nothing: a dozen rules that each write
a character ten times make 10^12 of one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlafit.errors import CodecError
from vlafit.files import require_readable

LARGEST_FILE = 128 * 2**20  # bytes; Gemma 3's tokenizer.json, the largest in common use, has 33 MB
LARGEST_GROWTH = 32.0  # of a text by a normaliser; Unicode's own (NFKD) is 18 at most
LARGEST_TABLE = 4 * 2**20  # characters of SentencePiece's table of replacements; T5's has 320 kB
LONGEST_TEMPLATE = 64  # pieces around a text; one or two in common use


def require_small_files(folder: Path) -> None:
    """Raise CodecError naming a file of a tokenizer's folder that is too large to be one."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".tiktoken"):
            require_small(path)


def require_small(path: Path) -> None:
    """Raise CodecError if a file is too large for a tokenizer, StorageError if it is no regular file."""
    require_readable(path)
    if path.stat().st_size > LARGEST_FILE:
        raise CodecError(
            f"{path}: {path.stat().st_size:,} bytes are too many for a tokenizer (at most"
            f" {LARGEST_FILE:,}); give the right folder, or download it again"
        )


def require_bounded(content: Mapping[str, Any], path: Path) -> None:
    """Raise CodecError if the tokenizer.json `content` can turn a sentence into gigabytes."""
    growth = _growth(content.get("normalizer"))
    if growth > LARGEST_GROWTH:
        raise CodecError(
            f"{path}: its normalizer can make a text {growth:.3g} times as long (at most {LARGEST_GROWTH:g}"
            " is allowed): that is no tokenizer of a language model; download the right one"
        )
    pieces = _longest_template(content.get("post_processor"))
    if pieces > LONGEST_TEMPLATE:
        raise CodecError(
            f"{path}: its post_processor puts {pieces} pieces around a text (at most {LONGEST_TEMPLATE} are"
            " allowed): that is no tokenizer of a language model; download the right one"
        )


def _growth(rule: object) -> float:
    """Return how many times as long a normaliser can make a text, at most."""
    if not isinstance(rule, Mapping):
        return 1.0
    match rule.get("type"):
        case "Sequence":
            product = 1.0
            for inner in _list(rule.get("normalizers")):
                product *= _growth(inner)
            return product
        case "Replace":
            pattern = rule.get("pattern")
            literal = pattern.get("String") if isinstance(pattern, Mapping) else None
            return max(1.0, len(str(rule.get("content", ""))) / max(1, len(literal or "")))
        case "Prepend":
            return 1.0 + len(str(rule.get("prepend", "")))
        case "Precompiled":
            large = len(str(rule.get("precompiled_charsmap", ""))) > LARGEST_TABLE
            return float("inf") if large else 1.0
    return 1.0


def _longest_template(rule: object) -> int:
    """Return the pieces that a post-processor puts around one text, at most."""
    if not isinstance(rule, Mapping):
        return 0
    if rule.get("type") == "Sequence":
        return sum(_longest_template(inner) for inner in _list(rule.get("processors")))
    if rule.get("type") != "TemplateProcessing":
        return 0
    special = rule.get("special_tokens")
    tokens = special.values() if isinstance(special, Mapping) else ()
    ids = [len(_list(token.get("ids"))) for token in tokens if isinstance(token, Mapping)]
    return len(_list(rule.get("single"))) * max([1, *ids])


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
