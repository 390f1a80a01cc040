"""The only door between robot units and tensors.

`Codec.encode` turns an observation (or a training sample) into fixed-shape numpy arrays, `Codec.decode` turns
a policy's output back into actions of the robot. A codec is fitted once, saved in the checkpoint, and used by
training, evaluation and serving alike. Nothing here imports torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlafit import config as configuration
from vlafit.codec import prompts
from vlafit.codec import tokenizer as tokenizers
from vlafit.codec.images import Framing, fit_image
from vlafit.codec.prompts import Prompt
from vlafit.codec.statistics import Normalisation, Normaliser, Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError
from vlafit.files import parse_json, write_atomic
from vlafit.types import ActionChunk, Embodiment, Feature, Observation, Sample

FORMAT = 1  # of codec.json
CACHED_PROMPTS = 4096  # texts whose tokens are kept; with pi0 prompts there are as many as instructions

Key = tuple[str, str, int]


@dataclass(frozen=True)
class CodecConfig:
    """How observations become a policy's inputs."""

    cameras: tuple[str, ...]
    """The policy's camera slots in order: names of the embodiment's cameras; empty: always missing."""
    image_size: int
    """Pixels of each side of the policy's images."""
    state_dim: int
    """Dimensions of the policy's state, S; the robot's are padded with zeros."""
    action_dim: int
    """Dimensions of the policy's actions, A; the robot's are padded with zeros."""
    chunk: int
    """Steps of an action chunk, t."""
    normalisation: Normalisation = "mean_std"
    """How states and actions are normalised."""
    action_normalisation: Normalisation | None = None
    """How actions are normalised, where it is not as states are."""
    relative: tuple[bool, ...] = ()
    """For each action dimension: whether it is minus the same dimension of the state at the chunk's start."""
    prompt: Prompt | None = "pi0"
    """The form of the prompt; None: the policy reads no instruction."""
    max_tokens: int = 48
    """Tokens of the prompt, l; a longer prompt is refused."""
    mask_padding: bool = True
    """Whether padded dimensions, and steps past the episode's end, are left out of the loss."""
    framing: Framing = "openpi"
    """How images get the policy's size."""
    special_tokens: Literal["prompt", "tokenizer"] = "prompt"
    """Who adds special tokens: the form of the prompt, or the tokenizer's own template (LeRobot)."""
    history: int = 1
    """Observation steps, o, the newest last; before an episode's start its first one is repeated."""

    @property
    def of_actions(self) -> Normalisation:
        """How actions are normalised."""
        return self.action_normalisation or self.normalisation


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample or observation as a policy takes it; every shape depends on the codec's config only.

    With a history of o > 1 steps, `images`, `image_mask` and `state` begin with an axis o, the newest last.
    """

    images: NDArray[np.uint8]  # [n, 3, h, w]; zeros where the camera is missing
    image_mask: NDArray[np.bool_]  # [n]
    tokens: NDArray[np.int64] | None  # [l]; None without a prompt
    token_mask: NDArray[np.bool_] | None  # [l]
    state: NDArray[np.float32]  # [S] normalised, zero-padded
    actions: NDArray[np.float32] | None  # [t, A] normalised, zero-padded
    action_mask: NDArray[np.bool_] | None  # [t, A] True where the loss counts
    key: Key | None = None
    history_mask: NDArray[np.bool_] | None = None  # [o] False where a step before the episode is padded
    target_tokens: NDArray[np.int64] | None = None  # [m], of a policy with a token loss
    target_mask: NDArray[np.bool_] | None = None  # [m]
    embodiment_id: NDArray[np.int64] | None = None  # []


class Codec:
    """Encodes and decodes for one embodiment. `statistics` has the keys "state" and "action"."""

    def __init__(
        self,
        config: CodecConfig,
        embodiment: Embodiment,
        statistics: Mapping[str, Statistics],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Raises CodecError or EmbodimentError where the four do not belong together."""
        self.config = config
        self.embodiment = embodiment
        self.statistics = dict(statistics)
        self.tokenizer = tokenizer
        self._check()
        self._state = Normaliser.fit(self.statistics["state"], config.normalisation)
        self._action = Normaliser.fit(self.statistics["action"], config.of_actions)
        self._shapes = {camera.name: camera.shape for camera in embodiment.cameras}
        self._relative = np.flatnonzero(config.relative)
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
        normal = self._state.encode(state)
        tokens, token_mask = self._tokens(observation.instruction, normal)
        images, image_mask, padded, history_mask = self._observed(observation)
        actions, action_mask = (None, None) if sample is None else self._chunk(sample, state)
        key = None if sample is None else sample.key
        return Encoded(
            images, image_mask, tokens, token_mask, padded, actions, action_mask, key, history_mask
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
        normal = self._state.encode(self._column("state", observation.state, self.embodiment.state))
        padded = np.zeros(self.config.state_dim, dtype=np.float32)
        padded[: len(normal)] = normal
        return padded

    def encode_actions(self, actions: NDArray, observation: Observation) -> NDArray[np.float32]:
        """Turn actions [k, a] in the robot's units into the policy's output for `observation` [k, A].

        The inverse of `decode`, for k steps; padded dimensions are 0.
        """
        values = actions.astype(np.float64)
        if len(self._relative):
            state = self._column("state", observation.state, self.embodiment.state)
            values[:, self._relative] -= state[self._relative]
        padded = np.zeros((len(actions), self.config.action_dim), np.float32)
        padded[:, : actions.shape[1]] = self._action.encode(values)
        return padded

    def decode(self, actions: NDArray, observation: Observation) -> ActionChunk:
        """Turn a policy's output [t, A] for `observation` back into actions [t, a] in the robot's units.

        Raises CodecError where the shape is wrong or a value is not finite.
        """
        wanted = (self.config.chunk, self.config.action_dim)
        if actions.shape != wanted:
            raise CodecError(f"actions to decode have shape {actions.shape}, this codec decodes {wanted}")
        real = actions[:, : self.embodiment.action.shape[0]]
        if not np.isfinite(real).all():
            raise CodecError("actions to decode are not finite: the policy's weights or inputs are broken")
        decoded = self._action.decode(real)
        if len(self._relative):
            state = self._column("state", observation.state, self.embodiment.state)
            decoded[:, self._relative] += state[self._relative]
        return ActionChunk(decoded.astype(np.float32))

    def save(self, folder: Path) -> None:
        """Write codec.json and tokenizer/ into `folder`."""
        statistics = {name: value.to_json() for name, value in self.statistics.items()}
        content = {
            "format": FORMAT,
            "config": asdict(self.config),
            "embodiment": asdict(self.embodiment),
            "statistics": {self.embodiment.name: statistics},
        }
        write_atomic(folder / "codec.json", json.dumps(content, indent=2) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer")

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Read what `save` wrote. Raises CodecError or ConfigError naming what is missing or malformed."""
        path = folder / "codec.json"
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CodecError(
                f"{path}: cannot be read: {error.strerror}; is this a checkpoint's folder?"
            ) from None
        except ValueError as error:
            raise CodecError(f"{path}: not JSON: {error}") from None
        expected = {"format", "config", "embodiment", "statistics"}
        if not isinstance(content, dict) or set(content) != expected:
            have = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise CodecError(f"{path}: must have exactly the keys {sorted(expected)}, there are {have}")
        if content["format"] != FORMAT:
            raise CodecError(f"{path}: format {content['format']!r}, this version reads {FORMAT}")
        config = configuration.build(CodecConfig, content["config"], f"{path}: config")
        embodiment = configuration.build(Embodiment, content["embodiment"], f"{path}: embodiment")
        every = content["statistics"]
        if not isinstance(every, dict) or not isinstance(every.get(embodiment.name), dict):
            raise CodecError(f"{path}: no statistics for embodiment {embodiment.name!r}")
        statistics = {
            name: Statistics.from_json(values, f"{path}: statistics.{embodiment.name}.{name}")
            for name, values in every[embodiment.name].items()
        }
        words = tokenizers.load(folder / "tokenizer") if config.prompt is not None else None
        return cls(config, embodiment, statistics, words)

    def _check(self) -> None:
        config, robot = self.config, self.embodiment
        for name in filter(None, config.cameras):
            robot.camera(name)
        named = [name for name in config.cameras if name]
        if len(set(named)) != len(named):
            raise CodecError(f"cameras {config.cameras}: a camera fills one slot only")
        least = {"image_size": 1, "chunk": 1, "history": 1, "max_tokens": 0 if config.prompt is None else 1}
        for name, minimum in least.items():
            if getattr(config, name) < minimum:
                raise CodecError(
                    f"codec config: {name} must be at least {minimum}, is {getattr(config, name)}"
                )
        if (config.prompt is None) != (self.tokenizer is None):
            has = "no tokenizer" if self.tokenizer is None else "a tokenizer"
            raise CodecError(f"codec config: prompt is {config.prompt!r}, and there is {has}")
        if set(self.statistics) != {"state", "action"}:
            raise CodecError(f"statistics must be those of state and action, got {sorted(self.statistics)}")
        for name, feature, room in (
            ("state", robot.state, config.state_dim),
            ("action", robot.action, config.action_dim),
        ):
            have = feature.shape[0]
            if have > room:
                raise CodecError(
                    f"embodiment {robot.name!r} has {have} {name} dimensions, the policy takes {room}"
                )
            if self.statistics[name].dimensions != have:
                raise CodecError(
                    f"{name} statistics have {self.statistics[name].dimensions} dimensions, embodiment "
                    f"{robot.name!r} has {have}; fit the codec on data of this embodiment"
                )
        if config.relative and len(config.relative) != robot.action.shape[0]:
            raise CodecError(
                f"relative has {len(config.relative)} entries for {robot.action.shape[0]} action dimensions"
            )
        beyond = [d for d, on in enumerate(config.relative) if on and d >= robot.state.shape[0]]
        if beyond:
            raise CodecError(
                f"relative: action dimensions {beyond} have no state dimension to be relative to"
            )
        if self.tokenizer is not None and self._begins_with_bos() and self.tokenizer.bos is None:
            raise CodecError(f"prompt {config.prompt!r} begins with a bos token, and this tokenizer has none")

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
        text = prompts.pieces(self.config.prompt, instruction, state)
        cached = self._prompts.get(text)
        if cached is None:
            if len(self._prompts) >= CACHED_PROMPTS:
                self._prompts.clear()
            cached = self._prompts[text] = self._tokenise(text, self.tokenizer)
        return cached

    def _begins_with_bos(self) -> bool:
        prompt = self.config.prompt
        return self.config.special_tokens == "prompt" and prompt is not None and prompts.needs_bos(prompt)

    def _tokenise(
        self, text: tuple[str, ...], tokenizer: Tokenizer
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        bos = tokenizer.bos
        if self.config.special_tokens == "tokenizer":
            ids = tokenizer.encode("".join(text), special=True)
        else:
            ids = [bos] if bos is not None and self._begins_with_bos() else []
            for piece in text:
                ids.extend(tokenizer.encode(piece))
        room = self.config.max_tokens
        if len(ids) > room:
            raise CodecError(
                f"the prompt {''.join(text)!r} has {len(ids)} tokens, the policy takes {room}; "
                "shorten the instruction or raise max_tokens"
            )
        tokens = np.full(room, tokenizer.pad, dtype=np.int64)
        tokens[: len(ids)] = ids
        mask = np.arange(room) < len(ids)
        tokens.flags.writeable = mask.flags.writeable = False  # shared by every sample with this prompt
        return tokens, mask

    def _images(self, given: Mapping[str, NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        for name, image in given.items():
            shape = self._shapes.get(name)
            if shape is None:
                self.embodiment.camera(name)
            if image.dtype != np.uint8 or image.shape != shape:
                raise CodecError(
                    f"camera {name!r} gives {image.dtype} {image.shape}, embodiment {self.embodiment.name!r} "
                    f"says uint8 {shape}"
                )
        size = self.config.image_size
        images = np.zeros((len(self.config.cameras), 3, size, size), dtype=np.uint8)
        mask = np.zeros(len(self.config.cameras), dtype=np.bool_)
        for slot, name in enumerate(self.config.cameras):
            if name in given:
                images[slot] = fit_image(given[name], size, self.config.framing).transpose(2, 0, 1)
                mask[slot] = True
        if any(self.config.cameras) and not mask.any():
            wanted = ", ".join(filter(None, self.config.cameras))
            raise CodecError(f"the observation has no image of any of the policy's cameras ({wanted})")
        return images, mask

    def _chunk(self, sample: Sample, state: NDArray) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        steps, robot = self.config.chunk, self.embodiment
        dimensions = robot.action.shape[0]
        given = sample.actions
        if given.shape != (steps, dimensions):
            raise CodecError(
                f"actions have shape {given.shape}, this codec takes {(steps, dimensions)}: chunk {steps}, "
                f"and {dimensions} dimensions of embodiment {robot.name!r}"
            )
        if sample.is_real.shape != (steps,) or sample.is_real.dtype != np.bool_:
            raise CodecError(
                f"is_real must be bool [{steps}], is {sample.is_real.dtype} {sample.is_real.shape}"
            )
        if not np.isfinite(given).all():
            step = int(np.flatnonzero(~np.isfinite(given).all(axis=1))[0])
            raise CodecError(f"actions are not finite at step {step} of the chunk of sample {sample.key}")
        if len(self._relative):
            given = given.astype(np.float64)
            given[:, self._relative] -= state[self._relative]
        actions = np.zeros((steps, self.config.action_dim), dtype=np.float32)
        actions[:, :dimensions] = self._action.encode(given)
        if not self.config.mask_padding:
            return actions, np.ones(actions.shape, dtype=np.bool_)
        mask = np.zeros(actions.shape, dtype=np.bool_)
        mask[:, :dimensions] = sample.is_real[:, None]
        return actions, mask


def _blocks(values: NDArray | Iterable[NDArray]) -> Iterable[NDArray]:
    return [values] if isinstance(values, np.ndarray) else values
