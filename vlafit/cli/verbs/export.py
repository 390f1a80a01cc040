"""`vlafit export CHECKPOINT --to TARGET --out DIR`: the checkpoint as another program saves it."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.cli.parser import Parser
from vlafit.cli.places import checkpoint_folder

ABOUT = """\
Write a checkpoint as LeRobot, openpi's PyTorch code or transformers saves it, so that it runs there with the
same outputs: weights, config and, where the target has such, normalisation and tokenizer. What a target
cannot express is refused, with the reason; nothing is left half written."""


def run(arguments: Sequence[str]) -> int:
    """Write the folder, and say what is in it and what the target must be told."""
    parser = Parser("vlafit export", ABOUT)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run, or a name that ships")
    parser.add_argument("--to", required=True, metavar="TARGET", help="lerobot, openpi or transformers")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there yet")
    options = parser.read(arguments)

    source = checkpoint_folder(options.checkpoint, foreign=True)
    from vlafit.checkpoints.export import export

    print(export(source, options.to, Path(options.out)).text())
    return 0
