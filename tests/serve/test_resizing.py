"""`vlafit serve --resize`: openpi's and vla-eval's frames of another size are scaled to the robot's."""

from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect as dial

from tests.serve.conftest import Serve
from tests.serve.robots import Summing, Watching, seen
from vlafit.errors import ConfigError
from vlafit.serve import wire
from vlafit.serve.options import Options
from vlafit.types import EpisodeKey, Observation

ONE = seen()
TWICE = {name: image.repeat(2, 0).repeat(2, 1) for name, image in ONE.images.items()}  # 16x16


def openpi(images: dict[str, Any]) -> bytes:
    return wire.pack({**images, "state": ONE.state, "prompt": ONE.instruction})


def vla_eval(images: dict[str, Any], seq: int) -> bytes:
    payload = {"images": images, "task_description": ONE.instruction, "state": ONE.state}
    return wire.pack(
        {"type": "observation", "payload": payload, "seq": seq, "timestamp": 1.0}, text_keys=True
    )


def asked(serve: Serve, frames: list[bytes], **options: Any) -> list[Any]:
    with dial(serve(Watching(), **options).address, proxy=None, compression=None) as client:
        client.recv(timeout=10)
        answers = []
        for frame in frames:
            client.send(frame)
            answer = client.recv(timeout=10)
            answers.append(wire.unpack(answer) if isinstance(answer, bytes) else answer)
        return answers


def expected(replan: int, task: str = "", images: dict[str, Any] | None = None) -> bytes:
    one = Observation(images or dict(ONE.images), ONE.state, ONE.instruction)
    (chunk,) = Summing().act([one], [EpisodeKey(0, task, replan)])
    return chunk.actions.tobytes()


def test_frames_of_twice_the_size_are_means_of_four_pixels_and_that_is_said_once(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = asked(serve, [openpi(TWICE), openpi(TWICE)], resize=True)
    for number, answer in enumerate((first, second)):
        assert answer["actions"].tobytes() == expected(number, ONE.instruction)
    assert len(first["warnings"]) == 2 and "warnings" not in second
    assert "camera 'front': frames of 16x16 are scaled to the robot's 8x8" in first["warnings"][0]
    assert caplog.text.count("camera 'front': frames of 16x16") == 1


def test_vla_evals_frames_are_scaled_too(serve: Serve) -> None:
    (answer,) = asked(serve, [vla_eval(TWICE, 3)], resize=True)
    assert answer["type"] == "action"
    assert answer["payload"]["actions"].tobytes() == expected(0)[:12]


def test_smaller_frames_are_enlarged(serve: Serve) -> None:
    half = {name: np.full((4, 4, 3), 9, np.uint8) for name in ONE.images}
    (answer,) = asked(serve, [openpi(half)], resize=True)
    full = {name: np.full((8, 8, 3), 9, np.uint8) for name in ONE.images}
    assert answer["actions"].tobytes() == expected(0, ONE.instruction, full)


@pytest.mark.parametrize("shape", [(16, 12, 3), (0, 0, 3), (16, 16, 4), (1, 16, 16, 3)])
def test_frames_of_another_shape_are_refused_as_without(serve: Serve, shape: tuple[int, ...]) -> None:
    (answer,) = asked(serve, [openpi({**TWICE, "front": np.zeros(shape, np.uint8)})], resize=True)
    assert isinstance(answer, str) and "camera 'front': has shape" in answer


def test_without_it_another_size_is_refused_and_the_text_names_the_option(serve: Serve) -> None:
    (answer,) = asked(serve, [openpi(TWICE)])
    assert "camera 'front': has shape (16, 16, 3), the robot's is (8, 8, 3)" in answer
    assert "--resize" in answer


def test_a_switch_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="server: resize"):
        Options(resize="yes")  # type: ignore[arg-type]
