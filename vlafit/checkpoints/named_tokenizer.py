"""Open a tokenizer by its name: a folder, a file, one that ships, or an id of the Hub."""

from vlafit import shipped
from vlafit.checkpoints import hub
from vlafit.codec.tokenizer import Tokenizer
from vlafit.codec.tokenizer import load as load_tokenizer
from vlafit.errors import ConfigError
from vlafit.files import expand_user

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def open_named(name: str) -> Tokenizer:
    """Return the tokenizer that `policy.tokenizer` of a recipe, or `--tokenizer`, names.

    Raises ConfigError or WeightsError saying where it was looked for, CodecError where it is damaged.
    """
    local = expand_user(name)
    if local.exists():
        return load_tokenizer(local)
    try:
        return load_tokenizer(shipped.find("tokenizer", name))
    except ConfigError:
        if hub.parse(name) is None:
            raise
    return load_tokenizer(hub.place(name, FILES).path)
