"""Write NVIDIA's processors of GR00T N1.7 for a codec: those that it was read from, or new ones.

A codec that came out of NVIDIA's files still has them (`Codec.origin`). They are written again, with all
embodiments, where they still make this very codec. One that was fitted to data gets an embodiment of its own,
with groups that are called as its dimensions are; whatever NVIDIA's program does otherwise, or its files need
and the codec does not have, is a reason to refuse.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vlafit.checkpoints.formats.groot import processors
from vlafit.checkpoints.formats.groot.processors import PUBLISHED, Processors
from vlafit.checkpoints.tensor_files import write_json
from vlafit.codec import Codec
from vlafit.codec.images import groot_crop
from vlafit.codec.normaliser import NEEDED, Normalisation
from vlafit.codec.statistics import ARRAYS, Statistics
from vlafit.errors import CodecError, WeightsError, brief
from vlafit.policies.groot import Groot
from vlafit.types import Feature

NEW = "new_embodiment"  # NVIDIA's tag of every robot that has none of its own
LANGUAGE = "annotation.human.task_description"  # as NVIDIA's data name the instruction
PERCENTILES: Mapping[Normalisation, bool] = {
    "nvidia_min_max": False,
    "groot_min_max": False,
    "nvidia_quantile": True,
    "groot_quantile": True,
}
"""Ways of normalising that NVIDIA's program has -> its use_percentiles."""
ABSOLUTE = {"rep": "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None}
"""Of a group of actions. Without one LeRobot 0.6.1 returns answers from -1 to 1."""
NUMBERED = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class Written:
    """What to write, the embodiment's name there, and what to know about it."""

    files: Processors
    tag: str
    notes: tuple[str, ...]


def refusals(policy: Groot, codec: Codec) -> list[str]:
    """Say what of this codec NVIDIA's program does not compute, or its files cannot say; empty if nothing."""
    if _again(policy, codec) is not None:
        return []
    reasons = list(_reasons(codec))
    if reasons and (changes := _changes(policy, codec)):
        first = f"it came from NVIDIA's files, and is not the codec that they make any more: {changes}"
        return [first, *reasons]
    return reasons


def write(folder: Path, policy: Groot, codec: Codec, backbone: str) -> tuple[str, ...]:
    """Write the three files into `folder`; return what to know about them.

    `backbone` names the model whose tokenizer new ones use.
    """
    made = _again(policy, codec) or _new(policy, codec, backbone)
    write_json(folder / processors.CONFIG, made.files.config)
    write_json(folder / processors.STATISTICS, made.files.statistics)
    if made.files.rows is not None:
        write_json(folder / processors.ROWS, made.files.rows)
    return made.notes


def row_of(policy: Groot, codec: Codec) -> int:
    """Return the row of the embodiment tables that this codec's robot takes."""
    return policy.config.embodiment_rows[codec.embodiment_id or 0]


def _again(policy: Groot, codec: Codec) -> Written | None:
    """Return the files that the codec was read from, where they still make it; None for any other codec."""
    found = processors.kept(codec)
    if found is None or _changes(policy, codec):
        return None
    files, tag = found
    row = row_of(policy, codec)
    if {**PUBLISHED, **(files.rows or {})}.get(tag) == row:
        return Written(files, tag, (f"NVIDIA's processors are those that {tag} was read from, unchanged",))
    settings = dict(files.settings)
    settings["modality_configs"] = {**files.modalities, NEW: files.modalities[tag]}
    moved = Processors(
        files.folder,
        {**files.config, "processor_kwargs": settings},
        {**files.statistics, NEW: files.statistics[tag]},
        {**(files.rows or {}), NEW: row},
    )
    note = f"the robot's embodiment is {NEW}, with the statistics of {tag} and row {row} of the tables"
    return Written(moved, NEW, (note,))


def _changes(policy: Groot, codec: Codec) -> str:
    """Return in what a codec is not any more the one that its files make; "" where it is, or has none.

    What its cameras and dimensions are called is not compared.
    """
    found = processors.kept(codec)
    if found is None:
        return ""
    files, tag = found
    try:
        made, _ = processors.make_codec(files, tag, policy.needs(), codec.required_tokenizer)
    except (WeightsError, CodecError, KeyError) as error:
        return brief(error)
    if len(made.config.cameras) != len([name for name in codec.config.cameras if name]):
        return "cameras"
    one, two = (vars(replace(c.config, cameras=())) for c in (made, codec))
    different = [name for name in one if one[name] != two[name]]
    for column in ("state", "action"):
        mine, theirs = made.statistics[column], codec.statistics[column]
        arrays = [(getattr(mine, name), getattr(theirs, name)) for name in ARRAYS]
        if not all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in arrays):
            different.append(f"{column} statistics")
    return ", ".join(different)


def _reasons(codec: Codec) -> Iterator[str]:
    """Yield what keeps a fitted codec from NVIDIA's program, with what can be done."""
    c = codec.config
    if c.framing not in ("nvidia", "nvidia_area"):
        how = "bicubically, as LeRobot does; export it to lerobot" if c.framing == "groot" else "otherwise"
        yield (
            "NVIDIA's program resizes frames bilinearly (framing 'nvidia'), and this policy saw them resized "
            f"{how} (framing {c.framing!r}). Fine-tuning from NVIDIA's own folder keeps NVIDIA's framing"
        )
    if c.prompt not in ("groot", "text") or c.special_tokens != "prompt":
        yield f"NVIDIA's program asks by a prompt of the form 'groot' or 'text', this codec by {c.prompt!r}"
    if not all(c.cameras):
        yield (
            f"one of its {len(c.cameras)} cameras is always missing, and NVIDIA's program wants a frame of "
            "each; train with the cameras that are there"
        )
    if any(c.relative) or any(pose.relative for pose in c.action_form.poses):
        yield (
            "its actions are learned relative to the state, and NVIDIA's files then also have the statistics "
            "of absolute actions, which this codec does not have; train on absolute actions, or keep the "
            'statistics of NVIDIA\'s folder (data.statistics = "checkpoint")'
        )
    if not (c.state_form.is_plain and c.action_form.is_plain):
        yield "its poses, grippers or angles are learned in another form than they are recorded in"
    methods: set[Normalisation] = {c.normalisation, c.of_actions, *c.state_methods, *c.action_methods}
    ranges = {PERCENTILES.get(method) for method in methods}
    if len(ranges) != 1 or None in ranges:
        yield (
            f"it normalises by {', '.join(sorted(methods))}, and NVIDIA's program by one range of states and "
            'actions, clipped to [-1, 1]; train with data.normalisation = "groot_min_max" or "groot_quantile"'
        )
        return
    for feature in (codec.embodiment.state, codec.embodiment.action):
        if twice := {label for label in feature.labels if feature.labels.count(label) > 1}:
            yield f"two dimensions of its {feature.name} are called {min(twice)!r}; groups need own names"
    if codec.statistics["action"].steps:
        yield "it has statistics of each step, and its files have those of absolute actions only"
    yield from _of_statistics("state", codec.statistics["state"], c.normalisation)
    yield from _of_statistics("action", codec.statistics["action"], c.of_actions)


def _of_statistics(column: str, statistics: Statistics, method: Normalisation) -> Iterator[str]:
    lacking = [name for name in ARRAYS if getattr(statistics, name) is None]
    if lacking:
        yield f"NVIDIA's files have {', '.join(lacking)} of each dimension; its {column} statistics do not"
        return
    low, high = (getattr(statistics, name) for name in NEEDED[method])
    nearly = np.flatnonzero(np.isclose(high, low) & (high != low))
    if method.startswith("groot") and len(nearly):
        yield (
            f"NVIDIA's program takes a nearly constant dimension for constant, and this policy learned it: "
            f"{column} {', '.join(map(str, nearly))}"
        )


def _new(policy: Groot, codec: Codec, backbone: str) -> Written:
    """Return the files for a codec that was fitted to data, as an embodiment of its own."""
    c, robot, row = codec.config, codec.embodiment, row_of(policy, codec)
    tag = robot.name if PUBLISHED.get(robot.name) == row else NEW
    state, action = (_groups(feature) for feature in (robot.state, robot.action))
    steps = list(range(c.answered))
    modalities = {
        "video": _modality(c.cameras, [0]),
        "state": _modality(state, [0]),
        "action": {**_modality(action, steps), "action_configs": [ABSOLUTE] * len(action)},
        "language": _modality([LANGUAGE], [0]),
    }
    size, by_area = c.image_size, c.framing == "nvidia_area"
    crop = max(1, round(size * c.crop)) if c.crop else groot_crop(size)
    settings = {
        "modality_configs": {tag: modalities},
        "image_crop_size": [crop] * 2,
        "image_target_size": [size, size],
        "use_albumentations": by_area,
        "random_rotation_angle": None,
        "color_jitter_params": None,
        "shortest_image_edge": size if by_area else None,
        "crop_fraction": (c.crop or crop / size) if by_area else None,
        "letter_box_transform": c.letter_box,
        "model_name": backbone,
        "model_type": "qwen",
        "formalize_language": c.prompt == "groot",
        "max_state_dim": c.state_dim,
        "max_action_dim": c.action_dim,
        "max_action_horizon": c.chunk,
        "use_percentiles": PERCENTILES[c.normalisation],
        "use_mean_std": False,
        "clip_outliers": True,
        "apply_sincos_state_encoding": False,
        "use_relative_action": False,
        "exclude_state": False,
        "state_dropout_prob": 0.0,
    }
    statistics = {
        "state": _by_group(codec.statistics["state"], state),
        "action": _by_group(codec.statistics["action"], action),
        "relative_action": {},
    }
    config = {"processor_class": "Gr00tN1d7Processor", "processor_kwargs": settings}
    files = Processors(Path(), config, {tag: statistics}, {tag: row})
    listed = "; ".join(
        f"{name}: {_listed(groups)}" for name, groups in (("state", state), ("action", action))
    )
    note = f"the robot's embodiment is {tag}, row {row} of the tables; its groups of dimensions are {listed}"
    return Written(files, tag, (note,))


def _groups(feature: Feature) -> dict[str, list[int]]:
    """Return name -> dimensions: of labels NAME.0, NAME.1, ... one group, and one for each other label.

    A column without labels is one group of its own name.
    """
    if not feature.labels:
        return {feature.name: list(range(feature.shape[0]))}
    stems = [match[1] if (match := NUMBERED.fullmatch(label)) else "" for label in feature.labels]
    groups: dict[str, list[int]] = {}
    first = 0
    for stem, run in groupby(stems):
        members = list(range(first, first + len(list(run))))
        first = members[-1] + 1
        counted = [f"{stem}.{number}" for number in range(len(members))]
        if stem and stem not in groups and [feature.labels[d] for d in members] == counted:
            groups[stem] = members
            continue
        groups |= {feature.labels[d]: [d] for d in members}
    return groups


def _modality(keys: Sequence[str] | Mapping[str, object], deltas: list[int]) -> dict[str, Any]:
    return {
        "delta_indices": deltas,
        "modality_keys": list(keys),
        "sin_cos_embedding_keys": None,
        "mean_std_embedding_keys": None,
        "action_configs": None,
    }


def _by_group(statistics: Statistics, groups: Mapping[str, list[int]]) -> dict[str, dict[str, list[float]]]:
    return {
        name: {one: getattr(statistics, one)[dimensions].tolist() for one in ARRAYS}
        for name, dimensions in groups.items()
    }


def _listed(groups: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} of {len(dimensions)}" for name, dimensions in groups.items())
