"""Write a GR00T N1.7 as NVIDIA's folder: config.json, weights, processors, and a backbone that is not public.

Sizes that only NVIDIA's trainer reads are those of the public checkpoint.
"""

from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.groot import names, write_processors
from vlafit.checkpoints.formats.groot.config import (
    IMAGE_MARK,
    MODEL_TYPE,
    PUBLIC_BACKBONES,
    chat_of,
    image_token,
)
from vlafit.checkpoints.precision import dtype_name
from vlafit.checkpoints.tensor_files import write_json
from vlafit.codec import Codec, Tokenizer
from vlafit.codec.images import groot_crop
from vlafit.errors import WeightsError
from vlafit.nn.deferred import save_tensors
from vlafit.nn.flow import BETA_A, TIME_SCALE
from vlafit.nn.policy import Policy
from vlafit.policies.groot import BUCKETS, SIZES, Groot, GrootConfig

BACKBONE = "backbone"  # folder of the backbone's config, where it is not the public one
ATTENDS = (
    "{program} attends to padding, which this policy was trained without; if that is meant, load it with "
    "config attend_padding = true"
)
TEMPLATE = (  # Qwen3-VL's, of a user's turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def refusals(policy: Policy, codec: Codec | None) -> list[str]:
    """Say why NVIDIA's program cannot hold this policy; empty where it can."""
    if not isinstance(policy, Groot):
        return ["it only holds GR00T N1.7"]
    reasons = chat_refusals(policy, codec)
    if not policy.config.attend_padding:
        reasons.append(ATTENDS.format(program="NVIDIA's program"))
    return reasons if codec is None else reasons + write_processors.refusals(policy, codec)


def chat_refusals(policy: Groot, codec: Codec | None) -> list[str]:
    """Say whether the program would write other tokens around the instruction than the policy does."""
    chat, vocabulary = policy.config.chat, policy.config.language.vocab
    words = None if codec is None else codec.tokenizer
    if not has_public_backbone(policy.config) and (words is not None or chat == SIZES["groot"].chat):
        token = image_token(words, chat)
        if token is None or token >= vocabulary:
            found = "it has none" if token is None else f"it is {token} of {vocabulary}"
            return [f"its tokenizer needs a token {IMAGE_MARK!r}, where programs put an image; {found}"]
    if chat == SIZES["groot"].chat:
        return []
    if codec is None or codec.tokenizer is None:
        return [
            "its chat turn is not that of Qwen's vocabulary, and there is no tokenizer that tells another"
        ]
    try:
        made = chat_of(codec.tokenizer, "the codec")
    except WeightsError as error:
        return [str(error)]
    if made != chat:
        return [f"its chat turn is {chat}, and GR00T's programs make {made} with this tokenizer"]
    return []


def write(folder: Path, policy: Policy, codec: Codec | None) -> tuple[str, ...]:
    """Write everything into the empty `folder`; return what to know about it."""
    assert isinstance(policy, Groot)
    write_model(folder, policy, f"./{BACKBONE}")
    words = None if codec is None else codec.tokenizer
    if not has_public_backbone(policy.config):
        write_backbone(folder / BACKBONE, policy.config, words)
    if codec is None:
        return ("there is no codec: states and actions are in the units that the policy takes",)
    codec.required_tokenizer.save(folder / "tokenizer")
    return write_processors.write(folder, policy, codec, backbone_of(policy, f"./{BACKBONE}"))


def backbone_of(policy: Groot, own: str) -> str:
    """Return the name of the backbone: of the public one, or where its own lies."""
    return PUBLIC_BACKBONES[0] if has_public_backbone(policy.config) else own


def write_model(folder: Path, policy: Groot, backbone: str) -> None:
    """Write config.json and the weights; `backbone` is where that model's config lies if it is not public."""
    weights = {name: p.detach().cpu() for name, p in policy.named_parameters()}
    tensors = names.written(weights, policy.config.vision.patch)
    save_tensors(
        {n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_json(folder / "config.json", describe(policy, backbone_of(policy, backbone)))


def describe(policy: Groot, backbone: str) -> dict[str, Any]:
    """Return what config.json says."""
    c, expert = policy.config, policy.config.expert
    dtype = dtype_name(policy)
    dropout = {"dropout": expert.dropout, "final_dropout": True, "positional_embeddings": None}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GR00TN17"],
        "dtype": dtype,  # programs round the weights to bfloat16 where these three are not there
        "model_dtype": dtype,
        "load_bf16": dtype == "bfloat16",
        "model_name": backbone,
        "backbone_model_type": "qwen",
        "backbone_embedding_dim": c.language.width,
        "select_layer": c.language.depth,
        "reproject_vision": False,
        "image_target_size": [c.image_size, c.image_size],
        "image_crop_size": [groot_crop(c.image_size)] * 2,
        "shortest_image_edge": None,
        "crop_fraction": None,
        "formalize_language": True,
        "apply_sincos_state_encoding": False,
        "max_state_dim": c.state_dim,
        "max_action_dim": c.action_dim,
        "action_horizon": c.chunk,
        "hidden_size": expert.hidden,
        "input_embedding_dim": expert.width,
        "state_history_length": 1,
        "add_pos_embed": True,
        "use_vlln": True,
        "max_seq_len": c.positions,
        "use_alternate_vl_dit": True,
        "attend_text_every_n_blocks": expert.text_every,
        "diffusion_model_cfg": {
            **dropout,
            "num_layers": expert.depth,
            "num_attention_heads": expert.heads,
            "attention_head_dim": expert.width // expert.heads,
            "norm_type": "ada_norm",
            "output_dim": expert.hidden,
            "interleave_self_attention": True,
        },
        "vl_self_attention_cfg": {
            **dropout,
            "num_layers": expert.memory_depth,
            "num_attention_heads": expert.memory_heads,
            "attention_head_dim": c.language.width // expert.memory_heads,
        },
        "num_inference_timesteps": policy.steps,
        "noise_beta_alpha": BETA_A,
        "noise_beta_beta": 1.0,
        "noise_s": TIME_SCALE,
        "num_timestep_buckets": BUCKETS,
        "state_dropout_prob": c.state_dropout,
        "exclude_state": False,
        "max_num_embodiments": c.embodiments,
    }


def has_public_backbone(config: GrootConfig) -> bool:
    """Whether the backbone is the published one, except for text layers that were cut off."""
    public = SIZES["groot"]
    same = {**vars(config.language), "depth": 0} == {**vars(public.language), "depth": 0}
    return same and config.vision == public.vision and config.chat == public.chat


def write_backbone(folder: Path, config: GrootConfig, tokenizer: Tokenizer | None) -> None:
    """Write the config.json of a Qwen3-VL of these sizes, and what transformers' processor of one reads.

    `tokenizer` makes its prompts; without one there is no processor.
    """
    v, lang, chat = config.vision, config.language, config.chat
    image = image_token(tokenizer, chat)
    assert image is not None  # refusals ask for one
    taken = {*chat.opening, *chat.closing, chat.image_start, chat.image_end, chat.pad, image}
    video = next(number for number in reversed(range(lang.vocab)) if number not in taken)  # no prompt has one
    folder.mkdir()
    write_json(folder / "config.json", {
        "model_type": "qwen3_vl",
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": chat.image_start,
        "vision_end_token_id": chat.image_end,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "head_dim": lang.head_dim,
            "hidden_act": "silu",
            "hidden_size": lang.width,
            "intermediate_size": lang.mlp,
            "num_attention_heads": lang.heads,
            "num_hidden_layers": lang.depth,
            "num_key_value_heads": lang.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": list(lang.sections),
                "rope_theta": lang.rope_base,
                "rope_type": "default",
            },
            "tie_word_embeddings": True,
            "vocab_size": lang.vocab,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": list(v.deepstack),
            "depth": v.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": v.width,
            "in_channels": 3,
            "intermediate_size": v.mlp,
            "num_heads": v.heads,
            "num_position_embeddings": v.side**2,
            "out_hidden_size": lang.width,
            "patch_size": v.patch,
            "spatial_merge_size": v.merge,
            "temporal_patch_size": 2,
        },
    })  # fmt: skip
    if tokenizer is not None:
        tokenizer.save(folder)
        _write_image_processor(folder, config)


def _write_image_processor(folder: Path, config: GrootConfig) -> None:
    v = config.vision
    pixels = (v.patch * v.merge) ** 2
    images = {
        "patch_size": v.patch,
        "merge_size": v.merge,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": pixels, "longest_edge": 2**14 * pixels},
    }
    write_json(
        folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast", **images}
    )
    write_json(
        folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor", **images}
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
