"""Turn openpi's norm_stats.json into a codec.

openpi's files tell the statistics and nothing of the robot: cameras are the model's three slots, rate and
control mode are unknown (0 and empty), and actions count as absolute unless the user says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlafit import config as configuration
from vlafit.agreement import describe_mask
from vlafit.checkpoints import hub
from vlafit.checkpoints.codecs import GIVE_ASSETS
from vlafit.checkpoints.tensor_files import read_json_object
from vlafit.codec import Codec, CodecConfig, fast
from vlafit.codec.action_text import ActionTokenConfig
from vlafit.codec.fast import FastTokenizer
from vlafit.codec.normaliser import Normalisation
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError, VlafitError, WeightsError, brief, did_you_mean
from vlafit.nn.policy import Needs
from vlafit.types import Embodiment, Feature

FILE = "norm_stats.json"
PUBLISHED = "physical-intelligence/fast"  # openpi, models/tokenizer.py
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # openpi, models/model.py: the fixed order
FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")  # openpi, models/pi0_fast.py


@dataclass(frozen=True)
class CodecOptions:
    """Settings of a codec that openpi's files do not record: the table `codec` of `load`'s config."""

    normalisation: Normalisation | None = None
    """None: mean_std for pi0, quantile for pi0.5 and pi0-FAST, as openpi has wired it."""
    relative: tuple[bool, ...] = ()
    """For each action dimension: whether it is minus the state's at the start of the chunk."""
    state_dims: int | None = None
    """The robot's own dimensions. None: as many as the statistics have before trailing padding."""
    action_dims: int | None = None
    """Likewise, of an action."""
    action_tokenizer: str = ""
    """pi0-FAST's FAST action tokenizer: a folder, or an id of the Hub. Empty: the published one."""


def find_assets(folder: Path) -> dict[str, Path]:
    """Return the norm_stats.json files that lie in `folder`/assets, by asset (a name or a/b)."""
    root = folder / "assets"
    return {p.parent.relative_to(root).as_posix(): p for p in sorted(root.rglob(FILE)) if p.parent != root}


def choose(available: Mapping[str, Path], assets: str | Path | None, where: str) -> tuple[str, Path] | None:
    """Return the name and file of the asset that `assets` names: one of `available`, a file, or a folder.

    Without a name, the only one; None when there is none. Raises WeightsError when there are several, or none
    is called so.
    """
    if assets is None:
        if len(available) > 1:
            raise WeightsError(
                f"{where}: several assets ({', '.join(available)}); say which, such as "
                f"{min(available)!r}: {GIVE_ASSETS}"
            )
        return next(iter(available.items()), None)
    if str(assets) in available:
        return str(assets), available[str(assets)]
    path = Path(assets)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(
            f"{where}: there is no asset {str(assets)!r}{did_you_mean(str(assets), available)}"
        )
    return path.parent.name, path


def read(path: Path) -> dict[str, Statistics]:
    """Return the statistics of "state" and "action" in openpi's file, padding included."""
    try:
        values = read_json_object(path)["norm_stats"]
        made = {}
        for name, key in (("state", "state"), ("action", "actions")):
            numbers = {n: values[key].get(n) for n in ("mean", "std", "q01", "q99")}
            empty = {"count": 0, "min": None, "max": None}
            made[name] = Statistics.from_json(numbers | empty, f"{path}: {name}")
    except (WeightsError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CodecError(f"{path}: not openpi's statistics of state and actions ({brief(error)})") from error
    for name, statistics in made.items():
        if (statistics.std < 0).any():
            raise CodecError(f"{path}: {name}: a standard deviation is below 0")
    return made


def make_codec(
    asset: tuple[str, Path],
    needs: Needs,
    tokenizer: Tokenizer,
    options: Mapping[str, object],
    stated: tuple[bool, ...] | None = None,
) -> tuple[Codec, tuple[str, ...]]:
    """Return the codec of an asset's statistics for a policy that needs `needs`, and notes for the report.

    `options` has the fields of `CodecOptions`; `stated` says which actions are relative where they do not.
    Raises CodecError for statistics that are not openpi's.
    """
    robot_name, path = asset
    chosen = configuration.build(CodecOptions, options, f"{path}: config: codec")
    statistics = read(path)
    notes = []
    for name, wanted in (("state", chosen.state_dims), ("action", chosen.action_dims)):
        have = statistics[name].dimensions
        kept = _without_padding(statistics[name]) if wanted is None else wanted
        if not 1 <= kept <= have:
            raise CodecError(f"{path}: {name} has {have} dimensions, the codec cannot have {kept}")
        if kept < have:
            notes.append(
                f"{robot_name}: the last {have - kept} of {have} {name} statistics are padding; config"
                f" {{'codec.{name}_dims': ...}} says otherwise"
            )
        statistics[name] = _cut(statistics[name], kept)
    relative = chosen.relative if "relative" in options or stated is None else stated
    size, tokens = needs.image_size, needs.answers
    if chosen.action_tokenizer and tokens is None:
        raise WeightsError(
            f"{path}: config: codec.action_tokenizer would have no effect: the policy answers with numbers; "
            "the tokenizer of a token loss is policy.action_tokenizer in a recipe"
        )
    actions, writing = None, None
    if tokens is not None:
        actions = _action_tokenizer(chosen.action_tokenizer or PUBLISHED)
        writing = ActionTokenConfig(tokens.longest, needs.vocabulary, tokens.begins_with_bos)
    cameras = CAMERAS if tokens is None else FAST_CAMERAS
    robot = Embodiment(
        name=robot_name,
        cameras=tuple(Feature(name, (size, size, 3)) for name in cameras),
        state=Feature("state", (statistics["state"].dimensions,)),
        action=Feature("actions", (statistics["action"].dimensions,)),
        hz=0.0,
        control="",
    )
    config = CodecConfig(
        cameras=cameras,
        image_size=size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=chosen.normalisation or needs.normalisation,
        relative=relative,
        prompt=needs.prompt,
        max_tokens=needs.max_tokens,
        action_tokens=writing,
    )
    if "relative" not in options and stated is not None:
        notes.append(f"relative actions, as agreement.json says: {describe_mask(stated)}")
    elif not chosen.relative:
        notes.append(
            "openpi's files do not tell whether actions are relative to the state; a run takes its card's "
            "word, else they count as absolute, unless config {'codec.relative': [...]} says otherwise"
        )
    return Codec(config, robot, statistics, tokenizer, action_tokenizer=actions), tuple(notes)


def _action_tokenizer(name: str) -> FastTokenizer:
    """Return the FAST tokenizer in a folder or on the Hub. Raises CodecError saying how to give one."""
    folder = Path(name).expanduser()
    try:
        if folder.exists() or hub.parse(name) is None:
            return fast.load(folder)
        return fast.load(hub.place(name, (fast.FILE, fast.CONFIG)).path)
    except VlafitError as error:
        raise CodecError(
            f"{error}; another place of pi0-FAST's action tokenizer: --config codec.action_tokenizer=FOLDER "
            "of inspect, eval, serve and export (train: --policy.config.codec.action_tokenizer), "
            "config={'codec.action_tokenizer': FOLDER} in Python"
        ) from error


def _without_padding(statistics: Statistics) -> int:
    """Return the number of dimensions before those, at the end, of which every number is 0."""
    arrays = (statistics.mean, statistics.std, statistics.q01, statistics.q99)
    used = np.flatnonzero(np.any([a != 0 for a in arrays if a is not None], axis=0))
    return int(used[-1]) + 1 if len(used) else statistics.dimensions


def _cut(statistics: Statistics, dimensions: int) -> Statistics:
    def head(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:dimensions]

    return replace(
        statistics,
        mean=statistics.mean[:dimensions],
        std=statistics.std[:dimensions],
        q01=head(statistics.q01),
        q99=head(statistics.q99),
    )
