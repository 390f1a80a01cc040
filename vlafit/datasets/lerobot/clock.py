"""Whether the rows of an episode are as far apart in time as info.json says, and its frames as its rows."""

import numpy as np
from numpy.typing import NDArray

from vlafit.errors import DataError

TOLERANCE_S = 1e-4
"""LeRobot's own `tolerance_s`."""


def require_clock(times_s: NDArray[np.float64], fps: float, tolerance_s: float, where: str) -> None:
    """Raise DataError naming the first row whose time [T] is not 1 / `fps` after that of the row before.

    As in LeRobot a step may differ by `tolerance_s`; timestamps that do not increase are never accepted.
    """
    steps = np.diff(times_s)
    rounding = np.abs(times_s[1:]) * np.finfo(np.float32).eps  # timestamps are float32
    backward, uneven = steps <= 0, np.abs(steps - 1 / fps) > tolerance_s + rounding
    if not (backward | uneven).any():
        return
    row = 1 + int((backward if backward.any() else uneven).argmax())
    place = (
        f"{where}: row {row} has timestamp {times_s[row]:.6g} s, row {row - 1} has {times_s[row - 1]:.6g} s"
    )
    if backward.any():
        raise DataError(
            f"{place}: timestamps must increase; correct the file, or leave the episode "
            "out (skip in the card)"
        )
    raise DataError(
        f"{place}: {steps[row - 1]:.6g} s apart, where info.json says fps {fps:g} ({1 / fps:.6g} s); correct "
        "fps or the timestamps, leave the episode out (skip in the card), or, if rows are to be read one by "
        "one whatever their times, set [lerobot] tolerance_s in the card to the largest difference that is "
        f"meant (here {np.abs(steps - 1 / fps).max():.2g})"
    )


def frame_times(
    shown_s: NDArray[np.float64], stamps: NDArray[np.float64], fps: float, where: str
) -> list[float]:
    """Return when the frames of an episode are shown, whose rows [T] are not stamped frame_index / fps.

    `shown_s` are the times in its video from its first frame on. Raises DataError unless there is one for
    each row, and they agree with the rows' timestamps, or with a constant rate, to half a frame.
    """
    length = len(stamps)
    window = shown_s[:length]
    if len(window) < length:
        raise DataError(f"{where} has {len(window)} frames, not {length}")
    passed = window - window[0]
    clocks = (stamps - stamps[0], np.arange(length) / fps)
    if all(np.abs(passed - clock).max() > 0.5 / fps for clock in clocks):
        raise DataError(
            f"{where}: the timestamps of its rows are neither those of its frames nor {fps:g} a second; fix "
            "them, or leave the episode out (skip in the card)"
        )
    return window.tolist()
