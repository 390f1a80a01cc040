"""Recorded demonstrations: data cards, stores of episodes, and the samples drawn from them."""

from vlafit.datasets.augment import draw_shifts, shift_image, shift_images
from vlafit.datasets.card import Card, RecordSpec, load_card
from vlafit.datasets.chunks import ChunkDataset
from vlafit.datasets.order import SampleOrder
from vlafit.datasets.split import split_episodes
from vlafit.datasets.statistics import arrays_for_statistics
from vlafit.datasets.store import EpisodeInfo, EpisodeStore, open_dataset

__all__ = [
    "Card",
    "ChunkDataset",
    "EpisodeInfo",
    "EpisodeStore",
    "RecordSpec",
    "SampleOrder",
    "arrays_for_statistics",
    "draw_shifts",
    "load_card",
    "open_dataset",
    "shift_image",
    "shift_images",
    "split_episodes",
]
