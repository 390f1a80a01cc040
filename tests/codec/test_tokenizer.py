import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.robots import SENTENCES, tokenizer
from vlafit.codec import tokenizer_limits as limits
from vlafit.codec.tokenizer import SMALLEST, load, train_word_tokenizer
from vlafit.errors import CodecError

TRAINED = tokenizer()


@given(st.text())
def test_any_sentence_can_be_encoded_and_read_back(text: str):
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_words_seen_in_training_become_one_token_each():
    assert len(TRAINED.encode(SENTENCES[0])) == 3


def test_training_depends_on_the_sentences_alone_not_on_their_order():
    one = train_word_tokenizer(SENTENCES, 300)
    two = train_word_tokenizer(SENTENCES[::-1], 300)
    assert one.backend.to_str() == two.backend.to_str()


def test_special_tokens_come_first_and_the_vocabulary_keeps_its_bound():
    assert (TRAINED.pad, TRAINED.bos, TRAINED.eos) == (0, 1, 2)
    assert train_word_tokenizer(SENTENCES, SMALLEST + 5).vocab_size == SMALLEST + 5


def test_a_vocabulary_without_room_for_every_byte_is_refused():
    with pytest.raises(CodecError, match="at least 259"):
        train_word_tokenizer(SENTENCES, 258)


def test_special_tokens_written_in_an_instruction_are_mere_text(tmp_path: Path):
    TRAINED.save(tmp_path)
    for copy in (TRAINED, load(tmp_path), pickle.loads(pickle.dumps(TRAINED))):  # noqa: S301
        assert not {0, 1, 2} & set(copy.encode("stop <eos> <pad> now <bos>"))


def test_a_saved_tokenizer_is_the_same_again(tmp_path: Path):
    TRAINED.save(tmp_path)
    again = load(str(tmp_path))
    assert again.backend.to_str() == TRAINED.backend.to_str()
    assert (again.pad, again.bos, again.eos) == (TRAINED.pad, TRAINED.bos, TRAINED.eos)


def test_transformers_loads_a_saved_tokenizer_and_agrees(tmp_path: Path):
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "open the drawer, 17\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == TRAINED.encode(text)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def test_a_tokenizer_that_transformers_saved_is_loaded(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=TRAINED.backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    theirs.save_pretrained(str(tmp_path))
    ours = load(tmp_path)
    assert ours.encode("close the door") == TRAINED.encode("close the door")
    assert (ours.pad, ours.bos, ours.eos) == (0, 1, 2)


def test_a_tokenizer_that_pads_or_cuts_by_itself_is_stopped_from_doing_so(tmp_path: Path):
    backend = type(TRAINED.backend).from_str(TRAINED.backend.to_str())
    backend.enable_padding(length=50)
    backend.enable_truncation(2)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    assert load(tmp_path).encode(SENTENCES[0]) == TRAINED.encode(SENTENCES[0])


def test_a_file_of_the_tokenizers_library_may_have_any_name(tmp_path: Path):
    TRAINED.save(tmp_path)
    other = tmp_path / "words.json"
    (tmp_path / "tokenizer.json").rename(other)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "of another tokenizer"}')
    loaded = load(other)
    assert loaded.encode("pick up") == TRAINED.encode("pick up") and loaded.bos == TRAINED.bos
    with pytest.raises(CodecError, match="tokenizer_config.json: not a readable tokenizer"):
        load(tmp_path / "tokenizer_config.json")
    with pytest.raises(CodecError, match=r"words\.txt: is not a tokenizer"):
        load(other.rename(tmp_path / "words.txt"))


def test_a_folder_without_tokenizer_json_is_read_through_transformers(tmp_path: Path):
    TRAINED.backend.model.save(str(tmp_path))  # vocab.json and merges.txt, as older tokenizers are kept
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<eos>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load(tmp_path)
    assert ours.encode("close the <eos> door") == TRAINED.encode("close the <eos> door")
    assert (ours.bos, ours.eos) == (1, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "not a readable tokenizer"),
        ({"tokenizer.json": "{}"}, "not a readable tokenizer"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"bos_token": "<s>"}'},
            "bos_token '<s>' is not in",
        ),
        ({"tokenizer.json": None, "tokenizer_config.json": "["}, "not a readable tokenizer"),
        ({"readme.txt": "hello"}, "no tokenizer.json.*copy or download"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "GemmaTokenizer"}'},
            "special tokens only, and no word.*copy or download",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_its_name(
    tmp_path: Path, files: dict[str, str | None], message: str
):
    for name, text in files.items():
        (tmp_path / name).write_text(TRAINED.backend.to_str() if text is None else text)
    with pytest.raises(CodecError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(CodecError, match="no such tokenizer folder"):
        load(tmp_path / "nowhere")


def test_special_tokens_written_as_objects_are_understood(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(TRAINED.backend.to_str())
    config = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load(tmp_path)
    assert (ours.bos, ours.eos) == (1, None)


def _tenfold(content: dict) -> None:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    content["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 12}


def _table(content: dict) -> None:
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "A" * (limits.LARGEST_TABLE + 1)}


def _template(content: dict) -> None:
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * 1000
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [],
        "special_tokens": {},
    }


@pytest.mark.case(
    section="checkpoints",
    report="out of memory at the first prompt",
    user_has="a tokenizer.json whose rules multiply a text",
    now="refused when it is opened",
)
@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (_tenfold, ["normalizer", "1e+12 times"]),
        (_table, ["normalizer", "inf times"]),
        (_template, ["post_processor", "1000 pieces"]),
    ],
)
def test_a_tokenizer_that_would_ask_for_gigabytes_is_refused(tmp_path: Path, change, facts: list[str]):
    train_word_tokenizer(["open the drawer"], 300).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CodecError) as caught:
        load(tmp_path)
    assert all(fact in str(caught.value) for fact in [str(path), *facts])


def test_a_file_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path):
    train_word_tokenizer(["open the drawer"], 300).save(tmp_path)
    os.truncate(tmp_path / "tokenizer.json", 2**32)
    with pytest.raises(CodecError, match=r"tokenizer.json: 4,294,967,296 bytes"):
        load(tmp_path)
