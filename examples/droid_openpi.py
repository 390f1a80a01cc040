"""Drive a DROID-like arm by openpi's own client (pip install openpi-client, numpy below 2): no vlafit on the
robot.

    vlafit serve CHECKPOINT --map observation/exterior_image_1_left=exterior \\
        --map observation/wrist_image_left=wrist --map observation/joint_position=state \\
        --map observation/gripper_position=state
    python examples/droid_openpi.py HOST PORT

Here the pictures are noise; put those of the cameras in their place.
"""

import sys

import numpy as np

try:
    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.websocket_client_policy import WebsocketClientPolicy
except ImportError as error:
    sys.exit(f"droid_openpi.py: {error}; run: pip install openpi-client 'numpy<2'")


def main(host: str, port: str) -> None:
    if not port.isdecimal():
        sys.exit(f"droid_openpi.py: port {port!r} is not a number")
    try:
        client = WebsocketClientPolicy(host, int(port))
    except OSError as error:
        sys.exit(f"droid_openpi.py: {host}:{port} cannot be reached: {error}")
    robot = client.get_server_metadata()["embodiment"]
    cameras = {camera["name"]: camera["shape"] for camera in robot["cameras"]}
    if not {"exterior", "wrist"} <= set(cameras):
        sys.exit(
            f"droid_openpi.py: this arm has the cameras exterior and wrist, the policy's are {[*cameras]}"
        )
    rng = np.random.default_rng(0)
    policy = ActionChunkBroker(client, action_horizon=8)
    for _ in range(16):
        observation = {
            "observation/exterior_image_1_left": rng.integers(0, 256, cameras["exterior"], np.uint8),
            "observation/wrist_image_left": rng.integers(0, 256, cameras["wrist"], np.uint8),
            "observation/joint_position": np.zeros(7, np.float32),
            "observation/gripper_position": np.zeros(1, np.float32),
            "prompt": "pick up the cup",
        }
        try:
            action = policy.infer(observation)["actions"]
        except RuntimeError as error:  # what the server says of an observation that it refuses
            sys.exit(f"droid_openpi.py: {error}")
        print(action)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: droid_openpi.py HOST PORT")
    main(*sys.argv[1:])
