"""Construct a policy without storage for its parameters, and refuse one that a checkpoint cannot restore.

A checkpoint holds parameters, each once. Buffers and other tensors are constants that `__init__` computes
again, so they are computed for real while parameters stay on the meta device.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlafit.errors import ConfigError

M = TypeVar("M", bound=nn.Module)

NOT_COMPUTED = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_permuted,
        torch.empty_strided,
        torch.rand,
        torch.rand_like,
        torch.randint,
        torch.randint_like,
        torch.randn,
        torch.randn_like,
        torch.randperm,
        Tensor.new_empty,
        Tensor.new_empty_strided,
    }
)
"""Functions whose numbers are arbitrary or random: their tensors are of the meta device."""
DRAWN_IN_PLACE = frozenset(
    {
        Tensor.normal_,
        Tensor.uniform_,
        nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
        nn.init.normal_,
        nn.init.trunc_normal_,
        nn.init.uniform_,
        nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
    }
)
"""Functions that draw numbers into a tensor: on the meta device there is nothing to draw."""
LISTED = 5  # names in a message


class _Deferred(TorchFunctionMode):
    """Put the tensors of `NOT_COMPUTED` on the meta device unless the call names one, and draw none there.

    To draw on the meta device imports torch._dynamo: two seconds at every start.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in NOT_COMPUTED and options.get("device") is None:
            options["device"] = "meta"
        if func in DRAWN_IN_PLACE:
            tensor = args[0] if args else options["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **options)


def construct(make: Callable[[], M]) -> M:
    """Call `make`; the parameters of what it returns are on the meta device, other tensors on the CPU.

    The global random generator is left as it was. Raises ConfigError as `require_restorable` and
    `require_numbers` do, for what is no parameter.
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"), _Deferred():
        torch.manual_seed(0)  # in-place random numbers of a buffer are the same each time
        module = make()
    require_restorable(module)
    _require_none(module, list(_meta_tensors(module, with_parameters=False)))
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.is_meta:
                bare = torch.empty_like(parameter, device="meta")
                setattr(owner, name, nn.Parameter(bare, requires_grad=parameter.requires_grad))
    return module


def allocate(module: nn.Module, device: str | torch.device) -> None:
    """Give parameters on the meta device storage on `device`, filled with NaN, and move other tensors there.

    `unfilled` names the parameters that nobody filled afterwards.
    """

    def with_storage(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        fill = torch.nan if tensor.is_floating_point() else 0
        if tensor.is_contiguous():  # 13 times as fast as full_like, which asks the meta device for strides
            return torch.full(tensor.shape, fill, dtype=tensor.dtype, device=device)
        return torch.full_like(tensor, fill, device=device)

    module._apply(with_storage)


def unfilled(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the parameters that hold a NaN, as after `allocate`."""
    return [name for name, p in parameters if p.numel() and bool(torch.aminmax(p.detach())[0].isnan())]


def require_restorable(module: nn.Module) -> None:
    """Raise ConfigError naming persistent buffers and parameters with two names.

    Checkpoints hold neither of them, so a policy with them could not be opened as it was saved.
    """
    buffers = _persistent_buffers(module)
    if buffers:
        raise ConfigError(
            f"{_class(module)}: checkpoints hold parameters, but no persistent buffers: {_listed(buffers)}. "
            "A constant that __init__ computes is registered with persistent=False. Numbers that training "
            "changes, such as the running statistics of BatchNorm, cannot be restored: use GroupNorm or "
            "LayerNorm, or FrozenBatchNorm of vlafit.nn.resnet, whose statistics are parameters"
        )
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise ConfigError(
                f"{_class(module)}: {first} and {name} are the same parameter; a checkpoint holds each once, "
                f"by one name. Use {first} in the forward pass where {name} was used, as in "
                "F.linear(x, self.words.weight)"
            )


def require_numbers(module: nn.Module) -> None:
    """Raise ConfigError naming the parameters, buffers and other tensors that are on the meta device."""
    _require_none(module, list(_meta_tensors(module, with_parameters=True)))


def _require_none(module: nn.Module, names: Sequence[str]) -> None:
    if names:
        raise ConfigError(
            f"{_class(module)}: there are no numbers in {_listed(names)}. __init__ must compute a buffer, or "
            "another tensor that is no parameter, from the config (torch.linspace, torch.tensor, ...): not "
            "uninitialised, not random, and not in init_weights, which is not called when a checkpoint is "
            "opened. `build` must call vlafit.nn.parameters.build_policy, which keeps these numbers"
        )


def _meta_tensors(module: nn.Module, with_parameters: bool) -> Iterator[str]:
    """Yield the names of tensors without storage; tensors that are plain attributes count."""
    for prefix, owner in module.named_modules():
        tensors = dict(owner.named_buffers(recurse=False))
        tensors |= {name: value for name, value in vars(owner).items() if isinstance(value, Tensor)}
        if with_parameters:
            tensors |= dict(owner.named_parameters(recurse=False))
        yield from (f"{prefix}.{name}".lstrip(".") for name, value in tensors.items() if value.is_meta)


def _persistent_buffers(module: nn.Module) -> list[str]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return [name for name in module.state_dict(keep_vars=True) if name in buffers and name not in parameters]


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"
