"""Recorded demonstrations: data cards, stores of episodes, and the samples drawn from them."""

from vlafit.datasets.augment import draw_shifts, shift_image, shift_images
from vlafit.datasets.card import Card, Draft, RecordSpec
from vlafit.datasets.chunks import ChunkDataset
from vlafit.datasets.load import describe, load_card, open_dataset, open_draft
from vlafit.datasets.order import MixtureOrder, SampleOrder
from vlafit.datasets.split import episodes_hash, split_episodes
from vlafit.datasets.statistics import Blocks, arrays_for_statistics, blocks_for_statistics
from vlafit.datasets.store import EpisodeInfo, EpisodeStore

__all__ = [
    "Blocks",
    "Card",
    "ChunkDataset",
    "Draft",
    "EpisodeInfo",
    "EpisodeStore",
    "MixtureOrder",
    "RecordSpec",
    "SampleOrder",
    "arrays_for_statistics",
    "blocks_for_statistics",
    "describe",
    "draw_shifts",
    "episodes_hash",
    "load_card",
    "open_dataset",
    "open_draft",
    "shift_image",
    "shift_images",
    "split_episodes",
]
