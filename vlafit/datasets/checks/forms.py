"""Check that recorded rotations, grippers and angles are what the card says of them."""

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.recorded_forms import form_faults
from vlafit.datasets.store import EpisodeStore


def check_forms(store: EpisodeStore, untested: Untested) -> list[Finding]:
    """Return the first fault of each part of a column, with the number of episodes that have it."""
    for name, column in (("state", store.card.robot.state), ("action", store.card.robot.action)):
        if not (column.poses or column.grippers or column.angles):
            untested.add("form", "the card declares no pose, gripper or angle", name)
    faults = list(form_faults(store, [info.id for info in store.episodes]))
    first = {(fault.column, fault.dimension): fault for fault in reversed(faults)}
    findings = []
    for (column, dimension), fault in sorted(first.items()):
        episodes = len({one.episode for one in faults if (one.column, one.dimension) == (column, dimension)})
        more = f", and {episodes - 1} more episodes" if episodes > 1 else ""
        findings.append(
            Finding(
                "error",
                "form",
                fault.episode,
                fault.step,
                f"{column} {dimension}: {fault.text}{more}",
                "a policy would learn other rotations, angles or gripper commands: training refuses it",
                "correct the card's poses, grippers, angles or `scale`, or leave the episode out",
                columns=((column, dimension),),
            )
        )
    return findings
