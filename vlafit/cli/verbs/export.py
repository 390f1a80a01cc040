"""`vlafit export CHECKPOINT --to TARGET --out DIR`: write the checkpoint as another program saves it."""

from collections.abc import Sequence
from pathlib import Path

from vlafit.cli.parser import Parser, add_config, add_embodiment, add_format, add_trust, key_value, settings
from vlafit.cli.places import base_folder, checkpoint_folder
from vlafit.errors import ConfigError

ABOUT = """\
Write a checkpoint in another program's format, so that it runs there with the same outputs: weights, config
and, where the target has such, normalisation and tokenizer; or as vlafit's own. Adapters become a PEFT folder
in the target's module names, with the weights below them in base/, or with --merge part of the weights. What
a target cannot hold is refused, with the reason; nothing is left half written."""


def run(arguments: Sequence[str]) -> int:
    """Write the folder, and print what is in it and how the target has to be used."""
    parser = Parser("vlafit export", ABOUT)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run, or a name that ships")
    parser.add_argument(
        "--to",
        required=True,
        metavar="TARGET",
        help="the format to write, such as lerobot (an unknown name lists them), or a module: package.module",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--merge", action="store_true", help="fold adapters into the weights, in float32")
    parser.add_argument(
        "--interpolate",
        default="",
        metavar="PART=SHARE,..",
        help="keep this share of what fine-tuning changed in a part, as in language=0.5,vision=0.8: 0 is the"
        " checkpoint that training began with, 1 (parts that are not named) the fine-tuned one; adapters"
        " are merged first",
    )
    parser.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="the one that CHECKPOINT sits on, or that training began with, if it moved or is not recorded",
    )
    parser.add_argument(
        "--dtype",
        help="of the weights: float32 or bfloat16 [that of the run's products, else float32]",
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a codec that the checkpoint's statistics make"
    )
    parser.add_argument("--assets", metavar="NAME", help="which of the checkpoint's statistics")
    add_embodiment(parser)
    add_config(parser)
    add_format(parser)
    add_trust(parser)
    options = parser.read(arguments)

    config = settings(options.config)
    shares = _shares(options.interpolate)
    source = checkpoint_folder(options.checkpoint, foreign=True)
    base = base_folder(options.base) if options.base else None
    from vlafit.checkpoints.export import export
    from vlafit.report.card_results import results_of

    made = export(
        source,
        options.to,
        Path(options.out),
        merge=options.merge,
        interpolate=shares,
        base=base,
        embodiment=options.embodiment,
        config=config,
        dtype=options.dtype,
        format=options.format,
        trust=options.trust,
        results=results_of(Path(source)),
        tokenizer=options.tokenizer,
        assets=options.assets,
    )
    print(made.text())
    return 0


def _shares(text: str) -> dict[str, float]:
    pairs = [key_value(pair) for pair in text.split(",") if pair.strip()]
    if len(dict(pairs)) != len(pairs):
        raise ConfigError(f"--interpolate {text!r} names a part twice")
    return dict(pairs)
