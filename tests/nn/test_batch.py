from dataclasses import replace

import numpy as np
import pytest
import torch

from vlafit.codec import Encoded
from vlafit.errors import CodecError
from vlafit.nn.batch import Batch, stack, unit_images


def encoded(actions: bool = True, used: int = 3) -> Encoded:
    return Encoded(
        images=np.full((2, 3, 4, 4), 255, np.uint8),
        image_mask=np.array([True, False]),
        tokens=np.arange(10, dtype=np.int64),
        token_mask=np.arange(10) < used,
        state=np.ones(3, np.float32),
        actions=np.ones((5, 2), np.float32) if actions else None,
        action_mask=np.ones((5, 2), bool) if actions else None,
    )


def test_samples_stack_into_a_batch():
    batch = stack([encoded(), encoded(used=7)])
    assert len(batch) == 2
    assert batch.images.shape == (2, 2, 3, 4, 4) and batch.images.dtype == torch.uint8
    assert batch.tokens.dtype == torch.int64 and batch.token_mask.sum(1).tolist() == [3, 7]
    assert batch.actions is not None and batch.actions.shape == (2, 5, 2)
    assert stack([encoded(actions=False)]).actions is None


def test_some_samples_with_actions_and_some_without_are_refused():
    with pytest.raises(CodecError, match="1 of 2 samples.*actions"):
        stack([encoded(), encoded(actions=False)])
    with pytest.raises(CodecError, match="no samples to stack"):
        stack([])


def test_bytes_become_floats_from_minus_one_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(unit_images(pixels), pixels.float() / 255 * 2 - 1)
    # A quotient of 0.2 and a difference of 0.6 round by 2^-27 * 2 and 2^-25: less than 2^-24.
    assert unit_images(pixels).tolist() == pytest.approx([-1, -0.6, 1], rel=0, abs=2**-24)
    floats = torch.tensor([-1.0, 0.3])
    assert torch.equal(unit_images(floats), floats)
    moved = stack([encoded()]).to("cpu", torch.bfloat16)
    assert moved.images.dtype == torch.bfloat16 and float(moved.images.max()) == 1.0
    assert moved.state.dtype == torch.float32


def test_trimming_drops_what_no_row_has_and_nothing_else():
    batch = stack([encoded(used=3), encoded(used=5)])
    trimmed = batch.trim(multiple=4)
    assert trimmed.images.shape[1] == 1 and trimmed.image_mask.tolist() == [[True], [True]]
    assert trimmed.tokens.shape == (2, 8)
    assert batch.trim(multiple=16).tokens.shape == (2, 10)
    mixed = replace(batch, image_mask=torch.tensor([[True, False], [False, True]]))
    assert mixed.trim().images.shape[1] == 2


def test_a_batch_that_sees_and_reads_nothing_keeps_one_camera():
    batch = stack([encoded(used=0)])
    batch.image_mask[:] = False
    trimmed = batch.trim(multiple=4)
    assert trimmed.images.shape[1] == 1 and trimmed.tokens.shape == (1, 4)


def test_a_batch_for_acting_needs_no_actions():
    b = stack([encoded(actions=False)])
    batch = Batch(images=b.images, image_mask=b.image_mask, state=b.state)
    assert batch.to("cpu").actions is None


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("action_mask", lambda x: x.float(), "batch.action_mask is of dtype float32; it must be bool"),
        (
            "action_mask",
            lambda x: x[0],
            r"batch.action_mask has the shape \(5, 2\); it must have 3 axes, \[b t a\]",
        ),
        ("token_mask", lambda x: x.long(), "batch.token_mask is of dtype int64; it must be bool"),
        ("image_mask", lambda x: x.to(torch.uint8), "batch.image_mask is of dtype uint8; it must be bool"),
        ("images", lambda x: x.long(), "batch.images is of dtype int64; it must be uint8, or floating-point"),
        ("images", lambda x: x[:, 0], r"batch.images has the shape .*; it must have 5 axes, \[b n 3 h w\]"),
        ("tokens", lambda x: x.float(), "batch.tokens is of dtype float32; it must be int64 or int32"),
        ("state", lambda x: x.long(), "batch.state is of dtype int64; it must be floating-point"),
        ("actions", lambda x: x.numpy(), "batch.actions must be a tensor, floating-point, not ndarray"),
        ("state", lambda x: None, "batch.state must be a tensor, floating-point, not NoneType"),
    ],
)
def test_a_field_of_another_kind_is_one_error_that_names_it(field: str, change, message: str):
    batch = stack([encoded()])
    with pytest.raises(CodecError, match=message):
        replace(batch, **{field: change(getattr(batch, field))})


def test_int32_tokens_and_float_images_are_what_a_batch_may_hold():
    batch = stack([encoded()])
    made = replace(batch, tokens=batch.tokens.int(), images=batch.images.half(), actions=None)
    assert made.tokens.dtype == torch.int32
