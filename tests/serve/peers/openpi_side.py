"""Runs where openpi-client is installed: drives a server by openpi's own client, unchanged.

    python openpi_side.py HOST PORT TOKEN INPUT.json OUTPUT.json [FRAMES.json]

INPUT holds observations (arrays as lists with dtype), OUTPUT gets what the client returned, or the error
that it raised; FRAMES, if named, every message of the connection as hexadecimal bytes.
"""

import json
import sys
from importlib.metadata import version

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


class Recorded:
    """A connection that remembers its messages."""

    def __init__(self, connection, frames):
        self._connection, self._frames = connection, frames

    def send(self, data):
        self._frames.append(["sent", data.hex()])
        self._connection.send(data)

    def recv(self):
        data = self._connection.recv()
        self._frames.append(["received", data.hex() if isinstance(data, bytes) else data])
        return data


def array(value):
    return (
        np.array(value["values"], value["dtype"]).reshape(value["shape"])
        if isinstance(value, dict)
        else value
    )


def plain(value):
    return {"dtype": value.dtype.str, "shape": value.shape, "hex": value.tobytes().hex()}


def main(host, port, token, source, target, record=None):
    client = WebsocketClientPolicy(host, int(port), token or None)
    frames = []
    if record:
        client._ws = Recorded(client._ws, frames)
    answers = []
    with open(source) as file:
        observations = [{key: array(value) for key, value in one.items()} for one in json.load(file)]
    for observation in observations:
        try:
            answer = client.infer(observation)
            answers.append({"actions": plain(answer["actions"]), "warnings": answer.get("warnings")})
        except RuntimeError as error:
            answers.append({"error": str(error)})
    if not record:  # by the broker, which gives one action at a time, over a connection of its own
        other = WebsocketClientPolicy(host, int(port), token or None)
        broker = ActionChunkBroker(other, action_horizon=2)
        steps = [broker.infer(observations[0]) for _ in range(4)]
        warnings = [step.get("warnings") for step in steps]
        answers.append({"steps": [plain(step["actions"]) for step in steps], "warnings": warnings})
    metadata = client.get_server_metadata()
    facts = {"action_horizon": metadata["action_horizon"], "robot": metadata["embodiment"]["name"]}
    with open(target, "w") as file:
        json.dump({"metadata": facts, "answers": answers}, file)
    if record:
        versions = {name: version(name) for name in ("openpi-client", "msgpack", "numpy", "websockets")}
        with open(record, "w") as file:
            json.dump({"versions": versions, "frames": frames}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
