"""Describe a local actor for those who will connect to it."""

from vlafit.actor import PolicyActor
from vlafit.agreement import UNSAID
from vlafit.errors import ConfigError
from vlafit.requests import expected_of
from vlafit.rollout.prepared import TrainedActor
from vlafit.serve.metadata import Described, software
from vlafit.types import Actor, GuidedActor, history_of


def describe(actor: Actor) -> Described:
    """Return what a client must know of `actor`. Raises ConfigError for one that has no robot."""
    if not isinstance(actor, TrainedActor):
        raise ConfigError(
            f"actor {type(actor).__name__} cannot be served: it does not say for which robot it acts; "
            "give it embodiment, width, seeds and fingerprint (vlafit.rollout.prepared.TrainedActor)"
        )
    guided = isinstance(actor, GuidedActor)
    instructed, fate = True, ""
    learned, relative = UNSAID, None
    chunk, required, normalisation = 0, expected_of(actor, actor.embodiment).seen, {}
    if isinstance(actor, PolicyActor):
        config = actor.codec.config
        chunk = config.answered
        expected = actor.expected
        guided, instructed, fate = expected.guided, expected.instructed, expected.fate_of_invalid
        learned, relative = actor.learned, actor.relative
        normalisation = {"state": config.normalisation, "action": config.of_actions}
    return Described(
        embodiment=actor.embodiment,
        width=actor.width,
        fingerprint=actor.fingerprint(),
        guided=guided,
        chunk=chunk,
        history=history_of(actor),
        instructed=instructed,
        required=required,
        fate_of_invalid=fate,
        seeds={task: tuple(sorted(seeds)) for task, seeds in actor.seeds.items()},
        normalisation=normalisation,
        learned=learned,
        relative=relative,
        versions=software(),
    )
