"""Policy families, one file each.

A family's module offers `Config` (a frozen dataclass), `SIZES` (named configs), `build` and `init_weights`,
as `vlafit.policies.pi0` does. A family is named by its file here, by the entry point of an installed package
(group "vlafit.policies"), or by the path of another module (dotted, or one word). A checkpoint's own files
never make vlafit import a module that is not installed as a family: the caller has to trust its package.
"""

import dataclasses
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlafit import config as configuration
from vlafit.entry_points import import_outside, is_module, offered
from vlafit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

    from vlafit.nn.policy import Policy


GROUP = "vlafit.policies"


def families() -> list[str]:
    """Name the families that ship."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def installed() -> dict[str, str]:
    """Return the families that other installed packages offer: name -> module."""
    return {point.name: point.value for point in offered(GROUP)}


def family(name: str, trust: Sequence[str] = ()) -> ModuleType:
    """Import the module of a family.

    The module of another package is imported only if an entry point offers it, the program has imported it
    already, or `trust` names it or a package that it is in: `name` may come from an untrusted checkpoint.
    Raises ConfigError otherwise, and for a name that is no family.
    """
    others = installed()
    path = f"{__name__}.{name}" if name in families() else others.get(name, name)
    if "." not in path and not is_module(path):
        raise ConfigError(
            f"there is no policy family {name!r}{did_you_mean(name, [*families(), *others])}, and Python "
            "finds no module of that name (is its folder on PYTHONPATH?)"
        )
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(
            f"policy family {name!r} is neither a family's name nor the dotted path of a module"
        )
    if name not in families() and not _is_trusted(path, others, trust):
        package = path.partition(".")[0]
        raise ConfigError(
            f"policy family {name!r} is a module that no installed package offers as a family (entry point "
            f"group {GROUP}); importing it runs its code. If you trust the package: --policy.trust {package} "
            f"for train, sweep and compare (in a recipe policy.trust = [{package!r}]), --trust {package} for "
            f"other commands, trust=[{package!r}] in Python"
        )
    try:
        module = import_outside(path, f"policy family {name!r}")
    except ImportError as error:
        raise ConfigError(f"policy family {name!r}: cannot import {path}: {error}") from error
    lacking = [n for n in ("Config", "SIZES", "build", "init_weights") if n not in vars(module)]
    if lacking:
        raise ConfigError(f"policy family {name!r}: module {path} does not define {', '.join(lacking)}")
    return module


def _is_trusted(path: str, offered: Mapping[str, str], trust: Sequence[str]) -> bool:
    packages = [path, *(path[:end] for end, letter in enumerate(path) if letter == ".")]
    return path in sys.modules or path in offered.values() or any(package in trust for package in packages)


def family_name(policy: "Policy") -> str:
    """Return the name by which `family` finds this policy's module again.

    Sharding puts a class of its own, which no module holds, in front of the policy's.
    """
    for one in type(policy).__mro__:
        module = sys.modules.get(one.__module__)
        if module is not None and vars(module).get(one.__name__) is one and "SIZES" in vars(module):
            return one.__module__.removeprefix(f"{__name__}.")
    raise ConfigError(f"{type(policy).__name__} is of no policy family: its module defines no SIZES")


def family_of(thing: object) -> str:
    """Return the name of the family whose module defines the class of `thing`, a policy or its config."""
    return type(thing).__module__.removeprefix(f"{__name__}.")


def model_of(config: object) -> str:
    """Return the name of the model with this config: the family's, unless its module has `model_name`."""
    name = vars(sys.modules[type(config).__module__]).get("model_name")
    return family_of(config) if name is None else name(config)


DEEPEST = 1024  # layers of one stack; building a module for each takes time even on the meta device
LARGEST_IMAGE = 16384  # pixels along a side, as in a data card
WIDEST = 2**20
LONGEST_PROMPT = 2**15  # tokens; attention takes memory with the square of both
MOST_VIEWS = 1024
LARGEST_VOCABULARY = 2**22  # sixteen times that of pi0
LONGEST_CHUNK = 2**13  # steps; 82 s at 100 Hz
FARTHEST = 2**31 - 1  # whole numbers that no name marks as a size
LONGEST = 64  # entries of a list: stages of a network
LAYERS, IMAGES = ("depth", "layers", "blocks"), ("image_size",)
SIZED = ("width", "mlp", "dim", "heads", "latent", "hidden", "channels", "patch", "shuffle", "registers",
         "domains", "prompts", "positions", "frames", "window")  # fmt: skip
"""Last words of the names of fields, joined by an underscore or whole."""


def require_bounded(config: object, where: str) -> None:
    """Raise ConfigError if a size in a policy's config is one that no policy has. Builds nothing.

    A field's name says what it counts: layers, pixels, or the width of something.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            require_bounded(value, f"{where}: {field.name}")
        elif isinstance(value, list | tuple):
            if len(value) > LONGEST:
                raise ConfigError(
                    f"{where}: {field.name} has {len(value)} entries; at most {LONGEST} are supported"
                )
            numbers = [entry for entry in value if type(entry) is int]
            for number in numbers:
                _require_at_most(number, field.name, where)
            if _ends_in(field.name, LAYERS):
                _require_at_most(sum(numbers), field.name, where)
        elif type(value) is int:
            _require_at_most(value, field.name, where)


def _require_at_most(value: int, name: str, where: str) -> None:
    limits = (
        (LAYERS, DEEPEST),
        (IMAGES, LARGEST_IMAGE),
        (("vocab",), LARGEST_VOCABULARY),
        (("chunk",), LONGEST_CHUNK),
        (("tokens",), LONGEST_PROMPT),
        (("views",), MOST_VIEWS),
        (SIZED, WIDEST),
    )
    most = next((limit for names, limit in limits if _ends_in(name, names)), FARTHEST)
    if not -FARTHEST <= value <= most:
        raise ConfigError(f"{where}: {name} is {value}; at most {most} is supported")


def _ends_in(name: str, words: Sequence[str]) -> bool:
    return any(name == word or name.endswith(f"_{word}") for word in words)


def build_config(module: ModuleType, values: Mapping[str, Any], where: str) -> Any:
    """Build the config of a family's module from plain values. Raises ConfigError as `override` does."""
    config = configuration.build(module.Config, values, where)
    require_bounded(config, where)
    return config


def override(config: Any, values: Mapping[str, object], where: str) -> Any:
    """Return `config` with some fields replaced.

    `values` may nest (``{"vision": {"heads": 2}}``) or use dotted keys (``{"vision.heads": 2}``). `where`
    begins every message. Raises ConfigError for an unknown key, a wrong type or an absurd size.
    """
    changed = configuration.build(type(config), merge_dotted(dataclasses.asdict(config), values), where)
    require_bounded(changed, where)
    return changed


def merge_dotted(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with the values of `over`, whose keys may nest or be dotted."""
    merged = dict(under)
    for key, value in over.items():
        head, dot, rest = key.partition(".")
        if dot:
            value = {rest: value}
        have = merged.get(head)
        if isinstance(value, Mapping):
            merged[head] = merge_dotted(have if isinstance(have, Mapping) else {}, value)
        else:
            merged[head] = value
    return merged


def build_family(
    name: str,
    size: str = "",
    config: Mapping[str, object] | None = None,
    generator: "torch.Generator | None" = None,
    device: str = "cpu",
) -> "Policy":
    """Build a policy with fresh weights on the CPU, or without any on the "meta" device.

    Starts from the family's named `size` and replaces the fields in `config`; without a size, `config` must
    be complete. Raises ConfigError for unknown names, keys and sizes.
    """
    module = family(name, trust=(name,))  # the caller names it, not a file
    where = f"policy family {name!r}"
    if not size:
        made = build_config(module, merge_dotted({}, config or {}), f"{where}, no size given")
    elif size not in module.SIZES:
        raise ConfigError(f"{where} has no size {size!r}{did_you_mean(size, module.SIZES)}")
    else:
        made = override(module.SIZES[size], config or {}, f"{where}, size {size!r}")
    policy = module.build(made, device, generator)
    from vlafit.nn.construct import require_numbers, require_restorable

    require_restorable(policy)
    if device != "meta":
        require_numbers(policy)
    return policy
