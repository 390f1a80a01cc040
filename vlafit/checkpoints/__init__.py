"""Load, inspect, save and export checkpoints: exactly, or with an error that names every tensor that is
wrong.
"""

from vlafit.checkpoints.assign import fit, keep_in, stored_as
from vlafit.checkpoints.declaration import Declaration, InputForm
from vlafit.checkpoints.formats.native.adapters import Base, names_on_base, read_base
from vlafit.checkpoints.history import Learned, Lineage, join_seeds, read_lineage
from vlafit.checkpoints.hub import Place
from vlafit.checkpoints.load import (
    Loaded,
    LoadedSet,
    declaration,
    inspect,
    inspect_all,
    load,
    load_all,
    load_policy,
    parse_config,
    wants_tokenizer,
)
from vlafit.checkpoints.load_report import LoadReport
from vlafit.checkpoints.locate import digest, lasting_base, place
from vlafit.checkpoints.resize import split_embodiments
from vlafit.checkpoints.save import save
from vlafit.checkpoints.tensor_files import open_tensors

__all__ = [
    "Base",
    "Declaration",
    "InputForm",
    "Learned",
    "Lineage",
    "LoadReport",
    "Loaded",
    "LoadedSet",
    "Place",
    "declaration",
    "digest",
    "fit",
    "inspect",
    "inspect_all",
    "join_seeds",
    "keep_in",
    "lasting_base",
    "load",
    "load_all",
    "load_policy",
    "names_on_base",
    "open_tensors",
    "parse_config",
    "place",
    "read_base",
    "read_lineage",
    "save",
    "split_embodiments",
    "stored_as",
    "wants_tokenizer",
]
