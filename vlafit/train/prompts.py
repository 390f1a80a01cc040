"""Check that every instruction of a dataset is one that the policy reads, and tells from the others."""

import numpy as np

from vlafit.codec import Codec
from vlafit.datasets import EpisodeStore
from vlafit.errors import CodecError, quoted
from vlafit.types import Observation


def require_prompts(store: EpisodeStore, codec: Codec, told: dict[tuple[int, ...], str]) -> None:
    """Encode each instruction once, so that a too long one is an error now and not days later.

    `told` has the instructions of other datasets by their tokens, and takes those of this one. Raises
    CodecError for two that the tokenizer does not tell apart, unless only case and blanks do.
    """
    images = {camera.name: np.zeros(camera.shape, np.uint8) for camera in codec.embodiment.cameras}
    is_same = store.embodiment.state.shape == codec.embodiment.state.shape  # not of a robot that may differ
    still = np.zeros(codec.embodiment.state.shape, np.float32)
    encoded: set[str] = set()
    for number, episode in enumerate(store.episodes):
        if episode.instruction not in encoded:
            encoded.add(episode.instruction)
            try:
                state = store.state(number)[0] if is_same else still
                codec.encode(Observation(images, state, episode.instruction))
            except CodecError as error:
                raise CodecError(f"card {store.card.name!r}, episode {episode.id}: {error}") from error
            if codec.tokenizer is None:
                continue
            other = told.setdefault(tuple(codec.tokenizer.encode(episode.instruction)), episode.instruction)
            if other.casefold().split() != episode.instruction.casefold().split():
                raise CodecError(
                    f"card {store.card.name!r}, episode {episode.id}: the tokenizer makes the same tokens of "
                    f"{quoted(episode.instruction)} and {quoted(other)}, whose words it does not know: no "
                    "policy could tell the tasks apart. Is it the tokenizer of these weights "
                    "(policy.tokenizer)? Else write the instructions in words that it knows"
                )
