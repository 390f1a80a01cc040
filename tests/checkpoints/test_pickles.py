"""Pickles become safetensors with the same numbers, or are refused with the reason; no code runs."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlafit.checkpoints.pickles import convert
from vlafit.errors import WeightsError


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
