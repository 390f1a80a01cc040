import math

import pytest
import torch

from vlafit.nn.attention import attend, draw_blocks, key_mask, per_query, rope_tables, rotate


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Head by head; `mask` is [b, s, l]."""
    out = []
    for h in range(q.shape[2]):
        group = h * k.shape[2] // q.shape[2]
        scores = q[:, :, h] @ k[:, :, group].transpose(1, 2) / math.sqrt(q.shape[3])
        out.append(scores.masked_fill(~mask, -1e30).softmax(-1) @ v[:, :, group])
    return torch.cat(out, -1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_attention_written_out_head_by_head(groups: int):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, groups, 8), torch.randn(2, 5, groups, 8)
    valid = torch.tensor([[True, True, True, False, False], [True] * 5])
    square = torch.rand(1, 3, 5) > 0.3
    square[..., 0] = True
    everything = torch.ones(2, 3, 5, dtype=torch.bool)
    by_key = valid[:, None].expand(2, 3, 5)
    for mask, same in (
        (None, everything),
        (key_mask(valid), by_key),
        (per_query(square, 4 // groups), square.expand(2, 3, 5)),
        (per_query(square & by_key, 4 // groups), square & by_key),
    ):
        # A logit sums 8 products of up to 10, by sqrt(8): 8 * 2^-24 * 10 / 2.8 = 1.7e-6 is the relative
        # error of a weight. Times |v| <= 4, and 5 terms of the last sum: 8e-6, of each of the two.
        exact = naive(*(x.double() for x in (q, k, v)), same).float()
        torch.testing.assert_close(attend(q, k, v, mask), exact, atol=8e-6, rtol=0)


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16).expand(2, 1, 4, 16)

    def product(at: int, other: int) -> torch.Tensor:
        a = rotate(q[None, :, :1], rope_tables(torch.tensor([[at]]), 16))
        b = rotate(k[None, :, :1], rope_tables(torch.tensor([[other]]), 16))
        return (a * b).sum()

    # an angle of 110 is rounded by 110 * 2^-24; a product of vectors of length 4 moves 16 times as far: 1e-4
    torch.testing.assert_close(product(3, 10), product(103, 110), atol=1e-4, rtol=0)
    assert (product(3, 10) - product(3, 11)).abs() > 1e-3


def test_position_zero_rotates_nothing_and_the_dtype_stays():
    x = torch.randn(1, 1, 2, 8).bfloat16()
    assert torch.equal(rotate(x, rope_tables(torch.zeros(1, 1, dtype=torch.int64), 8)), x)


def test_draws_see_what_they_share_and_themselves_alone():
    expected = [
        "1....",
        "111..",
        "111..",
        "1..11",
        "1..11",
    ]
    got = draw_blocks(1, 2, 2, torch.device("cpu"))
    assert ["".join("1" if seen else "." for seen in row) for row in got.tolist()] == expected
