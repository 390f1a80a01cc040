"""vlafit's own format: every config is written down, every file is hashed, weights may sit on a base."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from vlafit import files as storage
from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.formats.native.adapters import NativeAdapters, find_base
from vlafit.checkpoints.formats.native.read import MANIFEST, NativeFolder, open_folder, recognise
from vlafit.checkpoints.formats.native.write import write_folder
from vlafit.checkpoints.name_map import Translated
from vlafit.checkpoints.options import WIDTHS, LoadOptions, require_known_keys
from vlafit.checkpoints.tensor_files import open_tensors
from vlafit.codec import Codec
from vlafit.nn.policy import Policy, Source
from vlafit.policies import merge_dotted, override

LAYOUT = {"vlafit's own": ("vision.layers.", "language.layers.", "expert.layers.")}
"""How tensor names begin in files of our own that lost what is beside them."""


class Native(Format):
    """Checkpoints of vlafit, of every policy family, whether it is in the package or not."""

    name = "native"
    target = "vlafit"
    takes_deferred = True
    no_codec = "fine-tuning fits one"

    def detect(self, files: CheckpointFiles) -> bool:
        """Whether a manifest or policy.json is there."""
        return files.path.is_dir() and recognise(files.path)

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        """Verify every hash, and open the weights with those of the base below them."""
        path, fields = files.path, options.config.fields
        stored = open_folder(path, options.hash_weights, options.trust)
        config = stored.config
        if fields:
            require_known_keys(fields, asdict(config), f"{path}: config")
            config = override(config, fields, f"{path}: config")
        tuned = stored.plan is not None and (stored.plan.adapted or stored.plan.quantised)
        opened = OpenedCheckpoint(
            path=str(path),
            format=self,
            family=stored.family,
            tensors=Translated(open_tensors([stored.weights])),
            config=config,
            chunk=stored.config.chunk,
            steps=stored.steps,
            max_delay=stored.max_delay,
            own_codec=stored.codec,
            plan=stored.plan,
            adapters=NativeAdapters(path, stored.plan, stored.base) if stored.plan and tuned else None,
            on_base=stored.base is not None,
            sha256=storage.sha256(path / MANIFEST),
        )
        return opened if stored.base is None else _on_base(opened, stored, path, options, opener)

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        """Return nothing: it holds every policy."""
        return []

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        """Write the whole policy; `vlafit.checkpoints.save` writes adapters, too."""
        write_folder(folder, policy, dict(policy.named_parameters()), codec)
        return ()


def _on_base(
    opened: OpenedCheckpoint, stored: NativeFolder, path: Path, options: LoadOptions, opener: Opener
) -> OpenedCheckpoint:
    """Return the checkpoint with the weights that it takes from its base."""
    assert stored.base is not None
    place = find_base(path, stored.base, options.base, opener.place, opener.digest)
    config = None
    if not recognise(place):
        config = merge_dotted(
            {k: v for k, v in asdict(stored.config).items() if k not in WIDTHS}, stored.base.config
        )
    below = opener.open(place, replace(opener.options(config), hash_weights=options.hash_weights))
    own = opened.tensors.weights

    def contents(wanted: frozenset[str]) -> Iterable[tuple[str, Tensor]]:
        assert below.contents is not None
        yield from ((n, t) for n, t in below.contents(wanted - own.keys()) if n not in own)
        yield from own.items()

    def file_name(name: str) -> str:
        return name if name in own else below.tensors.file_name(name)

    weights = {n: t for n, t in below.tensors.weights.items() if n not in own} | own
    return replace(
        opened,
        tensors=replace(below.tensors, weights=weights, file_name=file_name, twins={}, conflicts=()),
        conflicts=below.conflicts,
        contents=contents if below.contents else None,
        # Its own weights may differ from the base's anywhere, unless they are adapters or rounded.
        source=Source(str(place.resolve()), stored.base.sha256, stored.base.config)
        if opened.adapters is not None
        else None,
        notes=(f"on {stored.base.checkpoint}, with {len(own)} weights of its own",),
    )


FORMAT = Native()
