"""The only door between robot units and tensors.

`Codec.encode` turns an observation (or a training sample) into fixed-shape numpy arrays, `Codec.decode` turns
a policy's output back into actions of the robot. A codec is fitted once, saved in the checkpoint, and used by
training, evaluation and serving alike. Nothing here imports torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.codec import codec_file, prompt_tokens
from vlafit.codec.action_bins import ActionBins
from vlafit.codec.action_text import ActionText
from vlafit.codec.codec_config import CodecConfig, columns_of, normaliser, require_consistent
from vlafit.codec.encoded import Encoded
from vlafit.codec.fast import Detokenised, FastTokenizer
from vlafit.codec.images import fit_image
from vlafit.codec.normaliser import FAR, MixedNormaliser, Normaliser
from vlafit.codec.prompts import FORMS
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError, ConfigError
from vlafit.types import ActionChunk, Embodiment, Feature, Observation, Sample

CACHED_PROMPTS = 4096  # texts whose tokens are kept; without states in them, as many as instructions


class Codec:
    """Encodes and decodes for one embodiment. `statistics` has the keys "state" and "action".

    `embodiment_id` is the number of the embodiment in a `CodecSet` of several, which a batch then holds.
    """

    def __init__(
        self,
        config: CodecConfig,
        embodiment: Embodiment,
        statistics: Mapping[str, Statistics],
        tokenizer: Tokenizer | None,
        embodiment_id: int | None = None,
        action_tokenizer: FastTokenizer | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises CodecError or EmbodimentError where these do not belong together."""
        self.config = config
        self.embodiment = embodiment
        self.statistics = dict(statistics)
        self.tokenizer = tokenizer
        self.embodiment_id = embodiment_id
        self.action_tokenizer = action_tokenizer
        self.origin = dict(origin or {})
        """What the files that it was read from say beyond it, as JSON, so that their format can write them
        again. Nothing is computed from it.
        """
        self.columns = columns_of(config, embodiment)
        """What is learned of the robot's states and actions."""
        require_consistent(config, embodiment, self.columns, self.statistics, tokenizer)
        self.action_text = self._made_action_text()
        """How actions are written as tokens of the action tokenizer; None where they are not."""
        bins = config.action_bins
        self.action_bins = None if bins is None else ActionBins(bins, self.columns.action_dimensions)
        """How each value of an action is written as a token; None where it is not."""
        self._state = normaliser(config, "state", self.statistics["state"])
        self._action = normaliser(config, "action", self.statistics["action"])
        self._shapes = {camera.name: camera.shape for camera in embodiment.cameras}
        self._prompts: dict[tuple[str, ...], tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}

    @property
    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises CodecError where the policy reads no instruction, so that there is none."""
        if self.tokenizer is None:
            raise CodecError("the codec has no tokenizer: its policy reads no instruction")
        return self.tokenizer

    @classmethod
    def fit(
        cls,
        config: CodecConfig,
        embodiment: Embodiment,
        states: NDArray | Iterable[NDArray],
        action_windows: NDArray | Iterable[NDArray],
        tokenizer: Tokenizer | None,
    ) -> "Codec":
        """Return a codec with the statistics of `states` [N, s] and `action_windows` [M, a].

        Either may be an iterable of arrays, which is iterated several times; their rows count alike. With
        chunk-relative dimensions the windows hold the differences already
        (`vlafit.datasets.blocks_for_statistics` makes both).
        """
        robot = embodiment
        statistics = {
            "state": Statistics.of_blocks(_blocks(states), "state", robot.state.labels),
            "action": Statistics.of_blocks(_blocks(action_windows), "action", robot.action.labels),
        }
        return cls(config, embodiment, statistics, tokenizer)

    def encode(self, item: Sample | Observation) -> Encoded:
        """Encode a sample (actions included) or an observation (actions None).

        Raises CodecError naming the field that is not what the embodiment says, or not finite.
        """
        sample = item if isinstance(item, Sample) else None
        observation = item.observation if isinstance(item, Sample) else item
        state = self._column("state", observation.state, self.embodiment.state)
        normal = self._state.encode(self.columns.states(state))
        tokens, token_mask = self._tokens(observation.instruction, normal)
        images, image_mask, padded, history_mask = self._observed(observation)
        actions, action_mask = (None, None) if sample is None else self._chunk(sample, state)
        key = None if sample is None else sample.key
        number = None if self.embodiment_id is None else np.asarray(self.embodiment_id)
        targets, target_mask = None, None
        if self.action_text is not None and actions is not None:
            targets, target_mask = self.action_text.padded(actions[:, : self.columns.action_dimensions])
        elif self.action_bins is not None and actions is not None and action_mask is not None:
            own = slice(self.columns.action_dimensions)
            targets, target_mask = self.action_bins.padded(actions[:, own], action_mask[:, own])
        return Encoded(
            images,
            image_mask,
            tokens,
            token_mask,
            padded,
            actions,
            action_mask,
            key,
            history_mask,
            targets,
            target_mask,
            number,
        )

    def with_changes(
        self,
        *,
        config: CodecConfig | None = None,
        embodiment: Embodiment | None = None,
        embodiment_id: int | None = None,
        action_tokenizer: FastTokenizer | None = None,
    ) -> "Codec":
        """Return the codec with another config, embodiment, number or action tokenizer; the statistics stay.

        The action tokenizer goes with a config without action tokens. Raises as the constructor does.
        """
        config = config or self.config
        actions = action_tokenizer or self.action_tokenizer
        return Codec(
            config,
            embodiment or self.embodiment,
            self.statistics,
            self.tokenizer,
            self.embodiment_id if embodiment_id is None else embodiment_id,
            None if config.action_tokens is None else actions,
            self.origin,
        )

    def _observed(
        self, observation: Observation
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return images, image mask, padded state and history mask, with an axis o if there is a history."""
        length = self.config.history
        if length == 1:
            return *self._images(observation.images), self._padded_state(observation), None
        steps = [*observation.past[-(length - 1) :], observation]
        missing = length - len(steps)
        images = [self._images(step.images) for step in steps]
        states = [self._padded_state(step) for step in steps]
        rows = np.maximum(np.arange(length) - missing, 0)
        return (
            np.stack([image for image, _ in images])[rows],
            np.stack([mask for _, mask in images])[rows],
            np.stack(states)[rows],
            np.arange(length) >= missing,
        )

    def _padded_state(self, observation: Observation) -> NDArray[np.float32]:
        state = self._column("state", observation.state, self.embodiment.state)
        normal = self._state.encode(self.columns.states(state))
        padded = np.zeros(self.config.state_dim, dtype=np.float32)
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
            padded[: len(normal)] = normal
        if not np.isfinite(padded).all():
            raise CodecError(self._far_state(observation))
        return padded

    def encode_actions(self, actions: NDArray, observation: Observation) -> NDArray[np.float32]:
        """Turn actions [k, a] in the robot's units into the policy's output for `observation` [k, A].

        The inverse of `decode`, for k steps; padded dimensions are 0.
        """
        state = self._column("state", observation.state, self.embodiment.state)
        values = self.columns.actions(actions.astype(np.float64), state)
        padded = np.zeros((len(actions), self.config.action_dim), np.float32)
        padded[:, : values.shape[1]] = self._action.encode(values)
        return padded

    def detokenise(self, tokens: NDArray[np.integer]) -> Detokenised:
        """Turn a policy's action tokens [m] into its normalised, padded actions [t, A], and say if they are
        valid.

        Raises CodecError where the codec has no action tokens.
        """
        reader = self.action_text or self.action_bins
        if reader is None:
            raise CodecError("the policy answers with tokens, and its codec has neither tokenizer nor bins")
        chunk, valid = reader.decode(tokens, self.config.chunk)
        padded = np.zeros((self.config.chunk, self.config.action_dim))
        padded[:, : chunk.shape[1]] = chunk
        return Detokenised(padded, valid)

    def decode(self, actions: NDArray, observation: Observation) -> ActionChunk:
        """Turn a policy's output [t, A] for `observation` back into actions [t, a] in the robot's units.

        Where only the first steps were trained (`valid_steps`), those are returned. Raises CodecError where
        the shape is wrong, a value is not finite, or a rotation is none.
        """
        wanted = (self.config.chunk, self.config.action_dim)
        if actions.shape != wanted:
            raise CodecError(f"actions to decode have shape {actions.shape}, this codec decodes {wanted}")
        real = actions[: self.config.answered, : self.columns.action_dimensions]
        if not np.isfinite(real).all():
            reason = self._far_state(observation) or "the policy's weights or inputs are broken"
            raise CodecError(f"actions to decode are not finite: {reason}")
        state = observation.state
        if self.columns.is_relative:
            state = self._column("state", state, self.embodiment.state)
        decoded = self.columns.back(self._action.decode(real), state)
        return ActionChunk(decoded.astype(np.float32))

    def _far_state(self, observation: Observation) -> str:
        """Return a sentence on the state's dimension that is farthest outside the statistics, if one is."""
        learned = self.columns.states(observation.state.astype(np.float64))
        size = np.abs(self.unclipped("state").encode(learned))
        at = int(size.argmax())
        if size[at] <= FAR:
            return ""
        labels = self.columns.state_labels
        return (
            f"state.{labels[at] if labels else at} = {learned[at]:.4g} is far outside the statistics of the "
            f"checkpoint (normalised {size[at]:.3g}): is it in the units of the training data?"
        )

    @property
    def parts(self) -> codec_file.CodecParts:
        """What it is made of, beside the tokenizer."""
        return codec_file.CodecParts(
            self.config, self.embodiment, self.statistics, self.embodiment_id, self.origin
        )

    def save(self, folder: Path) -> None:
        """Write codec.json and tokenizer/ into `folder`."""
        codec_file.write(folder, [self.parts], self.tokenizer, self.action_tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Read what `save` wrote, of one embodiment.

        Raises CodecError or ConfigError naming what is missing or malformed, or the embodiments if there are
        several; see `CodecSet`.
        """
        parts, words, actions = codec_file.read(folder)
        if len(parts) > 1:
            names = ", ".join(one.embodiment.name for one in parts)
            raise ConfigError(
                f"{folder / 'codec.json'}: holds {len(parts)} embodiments ({names}); read it by CodecSet.load"
            )
        one = parts[0]
        return cls(one.config, one.embodiment, one.statistics, words, one.embodiment_id, actions, one.origin)

    def _made_action_text(self) -> ActionText | None:
        """Raises CodecError where action tokens lack a tokenizer, or a tokenizer has no use."""
        settings = self.config.action_tokens
        if (settings is None) != (self.action_tokenizer is None):
            has = "no action tokenizer" if self.action_tokenizer is None else "an action tokenizer"
            raise CodecError(f"codec config: action_tokens is {settings}, and there is {has}")
        if settings is None or self.action_tokenizer is None:
            return None
        prompt, dimensions = self.config.prompt, self.columns.action_dimensions
        announced = prompt is not None and FORMS[prompt].announces_actions
        return ActionText(settings, self.required_tokenizer, self.action_tokenizer, dimensions, announced)

    def _column(self, name: str, values: NDArray, feature: Feature) -> NDArray:
        if values.shape != feature.shape:
            raise CodecError(
                f"{name} has shape {values.shape}, embodiment {self.embodiment.name!r} says {feature.shape}"
            )
        if not np.isfinite(values).all():
            raise CodecError(f"{name} is not finite: {values}")
        return values

    def _tokens(
        self, instruction: str, state: NDArray
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
        if self.config.prompt is None or self.tokenizer is None:
            return None, None
        if not instruction.strip():
            raise CodecError("the instruction is empty; a policy must be told what to do")
        zeros = max(0, self.config.prompt_state - len(state))
        text = FORMS[self.config.prompt].pieces(instruction, np.pad(state, (0, zeros)) if zeros else state)
        cached = self._prompts.get(text)
        if cached is None:
            if len(self._prompts) >= CACHED_PROMPTS:
                self._prompts.clear()
            cached = self._prompts[text] = self.tokenise(text)
        return cached

    def tokenise(self, text: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the padded tokens of a prompt and their mask. Raises CodecError where there is no room."""
        return prompt_tokens.padded(text, self.required_tokenizer, self.config)

    def _images(self, frames: Mapping[str, NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        for name, image in frames.items():
            shape = self._shapes.get(name)
            if shape is None:
                self.embodiment.camera(name)
            if image.dtype != np.uint8 or image.shape != shape:
                raise CodecError(
                    f"camera {name!r} gives {image.dtype} {image.shape}, embodiment {self.embodiment.name!r} "
                    f"says uint8 {shape}"
                )
        c, size = self.config, self.config.image_size
        images = np.zeros((len(self.config.cameras), 3, size, size), dtype=np.uint8)
        mask = np.zeros(len(self.config.cameras), dtype=np.bool_)
        for slot, name in enumerate(self.config.cameras):
            if name in frames:
                fitted = fit_image(frames[name], size, c.framing, c.crop, c.letter_box)
                images[slot] = fitted.transpose(2, 0, 1)
                mask[slot] = True
        if any(self.config.cameras) and not mask.any():
            wanted = ", ".join(filter(None, self.config.cameras))
            raise CodecError(f"the observation has no image of any of the policy's cameras ({wanted})")
        return images, mask

    def _chunk(self, sample: Sample, state: NDArray) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        steps, robot = self.config.chunk, self.embodiment
        dimensions = robot.action.shape[0]
        values = sample.actions
        if values.shape != (steps, dimensions):
            raise CodecError(
                f"actions have shape {values.shape}, this codec takes {(steps, dimensions)}: chunk {steps}, "
                f"and {dimensions} dimensions of embodiment {robot.name!r}"
            )
        if sample.is_real.shape != (steps,) or sample.is_real.dtype != np.bool_:
            raise CodecError(
                f"is_real must be bool [{steps}], is {sample.is_real.dtype} {sample.is_real.shape}"
            )
        if not np.isfinite(values).all():
            step = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise CodecError(f"actions are not finite at step {step} of the chunk of sample {sample.key}")
        valid = self.config.answered
        if self.columns.is_relative:
            values = values.astype(np.float64)
        learned = self._action.encode(self.columns.actions(values[:valid], state))
        actions = np.zeros((steps, self.config.action_dim), dtype=np.float32)
        actions[:valid, : learned.shape[1]] = learned
        if not self.config.mask_padding:
            return actions, np.ones(actions.shape, dtype=np.bool_)
        mask = np.zeros(actions.shape, dtype=np.bool_)
        mask[:valid, : learned.shape[1]] = sample.is_real[:valid, None]
        return actions, mask

    @property
    def seen(self) -> dict[str, Statistics]:
        """The statistics of state and action, of all steps together where each step has its own."""
        return {name: statistics.overall for name, statistics in self.statistics.items()}

    def normaliser_of(self, column: Literal["state", "action"]) -> Normaliser | MixedNormaliser:
        """Return how a column is normalised, by the statistics that `seen` returns."""
        return normaliser(self.config, column, self.seen[column])

    def unclipped(self, column: Literal["state", "action"]) -> Normaliser | MixedNormaliser:
        """Return `normaliser_of` a column without its clipping, which hides how far outside a value lies."""
        return self.normaliser_of(column).unclipped(self.seen[column])

    def is_normalised(self, column: Literal["state", "action"]) -> NDArray[np.bool_]:
        """Return which learned dimensions of a column are normalised at all."""
        config, width = self.config, self.statistics[column].dimensions
        methods = config.state_methods if column == "state" else config.action_methods
        one = config.normalisation if column == "state" else config.of_actions
        return np.array([method != "identity" for method in methods or (one,) * width])


def _blocks(values: NDArray | Iterable[NDArray]) -> Iterable[NDArray]:
    return [values] if isinstance(values, np.ndarray) else values
