"""Parameters without storage, buffers with their numbers, and nothing that a checkpoint would lose."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlafit.errors import ConfigError
from vlafit.nn.construct import construct, require_numbers
from vlafit.nn.parameters import build_policy
from vlafit.nn.policy import Policy


class Net(nn.Module):
    """Two layers, a table of cosines, and whatever `change` puts in."""

    alpha: Tensor

    def __init__(self, change: Callable[["Net"], object] = lambda net: None) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.places = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("alpha", torch.cos(torch.linspace(0, 1, 5)), persistent=False)
        self.ends = torch.tensor([0.0, 1.0])
        change(self)


def fill(net: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)


def built(make: Callable[[], nn.Module], init: Callable[..., object] = fill, device: str = "cpu") -> Policy:
    return build_policy(make, init, device, None)  # type: ignore[type-var]


def test_buffers_hold_their_numbers_on_every_device_while_parameters_have_no_storage():
    expected = torch.cos(torch.linspace(0, 1, 5))
    with torch.device("meta"):  # the caller's own context changes nothing
        bare = built(Net, device="meta")
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert torch.equal(bare.alpha, expected) and bare.ends.tolist() == [0.0, 1.0]
    assert torch.equal(built(Net).alpha, expected)
    assert all(bool((parameter == 1).all()) for parameter in built(Net).parameters())


def test_construction_leaves_the_global_random_generator_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    construct(lambda: Net(lambda net: nn.init.normal_(net.ends)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [torch.empty, torch.randn])
def test_a_buffer_that_init_does_not_compute_is_refused_by_name(make: Callable[[int], Tensor]):
    def change(net: Net) -> None:
        net.two.register_buffer("table", make(4), persistent=False)

    for device in ("cpu", "meta"):
        with pytest.raises(ConfigError, match=r"two\.table.*init_weights"):
            built(lambda: Net(change), device=device)


def test_batch_statistics_are_refused_by_name_with_what_to_use_instead():
    def change(net: Net) -> None:
        net.norm = nn.BatchNorm1d(3)

    with pytest.raises(ConfigError, match=r"norm\.running_mean, norm\.running_var.*GroupNorm"):
        built(lambda: Net(change))


def test_a_parameter_with_two_names_is_refused_by_both():
    def change(net: Net) -> None:
        net.two.weight = net.one.weight

    with pytest.raises(ConfigError, match=r"one\.weight and two\.weight"):
        built(lambda: Net(change))


def test_a_parameter_that_init_weights_forgets_is_named():
    def forget(net: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if not name.startswith("two."):
                    parameter.zero_()

    with pytest.raises(ConfigError, match=r"two\.weight, two\.bias"):
        built(Net, forget)


def test_whatever_is_left_on_the_meta_device_is_named():
    with torch.device("meta"):  # a family that does without build_policy
        net = Net()
    with pytest.raises(ConfigError, match=r"alpha, ends, places"):
        require_numbers(net)
