"""Prepare a policy for inference: device, sampling steps, CUDA graphs, compiled blocks, weights in 8 bits."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vlafit.errors import LONGEST_QUOTE, ConfigError, quoted
from vlafit.nn.compiled import compile_blocks
from vlafit.nn.cuda_graphs import CudaGraphs
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import MOST_SAMPLING_STEPS, Policy
from vlafit.tuning.weights_8bit import EIGHT_BITS, EightBits, quantise_weights

log = logging.getLogger(__name__)


def with_steps(policy: Policy, steps: int) -> Policy:
    """Set the sampling steps of `policy` (0: its own number) and return it.

    Raises ConfigError if it does not sample in steps.
    """
    if not 0 <= steps <= MOST_SAMPLING_STEPS:
        raise ConfigError(f"steps {steps}: must be at least 0 and at most {MOST_SAMPLING_STEPS}")
    if steps and policy.steps is None:
        raise ConfigError(f"steps {steps}: {type(policy).__name__} does not sample in steps; leave it out")
    if steps:
        policy.steps = steps
    return policy


def accelerated(policy: Policy, compile: bool = False, quantise: str = "") -> Policy:
    """Let a flow policy on a GPU sample by CUDA graphs; quantise, or compile its blocks, if asked to.

    Returns the policy. Raises ConfigError where it cannot be quantised.
    """
    kept: EightBits | None = next((how for how in EIGHT_BITS if how == quantise), None)
    if quantise and kept is None:
        known = " or ".join(f"'{how}'" for how in EIGHT_BITS)
        raise ConfigError(f"quantise {quoted(quantise)}: must be {known}, or empty for none")
    if kept and compile:
        raise ConfigError(f"quantise = '{kept}' was not tried with compile; use one of the two")
    if kept:
        error = 100 * quantise_weights(policy, kept)
        log.warning("matrices in %s: actions on two random observations differ by %.2g %%", kept, error)
    if compile:
        compile_blocks(policy, only_training=False)
    if kept:
        return policy
    if isinstance(policy, FlowPolicy) and next(policy.parameters()).is_cuda:
        policy.graphs = CudaGraphs(policy)
    return policy


def require_device(name: str) -> torch.device:
    """Return torch's device of this name, or raise ConfigError where no numbers can be put and got back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).splitlines()[0][:LONGEST_QUOTE]
        raise ConfigError(
            f"device {quoted(name)} cannot be used here ({reason}); take cpu, or cuda on a GPU"
        ) from error
    return device


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put every module in evaluation mode, and afterwards each back in the mode it had."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
