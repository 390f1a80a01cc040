"""Checkpoints of families that are not ours, known by their tensors' names, to refuse them by name."""

from collections.abc import Iterable

from vlafit.checkpoints.tensor_lists import listed
from vlafit.errors import WeightsError

# family, and patterns of which each must be in some tensor's name. The first family that fits is named.
# Each is an attribute in the family's own code, which the comment names.
KNOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GR00T", ("action_head.", "backbone.eagle_model.")),  # gr00t/model: gr00t_n1.py, eagle_backbone.py
    ("OpenVLA", ("vision_backbone.featurizer.", "language_model.model.layers.")),  # modeling_prismatic.py
    ("OpenVLA-OFT's action head", ("mlp_resnet_blocks.",)),  # action_heads.py: a file of its own
    ("ACT", ("model.vae_encoder.",)),  # LeRobot's modeling_act.py
    ("ACT", ("model.encoder.layers.0.self_attn.in_proj_weight", "model.action_head.")),  # without its VAE
    ("LeRobot's diffusion policy", ("diffusion.unet.",)),  # modeling_diffusion.py
    ("VQ-BeT", ("vqbet.",)),  # LeRobot's modeling_vqbet.py
    ("TD-MPC", ("_dynamics.", "_Qs.")),  # LeRobot's modeling_tdmpc.py, and the original's TOLD
    ("X-VLA", ("transformer.soft_prompt_hub.",)),  # modeling_xvla.py, soft_transformer.py
    ("LeRobot's first pi0-FAST", ("model.pi0_paligemma.",)),  # modeling_pi0fast.py
)


def name_family(names: Iterable[str]) -> str:
    """Return the family whose tensors have these names; empty when it is none that we know."""
    every = list(names)
    for family, signs in KNOWN:
        if all(any(sign in name for name in every) for sign in signs):
            return family
    tower = any("vision_tower.vision_model." in n or "vision_tower.encoder." in n for n in every)
    language = any("language_model." in n and ".layers." in n for n in every)
    expert = any("gemma_expert" in n or "lm_expert" in n or ".dit." in n for n in every)
    if tower and language and not expert:
        return "pi0-FAST (or of PaliGemma alone): there is no action expert"
    return ""


_PALIGEMMA = "paligemma_with_expert.paligemma.model."
# What begins the names of our families' tensors, by the program that gives them.
OURS: dict[str, tuple[str, ...]] = {
    "LeRobot's SmolVLA": ("model.vlm_with_expert.",),
    "LeRobot's pi0 or pi0.5": ("model.paligemma_with_expert.",),
    "openpi's pi0 or pi0.5": (
        f"{_PALIGEMMA}vision_tower.vision_model.",
        f"{_PALIGEMMA}language_model.layers.",
    ),
    "transformers' pi0": (
        f"{_PALIGEMMA}vision_tower.encoder.",
        f"{_PALIGEMMA}vision_tower.embeddings.",
        f"{_PALIGEMMA}language_model.model.",
    ),
    "vlafit's own": ("vision.layers.", "language.layers.", "expert.layers."),
}


def refuse_mixed(names: Iterable[str], where: str) -> None:
    """Raise WeightsError where tensors of several of our families, or several programs' names, lie together.

    A single one under another program's name is no mix: the form of the others is meant, and it is surplus.
    """
    every = list(names)
    found = {
        kind: [n for n in every if n.replace("._orig_mod.", ".").startswith(signs)]
        for kind, signs in OURS.items()
    }
    kinds = {kind: members for kind, members in found.items() if len(members) > 1}
    if len(kinds) > 1:
        lines = [f"  {kind} ({len(m)}): {listed(m, every=every)}" for kind, m in kinds.items()]
        raise WeightsError(f"{where}: a mix of several checkpoints' tensors:\n" + "\n".join(lines))
