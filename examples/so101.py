"""Drive an SO-101 arm through LeRobot's robot classes by a policy that `vlafit serve` serves.

    pip install vlafit 'lerobot[feetech]'        # LeRobot needs Python 3.12
    python examples/so101.py --url ws://gpu-machine:8000 --token-file token --port /dev/ttyACM0 \\
        --camera front=0 --camera wrist=/dev/video2 --instruction "put the cube into the cup"

Every camera that the policy looks at is named with its device; `lerobot-find-cameras opencv` lists these,
with a picture of each. It has not been run on an arm: LeRobot's interface is that of its release 0.6.1.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import vlafit
from vlafit.errors import ConfigError, VlafitError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--token-file")
    parser.add_argument("--port", required=True)
    parser.add_argument("--camera", action="append", default=[], metavar="NAME=DEVICE")
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    token = Path(options.token_file).read_text() if options.token_file else ""

    with vlafit.connect(options.url, token=token) as policy:
        devices = named_devices(options.camera, policy.expected.seen)

        from lerobot.cameras.opencv import OpenCVCameraConfig
        from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

        joints = policy.embodiment.action.labels  # as LeRobot names them: shoulder_pan.pos, ...
        cameras = {
            name: OpenCVCameraConfig(index_or_path=device, fps=30, height=height, width=width)
            for name, device in devices.items()
            for height, width, _ in [policy.embodiment.camera(name).shape]
        }
        robot = SO101Follower(SO101FollowerConfig(port=options.port, cameras=cameras))
        others = sorted({*joints, *cameras} - {*robot.observation_features})
        if others or not joints:
            raise ConfigError(
                f"the policy is for {policy.embodiment.name!r}, whose joints and cameras {others} are none "
                f"of the arm's: {', '.join(robot.observation_features)}"
            )
        limits = vlafit.Limits.of(policy.embodiment, "clip", change=5.0)  # degrees a step
        execution = vlafit.Execution("real_time" if policy.described.guided else "chunk", replan=10)
        robot.connect()
        try:
            with vlafit.Controller(policy, execution, limits=limits, background=True) as control:
                control.start(options.instruction)
                begin = time.monotonic()
                for step in range(int(options.seconds * policy.embodiment.hz)):
                    seen = robot.get_observation()
                    images = {name: seen[name] for name in cameras}
                    action = control.step(images, [seen[name] for name in joints])
                    robot.send_action(dict(zip(joints, map(float, action), strict=True)))
                    time.sleep(max(0.0, begin + (step + 1) / policy.embodiment.hz - time.monotonic()))
        finally:
            robot.disconnect()


def named_devices(words: Sequence[str], seen: Sequence[str]) -> dict[str, int | Path]:
    """Return the device of each camera that the policy looks at, of words NAME=DEVICE."""
    devices: dict[str, int | Path] = {}
    for word in words:
        name, _, device = word.partition("=")
        if name not in seen or name in devices or not device:
            raise ConfigError(
                f"--camera {word}: must be NAME=DEVICE, once for each camera that the policy looks at: "
                f"{', '.join(seen)}"
            )
        devices[name] = int(device) if device.isdecimal() else Path(device)
    if lacking := [f"--camera {name}=DEVICE" for name in seen if name not in devices]:
        raise ConfigError(f"the policy looks at more cameras; add {' '.join(lacking)}")
    if len(set(devices.values())) < len(devices):
        raise ConfigError(f"--camera: two names for one device: {' '.join(words)}")
    return devices


if __name__ == "__main__":
    try:
        main()
    except (VlafitError, OSError, ImportError) as error:  # of the serial port, and of a missing package, too
        sys.exit(f"so101.py: {error}")
