"""Questions about images beside demonstrations: the file, the samples, what learns, a run that resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.policies import reference
from tests.policies.tiny import CLOSE
from tests.train.world import assert_same, learned, metrics, tiny
from vlafit import checkpoints
from vlafit.agreement.values import read
from vlafit.datasets.order import BLOCK
from vlafit.datasets.vision_language import open_set
from vlafit.errors import CodecError, ConfigError, DataError
from vlafit.nn.batch import Batch, stack
from vlafit.nn.policy import Policy
from vlafit.nn.rng import sample_rng
from vlafit.policies.pi0 import Pi0
from vlafit.recipe import Recipe
from vlafit.train import data_files, dataloader, run
from vlafit.train.data import open_data
from vlafit.train.experiment import Experiment, build

SHALLOW = {"vision": {"depth": 1}, "language": {"depth": 2, "vocab": 700}, "max_tokens": 40}
POLICIES: dict[str, dict[str, Any]] = {
    "pi0.5": {"family": "pi0", "size": "pi05-tiny", "config": SHALLOW | {"action_tokens": 24}},
    "pi0-FAST": {"family": "pi0_fast", "size": "pi0-fast-tiny", "config": {}},
    "LeRobot's pi0-FAST": {"family": "pi0_fast", "size": "pi0-fast-tiny", "config": {"rules": "lerobot"}},
    "OpenVLA": {"family": "openvla", "size": "openvla-tiny", "config": {"answer_tokens": 14}},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of twelve questions about six pictures; nobody may change it."""
    folder = tmp_path_factory.mktemp("vqa")
    rng, lines = np.random.default_rng(0), []
    for number in range(6):
        colour = ("red", "blue")[number % 2]
        picture = rng.integers(0, 80, (20 + number, 30, 3), np.uint8)
        picture[..., 0 if colour == "red" else 2] += 150
        Image.fromarray(picture).save(folder / f"{number}.png")
        name = f"{number}.png"
        lines.append({"image": name, "prompt": "which colour?", "answer": colour})
        lines.append({"image": name, "prompt": "is it red?", "answer": "yes" if colour == "red" else "no"})
    (folder / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "vqa.jsonl"


def mixed(card: Path, file: Path, kind: str = "pi0.5", **sections: Any) -> Recipe:
    sections["policy"] = POLICIES[kind] | sections.get("policy", {})
    sections["train"] = {"steps": 4, "validate_every": 2, "save_every": 2, "keep": 3} | sections.get(
        "train", {}
    )
    both = {"vision_language": {"vqa": str(file)}, "weights": {"dots": 0.5, "vqa": 0.5}}
    sections["data"] = both | sections.get("data", {})
    strategy = "insulated" if kind == "pi0.5" else "full"
    return tiny(card, **{"strategy": strategy} | sections)


def first_batch(experiment: Experiment) -> Batch:
    batches = dataloader.training_batches(experiment, first_step=0, rank=0, world=1)
    ((_, batch),) = next(batches)
    return batch


def rows(batch: Batch, chosen: list[int]) -> Batch:
    return replace(batch, **{name: value[chosen] for name, value in batch.present().items()})


def sums(policy: Policy, batch: Batch, numbers: list[int]) -> dict[str, torch.Tensor]:
    return policy.loss(batch, sample_rng([(0, number) for number in numbers], seed=0))


def test_pairs_and_conversations_are_read_and_no_picture_is_on_both_sides(file: Path) -> None:
    one = open_set("vqa", str(file), 1.0, 0.3, seed=0)
    assert len(one.questions) == 12 and len(one.validation) == 4
    assert set(one.training) | set(one.validation) == set(range(12))
    shown = [{one.questions[i].images for i in numbers} for numbers in (one.training, one.validation)]
    assert not shown[0] & shown[1]
    assert open_set("vqa", str(file), 1.0, 0.0, seed=0).validation == ()
    assert one.pictures(3)[0].shape == (21, 30, 3)
    talk = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "And its colour?"},
        {"from": "gpt", "value": "red"},
    ]
    other = file.with_name("llava.json")
    pair = {"images": ["1.png", "2.png"], "prefix": "caption en", "suffix": "two squares"}
    other.write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": talk}, pair]))
    found = [(q.images, q.prompt, q.answer) for q in open_set("llava", str(other), 1.0, 0.0, 0).questions]
    assert found == [
        (("0.png",), "What is it?", "A square."),
        (("0.png",), "What is it?\nA square.\nAnd its colour?", "red"),
        (("1.png", "2.png"), "caption en", "two squares"),
    ]


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not an object"),
        ('{"prompt": "a", "answer": "b"}', "path of a picture"),
        ('{"image": "none.png", "prompt": "a", "answer": "b"}', "no picture 'none.png'"),
        ('{"image": "../vqa/0.png", "prompt": "a", "answer": "b"}', "stay in it"),
        ('{"image": "0.png", "prompt": "a"}', "it should be such as"),
        ('{"image": "0.png", "prompt": "a", "answer": " "}', "is empty"),
        ('{"image": "0.png", "prompt": "a", "answer": "b", "suffix": "c"}', "it should be such as"),
        ('{"image": "0.png", "conversations": [{"from": "gpt", "value": "b"}]}', "turns of human and gpt"),
        ('{"image": "0.png", "conversations": [{"from": "human"}, {"from": "gpt"}]}', 'no text "value"'),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, fact: str, file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path / "vqa")
    broken = tmp_path / "vqa" / "vqa.jsonl"
    broken.write_text(broken.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"vqa\.jsonl, line 13: .*{fact}"):
        open_set("vqa", str(broken), 1.0, 0.0, seed=0)


def test_a_damaged_or_see_through_picture_is_named_with_its_line(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path / "vqa")
    (tmp_path / "vqa" / "0.png").write_bytes((file.parent / "0.png").read_bytes()[:-30])
    Image.new("RGBA", (8, 8), (0, 0, 0, 90)).save(tmp_path / "vqa" / "1.png")
    (tmp_path / "vqa" / "2.png").write_text("<html>")
    one = open_set("vqa", str(tmp_path / "vqa" / "vqa.jsonl"), 1.0, 0.0, seed=0)
    for number, fact in ((0, "damaged"), (2, "see-through"), (4, "no JPEG, PNG or WebP")):
        with pytest.raises(DataError, match=rf"line {number + 1}: .*{number // 2}\.png.*{fact}"):
            one.pictures(number)


def test_the_loss_is_that_of_the_demonstrations_actions_and_of_both_tokens_by_hand(
    card: Path, file: Path
) -> None:
    experiment = build(mixed(card, file), CPU)
    policy, batch = experiment.policy, first_batch(experiment)
    assert isinstance(policy, Pi0) and batch.action_mask is not None and batch.target_mask is not None
    acts = batch.action_mask.flatten(1).any(1)
    robot, asked = acts.nonzero().flatten().tolist(), (~acts).nonzero().flatten().tolist()
    assert len(robot) == len(asked) == 2
    assert not batch.action_mask[asked].any() and not batch.state[asked].any()
    numbers = list(range(4))
    noise, time = (x[0] for x in policy.draw(sample_rng([(0, n) for n in numbers], seed=0)))
    weights = {name: p.detach().clone().requires_grad_() for name, p in policy.named_parameters()}
    tokens, errors = [], []
    for row in numbers:
        own = rows(batch, [row])
        flow, token = reference.losses_with_tokens(policy.config, weights, own, noise[[row]], time[[row]])
        tokens.append(token)
        if row in robot:
            mask, got = batch.action_mask[row], policy.velocity(own, noise[[row]], time[[row]])
            assert own.actions is not None
            errors.append((noise[row] - own.actions[0] - got[0]).square()[mask])
            assert mask.any() and flow.isfinite()
    made, counts = sums(policy, batch, numbers), policy.counts(batch, draws=1)
    assert counts == {"error": float(batch.action_mask.sum()), "token": 4.0}
    torch.testing.assert_close(made["token"] / 4, torch.stack(tokens).mean(), **CLOSE)
    torch.testing.assert_close(made["error"] / counts["error"], torch.cat(errors).mean(), **CLOSE)
    policy.zero_grad(set_to_none=True)
    alone = sums(policy, rows(batch, asked), asked)
    assert float(alone["error"].detach()) == 0.0
    (alone["error"] + alone["token"] / 2).backward()
    wanted = torch.autograd.grad(
        torch.stack([tokens[i] for i in asked]).mean(), list(weights.values()), allow_unused=True
    )
    for name, one in zip(weights, wanted, strict=True):
        own = policy.get_parameter(name).grad
        if name.startswith(("vision.", "projector.", "language.")):
            assert own is not None and one is not None
            torch.testing.assert_close(own, one, rtol=1e-4, atol=1e-5 * max(1.0, float(one.norm())))
        else:  # the expert and its projections learn nothing of a question
            assert own is None or not own.any()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_answer_is_its_tokens_and_the_end_after_a_prompt_without_the_state(
    policy: str, card: Path, file: Path
) -> None:
    experiment = build(mixed(card, file, policy), CPU)
    codec = experiment.codec
    words, one = codec.required_tokenizer, experiment.data.vision_language[0]
    at = one.questions.index(next(q for q in one.questions if q.prompt == "is it red?" and q.answer == "yes"))
    sample = dataloader.AnswerSamples([(one, [at])], codec)[0]
    assert sample.target_tokens is not None and sample.target_mask is not None
    assert sample.tokens is not None and sample.token_mask is not None and sample.actions is not None
    first = [words.bos] if policy == "LeRobot's pi0-FAST" else []
    assert sample.target_tokens[sample.target_mask].tolist() == [*first, *words.encode("yes"), words.eos]
    text = words.decode(sample.tokens[sample.token_mask].tolist())
    assert text.removeprefix("<bos>") == ("In: is it red?\nOut: " if policy == "OpenVLA" else "is it red?\n")
    assert sample.image_mask.tolist() == [True] and not sample.state.any() and not sample.actions.any()
    batch = stack([sample])
    experiment.policy.check(batch)
    made = sums(experiment.policy, batch, [0])
    assert float(made["token"].detach()) > 0 and float(made.get("error", torch.zeros(()))) == 0
    targets = batch.target_tokens
    assert targets is not None
    changed = sums(experiment.policy, replace(batch, images=255 - batch.images), [0])
    assert not torch.equal(changed["token"], made["token"])  # the picture is read


@pytest.mark.parametrize(
    "policy",
    [
        "OpenVLA",
        pytest.param("pi0-FAST", marks=pytest.mark.slow),
        pytest.param("LeRobot's pi0-FAST", marks=pytest.mark.slow),
    ],
)
def test_policies_that_write_actions_as_tokens_learn_answers_too(
    policy: str, card: Path, file: Path, tmp_path: Path
) -> None:
    recipe = mixed(card, file, policy, train={"steps": 3, "validate_every": 3, "save_every": 0, "draws": 1})
    assert run(recipe, tmp_path / "run").finished
    first, last = (event for event in metrics(tmp_path / "run") if "validation/loss" in event)
    assert last["validation/vqa/loss"] < first["validation/vqa/loss"]
    assert "validation/vqa/valid_actions" not in last and "validation/valid_actions" in last


def test_a_run_logs_answers_apart_says_what_trains_what_and_resumes_exactly(
    card: Path, file: Path, tmp_path: Path
) -> None:
    recipe, out = mixed(card, file), tmp_path / "run"
    assert run(recipe, out).finished
    validated = [event for event in metrics(out) if "validation/loss" in event]
    for event in validated:
        assert event["validation/vqa/loss"] == pytest.approx(event["validation/vqa/loss_token"])
        assert 0 <= event["validation/vqa/token_accuracy"] <= 1 and "validation/action_error" in event
        assert not {"validation/vqa/action_error", "validation/vqa/loss_error"} & set(event)
    last = out / "checkpoints" / "step_000004"
    learned_from = {one.card: one for one in checkpoints.read_lineage(last).datasets}
    assert (learned_from["vqa"].episodes, learned_from["vqa"].frames) == (0, 8)
    assert "vqa: 8 questions about images" in (last / "README.md").read_text()
    agreement = read(last)
    assert agreement is not None
    (item,) = (item for item in agreement.items if item.name == "vision-language vqa")
    assert item.value.startswith("0.5 of the samples, 1 epochs") and "actions' loss leaves them" in item.value
    assert "8 questions of vqa.jsonl, 4 held out" in item.sides["dataset"]
    shutil.rmtree(last)
    shutil.copytree(out, tmp_path / "again")
    assert run(recipe, tmp_path / "again", resume=True).finished
    assert run(recipe, tmp_path / "whole").finished
    assert_same(learned(tmp_path / "again", 4), learned(tmp_path / "whole", 4))


def test_a_mixture_may_begin_with_steps_that_hold_no_demonstration(
    card: Path, file: Path, tmp_path: Path
) -> None:
    recipe = mixed(
        card,
        file,
        data={"weights": {"dots": 0.1, "vqa": 0.9}},
        train={"steps": 4, "batch_size": 2, "validate_every": 0, "save_every": 0, "seed": 1},
    )
    batches = dataloader.training_batches(build(recipe, CPU), first_step=0, rank=0, world=1)
    shown = [any(bool(batch.action_mask.any()) for _, batch in next(batches)) for _ in range(3)]
    assert not any(shown)  # in as many steps as the check of gradients looks at
    assert run(recipe, tmp_path / "run").finished


def test_a_question_that_changed_is_other_data(card: Path, file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path / "vqa")
    own = tmp_path / "vqa" / "vqa.jsonl"
    before = open_data(mixed(card, own).data, 3)
    assert open_data(mixed(card, file).data, 3).fingerprint == before.fingerprint
    assert data_files.facts(before)["vqa"]["files"] == 7  # the questions and six pictures
    own.write_text(own.read_text().replace('"red"', '"rot"'))
    after = open_data(mixed(card, own).data, 3)
    assert len({after.fingerprint, before.fingerprint, open_data(tiny(card).data, 3).fingerprint}) == 3


def test_shares_are_exact_and_every_question_comes_once_in_its_epoch(card: Path, file: Path) -> None:
    experiment = build(mixed(card, file, data={"weights": {"dots": 3, "vqa": 1}}), CPU)
    one = experiment.data.vision_language[0]
    chunks = dataloader.ChunkDataset(experiment.data.stores, 4, experiment.data.training)
    for mixed_files in (0, 1):
        order = dataloader.order_of(chunks, (3,), 0, mixed_files, [(len(one.training), one.weight)])
        drawn = [order.sample(k) for k in range(BLOCK)]
        asked = [key for key in drawn if key[1] >= len(chunks)]
        assert len(asked) == BLOCK // 4
        assert {index - len(chunks) for _, index in asked} == set(range(len(one.training)))
        assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("sections", "fact"),
    [
        ({"data": {"weights": {}}}, r'data\.weights = \{ "dots" = 1\.0, "vqa" = 1\.0 \}'),
        ({"data": {"weights": {"dots": 1.0}}}, "does not name card 'vqa'"),
        ({"data": {"vision_language": {"dots": "a.jsonl"}}}, "'dots' is also the name of a card"),
        (
            {"policy": POLICIES["pi0.5"] | {"config": SHALLOW}, "strategy": "full"},
            "has no effect.*learns no text",
        ),
        (
            {"policy": {"family": "pi0", "size": "pi0-tiny", "config": {}}, "strategy": "full"},
            "learns no text",
        ),
    ],
)
def test_settings_that_train_nothing_are_refused(
    sections: dict[str, Any], fact: str, card: Path, file: Path
) -> None:
    with pytest.raises(ConfigError, match=fact):
        build(mixed(card, file, **sections), CPU)


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        (
            {"answer": "one two three four five six seven eight nine ten eleven twelve thirteen"},
            "raise policy.config",
        ),
        ({"prompt": "why " * 60}, "the policy takes 40"),
        ({"image": ["0.png", "1.png"]}, "2 pictures, and the policy 1 camera"),
    ],
)
def test_a_question_without_room_is_named_before_the_first_step(
    question: dict[str, Any], fact: str, card: Path, file: Path, tmp_path: Path
) -> None:
    shutil.copytree(file.parent, tmp_path / "vqa")
    own = tmp_path / "vqa" / "vqa.jsonl"
    line = {"image": "0.png", "prompt": "what?", "answer": "a cup"} | question
    own.write_text(own.read_text() + json.dumps(line) + "\n")
    policy = {"policy": {"config": SHALLOW | {"action_tokens": 10}}}
    with pytest.raises(CodecError, match=rf"vqa\.jsonl, line 13: .*{fact}"):
        build(mixed(card, own, **policy), CPU)
