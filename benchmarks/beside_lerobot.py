"""CPU seconds of training steps and of acting, vlafit beside LeRobot, and the memory that they take.

    make .venv-lerobot/ready      # one environment with both (Python 3.12, some GB)
    .venv-lerobot/bin/python -m benchmarks.beside_lerobot --out benchmarks/results/beside_lerobot.jsonl
    .venv-lerobot/bin/python -m benchmarks.beside_lerobot --table benchmarks/results/beside_lerobot.jsonl
    .venv-lerobot/bin/python -m benchmarks.beside_lerobot --compiled --out FILE  # both under torch.compile
    python -m benchmarks.beside_lerobot --write     # the table of docs/gpus.md, from benchmarks/results

Run it in the repository's root. Two processes, one a side, hold the same policy (width 512, depth 6, images
of 112 pixels, chunks of 50; LeRobot loads what vlafit exports), on one thread in fp32, and step in turns, the
order reversed each round. Only CPU time counts, so that other work on the machine matters little; a ratio is
that of one round, its median and range are over the rounds.

vlafit      `vlafit.train.loop.train`: trimming, noise, loss, gradient clipping, fused AdamW, its checks.
LeRobot     `policy.forward`, backward, clipping, its AdamW, as its training script does.
--compiled  vlafit's `train.compile = "blocks"` and `compile` for acting, and LeRobot's `compile_model`, each
            by inductor in its default mode; compiling is done before anything is measured.
padded      three cameras, 48 tokens. libero: two cameras and an empty one, 16 of 48 tokens are real.
lora        rank 16 on attention and MLPs of image tower, language model and expert; projections in full.
act         a chunk of one observation by ten sampling steps, images and tokens being prepared.
MB          rise of the resident set from the built policy to the peak of the steps.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import rows, train
from benchmarks.data import spread
from benchmarks.rows import Row
from vlafit import files
from vlafit.codec import Codec, CodecConfig, train_word_tokenizer
from vlafit.inference import accelerated
from vlafit.nn.batch import Batch
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.policies import build_family
from vlafit.train.loop import StepResult
from vlafit.types import Embodiment, Feature

SIDES = ("vlafit", "lerobot")
COMPILED = "compiled"
CAMERAS = ("front", "left", "wrist")
DECODER = {"width": 512, "depth": 6, "heads": 8, "head_dim": 64, "vocab": 4096}
TOWER = {"width": 512, "depth": 6, "mlp": 1024, "heads": 8, "patch": 14, "image_size": 112}
SIZES: dict[str, dict[str, Any]] = {
    "pi0": {
        "vision": TOWER,
        "language": DECODER | {"mlp": 1024, "kv_heads": 1},
        "expert": {"width": 256, "mlp": 512},
    },
    "smolvla": {
        "vision": TOWER | {"shuffle": 2},
        "language": DECODER | {"mlp": 1024, "kv_heads": 4},
        "expert": {"width": 384, "mlp": 1024, "self_every": 2},  # as LeRobot has it for three quarters of 512
        "image_size": 112,
    },
}
SHARED = {"state_dim": 32, "action_dim": 32, "chunk": 50, "max_tokens": 48}
CASES = {
    "pi0 full padded": 1.4, "pi0 full libero": 2.1, "pi0 expert padded": 2.1, "pi0 lora padded": 1.35,
    "pi0 act padded": 1.3, "smolvla full padded": 1.2, "smolvla expert padded": 1.5,
}  # fmt: skip
"""Each case, and how many times LeRobot's CPU time over ours is aimed at where both are eager."""
RESULTS = Path("benchmarks/results")
DOCUMENT = Path("docs/gpus.md")
BEGIN, END = "<!-- written by python -m benchmarks.beside_lerobot --write -->\n", "<!-- end -->\n"
BATCH = 4
LORA = r".*(vision_tower|vision_model|language_model|text_model|gemma_expert|lm_expert).*\.(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)"  # noqa: E501
PROJECTIONS = ["state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out"]

Step = Callable[[], object]


def policy_of(family: str) -> FlowPolicy:
    """Build the policy with random weights, the same on both sides."""
    size = next(name for name, owner in rows.sizes().items() if owner == family and "05" not in name)
    generator = torch.Generator().manual_seed(0)
    policy = build_family(family, size, {**SIZES[family], **SHARED}, generator=generator)
    assert isinstance(policy, FlowPolicy)
    return policy


# -------------------------------------------------------------------------------------------- the two sides


def serve(side: str) -> None:
    """Build the case that a line of stdin names, answer each `step` until `end`; again."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        family, what, shape, *how = line.split()
        steps = vlafit_steps if side == "vlafit" else lerobot_steps
        for facts in steps(family, what, shape, compiled=how == [COMPILED]):
            print(json.dumps(facts), flush=True)
            if sys.stdin.readline().strip() == "end":
                break
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or the next case's memory would hide in what this one freed


def vlafit_steps(family: str, what: str, shape: str, *, compiled: bool) -> Iterator[Row]:
    """Yield facts of the policy, then what each step took."""
    policy = policy_of(family)
    if what == "act":
        batch = train.host_batch(policy.needs(), shape, 1, 0)
        noise = torch.randn(1, 50, 32)
        accelerated(policy.eval(), compile=compiled)
        yield from in_turns(policy, lambda: policy.sample(batch, noise, 10))
        return
    yield from _trained(policy, what, shape, "blocks" if compiled else "none")


def _trained(policy: FlowPolicy, strategy: str, shape: str, compile: str) -> Iterator[Row]:
    """Yield what each step of the product's loop took."""
    from vlafit.train.stages import Place
    from vlafit.train.train_state import TrainState
    from vlafit.tuning import apply, load_strategy

    point = {
        "strategy": strategy, "states": "fp32", "ema": 0.0, "warm_up": 0, "steps": 10_000, "profile": "",
        "batch": BATCH, "micro_batches": 1, "recompute": "none", "set": [f"train.compile={compile}"],
    }  # fmt: skip
    recipe = train.recipe_of(point, bf16=False)
    plan = apply(policy, load_strategy(strategy), seed=0)
    state = TrainState(policy, plan, recipe, torch.device("cpu"), Place())
    batches = train.host_batches(policy.needs(), shape, BATCH, 1, torch.device("cpu"))
    at = 0

    def step() -> None:
        nonlocal at

        def one_step(result: StepResult) -> bool:
            return False

        train.train(
            state, batches, first_step=at, recipe=recipe.train, optim=recipe.optim, world=1,
            wants_stop=lambda: False, spent=lambda: 0.0, after_step=one_step,
        )  # fmt: skip
        at += 1

    yield from in_turns(policy, step)


def in_turns(policy: torch.nn.Module, step: Step) -> Iterator[Row]:
    """Yield the policy's facts after two steps, then what each step took, with the peak of memory."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(), step()  # states of the optimiser are made, caches filled
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    yield {"trainable": trainable}
    while True:
        began, wall = time.process_time(), time.perf_counter()
        step()
        taken = {"cpu_s": time.process_time() - began, "wall_s": time.perf_counter() - wall}
        yield {**taken, "rise_mb": memory("VmHWM") - before}


def memory(field: str) -> float:
    """Return a number of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def lerobot_steps(family: str, what: str, shape: str, *, compiled: bool) -> Iterator[Row]:
    """Yield facts of the policy that LeRobot loads from our export, then what each step took."""
    with tempfile.TemporaryDirectory() as folder:
        policy = exported(family, what, shape, Path(folder), compiled)
    ours = policy_of(family)
    batches = [for_lerobot(train.host_batch(ours.needs(), shape, 1 if what == "act" else BATCH, seed))
               for seed in range(train.HELD_BATCHES)]  # fmt: skip
    del ours
    if what == "act":
        policy.eval()
        yield from in_turns(policy, lambda: policy.predict_action_chunk(dict(batches[0])))
        return
    config = policy.config
    if what == "lora":
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(
            policy, LoraConfig(r=16, lora_alpha=16, target_modules=LORA, modules_to_save=PROJECTIONS)
        )
    policy.train()
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = config.get_optimizer_preset().build(trainable)
    count = 0

    def step() -> None:
        nonlocal count
        loss, _ = policy.forward(dict(batches[count % len(batches)]))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        norm.item(), loss.item()
        count += 1

    yield from in_turns(policy, step)


def exported(family: str, what: str, shape: str, folder: Path, compiled: bool) -> Any:
    """Return the policy as LeRobot loads it from our export."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    from vlafit.checkpoints.export import write
    from vlafit.checkpoints.formats.lerobot import write as lerobot_export

    ours = policy_of(family)
    codec = codec_of(ours, CAMERAS if shape == "padded" else (*CAMERAS[:-1], ""))
    if family == "smolvla":
        write(ours, codec, "lerobot", folder / "exported", "here")
    else:
        (folder / "exported").mkdir()
        lerobot_export.write(folder / "exported", ours, codec)
        path = folder / "exported" / "config.json"  # sizes that have names, which the next line overrules
        names = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
        path.write_text(json.dumps(json.loads(path.read_text()) | names))
    config = PreTrainedConfig.from_pretrained(folder / "exported")
    config.device = "cpu"
    config.compile_model, config.compile_mode = compiled, "default"
    config.train_expert_only = what == "expert"
    config.freeze_vision_encoder = what == "expert"
    sys.path.insert(0, "tests/parity")  # some package of LeRobot's environment is called tests, too
    from lerobot_side import tell_sizes

    tell_sizes(config.type, asdict(ours.config))
    return get_policy_class(config.type).from_pretrained(folder / "exported", config=config)


def codec_of(policy: FlowPolicy, cameras: Sequence[str]) -> Codec:
    """Return a codec of a robot with these cameras; an empty name is a camera that it lacks."""
    needs, rng = policy.needs(), np.random.default_rng(0)
    side = (needs.image_size, needs.image_size, 3)
    features = tuple(Feature(name, side) for name in cameras if name)
    robot = Embodiment("arm", features, Feature("state", (7,)), Feature("action", (7,)), 20.0, "position")
    config = CodecConfig(
        tuple(cameras), needs.image_size, needs.state_dim, needs.action_dim, needs.chunk, prompt=needs.prompt,
        max_tokens=needs.max_tokens, framing=needs.framing,
    )  # fmt: skip
    values = rng.normal(size=(50, 7))
    words = train_word_tokenizer(["put the bowl on the plate", "Task: , State: -1 0 7 255;\nAction: "], 300)
    return Codec.fit(config, robot, values, values, words)


def for_lerobot(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch with LeRobot's keys; a camera that no row has is left out, as in its own datasets."""
    assert batch.actions is not None
    seen = [n for n in range(len(CAMERAS)) if batch.image_mask[:, n].any()]
    return {
        **{f"observation.images.{CAMERAS[n]}": batch.images[:, n].float() / 255 for n in seen},
        "observation.language.tokens": batch.tokens,
        "observation.language.attention_mask": batch.token_mask,
        "observation.state": batch.state[:, :7],
        "action": batch.actions[..., :7],
    }


# ------------------------------------------------------------------------------------------- the comparison


class Side:
    """The process of one side."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.beside_lerobot", "--serve", name]
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | alone
        )

    def tell(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def answer(self) -> Row:
        """Wait for the answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compared(cases: Sequence[str], rounds: int, compiled: bool) -> Iterator[Row]:
    """Yield a row for each case, with what each side took in each round."""
    sides = {name: Side(name) for name in SIDES}
    for case in (f"{case} {COMPILED}" if compiled else case for case in cases):
        row: Row = {"case": case}
        for name, side in sides.items():
            side.tell(case)
            row[name] = {"cpu_s": [], "wall_s": [], **side.answer()}
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                sides[name].tell("step")
                taken = sides[name].answer()
                row[name]["cpu_s"].append(round(taken["cpu_s"], 4))
                row[name]["wall_s"].append(round(taken["wall_s"], 4))
                row[name]["rise_mb"] = round(taken["rise_mb"])
        for side in sides.values():
            side.tell("end")
        yield row
    for side in sides.values():
        side.end()


def table(compared: Sequence[Row]) -> str:
    """Return the table, Markdown."""
    lines = []
    for row in compared:
        ours, theirs = row["vlafit"], row["lerobot"]
        pairs = zip(theirs["cpu_s"], ours["cpu_s"], strict=True)
        lines.append({
            "case": row["case"],
            "LeRobot / vlafit, CPU time": spread([other / own for other, own in pairs]),
            "vlafit, s": f"{statistics.median(ours['cpu_s']):.2f}",
            "LeRobot, s": f"{statistics.median(theirs['cpu_s']):.2f}",
            "MB": f"{ours['rise_mb']} / {theirs['rise_mb']}",
            "trainable, millions": f"{ours['trainable'] / 1e6:.1f} / {theirs['trainable'] / 1e6:.1f}",
            "rounds": len(ours["cpu_s"]),
        })  # fmt: skip
    return rows.table(lines, list(lines[0]) if lines else ())


def in_words(row: Row | None) -> str:
    """Return LeRobot's CPU time over ours, median and range, and what the memory of each rose by."""
    if row is None:
        return "not measured"
    ours, theirs = row["vlafit"], row["lerobot"]
    ratios = [other / own for other, own in zip(theirs["cpu_s"], ours["cpu_s"], strict=True)]
    return f"{spread(ratios)}; {ours['rise_mb']}, {theirs['rise_mb']}"


def document_table(results: Path = RESULTS) -> str:
    """Return the table of the newest row of each case, eager and compiled, Markdown."""
    kept = {
        row["case"]: row
        for name in ("beside_lerobot.jsonl", "beside_lerobot_compiled.jsonl")
        for row in map(json.loads, (results / name).read_text().splitlines())
    }
    columns = ("case", "aim", "eager; MB", "compiled; MB")
    lines = [
        dict(zip(columns, (
            case, f"{aim:g}", in_words(kept.get(case)), in_words(kept.get(f"{case} {COMPILED}"))
        ), strict=True))
        for case, aim in CASES.items()
    ]  # fmt: skip
    return f"{rows.table(lines, columns)}\n"


def write_document(document: Path = DOCUMENT) -> None:
    """Write the table between its marks in the document."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    files.write_atomic(document, f"{before}{BEGIN}{document_table()}{END}{rest.partition(END)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="'FAMILY WHAT SHAPE'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="both sides under torch.compile")
    parser.add_argument("--commit", default="", help="of the code, where its folder is no repository")
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    parser.add_argument("--table", type=Path, help="print the table of an earlier run's file, and end")
    parser.add_argument("--write", action="store_true", help=f"write the table of {DOCUMENT}, and end")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    if options.write:
        write_document()
        return 0
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return 0
    from importlib.metadata import version

    facts = rows.machine(torch.device("cpu"), options.commit)
    facts |= {"versions": {package: version(package) for package in ("lerobot", "transformers", "peft")}}
    taken = []
    for row in compared(options.cases, options.rounds, options.compiled):
        rows.write(row | facts, options.out)
        taken.append(row)
    print(table(taken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
