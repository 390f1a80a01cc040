"""A local policy as an Actor: observations in, chunks in the robot's units out, through the codec both ways.

What it returns for an observation depends only on that observation, its key and the seed: not on what else
is in the batch, nor on how much. So every batch has one width (a row is repeated to fill it), one set of
camera slots and one prompt length (the codec's), and each row's random numbers belong to its own key. On a
CPU, matrix products of 2, 3, 5, 6 or 7 rows by several threads round a row by its place (MKL 2024.2 on an
AMD EPYC, LOG.md), so a batch has 1 row, or a power of two of at least 4.
"""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vlafit import arguments, checkpoints
from vlafit.agreement import Agreement, Item, Learned
from vlafit.checkpoints.adaptation import Adaptation
from vlafit.checkpoints.options import parse_dtype
from vlafit.codec import Codec, CodecSet
from vlafit.codec.state_watch import StateWatch
from vlafit.codec.tokenizer import Tokenizer
from vlafit.config import LARGEST
from vlafit.errors import CodecError, ConfigError, quoted
from vlafit.inference import accelerated, evaluating, require_device, with_steps
from vlafit.nn.activations import same_rows
from vlafit.nn.batch import Batch, stack
from vlafit.nn.committed import clean_prefix, continuation
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.guidance import GuidedPolicy
from vlafit.nn.parameters import bytes_of
from vlafit.nn.policy import MOST_SAMPLING_STEPS, Policy
from vlafit.nn.rng import rollout_rng
from vlafit.requests import Expected, Request, checked_requests
from vlafit.types import ActionChunk, Committed, Embodiment, EpisodeKey, Observation

log = logging.getLogger(__name__)

WIDEST = 2**12  # observations in one call of the policy
GoOn = Literal["clean", "jacobian", "direct"]
"""How a chunk goes on after committed steps: given clean, or by guidance through the network, or directly."""


class PolicyActor:
    """Acts with `policy` through `codec`: up to `width` rows a batch, random numbers from `seed`.

    Batches have `rows` rows: `width`, rounded up to 4, 8, 16 and so on if it is not 1.
    `identity` names the weights (a checkpoint's hash, say); without it `fingerprint` hashes them. `seeds` are
    the recorded ones, by task, that the policy has learned from.

    `codec` is a set for a policy of several embodiments; `embodiment` then names the one that is meant where
    a call names none. A state far outside the statistics is logged once for each dimension. `agreement` is
    what the policy agreed on with the data that it learned from.
    """

    def __init__(
        self,
        policy: Policy,
        codec: Codec | CodecSet,
        *,
        width: int = 1,
        seed: int = 0,
        identity: str = "",
        seeds: Mapping[str, Collection[int]] | None = None,
        embodiment: str = "",
        agreement: Agreement | None = None,
        points: Sequence[Item] = (),
        executed: int = 0,
    ) -> None:
        width = arguments.whole("width", width, 1, WIDEST)
        seed = arguments.whole("seed", seed, 0, LARGEST)
        embodiment = arguments.text("embodiment", embodiment)
        self.policy = policy
        self._modules = list(policy.modules())  # walking the tree takes as long as a sampling step
        self.codecs = CodecSet.of(codec)
        self.width = width
        self.rows = 1 if width == 1 else max(4, 1 << (width - 1).bit_length())
        self.seed = seed
        self.seeds = seeds or {}
        self._identity = identity
        self._embodiment = embodiment
        self.agreement = agreement
        """What the policy agreed on with the data that it learned from; None where it does not say."""
        self.points = tuple(points)
        """What was chosen when it was loaded, for the table of an evaluation."""
        self.executed = executed
        """Steps of a chunk that the checkpoint's own program executes; 0: it does not say."""
        self._watches: dict[str, StateWatch] = {}  # by embodiment
        self.logs_states = True
        """Whether states far outside the statistics are logged; a server does that for each client."""
        self.answers = self.invalid_answers = 0
        """Answers of a policy that writes tokens, and how many of them were no chunk."""
        if embodiment:
            self.codecs.choose(embodiment, where="the policy")

    @property
    def codec(self) -> Codec:
        """The codec of the actor's embodiment. Raises ConfigError if none of several is named."""
        return self.codecs.choose(self._embodiment, where="the policy", option="embodiment=NAME")

    def of(self, embodiment: str) -> "PolicyActor":
        """Return an actor with the same policy for another of its embodiments."""
        actor = copy.copy(self)
        actor._embodiment = arguments.text("embodiment", embodiment)
        actor.codecs.choose(embodiment, where="the policy")
        return actor

    def state_watch(self) -> StateWatch:
        """Return a new watch for states far outside the statistics, of one robot's client, say."""
        return StateWatch(self.codec)

    @property
    def embodiment(self) -> Embodiment:
        """The robot that the policy was trained on."""
        return self.codec.embodiment

    @property
    def learned(self) -> Learned:
        """What the policy says of the data that it learned from."""
        return Learned.of(self.agreement, self.embodiment.name)

    @property
    def relative(self) -> tuple[bool, ...]:
        """For each action dimension, whether it was learned relative to the state; empty: none."""
        return tuple(self.codec.config.relative)

    @property
    def action_range(self) -> tuple[NDArray, NDArray]:
        """Least and greatest value of each action of the training data; NaN where that is not known.

        The statistics of a run may be its base's, and not of the data that it learned from.
        """
        least, most = map(self.codec.columns.as_recorded, self.codec.seen["action"].ends)
        if self.agreement is not None:
            return np.full_like(least, np.nan), np.full_like(most, np.nan)
        return least, most

    @property
    def chunk(self) -> int:
        """Control steps of a chunk."""
        return self.codecs.chunk

    @property
    def history(self) -> int:
        """Observations that the policy reads, the newest included."""
        return self.codecs.history

    @property
    def expected(self) -> Expected:
        """What it can be asked."""
        guided, words = isinstance(self.policy, GuidedPolicy), self.codec.config.prompt is not None
        cameras, fate = self.codec.config.named_cameras, self.fate_of_invalid
        return Expected(self.embodiment, self.history, guided, words, cameras, fate)

    def fingerprint(self) -> str:
        """Return what decides the actions: the weights (or their identity), sampling and device."""
        identity = self._identity
        if not identity:
            digest = hashlib.sha256()
            for name, value in sorted(self.policy.state_dict().items()):
                digest.update(name.encode())
                digest.update(bytes_of(value))
            identity = f"sha256:{digest.hexdigest()}"
        device = next(self.policy.parameters()).device
        made = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        steps = "" if self.policy.steps is None else f" steps={self.policy.steps}"
        if any(parameter.dtype == torch.bfloat16 for parameter in self.policy.parameters()):
            steps += " dtype=bfloat16"
        if self.policy.quantised:
            steps += f" weights={self.policy.quantised}"
        if self.policy.compiled:
            steps += " compiled"
        if len(self.codecs) > 1:
            steps += f" embodiment={self.embodiment.name}"
        return f"{identity}{steps} width={self.rows} seed={self.seed} device={made}"

    def act(
        self, observations: Sequence[Observation], keys: Sequence[EpisodeKey], embodiment: str = ""
    ) -> list[ActionChunk]:
        """Return one chunk [t, a] for each observation, in order.

        `embodiment` names the robot of these observations, if it is not the actor's own. Raises
        EmbodimentError for observations that are not of that embodiment, CodecError for those that it cannot
        act on (too many words), and ConfigError for wrong keys, or where no embodiment is named of several.
        """
        actor = self.of(embodiment) if embodiment != "" else self
        return actor._answers(checked_requests(observations, keys, None, actor.expected))

    def act_guided(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
    ) -> list[ActionChunk]:
        """Return one chunk [t, a] for each observation that continues what is committed there (None:
        nothing).

        Guided rows and others never share a batch: gradients would change the last bits of the others. Raises
        what `act` raises, and ConfigError where the policy cannot be guided.
        """
        return self._answers(checked_requests(observations, keys, committed, self.expected))

    def _answers(self, requests: Sequence[Request]) -> list[ActionChunk]:
        observations, keys = [one.observation for one in requests], [one.key for one in requests]
        committed = [one.committed for one in requests]
        kinds: list[GoOn | None] = [None if left is None else self._how_to_go_on(left) for left in committed]
        chunks: dict[int, ActionChunk] = {}
        with evaluating(self._modules), same_rows(self.rows):
            for kind in dict.fromkeys(kinds):
                rows = [i for i, other in enumerate(kinds) if other == kind]
                for begin in range(0, len(rows), self.width):
                    some = rows[begin : begin + self.width]
                    lefts = [committed[i] for i in some]
                    batch = self._batch([observations[i] for i in some], [keys[i] for i in some], lefts, kind)
                    chunks |= zip(some, batch, strict=True)
        return [chunks[i] for i in range(len(keys))]

    @torch.no_grad()
    def _batch(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
        kind: GoOn | None,
    ) -> list[ActionChunk]:
        self._require_past(observations, keys)
        codec = self.codec
        encoded = [codec.encode(observation) for observation in observations]
        self._warn_of(observations)
        missing = self.rows - len(keys)
        rng = rollout_rng([*keys, *list(keys[:1]) * missing], seed=self.seed)
        device = next(self.policy.parameters()).device
        batch = self._cut(stack(encoded + encoded[:1] * missing)).to(device)
        lefts = [left for left in committed if left is not None]
        valid: list[bool | None] = [None] * len(keys)
        if kind is None:
            answer = self.policy.act(batch, rng)  # [rows, t, a], or tokens [rows, m]
            if answer.is_floating_point():
                actions = answer.float().cpu().numpy()
            else:
                actions, valid = self._detokenised(answer[: len(keys)].cpu().numpy())
        elif kind == "clean":
            assert isinstance(self.policy, FlowPolicy)
            prefix = clean_prefix(codec, observations, lefts, missing, device)
            actions = self.policy.act_after(batch, rng, prefix).float().cpu().numpy()
        else:
            assert isinstance(self.policy, GuidedPolicy)
            guided = continuation(codec, observations, lefts, missing, device)
            actions = self.policy.act_guided(batch, rng, guided).float().cpu().numpy()
        return [
            dataclasses.replace(codec.decode(row, observation), valid=whether)
            for row, observation, whether in zip(actions[: len(keys)], observations, valid, strict=True)
        ]

    @property
    def fate_of_invalid(self) -> str:
        """What is executed where the policy's tokens make no chunk; "" where it answers with numbers."""
        return self.codec.config.fate_of_invalid if self.policy.needs().writes_tokens else ""

    def _detokenised(self, tokens: NDArray[np.integer]) -> tuple[NDArray[np.float64], list[bool | None]]:
        """Return the normalised actions [b, t, a] of tokens [b, m], and which rows are a chunk of actions.

        How many were no chunk of actions is logged at the first and when their number has doubled, once for
        all of a batch.
        """
        rows = [self.codec.detokenise(row) for row in tokens]
        self.answers += len(rows)
        before = self.invalid_answers
        self.invalid_answers += sum(not row.valid for row in rows)
        if self.invalid_answers.bit_length() > before.bit_length():
            log.warning(
                "the policy's tokens make no chunk of actions in %d of %d answers; the chunk is then %s",
                self.invalid_answers,
                self.answers,
                self.codec.config.fate_of_invalid,
            )
        return np.stack([row.chunk for row in rows]), [row.valid for row in rows]

    def _how_to_go_on(self, left: Committed) -> GoOn | None:
        """Return how a chunk goes on after what is committed; None: it need not.

        Raises ConfigError where the committed steps are to be given clean, and the policy is not trained so.
        """
        wanted, most = left.guidance.prefix, 0
        if isinstance(self.policy, FlowPolicy):
            most = self.policy.max_delay
        if wanted == "clean" and left.delay > most:
            trained = f"was trained for at most {most}" if most else "was not trained for it"
            raise ConfigError(
                f'execution: guidance.prefix = "clean" gives the policy {left.delay} steps of its chunk, but '
                f'it {trained} (train.max_delay); take "auto"'
            )
        if wanted != "inpaint" and most and left.delay <= most:
            return "clean" if left.delay else None
        return "jacobian" if left.guidance.jacobian else "direct"

    def _warn_of(self, observations: Sequence[Observation]) -> None:
        """Log states far outside the statistics, once for each dimension."""
        if not self.logs_states:
            return
        name = self.embodiment.name
        watch = self._watches.get(name) or self._watches.setdefault(name, self.state_watch())
        for observation in observations:
            for sentence in watch.sentences(observation.state):
                log.warning("%s (this is logged once)", sentence)

    def _require_past(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> None:
        """Raise CodecError if only the newest step is given, after an episode's start, of several."""
        steps = self.codec.config.history
        for observation, key in zip(observations, keys, strict=True):
            if steps > 1 and key.replan > 0 and not observation.past:
                raise CodecError(
                    f"the policy reads {steps} observation steps, and call {key.replan} of task "
                    f"{quoted(key.task)} only has the newest: fill Observation.past (openpi's frames hold no "
                    "earlier steps; vlafit's and vla-eval's clients do)"
                )

    def _cut(self, batch: Batch) -> Batch:
        """Drop the camera slots that are always missing; nothing here looks at what the rows hold."""
        # Slots that no camera of this robot fills are missing in every observation; a policy may drop those.
        if self.policy.needs().sees_missing:
            return batch
        slots = [i for i, name in enumerate(self.codec.config.cameras) if name] or [0]
        return dataclasses.replace(
            batch, images=batch.images[..., slots, :, :, :], image_mask=batch.image_mask[..., slots]
        )


def load_actor(
    path: str | Path,
    *,
    steps: int = 0,
    width: int = 1,
    seed: int = 0,
    device: str = "",
    dtype: str = "float32",
    trust: Sequence[str] = (),
    base: str | Path | None = None,
    embodiment: str = "",
    compile: bool = False,
    quantise: str = "",
    config: Mapping[str, object] | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    assets: str | None = None,
    cameras: Mapping[str, str] | None = None,
    frame_size: int = 0,
) -> PolicyActor:
    """Load a checkpoint (a folder, a run, the name of one that ships, or an id of the Hub) as an actor.

    `steps` is for a policy that samples in steps: how many; 0: its own number. Every batch has `width`
    rows (2, 3, 5 and so on are rounded up to 4, 8, 16, ...), whatever it is asked for. 1 is fastest for
    one robot, and the default of `vlafit serve`, too; many observations a call are answered faster with
    more. The same bytes are promised at one width only: an evaluation's is that of
    `vlafit.rollout.policy_width`. `device` is torch's name; the GPU if
    there is one when empty. `dtype` is "float32" or "bfloat16", which halves memory and suits a GPU;
    norms and projections stay float32. `trust`, `base`: see `checkpoints.load`. `embodiment` names the
    robot where the checkpoint learned several; without a name, each call of `act` names it. On a GPU a
    flow policy samples by CUDA graphs, whose bits are those of the same kernels without them; `compile`
    also compiles its blocks, which takes a minute or more and changes the last bits. `quantise` "int8" or
    "fp8" keeps matrices of attention and MLPs in 8 bits, a quarter of float32; what that changes in the
    actions is measured and logged, and it is part of an evaluation's identity.

    For a checkpoint of another program: `config` and `assets`, see `checkpoints.load`; `tokenizer` is a
    folder, a file or an id of the Hub. `cameras` maps the policy's cameras to the robot's names for them ("":
    the robot has none), and `frame_size` is the width and height of the robot's frames in pixels, where they
    are not the checkpoint's. All of it is part of an evaluation's identity.

    Raises what `checkpoints.load` raises, and ConfigError where the checkpoint has no codec, the policy does
    not sample in steps, or the device is not there.
    """
    arguments.whole("steps", steps, 0, MOST_SAMPLING_STEPS)
    arguments.whole("width", width, 1, WIDEST)
    arguments.whole("seed", seed, 0, LARGEST)
    for name, value in (("device", device), ("embodiment", embodiment), ("quantise", quantise)):
        arguments.text(name, value)
    arguments.flag("compile", compile)
    trust = arguments.texts("trust", trust)
    base = None if base is None else arguments.path("base", base)
    kind = parse_dtype(dtype)
    adaptation = Adaptation(config, tokenizer, assets, {} if cameras is None else cameras, frame_size)
    folder = checkpoints.place(arguments.path("path", path)).path
    if embodiment and (folder / "codec.json").is_file():  # before the weights are loaded
        CodecSet.load(folder).choose(embodiment, where=str(folder))
    loaded = checkpoints.load_all(
        folder,
        config,
        base,
        adaptation.open_tokenizer(),
        assets,
        device=require_device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        dtype=kind,
        trust=trust,
    )
    if loaded.codecs is None:
        raise ConfigError(
            f"{folder}: a {loaded.report.form} checkpoint has no codec, which says what its numbers mean "
            f"to a robot: {loaded.report.codec}. What a checkpoint's files lack is given by --tokenizer, "
            "--assets and --config of eval and serve (arguments of load_actor). A base model, which was not "
            "trained on the robot, is evaluated with the recipe that would fine-tune it: --recipe RECIPE. "
            'data.statistics is there "checkpoint", for a policy that was trained on the robot, or "data"'
        )
    codecs, points = adaptation.applied(loaded.codecs, embodiment, str(folder))
    declared = checkpoints.declaration(folder, base)
    if loaded.agreement is None and len(codecs) == 1:
        points = (*points, *adaptation.left_open(declared.unsaid, next(iter(codecs))))
    return PolicyActor(
        accelerated(with_steps(loaded.policy, steps), compile, quantise),
        codecs,
        width=width,
        seed=seed,
        identity=f"checkpoint sha256:{checkpoints.digest(folder)}{adaptation.identity(codecs)}",
        seeds=checkpoints.read_lineage(folder).seeds,
        embodiment=embodiment,
        agreement=loaded.agreement,
        points=points,
        executed=declared.executed,
    )
