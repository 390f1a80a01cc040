"""Checkpoints: exact, or an error. Every tensor is used or named unused, every parameter filled or fresh."""

from vlafit.checkpoints.assign import fit, open_tensors
from vlafit.checkpoints.codecs import wants_tokenizer
from vlafit.checkpoints.formats.native.adapters import Base, names_on_base, read_base
from vlafit.checkpoints.hashing import digest
from vlafit.checkpoints.history import Learned, Lineage, read_lineage
from vlafit.checkpoints.load import Loaded, inspect, load, load_policy
from vlafit.checkpoints.load_report import LoadReport
from vlafit.checkpoints.locate import Place, place
from vlafit.checkpoints.options import take_apart
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
