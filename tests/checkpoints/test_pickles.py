"""Pickles become safetensors with the same numbers, or are refused with the reason; no code runs."""

import os
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlafit import locks
from vlafit.checkpoints.pickles import convert
from vlafit.errors import StorageError, VlafitError, WeightsError

Edit = Callable[[str, bytes], bytes]


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_keep_their_numbers_in_both_forms_of_torch(tmp_path: Path, legacy: bool):
    weights = {"a": torch.randn(5, 7), "b": torch.arange(6), "c": torch.randn(3).bfloat16()}
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert convert(tmp_path / "w.pt", tmp_path / "deep" / "w.safetensors") == 3
    again = load_file(tmp_path / "deep" / "w.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.case(
    section="checkpoints",
    report="wrong numbers after conversion",
    user_has="a pickle whose zip records are deflated",
    now="right numbers; memory mapping only where records are stored",
)
def test_records_that_are_deflated_keep_their_numbers(tmp_path: Path):
    weights = {"a": torch.arange(4096).float(), "b": torch.randn(64, 64)}
    torch.save(weights, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as whole,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    convert(tmp_path / "packed.pt", tmp_path / "w.safetensors")
    again = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.case(
    section="checkpoints",
    report="a tensor is missing after conversion",
    user_has='keys `1` and `"1"` in a pickle',
    now="refused: one name for two",
)
def test_two_keys_that_would_be_one_name_are_refused(tmp_path: Path):
    torch.save({1: torch.zeros(2), "1": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="1 and '1'"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_named_and_not_run_and_nobody_is_told_to_run_it(tmp_path: Path, legacy: bool):
    torch.save(
        {"a": torch.zeros(2), "b": Runs()}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(WeightsError) as caught:
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "exec" in message and "weights_only" not in message and "trust" not in message


@pytest.mark.case(
    section="checkpoints",
    report="out of memory at conversion",
    user_has="1.3 kB that ask for 4 GB",
    now="refused above 16 times the file's size",
)
def test_a_small_file_that_unfolds_to_gigabytes_is_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(1).expand(2**30)}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 2000
    with pytest.raises(WeightsError, match=str(2**32)):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")


def test_a_deflated_record_of_zeros_that_unfolds_to_far_more_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", b"\x80\x02}.")
        packed.writestr("archive/data/0", bytes(2**27))
    with pytest.raises(WeightsError, match="unfold"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(200), b"\x80\x02" + b"(" * 9, b"text"]
)
def test_what_is_no_pickle_of_torch_is_one_error_and_leaves_nothing(tmp_path: Path, content: bytes):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        convert(tmp_path / "w.pt", tmp_path / "out" / "w.safetensors")
    assert str(tmp_path / "w.pt") in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def zipped(
    path: Path, weights: object, edit: Edit = lambda _, data: data, method: int = zipfile.ZIP_STORED
) -> Path:
    """Save as torch does, and write each record again after `edit`."""
    torch.save(weights, path)
    with zipfile.ZipFile(path) as whole:
        records = [(record.filename, whole.read(record)) for record in whole.infolist()]
    with zipfile.ZipFile(path, "w", method) as again:
        for name, data in records:
            again.writestr(name, edit(name, data))
    return path


@pytest.mark.case(
    section="checkpoints",
    report="wrong numbers after conversion",
    user_has="a pickle with a record that is cut, changed or there twice",
    now="refused: sizes and checksums of all records are compared",
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_record_that_is_too_short_is_refused(tmp_path: Path, nested: bool):
    weights = {"a": torch.arange(12.0), "b": torch.arange(5.0)}
    content = {"model": weights, "other": [torch.zeros(12)]} if nested else weights
    cut = zipped(tmp_path / "w.pt", content, lambda n, d: d[:8] if n.endswith("data/0") else d)
    with pytest.raises(WeightsError, match="48 bytes has no record"):
        convert(cut, tmp_path / "w.safetensors", "model" if nested else "")


def test_a_changed_byte_and_a_second_record_are_refused(tmp_path: Path):
    file = zipped(tmp_path / "w.pt", {"a": torch.arange(12.0)})
    whole = file.read_bytes()
    assert whole.count(struct.pack("f", 9.0)) == 1
    file.write_bytes(whole.replace(struct.pack("f", 9.0), struct.pack("f", 2.25)))
    with pytest.raises(WeightsError, match="data/0 does not agree with its checksum"):
        convert(file, tmp_path / "w.safetensors")
    file.write_bytes(whole)
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("w/data/0", struct.pack("12f", *[99] * 12))
    with pytest.raises(WeightsError, match="holds w/data/0 twice"):
        convert(file, tmp_path / "w.safetensors")


def test_views_keep_their_numbers(tmp_path: Path):
    x = torch.arange(6.0)
    pairs = [torch.view_as_complex(torch.tensor([[1.0, 2.0]])).conj() for _ in range(2)]
    weights = {"a": x[:4], "b": x[2:], "t": x.reshape(2, 3).T, "s": x[::2], "c": pairs[0], "i": pairs[1].imag}
    torch.save(weights, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    again = load_file(tmp_path / "w.safetensors")
    assert all(
        torch.equal(again[name], tensor.resolve_conj().resolve_neg()) for name, tensor in weights.items()
    )
    assert again["i"].item() == -2


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (torch.empty(3, device="meta"), "meta"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_a_tensor_without_plain_numbers_is_refused_by_name(tmp_path: Path, value: torch.Tensor, fact: str):
    torch.save({"odd.weight": value, "w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=fact):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("key", [None, b"x", ("a", 1), True])
def test_keys_that_are_no_names_are_refused(tmp_path: Path, key: object):
    torch.save({key: torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="not a tensor's name"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused_in_our_words(tmp_path: Path, method: int):
    file = zipped(tmp_path / "w.pt", {"a": torch.ones(3)}, method=method)
    with pytest.raises(WeightsError, match="compressed in a way that torch cannot read"):
        convert(file, tmp_path / "w.safetensors")


def test_a_zip_without_a_pickle_is_refused_in_our_words(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data/0", b"1234")
    with pytest.raises(WeightsError, match=r"w\.pt: a zip archive without data\.pkl") as caught:
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert "miniz" not in str(caught.value) and not (tmp_path / "w.safetensors").exists()


def test_an_older_pickle_that_is_refused_shows_no_advice_of_torch(tmp_path: Path):
    (tmp_path / "w.bin").write_bytes(b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.")
    with warnings.catch_warnings(), pytest.raises(WeightsError):
        warnings.simplefilter("error")
        convert(tmp_path / "w.bin", tmp_path / "w.safetensors")


def test_a_tensor_named_as_the_metadata_of_safetensors_is_refused(tmp_path: Path):
    torch.save({"__metadata__": torch.ones(2), "a": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt.*'__metadata__'.*rename"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_a_file_that_is_created_by_another_process_is_left_alone(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    target = tmp_path / "w.safetensors"
    with (
        locks.creating(target, "vlafit convert-pickle"),
        pytest.raises(VlafitError, match=f"{target}.*process {os.getpid()}"),
    ):
        convert(tmp_path / "w.pt", target)
    assert convert(tmp_path / "w.pt", target) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path):
    torch.save({"a": torch.ones(2**16)}, tmp_path / "w.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"w\.safetensors.*free space"):
            convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda path: None, ("no such file", "check the path")),
        (lambda path: path.mkdir(), ("a folder", "name a pickle")),
        (lambda path: path.touch(), ("empty", "again")),
        (os.mkfifo, ("pipe", "copy")),
        (lambda path: path.write_text("hello\n"), ("not a pickle", "damaged", "fetch it again")),
    ],
)
def test_what_is_no_file_with_a_pickle_is_named_with_the_remedy(tmp_path: Path, make, facts: tuple[str, ...]):
    make(tmp_path / "w.pt")
    with pytest.raises(WeightsError) as caught:
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert all(fact in str(caught.value) for fact in (str(tmp_path / "w.pt"), *facts))
