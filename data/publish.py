"""Make the checkpoint that ships from a finished pretraining run, with the record of how it was made.

    vlafit record metaworld-pretrain
    vlafit train metaworld-pretrain
    python data/publish.py runs/metaworld-pretrain data/pretrained/metaworld-base

Copies the last checkpoint without its training state, and writes beside it: `log.jsonl` (the run's metrics),
`run.json` (versions, machine, command), `data.json` (the data card's recording, and the SHA-256 of every file
that was trained on), `success.json` and `episodes.jsonl` (the rollouts after training, by task).
"""

import argparse
import json
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path

from vlafit import checkpoints, config, files
from vlafit.datasets import load_card, open_dataset
from vlafit.errors import VlafitError
from vlafit.recipe import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    publish(options.run, options.out)
    return 0


def publish(run: Path, out: Path) -> None:
    """Write `out` whole from the folder of a finished run. Raises VlafitError when it is not finished."""
    facts = json.loads((run / "run.json").read_text())
    recipe = config.read(Recipe, run / "recipe.toml", "recipe")
    last = run / "checkpoints" / f"step_{recipe.train.steps:06d}"
    result = run / "eval" / "after"
    if not (last.is_dir() and (result / "result.json").is_file()):
        raise VlafitError(f"{run}: the run is not finished; go on with it first: vlafit train ... --resume")
    loaded = checkpoints.load(last)  # verifies every hash
    readme = (out / "README.md").read_text() if (out / "README.md").is_file() else None
    with files.new_folder(out) as folder:
        checkpoints.save(
            loaded.policy,
            folder,
            loaded.codec,
            plan=loaded.plan,
            recipe=config.dump(recipe),
            history=checkpoints.read_lineage(last),
        )
        shutil.copy(run / "metrics.jsonl", folder / "log.jsonl")
        shutil.copy(run / "run.json", folder / "run.json")
        shutil.copy(result / "episodes.jsonl", folder / "episodes.jsonl")
        shutil.copy(result / "result.json", folder / "success.json")
        data = [
            {
                "card": card.name,
                "record": card.record and asdict(card.record),
                "sha256": {path.name: files.sha256(path) for path in open_dataset(card).files()},
            }
            for card in map(load_card, recipe.data.cards)
        ]
        (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n")
        if readme is not None:
            (folder / "README.md").write_text(readme)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {size / 1e6:.1f} MB, trained in {facts['train_seconds']} s")


if __name__ == "__main__":
    sys.exit(main())
