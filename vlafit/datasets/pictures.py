"""Decode an encoded image (JPEG, PNG, and WebP of pictures) to RGB."""

import io

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError

RGB_MARK = b"XPL-RGB1"  # the JPEG comment by which RoboTwin (from 2026-09) marks pictures in the usual order
CLEARER = 0.5  # frames in one order of red and blue are this much nearer to what they show than in the other


def decode_image(data: bytes, where: str) -> NDArray[np.uint8]:
    """Return the frame [h, w, 3] as any viewer shows it. Raises DataError if it is damaged or not RGB."""
    return decode_marked(data, where)[0]


def decode_marked(data: bytes, where: str) -> tuple[NDArray[np.uint8], bool]:
    """Return the frame [h, w, 3] as any viewer shows it, and whether a mark says that this is right."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "RGB":
                raise DataError(f"{where}: is a {image.mode} image, not RGB")
            return np.asarray(image), image.info.get("comment") == RGB_MARK
    except UnidentifiedImageError as error:  # whose text is the address of an object
        empty = (
            "empty" if not data.strip(b"\0") else f"{len(data):,} bytes that begin with {data[:4].hex(' ')}"
        )
        raise DataError(f"{where}: the image is damaged (no JPEG or PNG: {empty})") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: the image is damaged ({error})") from error


def decode_picture(data: bytes, where: str) -> NDArray[np.uint8]:
    """Return a picture [h, w, 3] of a JPEG, PNG or WebP file as a viewer shows it, grey ones in colour.

    Raises DataError if it is damaged, of another form, or see-through: what is behind it is not known.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as stored:
            image = ImageOps.exif_transpose(stored)
            if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise DataError(f"{where}: the picture is see-through; save it with a background")
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: is no JPEG, PNG or WebP picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the picture is damaged ({error})") from error


def colour_distances(frames: NDArray[np.uint8], shown: NDArray[np.uint8]) -> tuple[float, float]:
    """Return how many grey levels frames [..., 3] are away from what they show: as they are, and with red and
    blue exchanged. They are in the other order where one is below CLEARER times the other.
    """
    own, exchanged = (float(np.abs(frames[..., ::step].astype(int) - shown).mean()) for step in (1, -1))
    return own, exchanged
