"""The sizes of a micro-batch that decide its arithmetic, as it goes into the policy."""

from dataclasses import dataclass

from vlafit.nn.batch import Batch


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
        """Return the shape of a batch that was trimmed."""
        tokens = 0 if batch.tokens is None else batch.tokens.shape[-1]
        targets = 0 if batch.target_tokens is None else batch.target_tokens.shape[-1]
        return cls(len(batch), batch.image_mask.shape[-1], tokens, targets)
