"""Export holds no second copy of the weights, and what it measures and writes is what plain weights give."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlafit
from benchmarks.load_memory import write_safetensors
from tests.tuning.world import METHODS, QUANTISED, make_policy, rules, train
from tests.variants import variants
from vlafit import checkpoints
from vlafit.checkpoints.changes import OBSERVATIONS, answers
from vlafit.checkpoints.export import export, merge_measured, round_measured, write
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.interpolate import interpolate
from vlafit.nn.deferred import Deferred
from vlafit.policies import override
from vlafit.policies.pi0 import SIZES, Pi0

MMAP_THRESHOLD = -3  # of mallopt


@pytest.mark.parametrize("name", variants([*METHODS, *QUANTISED], always=["lora", "pissa"]))
def test_an_export_measures_and_writes_what_one_with_all_weights_in_memory_does(name: str, tmp_path: Path):
    narrow = make_policy()
    checkpoints.keep_in(narrow, "bfloat16")
    vlafit.save_checkpoint(narrow, tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    assert isinstance(policy, Pi0)
    plan = vlafit.apply_strategy(policy, rules(name))
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan, base=tmp_path / "base")
    made = export(tmp_path / "c", "transformers", tmp_path / "out", merge=True, dtype="bfloat16")

    plain, writer = checkpoints.load_all(tmp_path / "c").policy, registry.writer("transformers")
    assert not any(isinstance(p, Deferred) for p in plain.parameters())
    assert made.merged == merge_measured(plain)
    assert (made.rounded, made.narrow) == round_measured(plain, None, writer)
    write(plain, None, "transformers", tmp_path / "plain", "here")
    names = ["model.safetensors", "config.json"]
    one, two = ([(tmp_path / out / name).read_bytes()[4096:] for name in names] for out in ("out", "plain"))
    assert one == two  # the header's entries have no fixed order
    read = [checkpoints.open_tensors([tmp_path / out / names[0]]) for out in ("out", "plain")]
    assert read[0].keys() == read[1].keys() and all(torch.equal(t, read[1][n]) for n, t in read[0].items())


def test_interpolated_weights_are_those_of_policies_in_memory(tmp_path: Path):
    vlafit.save_checkpoint(make_policy(), tmp_path / "base")
    policy = vlafit.load_policy(tmp_path / "base")
    assert isinstance(policy, Pi0)
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c")
    shares = {"expert": 0.25, "vision": 0.0}
    export(tmp_path / "c", "vlafit", tmp_path / "out", interpolate=shares, base=tmp_path / "base")
    expected = interpolate(policy, vlafit.load_policy(tmp_path / "base"), shares)
    found = vlafit.load_policy(tmp_path / "out")
    assert all(torch.equal(p, found.get_parameter(n)) for n, p in expected.named_parameters())
    assert not torch.equal(answers(found), answers(vlafit.load_policy(tmp_path / "c")))


@pytest.fixture
def own_mappings() -> Iterator[None]:
    """Give every larger block of memory a mapping of its own: a peak then counts what is held, and not what
    malloc keeps for later.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_THRESHOLD, 1 << 17)
    yield
    mallopt(MMAP_THRESHOLD, 1 << 25)  # where malloc itself ends to raise it


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_of(source: Path, out: Path, **options: Any) -> int:
    """Export, and return by how much the resident set grew, pages of mapped files included."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    export(source, "vlafit", out, **options)
    return status("VmHWM") - before


def lora_of(folder: Path, width: int, mlp: int, depth: int) -> tuple[int, int]:
    """Write a bfloat16 pi0 of these sizes, and LoRA on it; return the bytes of the file, and of the largest
    adapted weight in float32.
    """
    few = {
        "vision": {"width": 16, "mlp": 16, "depth": 1, "heads": 1, "image_size": 14, "patch": 14},
        "language": {"width": width, "mlp": mlp, "depth": depth, "heads": 4, "head_dim": 64, "vocab": 500},
        "expert": {"width": 64, "mlp": 64},
        "max_tokens": 4,
    }
    config = override(SIZES["pi0"], few, "small")
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", config, "bfloat16")
    told = {"vision.heads": 1, "chunk": config.chunk, "language.head_dim": 64}
    told |= {"max_tokens": 4, "vision.image_size": 14}
    policy = vlafit.load_policy(folder / "model.safetensors", config=told, dtype="bfloat16")
    adapted = [r | {"select": {"part": "language", "kind": ["attention", "mlp"]}} for r in rules("lora")[1:2]]
    plan = vlafit.apply_strategy(policy, [*adapted, {"mode": "frozen"}])
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.02, generator=rng)
    assert policy.source is not None
    vlafit.save_checkpoint(policy, folder / "c", plan=plan, base=checkpoints.Base(
        policy.source.checkpoint, checkpoints.digest(folder / "model.safetensors"), policy.source.config
    ), changed=())  # fmt: skip
    return (folder / "model.safetensors").stat().st_size, 4 * width * mlp


WAYS: dict[str, dict[str, Any]] = {
    "as float32, merged": {"dtype": "float32", "merge": True},
    "with adapters": {"dtype": "bfloat16"},
    "merged": {"dtype": "bfloat16", "merge": True},
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("width", "mlp", "depth", "ways"),
    [(512, 2560, 6, 1), pytest.param(1024, 5120, 12, 3, marks=pytest.mark.slow)],
)
def test_an_export_holds_the_file_and_a_few_weights(
    width: int, mlp: int, depth: int, ways: int, tmp_path: Path, own_mappings: None
):
    lora_of(tmp_path / "small", 64, 64, 1)
    export(tmp_path / "small" / "c", "vlafit", tmp_path / "out", merge=True, dtype="bfloat16")  # imports
    size, largest = lora_of(tmp_path / "large", width, mlp, depth)
    source = tmp_path / "large" / "c"
    found = {name: peak_of(source, tmp_path / name, **WAYS[name]) for name in list(WAYS)[:ways]}
    # Mapped: the file. At once: a weight read, copied, copied by peft, and its delta; a layer's activations,
    # of which an MLP holds three, and the rest of the network as many as one MLP.
    tokens = OBSERVATIONS * (3 + 4)
    bound = size + 4 * largest + 2 * 3 * 4 * tokens * mlp
    assert all(size / 2 < peak < bound for peak in found.values()), (found, size, bound)
    assert bound < 2 * size  # float32 weights alone
