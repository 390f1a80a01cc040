"""Deferred weights compute and are written as the plain ones that they stand for; nothing changes them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vlafit.nn.deferred import Deferred, defer, is_deferred, materialise, rounded, save_tensors


def narrow(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("strided", [False, True])
def test_layers_of_deferred_weights_compute_what_plain_ones_do(strided: bool):
    plain = nn.ModuleList([nn.Linear(6, 4), nn.Embedding(9, 6), nn.LayerNorm(6), nn.Conv2d(3, 4, 2)])
    later = nn.ModuleList([nn.Linear(6, 4), nn.Embedding(9, 6), nn.LayerNorm(6), nn.Conv2d(3, 4, 2)])
    for name, parameter in plain.named_parameters():
        held = narrow(*parameter.shape)
        parameter.data.copy_(held)
        owner, _, leaf = name.rpartition(".")
        if strided:  # numbers of a mapped file begin anywhere, and may be the other way round
            held = torch.cat((held.flatten()[:1], held.flatten()))[1:].view(held.shape)
        setattr(later.get_submodule(owner), leaf, nn.Parameter(defer(held, torch.float32)))
    x, ids, image = torch.randn(3, 2, 6), torch.tensor([[8, 0], [3, 3]]), torch.randn(2, 3, 5, 5)
    inputs = (x[:, 1:] if strided else x, ids, x, image)
    with torch.no_grad():
        for one, other, given in zip(plain, later, inputs, strict=True):
            assert torch.equal(one(given), other(given))
    assert [p.shape for p in later.parameters()] == [p.shape for p in plain.parameters()]
    assert {p.dtype for p in later.parameters()} == {torch.float32} and is_deferred(later)
    materialise(later)
    assert not is_deferred(later)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), later.parameters(), strict=True))


def test_only_the_rows_of_an_embedding_that_are_asked_for_are_made():
    table, ids = narrow(9, 6), torch.tensor([4, 1])
    later = rounded(defer(table.float() + 1e-3), torch.bfloat16)
    assert torch.equal(F.embedding(ids, later), (table.float() + 1e-3).to(torch.bfloat16).float()[ids])


def test_casts_are_those_of_plain_tensors_and_widening_leaves_no_trace():
    held = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    later = defer(held)
    assert torch.equal(later.cast(torch.bfloat16).value(), held.to(torch.bfloat16))
    assert torch.equal(rounded(later, torch.bfloat16).value(), held.to(torch.bfloat16).float())
    assert not torch.equal(rounded(later, torch.bfloat16).value(), held)
    file = held.to(torch.bfloat16)
    assert defer(file, torch.float32).cast(torch.bfloat16).casts == ()


def test_what_would_change_numbers_or_take_their_address_is_refused():
    weight = nn.Parameter(defer(narrow(3, 3), torch.float32))
    with torch.no_grad():
        for change in (
            lambda: weight.add_(1.0),
            lambda: weight.copy_(torch.ones(3, 3)),
            lambda: weight.__setitem__(0, 1.0),
            lambda: torch.relu_(weight),
            weight.data_ptr,
            weight.untyped_storage,
        ):
            with pytest.raises(TypeError, match="no memory of its own"):
                change()
    with pytest.raises(TypeError, match="cannot become"):
        weight.data = torch.ones(2, 2)
    weight.data = torch.ones(3, 3)  # as a library that replaces a weight
    assert torch.equal(weight + 0.0, torch.ones(3, 3))


def test_a_file_of_deferred_weights_has_the_bytes_of_one_of_plain_ones(tmp_path: Path):
    plain = {
        "b": torch.randn(3, 4),
        "a": narrow(7).float(),
        "merkmal_ü": narrow(2, 2, 2),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5).to(torch.float16),
    }
    made = []

    def watched(tensor: Tensor) -> Tensor:
        made.append(tensor)
        return tensor

    later = {n: Deferred(lambda t=t: watched(t), t.shape, t.dtype) for n, t in plain.items() if n != "b"}
    later = {"a": later.pop("a").cast(torch.float32), **later, "b": plain["b"]}
    save_file(plain, tmp_path / "plain", {"format": "pt"})
    save_tensors(later, tmp_path / "later", {"format": "pt"})
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "later").read_bytes()
    assert len(made) == 4  # each once
