"""The L1 head of OpenVLA-OFT: an MLP with residual blocks that reads all dimensions of a step at once."""

from torch import Tensor, nn

from vlafit.nn.precision import in_own_precision, layer_norm


class ResidualBlock(nn.Module):
    """A pre-norm layer whose update is never negative."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., w]."""
        return x + in_own_precision(self.fc, layer_norm(self.norm, x)).relu()


class MLPResNet(nn.Module):
    """Hidden states of a step [..., i] to its action [..., a]."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the actions, in the precision of the last layer."""
        x = in_own_precision(self.fc1, layer_norm(self.norm1, x)).relu()
        for layer in self.layers:
            x = layer(x)
        return in_own_precision(self.fc2, layer_norm(self.norm2, x))
