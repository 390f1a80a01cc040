"""Encode a question about images, which has no state and no actions, for a policy that also learns answers.

The images take the first camera slots, the answer's tokens the place of a chunk's. The action mask is False
everywhere, so that the loss of actions looks at nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.action_bins import BINS
from vlafit.codec.codec import Codec
from vlafit.codec.encoded import Encoded, Key
from vlafit.codec.images import fit_image
from vlafit.codec.prompts import FORMS
from vlafit.errors import CodecError


def encode_answer(
    codec: Codec, images: Sequence[NDArray[np.uint8]], prompt: str, answer: str, key: Key
) -> Encoded:
    """Return the sample of pictures [h, w, 3], a question and its answer.

    Raises CodecError where the policy has no room for it, or cannot learn answers.
    """
    config = codec.config
    if not 1 <= len(images) <= len(config.cameras):
        raise CodecError(
            f"a question has {len(images)} pictures, and the policy {len(config.cameras)} camera slots; "
            "leave pictures out, or the question"
        )
    size = config.image_size
    pictures = np.zeros((len(config.cameras), 3, size, size), np.uint8)
    for slot, image in enumerate(images):
        pictures[slot] = fit_image(image, size, config.framing).transpose(2, 0, 1)
    tokens, token_mask = prompt_tokens(codec, prompt)
    targets, target_mask = answer_tokens(codec, answer)
    actions = np.zeros((config.chunk, config.action_dim), np.float32)
    return Encoded(
        images=pictures,
        image_mask=np.arange(len(config.cameras)) < len(images),
        tokens=tokens,
        token_mask=token_mask,
        state=np.zeros(config.state_dim, np.float32),
        actions=actions,
        action_mask=np.zeros(actions.shape, np.bool_),
        key=key,
        target_tokens=targets,
        target_mask=target_mask,
        embodiment_id=None if codec.embodiment_id is None else np.asarray(codec.embodiment_id),
    )


def prompt_tokens(codec: Codec, prompt: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the tokens of a question and their mask. Raises CodecError where there is no room."""
    form = codec.config.prompt
    pieces = None if form is None else FORMS[form].question
    if pieces is None or codec.config.history > 1:
        raise CodecError(f"a policy with the prompt {form!r} learns no answers to questions")
    return codec.tokenise(pieces(prompt))


def answer_tokens(codec: Codec, answer: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return an answer's tokens with the end, padded, and their mask.

    Raises CodecError where there is no room, or a token of it stands for actions.
    """
    words, longest, eos, actions, first = codec.required_tokenizer, *_written(codec)
    own = words.encode(answer.strip())
    taken = [token for token in own if token in actions]
    if taken:
        raise CodecError(
            f"the answer {answer!r} has tokens ({words.decode(taken)!r}) that stand for actions here, ids "
            f"{actions[0]} to {actions[-1]}; write it in other words, or leave it out"
        )
    ids = [*first, *own, eos]
    if len(ids) > longest:
        raise CodecError(
            f"the answer {answer!r} has {len(ids)} tokens with its end, the policy writes {longest}; shorten "
            "it, or raise policy.config.action_tokens (OpenVLA: answer_tokens)"
        )
    targets = np.full(longest, words.pad, np.int64)
    targets[: len(ids)] = ids
    return targets, np.arange(longest) < len(ids)


def _written(codec: Codec) -> tuple[int, int, range, list[int]]:
    """Return room, end, the ids of actions, and what every answer begins with."""
    if (text := codec.action_text) is not None:
        bos, eos = text.words.bos, text.words.eos
        assert bos is not None and eos is not None  # ActionText looked
        return text.config.longest, eos, text.ids, [bos] if text.config.begins_with_bos else []
    if (bins := codec.config.action_bins) is not None:
        return bins.longest, bins.eos, range(bins.end - BINS, bins.end), []
    raise CodecError("the policy writes no tokens, so it learns no answers to questions")
