"""Run by a Python that has LeRobot: read NVIDIA's folder of GR00T N1.7, and write what LeRobot makes of it.

    PYTHON tests/parity/groot_nvidia_side.py FOLDER TAG INPUTS OUT

INPUTS has states and chunks in the robot's units and answers of a policy; the network is opened, too.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(folder: Path, tag: str, inputs: Path, out: Path) -> None:
    from lerobot.lerobot_types import TransitionKey
    from lerobot.policies.groot import processor_groot as groot
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.groot_n1_7 import GR00TN17

    given = load_file(inputs)
    config = GrootConfig(base_model_path=str(folder), embodiment_tag=tag, device="cpu")
    width = given["answer"].shape[-1]
    config.max_state_dim = config.max_action_dim = width
    assets = groot._load_n1_7_checkpoint_processor_assets(config)
    assert assets is not None
    horizon = assets.max_action_horizon
    pack = groot.GrootN17PackInputsStep(
        action_horizon=horizon, valid_action_horizon=assets.valid_action_horizon, max_state_dim=width,
        max_action_dim=width, embodiment_tag=tag, embodiment_mapping=assets.embodiment_mapping,
        stats=assets.stats, raw_stats=assets.raw_stats, modality_config=assets.modality_config,
        use_percentiles=assets.use_percentiles, clip_outliers=assets.clip_outliers,
        formalize_language=assets.formalize_language,
    )  # fmt: skip
    decode = groot.GrootN17ActionDecodeStep(
        raw_stats=assets.raw_stats, modality_config=assets.modality_config,
        use_percentiles=assets.use_percentiles, use_relative_action=assets.use_relative_action,
        pack_step=pack,
    )  # fmt: skip
    transition = {
        TransitionKey.OBSERVATION: {"observation.state": given["state"]},
        TransitionKey.COMPLEMENTARY_DATA: {"task": ["Pick up the red block!"] * len(given["state"])},
    }
    if "chunk" in given:
        transition[TransitionKey.ACTION] = given["chunk"]
    made = pack(transition)
    decoded = decode({TransitionKey.ACTION: given["answer"]})[TransitionKey.ACTION]
    found = {
        "state": made[TransitionKey.OBSERVATION]["state"][:, 0],
        "decoded": decoded,
        "embodiment_id": made[TransitionKey.COMPLEMENTARY_DATA]["embodiment_id"],
    }
    if "chunk" in given:
        found["chunk"] = made[TransitionKey.ACTION]
    network = GR00TN17.from_pretrained(str(folder))
    found["parameters"] = torch.tensor(sum(p.numel() for p in network.parameters()))
    found["first"] = network.action_head.state_encoder.layer1.W.detach().float()
    save_file({name: value.contiguous() for name, value in found.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
