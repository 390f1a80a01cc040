"""Frames hold numbers, text, lists, maps and arrays; everything else is refused before it costs memory."""

import io
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from vlafit.serve import wire
from vlafit.serve.protocols import pack_chunks, read_chunks
from vlafit.serve.wire import WireError
from vlafit.types import ActionChunk

NUMBERS = st.sampled_from(
    ["?", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", ">f4"]
)


@given(npst.arrays(NUMBERS, npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)), st.booleans())
def test_an_array_returns_bit_for_bit(array: np.ndarray, text_keys: bool) -> None:
    back = wire.unpack(wire.pack({"x": array}, text_keys=text_keys))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()


def test_numbers_of_numpy_keep_their_type_in_openpis_form() -> None:
    back = wire.unpack(wire.pack([np.float32(0.1), np.int64(-3)]))
    assert [type(one) for one in back] == [np.float32, np.int64] and back == [np.float32(0.1), -3]


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), np.array(["text"]), np.array([1j]), np.datetime64("2026-01-01"), object(), {1, 2}],
)
def test_what_has_no_form_is_not_sent(value: object) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        wire.pack({"x": value})


def array(**changes: object) -> bytes:
    fields = {b"__ndarray__": True, b"data": b"\0" * 12, b"dtype": "<f4", b"shape": [3]}
    return msgpack.packb(fields | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (array(dtype="|O"), "dtype '|O'"),
        (array(dtype="O"), "dtype 'O'"),
        (array(dtype="<U3"), "dtype '<U3'"),
        (array(dtype="<M8[s]"), "dtype '<M8"),
        (array(dtype="f4,i4"), "dtype 'f4,i4'"),
        (array(dtype=[["a", "<f4"]]), "dtype"),
        (array(dtype=None), "dtype"),
        (array(shape=[4]), "must hold 16 bytes"),
        (array(shape=[-1]), "shape"),
        (array(shape=[True, 3]), "shape"),
        (array(shape=[2**62, 2**62]), "must hold"),
        (array(shape=[1] * 9 + [3]), "shape"),
        (array(shape="3"), "shape"),
        (array(data="text"), "holds str"),
        (array(data=[0] * 12), "holds list"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "a number must be a number"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not fit"),
        (msgpack.packb(msgpack.ExtType(5, b"")), "extension type 5"),
        (msgpack.packb(msgpack.Timestamp(0)), "extension|max_ext_len|not msgpack"),
        (pickle.dumps(np.zeros(3)), "not msgpack"),
        (b"", "not msgpack"),
        (b"\x93\x01", "not msgpack"),
        (msgpack.packb(1) + b"\0", "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),  # a list that says it holds 4 billion
        (b"\x91" * 5000 + b"\x01", "not msgpack"),  # lists in lists
        (msgpack.packb({1: 2}), "not msgpack"),
        (b"\xa2\xff\xfe", "not msgpack"),  # text that is not UTF-8
        (b"\xdc\x01\x90" + (b"\xdc\x01\x2c" + b"\x90" * 300) * 400, "more than 100000 lists"),
    ],
)
def test_a_malformed_frame_is_refused_with_its_reason(frame: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says.replace("|O", r"\|O").replace("[s", r"\[s")):
        wire.unpack(frame)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_anything_else(frame: bytes) -> None:
    try:
        wire.unpack(frame)
    except WireError:
        pass


def png(height: int = 4, width: int = 5) -> bytes:
    buffer = io.BytesIO()
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_vla_evals_images_are_read() -> None:
    image = {"__image__": True, "format": "png", "data": png(), "shape": [4, 5, 3]}
    back = wire.unpack(msgpack.packb(image))
    assert back.dtype == np.uint8 and np.array_equal(back.ravel(), np.arange(60))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": [4000, 4000, 3]}, "is 4x5"),
        ({"data": b"no picture"}, "no png"),
        ({"data": png()[:40]}, "no png"),
        ({"format": "gif"}, "format 'gif'"),
        ({"format": "jpeg"}, "no jpeg"),
        ({"data": 3}, "format"),
    ],
)
def test_an_image_that_is_not_what_it_says_is_refused(changes: dict, says: str) -> None:
    image = {"__image__": True, "format": "png", "data": png(), "shape": [4, 5, 3]} | changes
    with pytest.raises(WireError, match=says):
        wire.unpack(msgpack.packb(image))


def test_an_answer_says_which_chunks_the_policys_tokens_did_not_make() -> None:
    actions = np.zeros((2, 3), np.float32)
    chunks = [ActionChunk(actions, valid) for valid in (True, False, None)]
    back = read_chunks(wire.unpack(pack_chunks(chunks)), 3, 3)
    assert [chunk.valid for chunk in back] == [True, False, None]
    plain = wire.unpack(pack_chunks([ActionChunk(actions)]))
    assert "valid" not in plain and read_chunks(plain, 1, 3)[0].valid is None
    for wrong in ([True], "yes", [True, 2, None]):
        with pytest.raises(WireError, match="valid"):
            read_chunks(wire.unpack(pack_chunks(chunks)) | {"valid": wrong}, 3, 3)
