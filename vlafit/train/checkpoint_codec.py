"""Decide what a foreign checkpoint's codec is made of; `vlafit inspect` asks the same questions."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlafit import checkpoints
from vlafit.checkpoints.named_tokenizer import open_named
from vlafit.codec import Codec
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import ConfigError
from vlafit.nn.policy import Policy
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import tokenizer as tokenizers


@dataclass(frozen=True)
class CodecChoice:
    """What a recipe and a checkpoint's files decide before its weights are read."""

    declared: checkpoints.Declaration
    named: Tokenizer | None
    """The tokenizer of `policy.tokenizer`."""
    makes_codec: bool
    """Whether that tokenizer is passed to `load`, which makes a codec of the checkpoint's statistics with it.
    """

    @property
    def passed(self) -> Tokenizer | None:
        """Return the tokenizer to pass to `load`."""
        return self.named if self.makes_codec else None


def choose(recipe: Recipe, path: Path) -> CodecChoice:
    """Return what the recipe and the files of its checkpoint in `path` decide.

    Raises as `open_named` does.
    """
    chosen = recipe.policy
    foreign = not (path / "policy.json").is_file()
    declared = checkpoints.declaration(path, chosen.base or None)
    named = open_named(chosen.tokenizer) if chosen.tokenizer else None
    return CodecChoice(
        declared, named, foreign and takes_tokenizer(path, chosen, declared, recipe.fits_statistics)
    )


def takes_tokenizer(
    path: Path, chosen: PolicyRecipe, declared: checkpoints.Declaration, fitted: bool
) -> bool:
    """Return whether the recipe's tokenizer makes a codec of what a foreign checkpoint declares."""
    if chosen.tokenizer and declared.tokenizer_tells:
        return True
    # Statistics of several datasets become a codec only once the user chooses some.
    if not chosen.tokenizer or (declared.named_statistics and not chosen.assets):
        return False
    # Some checkpoints' statistics, and the form of their prompts, become a codec only with a tokenizer.
    if not checkpoints.wants_tokenizer(path, chosen.base or None):
        return False
    asked = checkpoints.parse_config(chosen.config).for_a_codec
    return bool(declared.tokenizer or chosen.assets or asked or not fitted)


def require_effect(recipe: Recipe, codec: Codec, base: Path, *, own_tokenizer: bool) -> None:
    """Raise ConfigError for fields that the codec of the checkpoint `base` would silently override."""
    if recipe.policy.tokenizer and own_tokenizer:
        raise ConfigError(
            f"policy.tokenizer {recipe.policy.tokenizer!r} has no effect: the weights of checkpoint {base} "
            'only work with their own tokenizer; set policy.tokenizer = ""'
        )
    requested, used = recipe.data.normalisation, codec.config.normalisation
    if requested not in ("", used) and recipe.data.statistics == "checkpoint":
        raise ConfigError(
            f"data.normalisation {requested!r} has no effect with the statistics of checkpoint {base}, which "
            f'normalises by {used!r}; set it to "", or fit new statistics: data.statistics = "data"'
        )


def require_tokenizer(
    recipe: Recipe, policy: Policy, path: Path, choice: CodecChoice, fresh: Collection[str], has_codec: bool
) -> Tokenizer | None:
    """Return the tokenizer for prompts, the checkpoint's own where the recipe names none; None without one.

    The checkpoint's own counts as its files' word, also where the recipe names the same one.
    `fresh` are the names of weights that were drawn anew. Raises ConfigError where pretrained weights have no
    tokenizer, CodecError where it cannot be theirs.
    """
    pretrained = not tokenizers.language_is_fresh(policy, fresh)
    opened, own, declared = choice.named, choice.declared.own_tokenizer, choice.declared
    is_own = opened is None
    if own is not None and not has_codec and pretrained:
        held = open_named(str(own))
        is_own = opened is None or opened.is_same(held)
        opened = opened or held
    if policy.needs().prompt is not None:
        if opened is None and not has_codec and pretrained:
            tokenizers.require_given(policy, str(path), declared.tokenizer, declared.lost_tokenizer)
        if opened is not None:
            name = recipe.policy.tokenizer or str(own)
            tokenizers.require_fitting(opened, name, policy, pretrained and not is_own)
    return opened
