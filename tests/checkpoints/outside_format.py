"""A checkpoint format as another package would add it: tensors named with slashes, and a header of their
own.
"""

from pathlib import Path

from safetensors.torch import save_file

from vlafit.checkpoints.formats.base import CheckpointFiles, Format, OpenedCheckpoint, Opener
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import Translated
from vlafit.checkpoints.options import LoadOptions
from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.codec import Codec
from vlafit.files import write_atomic
from vlafit.nn.policy import Policy
from vlafit.policies.pi0 import Pi0

HEADER = "slashes.json"


class Slashes(Format):
    """pi0 under our names, with slashes for dots; the header holds what no shape has."""

    name = "slashes"
    target = "slashes"

    def detect(self, files: CheckpointFiles) -> bool:
        return (files.folder / HEADER).is_file()

    def open(self, files: CheckpointFiles, options: LoadOptions, opener: Opener) -> OpenedCheckpoint:
        header = read_json_if_present(files.folder / HEADER) or {}
        weights = {name.replace("/", "."): tensor for name, tensor in files.tensors.items()}
        tensors = Translated(weights, file_name=lambda name: name.replace(".", "/"))
        return OpenedCheckpoint(str(files.path), self, "pi0", tensors, ConfigEvidence(header))

    def refusals(self, policy: Policy, codec: Codec | None) -> list[str]:
        return [] if isinstance(policy, Pi0) else ["slashes holds only pi0"]

    def write(self, folder: Path, policy: Policy, codec: Codec | None, final: Path) -> tuple[str, ...]:
        tensors = {name.replace(".", "/"): p.detach().contiguous() for name, p in policy.named_parameters()}
        save_file(tensors, folder / "model.safetensors")
        heads = policy.config.vision.heads
        head_dim = policy.config.language.head_dim
        write_atomic(
            folder / HEADER,
            f'{{"chunk": {policy.config.chunk}, "vision": {{"heads": {heads}}}, '
            f'"language": {{"head_dim": {head_dim}}}, "max_tokens": {policy.config.max_tokens}}}',
        )
        return ()


FORMAT = Slashes()
