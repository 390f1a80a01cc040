"""Choose a run's tokenizer. None is ever made up for pretrained language weights.

The ids of a tokenizer are rows of the policy's embedding: with another tokenizer than the one of pretraining,
pretrained language weights read nonsense, and the loss does not tell.
"""

from collections.abc import Collection
from pathlib import Path

from vlafit.codec import prompts
from vlafit.codec.tokenizer import Tokenizer, train_word_tokenizer
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.policy import Needs, Policy
from vlafit.policies import family, family_name
from vlafit.train import action_tokenizer
from vlafit.train.data import Data

SMALLEST_SHARE = 0.75  # of a pretrained embedding's rows; embeddings are padded by a few rows at most
GIVE = (
    "policy.tokenizer takes a folder, a tokenizer.json, SentencePiece's .model, a Hub id, or a shipped name"
)


def language_is_fresh(policy: Policy, fresh: Collection[str]) -> bool:
    """Whether all language weights are among the names `fresh`; all weights where there is no such part."""
    infos = policy.parts()
    language = [info.name for info in infos if info.part == "language"] or [info.name for info in infos]
    return set(language) <= set(fresh)


def require_fitting(tokenizer: Tokenizer, name: str, policy: Policy, pretrained: bool) -> None:
    """Raise CodecError where a tokenizer's ids cannot be rows of the policy's embedding.

    For pretrained weights a much smaller vocabulary is an error, too: it is another model's.
    """
    size, room = tokenizer.vocab_size, policy.needs().vocabulary
    if size > room:
        raise CodecError(
            f"policy.tokenizer {name!r} has {size} tokens, the policy's embedding only {room} rows; use the "
            f"tokenizer of these weights{of_family(policy)}"
        )
    if pretrained and size < SMALLEST_SHARE * room:
        raise CodecError(
            f"policy.tokenizer {name!r} has {size} tokens, the pretrained embedding {room} rows: it is not "
            f"the tokenizer of these weights{of_family(policy)}. To train the language model from fresh "
            'weights: policy.fresh = ["language"]'
        )


def require_given(policy: Policy, where: str, wanted: str, lost: Path | None = None) -> None:
    """Raise ConfigError: pretrained language weights came without a tokenizer.

    `wanted` is the name of the tokenizer that the checkpoint's files ask for, "" if they name none; `lost`
    the folder that they name as the checkpoint's own, and that is not there.
    """
    if lost is not None:
        raise ConfigError(
            f"{where}: its language weights are pretrained, and its files keep their tokenizer in {lost}, "
            "which is not there; copy that folder again from where the checkpoint comes from, or set "
            f"policy.tokenizer to such a folder. {GIVE}"
        )
    names = f" ({wanted!r} in its files)" if wanted else ""
    raise ConfigError(
        f"{where}: its language weights are pretrained, and it holds no tokenizer{names}; set "
        f"policy.tokenizer to the one that they were trained with{of_family(policy)}. {GIVE}. To "
        'train the language model from fresh weights: policy.fresh = ["language"]'
    )


def learn(data: Data, needs: Needs) -> Tokenizer:
    """Train a tokenizer on the data's instructions, questions and answers, for language weights that are
    fresh."""
    assert needs.prompt is not None
    texts = [text for one in data.vision_language for text in one.texts()]
    words = [*data.instructions(), *texts, *prompts.FORMS[needs.prompt].vocabulary]
    return train_word_tokenizer(words, action_tokenizer.room(needs))


def of_family(policy: Policy) -> str:
    """Return the tokenizer that pretrained weights of this family need, for messages; empty if unknown."""
    return f": {text}" if (text := getattr(family(family_name(policy)), "TOKENIZER", "")) else ""
