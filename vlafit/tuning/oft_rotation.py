"""OFT's rotation of a Linear layer's input, whatever its number of dimensions.

peft (0.21) takes every input of four dimensions for images, also that of a Linear layer. GR00T's head and
X-VLA's windows have such.
"""

from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn


class LinearRotation(OFTRotationModule):
    """Rotates the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rotated input [..., in_features]."""
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def rotate_last_dimension(layer: nn.Module) -> None:
    """Let the rotations of one of peft's OFT layers on a Linear layer take inputs of any dimensions."""
    if isinstance(layer.get_submodule("base_layer"), nn.Linear):
        for rotation in layer.get_submodule("oft_R").children():
            rotation.__class__ = LinearRotation
