"""Check that the policy can read every instruction of a run's datasets, and distinguish them."""

from collections.abc import Iterable

import numpy as np

from vlafit.codec import Codec
from vlafit.datasets import EpisodeStore
from vlafit.errors import CodecError, quoted
from vlafit.types import Observation


def require_prompts(datasets: Iterable[tuple[EpisodeStore, Codec]]) -> None:
    """Encode each instruction once, so that a too long one is an error now and not days later.

    Raises CodecError for it, and for two that the tokenizer does not distinguish, also of different datasets,
    unless they differ in case and blanks only.
    """
    by_tokens: dict[tuple[int, ...], str] = {}
    for store, codec in datasets:
        images = {camera.name: np.zeros(camera.shape, np.uint8) for camera in codec.embodiment.cameras}
        shape = codec.embodiment.state.shape
        is_same = store.embodiment.state.shape == shape  # not of a robot that may differ
        encoded: set[str] = set()
        for number, episode in enumerate(store.episodes):
            if episode.instruction in encoded:
                continue
            encoded.add(episode.instruction)
            try:
                state = store.state(number)[0] if is_same else np.zeros(shape, np.float32)
                codec.encode(Observation(images, state, episode.instruction))
            except CodecError as error:
                raise CodecError(f"card {store.card.name!r}, episode {episode.id}: {error}") from error
            if codec.tokenizer is None:
                continue
            tokens = tuple(codec.tokenizer.encode(episode.instruction))
            other = by_tokens.setdefault(tokens, episode.instruction)
            if other.casefold().split() != episode.instruction.casefold().split():
                raise CodecError(
                    f"card {store.card.name!r}, episode {episode.id}: the tokenizer makes the same tokens of "
                    f"{quoted(episode.instruction)} and {quoted(other)}, whose words it does not know: no "
                    "policy could tell the tasks apart. Is it the tokenizer of these weights "
                    "(policy.tokenizer)? Else write the instructions in words that it knows"
                )
