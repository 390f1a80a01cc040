"""The half of the live comparison that runs under LeRobot's own Python; it knows nothing of vlafit.

    PYTHON tests/parity/lerobot_side.py EXPORTED INPUTS OUT

loads the policy (with its adapters, where there are any) and both processors in EXPORTED, feeds them INPUTS,
and writes what comes out, with a checkpoint that LeRobot itself saved, into OUT. A tiny pi0 or pi0.5 is made
possible by telling LeRobot its sizes, which it otherwise has by name alone; nothing that computes is
replaced. SmolVLA is loaded as anybody would.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tell_sizes(kind: str, sizes: dict) -> None:
    """Make LeRobot build networks of our sizes, without the Hub."""
    if kind == "smolvla":
        return  # it takes any size, from the vision-language model's folder that we export beside it
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    lang, v = sizes["language"], sizes["vision"]
    for module in (modeling_pi0, modeling_pi05):
        mapping = module.CONFIG_MAPPING

        def config(variant: str, module=module) -> object:
            part = lang if variant == "gemma_2b" else sizes["expert"]
            heads = (lang["heads"], lang["kv_heads"], lang["head_dim"])
            return module.GemmaConfig(part["width"], lang["depth"], part["mlp"], *heads)

        def paligemma(mapping=mapping) -> object:
            made = mapping["paligemma"]()
            text, vision = made.text_config, made.vision_config
            vision.hidden_size, vision.num_hidden_layers = v["width"], v["depth"]
            vision.num_attention_heads, vision.patch_size = v["heads"], v["patch"]
            return Fixed(made, text, vision)

        class Fixed:
            """A config whose sizes of the image tower and vocabulary cannot be set otherwise."""

            def __new__(cls, made, text, vision):
                kept = {
                    (id(vision), "intermediate_size"): v["mlp"],
                    (id(vision), "projection_dim"): lang["width"],
                    (id(text), "vocab_size"): lang["vocab"],
                }
                for part in (text, vision):
                    base = type(part)

                    def set_fixed(self, name, value, base=base):
                        base.__setattr__(self, name, kept.get((id(self), name), value))

                    part.__class__ = type(
                        base.__name__, (base,), {"__setattr__": set_fixed, "model_type": base.model_type}
                    )
                return made

        def gemma(mapping=mapping, **values) -> object:
            return mapping["gemma"](**values | {"vocab_size": lang["vocab"]})

        module.get_gemma_config = config
        module.CONFIG_MAPPING = {"paligemma": paligemma, "gemma": gemma}


def main(exported: Path, inputs: Path, out: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    sizes = json.loads((inputs.parent / "sizes.json").read_text())
    words = json.loads((inputs.parent / "tasks.json").read_text())
    config = PreTrainedConfig.from_pretrained(exported)
    tell_sizes(config.type, sizes)
    policy_class = get_policy_class(config.type)
    if config.use_peft:  # as lerobot.policies.factory.make_policy does it
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(exported).base_model_name_or_path
        policy = policy_class.from_pretrained(base, config=config)
        policy = PeftModel.from_pretrained(policy, exported, is_trainable=True).eval().get_base_model()
    else:
        policy = policy_class.from_pretrained(exported, config=config).eval()
    there = {"tokenizer_processor": {"tokenizer_name": str(exported / "tokenizer")}}  # 0.6.1 looks in the cwd
    pre, post = make_pre_post_processors(config, pretrained_path=str(exported), preprocessor_overrides=there)
    given = load_file(inputs)
    noise, time = given.pop("noise"), given.pop("time")
    batch = pre({**given, "task": words})
    policy.model.sample_noise = lambda *_: noise
    policy.model.sample_time = lambda *_: time
    prepare = policy.prepare_images if config.type == "smolvla" else policy._preprocess_images
    velocities = []
    with torch.no_grad():
        images, _ = prepare(dict(batch))
        out_proj = policy.model.action_out_proj
        hook = out_proj.register_forward_hook(lambda module, x, y: velocities.append(y))
        loss, _ = policy.forward(dict(batch))
        hook.remove()
        actions = policy.predict_action_chunk(dict(batch), noise=noise)
        robot = post(actions)
        name = "num_steps" if config.type == "smolvla" else "num_inference_steps"
        setattr(policy.config, name, 1)
        once = policy.predict_action_chunk(dict(batch), noise=noise)
        setattr(policy.config, name, 10)
    out.mkdir(parents=True)
    found = {"loss": loss, "actions": actions, "robot": robot, "once": once, "velocity": velocities[0]}
    found |= {"images": torch.stack(images, 1)}
    found |= {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    save_file({name: value.contiguous() for name, value in found.items()}, out / "found.safetensors")
    if config.use_peft:
        return
    policy.save_pretrained(out / "saved")
    pre.save_pretrained(out / "saved")
    post.save_pretrained(out / "saved")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
