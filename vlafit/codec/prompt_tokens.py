"""Turn the text of a prompt into tokens, padded to the length that a policy reads."""

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.codec_config import CodecConfig
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError, quoted


def padded(
    text: tuple[str, ...], tokenizer: Tokenizer, config: CodecConfig
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the tokens of a prompt's pieces and their mask, read-only. Raises CodecError for too many."""
    bos = tokenizer.bos
    if config.special_tokens == "tokenizer":
        ids = tokenizer.encode("".join(text), special=True)
    else:
        ids = [bos] if bos is not None and config.begins_with_bos else []
        for piece in text:
            ids.extend(tokenizer.encode(piece))
    room = config.max_tokens
    if len(ids) > room:
        raise CodecError(
            f"the prompt {quoted(''.join(text))} has {len(ids)} tokens, the policy takes {room}; "
            "shorten the instruction or raise max_tokens"
        )
    tokens = np.full(room, tokenizer.pad, dtype=np.int64)
    tokens[: len(ids)] = ids
    mask = np.arange(room) < len(ids)
    tokens.flags.writeable = mask.flags.writeable = False  # shared by every sample with this prompt
    return tokens, mask
