"""peft itself on the layers of every family: what it saves opens in vlafit, what vlafit saves opens in peft.

The other program's class is stood in for by a tree of its module names that holds the same layers, because
peft only looks at names and layers; tests/parity does the same with the class itself.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import vlafit
from tests.checkpoints.foreign import LAYOUTS, ORBAX, Layout
from tests.variants import variants
from vlafit import checkpoints
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.base import CheckpointFiles
from vlafit.checkpoints.formats.peft import write as peft_folder
from vlafit.checkpoints.name_map import NameMap
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.tuning.inject import layer_kind

ADAPTED = {lay.name: lay for lay in LAYOUTS if lay.files[0] != ORBAX}
ALWAYS = ["LeRobot GR00T", "LeRobot X-VLA", "OpenVLA-OFT"]
LINEAR, ANY = ("linear",), ("linear", "conv", "embedding")
METHODS: dict[str, tuple[PeftConfig, dict[str, object], tuple[str, ...]]] = {
    "lora": (LoraConfig(r=3, lora_alpha=5), {"mode": "lora", "rank": 3, "alpha": 5}, ANY),
    "dora": (LoraConfig(r=3, use_dora=True), {"mode": "dora", "rank": 3}, LINEAR),
    "loha": (LoHaConfig(r=2, alpha=4), {"mode": "loha", "rank": 2, "alpha": 4}, LINEAR),
    "lokr": (LoKrConfig(r=2, alpha=4), {"mode": "lokr", "rank": 2, "alpha": 4}, LINEAR),
    "oft": (OFTConfig(r=0, oft_block_size=2), {"mode": "oft", "block": 2}, LINEAR),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each layout, once it was asked for."""
    return {}


def folder_of(layout: Layout, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if layout.name not in written:
        written[layout.name] = tmp_path_factory.mktemp("base") / "checkpoint"
        written[layout.name].mkdir()
        layout.write(written[layout.name])
    return written[layout.name]


def names_in(folder: Path, policy: Policy) -> NameMap | None:
    """The names of the modules in the program's memory; None where peft is not used with it."""
    support = registry.detect(CheckpointFiles(folder)).adapters
    return None if support is None else support.names(family_name(policy))


def layers_of(policy: Policy, kinds: tuple[str, ...], names: NameMap, method: str = "") -> dict[str, str]:
    """The layers that peft can adapt and that learn -> the program's module.

    `oft` turns blocks of two inputs, so that a layer with an odd number of them has none.
    """
    dead = {info.name for info in policy.parts() if info.dead}
    weights = [n for n, _ in policy.named_parameters() if n not in dead and layer_kind(policy, n) in kinds]
    if method == "oft":
        weights = [n for n in weights if policy.get_parameter(n).shape[-1] % 2 == 0]
    made = {n.removesuffix(".weight"): names.file_name(n).removesuffix(".weight") for n in weights}
    return {ours: theirs for ours, theirs in made.items() if not theirs.startswith(names.apart)}


def tree(policy: Policy, names: NameMap) -> nn.Module:
    """Copies of a policy's layers under the program's names."""
    root = nn.Module()
    for ours, theirs in layers_of(policy, ANY, names).items():
        owner = root
        *path, leaf = theirs.split(".")
        for word in path:
            if word not in dict(owner.named_children()):
                owner.add_module(word, nn.Module())
            owner = owner.get_submodule(word)
        owner.add_module(leaf, copy.deepcopy(policy.get_submodule(ours)).requires_grad_(False))
    return root


def answers(model: nn.Module, layers: dict[str, str] | list[str]) -> dict[str, Tensor]:
    """What each layer answers to random numbers or tokens that are drawn from its own name."""
    found = {}
    for number, name in enumerate(layers):
        layer = model.get_submodule(layers[name] if isinstance(layers, dict) else name)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        rng = torch.Generator().manual_seed(number)
        if isinstance(base, nn.Embedding):
            x = torch.randint(0, base.num_embeddings, (5,), generator=rng)
        elif isinstance(base, nn.Conv2d):
            x = torch.randn(2, base.in_channels, *base.kernel_size, generator=rng)
        else:
            x = torch.randn(5, base.in_features, generator=rng)
        with torch.no_grad():
            found[name] = layer(x)
    return found


def draw(model: nn.Module) -> None:
    """Let no adapter be without effect."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Both compute the same products; only their order may differ, over sums of up to 256 terms.

    2 * 2^-24 * sqrt(4 * 256) = 3.8e-6 of the largest output.
    """
    assert one.keys() == other.keys()
    for name in one:
        bound = 4e-6 * max(1.0, one[name].abs().max().item())
        assert (one[name] - other[name]).abs().max() <= bound, name


def opened(
    name: str, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Policy, NameMap]:
    """Return a foreign folder, its policy, and the names of its layers there; skip one without peft."""
    base = folder_of(ADAPTED[name], written, tmp_path_factory)
    policy = vlafit.load_policy(base, config=ADAPTED[name].told)
    names = names_in(base, policy)
    if names is None:
        pytest.skip(f"{name}: its program uses no peft on this family")
    return base, policy, names


@pytest.mark.parametrize("method", variants(METHODS, always=["lora", "dora"]))
@pytest.mark.parametrize("name", variants(ADAPTED, always=ALWAYS))
def test_adapters_that_peft_saves_compute_the_same_in_vlafit(
    name: str, method: str, written: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    layout = ADAPTED[name]
    base, policy, names = opened(name, written, tmp_path_factory)
    config, _, kinds = METHODS[method]
    layers = layers_of(policy, kinds, names, method)
    config = copy.deepcopy(config)
    config.target_modules = sorted(layers.values())
    model = get_peft_model(tree(policy, names), config)
    draw(model)
    model.save_pretrained(tmp_path / "adapters")
    loaded = checkpoints.load(tmp_path / "adapters", base=base, config=layout.told)
    assert loaded.plan is not None
    assert {layer.removesuffix(".weight") for layer in loaded.plan.adapted} == set(layers)
    theirs = answers(model.base_model.model, layers)
    assert_same(answers(loaded.policy.eval(), list(layers)), theirs)
    before = answers(policy, list(layers))
    assert all(not torch.equal(theirs[ours], before[ours]) for ours in layers)
    assert_same(answers(vlafit.merge(loaded.policy), list(layers)), theirs)


@pytest.mark.parametrize("method", variants(METHODS, always=["lora", "dora"]))
@pytest.mark.parametrize("name", variants(ADAPTED, always=ALWAYS))
def test_adapters_that_vlafit_writes_compute_the_same_in_peft(
    name: str, method: str, written: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    base, policy, names = opened(name, written, tmp_path_factory)
    _, rule, kinds = METHODS[method]
    layers = layers_of(policy, kinds, names, method)
    bare = tree(policy, names)
    select = {"pattern": [f"{layer}.weight" for layer in layers]}
    plan = vlafit.apply_strategy(policy, [{"select": select, **rule}, {"mode": "frozen"}])
    draw(policy)
    (tmp_path / "adapters").mkdir()
    peft_folder.write(tmp_path / "adapters", peft_folder.take(policy, plan, names), base)
    model = PeftModel.from_pretrained(bare, str(tmp_path / "adapters"))
    assert_same(answers(model.base_model.model.eval(), layers), answers(policy.eval(), list(layers)))
