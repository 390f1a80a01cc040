"""The half of X-VLA's live comparison that runs under LeRobot's own Python; it knows nothing of vlafit.

    PYTHON tests/parity/xvla_side.py EXPORTED INPUTS OUT

loads policy and processors in EXPORTED as anybody would, feeds them INPUTS with the noise and the one draw of
time in there, and writes what comes out, with a checkpoint that LeRobot itself saved, into OUT.
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
    words = {"tokenizer_processor": {"tokenizer_name": str(exported / "tokenizer")}}
    pre, post = make_pre_post_processors(config, str(exported), preprocessor_overrides=words)
    given = load_file(inputs)
    noise, draw = given.pop("noise"), given.pop("draw")
    batch = pre({**given, "task": json.loads((inputs.parent / "tasks.json").read_text())})
    kept = torch.randn, torch.randn_like, torch.rand
    torch.randn = torch.randn_like = lambda *_, **__: noise
    torch.rand = lambda *_, **__: draw
    predicted = []
    with torch.no_grad():
        hook = policy.model.transformer.register_forward_hook(lambda module, x, y: predicted.append(y))
        loss, terms = policy.forward(dict(batch))
        hook.remove()
        actions = policy.predict_action_chunk(dict(batch))
        robot = post(actions)
    torch.randn, torch.randn_like, torch.rand = kept
    out.mkdir(parents=True)
    found = {"loss": loss, "predicted": predicted[0], "actions": actions, "robot": robot}
    found |= {f"term.{name}": torch.tensor(value) for name, value in terms.items()}
    found |= {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    save_file({name: value.clone().contiguous() for name, value in found.items()}, out / "found.safetensors")
    for part in (policy, pre, post):
        part.save_pretrained(out / "saved")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
