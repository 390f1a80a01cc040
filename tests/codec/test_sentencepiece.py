"""SentencePiece's `.model` files give the ids of the sentencepiece library (`fixtures/sentencepiece`)."""

import json
from pathlib import Path

import pytest

from vlafit.codec.tokenizer import load
from vlafit.errors import CodecError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "sentencepiece"
IDS = json.loads((FIXTURES / "ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["gemma", "llama"])
@pytest.mark.case(
    section="checkpoints",
    report="the tokenizer of openpi is refused",
    user_has="SentencePiece's `paligemma_tokenizer.model`",
    now="`policy.tokenizer` takes it; its ids are those of the sentencepiece library",
)
def test_the_ids_are_those_of_the_sentencepiece_library(name: str) -> None:
    tokenizer = load(FIXTURES / f"{name}.model")
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.vocab_size) == (0, 1, 2, 420)
    assert len(IDS["sentences"]) == 130
    for sentence, ids in zip(IDS["sentences"], IDS[name], strict=True):
        assert tokenizer.encode(sentence) == ids, repr(sentence)


def test_a_model_begins_with_bos_where_the_template_is_asked_for() -> None:
    tokenizer = load(FIXTURES / "gemma.model")
    assert tokenizer.encode("pick up", special=True) == [2, *tokenizer.encode("pick up")]


def test_text_of_known_words_is_read_back() -> None:
    for name in ("gemma", "llama"):
        tokenizer = load(FIXTURES / f"{name}.model")
        assert tokenizer.decode(tokenizer.encode("pick up the 日 block 12")) == "pick up the 日 block 12"


def test_a_saved_model_gives_the_same_ids_from_its_tokenizer_json(tmp_path: Path) -> None:
    load(FIXTURES / "gemma.model").save(tmp_path)
    again = load(tmp_path)
    assert [again.encode(sentence) for sentence in IDS["sentences"]] == IDS["gemma"]
    assert (again.pad, again.eos, again.bos) == (0, 1, 2)


def test_a_kind_of_model_that_is_not_read_is_named() -> None:
    with pytest.raises(
        CodecError, match=r"unigram\.model.*unigram, not bpe, it removes spaces.*tokenizer\.json"
    ):
        load(FIXTURES / "unigram.model")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_model_is_one_sentence_with_its_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.model"
    path.write_bytes((FIXTURES / "gemma.model").read_bytes()[:cut])
    with pytest.raises(CodecError, match=r"cut\.model: .*SentencePiece.*download"):
        load(path)


def test_no_flipped_byte_of_a_model_is_more_than_a_message(tmp_path: Path) -> None:
    whole = (FIXTURES / "gemma.model").read_bytes()
    path = tmp_path / "flipped.model"
    for position in range(0, len(whole), 131):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            load(path)
        except CodecError as error:
            assert str(path) in str(error)
