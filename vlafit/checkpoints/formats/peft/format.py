"""PEFT folders of adapters on a checkpoint of another program."""

from dataclasses import replace
from pathlib import Path

from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.peft.read import (
    PeftAdapters,
    open_folder,
    recognise,
    saved_modules,
    unused_heads,
)
from vlafit.checkpoints.options import LoadOptions
from vlafit.errors import WeightsError
from vlafit.policies import override


class Peft(Format):
    """A folder with adapter_config.json. The opened checkpoint is of the format of its base.

    `vlafit export` writes such a folder for every format that supports adapters.
    """

    name = "PEFT"

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether adapter_config.json is there."""
        return recognise(files.path)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Open the base, with the weights in full that lie beside the adapters.

        Raises WeightsError where they cannot be of this base.
        """
        folder = open_folder(files.path, options.base, opener.place)
        below = opener.open(folder.base, replace(options, base=None, adapters=files.path))
        support = below.format.adapters
        names = support.names(below.family) if support is not None else None
        if support is None or names is None:
            raise WeightsError(
                f"{files.path}: adapters on a checkpoint of {below.format.name} are not supported"
            )
        own = saved_modules(folder, names, below.tensors.weights)
        heads = unused_heads(folder, names)
        unused = (f"output heads beside the adapters feed no action: {', '.join(heads)}",) if heads else ()
        settings = support.settings(files.path, folder.base)
        own_config = {k: v for k, v in settings.config.items() if k not in options.config.fields}
        config = below.config
        if own_config:
            named = settings.source and f" (embodiment: {settings.source})"
            config = override(config, own_config, f"{files.path}: config{named}")
        codec_folder = below.codec_folder
        if codec_folder is not None:
            codec_folder = support.codec_folder(files.path, codec_folder)
        of_base = codec_folder is not None and codec_folder == below.codec_folder
        return replace(
            below,
            path=str(files.path),
            config=config,
            chunk=settings.config.get("chunk", below.chunk),
            steps=below.steps if settings.steps is None else settings.steps,
            tensors=replace(below.tensors, weights={**below.tensors.weights, **own}),
            codec_folder=codec_folder,
            statistics_of=str(folder.base) if of_base else "",
            adapters=PeftAdapters(folder, names, tuple(own)),
            on_base=True,
            notes=(
                *below.notes,
                f"adapters of peft ({len(folder.tensors)} tensors) on {folder.base}",
                *unused,
            ),
        )

    def base_of(self, files: CheckpointFiles, base: str | Path | None, opener: Opener) -> Path:
        """Return the folder of what the adapters sit on."""
        return open_folder(files.path, base, opener.place).base


FORMAT = Peft()
