"""What a policy is given: one sample or observation as arrays of fixed shapes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Key = tuple[str, str, int]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample or observation as a policy takes it; every shape depends on the codec's config only.

    With a history of o > 1 steps, `images`, `image_mask` and `state` begin with an axis o, the newest last.
    """

    images: NDArray[np.uint8]  # [n, 3, h, w]; zeros where the camera is missing
    image_mask: NDArray[np.bool_]  # [n]
    tokens: NDArray[np.int64] | None  # [l]; None without a prompt
    token_mask: NDArray[np.bool_] | None  # [l]
    state: NDArray[np.float32]  # [S] normalised, zero-padded
    actions: NDArray[np.float32] | None  # [t, A] normalised, zero-padded
    action_mask: NDArray[np.bool_] | None  # [t, A] True where the loss counts
    key: Key | None = None
    history_mask: NDArray[np.bool_] | None = None  # [o] False where a step before the episode is padded
    target_tokens: NDArray[np.int64] | None = None  # [m], of a policy with a token loss
    target_mask: NDArray[np.bool_] | None = None  # [m]
    embodiment_id: NDArray[np.int64] | None = None  # []
