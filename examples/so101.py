"""Drive an SO-101 arm through LeRobot's robot classes by a policy that `vlafit serve` serves.

    pip install vlafit 'lerobot[feetech]'        # LeRobot needs Python 3.12
    python examples/so101.py --url ws://gpu-machine:8000 --token-file token --port /dev/ttyACM0 \\
        --instruction "put the cube into the cup"

It has not been run on an arm: LeRobot's interface is that of its release 0.6.1.
"""

import argparse
import sys
import time
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
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    token = Path(options.token_file).read_text() if options.token_file else ""

    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    with vlafit.connect(options.url, token=token) as policy:
        joints = policy.embodiment.action.labels  # as LeRobot names them: shoulder_pan.pos, ...
        cameras = {
            camera.name: OpenCVCameraConfig(
                index_or_path=number, fps=30, height=camera.shape[0], width=camera.shape[1]
            )
            for number, camera in enumerate(map(policy.embodiment.camera, policy.expected.seen))
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


if __name__ == "__main__":
    try:
        main()
    except (VlafitError, OSError, ImportError) as error:  # of the serial port, and of a missing package, too
        sys.exit(f"so101.py: {error}")
