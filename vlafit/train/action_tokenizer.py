"""Choose a run's FAST action tokenizer: the checkpoint's, the recipe's, or one fitted to the data.

Pretrained weights know what each action token means, so for them none is ever made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlafit.agreement import Item
from vlafit.checkpoints import Declaration, hub
from vlafit.codec import Codec, CodecSet, fast
from vlafit.codec.action_bins import BINS, ActionBinConfig
from vlafit.codec.action_text import SKIPPED, ActionText, ActionTokenConfig
from vlafit.codec.fast import FastTokenizer
from vlafit.codec.tokenizer import Tokenizer
from vlafit.config import at
from vlafit.errors import CodecError, ConfigError
from vlafit.files import expand_user
from vlafit.nn.policy import Needs
from vlafit.policies import merge_dotted
from vlafit.recipe import PolicyRecipe
from vlafit.train.action_chunks import Chunks, normalised

FILES = (fast.FILE, fast.CONFIG)
PUBLIC = "physical-intelligence/fast"
FIT, FITTED = "fit", "fitted to the data"
ANEW = "the pretrained weights learn anew what each token means"
PUBLIC_TOKENS = 2048  # vocab_size in its processor_config.json
MOST_CHUNKS = 20_000  # that a tokenizer is fitted to, spread evenly over all
SMALLEST = 256  # every byte is a token


def choose(
    name: str,
    needs: Needs,
    chunks: Mapping[str, Chunks],
    words: Tokenizer | None,
    own: CodecSet | None,
    pretrained: str,
) -> FastTokenizer | None:
    """Return the action tokenizer of a run; None where the policy predicts numbers.

    `name` is `policy.action_tokenizer`, `chunks` are those of each embodiment, `own` the checkpoint's codecs;
    `pretrained` names the checkpoint where its language weights are kept. Raises ConfigError for a name
    without effect, and where there is none for pretrained weights; CodecError where the tokenizers do not
    fit the policy.
    """
    if needs.action_tokens is None:
        if name:
            raise ConfigError(
                f"policy.action_tokenizer {name!r} has no effect: the policy predicts actions as "
                f'{"numbers" if needs.action_bins is None else "bins"}; make it ""'
            )
        return None
    words = next(iter(own)).tokenizer if own is not None else words
    assert words is not None  # such a policy has a prompt
    require_special(words, needs)
    kept = None if own is None else next(iter(own)).action_tokenizer
    if name == FIT:
        return fit(chunks, needs, None if pretrained else words, kept)
    if kept is not None:
        if name and not open_named(name).is_same(kept):
            raise ConfigError(
                f"policy.action_tokenizer {name!r} is another than the checkpoint's: the weights of "
                f'{pretrained} only work with their own; set policy.action_tokenizer = "", or "fit" to teach '
                "them one of the data"
            )
        return kept
    if name:
        return open_named(name)
    if pretrained:
        raise ConfigError(
            f"{pretrained}: its weights are pretrained, and it holds no action tokenizer; set "
            f"policy.action_tokenizer to the one that they were trained with ({PUBLIC} on the Hub for the "
            "public ones: a folder with tokenizer.json and processor_config.json, or the id). To train from "
            'fresh weights: policy.fresh = ["language"]; to teach them one that is fitted to the data: '
            'policy.action_tokenizer = "fit"'
        )
    return fit(chunks, needs, words)


@dataclass(frozen=True)
class Origin:
    """Where the action tokenizer of a run comes from."""

    name: str = ""
    """Its name in the recipe or in the checkpoint's config; "": the checkpoint's own, or fitted."""
    kept: bool = False
    """Whether the checkpoint holds it."""
    pretrained: bool = False
    """Whether the language weights are the checkpoint's, which know what each of its tokens means."""
    stated: str = ""
    """The name of the one that the weights were trained with, where the checkpoint's files say it."""

    def item(self, text: ActionText) -> Item:
        """Return what holds, and what is only taken to be so: the files of other programs hold no tokens."""
        name, size = "action tokenizer", text.actions.vocab_size
        tokens = f"{size} tokens, at most {text.config.longest} a chunk"
        if self.kept or not self.name:
            source = "the checkpoint's" if self.kept else FITTED
            return Item(name, {}, f"FAST ({source}), {tokens}", "same")
        value = f"FAST ({FITTED if self.name == FIT else self.name}), {tokens}"
        if not self.pretrained or self.name == self.stated:
            return Item(name, {}, value, "same")
        if self.name == FIT:
            sides = {"checkpoint": self.stated or "its own", "recipe": FIT}
            return Item(name, sides, value, "differs", f"{ANEW}: train the language model")
        sides = {"checkpoint": self.stated or "does not say", "recipe": self.name}
        if self.stated == PUBLIC and size != PUBLIC_TOKENS:
            sides["checkpoint"] += f", {PUBLIC_TOKENS} tokens"
            reason = f'{ANEW}: train the language model, or set policy.action_tokenizer = "{PUBLIC}"'
            return Item(name, sides, value, "differs", reason)
        reason = "taken to be the weights' own: validation/token_accuracy at step 0 tells"
        return Item(name, sides, value, "assumed", reason)


def origin(chosen: PolicyRecipe, declared: Declaration, own: CodecSet | None, pretrained: bool) -> Origin:
    """Return where the action tokenizer of a run from a checkpoint comes from."""
    key = declared.action_tokenizer_key
    holds = own is not None and next(iter(own)).action_tokenizer is not None
    name = chosen.action_tokenizer
    if key and holds:  # made with the checkpoint's codec, of what the recipe names, or its program
        name = name or str(at(merge_dotted({}, chosen.config), key, "")) or declared.action_tokenizer
    kept = holds and (not name or (not key and name != FIT))  # `choose` refuses one that differs
    return Origin(name, kept, pretrained, declared.action_tokenizer)


def named_in(chosen: PolicyRecipe, key: str) -> dict[str, object]:
    """Return the recipe's config with `policy.action_tokenizer` under the `key` by which a format reads it.

    Raises ConfigError where the config names another one there.
    """
    name = chosen.action_tokenizer
    other = at(merge_dotted({}, chosen.config), key, name)
    if other != name:
        raise ConfigError(
            f"policy.action_tokenizer is {name!r}, and policy.config.{key} {other!r}: they mean the same; "
            "remove one"
        )
    return merge_dotted(merge_dotted({}, chosen.config), {key: name})


def open_named(name: str) -> FastTokenizer:
    """Return the tokenizer that `policy.action_tokenizer` names: a folder, or an id of the Hub.

    Raises ConfigError or WeightsError saying where it was looked for, CodecError where it is damaged.
    """
    local = expand_user(name)
    if local.exists() or hub.parse(name) is None:
        return fast.load(local)
    return fast.load(hub.place(name, FILES).path)


def settings(needs: Needs, kept: ActionTokenConfig | None = None) -> ActionTokenConfig | None:
    """Return how a policy wants actions written, in the checkpoint's form `kept` if it has one.

    None where it learns no tokens of FAST.
    """
    tokens = needs.action_tokens
    if tokens is None:
        return None
    if kept is not None:
        return replace(kept, longest=tokens.longest)
    return ActionTokenConfig(
        tokens.longest, needs.vocabulary, begins_with_bos=tokens.begins_with_bos, fit=tokens.begins_with_bos
    )


def adopted(codec: Codec, needs: Needs, actions: FastTokenizer | None) -> Codec:
    """Return the checkpoint's codec as it writes the action tokens of the policy, or writes none."""
    wanted = replace(
        codec.config, action_tokens=settings(needs, codec.config.action_tokens), action_bins=bins(needs)
    )
    if codec.config == wanted and codec.action_tokenizer is actions:
        return codec
    return codec.with_changes(config=wanted, action_tokenizer=actions)


def bins(needs: Needs) -> ActionBinConfig | None:
    """Return how a policy wants each value written as a token; None where it does not."""
    wanted = needs.action_bins
    return None if wanted is None else ActionBinConfig(wanted.end, wanted.longest, wanted.eos, wanted.ends)


def require_special(words: Tokenizer, needs: Needs) -> None:
    """Raise CodecError where the policy's bos and eos are not those of the tokenizer."""
    tokens = needs.action_tokens
    if tokens is None or tokens.bos is None:
        return
    if (words.bos, words.eos) != (tokens.bos, tokens.eos):
        raise CodecError(
            f"the tokenizer begins and ends a sequence with tokens {words.bos} and {words.eos}, the policy's "
            f"bos and eos are {tokens.bos} and {tokens.eos}; set policy.config.bos and policy.config.eos"
        )


def room(needs: Needs) -> int:
    """Return how many text tokens leave the last ids to action tokens: all where actions are numbers."""
    if needs.action_bins is not None:
        return needs.action_bins.end - BINS
    return needs.vocabulary if needs.action_tokens is None else needs.vocabulary - SKIPPED - SMALLEST


def fit(
    chunks: Mapping[str, Chunks],
    needs: Needs,
    words: Tokenizer | None,
    replaced: FastTokenizer | None = None,
) -> FastTokenizer:
    """Fit a tokenizer to the training chunks of every embodiment.

    It takes the ids that `words` leaves free, at most as many as the published one's default, or those of the
    one that it replaces. None are the words of pretrained weights, whose last tokens stand for actions, as in
    openpi.
    """
    taken = 0 if words is None else words.vocab_size
    free = needs.vocabulary - SKIPPED - taken
    if free < SMALLEST:
        raise CodecError(
            f"the policy's vocabulary of {needs.vocabulary} leaves {free} tokens for actions, beside "
            f"{taken} of text and {SKIPPED} special ones; at least {SMALLEST} are needed"
        )
    most = fast.VOCABULARY if replaced is None else min(replaced.vocab_size, fast.VOCABULARY)
    return fast.fit(normalised(chunks, MOST_CHUNKS), min(free, most))
