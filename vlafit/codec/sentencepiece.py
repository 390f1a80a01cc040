"""Read a SentencePiece `.model` file, as openpi's users have PaliGemma's, without the sentencepiece library.

The file is a protocol buffer (sentencepiece_model.proto): numbered fields, of which the pieces and a few
settings are read. Only byte-pair models without a table of replacements are read, as Gemma's and Llama's
are: the same ids follow from a BPE of the tokenizers library whose merges are ordered by the pieces' scores.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from vlafit.errors import CodecError
from vlafit.files import plain_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType
SPACE = "\u2581"  # how a space is written in pieces
ALL_ONES = 2**64 - 1

Fields = Mapping[int, list[int | bytes]]  # number of a field -> its values


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score (higher merges first) and its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens; None for one that the model has not."""

    unknown: int
    bos: int | None
    eos: int | None
    pad: int | None


def read(path: Path) -> tuple[Tokenizer, SpecialIds]:
    """Return the tokenizer in a `.model` file. Raises CodecError for damage, or a kind that is not read."""
    try:
        model = _fields(plain_bytes(path))
        pieces = [_piece(_bytes(value)) for value in model.get(1, [])]
        trainer, rules = (_fields(_bytes(model[number][-1])) if number in model else {} for number in (2, 3))
        bos, eos, pad = (_id(trainer, *default) for default in ((41, 1), (42, 2), (43, None)))
        ids = SpecialIds(_int(trainer, 40, 0), bos, eos, pad)
        texts = [piece.text for piece in pieces]
        if not pieces or len(set(texts)) < len(texts):
            raise ValueError("no pieces, or two of the same text")
        if not all(i is None or 0 <= i < len(pieces) for i in (ids.unknown, ids.bos, ids.eos, ids.pad)):
            raise ValueError("the id of a special token is beyond its pieces")
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise CodecError(f"{path}: not a whole SentencePiece model ({error}); download it again") from error
    _require_known(path, trainer, rules)
    return _tokenizer(pieces, ids, _flag(trainer, 35, False), _flag(rules, 3, True)), ids


def _require_known(path: Path, trainer: Fields, rules: Fields) -> None:
    kind = MODELS.get(_int(trainer, 3, 1), "unknown")
    problems = [f"its model is {kind}, not bpe"] if kind != "bpe" else []
    problems += ["it has a table of replacements"] * bool(rules.get(2, [b""])[-1])
    problems += ["it removes spaces"] * _flag(rules, 4, True)
    problems += ["it does not write spaces as \u2581"] * (not _flag(rules, 5, True))
    if problems:
        raise CodecError(
            f"{path}: this SentencePiece model is not read here: {', '.join(problems)}. Give the "
            "tokenizer.json of the same tokenizer, or its folder as transformers' save_pretrained writes it"
        )


def _tokenizer(pieces: list[Piece], ids: SpecialIds, byte_fallback: bool, prefix: bool) -> Tokenizer:
    """Return the BPE of the tokenizers library that gives the ids of SentencePiece."""
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    if byte_fallback and not all(f"<0x{value:02X}>" in vocabulary for value in range(256)):
        byte_fallback = False
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(pieces),
            unk_token=pieces[ids.unknown].text,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * prefix + spaces)  # type: ignore[assignment]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # A user-defined piece is cut out of the text before anything merges; a control piece is never in a text.
    backend.add_special_tokens(
        [AddedToken(p.text, normalized=False) for p in pieces if p.type in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens([AddedToken(p.text, normalized=True) for p in pieces if p.type == USER_DEFINED])
    if ids.bos is not None:
        bos = pieces[ids.bos].text
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids.bos)]
        )
    return backend


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, the best score first."""
    normal = {piece.text for piece in pieces if piece.type in (NORMAL, UNUSED)}
    ranked = []
    for piece in pieces:
        text = piece.text
        if piece.type not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                ranked.append((-piece.score, cut, text[:cut], text[cut:]))
    return [(left, right) for _, _, left, right in sorted(ranked, key=lambda merge: merge[:2])]


# --------------------------------------------------------------------------------------- protocol buffers


def _piece(data: bytes) -> Piece:
    fields = _fields(data)
    score = fields.get(2, [b"\0\0\0\0"])[-1]
    return Piece(
        _bytes(fields[1][-1]).decode("utf-8"), struct.unpack("<f", _bytes(score))[0], _int(fields, 3, NORMAL)
    )


def _fields(data: bytes) -> dict[int, list[int | bytes]]:
    """Return a message's fields. Raises ValueError for bytes that are none."""
    values: dict[int, list[int | bytes]] = {}
    for number, value in _items(data):
        values.setdefault(number, []).append(value)
    return values


def _items(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the unknown type {wire}")
        if number == 0 or position + size > len(data):
            raise ValueError("a field goes beyond its end")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ALL_ONES, position
        shift += 7
    raise ValueError("a number of more than ten bytes")


def _int(fields: Fields, number: int, default: int) -> int:
    value = fields.get(number, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no whole number")
    return value - 2**64 if value >= 2**63 else value


def _flag(fields: Fields, number: int, default: bool) -> bool:
    return bool(_int(fields, number, int(default)))


def _id(fields: Fields, number: int, default: int | None) -> int | None:
    value = _int(fields, number, -1 if default is None else default)
    return None if value < 0 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is expected")
    return value
