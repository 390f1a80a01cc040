"""Compare an actor's robot with the dataset's before anything is asked."""

from typing import Protocol, runtime_checkable

from vlafit.datasets import EpisodeStore
from vlafit.types import Actor, Embodiment, require_same


@runtime_checkable
class OfRobot(Protocol):
    """An actor that knows its robot and what decides its actions."""

    embodiment: Embodiment

    def fingerprint(self) -> str:
        """Return all that decides its actions."""
        ...


def require_robot(actor: Actor, store: EpisodeStore) -> str:
    """Return what identifies the actor. Raises EmbodimentError if it was trained on another robot."""
    if not isinstance(actor, OfRobot):
        return type(actor).__name__
    require_same(actor.embodiment, "the policy", store.embodiment, f"dataset {store.card.name!r}")
    return actor.fingerprint()
