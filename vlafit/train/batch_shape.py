"""The sizes of a micro-batch that decide its arithmetic, as it goes into the policy."""

from collections import Counter
from dataclasses import dataclass

from vlafit.nn.batch import Batch

STEP = 16  # tokens: packed prompts are counted up to the next multiple, so that few shapes are


@dataclass(frozen=True)
class BatchShape:
    """How many samples, cameras and tokens a micro-batch has after it was trimmed."""

    rows: int
    cameras: int
    tokens: int
    """Of the prompt; 0 without one."""
    targets: int = 0
    """Action tokens; 0 where actions are numbers."""

    @classmethod
    def of(cls, batch: Batch) -> "BatchShape":
        """Return the shape of a batch that was trimmed, as if none of its padding was left out."""
        tokens = 0 if batch.tokens is None else batch.tokens.shape[-1]
        return cls(len(batch), batch.image_mask.shape[-1], tokens, _targets(batch))

    @classmethod
    def parts_of(cls, batch: Batch) -> tuple["BatchShape", ...]:
        """Return the shapes of a trimmed batch: one, or where its rows are packed those of its rows."""
        packing = batch.packing
        if packing is None:
            return (cls.of(batch),)
        mask = batch.prompt()[1]
        words = (mask.sum(1).add(STEP - 1) // STEP * STEP).clamp(max=mask.shape[1]).tolist()
        alike = Counter((cameras, length) for cameras, length in zip(packing.cameras, words, strict=True))
        targets = _targets(batch)
        return tuple(cls(rows, cameras, tokens, targets) for (cameras, tokens), rows in alike.items())


def _targets(batch: Batch) -> int:
    return 0 if batch.target_tokens is None else batch.target_tokens.shape[-1]
