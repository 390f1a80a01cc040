"""Which requests share a call of the policy. Answers do not depend on it; how long they take does."""

import asyncio
from collections.abc import Coroutine

import pytest

from tests.serve.robots import Summing, seen
from vlafit.requests import Request
from vlafit.serve import batcher as batching
from vlafit.serve.batcher import Batcher
from vlafit.serve.metrics import Metrics
from vlafit.types import EpisodeKey


class Client:
    """Stands for a connection, of which a batcher only asks which it is."""


async def robot(batcher: Batcher, requests: int) -> list[bytes]:
    """Ask again as soon as an answer is there."""
    client, answers = Client(), []
    for i in range(requests):
        chunks = await batcher.act(client, [Request(seen(i), EpisodeKey(i, "pick", 0))])
        answers.append(chunks[0].actions.tobytes())
    return answers


async def staggered(actor: Summing, counts: tuple[int, ...]) -> list[list[bytes]]:
    """Let robots ask, the first one before the others, which arrive while its first call is computed."""
    batcher = Batcher(actor, actor.width, Metrics())
    actor.open.clear()
    first = asyncio.create_task(robot(batcher, counts[0]))
    await asyncio.to_thread(actor.asked.wait, 10)
    others: list[Coroutine[None, None, list[bytes]]] = [robot(batcher, count) for count in counts[1:]]
    tasks = [first, *map(asyncio.create_task, others)]
    await asyncio.sleep(0)  # they ask
    actor.open.set()
    answers = await asyncio.gather(*tasks)
    await batcher.close()
    return answers


def test_clients_that_ask_without_a_pause_come_to_share_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "SHARE", 1e9)
    monkeypatch.setattr(batching, "LONGEST_WAIT_S", 30.0)
    actor = Summing(width=4)
    answers = asyncio.run(staggered(actor, (9, 8, 8)))
    assert actor.widths == [1, 2, 1, *[3] * 7]  # without: halves that wait for one another, 1 and 2 in turns
    alone = [Summing()._act(seen(i), EpisodeKey(i, "pick", 0)).actions.tobytes() for i in range(9)]
    assert answers == [alone, alone[:8], alone[:8]]


def test_a_client_that_stops_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "SHARE", 1e9)
    monkeypatch.setattr(batching, "LONGEST_WAIT_S", 0.2)
    actor = Summing(width=4)
    began = asyncio.run(staggered(actor, (4, 40)))
    assert [len(answers) for answers in began] == [4, 40] and sum(actor.widths) == 44
    assert actor.widths[-30:] == [1] * 30
