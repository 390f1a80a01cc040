"""Draw what a finding of a dataset check is about: its frames or curves, beside those of a sound episode."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks import Finding
from vlafit.datasets.checks.clips import measure
from vlafit.datasets.checks.motion import scale_of
from vlafit.datasets.store import EpisodeStore
from vlafit.report.episode import labels
from vlafit.report.tiles import Picture, fitted, stacked

WIDTH, TILES = 960, 8  # pixels of a picture, and frames in a row of it
CAPTION = 18  # pixels of a line of text
CONCERNED = (207, 34, 46)
FRAME = 3  # pixels of the border of a frame that the finding is about
PANEL = 190  # pixels of the height of a chart, with its labels
BESIDE, ABOVE, BELOW = 70, 20, 22  # pixels of the labels around a chart
ZOOM = 40  # steps on either side of what is shown enlarged
LEFT, RIGHT = "#0b7285", "#b35900"
SHIFTED = ("action_lag", "video_shift")  # shown enlarged where the robot moves most
IN_MOTION = ("frozen_frames", "video_shift")  # the image's change is shown beside the state's speed


@dataclass(frozen=True)
class Line:
    """A curve over the steps of an episode."""

    label: str
    values: NDArray[np.float64]  # [T]


@dataclass(frozen=True)
class Panel:
    """One or two curves of an episode, the second with an axis of its own."""

    title: str
    lines: Sequence[Line]
    window: tuple[int, int]
    concerned: tuple[int, int] | None = None


def draw_finding(
    store: EpisodeStore, finding: Finding, sound: int | None, *, frames: bool = True
) -> Picture | None:
    """Return the picture of a finding; None for one that no picture shows.

    `sound` is the position of an episode to compare with, if there is one. `frames` False decodes none.
    """
    episode = store.index(finding.episode) if finding.episode else 0
    beside = store.index(finding.other) if finding.other else sound
    rows: list[Picture] = []
    if finding.cameras and frames:
        rows += _frames(store, finding, episode, beside)
    elif finding.other and frames:
        for number in (episode, store.index(finding.other)):
            rows += _overview(store, number, store.embodiment.cameras[0].name)
    panels = []
    for number in (episode, *(() if beside is None or finding.other else (beside,))):
        if finding.columns:
            panels.append(_columns(store, finding, number, number == episode))
        elif finding.kind in IN_MOTION and frames:
            panels.append(_motion(store, finding, number, number == episode))
    rows += [_chart(panels)] if panels else []
    return stacked(rows, WIDTH) if rows else None


def _frames(store: EpisodeStore, finding: Finding, episode: int, beside: int | None) -> list[Picture]:
    if finding.step is not None:
        return _around(store, finding, episode)
    rows = _overview(store, episode, finding.cameras[0])
    if beside is not None:
        for camera in finding.cameras:
            rows += _overview(store, beside, camera)
    return rows


def _overview(store: EpisodeStore, episode: int, camera: str) -> list[Picture]:
    """Return frames from the first step to the last, below a caption."""
    length = store.episodes[episode].length
    steps = np.linspace(0, length - 1, min(TILES, length)).round().astype(int).tolist()
    return [_caption(f"{store.episodes[episode].id}, camera {camera}"), _row(store, episode, steps, camera)]


def _around(store: EpisodeStore, finding: Finding, episode: int) -> list[Picture]:
    """Return frames from before the step of a finding until after it, those concerned with a border."""
    camera, length = finding.cameras[0], store.episodes[episode].length
    first, last = _stretch(finding)
    last = min(last, length - 1)
    if last - first < TILES - 3:
        start = max(0, min(first - 2, length - TILES))
        steps = list(range(start, min(start + TILES, length)))
    else:
        inside = np.linspace(first, last, TILES - 2).round().astype(int).tolist()
        steps = sorted({max(0, first - 1), *inside, min(length - 1, last + 1)})
    concerned = {step for step in steps if first <= step <= last}
    return [
        _caption(f"{store.episodes[episode].id}, camera {camera}, around step {first}"),
        _row(store, episode, steps, camera, concerned),
    ]


def _stretch(finding: Finding) -> tuple[int, int]:
    """Return the first and last step of a finding; a cut is between two frames, and named by the first."""
    first = (finding.step or 0) + (finding.kind == "cut")
    return first, first + finding.steps - 1


def _row(
    store: EpisodeStore, episode: int, steps: Sequence[int], camera: str, concerned: Set[int] = frozenset()
) -> Picture:
    from PIL import Image, ImageDraw

    tiles = []
    for step, frame in zip(steps, store.images(episode, steps, camera), strict=True):
        tile = Image.fromarray(fitted(frame, WIDTH // TILES))
        draw = ImageDraw.Draw(tile)
        draw.rectangle((0, 0, 7 + 6 * len(str(step)), 13), fill=(255, 255, 255))
        draw.text((4, 1), str(step), fill=(0, 0, 0))
        if step in concerned:
            draw.rectangle((0, 0, tile.width - 1, tile.height - 1), outline=CONCERNED, width=FRAME)
        tiles.append(np.asarray(tile))
    return np.concatenate(tiles, axis=1)


def _caption(text: str) -> Picture:
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (WIDTH, CAPTION), (255, 255, 255))
    ImageDraw.Draw(sheet).text((6, 3), text, fill=(0, 0, 0))
    return np.asarray(sheet)


def _columns(store: EpisodeStore, finding: Finding, episode: int, is_own: bool) -> Panel:
    """Return the curves of the columns of a finding in one episode."""
    robot = store.embodiment
    both = {"state": (robot.state, store.state(episode)), "action": (robot.action, store.actions(episode))}
    lines = []
    for name, dimension in finding.columns:
        feature, values = both[name]
        unit = f" [{feature.unit}]" if feature.unit else ""
        label = f"{name} {labels(feature)[dimension]}{unit}"
        lines.append(Line(label, values[:, dimension].astype(np.float64)))
    return _panel(store, finding, episode, is_own, lines)


def _motion(store: EpisodeStore, finding: Finding, episode: int, is_own: bool) -> Panel:
    """Return how much the image changes at each step of an episode, and how fast its state moves."""
    clip = measure(store, episode, finding.cameras[0], lambda frames: None)
    change, speed = Line("image's change", clip.change), Line("state's speed", _speed(store, episode))
    return _panel(store, finding, episode, is_own, (change, speed))


def _speed(store: EpisodeStore, episode: int) -> NDArray[np.float64]:
    state = store.state(episode)
    return scale_of([state]).steps(state)


def _panel(store: EpisodeStore, finding: Finding, episode: int, is_own: bool, lines: Sequence[Line]) -> Panel:
    info = store.episodes[episode]
    first, last = _stretch(finding)
    at_step = finding.step is not None
    if at_step:
        middle = (first + last) // 2
    else:
        speed = np.convolve(_speed(store, episode), np.ones(min(ZOOM, max(1, info.length - 1))))
        middle = max(0, int(speed.argmax()) - ZOOM // 2)
    window = (0, info.length - 1)
    if at_step or finding.kind in SHIFTED:
        half = max(ZOOM, last - first) if at_step else ZOOM
        window = (max(0, middle - half), min(info.length - 1, middle + half))
    title = info.id if is_own else f"{info.id}, for comparison"
    return Panel(title, lines, window, (first, last) if at_step and is_own else None)


def _chart(panels: Sequence[Panel]) -> Picture:
    """Draw panels below one another, with the same range of values in each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi, height = 100, PANEL * len(panels)
    figure = Figure((WIDTH / dpi, height / dpi), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        bottom = (len(panels) - 1 - number) * PANEL + BELOW
        box = (BESIDE, bottom, WIDTH - 2 * BESIDE, PANEL - ABOVE - BELOW)
        axes = figure.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
        axes.set_title(panel.title, fontsize=8, loc="left", pad=3)
        axes.set_xlim(panel.window[0] - 0.5, panel.window[1] + 0.5)
        if panel.concerned is not None:
            first, last = panel.concerned
            axes.axvspan(first - 0.5, last + 0.5, color="#cf222e", alpha=0.15, linewidth=0)
        for side, line in enumerate(panel.lines):
            colour = (LEFT, RIGHT)[side]
            own = axes.twinx() if side else axes
            own.plot(line.values, color=colour, linewidth=1.2, marker=".", markersize=3)
            own.set_ylabel(line.label, color=colour, fontsize=8)
            own.tick_params(labelsize=7)
            own.set_ylim(*_range([p.lines[side] for p in panels]))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the range of values that holds all finite ones, with some room."""
    values = np.concatenate([line.values for line in lines])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room
