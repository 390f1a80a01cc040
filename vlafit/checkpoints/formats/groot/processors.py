"""Read NVIDIA's processors of GR00T N1.7: a codec for each embodiment that the folder has statistics of.

processor_config.json says which groups of dimensions an embodiment has, in which order, and how each is
normalised; statistics.json has their numbers, and embodiment_id.json the row of the embodiment tables. The
formulas are those of Isaac-GR00T (gr00t/data/state_action, gr00t/data/utils.py). Neither the sizes of frames
nor rate and control mode are told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.groot import groups
from vlafit.checkpoints.formats.groot.groups import Unrepeated
from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.codec import Codec, CodecConfig, Tokenizer
from vlafit.codec.images import Framing, groot_crop
from vlafit.errors import WeightsError, nearest
from vlafit.nn.policy import Needs
from vlafit.types import ColumnForm, Embodiment, Feature

CONFIG, STATISTICS, ROWS = "processor_config.json", "statistics.json", "embodiment_id.json"
ORIGIN = "groot"  # where a codec's origin has their content
PUBLISHED = {  # Isaac-GR00T, processing_gr00t_n1d7.py: rows of tags that the file does not have
    "simpler_env_google": 0,
    "simpler_env_widowx": 1,
    "libero_sim": 2,
    "new_embodiment": 10,
    "robocasa_panda_omron": 10,
    "robocasa_gr1_tabletop": 10,
    "unitree_g1_sonic": 11,
    "oxe_droid_relative_eef_relative_joint": 24,
    "real_g1_relative_eef_relative_joints": 25,
    "unitree_g1_full_body_with_waist_height_nav_cmd": 25,
    "real_r1_pro_sharpa_relative_eef": 26,
    "real_r1_pro_sharpa_relative_eef_human": 26,
    "real_r1_pro_sharpa_relative_eef_maxinsights": 26,
    "real_r1_pro_sharpa_relative_eef_mecka": 26,
    "xdof_relative_eef_relative_joint": 27,
    "xdof_relative_eef_relative_joint_subtask": 27,
}
ONLY: Mapping[str, tuple[object, ...]] = {
    "clip_outliers": (True,),
    "exclude_state": (False,),
    "use_tactile": (False,),
}
"""Settings of which only these values are repeated; the first is NVIDIA's default."""
ALONE: Mapping[str, Any] = {"crop_fraction": 0.95, "shortest_image_edge": 256}
"""What NVIDIA's program takes where the settings are not there at all."""
FREE = (
    "modality_configs", "use_percentiles", "apply_sincos_state_encoding", "use_relative_action",
    "formalize_language", "max_state_dim", "max_action_dim", "max_action_horizon",  # read below
    "use_albumentations", "letter_box_transform",  # read by `framing_of`, as the next four are
    "image_crop_size", "image_target_size", "shortest_image_edge", "crop_fraction",
    "extra_augmentation_config",  # only in training
    "random_rotation_angle", "color_jitter_params", "state_dropout_prob",  # only in training
    "model_name", "model_type", "transformers_loading_kwargs",  # of the tokenizer, which is given
    "use_mean_std", "embodiment_id_mapping",  # not read by NVIDIA's processor: ROWS has the rows
    "tactile_state_keys", "tactile_input_shape", "tactile_embed_dim",  # only with use_tactile
)  # fmt: skip


@dataclass(frozen=True)
class Frames:
    """How frames get the policy's size; see `vlafit.codec.images`."""

    name: Framing
    crop: float
    letter_box: bool


@dataclass(frozen=True)
class Processors:
    """The content of NVIDIA's three files, and where they lie."""

    folder: Path
    config: Mapping[str, Any]
    """processor_config.json."""
    statistics: Mapping[str, Any]
    rows: Mapping[str, Any] | None
    """embodiment_id.json; None where there is none."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the processor is built with. Raises WeightsError where it is no table."""
        settings = self.config.get("processor_kwargs")
        if not isinstance(settings, Mapping):
            raise WeightsError(
                f"{self.folder / CONFIG}: processor_kwargs is {settings!r}; it must be a table"
            )
        return settings

    @property
    def modalities(self) -> Mapping[str, Any]:
        """The settings of each embodiment. Raises WeightsError where they are no table."""
        known = self.settings.get("modality_configs")
        if not isinstance(known, Mapping):
            raise WeightsError(f"{self.folder / CONFIG}: modality_configs is {known!r}; it must be a table")
        return known

    @property
    def tags(self) -> tuple[str, ...]:
        """The embodiments of which there are both settings and statistics."""
        return tuple(tag for tag in self.modalities if tag in self.statistics)

    def row_of(self, tag: str) -> int:
        """Return the row of the embodiment tables. Raises WeightsError for a tag that has none."""
        row = {**PUBLISHED, **(self.rows or {})}.get(tag)
        if not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise WeightsError(
                f"{self.folder / ROWS}: the embodiment {tag!r} has the row {row!r}; give one: config "
                "embodiment_rows = [N]"
            )
        return row

    def to_json(self, tag: str) -> dict[str, Any]:
        """Return the files' content and the chosen embodiment, as a codec keeps them."""
        files = {CONFIG: dict(self.config), STATISTICS: dict(self.statistics)}
        return {ORIGIN: {"tag": tag, **files, **({} if self.rows is None else {ROWS: dict(self.rows)})}}


def read(folder: Path) -> Processors | None:
    """Return the content of the files in `folder`; None where settings or statistics are not there."""
    config, numbers, rows = (read_json_if_present(folder / name) for name in (CONFIG, STATISTICS, ROWS))
    return None if config is None or numbers is None else Processors(folder, config, numbers, rows)


def kept(codec: Codec) -> tuple[Processors, str] | None:
    """Return the files that a codec was read from, and its embodiment there; None for other codecs.

    Raises WeightsError where they are not what `to_json` wrote.
    """
    values = codec.origin.get(ORIGIN)
    if values is None:
        return None
    kept: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
    tag, config, statistics, rows = (kept.get(name) for name in ("tag", CONFIG, STATISTICS, ROWS))
    if (
        isinstance(tag, str)
        and isinstance(config, Mapping)
        and isinstance(statistics, Mapping)
        and isinstance(rows, Mapping | None)
    ):
        return Processors(Path("codec.json"), config, statistics, rows), tag
    raise WeightsError(f"codec.json: origin.{ORIGIN} is not what vlafit writes there; it was edited")


def tags(folder: Path) -> tuple[str, ...]:
    """Return the embodiments of which there are both settings and statistics."""
    files = read(folder)
    return () if files is None else files.tags


def chosen(folder: Path, name: str | Path | None) -> str | None:
    """Return the embodiment that `name` means, without one the only one; None where it is not told.

    Raises WeightsError for a name that is not there.
    """
    have = tags(folder)
    if name is None:
        return have[0] if len(have) == 1 else None
    if str(name) not in have:
        listed = ", ".join(have) or "none at all"
        raise WeightsError(
            f"{folder}: there are no statistics of {str(name)!r}{nearest(str(name), have)}; it has {listed}"
        )
    return str(name)


def row_of(folder: Path, tag: str, rows: int) -> int:
    """Return the row of the embodiment tables, which have `rows`.

    Raises WeightsError for a tag that has none, or one that the tables lack.
    """
    row = _required(folder).row_of(tag)
    if row >= rows:
        raise WeightsError(
            f"{folder / ROWS}: the embodiment {tag!r} has the row {row}, and the tables of these weights "
            f"have rows 0 to {rows - 1}; correct it, or give another one: config embodiment_rows=[N]"
        )
    return row


def formal(folder: Path) -> bool:
    """Whether instructions are put into lower case, without punctuation."""
    return bool(_required(folder).settings.get("formalize_language", True))


def backbone(folder: Path) -> str:
    """Return the name of the backbone, whose tokenizer makes the prompts; "" where none is named."""
    return str(_required(folder).settings.get("model_name", ""))


def frames(folder: Path) -> Frames:
    """Return how frames are framed. Raises WeightsError where the files do not say what NVIDIA writes."""
    files = _required(folder)
    sides = files.settings.get("image_target_size") or [0]
    side = sides[0] if isinstance(sides, list) and type(sides[0]) is int else 0
    return framing_of(files.settings, side, str(folder / CONFIG))


def framing_of(settings: Mapping[str, Any], size: int, where: str) -> Frames:
    """Return how images get `size` pixels. Raises WeightsError for what is no size or share.

    With albumentations crop_fraction counts, or image_crop_size relative to image_target_size; without it,
    image_crop_size.
    """
    by_area, boxed = (settings.get(key, False) for key in ("use_albumentations", "letter_box_transform"))
    for key, value in (("use_albumentations", by_area), ("letter_box_transform", boxed)):
        if not isinstance(value, bool):
            raise WeightsError(f"{where}: {key} is {value!r}; it must be true or false")
    crop, share = settings.get("image_crop_size"), settings.get("crop_fraction")
    cut = groot_crop(size)
    if crop is not None:
        if not isinstance(crop, list) or len(set(crop)) != 1 or type(crop[0]) is not int or crop[0] < 1:
            raise WeightsError(f"{where}: image_crop_size is {crop!r}; only squares are supported here")
        cut = crop[0]
    if not by_area:
        if cut > size > 0:
            raise WeightsError(f"{where}: image_crop_size is {crop}, of {size} pixels")
        return Frames("nvidia", 0.0 if cut == groot_crop(size) else cut / max(size, 1), boxed)
    if "crop_fraction" not in settings:
        share = ALONE["crop_fraction"]
    elif share is None:
        share = cut / max(size, 1)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise WeightsError(f"{where}: crop_fraction is {share!r}; it is a share of a side, up to 1")
    return Frames("nvidia_area", float(share), boxed)


def _required(folder: Path) -> Processors:
    files = read(folder)
    assert files is not None  # callers have found its tags
    return files


def make_codec(files: Processors, tag: str, needs: Needs, words: Tokenizer) -> tuple[Codec, tuple[str, ...]]:
    """Return the codec of an embodiment, and notes for the report.

    Raises Unrepeated for a setting that vlafit does not repeat, and WeightsError for files that are damaged.
    """
    settings, folder = files.settings, files.folder
    where = f"{folder / CONFIG}: {tag}"
    _require_repeated(settings, needs, str(folder / CONFIG))
    modalities = files.modalities[tag]
    video, state, action = (groups.modality(modalities, name, where) for name in ("video", "state", "action"))
    for name, one in (("video", video), ("state", state)):
        if one.deltas != (0,):
            raise Unrepeated(
                f"{where}: {name}.delta_indices are {list(one.deltas)}; only the present step, [0], is "
                "supported"
            )
    steps = len(action.deltas)
    if action.deltas != tuple(range(steps)) or not 0 < steps <= needs.chunk:
        raise Unrepeated(
            f"{where}: action.delta_indices are {list(action.deltas)}; only the first steps of "
            f"{needs.chunk}, one after another, are supported"
        )
    numbers = files.statistics[tag]
    framing = framing_of(settings, needs.image_size, str(folder / CONFIG))
    percentiles = bool(settings.get("use_percentiles", False))
    sincos = bool(settings.get("apply_sincos_state_encoding", False))
    relative = bool(settings.get("use_relative_action", False))
    found = f"{folder / STATISTICS}: {tag}"
    states = groups.states(state, numbers, percentiles, sincos, found)
    actions = groups.actions(action, states, numbers, percentiles, relative, steps, found)
    common = groups.usual_range(percentiles)
    robot = Embodiment(
        name=tag,
        cameras=tuple(Feature(key, (needs.image_size, needs.image_size, 3)) for key in video.keys),
        state=Feature("state", (len(states.labels),), "", states.labels),
        action=Feature("action", (len(actions.labels),), "", actions.labels),
        hz=0.0,
        control="",
    )
    config = CodecConfig(
        cameras=video.keys,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=common,
        relative=actions.relative,
        relative_to=actions.relative_to,
        prompt="groot" if settings.get("formalize_language", True) else "text",
        max_tokens=needs.max_tokens,
        framing=framing.name,
        crop=framing.crop,
        letter_box=framing.letter_box,
        state_form=ColumnForm(actions.references, angles=states.angles),
        action_form=ColumnForm(actions.poses),
        state_methods=() if set(states.methods) == {common} else states.methods,
        action_methods=() if set(actions.methods) == {common} else actions.methods,
        valid_steps=0 if steps == needs.chunk else steps,
    )
    statistics = {"state": states.statistics(found), "action": actions.statistics(found)}
    language = groups.modality(modalities, "language", where).keys[0]
    notes = [f"statistics of {tag}; its instruction is {language!r} in NVIDIA's data"]
    if settings.get("crop_fraction") is not None and framing.name == "nvidia":
        notes.append(
            "crop_fraction is only read with use_albumentations, as in NVIDIA's program; LeRobot crops by it"
        )
    return Codec(config, robot, statistics, words, origin=files.to_json(tag)), tuple(notes)


def _require_repeated(settings: Mapping[str, Any], needs: Needs, where: str) -> None:
    for key, value in settings.items():
        allowed: Sequence[object] | None = ONLY.get(key)
        if allowed is None and key not in FREE:
            raise Unrepeated(f"{where}: {key} is {value!r}; it is not known here, so to ignore it is a guess")
        if allowed is not None and value not in allowed:
            raise Unrepeated(f"{where}: {key} is {value!r}; only {allowed[0]!r} is supported here")
    side = needs.image_size
    sizes = {
        "max_state_dim": (needs.state_dim,),
        "max_action_dim": (needs.action_dim,),
        "max_action_horizon": (needs.chunk,),
        "image_target_size": ([side, side],),
    }
    edge = settings.get("shortest_image_edge", ALONE["shortest_image_edge"])
    if settings.get("use_albumentations") and edge is not None:
        sizes = {**sizes, "shortest_image_edge": (side,)}
        settings = {**settings, "shortest_image_edge": edge}
    for key, (wanted,) in sizes.items():
        if settings.get(key, wanted) != wanted:
            raise Unrepeated(f"{where}: {key} is {settings[key]}, and {wanted} by the weights' config")
