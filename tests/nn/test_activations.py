"""Activation functions: a row's bits do not depend on its place in the batch."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlafit
from vlafit.nn.activations import gelu_tanh, same_rows, sigmoid, silu

FUNCTIONS = pytest.mark.parametrize("function", [silu, sigmoid, gelu_tanh])
ROWS = 7


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@FUNCTIONS
@pytest.mark.parametrize("shape", [(5,), (12,), (3, 20), (331, 64)])
def test_equal_rows_have_equal_bits(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], threads: int
) -> None:
    row = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch = row.expand(ROWS, *shape).contiguous()
    with same_rows(ROWS):
        answers = function(batch)
    assert answers.shape == batch.shape
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    # One rounding of each of a handful of operations on numbers of this size.
    torch.testing.assert_close(answers[0], function(row), rtol=8 * torch.finfo().eps, atol=torch.finfo().eps)


@FUNCTIONS
def test_rows_may_lie_apart_in_memory_and_several_tokens_may_make_one(
    function: Callable[[Tensor], Tensor],
) -> None:
    batch = torch.randn(5, 1, 2).expand(5, ROWS, 2).transpose(0, 1)  # [7, 5, 2], equal rows
    with same_rows(ROWS):
        answers = function(batch)
        tokens = function(batch.reshape(ROWS * 5, 2)).reshape(ROWS, 5, 2)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert torch.equal(tokens, answers)


def test_gradients_come_through() -> None:
    batch = torch.randn(ROWS, 5, dtype=torch.float64, requires_grad=True)
    with same_rows(ROWS):
        assert torch.autograd.gradcheck(gelu_tanh, batch)


def test_no_policy_calls_the_kernels_whose_bits_depend_on_the_place() -> None:
    uneven = {
        "silu",
        "sigmoid",
        "softplus",
        "elu",
        "selu",
        "celu",
        "mish",
        "SiLU",
        "Sigmoid",
        "Softplus",
        "ELU",
        "Mish",
    }
    wrong = []
    for path in Path(vlafit.__file__).parent.rglob("*.py"):
        if path.name == "activations.py":
            continue
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute):
                continue  # our own function, by its bare name
            by_tanh = call.func.attr in ("gelu", "GELU") and any(
                k.arg == "approximate" for k in call.keywords
            )
            if call.func.attr in uneven or by_tanh:
                wrong.append(f"{path}:{call.lineno}: {call.func.attr}")
    assert not wrong, "take vlafit.nn.activations: " + ", ".join(wrong)
