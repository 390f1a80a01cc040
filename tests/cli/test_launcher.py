"""What a run's record says of how it was launched."""

import pytest

from vlafit.cli import launcher

LAUNCHES = [
    ("/bin/python /env/bin/accelerate launch --cpu -m vlafit train", "accelerate launch --cpu -m"),
    (
        "/bin/python3 -m accelerate.commands.launch -m vlafit train",
        "python3 -m accelerate.commands.launch -m",
    ),
    ("/bin/python /env/bin/torchrun --nproc_per_node 2 -m vlafit eval", "torchrun --nproc_per_node 2 -m"),
    ("slurmstepd: [12.0]", ""),
    ("", ""),
]


@pytest.mark.parametrize(("command", "words"), LAUNCHES)
def test_the_launchers_words_are_those_before_the_module(command: str, words: str) -> None:
    assert launcher.before_module(command.split()) == words.split()


def test_one_process_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launcher.words() == []


def test_a_launcher_that_cannot_be_seen_is_named_by_what_starts_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # and the parent of this process runs no vlafit
    assert launcher.words() == ["accelerate", "launch", "--num_processes", "4", "-m"]
