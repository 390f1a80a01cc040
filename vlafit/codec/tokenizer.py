"""Text to token ids: a tokenizer folder as transformers writes it, or a small one trained on the spot.

Only local files are read. `tokenizer.json` is opened directly by the tokenizers library, so that loader
processes need not import transformers; a folder without one is converted by transformers. SentencePiece's
`.model` files are read by `sentencepiece.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlafit.codec import sentencepiece
from vlafit.codec import tokenizer_limits as limits
from vlafit.errors import CodecError, brief
from vlafit.files import irregular, parse_object, plain_text, require_regular_files, write_atomic

SPECIAL = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2 of a tokenizer trained here
SMALLEST = len(SPECIAL) + 256  # every byte is a token, so that any sentence can be encoded


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its special tokens. `bos` and `eos` are None where it has none; `pad` defaults to 0."""

    backend: tokenizers.Tokenizer
    pad: int
    bos: int | None
    eos: int | None

    def __post_init__(self) -> None:
        # An instruction that happens to contain "<eos>" is text, as for the reference's SentencePiece.
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()

    def __reduce__(self) -> tuple[object, ...]:  # the settings above are not in the backend's own pickle
        return Tokenizer, (self.backend, self.pad, self.bos, self.eos)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def is_same(self, other: "Tokenizer") -> bool:
        """Whether both make the same ids of every text."""
        special = (self.pad, self.bos, self.eos) == (other.pad, other.bos, other.eos)
        return special and self.backend.to_str() == other.backend.to_str()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of `text`; with `special` those that the tokenizer's own template adds, too."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers can load, too."""
        names = {"pad_token": self.pad, "bos_token": self.bos, "eos_token": self.eos}
        config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {name: self.backend.id_to_token(i) for name, i in names.items() if i is not None}
        write_atomic(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


WHOLE = "tokenizer.json"
"""The file of the tokenizers library."""


def load(folder: Path | str) -> Tokenizer:
    """Load the tokenizer in `folder`, or the tokenizer.json or SentencePiece `.model` file that it is.

    A tokenizer.json without a config beside it names its own special tokens: <pad>, <bos> and <eos>. So does
    one of another name, because a config beside it need not be its own.
    Raises CodecError where there is none, or it is damaged.
    """
    folder, name = Path(folder), WHOLE
    if folder.suffix == ".model" and folder.is_file():
        limits.require_small(folder)
        backend, ids = sentencepiece.read(folder)
        return Tokenizer(backend, ids.pad or 0, ids.bos, ids.eos)
    if folder.is_file():
        if folder.suffix != ".json":
            raise CodecError(
                f"{folder}: is not a tokenizer; give its folder, tokenizer.json, or SentencePiece's .model"
            )
        folder, name = folder.parent, folder.name
    if not folder.is_dir():
        kind = irregular(folder)
        fault = f"not a regular file but {kind}" if kind else "no such tokenizer folder"
        raise CodecError(f"{folder}: {fault}")
    require_regular_files(folder, (".json", ".model", ".txt"))
    limits.require_small_files(folder)
    path = folder / name
    if not path.is_file():
        return _through_transformers(folder)
    try:
        text = plain_text(path)
        limits.require_bounded(parse_object(text), path)
        backend = tokenizers.Tokenizer.from_str(text)
        config: dict[str, object] = {}
        listed = ("special_tokens_map.json", "tokenizer_config.json") if name == WHOLE else ()
        if not any((folder / name).is_file() for name in listed):
            config = _named_special_tokens(backend)
        for other in listed:
            if (folder / other).is_file():
                config |= parse_object(plain_text(folder / other))
    except CodecError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception on malformed files
        raise CodecError(f"{folder if name == WHOLE else path}: not a readable tokenizer: {error}") from error

    def special(name: str) -> int | None:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return None
        index = backend.token_to_id(str(token))
        if index is None:
            raise CodecError(f"{folder}: {name} {token!r} is not in the vocabulary of tokenizer.json")
        return index

    _require_words(backend, folder)
    return Tokenizer(backend, special("pad_token") or 0, special("bos_token"), special("eos_token"))


def _named_special_tokens(backend: tokenizers.Tokenizer) -> dict[str, object]:
    """Return the special tokens that are called as Gemma's, where no config says which they are."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return {f"{token[1:-1]}_token": token for token in SPECIAL if token in special}


def _through_transformers(folder: Path) -> Tokenizer:
    # Not from the package itself: for its names pyright reads all 400 models.
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and others here
        have = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise CodecError(
            f"{folder}: no tokenizer.json, and transformers makes no tokenizer of {have} "
            f"({brief(error)}); copy or download the folder again, with its tokenizer.json"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise CodecError(
            f"{folder}: {type(loaded).__name__} has no fast form; convert it to tokenizer.json first"
        )

    def special(token_id: object) -> int | None:
        return token_id if isinstance(token_id, int) else None

    pad, bos, eos = map(special, (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id))
    _require_words(loaded.backend_tokenizer, folder)
    return Tokenizer(loaded.backend_tokenizer, pad or 0, bos, eos)


def _require_words(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Raise CodecError where special tokens are all there is: every text would be one unknown token.

    Without a vocabulary beside it, transformers makes such a tokenizer of a tokenizer_config.json.
    """
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if not backend.get_vocab().keys() - special:
        have = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise CodecError(
            f"{folder}: the tokenizer has special tokens only, and no word; it has {have}: copy or download "
            "the folder again, with its tokenizer.json"
        )


def train_word_tokenizer(sentences: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `sentences`: frequent words become one token, any other text still encodes.

    Ids: 0 padding, 1 beginning, 2 end, then the 256 bytes, then merges, at most `vocab_size` in all.
    The result depends on nothing but the arguments. Raises CodecError where `vocab_size` is too small.
    """
    if vocab_size < SMALLEST:
        raise CodecError(
            f"vocab_size {vocab_size} (Needs.vocabulary of the policy) is too small: a byte-level tokenizer "
            f"has at least {SMALLEST} tokens, which are 256 bytes and {len(SPECIAL)} special ones"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sorted(sentences), trainer=trainer)
    return Tokenizer(backend, 0, 1, 2)
