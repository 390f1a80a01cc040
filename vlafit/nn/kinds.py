"""Kinds of parameters inside a part: a closed list, because weight decay and quantisation depend on them.

Part names are open: each family declares its own in `parts()`. "depthwise" are convolutions of groups of
channels, which carry no adapter (peft merges none into them).
"""

from typing import Literal, get_args

Kind = Literal["attention", "mlp", "norm", "embedding", "conv", "depthwise", "linear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
