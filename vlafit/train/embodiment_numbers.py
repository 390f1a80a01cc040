"""Say which weights each robot of a run uses, in a policy that has weights for each."""

from collections.abc import Sequence

from vlafit.checkpoints import split_embodiments
from vlafit.codec import Codec, CodecSet
from vlafit.errors import ConfigError
from vlafit.nn.policy import Policy


def numbered(
    codecs: Sequence[Codec], policy: Policy, before: CodecSet | None = None
) -> tuple[CodecSet, list[str]]:
    """Return the codecs of a run with the numbers of their weights, and a line for each of several robots.

    Robots that have no number of the checkpoint's get the policy's own (X-VLA's `domain`) and those after
    it, in their order, or those after the robots that the checkpoint has learned, `before`; a policy that
    lists rows (GR00T) takes them by place. Raises ConfigError where the policy has too few.
    """
    needs = policy.needs()
    field, rows, first = needs.embodiment_field, needs.embodiment_rows, 0
    learned = [one.embodiment_id for one in before or () if one.embodiment_id is not None]
    if learned:
        first = 1 + max(learned)
    elif needs.embodiments and not rows:
        first = getattr(policy.config, field)
    if len(codecs) == 1 and not learned:
        return CodecSet(codecs), []
    taken = {codec.embodiment_id for codec in codecs}
    free = (number for number in range(first, first + 2 * len(codecs)) if number not in taken)
    made = CodecSet(
        [c if c.embodiment_id is not None else c.with_changes(embodiment_id=next(free)) for c in codecs]
    )
    if not needs.embodiments:
        return made, []
    used = [codec.embodiment_id or 0 for codec in made]
    if rows and max(used) >= len(rows):
        names = ", ".join(codec.embodiment.name for codec in codecs)
        raise ConfigError(
            f"policy.config.{field} is {list(rows)}, and the run's embodiments ({names}) are numbers "
            f"{used} of it: name a row for each, such as policy.config.{field} = "
            f"{list(range(rows[0], rows[0] + 1 + max(used)))}"
        )
    used = [rows[number] for number in used] if rows else used
    if max(used) >= needs.embodiments:
        raise ConfigError(
            f"policy.config.{field} is {getattr(policy.config, field)}: the run's {len(codecs)} embodiments "
            f"would use {used}, and the policy has {field}s 0 to {needs.embodiments - 1}; begin earlier: "
            f"{field} = {max(0, needs.embodiments - len(codecs))}"
        )
    return made, [
        f"embodiment {codec.embodiment.name!r}: the weights of {field} {number}"
        for codec, number in zip(made, used, strict=True)
    ]


def require_used(fresh: Sequence[str], codecs: CodecSet, policy: Policy) -> None:
    """Raise ConfigError where `fresh` names weights of an embodiment that no robot of the run has."""
    field, rows = policy.needs().embodiment_field, policy.needs().embodiment_rows
    used: dict[str, int] = {}
    for codec in codecs:
        number = codec.embodiment_id
        if rows:
            number = rows[number or 0]
        used[codec.embodiment.name] = getattr(policy.config, field, 0) if number is None else number
    for number in split_embodiments(fresh)[1]:
        if number in used.values():
            continue
        have = ", ".join(f"{name!r} has those of {field} {own}" for name, own in used.items())
        wanted = f" = {[number] if rows else number}" if len(used) == 1 else ""
        own = " or ".join(f"'embodiment:{own}'" for own in used.values())
        raise ConfigError(
            f"policy.fresh: 'embodiment:{number}' draws weights anew that no robot of the run has: {have}. "
            f"To train those of {number}: policy.config.{field}{wanted}; to draw the robot's own anew: {own}"
        )
