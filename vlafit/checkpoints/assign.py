"""Put weights into a policy exactly, or say everything that is wrong with them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlafit.checkpoints.tensor_lists import listed
from vlafit.errors import WeightsError
from vlafit.nn.policy import ParameterInfo, Policy

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Map safetensors files into memory; a tensor's bytes are read when they are first touched.

    Raises WeightsError for files that are missing, truncated or damaged, or hold one name twice.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                    if name in found:
                        raise WeightsError(
                            f"{path}: tensor {name!r} is in another file of the checkpoint, too"
                        )
                    found[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _not_whole(path, error) from error
    return found


def tensor_names(path: Path) -> list[str]:
    """Return the names in the header of a safetensors file. Raises WeightsError where it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path}: not a whole safetensors file ({error}); copy or download it again")


def fit(
    policy: Policy,
    weights: Mapping[str, Tensor],
    *,
    where: str,
    fresh: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    contents: Iterable[tuple[str, Tensor]] | None = None,
    resized: Mapping[str, torch.Size] | None = None,
    twins: Mapping[str, Tensor] | None = None,
    theirs: Callable[[str], str] = str,
    odd: Sequence[str] = (),
) -> None:
    """Copy `weights`, named as the policy's parameters, into `policy` exactly.

    The parameters named in `fresh` keep what they hold; all others are replaced by new storage on `device`,
    in `dtype` (those that compute in float32 stay float32, see `stored_as`), one at a time: a policy on the
    meta device never exists twice. `where` begins the message. With `contents` the numbers come from there,
    in its order, and `weights` may be of the meta device. `resized` are parameters whose weights have another
    shape, given here: what both shapes have is copied, what the policy alone has is zero. `twins` are second
    copies that the file holds of some weights, and must equal them. `theirs` gives the file's name of a
    parameter, and `odd` says what else is wrong with the checkpoint: see `complain`.

    Raises WeightsError naming every missing, surplus, misshapen or non-finite tensor, every one that holds
    numbers too large for `dtype`, and every dtype that is no floating-point number; the policy is then
    unusable.
    """
    infos = {info.name: info for info in policy.parts()}
    found = compare(policy, weights, fresh, resized)
    bad = {name.split(" ")[0] for names in found.values() for name in names}
    fits = {name for name in infos if name not in bad and name not in set(fresh)}
    broken, large, unlike = [], [], []
    for name, tensor in weights.items() if contents is None else contents:
        if name not in fits:
            continue
        fits.remove(name)
        twin = (twins or {}).get(name)
        if twin is not None and not torch.equal(twin, tensor):
            unlike.append(name)
        shape = policy.get_parameter(name).shape
        if tensor.shape == shape:
            value = torch.empty(shape, dtype=stored_as(infos[name], dtype), device=device).copy_(tensor)
        else:
            value = torch.zeros(shape, dtype=stored_as(infos[name], dtype), device=device)
            common = tuple(slice(min(n, m)) for n, m in zip(shape, tensor.shape, strict=True))
            value[common] = tensor[common].to(value)
        # Looked at as it is kept: what was finite in the file may be too large for the dtype asked for.
        if _finite(value):
            replace_parameter(policy, name, value)
        elif bool(torch.isfinite(tensor).all()):
            dtypes = [str(t.dtype).removeprefix("torch.") for t in (tensor, value)]
            large.append(f"{name} holds {dtypes[0]} numbers beyond {dtypes[1]}")
        else:
            broken.append(name)
        del tensor, value  # the next one is read before the loop would let go of this one
    numbers = {"tied, but different": unlike, "not finite": broken, "too large": large}
    complain(
        where,
        {**found, **numbers, "without contents": sorted(fits)},
        theirs,
        [*infos, *weights],
        odd,
    )


def compare(
    policy: Policy,
    weights: Mapping[str, Tensor],
    fresh: Sequence[str] = (),
    resized: Mapping[str, torch.Size] | None = None,
) -> dict[str, list[str]]:
    """Name what names, shapes and dtypes tell is wrong, without a look at a number; see `fit`."""
    known = {info.name for info in policy.parts()}
    wanted = {name: p.shape for name, p in policy.named_parameters() if name not in set(fresh)}
    wrong: dict[str, list[str]] = {
        "missing": [n for n in wanted if n not in weights],
        "surplus": [n for n in weights if n not in known],
        "misshapen": [],
        "not floating-point": [],
    }
    for name, shape in wanted.items():
        if name not in weights:
            continue
        tensor, shape = weights[name], (resized or {}).get(name, shape)
        if tensor.shape != shape:
            wrong["misshapen"].append(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        elif not tensor.is_floating_point():
            wrong["not floating-point"].append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}")
    return wrong


def complain(
    where: str,
    wrong: Mapping[str, Sequence[str]],
    theirs: Callable[[str], str] = str,
    every: Iterable[str] = (),
    odd: Sequence[str] = (),
) -> None:
    """Raise WeightsError with one line for each kind of `wrong` tensors, unless there are none.

    An entry begins with our name of a tensor; `theirs` turns it, and those of `every` parameter and tensor,
    into the file's names: see `listing.listed`. `odd` are lines that say what else is wrong. The error's
    `tensors` hold each name by itself.
    """
    names = [theirs(name) for name in every]
    lines = [
        f"  {kind} ({len(entries)}): {listed(entries, theirs, names)}"
        for kind, entries in wrong.items()
        if entries
    ]
    lines = [f"  {line}" for line in odd] + lines
    if lines:
        error = WeightsError(
            f"{where}: these are not exactly the policy's weights:\n"
            + "\n".join(lines)
            + "\nUse the config that"
            " the checkpoint was made with, name what shall start anew as `fresh`, or get the file again."
        )
        error.tensors = {
            kind: tuple(theirs(entry.split(" ")[0]) for entry in entries)
            for kind, entries in wrong.items()
            if entries
        }
        raise error


def stored_as(info: ParameterInfo, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter is kept when the policy is loaded in `dtype`.

    Norms, the image tower's patches and positions, and the projections compute in float32, as in the
    reference.
    """
    precise = info.kind in ("norm", "conv") or info.part == "projections"
    return torch.float32 if precise or (info.part, info.kind) == ("vision", "embedding") else dtype


def replace_parameter(policy: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(policy.get_submodule(owner), leaf, nn.Parameter(value))


def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are NaN where one number is; makes no copy, unlike isfinite
    return bool(torch.isfinite(low) & torch.isfinite(high))
