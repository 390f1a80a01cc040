"""A protocol may perturb cameras, lights, the start and the sentence: by the seed, as another protocol."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.rollout.actors import Obedient, Saying, Trained
from vlafit.envs import EnvSpec, Perturbation, make
from vlafit.errors import ConfigError, SimulationError
from vlafit.rollout import Protocol, evaluate
from vlafit.types import ActionChunk, EpisodeKey, Observation

Make = Callable[..., Protocol]
SAME = {"left": ("go to the left side", "move to the left"), "right": ("go to the right side",)}


def test_another_sentence_reaches_the_policy_and_is_kept(protocol: Make, tmp_path: Path) -> None:
    said = protocol(instruction="paraphrase", paraphrases=SAME, trials=2)
    actor = Obedient()
    got = evaluate(actor, said, tmp_path / "paraphrase", workers=1, videos=0)
    assert actor.heard == {task: set(sentences) for task, sentences in SAME.items()}
    assert {r.instruction for r in got.records if r.seed == 100} == {SAME["left"][0], SAME["right"][0]}
    mute = Obedient()
    evaluate(mute, protocol(instruction="blank", trials=1), tmp_path / "blank", workers=1, videos=0)
    assert mute.heard == {"left": {"."}, "right": {"."}}
    with pytest.raises(ConfigError, match="no wrong one to give"):
        evaluate(mute, said, tmp_path / "wrong", wrong_instruction=True)


class Watching(Obedient):
    """Keeps the state that each episode begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, list[float]] = {}

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        if key.replan == 0:
            self.first[key.seed] = observation.state.tolist()
        return super()._act(observation, key)


def test_a_perturbed_start_is_another_start_of_the_same_seed_and_counts_no_steps(
    protocol: Make, tmp_path: Path
) -> None:
    starts = []
    for start_steps in (0, 5, 5):
        out, actor = tmp_path / str(len(starts)), Watching()
        shaken = protocol("left", start_steps=start_steps)
        got = evaluate(actor, shaken, out, workers=1, videos=0, trials=3)
        assert got.records[2].steps == 20  # it stands still for the whole horizon, the random steps beside it
        starts.append(actor.first)
    assert starts[1] == starts[2] and len(starts[0]) == 3
    assert all(starts[0][seed] != starts[1][seed] for seed in starts[0])


def test_what_random_actions_solve_is_no_success_of_the_policy_whatever_the_workers(
    protocol: Make, tmp_path: Path
) -> None:
    still, kept = Saying([[0, 0]] * 4), []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        shaken = protocol("near", start_steps=6, trials=12)
        got = evaluate(still, shaken, out, workers=workers, videos=0)
        assert (got.overall.successes, got.overall.episodes) == (0, 12)
        kept.append([replace(record, wall_s=0) for record in got.records])
    assert kept[0] == kept[1]


def test_a_start_that_is_always_solved_is_an_error_of_its_episode(protocol: Make, tmp_path: Path) -> None:
    for number, changes in enumerate(({"start_steps": 2}, {"settle_steps": 1})):
        mixed = protocol("left", "done", trials=1, **changes)
        got = evaluate(Obedient(), mixed, tmp_path / str(number), workers=1, videos=0)
        assert [record.error is None for record in got.records] == [True, False]
        error = got.records[1].error or ""
        assert "task 'done', seed 100" in error and next(iter(changes)) in error
        assert "before the policy's first observation" in error


def test_perturbations_are_part_of_the_protocols_hash(protocol: Make) -> None:
    shaken = EnvSpec("tests.rollout.toy_env", size=16, perturb=Perturbation(light=0.5))
    changes = [{"env": shaken}, {"start_steps": 3}, {"instruction": "blank"}, {"width": 8}]
    assert len({protocol().sha256(), *(protocol(**change).sha256() for change in changes)}) == 5


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"paraphrases": SAME}, 'paraphrases: have no effect.*"paraphrase"'),
        ({"instruction": "paraphrase", "paraphrases": {"left": ("go",)}}, "there is none for right"),
        (
            {"instruction": "paraphrase", "paraphrases": {**SAME, "lift": ("go",)}},
            "'lift' is not one .*did you mean 'left'",
        ),
        ({"start_steps": -1}, "start_steps: must not be negative"),
    ],
)
def test_perturbations_that_cannot_be_are_refused(change: dict, facts: str, protocol: Make) -> None:
    with pytest.raises(ConfigError, match=facts):
        protocol(**change)


def test_a_simulation_that_cannot_be_perturbed_says_so() -> None:
    with pytest.raises(SimulationError, match=r"env\.perturb has no effect"):
        make(EnvSpec("tests.rollout.toy_env", perturb=Perturbation(camera_deg=3)))
    with pytest.raises(SimulationError, match=r"env\.perturb\.light: .*0 to 1.* 2"):
        Perturbation(light=2)


@pytest.mark.sim
def test_cameras_and_lights_of_meta_world_are_perturbed_by_the_seed_and_nothing_else() -> None:
    pytest.importorskip("metaworld")

    def starts(perturb: Perturbation) -> list[np.ndarray]:
        env = make(EnvSpec("metaworld", size=24, cameras=("workspace",), perturb=perturb))
        seen = [env.reset("faucet-open-v3", seed) for seed in (3, 4, 3)]
        states.append([observation.state for observation in seen])
        return [observation.images["workspace"].astype(int) for observation in seen]

    states: list[list[np.ndarray]] = []
    plain = starts(Perturbation())
    dark, moved = starts(Perturbation(light=0.6)), starts(Perturbation(camera_m=0.1, camera_deg=5))
    for own, perturbed in ((plain, dark), (plain, moved)):
        np.testing.assert_array_equal(perturbed[0], perturbed[2])  # the same seed, the same difference
        assert all((one != other).mean() > 0.2 for one, other in zip(own, perturbed, strict=True))
    ratios = [d.sum() / p.sum() for d, p in zip(dark, plain, strict=True)]
    assert abs(ratios[0] - ratios[1]) > 0.02  # each seed has its own brightness
    np.testing.assert_array_equal(states[0], states[1])
    np.testing.assert_array_equal(states[0], states[2])


def test_smoothness_and_time_to_success_are_kept(protocol: Make, tmp_path: Path) -> None:
    got = evaluate(Trained(), protocol("left", trials=2), tmp_path, workers=1, videos=0)
    successes = [r.steps for r in got.records if r.success]
    assert got.steps_to_success == np.median(successes) and got.hz == 10
    assert f"({np.median(successes) / 10:.1f} s)" in str(got)
    rng = np.random.default_rng([101, 0])
    first = rng.uniform(-0.5, 0.5, (8, 2)).astype(np.float32)[:4]  # seed 101 needs more than one chunk
    record = next(r for r in got.records if r.seed == 101)
    rest = [
        np.random.default_rng([101, i]).uniform(-0.5, 0.5, (8, 2)).astype(np.float32)[:4]
        for i in range(1, record.replans)
    ]
    actions = np.concatenate([first, *rest])[
        : record.steps
    ]  # the shift to the left is the same in every step
    assert record.action_change == pytest.approx(np.abs(np.diff(actions, axis=0)).mean(), abs=1e-5)
