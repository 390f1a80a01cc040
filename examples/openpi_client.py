"""Drive a DROID-like arm by openpi's own client (pip install openpi-client, numpy below 2): no vlafit on the
robot.

    vlafit serve CHECKPOINT --map observation/exterior_image_1_left=exterior \\
        --map observation/wrist_image_left=wrist --map observation/joint_position=state \\
        --map observation/gripper_position=state
    python examples/openpi_client.py HOST PORT

Here the pictures are noise; put those of the cameras in their place.
"""

import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main(host: str, port: str) -> None:
    client = WebsocketClientPolicy(host, int(port))
    robot = client.get_server_metadata()["embodiment"]
    cameras = {camera["name"]: camera["shape"] for camera in robot["cameras"]}
    rng = np.random.default_rng(0)
    policy = ActionChunkBroker(client, action_horizon=8)
    for _ in range(16):
        action = policy.infer(
            {
                "observation/exterior_image_1_left": rng.integers(0, 256, cameras["exterior"], np.uint8),
                "observation/wrist_image_left": rng.integers(0, 256, cameras["wrist"], np.uint8),
                "observation/joint_position": np.zeros(7, np.float32),
                "observation/gripper_position": np.zeros(1, np.float32),
                "prompt": "pick up the cup",
            }
        )["actions"]
        print(action)


if __name__ == "__main__":
    main(*sys.argv[1:])
