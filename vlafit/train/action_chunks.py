"""Training chunks as a policy that writes tokens sees them, and what of them its tokens do not hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from vlafit.codec import Codec, CodecConfig
from vlafit.codec.action_bins import BINS
from vlafit.codec.action_text import ActionText
from vlafit.codec.codec_config import columns_of, normaliser
from vlafit.codec.fast import FastTokenizer
from vlafit.codec.statistics import Statistics
from vlafit.train.data import Data
from vlafit.train.data_statistics import statistics_for

CHECKED = 512  # chunks that are encoded and decoded before a run


@dataclass(frozen=True)
class Chunks:
    """The training chunks of one embodiment, and how they are normalised."""

    data: Data
    config: CodecConfig
    statistics: Statistics | None = None
    """Of actions, such as the checkpoint's; None: those that are fitted to the data."""


def normalised(chunks: Mapping[str, Chunks], most: int) -> Iterator[NDArray[np.float32]]:
    """Yield at most `most` normalised chunks [t, a], of training steps evenly spread over all embodiments.

    The last action is repeated past the end of an episode. Only what is yielded is read.
    """
    normalisers, columns = {}, {}
    for name, one in chunks.items():
        columns[name] = columns_of(one.config, one.data.embodiment)
        statistics = one.statistics or statistics_for(one.data, one.config)["action"]
        normalisers[name] = normaliser(one.config, "action", statistics)
    steps = [
        (name, store, episode, step)
        for name, one in chunks.items()
        for store, ids in zip(one.data.stores, one.data.training, strict=True)
        for episode in map(store.index, ids)
        for step in range(store.episodes[episode].length)
    ]
    sampled = steps[:: -(-len(steps) // most)]
    for (name, store, episode), some in groupby(sampled, key=itemgetter(0, 1, 2)):
        config = chunks[name].config
        actions, states = store.actions(episode).astype(np.float64), store.state(episode)
        for *_, step in some:
            rows = np.minimum(np.arange(step, step + config.answered), len(actions) - 1)
            window = columns[name].actions(actions[rows], states[step])
            made = np.zeros((config.chunk, window.shape[1]), np.float32)
            made[: config.answered] = normalisers[name].encode(window)
            yield made


def faults_of(data: Mapping[str, Data], codecs: Sequence[Codec]) -> tuple[str, ...]:
    """Return warnings about training chunks that tokens do not hold; `codecs` are in the order of `data`."""
    pairs = [(_of(part, codec), codec) for part, codec in zip(data.values(), codecs, strict=True)]
    words = [
        warning
        for chunks, codec in pairs
        if codec.action_text is not None
        for warning in _lost(chunks, codec.action_text)
    ]
    bins = [
        warning for chunks, codec in pairs if codec.action_bins is not None for warning in _beyond(chunks)
    ]
    return (*words, *bins)


def _of(data: Data, codec: Codec) -> Chunks:
    return Chunks(data, codec.config, codec.statistics["action"])


def _beyond(chunks: Chunks) -> Iterator[str]:
    """Yield a warning where normalised actions lie outside [-1, 1], of a sample of the chunks."""
    values = np.abs(np.concatenate(list(normalised({"": chunks}, CHECKED))))
    beyond = float((values > 1).mean())
    if beyond:
        yield (
            f"{beyond:.1%} of sampled action values lie outside [-1, 1] after normalisation by "
            f"{chunks.config.of_actions}, up to {values.max():.3g}, and are cut there, because each value is "
            f"one of {BINS} bins; normalise by openvla_quantile or openvla_min_max (data.normalisation)"
        )


def _lost(chunks: Chunks, text: ActionText) -> Iterator[str]:
    """Yield warnings of a sample of the chunks."""
    sample = list(normalised({"": chunks}, CHECKED))
    lengths = [len(text.encode(chunk)) for chunk in sample]
    lost = sum(not _comes_back(text.actions, chunk) for chunk in sample)
    cut = sum(length > text.config.longest for length in lengths)
    if cut:
        yield (
            f"{cut} of {len(sample)} sampled action chunks have more than {text.config.longest} tokens, up "
            f"to {max(lengths)}, and are cut, so that the policy learns unfinished actions; "
            "raise policy.config.action_tokens"
        )
    if lost:
        yield (
            f"{lost} of {len(sample)} sampled action chunks hold coefficients that the action tokenizer "
            "has no token for, so that the policy learns other actions; take other statistics "
            '(data.statistics), or fit a tokenizer to the data (policy.action_tokenizer = "fit"), whose '
            "tokens pretrained weights learn anew"
        )


def _comes_back(tokenizer: FastTokenizer, chunk: NDArray[np.float32]) -> bool:
    """Whether the tokens of a chunk hold all its coefficients: none vanishes, none is raised to the least."""
    back = tokenizer.decode(tokenizer.encode(chunk), *chunk.shape)
    return back.valid and np.array_equal(tokenizer.coefficients(back.chunk), tokenizer.coefficients(chunk))
