"""Let a run give its policy the first steps of chunks (train.max_delay), or refuse it by name."""

from vlafit.errors import ConfigError
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import Policy


def train_with_delays(policy: Policy, max_delay: int) -> None:
    """Let `policy` be trained with delays of up to `max_delay` steps (train.max_delay; 0: with none).

    Raises ConfigError where its family cannot, or where nothing of a chunk would be left.
    """
    kind, chunk = type(policy).__name__, policy.needs().chunk
    if not isinstance(policy, FlowPolicy) or not policy.takes_prefix:
        if max_delay:
            raise ConfigError(
                f"train.max_delay is {max_delay}, but {kind} cannot be given the first steps of a chunk: it "
                "takes one flow time for all steps, or none. pi0, pi0.5 and SmolVLA can; set it to 0"
            )
        return
    if max_delay >= chunk:
        raise ConfigError(
            f"train.max_delay is {max_delay}, but a chunk of {kind} has {chunk} steps; set it to at most "
            f"{chunk - 1}"
        )
    policy.max_delay = max_delay
