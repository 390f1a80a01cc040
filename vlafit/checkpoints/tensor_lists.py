"""Format tensor names for error messages, collapsing whole modules and repeated layers."""

import re
from collections.abc import Callable, Iterable, Sequence

WHOLE = 6  # tensors below one name, from which on they are named by it if all are listed
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def list_tensors(
    entries: Sequence[str], file_name: Callable[[str], str] = str, every: Iterable[str] = ()
) -> str:
    """Return a list of tensors under the file's names.

    An entry is our name of a tensor, and after a blank what is wrong with it; `file_name` gives the file's
    name, followed in brackets by the policy's where it is another. `every` are the file's names among which a
    part is whole: a layer of which all is listed is named once, with the number of its tensors.
    """
    pairs = [entry.partition(" ") for entry in entries]
    plain = {file_name(name): name for name, _, detail in pairs if not detail}
    tops = _tops(set(plain), {*every, *plain})
    items = [(f"{top}.*", "", f" ({count} tensors)") for top, count in tops.items()]
    for name, _, detail in pairs:
        shown = file_name(name)
        if detail or not any(shown.startswith(f"{top}.") for top in tops):
            items.append((shown, "" if name == shown else name, f" {detail}" if detail else ""))
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for shown, name, detail in items:
        layer = _LAYER.search(shown) or _LAYER.search(name)
        key = _LAYER.sub("\0", shown), _LAYER.sub("\0", name), detail
        grouped.setdefault(key, []).extend([int(layer[0])] if layer else [])
    return ", ".join(_one(*key, layers) for key, layers in grouped.items())


def _one(shown: str, name: str, detail: str, layers: list[int]) -> str:
    text = f"{shown} [{name}]{detail}" if name else shown + detail
    return text.replace("\0", _ranges(layers)) if layers else text


def _ranges(numbers: list[int]) -> str:
    """Return ``3`` for one number, else ``{0-3,7}``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _tops(affected: set[str], every: set[str]) -> dict[str, int]:
    """Return the topmost names below which everything is affected, and how many tensors that is."""
    counts: dict[str, list[int]] = {}
    for name in every:
        pieces = name.split(".")
        for end in range(1, len(pieces)):
            count = counts.setdefault(".".join(pieces[:end]), [0, 0])
            count[0] += 1
            count[1] += name in affected
    whole = {node: total for node, (total, bad) in counts.items() if bad == total >= WHOLE}
    return {
        node: total
        for node, total in sorted(whole.items())
        if not any(node.startswith(f"{other}.") for other in whole)
    }
