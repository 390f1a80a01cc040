"""Quantise the matrices of a policy that only acts to 8 bits, and measure what that changes in its actions.

"int8" and "fp8" (float8_e4m3fn), weights only: one scale for each output, matrices dequantised where they are
used. Both halve the memory of bfloat16; neither is faster by itself. int8 has 127 even steps below a row's
largest weight, fp8 three bits behind the first of each weight. Projections, norms, embeddings and the patch
convolution keep their precision, as in training (`quantise.py`).
"""

from typing import Literal, get_args

import torch
from torch import nn

from vlafit.errors import ConfigError, StrategyError
from vlafit.nn.policy import Policy
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import rollout_rng
from vlafit.tuning.merge import merge
from vlafit.tuning.quantise import quantise_layer, quantised_names
from vlafit.types import EpisodeKey

EightBits = Literal["int8", "fp8"]
EIGHT_BITS: tuple[EightBits, ...] = get_args(EightBits)
QUANTISED = ("attention", "mlp")  # kinds of parameters
KEYS = [EpisodeKey(seed=seed, task="int8", replan=0) for seed in (0, 1)]  # of the random observations


def quantise_weights(policy: Policy, how: EightBits) -> float:
    """Merge adapters, quantise the matrices of attention and MLP layers in place, and return the error.

    It is the norm of the difference of the actions, as a share of their norm, on two random observations.
    Raises ConfigError where torchao is not installed, the device has no float8, or the policy has no such
    matrices, compiled blocks, matrices that are quantised already, or answers with tokens.
    """
    if quantised_names(policy):
        raise ConfigError(
            f"quantise = '{how}': the checkpoint's matrices are quantised already (its strategy says how); "
            "leave the option out"
        )
    if policy.needs().writes_tokens:
        raise ConfigError(
            f"quantise = '{how}': {type(policy).__name__} answers with tokens, so what 8 bits change in its "
            "actions cannot be measured; leave it out"
        )
    if policy.compiled:
        raise ConfigError(f"quantise = '{how}' was not tried with compile; use one of the two")
    merge(policy)
    weights = [info.name for info in policy.parts() if info.kind in QUANTISED]
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    layers = [name for name in names if isinstance(policy.get_submodule(name), nn.Linear)]
    if not layers:
        raise ConfigError(
            f"quantise = '{how}': {type(policy).__name__} has no linear layers of attention or MLPs; leave "
            "it out"
        )
    before = _actions(policy)
    try:
        for name in layers:
            quantise_layer(policy, name, how)
    except StrategyError as error:
        raise ConfigError(str(error)) from error
    policy.quantised = how
    return float((_actions(policy) - before).norm() / before.norm())


def _actions(policy: Policy) -> torch.Tensor:
    device, training = next(policy.parameters()).device, policy.training
    policy.eval()
    batch = random_batch(policy.needs(), len(KEYS)).to(device)
    with torch.no_grad():
        actions = policy.act(batch, rollout_rng(KEYS, seed=0)).float().cpu()
    policy.train(training)
    return actions
