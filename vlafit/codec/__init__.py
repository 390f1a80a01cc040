"""The codec: transforms, statistics and prompts; the only door between robot units and tensors."""

from vlafit.codec.codec import Codec
from vlafit.codec.codec_config import CodecConfig
from vlafit.codec.codec_set import CodecSet
from vlafit.codec.encoded import Encoded
from vlafit.codec.normaliser import Normaliser
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer, train_word_tokenizer

__all__ = [
    "Codec",
    "CodecConfig",
    "CodecSet",
    "Encoded",
    "Normaliser",
    "Statistics",
    "Tokenizer",
    "train_word_tokenizer",
]
