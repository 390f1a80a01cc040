"""Prepare a policy for inference: device, sampling steps, CUDA graphs, compiled blocks, int8 weights."""

import logging

import torch

from vlafit.errors import LONGEST_QUOTE, ConfigError, quoted
from vlafit.nn.compiled import compile_blocks
from vlafit.nn.cuda_graphs import CudaGraphs
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import MOST_SAMPLING_STEPS, Policy
from vlafit.tuning.int8_weights import quantise_weights

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
    if quantise not in ("", "int8"):
        raise ConfigError(f"quantise {quoted(quantise)}: must be 'int8', or empty for none")
    if quantise and compile:
        raise ConfigError("quantise = 'int8' was not tried with compile; use one of the two")
    if quantise:
        error = 100 * quantise_weights(policy)
        log.warning("matrices in int8: actions on two random observations differ by %.2g %%", error)
    if compile:
        compile_blocks(policy, only_training=False)
    if quantise:
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
