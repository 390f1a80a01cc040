"""Compare the policy that a config.json names with that of the tensors beside it."""

from pathlib import Path

from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.errors import WeightsError

LEROBOT = (  # its `type`, LeRobot 0.6.1: the folders of lerobot/policies
    "act", "diffusion", "eo1", "evo1", "fastwam", "groot", "molmoact2", "multi_task_dit", "pi0", "pi05",
    "pi0_fast", "smolvla", "tdmpc", "vla_jepa", "vqbet", "wall_x", "xvla",
)  # fmt: skip
MODEL_TYPES = ("Gr00tN1d7", "gr00t_n1", "gr00t_n1_5", "openvla", "xvla", "pi0")
"""What NVIDIA, OpenVLA, X-VLA's authors and transformers write as `model_type`."""


def require(folder: Path, where: str, family: str, *own: str) -> None:
    """Raise WeightsError where config.json in `folder` names a policy that is not among `own`.

    `family` says in words whose the tensors are. A name that no program here writes says nothing.
    """
    values = read_json_if_present(folder / "config.json") or {}
    for key, known in (("type", LEROBOT), ("model_type", MODEL_TYPES)):
        stated = values.get(key)
        if isinstance(stated, str) and stated in known and stated not in own:
            raise mismatch(where, key, stated, family)


def mismatch(where: str, key: str, stated: object, family: str) -> WeightsError:
    """Return the error of a config.json that belongs to another policy than the tensors."""
    return WeightsError(
        f"{where}: config.json says {key} {stated!r}, the tensors are those of {family}: one of the two "
        "belongs to another checkpoint"
    )
