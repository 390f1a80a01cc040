"""Robots of one run have the weights that recipe and checkpoint name, and a line says which."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.policies.tiny import random_policy
from vlafit import checkpoints
from vlafit.codec import Codec, CodecSet
from vlafit.errors import ConfigError
from vlafit.policies import groot, xvla
from vlafit.train.embodiment_numbers import numbered, require_used

GROOT = Path(__file__).parents[1] / "fixtures" / "lerobot_groot"
XVLA, TINY_GROOT = xvla.SIZES["xvla-tiny"], groot.SIZES["groot-tiny"]


@pytest.fixture(scope="module")
def robots() -> list[Codec]:
    codec = checkpoints.load(GROOT, tokenizer=GROOT / "char_tokenizer").codec
    assert isinstance(codec, Codec)
    return [codec.with_changes(embodiment=replace(codec.embodiment, name=name)) for name in ("arm", "hand")]


def test_robots_of_an_xvla_have_the_named_domain_and_those_after_it(robots: list[Codec]):
    made, lines = numbered(robots, random_policy(replace(XVLA, domain=2)))
    assert [one.embodiment_id for one in made] == [2, 3]
    assert lines == [
        "embodiment 'arm': the weights of domain 2",
        "embodiment 'hand': the weights of domain 3",
    ]
    kept = [robots[0], robots[1].with_changes(embodiment_id=2)]  # the checkpoint's number of that robot
    assert [one.embodiment_id for one in numbered(kept, random_policy(replace(XVLA, domain=2)))[0]] == [3, 2]
    alone, lines = numbered(robots[:1], random_policy(XVLA))
    assert [one.embodiment_id for one in alone] == [None] and not lines
    with pytest.raises(ConfigError, match=r"domain is 3: .* would use \[3, 4\].*0 to 3.*domain = 2"):
        numbered(robots, random_policy(replace(XVLA, domain=3)))


def test_a_new_robot_gets_no_number_that_the_checkpoint_gave_to_another(robots: list[Codec]):
    before = CodecSet([robots[0].with_changes(embodiment_id=1)])
    made, lines = numbered(robots[1:], random_policy(replace(XVLA, domain=1)), before)
    assert [one.embodiment_id for one in made] == [2]
    assert lines == ["embodiment 'hand': the weights of domain 2"]


def test_robots_of_a_groot_have_a_row_each(robots: list[Codec]):
    _, lines = numbered(robots, random_policy(replace(TINY_GROOT, embodiment_rows=(2, 0))))
    assert lines == [
        "embodiment 'arm': the weights of embodiment_rows 2",
        "embodiment 'hand': the weights of embodiment_rows 0",
    ]
    with pytest.raises(
        ConfigError, match=r"embodiment_rows is \[1\], .*\(arm, hand\) are numbers \[0, 1\].*= \[1, 2\]"
    ):
        numbered(robots, random_policy(replace(TINY_GROOT, embodiment_rows=(1,))))


def test_a_fresh_row_that_no_robot_uses_is_refused_by_both_numbers(robots: list[Codec]):
    one, policy = CodecSet(robots[:1]), random_policy(replace(XVLA, domain=3))
    require_used(["expert", "embodiment:3"], one, policy)
    with pytest.raises(
        ConfigError,
        match=r"'embodiment:2' .* 'arm' has those of domain 3\. .*config.domain = 2; .*'embodiment:3'",
    ):
        require_used(["embodiment:3", "embodiment:2"], one, policy)
    policy = random_policy(replace(XVLA, domain=1))
    both, _ = numbered(robots, policy)
    require_used(["embodiment:1", "embodiment:2"], both, policy)
    with pytest.raises(ConfigError, match="'embodiment:3' .* 'arm' .* of domain 1, 'hand' .* of domain 2"):
        require_used(["embodiment:3"], both, policy)
    policy = random_policy(replace(TINY_GROOT, embodiment_rows=(2, 0)))
    require_used(["embodiment:0"], numbered(robots, policy)[0], policy)
    with pytest.raises(
        ConfigError, match=r"'embodiment:0' .* 'arm' has those of embodiment_rows 2\. .*_rows = \[0\]; "
    ):
        require_used(["embodiment:0"], one, policy)
