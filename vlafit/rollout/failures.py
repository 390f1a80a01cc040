"""Order the film strips of failed episodes so that those that ended alike stand together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.rollout.video import BORDER, LABEL, STRIP_FRAMES

SIDE = 16  # pixels to which a last picture is reduced before it is compared
MOST_ORDERED = 500  # strips of which the best order of the tree's leaves is sought, which takes long


def like_together(strips: Sequence[Path]) -> list[Path]:
    """Return film strips (PNG files) in an order in which those with like last pictures are neighbours.

    The leaves of a tree of average linkage, by the distance of colours. The order of files does not matter.
    """
    from scipy.cluster import hierarchy  # here, because environment processes import this package

    strips = sorted(strips)
    if len(strips) < 3:
        return strips
    ends = np.stack([_end(strip) for strip in strips])
    tree = hierarchy.linkage(ends, "average")
    if len(strips) <= MOST_ORDERED:
        tree = hierarchy.optimal_leaf_ordering(tree, ends)
    return [strips[i] for i in hierarchy.leaves_list(tree)]


def _end(strip: Path) -> NDArray[np.float64]:
    """Return the last picture of a film strip as SIDE x SIDE colours in [0, 255], in one row."""
    from PIL import Image

    with Image.open(strip) as picture:
        right, bottom = picture.width - BORDER, picture.height - BORDER
        side = (right - BORDER) // STRIP_FRAMES
        last = picture.convert("RGB").crop((right - side, LABEL + BORDER, right, bottom))
    return np.asarray(last.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64).ravel()
