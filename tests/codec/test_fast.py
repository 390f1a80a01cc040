"""The FAST action tokenizer against the published algorithm's recorded pairs, and the words around it."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vlafit.codec import fast, tokenizer
from vlafit.codec.action_text import ActionText, ActionTokenConfig
from vlafit.codec.fast import FastTokenizer
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError

FIXTURE = Path(__file__).parent.parent / "fixtures" / "lerobot_pi0_fast"
FOLDER = FIXTURE / "fast_tokenizer"
PAIRS = json.loads((FOLDER / "pairs.json").read_text())
ARRAYS = load_file(FOLDER / "pairs.safetensors")
META = json.loads((FIXTURE / "meta.json").read_text())
STEPS, WIDTH = PAIRS["horizon"], PAIRS["action_dim"]
ROUNDING = 1e-6  # of a recorded chunk, in normalised units


@pytest.fixture(scope="module")
def published() -> FastTokenizer:
    return fast.load(FOLDER)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.load(FIXTURE / "text_tokenizer")


def text(words: Tokenizer, actions: FastTokenizer, **changes: object) -> ActionText:
    settings = {"longest": META["arch"]["max_action_tokens"], "vocabulary": META["arch"]["vocab"]} | changes
    return ActionText(ActionTokenConfig(**settings), words, actions, WIDTH)  # type: ignore[arg-type]


def smooth_chunks(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.clip(np.cumsum(rng.normal(0, 0.2, (STEPS, WIDTH)), 0), -1, 1) for _ in range(count)]


# ------------------------------------------------------------------------------- the published tokenizer


@pytest.mark.parametrize("number", range(len(PAIRS["cases"])))
def test_ids_coefficients_and_decoded_chunks_are_the_recorded_ones(number: int, published: FastTokenizer):
    case, chunk = PAIRS["cases"][number], ARRAYS[f"{number}.chunk"]
    written = np.maximum(published.coefficients(chunk), published.min_token)  # recorded after this clamp
    assert np.array_equal(written, ARRAYS[f"{number}.coefficients"])
    assert published.encode(chunk) == case["ids"]
    for fit, name in ((False, "strict"), (True, "relaxed")):
        decoded = published.decode(case["ids"], STEPS, WIDTH, fit=fit)
        assert decoded.valid == (case["n_decoded_characters"] == STEPS * WIDTH)
        assert decoded.chunk == pytest.approx(ARRAYS[f"{number}.decoded_{name}"], abs=ROUNDING)


def test_too_few_and_too_many_coefficients_become_what_openpi_and_lerobot_make_of_them(
    published: FastTokenizer,
):
    for ids, name in ((PAIRS["truncated_ids"], "short"), (PAIRS["lengthened_ids"], "long")):
        strict = published.decode(ids, STEPS, WIDTH)
        assert not strict.valid and not strict.chunk.any()
        relaxed = published.decode(ids, STEPS, WIDTH, fit=True)
        assert not relaxed.valid
        assert relaxed.chunk == pytest.approx(ARRAYS[f"{name}.decoded_relaxed"], abs=ROUNDING)


def test_ids_beyond_the_vocabulary_are_not_valid(published: FastTokenizer):
    ids = PAIRS["cases"][0]["ids"]
    for stray in (-1, published.vocab_size):
        assert not published.decode([*ids, stray], STEPS, WIDTH).valid


@pytest.mark.case(
    section="runs",
    report="the robot lunges once in a while",
    user_has="a pi0-FAST policy that answers with tokens whose bytes are no character",
    now="the answer is invalid, and counted; before, a coefficient of 65,533",
)
@pytest.mark.parametrize("fit", [False, True])
def test_bytes_that_are_no_character_are_not_valid_and_move_nothing(fit: bool):
    walk = np.cumsum(np.random.default_rng(0).normal(0, 0.2, (200, 10, 6)), axis=1).clip(-1, 1)
    fitted = fast.fit(walk)
    decoded = {i: fitted.backend.decode([i]) for i in range(fitted.vocab_size)}
    broken = next(i for i, text in decoded.items() if "\ufffd" in text)
    one = next(i for i, text in decoded.items() if len(text) == 1 and "\ufffd" not in text)
    made = fitted.decode([one] * 59 + [broken], 10, 6, fit=fit)
    assert not made.valid
    # 59 equal coefficients of at most the fitted range, and one of 0.
    assert np.abs(made.chunk).max() <= 60 * fast.VOCABULARY / fitted.scale


def test_saving_and_copying_keep_every_id(published: FastTokenizer, tmp_path: Path):
    published.save(tmp_path)
    for same in (fast.load(tmp_path), copy.deepcopy(published)):  # a copy is made as by pickle
        assert (same.scale, same.min_token) == (published.scale, published.min_token)
        for number, case in enumerate(PAIRS["cases"]):
            assert same.encode(ARRAYS[f"{number}.chunk"]) == case["ids"]


# ------------------------------------------------------------------------------- a fitted tokenizer


def test_a_fitted_tokenizer_gives_every_chunk_back_to_its_rounding():
    chunks = smooth_chunks(60)
    fitted = fast.fit(chunks, 400)
    assert fitted.vocab_size <= 400
    for chunk in [*chunks, np.full((STEPS, WIDTH), chunks[0].max())]:
        decoded = fitted.decode(fitted.encode(chunk), STEPS, WIDTH)
        assert decoded.valid
        # The transform is orthonormal, so an error of half a step in each coefficient bounds the distance.
        assert np.linalg.norm(decoded.chunk - chunk) <= 0.5 / fitted.scale * np.sqrt(chunk.size) + ROUNDING


def test_fitting_twice_gives_the_same_tokenizer():
    one, other = (fast.fit(smooth_chunks(20), 300) for _ in range(2))
    assert one.backend.to_str() == other.backend.to_str()


def test_chunks_that_no_tokenizer_can_be_fitted_to_are_named():
    with pytest.raises(CodecError, match="no action chunks"):
        fast.fit([])
    with pytest.raises(CodecError, match="-1000 to 1000"):
        fast.fit([np.array([[-100.0], [-100.0]]) / np.sqrt(2), np.array([[100.0], [100.0]]) / np.sqrt(2)])
    with pytest.raises(CodecError, match="far outside the statistics"):
        fast.load(FOLDER).encode(np.full((STEPS, WIDTH), 1e9))


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("processor_config.json", None, "processor_config.json is missing"),
        ("tokenizer.json", "{}", "not a readable"),
        ("processor_config.json", '{"scale": 10}', "min_token"),
        ("processor_config.json", '{"scale": 0, "min_token": 0}', "scale is 0"),
        ("processor_config.json", '{"scale": true, "min_token": 0}', "scale is True"),
        ("processor_config.json", '{"scale": 10, "min_token": 1.5}', "min_token is 1.5"),
    ],
)
def test_a_damaged_folder_is_named(name: str, content: str | None, fact: str, tmp_path: Path):
    folder = tmp_path / "fast"
    shutil.copytree(FOLDER, folder, copy_function=shutil.copyfile)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(CodecError, match=fact) as caught:
        fast.load(folder)
    assert str(folder) in str(caught.value)


# ------------------------------------------------------------------------------- the words around the tokens


def changed(folder: Path, **values: object) -> Path:
    shutil.copytree(FOLDER, folder, copy_function=shutil.copyfile)
    content = json.loads((folder / fast.FILE).read_text()) | values
    (folder / fast.FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncation", {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}),
        (
            "padding",
            {
                "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<pad>",
            },
        ),
    ],
)  # fmt: skip
def test_a_file_that_asks_for_cutting_or_padding_is_read_as_the_published_processor_reads_it(
    name: str, value: object, published: FastTokenizer, tmp_path: Path
):
    tokenizer, chunk = fast.load(changed(tmp_path / "fast", **{name: value})), ARRAYS["0.chunk"]
    for one in (tokenizer, copy.deepcopy(tokenizer)):
        assert one.encode(chunk) == published.encode(chunk)


@pytest.mark.parametrize(
    ("name", "value", "fact"),
    [
        ("normalizer", {"type": "Lowercase"}, "has a normalizer"),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "x", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"x": {"id": "x", "ids": [3], "tokens": ["x"]}},
            },
            "adds tokens to every chunk",
        ),
    ],
)
def test_a_tokenizer_that_would_change_every_chunk_is_refused(
    name: str, value: object, fact: str, tmp_path: Path
):
    with pytest.raises(CodecError, match=rf"tokenizer\.json: .*{fact}"):
        fast.load(changed(tmp_path / "fast", **{name: value}))


def test_the_action_part_is_the_one_that_lerobot_recorded(words: Tokenizer, published: FastTokenizer):
    io = load_file(FIXTURE / "io.safetensors")
    part = text(words, published, begins_with_bos=True, fit=True)
    for row, chunk in enumerate(io["batch.action"]):
        tokens, mask = part.padded(chunk)
        assert np.array_equal(mask, io["batch.action.token_mask"][row])
        assert np.array_equal(tokens[mask], io["batch.action.tokens"][row][mask])


def test_decoded_tokens_are_the_recorded_actions(words: Tokenizer, published: FastTokenizer):
    io = load_file(FIXTURE / "io.safetensors")
    part = text(words, published, begins_with_bos=True, fit=True)
    for row, tokens in enumerate(io["overfit.greedy_tokens_kv"]):
        decoded = part.decode(tokens, STEPS)
        assert decoded.valid
        assert decoded.chunk == pytest.approx(io["overfit.predict_action_chunk"][row], abs=ROUNDING)


@pytest.mark.parametrize("begins_with_bos", [False, True])
def test_what_is_encoded_is_decoded(begins_with_bos: bool, words: Tokenizer, published: FastTokenizer):
    part = text(words, published, begins_with_bos=begins_with_bos)
    chunk = ARRAYS["0.chunk"]
    ids = part.encode(chunk)
    assert (ids[0] == words.bos) == begins_with_bos and ids[-1] == words.eos
    decoded = part.decode(np.array([*ids, 0, 0]), STEPS)
    assert decoded.valid and decoded.chunk == pytest.approx(ARRAYS["0.decoded_strict"], abs=ROUNDING)


def test_a_part_without_its_words_is_not_valid(words: Tokenizer, published: FastTokenizer):
    whole = text(words, published).encode(ARRAYS["0.chunk"])
    prefix = len(words.encode("Action: "))
    bar = len(whole) - 1 - len(words.encode("|"))
    for fit in (False, True):
        part = text(words, published, fit=fit)
        for ids in (whole[prefix:], whole[: bar - 1], [*whole[: bar - 1], whole[-1]], [words.eos], []):
            decoded = part.decode(np.array(ids, np.int64), STEPS)
            assert not decoded.valid
            assert fit or not decoded.chunk.any()  # what is said of answers by openpi's rules that are none
        begun_elsewhere = part.decode(np.array(whole[prefix:]), STEPS).chunk
        assert begun_elsewhere.any() == fit  # openpi answers with zeros, LeRobot with what there is


def test_all_coefficients_are_a_chunk_without_the_bar(words: Tokenizer, published: FastTokenizer):
    whole = text(words, published).encode(ARRAYS["0.chunk"])
    bar = len(whole) - 1 - len(words.encode("|"))
    for fit in (False, True):  # openpi executes what stands before the first "|", or all
        part = text(words, published, fit=fit)
        for ids in (whole[:bar], [*whole[:bar], whole[-1]], [*whole[:bar], whole[-1], *whole[3:bar]]):
            decoded = part.decode(np.array(ids, np.int64), STEPS)
            assert decoded.valid
            assert decoded.chunk == pytest.approx(ARRAYS["0.decoded_strict"], abs=ROUNDING)


def test_an_action_part_that_is_too_long_is_cut(words: Tokenizer, published: FastTokenizer):
    tokens, mask = text(words, published, longest=8).padded(ARRAYS["0.chunk"])
    assert mask.all() and tokens.tolist() == text(words, published).encode(ARRAYS["0.chunk"])[:8]


def test_a_vocabulary_without_room_for_the_action_tokens_is_refused(
    words: Tokenizer, published: FastTokenizer
):
    with pytest.raises(CodecError, match=r"256 tokens; .* 383 has room for 255"):
        text(words, published, vocabulary=383)


def test_action_tokens_in_the_place_of_the_words_around_them_are_refused(
    words: Tokenizer, published: FastTokenizer
):
    assert text(words, published, vocabulary=512).ids == range(128, 384)
    end = words.encode("|")[0]
    with pytest.raises(
        CodecError, match=rf"ids 16 to 271 of 400; among these, .*{end}.* no answer could be read"
    ):
        text(words, published, vocabulary=400)
