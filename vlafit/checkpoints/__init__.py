"""Checkpoints: exact, or an error. Every tensor is used or named unused, every parameter filled or fresh."""

from vlafit.checkpoints.adapted import Base, names_on_base, read_base
from vlafit.checkpoints.codecs import wants_tokenizer
from vlafit.checkpoints.fit import fit, open_tensors
from vlafit.checkpoints.given import take_apart
from vlafit.checkpoints.hub import Place, place
from vlafit.checkpoints.identity import digest
from vlafit.checkpoints.lineage import Learned, Lineage, read_lineage
from vlafit.checkpoints.load import Loaded, inspect, load, load_policy
from vlafit.checkpoints.report import LoadReport
from vlafit.checkpoints.save import save

__all__ = [
    "Base",
    "Learned",
    "Lineage",
    "LoadReport",
    "Loaded",
    "Place",
    "digest",
    "fit",
    "inspect",
    "load",
    "load_policy",
    "names_on_base",
    "open_tensors",
    "place",
    "read_base",
    "read_lineage",
    "save",
    "take_apart",
    "wants_tokenizer",
]
