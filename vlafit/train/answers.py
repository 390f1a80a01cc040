"""Mix questions about images into the demonstrations: which policies learn from them, and what."""

from collections.abc import Iterator, Sequence

from vlafit.agreement import Item
from vlafit.codec import Codec, Encoded
from vlafit.codec.answers import answer_tokens, encode_answer, prompt_tokens
from vlafit.datasets.order import BLOCK, shares
from vlafit.datasets.vision_language import VisionLanguageSet
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.policy import ERROR, Policy
from vlafit.policies import family_name
from vlafit.recipe import Recipe
from vlafit.train.data import Data

LEARNERS = (
    'pi0.5 with policy.config.action_tokens above 0 (strategy "insulated"), pi0-FAST, and OpenVLA with the '
    'head "tokens"'
)


class AnswerSamples:
    """The encoded samples of several sets of questions, by their place in one row of all."""

    def __init__(self, sets: Sequence[tuple[VisionLanguageSet, Sequence[int]]], codec: Codec) -> None:
        """`sets` have the positions of their questions that are used. Any codec of the run will do."""
        self._places = [(one, number) for one, numbers in sets for number in numbers]
        self._codec = codec

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> Encoded:
        """Raises DataError for a damaged picture, CodecError for a text without room, naming the line."""
        one, number = self._places[position]
        question = one.questions[number]
        pictures = one.pictures(number)
        try:
            return encode_answer(
                self._codec, pictures, question.prompt, question.answer, (one.name, question.place, 0)
            )
        except CodecError as error:
            raise CodecError(f"{one.where(number)}: {error}") from error


def training_samples(data: Data, codec: Codec) -> AnswerSamples:
    """Return the questions of a run that are trained on, set after set."""
    return AnswerSamples([(one, one.training) for one in data.vision_language], codec)


def require_learnable(data: Data, policy: Policy, codec: Codec) -> None:
    """Raise ConfigError where the policy learns no answers, CodecError for a text that it has no room for.

    Every question and answer is tokenised once, so that one that does not fit is an error now.
    """
    if not data.vision_language:
        return
    if not policy.needs().learns_answers:
        names = ", ".join(one.name for one in data.vision_language)
        raise ConfigError(
            f"data.vision_language ({names}) has no effect: this {family_name(policy)!r} learns no text, so "
            f"nothing of an answer could be learned. What does: {LEARNERS}"
        )
    for one in data.vision_language:
        for number, question in enumerate(one.questions):
            try:
                prompt_tokens(codec, question.prompt)
                answer_tokens(codec, question.answer)
            except CodecError as error:
                raise CodecError(f"{one.where(number)}: {error}") from error
            if len(question.images) > (slots := len(codec.config.cameras)):
                raise CodecError(
                    f"{one.where(number)}: has {len(question.images)} pictures, and the policy {slots} "
                    "camera slots; leave some out, or the question"
                )


def items(recipe: Recipe, data: Data, policy: Policy) -> Iterator[Item]:
    """Return what each set of questions trains, and how often its questions are seen."""
    if not data.vision_language:
        return
    weights = [*data.weights, *(one.weight for one in data.vision_language)]
    samples = recipe.train.steps * recipe.train.samples
    own = shares(weights)[len(data.weights) :]
    rest = "; the actions' loss leaves them out" if ERROR in policy.terms() else ""
    for one, share in zip(data.vision_language, own, strict=True):
        seen = share / BLOCK * samples / len(one.training)
        yield Item(
            f"vision-language {one.name}",
            {"dataset": f"{len(one.training)} questions of {one.file.name}, {len(one.validation)} held out"},
            f"{share / BLOCK:.4g} of the samples, {seen:.3g} epochs: train by the token loss{rest}",
            "chosen",
            "data.vision_language",
        )
