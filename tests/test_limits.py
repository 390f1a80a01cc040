"""A count that is a slip of the keyboard is refused by its name, before anything is opened or written."""

from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlafit import shipped
from vlafit.cli import main
from vlafit.cli.parser import Parser
from vlafit.datasets import load_card
from vlafit.datasets.card_check import check as check_card
from vlafit.errors import ConfigError
from vlafit.execution import Execution
from vlafit.offline import Settings
from vlafit.recipe import Recipe
from vlafit.rollout import load_protocol
from vlafit.serve.options import Options
from vlafit.sweep.study import Dimension, Study
from vlafit.train.preflight import AT_LEAST_ONE, NOT_NEGATIVE
from vlafit.train.preflight import check as check_recipe
from vlafit.types import Guidance

FAR = 10**12


@pytest.mark.case(
    section="machines",
    report="out of memory, or no sign of life, after a long start",
    user_has="`train.draws = 1e12`, a batch of 10^12, 10^9 workers",
    now="refused by the field's name before anything is opened",
)
@pytest.mark.parametrize("name", [n for n in (*AT_LEAST_ONE, *NOT_NEGATIVE) if n != "train.seed"])
def test_every_count_of_a_recipe_has_a_limit(name: str) -> None:
    section, field = name.split(".")
    recipe = Recipe()
    check_recipe(recipe, 1)
    wrong = replace(recipe, **{section: replace(getattr(recipe, section), **{field: FAR})})
    with pytest.raises(ConfigError, match=rf"{name}.*(at most|far above)|{FAR}"):
        check_recipe(wrong, 1)


@pytest.mark.parametrize("name", ["trials", "horizon", "replan", "width", "settle_steps", "start_steps"])
def test_every_count_of_a_protocol_has_a_limit(name: str) -> None:
    protocol = load_protocol(shipped.find("protocol", "metaworld-faucet"))
    changes: dict[str, Any] = {name: FAR, "horizon": 10**6} if name == "replan" else {name: FAR}
    with pytest.raises(ConfigError, match=f"{name}: must "):
        replace(protocol, **changes)


def camera(card: Any, **changes: int) -> Any:
    first, *others = card.robot.cameras
    return replace(card, robot=replace(card.robot, cameras=(replace(first, **changes), *others)))


CARDS: dict[str, Callable[[Any], Any]] = {
    "pixels": lambda card: camera(card, height=FAR),
    "16384": lambda card: camera(card, width=FAR),
    "state.dimensions": lambda card: replace(
        card, robot=replace(card.robot, state=replace(card.robot.state, dimensions=FAR, labels=()))
    ),
    "episodes_per_task": lambda card: replace(card, record=replace(card.record, episodes_per_task=FAR)),
    "horizon": lambda card: replace(card, record=replace(card.record, horizon=FAR)),
}


@pytest.mark.parametrize("fact", list(CARDS))
def test_every_count_of_a_card_has_a_limit(fact: str) -> None:
    card = load_card(shipped.find("card", "metaworld-faucet"))
    check_card(card, "card.toml")
    with pytest.raises(ConfigError, match=rf"card\.toml.*{fact}"):
        check_card(CARDS[fact](card), "card.toml")


def test_other_counts_have_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="draws must be a whole number from 2 to 4096"):
        Settings(draws=FAR)
    with pytest.raises(ConfigError, match="trials must be at most"):
        Study({"optim.lr": Dimension(low=1e-4, high=1e-2)}, trials=FAR)


def numbers_of(verb: str) -> list[str]:
    """Return the options of a command whose values are numbers, by its help."""
    shown: list[str] = []
    parse = Parser.read

    def read(self: Parser, arguments: Any) -> Any:
        for action in self._actions:
            is_number = action.type is not None and action.type.__name__ in ("int", "float")
            if is_number:
                shown.append(action.option_strings[0])
                assert action.type not in (int, float), f"{verb} {action.option_strings[0]} has no limit"
            for text in ("1" + "0" * 30, "-1", "x", "nan", "inf") if is_number else ():
                with pytest.raises(ConfigError, match=rf"{action.option_strings[0]}: must be a .*\d, not "):
                    parse(self, [action.option_strings[0], text])
                    raise AssertionError(action.option_strings[0])
        raise ConfigError("looked at")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "read", read)
        main([verb, *SUBCOMMANDS.get(verb, ())])
    return shown


SUBCOMMANDS = {"data": ("bench",), "compare": ("quickstart",), "sweep": ("quickstart",)}
VERBS = {
    "serve": {"--max-clients", "--replan", "--max-rate", "--timeout", "--steps", "--port", "--seed"},
    "eval": {"--replan", "--delay", "--timeout", "--trials", "--samples", "--max-batch", "--videos"},
    "compare": {"--seeds", "--jobs", "--budget-steps", "--budget-seconds"},
    "sweep": {"--trials", "--workers"},
    "record": {"--episodes", "--workers"},
    "inspect": {"--batch", "--cameras"},
    "data": {"--seconds"},
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_number_on_the_command_line_has_a_limit(verb: str) -> None:
    assert VERBS[verb] <= set(numbers_of(verb))


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_that_is_given_an_empty_text_is_refused_by_its_name(verb: str) -> None:
    """Such as `--token-file "$TOKEN"`, of a variable that is not set."""
    looked_at = []
    parse = Parser.read

    def read(self: Parser, arguments: Any) -> Any:
        for action in self._actions:
            if action.nargs != 0 and action.default != SUPPRESS:
                name = next(iter(action.option_strings), action.metavar)
                looked_at.append(name)
                words = [f"{name}="] if action.option_strings else [""]
                with pytest.raises(ConfigError, match=f"{name} is empty"):
                    parse(self, words)
        raise ConfigError("looked at")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "read", read)
        main([verb, *SUBCOMMANDS.get(verb, ())])
    assert len(looked_at) >= 2


@pytest.mark.parametrize("name", ["max_clients", "max_frame", "max_rate", "timeout_s", "port"])
def test_every_number_of_a_server_has_a_limit(name: str) -> None:
    for value in (FAR, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=rf"server: {name} must be a .*(to|at most) \d"):
            Options(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["replan", "delay"])
def test_every_number_of_an_execution_has_a_limit(name: str) -> None:
    with pytest.raises(ConfigError, match=f"execution: {name} must be a whole number from . to 1000000"):
        Execution(**{name: FAR})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_weight must be a number above 0"):
        Execution(guidance=Guidance(max_weight=float("inf")))


def named(card: Any, column: str = "", **changes: Any) -> Any:
    """Change a card's robot, or a column of it."""
    if column:
        changes = {column: replace(getattr(card.robot, column), **changes)}
    return replace(card, robot=replace(card.robot, **changes))


@pytest.mark.case(
    section="data",
    report="a terminal that changes colour, a table whose lines are torn",
    user_has="control characters or 20,000 letters in a robot's, camera's or dimension's name",
    now="refused by the field's name; the text is shown escaped and shortened",
)
@pytest.mark.parametrize("text", ["arm\x1b[31m", "two\nlines", "x" * 20_000])
@pytest.mark.parametrize("field", ["robot.name", "robot.control", "robot.action.labels", "robot.state.unit"])
def test_a_name_is_one_short_line_without_control_characters(field: str, text: str) -> None:
    card = load_card(shipped.find("card", "metaworld-faucet"))
    _, part, *rest = field.split(".")
    labels = (text, *map(str, range(card.robot.action.dimensions - 1)))
    if rest:
        wrong = named(card, part, **{rest[0]: labels if rest[0] == "labels" else text})
    else:
        wrong = named(card, **{part: text})
    with pytest.raises(ConfigError, match=rf"card\.toml: {field}") as caught:
        check_card(wrong, "card.toml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["", " ", "  "])
def test_a_camera_has_a_name_that_can_be_seen(name: str) -> None:
    card = load_card(shipped.find("card", "metaworld-faucet"))
    cameras = (replace(card.robot.cameras[0], name=name),)
    with pytest.raises(ConfigError, match=r"card\.toml: cameras need names of their own"):
        check_card(named(card, cameras=cameras), "card.toml")


def test_dimensions_have_names_of_their_own() -> None:
    card = load_card(shipped.find("card", "metaworld-faucet"))
    wrong = named(card, "action", labels=("a",) * card.robot.action.dimensions)
    with pytest.raises(ConfigError, match=r"card\.toml: robot\.action\.labels: .*'a'"):
        check_card(wrong, "card.toml")


def test_the_purpose_of_a_recipe_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"purpose 'a\\x1b\[31m' holds"):
        check_recipe(replace(Recipe(), purpose="a\x1b[31m"), 1)
