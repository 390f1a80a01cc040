"""Kinds of parameters inside a part: a closed list, because weight decay and quantisation depend on them.

Part names are open: each family declares its own in `parts()`. "depthwise" are convolutions of single channels
or groups of them, which carry no adapter (peft).
"""

from typing import Literal, get_args

Kind = Literal["attention", "mlp", "norm", "embedding", "conv", "depthwise", "linear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
