"""Write a FAST action tokenizer as LeRobot's pi0-FAST loads it: transformers' processor with its own code.

transformers finds the class of such a processor in a Python file beside it, so one is written. vlafit itself
runs no such file.
"""

from pathlib import Path

from vlafit.checkpoints.tensor_files import read_json_object, write_json
from vlafit.codec import fast
from vlafit.codec.fast import FastTokenizer

CODE = "processing_action_tokenizer.py"
CLASS = "UniversalActionProcessor"
SOURCE = '''"""FAST action tokenizer for transformers, by vlafit: discrete cosine transform, byte pairs."""

import numpy as np
from scipy.fft import dct, idct
from transformers.processing_utils import ProcessorMixin


class UniversalActionProcessor(ProcessorMixin):
    """Turns chunks of actions [b, t, a] into lists of token ids, and back."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer, scale=10, vocab_size=1024, min_token=0, action_dim=None, time_horizon=None):
        self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
        self.action_dim, self.time_horizon = action_dim, time_horizon
        super().__init__(tokenizer)
        self.bpe_tokenizer = self.tokenizer

    def __call__(self, action_chunk):
        chunks = np.asarray(action_chunk)
        chunks = chunks[None] if chunks.ndim == 2 else chunks
        self.time_horizon, self.action_dim = chunks.shape[-2:]
        coefficients = np.around(dct(chunks, axis=1, norm="ortho") * self.scale)
        points = np.maximum(coefficients - self.min_token, 0).astype(int).reshape(len(chunks), -1)
        texts = ["".join(map(chr, row)) for row in points]
        return [self.bpe_tokenizer(text)["input_ids"] for text in texts]

    def decode(self, tokens, *, time_horizon=None, action_dim=None):
        steps, width = time_horizon or self.time_horizon, action_dim or self.action_dim
        chunks = []
        for ids in tokens:
            text = self.bpe_tokenizer.decode(ids)
            values = np.array([ord(letter) + self.min_token for letter in text])
            if len(values) != steps * width:  # no chunk
                values = np.zeros(steps * width)
            chunks.append(idct(values.reshape(steps, width) / self.scale, axis=0, norm="ortho"))
        return np.stack(chunks)
'''


def write(folder: Path, tokenizer: FastTokenizer) -> None:
    """Write the tokenizer's files and the processor's code into the new `folder`."""
    folder.mkdir()
    tokenizer.save(folder)
    names = {"processor_class": CLASS, "auto_map": {"AutoProcessor": f"{CODE.removesuffix('.py')}.{CLASS}"}}
    path = folder / fast.CONFIG
    write_json(path, read_json_object(path) | names | {"action_dim": None, "time_horizon": None})
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False},
    )
    (folder / CODE).write_text(SOURCE, encoding="utf-8")
