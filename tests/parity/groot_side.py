"""The half of GR00T's live comparison that runs under LeRobot's own Python; it knows nothing of vlafit.

    PYTHON tests/parity/groot_side.py EXPORTED INPUTS OUT

loads the policy and both processors in EXPORTED as anybody would, feeds them INPUTS with the noise and time
in there, and writes what comes out, with a checkpoint that LeRobot itself saved, into OUT.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(exported: Path, inputs: Path, out: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(exported)
    policy = get_policy_class(config.type).from_pretrained(exported, config=config).eval()
    pre, post = make_pre_post_processors(config, pretrained_path=str(exported))
    given = load_file(inputs)
    noise, time = given.pop("noise"), given.pop("time")
    batch = pre({**given, "task": json.loads((inputs.parent / "tasks.json").read_text())})
    head = policy._groot_model.action_head
    head.sample_time = lambda *_, **__: time
    drawn, torch.randn = torch.randn, lambda *_, **__: noise
    velocities = []
    with torch.no_grad():
        hook = head.action_decoder.register_forward_hook(lambda module, x, y: velocities.append(y))
        loss, _ = policy.forward(dict(batch))
        hook.remove()
        actions = policy.predict_action_chunk(dict(batch))
        robot = post(actions)
    torch.randn = drawn
    out.mkdir(parents=True)
    found = {
        "loss": loss,
        "velocity": velocities[0][:, -noise.shape[1] :],
        "actions": actions,
        "robot": robot,
    }
    found |= {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    save_file({name: value.contiguous() for name, value in found.items()}, out / "found.safetensors")
    for part in (policy, pre, post):
        part.save_pretrained(out / "saved")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
