import numpy as np
import pytest
from PIL import Image

from vlafit.codec.images import resize_with_pad


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def reference(image: np.ndarray, size: int) -> np.ndarray:
    """openpi's `_resize_with_pad_pil`, in its own steps."""
    picture = Image.fromarray(image)
    width, height = picture.size
    if width == size and height == size:
        return image
    ratio = max(width / size, height / size)
    inner_height, inner_width = int(height / ratio), int(width / ratio)
    resized = picture.resize((inner_width, inner_height), resample=Image.Resampling.BILINEAR)
    zero = Image.new(resized.mode, (size, size), 0)
    zero.paste(resized, (max(0, int((size - inner_width) / 2)), max(0, int((size - inner_height) / 2))))
    return np.asarray(zero)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (10, 10), (200, 31), (33, 97), (224, 224)])
@pytest.mark.parametrize("size", [32, 33, 224])
def test_resizing_equals_the_reference(shape: tuple[int, int], size: int, rng: np.random.Generator):
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_with_pad(image, size), reference(image, size))


def test_an_image_of_the_right_size_is_not_copied(rng: np.random.Generator):
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert resize_with_pad(image, 16) is image


def test_a_rotated_view_can_be_resized(rng: np.random.Generator):
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)[::-1, ::-1]
    np.testing.assert_array_equal(resize_with_pad(image, 16), reference(image.copy(), 16))


def test_a_very_flat_image_keeps_at_least_one_row():
    assert resize_with_pad(np.full((1, 500, 3), 9, np.uint8), 16).max() == 9
