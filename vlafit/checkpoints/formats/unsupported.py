"""Refuse checkpoints of families that vlafit does not have by the family's name, known by tensor names."""

from collections.abc import Iterable, Mapping

from vlafit.checkpoints.tensor_lists import list_tensors
from vlafit.errors import WeightsError

# family, and patterns of which each must be in some tensor's name. The first family that fits is named.
# Each is an attribute in the family's own code, which the comment names.
KNOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GR00T", ("action_head.", "backbone.eagle_model.")),  # gr00t/model: gr00t_n1.py, eagle_backbone.py
    ("OpenVLA-OFT's action head", ("mlp_resnet_blocks.",)),  # action_heads.py: a file of its own
    ("ACT", ("model.vae_encoder.",)),  # LeRobot's modeling_act.py
    ("ACT", ("model.encoder.layers.0.self_attn.in_proj_weight", "model.action_head.")),  # without its VAE
    ("LeRobot's diffusion policy", ("diffusion.unet.",)),  # modeling_diffusion.py
    ("VQ-BeT", ("vqbet.",)),  # LeRobot's modeling_vqbet.py
    ("TD-MPC", ("_dynamics.", "_Qs.")),  # LeRobot's modeling_tdmpc.py, and the original's TOLD
    ("LeRobot's first pi0-FAST", ("model.pi0_paligemma.",)),  # modeling_pi0fast.py
)


WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_forward_module": "Lightning Fabric",
    "base_model.model": "PEFT, whose merged model was saved with its wrapper",
    "policy": "a program that held the policy in an attribute of that name",
    "model": "a program that held the policy in an attribute of that name",
}
"""First words of tensor names that say nothing of the policy -> what writes them. A policy's own names may
begin with ``model``, too.
"""


def wrappers(name: str) -> list[tuple[str, ...]]:
    """Return the keys of WRAPPERS that a tensor's name begins with, one after the other, the fewest first."""
    found: list[tuple[str, ...]] = []
    words: tuple[str, ...] = ()
    while word := next((w for w in WRAPPERS if name.startswith(f"{w}.") and name != f"{w}."), ""):
        words, name = (*words, word), name.removeprefix(f"{word}.")
        found.append(words)
    return found


def rename_command(prefix: str) -> str:
    """Return a command that writes a safetensors file again without `prefix` in its names."""
    return (
        'python -c "from safetensors.torch import load_file, save_file; '
        f"save_file({{n.removeprefix('{prefix}'): t for n, t in load_file('OLD.safetensors').items()}},"
        " 'model.safetensors', {'format': 'pt'})\""
    )


def name_family(names: Iterable[str]) -> str:
    """Return the family of KNOWN whose tensors have these names; empty where it is none of these."""
    every = list(names)
    for family, signs in KNOWN:
        if all(any(sign in name for name in every) for sign in signs):
            return family
    tower = any("vision_tower.vision_model." in n or "vision_tower.encoder." in n for n in every)
    language = any("language_model." in n and ".layers." in n for n in every)
    expert = any("gemma_expert" in n or "lm_expert" in n or ".dit." in n for n in every)
    if tower and language and not expert:
        return "PaliGemma alone: there is no action expert, and no config.json of LeRobot's pi0-FAST"
    return ""


def refuse(names: Iterable[str], where: str) -> None:
    """Raise WeightsError where tensors with these names are of a family that vlafit does not have."""
    family = name_family(names)
    if family:
        raise WeightsError(
            f"{where}: these are the weights of {family}; vlafit reads no checkpoints of that family"
        )


def refuse_mix(names: Iterable[str], layouts: Mapping[str, tuple[str, ...]], where: str) -> None:
    """Raise WeightsError where tensors of several of the `layouts` (kind -> how its names begin) lie
    together.

    A single tensor of another layout is no mix: the layout of the others is meant, and it is surplus.
    """
    every = list(names)
    by_kind = {
        kind: [n for n in every if n.replace("._orig_mod.", ".").startswith(prefixes)]
        for kind, prefixes in layouts.items()
    }
    kinds = {kind: members for kind, members in by_kind.items() if len(members) > 1}
    if len(kinds) > 1:
        lines = [f"  {kind} ({len(m)}): {list_tensors(m, every=every)}" for kind, m in kinds.items()]
        raise WeightsError(f"{where}: a mix of several checkpoints' tensors:\n" + "\n".join(lines))
