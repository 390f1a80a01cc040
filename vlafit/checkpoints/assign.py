"""Assign weights to a policy exactly, or raise one error that names everything wrong with them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlafit.checkpoints.tensor_lists import list_tensors
from vlafit.errors import WeightsError
from vlafit.nn.deferred import defer
from vlafit.nn.policy import ParameterInfo, Policy

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fit(
    policy: Policy,
    weights: Mapping[str, Tensor],
    *,
    where: str,
    fresh: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    narrow: Collection[str] = (),
    device: torch.device | str = "cpu",
    contents: Callable[[frozenset[str]], Iterable[tuple[str, Tensor]]] | None = None,
    resized: Mapping[str, torch.Size] | None = None,
    twins: Mapping[str, Tensor] | None = None,
    file_name: Callable[[str], str] = str,
    conflicts: Sequence[str] = (),
    deferred: bool = False,
) -> None:
    """Copy `weights`, named as the policy's parameters, into `policy` exactly.

    The parameters named in `fresh` keep what they hold; all others are replaced by new storage on `device`,
    in `dtype`, or bfloat16 where named in `narrow` (those that compute in float32 stay float32, see
    `stored_as`), one at a time: a policy on the meta device never exists twice. `where` begins the message.
    With `contents` the numbers of the names given to it come from there, in its order, and `weights` may be
    of the meta device.
    `resized` are parameters whose weights have another shape, given here: what both shapes have is copied,
    what the policy alone has is zero. `twins` are second copies that the file holds of some weights, and must
    equal them. `file_name` gives the file's name of a parameter, and `conflicts` says what else is wrong with
    the checkpoint: see `raise_mismatch`. With `deferred` nothing is copied: a weight is made of the file's
    when it is used.

    Raises WeightsError naming every missing, surplus, misshapen or non-finite tensor, every one that holds
    numbers too large for `dtype`, and every dtype that is no floating-point number; the policy is then
    unusable.
    """
    infos = {info.name: info for info in policy.parts()}
    differences = compare(policy, weights, fresh, resized)
    bad = {name.split(" ")[0] for names in differences.values() for name in names}
    fits = {name for name in infos if name not in bad and name not in set(fresh)}
    broken, large, unlike = [], [], []
    for name, tensor in weights.items() if contents is None else contents(frozenset(fits)):
        if name not in fits:
            continue
        fits.remove(name)
        twin = (twins or {}).get(name)
        if twin is not None and not torch.equal(twin, tensor):
            unlike.append(name)
        shape = policy.get_parameter(name).shape
        kept = stored_as(infos[name], torch.bfloat16 if name in narrow else dtype)
        if deferred and tensor.shape == shape:
            value = defer(tensor, kept)
        elif tensor.shape == shape:
            value = torch.empty(shape, dtype=kept, device=device).copy_(tensor)
        else:
            value = torch.zeros(shape, dtype=kept, device=device)
            common = tuple(slice(min(n, m)) for n, m in zip(shape, tensor.shape, strict=True))
            value[common] = tensor[common].to(value)
        # Looked at as it is kept: what was finite in the file may be too large for the dtype asked for.
        widened = value.shape == tensor.shape and torch.promote_types(tensor.dtype, kept) == kept
        if _finite(tensor if widened else value):
            replace_parameter(policy, name, value)
        elif bool(torch.isfinite(tensor).all()):
            dtypes = [str(t.dtype).removeprefix("torch.") for t in (tensor, value)]
            large.append(f"{name} holds {dtypes[0]} numbers beyond {dtypes[1]}")
        else:
            broken.append(name)
        del tensor, value  # the next one is read before the loop would let go of this one
    numbers = {"tied, but different": unlike, "not finite": broken, "too large": large}
    raise_mismatch(
        where,
        {**differences, **numbers, "without contents": sorted(fits)},
        file_name,
        [*infos, *weights],
        conflicts,
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


def raise_mismatch(
    where: str,
    wrong: Mapping[str, Sequence[str]],
    file_name: Callable[[str], str] = str,
    every: Iterable[str] = (),
    conflicts: Sequence[str] = (),
) -> None:
    """Raise WeightsError with one line for each kind of `wrong` tensors, unless there are none.

    An entry begins with our name of a tensor; `file_name` turns it, and those of `every` parameter and
    tensor, into the file's names: see `list_tensors`. `conflicts` are lines that say what else is wrong. The
    error's `tensors` hold each name by itself.
    """
    names = [file_name(name) for name in every]
    lines = [
        f"  {kind} ({len(entries)}): {list_tensors(entries, file_name, names)}"
        for kind, entries in wrong.items()
        if entries
    ]
    lines = [f"  {line}" for line in conflicts] + lines
    if lines:
        error = WeightsError(
            f"{where}: the weights are not exactly the policy's:\n"
            + "\n".join(lines)
            + "\nUse the config that the checkpoint was trained with, list parameters to re-initialise in "
            "`fresh`, or download the file again."
        )
        error.tensors = {
            kind: tuple(file_name(entry.split(" ")[0]) for entry in entries)
            for kind, entries in wrong.items()
            if entries
        }
        raise error


def stored_as(info: ParameterInfo, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter is kept when the policy is loaded in `dtype`.

    Norms, the image tower's patches and positions, and the projections compute in float32, as in the
    reference.
    """
    precise = info.kind in ("norm", "conv", "depthwise") or info.part == "projections"
    return torch.float32 if precise or (info.part, info.kind) == ("vision", "embedding") else dtype


def keep_in(policy: Policy, dtype: Dtype) -> None:
    """Round a policy's tensors to `dtype`, in place, except those that `stored_as` keeps in float32."""
    for info in policy.parts():
        parameter = policy.get_parameter(info.name)
        parameter.data = parameter.data.to(stored_as(info, DTYPES[dtype]))


def replace_parameter(policy: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(policy.get_submodule(owner), leaf, nn.Parameter(value))


def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are NaN where one number is; makes no copy, unlike isfinite
    return bool(torch.isfinite(low) & torch.isfinite(high))
