"""Write pi0-FAST as openpi's JAX code reads it: an Orbax folder of the tree, and norm_stats.json.

The tree is that of `jax.RULES`, turned back. Layers are written one after the other, so that no whole stack
of them is in memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlafit.checkpoints.formats.openpi import jax
from vlafit.checkpoints.formats.openpi.orbax import METADATA
from vlafit.checkpoints.formats.openpi.variants import variants
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.policies.pi0_fast import Pi0Fast, Pi0FastConfig

ROOT = "params"  # of the tree, and the name of its folder
DICT_KEY = 2  # Orbax: the key is that of a dictionary
ACTION_TOKENIZER = "action_tokenizer"
PUBLIC_TOKENS = 2048  # of physical-intelligence/fast, which openpi loads


def tree(config: Pi0FastConfig, weights: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return every leaf by its name: its layers, or the leaf alone, as views where that is possible."""
    leaves: dict[str, list[Tensor]] = {}
    for leaf, rule in jax.RULES.items():
        depth = config.vision.depth if leaf.startswith(jax.IMG) else config.language.depth
        layers = range(depth) if rule.layered else range(1)
        if any(name.format(0) not in weights for name in rule.names):
            continue
        heads = _heads(config, leaf)
        leaves[leaf] = [
            rule.turn.leaf(tuple(weights[name.format(i)] for name in rule.names), heads) for i in layers
        ]
    return leaves


def _heads(config: Pi0FastConfig, leaf: str) -> int:
    if leaf.startswith(jax.IMG):
        return config.vision.heads
    return config.language.kv_heads if "/kv_einsum" in leaf else config.language.heads


def refusals(policy: Pi0Fast, codec: Codec | None) -> list[str]:
    """Say what of a policy and codec openpi's pi0-FAST cannot do, beside the sizes."""
    reasons = []
    if policy.config.rules != "openpi":
        reasons.append('openpi has its own rules of tokens, and this policy LeRobot\'s (rules = "lerobot")')
    if not policy.config.tied:
        reasons.append("openpi's output layer is the token embedding; this policy's is a tensor of its own")
    if codec is None:
        return reasons
    form, writing = codec.config, codec.config.action_tokens
    if form.prompt != "pi0_fast":
        reasons.append(f"openpi asks pi0-FAST with the prompt 'pi0_fast', this codec with {form.prompt!r}")
    if writing is not None and (writing.begins_with_bos or writing.fit):
        reasons.append(
            "openpi writes no begin before the actions, and reads what is no chunk as 0; not this codec"
        )
    if writing is not None and writing.vocabulary != policy.config.language.vocab:
        reasons.append(
            f"openpi counts action tokens down from the policy's {policy.config.language.vocab} tokens, this "
            f"codec from {writing.vocabulary}"
        )
    return reasons


def write_params(folder: Path, policy: Pi0Fast) -> None:
    """Write the tree into the new `folder` as Orbax does. Raises WeightsError without tensorstore."""
    try:
        import tensorstore
    except ImportError as error:
        raise WeightsError(
            f"{folder}: an Orbax folder is written with tensorstore: pip install tensorstore"
        ) from error
    folder.mkdir()
    weights = {name: p.detach().cpu() for name, p in policy.named_parameters()}
    listed = {}
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    for name, layers in tree(policy.config, weights).items():
        pieces, layered = (ROOT, *name.split("/")), jax.RULES[name].layered
        shape = [*([len(layers)] if layered else []), *layers[0].shape]
        chunks = [*([1] if layered else []), *layers[0].shape]
        spec = {
            "driver": "zarr",
            "kvstore": {**base, "path": f"{'.'.join(pieces)}/"},
            "dtype": str(layers[0].dtype).removeprefix("torch."),
            "metadata": {"shape": shape, "chunks": chunks, "compressor": {"id": "zstd", "level": 1}},
            "store_data_equal_to_fill_value": True,
        }
        store = tensorstore.open(spec, create=True).result()
        for i, layer in enumerate(layers):
            (store[i] if layered else store).write(_numpy(layer)).result()
        listed[str(pieces)] = {
            "key_metadata": [{"key": piece, "key_type": DICT_KEY} for piece in pieces],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
    content = {
        "tree_metadata": listed, "use_ocdbt": True, "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True, "custom_metadata": None,
    }  # fmt: skip
    (folder / METADATA).write_text(json.dumps(content), encoding="utf-8")


def _numpy(tensor: Tensor) -> Any:
    if tensor.dtype != torch.bfloat16:
        return tensor.contiguous().numpy()
    from ml_dtypes import bfloat16

    return tensor.contiguous().view(torch.int16).numpy().view(bfloat16)


def write(folder: Path, policy: Pi0Fast, codec: Codec | None) -> tuple[str, ...]:
    """Write weights, config.json and action tokenizer; return what openpi's config must say."""
    write_params(folder / ROOT, policy)
    config = policy.config
    described: dict[str, Any] = {
        "action_dim": _action_dim(policy, codec),
        "action_horizon": config.chunk,
        "max_token_len": config.max_tokens + config.action_tokens,
        "paligemma_variant": variants(config)["language"],
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    sizes = ", ".join(f"{key}={value}" for key, value in described.items() if isinstance(value, int))
    notes = [f"openpi's config must say Pi0FASTConfig({sizes})"]
    if codec is None or codec.action_tokenizer is None:
        return tuple(notes)
    (folder / ACTION_TOKENIZER).mkdir()
    codec.action_tokenizer.save(folder / ACTION_TOKENIZER)
    size = codec.action_tokenizer.vocab_size
    if size != PUBLIC_TOKENS:
        notes.append(
            f"openpi decodes with physical-intelligence/fast, and this policy's {ACTION_TOKENIZER}/ has "
            f"{size} tokens: give openpi's FASTTokenizer that folder (fast_tokenizer_path), with "
            "processing_action_tokenizer.py from physical-intelligence/fast in it"
        )
    return tuple(notes)


def _action_dim(policy: Pi0Fast, codec: Codec | None) -> int:
    """openpi decodes chunks of so many dimensions: the robot's own, which are not padded for tokens."""
    return policy.config.action_dim if codec is None else codec.columns.action_dimensions
