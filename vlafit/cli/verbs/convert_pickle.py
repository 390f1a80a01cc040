"""`vlafit convert-pickle FILE --out FILE`: convert a pickle of tensors without running code."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.cli.parser import Parser

ABOUT = """\
Turn a pickle of tensors (.bin, .pt, .pth) into a safetensors file, which checkpoints are loaded from. The
pickle is opened with torch.load(weights_only=True), which makes tensors and plain containers, and runs no
code."""


def run(arguments: Sequence[str]) -> int:
    """Convert one file."""
    parser = Parser("vlafit convert-pickle", ABOUT)
    parser.add_argument("pickle", metavar="FILE", help="a pickle that torch wrote")
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument(
        "--key", default="", help="where the tensors are one level down: its name in the file"
    )
    options = parser.read(arguments)
    from vlafit.checkpoints.pickles import convert

    count = convert(Path(options.pickle), Path(options.out), options.key)
    print(f"{options.out}: {count} tensors")
    return 0
