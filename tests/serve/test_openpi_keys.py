"""Keys of openpi's frames: each thing by one of its names, never by two."""

import numpy as np
import pytest

from tests.serve.robots import Summing, described, seen
from vlafit.errors import EmbodimentError
from vlafit.serve.protocols import read_openpi
from vlafit.types import EpisodeKey

IMAGES, STATE = seen().images, seen().state
FRAME = {**IMAGES, "state": STATE, "prompt": "go left"}
KEY = EpisodeKey(0, "", 0)
BLACK = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({"observation/front": BLACK}, "'front' and 'observation/front'"),
        ({"images": {"front": BLACK}}, "'front' and 'images/front'"),
        ({"observation/state": STATE}, "'state' and 'observation/state'"),
        ({"observation/prompt": "go right"}, "'prompt' and 'observation/prompt'"),
    ],
)
def test_two_keys_for_one_thing_are_refused_by_both_names(more: dict, keys: str) -> None:
    with pytest.raises(EmbodimentError, match=keys):
        read_openpi(FRAME | more, described(Summing()), {}, KEY)


def test_the_prompt_may_have_the_prefix() -> None:
    frame = {name: value for name, value in FRAME.items() if name != "prompt"}
    request = read_openpi(frame | {"observation/prompt": "go left"}, described(Summing()), {}, KEY)
    assert request.observation.instruction == "go left" and request.key.task == "go left"
