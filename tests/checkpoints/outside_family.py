"""A policy family outside the package that no other program saves: it declares no SHAPES."""

from dataclasses import dataclass

import torch

from vlafit.policies import pi0


@dataclass(frozen=True)
class Config(pi0.Pi0Config):
    """The sizes of pi0, under a family of its own."""


class Outside(pi0.Pi0):
    """The network of pi0, under a family of its own."""


SIZES = {"tiny": Config(**vars(pi0.SIZES["pi0-tiny"]))}


def build(config, device="meta", generator=None):
    with torch.device("meta"):
        policy = Outside(config)
    if torch.device(device).type != "meta":
        policy.to_empty(device=device)
        init_weights(policy, generator or torch.Generator().manual_seed(0))
    return policy


init_weights = pi0.init_weights
