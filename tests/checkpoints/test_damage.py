"""Whatever is broken in a checkpoint is caught: hundreds of damages, drawn at random from a fixed seed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlafit
from tests.policies.tiny import random_policy
from tests.tuning.world import rules
from tests.variants import variants
from vlafit import checkpoints, cli, files, tuning
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.native.adapters import BASE
from vlafit.checkpoints.formats.openpi.names import NAMES
from vlafit.checkpoints.name_map import back
from vlafit.errors import VlafitError, WeightsError
from vlafit.policies import override
from vlafit.policies.pi0 import SIZES, Pi0

Tensors = dict[str, Tensor]
DEAD_HEAD = NAMES.unused[0]
EXCUSED = {DEAD_HEAD}  # knowingly unused: its numbers may be anything, and it may be absent
TOLD = {"chunk": 4, "vision.heads": 2, "language.head_dim": 8}
TRIALS = 60  # of each of the forms below
ADAPTED = 20  # with all weights beside the adapters, and on their base
WIDTHS = {"state_dim": 5, "action_dim": 5}


def _policy(family: str) -> Pi0:
    return random_policy(override(SIZES[f"{family}-tiny"], WIDTHS, "here"), seed=len(family))


def _openpi(family: str) -> Tensors:
    policy = _policy(family)
    tensors = {n: t.detach().clone() for n, t in back(policy.state_dict(), NAMES).items()}
    return tensors | {DEAD_HEAD: torch.randn(policy.config.language.vocab, policy.config.expert.width)}


def _drop(tensors: Tensors, rng: random.Random, other: Tensors) -> str:
    name = rng.choice(sorted(tensors))
    del tensors[name]
    return name


def _rename(tensors: Tensors, rng: random.Random, other: Tensors) -> str:
    name = rng.choice(sorted(tensors))
    place = rng.randrange(1, len(name))
    new = rng.choice([name[:place] + "_" + name[place:], f"model.{name}", name.replace("weight", "w") + "_"])
    tensors[new] = tensors.pop(name)
    return name if name not in EXCUSED else new  # a stray name is surplus, whatever it was before


def _reshape(tensors: Tensors, rng: random.Random, other: Tensors) -> str:
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    ways = [t[None], t[..., None], t[:-1], t[..., :-1], torch.cat((t, t)), t[:0]]
    ways += [t.flatten()] if t.ndim > 1 else []
    ways += [t.T] if t.ndim == 2 and t.shape[0] != t.shape[1] else []
    tensors[name] = rng.choice(ways).contiguous()
    return name if name not in EXCUSED else ""  # also the unused head's shape is known


def _spoil(tensors: Tensors, rng: random.Random, other: Tensors) -> str:
    name = rng.choice(sorted(tensors))
    if rng.random() < 0.2:
        tensors[name] = tensors[name].to(torch.int32)
    else:
        place = rng.randrange(tensors[name].numel())
        tensors[name].view(-1)[place] = rng.choice([float("nan"), float("inf"), float("-inf")])
    return name


def _inflate(tensors: Tensors, rng: random.Random, other: Tensors) -> str:
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([1e300, -1e39])
    return name


def _mix(tensors: Tensors, rng: random.Random, other: Tensors) -> str:
    foreign = sorted(n for n in other if n not in tensors or other[n].shape != tensors[n].shape)
    for name in rng.sample(foreign, rng.randint(1, len(foreign))):
        tensors[name] = other[name]
    return ""


DAMAGES: tuple[Callable[[Tensors, random.Random, Tensors], str], ...] = (
    _drop,
    _rename,
    _reshape,
    _spoil,
    _mix,
)
BEYOND = (*DAMAGES, _inflate)  # what float32 does not hold, too


def _truncate(path: Path, rng: random.Random) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: rng.randrange(len(whole))])


def _caught(folder: Path, config: dict | None, named: str = "") -> bool:
    """Whether the folder is refused, by one error of weights, which names the tensor `named`."""
    try:
        vlafit.load_policy(folder, config=config)
    except WeightsError as error:
        assert named in str(error), f"{named} is not named: {error}"
        return True
    return False


@pytest.mark.parametrize("family", variants(["pi0", "pi05"], always=["pi05"]))
def test_every_damage_to_an_openpi_file_is_caught(family: str, tmp_path: Path):
    whole, other = _openpi(family), _openpi({"pi0": "pi05", "pi05": "pi0"}[family])
    path = tmp_path / "model.safetensors"
    save_file(whole, path)
    assert not _caught(tmp_path, TOLD)  # whole, it loads
    for trial in range(TRIALS):
        rng = random.Random(f"{family} {trial}")
        tensors = {name: t.clone() for name, t in whole.items()}
        damage = rng.choice([*BEYOND, _truncate])
        if damage is _truncate:
            save_file(tensors, path)
            _truncate(path, rng)
            name = ""
        else:
            name = damage(tensors, rng, other)
            save_file(tensors, path)
        assert _caught(tmp_path, TOLD, name) != (name in EXCUSED), (trial, damage, name)


def _agree(folder: Path) -> None:
    """Write the manifest anew, as a careless program would: what is damaged has the right hash."""
    path = folder / native.MANIFEST
    content = json.loads(path.read_text())
    content["files"] = {name: files.sha256(folder / name) for name in content["files"]}
    path.write_text(json.dumps(content))


def test_every_damage_to_our_own_checkpoint_is_caught_even_if_its_hashes_agree(tmp_path: Path):
    saved = tmp_path / "saved"
    policy = _policy("pi0")
    vlafit.save_checkpoint(policy, saved)
    whole = {name: t.detach().clone() for name, t in policy.state_dict().items()}
    other = {name: t.detach().clone() for name, t in _policy("pi05").state_dict().items()}
    assert not _caught(saved, None)
    for trial in range(TRIALS):
        rng = random.Random(f"native {trial}")
        folder = Path(shutil.copytree(saved, tmp_path / f"{trial}"))
        tensors = {name: t.clone() for name, t in whole.items()}
        damage = rng.choice([*BEYOND, _truncate])
        name = ""
        if damage is _truncate:
            read = [
                p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "README.md"
            ]  # for people
            _truncate(rng.choice(read), rng)
        else:
            name = damage(tensors, rng, other)
            save_file(tensors, folder / native.WEIGHTS)
            _agree(folder)
        assert _caught(folder, None, name), (trial, damage)
        shutil.rmtree(folder)


def test_a_plan_that_is_not_text_is_named_even_if_its_hash_agrees(tmp_path: Path):
    policy = random_policy("pi0-tiny")
    plan = tuning.apply(policy, tuning.load_strategy("full"))
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    path = tmp_path / "c" / "plan.json"
    content = bytearray(path.read_bytes())
    content[50] = 0xFF
    path.write_bytes(content)
    _agree(tmp_path / "c")
    with pytest.raises(WeightsError) as caught:
        native.open_folder(tmp_path / "c")
    assert all(text in str(caught.value) for text in (str(path), "UTF-8", "byte 50"))


def _adapted(folder: Path, base: Path | None) -> None:
    """Save a policy whose matrices have adapters and whose projections learned."""
    policy = vlafit.load_policy(folder.parent / "base")
    plan = vlafit.apply_strategy(policy, rules("lora"))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    vlafit.save_checkpoint(policy, folder, plan=plan, base=base)


@pytest.mark.parametrize(
    "whole", [pytest.param(True, marks=pytest.mark.slow), False], ids=["whole", "on its base"]
)
def test_every_damage_to_adapters_and_what_lies_below_them_is_caught(whole: bool, tmp_path: Path):
    base, saved = tmp_path / "base", tmp_path / "saved"
    vlafit.save_checkpoint(_policy("pi0"), base)
    _adapted(saved, None if whole else base)
    assert not _caught(saved, None)
    held = [saved / "adapters" / "lora" / "adapter_model.safetensors"]
    held += [saved / (native.WEIGHTS if whole else "trained.safetensors")]
    texts = [p for p in sorted(saved.rglob("*")) if p.is_file() and p.suffix == ".json"]
    other = {name: t.detach().clone() for name, t in _policy("pi05").state_dict().items()}
    for trial in range(ADAPTED):
        rng = random.Random(f"adapters {whole} {trial}")
        folder = Path(shutil.copytree(saved, tmp_path / f"{trial}"))
        damage, name = rng.choice([*DAMAGES, _truncate]), ""
        if damage is _truncate:
            _truncate(folder / rng.choice([*texts, *held]).relative_to(saved), rng)
        else:
            path = folder / rng.choice(held).relative_to(saved)
            tensors = load_file(path)
            name = damage(tensors, rng, other)
            save_file(tensors, path)
            if damage is _drop and path.name == "trained.safetensors":
                name = path.name  # that a weight is not the base's own is known to the file's hash alone
            else:
                _agree(folder)
        assert _caught(folder, None, name), (trial, damage, name)
        shutil.rmtree(folder)


def test_the_base_below_adapters_must_be_the_one_that_they_were_trained_on(tmp_path: Path):
    base, saved = tmp_path / "base", tmp_path / "saved"
    vlafit.save_checkpoint(_policy("pi0"), base)
    _adapted(saved, base)
    rng = random.Random("base")
    for name in (native.WEIGHTS, native.POLICY, native.MANIFEST):
        kept = (base / name).read_bytes()
        _truncate(base / name, rng)
        assert _caught(saved, None), name
        (base / name).write_bytes(kept)
    assert not _caught(saved, None)
    named = json.loads((saved / BASE).read_text())
    for endless in ("/dev/zero", str(saved), "/", named["checkpoint"]):
        (saved / BASE).write_text(json.dumps(named | {"checkpoint": endless}))
        _agree(saved)
        assert _caught(saved, None, repr(endless)) == (endless != named["checkpoint"])
    shutil.rmtree(base)
    assert _caught(saved, None, str(base))


@pytest.mark.parametrize("damage", [*DAMAGES, _truncate], ids=lambda d: d.__name__.strip("_"))
def test_the_command_line_says_what_is_broken_and_fails(
    damage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rng, path = random.Random("cli"), tmp_path / "model.safetensors"
    tensors = _openpi("pi0")
    tensors.pop(DEAD_HEAD)
    if damage is not _truncate:
        damage(tensors, rng, _openpi("pi05"))
    save_file(tensors, path)
    if damage is _truncate:
        _truncate(path, rng)
    words = [word for key, value in TOLD.items() for word in ("--config", f"{key}={value}")]
    assert cli.main(["inspect", str(tmp_path), "--whole", *words]) != 0
    found = capsys.readouterr()
    assert not found.out and str(tmp_path) in found.err and "Traceback" not in found.err


def test_every_lost_or_cut_file_of_an_orbax_folder_is_caught(tmp_path: Path):
    saved = Path(__file__).parents[1] / "fixtures" / "openpi_jax" / "ckpt_pure_bf16" / "params"
    # What only keeps Orbax's own books, and what one process wrote before all were joined, holds no weights.
    needed = ("_METADATA", "manifest.ocdbt", "ocdbt.process_0/d", "d")
    for trial in range(20):
        rng = random.Random(f"orbax {trial}")
        folder = Path(shutil.copytree(saved, tmp_path / f"{trial}"))
        choices = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        choices = [p for p in choices if p.relative_to(folder).as_posix() in needed or p.parent.name == "d"]
        victim = rng.choice(choices)
        lost = rng.random() < 0.4
        if lost:
            victim.unlink()
        else:
            _truncate(victim, rng)
        same = _same_weights(saved, folder)
        assert same is not False, (trial, victim, lost)
        shutil.rmtree(folder)


def _same_weights(whole: Path, damaged: Path) -> bool | None:
    """None: caught. Else whether the damage, where no weight lies, left every weight as it was."""
    try:
        policy = vlafit.load_policy(damaged, config={"chunk": 6})
    except VlafitError:
        return None
    expected = vlafit.load_policy(whole, config={"chunk": 6}).state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("rehashed", [False, True])
def test_a_saved_recipe_that_is_no_toml_ends_an_export_in_one_error(rehashed: bool, tmp_path: Path):
    source = tmp_path / "saved"
    checkpoints.save(_policy("pi0"), source, recipe='name = "run"\n')
    (source / "recipe.toml").write_text('{"a": [1]}\n')
    if rehashed:
        _agree(source)
    with pytest.raises(WeightsError, match=r"recipe\.toml"):
        export(source, "vlafit", tmp_path / "out")
    assert not (tmp_path / "out").exists()
