"""Write pi0 as transformers' PI0ForConditionalGeneration saves it; its config is written by that class."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlafit.checkpoints.formats.hf_transformers.names import LIVE, SAVED
from vlafit.checkpoints.name_map import back
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.nn.deferred import save_tensors
from vlafit.nn.policy import Policy
from vlafit.policies.pi0 import Pi0, Pi0Config

# Not from the package itself: for its names pyright reads all 400 models.
if TYPE_CHECKING:
    from transformers.models.pi0.configuration_pi0 import PI0Config
    from transformers.models.pi0.modeling_pi0 import PI0ForConditionalGeneration

SINCE = "5.23"  # the version whose names we know


def refusals(policy: Policy, codec: Codec | None) -> list[str]:
    """Say why transformers cannot hold this policy; empty where it can. It knows nothing of codecs."""
    if not isinstance(policy, Pi0) or policy.config.pi05:
        return ["transformers only supports pi0"]
    return []


def write(folder: Path, policy: Pi0, codec: Codec | None) -> tuple[str, ...]:
    """Write everything into the empty `folder`; return what to know about it."""
    model = skeleton(policy.config)
    weights = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    embedding = weights["language.embed_tokens.weight"]
    dead = torch.zeros(embedding.shape[0], policy.config.expert.width, dtype=embedding.dtype)
    tensors = back(weights, LIVE) | {LIVE.unused[0]: dead}
    expected = set(model.state_dict())
    if set(tensors) != expected:
        different = sorted(set(tensors) ^ expected)
        raise WeightsError(
            f"transformers {version('transformers')} names pi0's tensors otherwise than {SINCE}: "
            f"{different[:4]}; install {SINCE}"
        )
    bare = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    model.load_state_dict(bare, assign=True)
    # As the class's own save_pretrained, which would need every weight in memory.
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    saved = back(weights, SAVED) | {SAVED.unused[0]: dead}
    save_tensors(saved, folder / "model.safetensors", {"format": "pt"})
    if codec is None:
        return ("there is no codec: states and actions are in the units that the policy takes",)
    codec.save(folder)
    return ("transformers reads no codec: normalise states and actions, and tokenise, as codec.json says",)


def skeleton(config: Pi0Config) -> "PI0ForConditionalGeneration":
    """Return transformers' own model of these sizes on the meta device.

    Raises WeightsError where the installed version has none.
    """
    try:
        from transformers.models.pi0.modeling_pi0 import PI0ForConditionalGeneration
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"transformers {version('transformers')} has no pi0; install {SINCE} or newer"
        ) from error
    with torch.device("meta"):
        return PI0ForConditionalGeneration(_config(config))


def _config(config: Pi0Config) -> "PI0Config":
    from transformers.models.pi0.configuration_pi0 import PI0Config

    v, lang, expert = config.vision, config.language, config.expert
    text = {
        "model_type": "gemma",
        "hidden_size": lang.width,
        "num_hidden_layers": lang.depth,
        "intermediate_size": lang.mlp,
        "num_attention_heads": lang.heads,
        "num_key_value_heads": lang.kv_heads,
        "head_dim": lang.head_dim,
        "vocab_size": lang.vocab,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": v.width,
        "num_hidden_layers": v.depth,
        "intermediate_size": v.mlp,
        "num_attention_heads": v.heads,
        "patch_size": v.patch,
        "image_size": v.image_size,
        "vision_use_head": False,
    }
    return PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": lang.width,
            "image_token_id": lang.vocab,  # one past the vocabulary, as the public size has it
        },
        dit_config={**text, "hidden_size": expert.width, "intermediate_size": expert.mlp},
        chunk_size=config.chunk,
        max_state_dim=config.state_dim,
        max_action_dim=config.action_dim,
    )
