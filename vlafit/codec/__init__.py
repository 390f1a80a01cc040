"""The codec: transforms, statistics and prompts; the only door between robot units and tensors."""

from vlafit.codec.codec import Codec, Encoded
from vlafit.codec.codec_config import CodecConfig
from vlafit.codec.codec_set import CodecSet
from vlafit.codec.statistics import Normaliser, Statistics
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
