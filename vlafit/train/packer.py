"""Pack the micro-batches of a run row by row, and count what that leaves out (`train.packing`)."""

from typing import Literal, final

import torch

from vlafit.errors import ConfigError
from vlafit.nn.batch import Batch
from vlafit.nn.packing import Kernel, PrefixShape, kernel_for
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.recipe import Recipe

ATTENTION = {
    "rows": "attention of each row",
    "flash": "flash attention over all rows",
    "padded": "attention padded",
}


@final
class Packer:
    """Packs batches that are padded too much; see `nn.packing`."""

    def __init__(self, shape: PrefixShape, kernel: Kernel) -> None:
        self.shape: PrefixShape = shape
        self.kernel: Kernel = kernel
        self.batches = self.packed = 0
        self._kernels: set[Kernel] = set()
        self._padded = self._real = 0

    def pack(self, batch: Batch) -> Batch:
        """Return a trimmed batch, packed where that leaves out enough."""
        self.batches += 1
        short = batch.packed(self.shape, self.kernel)
        if short.packing is not None:
            self.packed += 1
            self._kernels.add(short.packing.segments.kernel)
            cameras, words = batch.image_mask.shape[1], batch.prompt()[0].shape[1]
            self._padded += len(batch) * (cameras * self.shape.image_tokens + words)
            self._real += sum(short.packing.segments.lengths)
        return short

    @property
    def sentence(self) -> str:
        """How many batches were packed, for the log; "" for none."""
        if not self.packed:
            return ""
        attention = ", ".join(ATTENTION[kernel] for kernel in sorted(self._kernels))
        left_out = 1 - self._real / self._padded
        return (
            f"train.packing: {self.packed} of {self.batches} micro-batches were computed row after row "
            f"({attention}), without the {left_out:.0%} of their images and prompts "
            "that are padding"
        )


def chosen_packing(recipe: Recipe, policy: Policy) -> Literal["none", "rows"]:
    """Return how the batches of a policy are computed.

    Raises ConfigError where the recipe asks for packed rows of a family that takes none.
    """
    how, takes = recipe.train.packing, policy.packs() is not None
    if how == "rows" and not takes:
        raise ConfigError(
            f'train.packing = "rows": the family {family_name(policy)!r} computes its batches padded; set '
            'train.packing to "auto" or "none"'
        )
    if how == "auto":  # packed rows have as many lengths as there are batches, and each would be compiled
        return "rows" if takes and recipe.train.compile != "blocks" else "none"
    return how


def packer_of(policy: Policy, recipe: Recipe, device: torch.device) -> Packer | None:
    """Return the packer that the recipe asks for; None without one."""
    shape = policy.packs()
    if shape is None or chosen_packing(recipe, policy) == "none":
        return None
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    return Packer(shape, kernel_for(device, dtype, shape))
