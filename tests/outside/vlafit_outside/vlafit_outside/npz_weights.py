"""A checkpoint format: weights.npz with the config inside, and vlafit's codec beside it."""

import dataclasses
import json
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.name_map import Translated
from vlafit.checkpoints.options import LoadOptions
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit_outside import chunk_regression

WEIGHTS, CONFIG = "weights.npz", "config"
FAMILY = "vlafit_outside.chunk_regression"


class NpzWeights(Format):
    """Policies of the family chunk_regression; "." in names is "/" in the file."""

    name = "npz"
    target = "npz"
    files = (WEIGHTS,)

    def detect(self, files: CheckpointFiles) -> bool:
        return (files.folder / WEIGHTS).is_file()

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        path = files.folder / WEIGHTS
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                values = json.loads(str(arrays[CONFIG]))
                tensors = {n.replace("/", "."): torch.from_numpy(arrays[n]) for n in arrays if n != CONFIG}
                config = chunk_regression.Config(**values)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise WeightsError(f"{path}: is damaged or not of this format ({error!r})") from error
        codec = Codec.load(files.folder) if (files.folder / "codec.json").is_file() else None
        return OpenedCheckpoint(
            path=str(files.path),
            format=self,
            family=FAMILY,
            tensors=Translated(tensors, file_name=lambda name: name.replace(".", "/")),
            config=config,
            own_codec=codec,
        )

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        if isinstance(policy, chunk_regression.ChunkRegression):
            return []
        return [f"npz holds only policies of {FAMILY}, not {type(policy).__name__}"]

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        arrays = {n.replace(".", "/"): p.detach().float().numpy() for n, p in policy.named_parameters()}
        config = np.array(json.dumps(dataclasses.asdict(policy.config)))
        np.savez(folder / WEIGHTS, **arrays, **{CONFIG: config})
        if codec is not None:
            codec.save(folder)
        return () if codec is not None else ("there is no codec: fine-tuning will fit one",)


FORMAT = NpzWeights()
