"""One port, three protocols: whoever asks properly is answered, and whoever does not harms nobody."""

import dataclasses
import http.client
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as dial

from tests.serve.robots import ROBOT, Continuing, Summing, Watching, seen
from vlafit.errors import ConfigError, EmbodimentError, RemoteError
from vlafit.execution import Execution
from vlafit.requests import Request
from vlafit.serve import protocols, wire
from vlafit.serve.client import RemoteActor, connect
from vlafit.serve.control import Controller
from vlafit.serve.options import Options
from vlafit.serve.server import Running
from vlafit.types import EpisodeKey, Observation

Serve = Callable[..., Running]
TOKEN = "0123456789abcdef"


def openpi(one: Observation, **changes: object) -> bytes:
    """An observation as openpi's examples name it."""
    values = {f"observation/{name}": image for name, image in one.images.items()}
    return wire.pack(values | {"observation/state": one.state, "prompt": one.instruction} | changes)


def open_openpi(running: Running, **headers: str) -> ClientConnection:
    connection = dial(running.address, compression=None, additional_headers=headers, proxy=None).__enter__()
    connection.recv(timeout=10)
    return connection


def get(running: Running, path: str, **headers: str) -> tuple[int, str]:
    url = running.address.replace("ws:", "http:") + path
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# -------------------------------------------------------------------------------------------- the first frame


def test_the_first_frame_describes_the_policy(serve: Serve) -> None:
    with connect(serve().address) as remote:
        assert remote.embodiment == ROBOT and remote.width == 4 and remote.seeds == {"pick": (3, 4)}
        assert remote.fingerprint() == "summing 1" and remote.described.chunk == 6


def test_the_first_frame_is_a_hello_to_vla_eval_and_metadata_to_openpi(serve: Serve) -> None:
    with dial(serve().address, proxy=None) as connection:
        frame = msgpack.unpackb(connection.recv(timeout=10))
    assert frame["type"] == "hello" and {"payload", "seq", "timestamp"} <= set(frame)
    assert frame["payload"]["observation_params"] == {
        "send_state": True,
        "send_front_image": True,
        "send_wrist_image": True,
    }
    assert frame["action_horizon"] == 6 and frame["embodiment"]["name"] == "arm"


# --------------------------------------------------------------------------------------------- our own client


def test_a_remote_actor_returns_the_bytes_of_the_local_one(serve: Serve) -> None:
    local = Summing()
    observations = [seen(i, f"pick {i % 3}") for i in range(11)]
    keys = [EpisodeKey(i, "pick", i % 2) for i in range(11)]
    with connect(serve().address) as remote:
        got = remote.act(observations, keys)
    for one, other in zip(local.act(observations, keys), got, strict=True):
        assert one.actions.tobytes() == other.actions.tobytes() and one.actions.shape == other.actions.shape


def test_a_remote_actors_chunk_may_be_written_to(serve: Serve) -> None:
    with connect(serve().address) as remote:
        remote.act([seen()], [EpisodeKey(0, "pick", 0)])[0].actions[0] = 1.0


def test_a_missing_camera_is_passed_on_and_logged_once(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    one = Observation({"front": seen().images["front"]}, seen().state, "pick")
    key = EpisodeKey(1, "pick", 0)
    with connect(serve().address) as remote:
        answers = [remote.act([one], [key])[0].actions.tobytes() for _ in range(3)]
    assert set(answers) == {Summing().act([one], [key])[0].actions.tobytes()}
    logged = [record.name for record in caplog.records if "'wrist' is missing" in record.getMessage()]
    assert sorted(logged) == ["vlafit.serve.client", "vlafit.serve.session"]


@pytest.mark.case(
    section="runs",
    report="the robot moves wildly, and the server says nothing",
    user_has="states in degrees for a policy trained on radians",
    now="answered, and a warning once per dimension at server and client, in the answer and in `/metrics`",
)
def test_a_state_far_outside_the_statistics_is_answered_with_a_warning(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(Watching())
    one = dataclasses.replace(seen(), state=np.float32([0.5, 57.3, -1.0]))
    key = EpisodeKey(1, "pick", 0)
    with connect(running.address) as remote:
        assert [len(remote.act([one], [key])) for _ in range(3)] == [1, 1, 1]
    logged = [r.name for r in caplog.records if "state.elbow = 57.3" in r.getMessage()]
    assert sorted(logged) == ["vlafit.serve.client", "vlafit.serve.session"]
    with open_openpi(running) as connection:
        answers = []
        for _ in range(2):
            connection.send(openpi(one))
            answers.append(wire.unpack(connection.recv(timeout=10)))
    assert "state.elbow" in answers[0]["warnings"][0] and "warnings" not in answers[1]
    assert 'vlafit_warnings_total{about="state"} 2' in running.metrics.text()


def test_a_state_in_metres_for_a_policy_in_millimetres_is_named_once_for_each_connection(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(Watching(mean=6.0))
    states = np.random.default_rng(0).normal(6.0, 0.8, (20, 3))
    for count, scale in enumerate((1.0, 1 / 1000, 1 / 1000)):
        with connect(running.address) as remote, Controller(remote, Execution(replan=1)) as control:
            control.start("pick")
            for state in states:
                control.step(seen().images, state * scale)
        lines = [r for r in caplog.records if "m where they are of mm" in r.getMessage()]
        assert [r.name for r in lines].count("vlafit.serve.client") == 3 * count
    first = lines[0].getMessage()
    assert f"state.base = {states[0, 0] / 1000:.4g} is far outside" in first and "mean 6, std 1" in first


def test_an_observation_of_another_robot_is_refused_and_the_connection_goes_on(serve: Serve) -> None:
    wrong = Observation({"front": np.zeros((4, 4, 3), np.uint8)}, np.float32([0, np.nan]), "pick")
    facts = ("observation 1", "(4, 4, 3)", "(8, 8, 3)", "state", "(2,)")
    running = serve()
    with connect(running.address) as remote:
        with pytest.raises(EmbodimentError) as error:
            remote.act([seen(), wrong], [EpisodeKey(0, "pick", 0)] * 2)
        assert all(fact in str(error.value) for fact in facts)
        assert len(remote.act([seen()], [EpisodeKey(0, "pick", 0)])) == 1
    connection = open_openpi(running)  # a client of our protocol that does not check
    frame = protocols.pack_requests(
        [Request(one, EpisodeKey(0, "pick", 0)) for one in (seen(), wrong)], ("front", "wrist")
    )
    connection.send(frame)
    answer = connection.recv(timeout=10)
    assert isinstance(answer, str) and all(fact in answer for fact in facts) and answer in str(error.value)
    connection.close()


def test_a_chunk_that_is_being_executed_is_continued(serve: Serve) -> None:
    from vlafit.types import Committed, Guidance

    left = Committed(np.full((4, 3), 0.25, np.float32), 2, 3, Guidance("linear", 7.0, False))
    with connect(serve(Continuing()).address) as remote:
        free, held = remote.act_guided([seen()] * 2, [EpisodeKey(0, "pick", 0)] * 2, [None, left])
    assert (held.actions[:2] == 0.25).all() and held.actions[-1].tolist() == [2, 3, 7]
    assert np.array_equal(free.actions[2:5], held.actions[2:5]) and not (free.actions[:2] == 0.25).any()


def test_a_policy_that_cannot_continue_a_chunk_says_so(serve: Serve) -> None:
    from vlafit.types import Committed

    left = Committed(np.zeros((4, 3), np.float32), 2, 3)
    with connect(serve().address) as remote, pytest.raises(ConfigError, match="cannot continue a chunk"):
        remote.act_guided([seen()], [EpisodeKey(0, "pick", 0)], [left])


def test_a_connection_that_broke_is_made_again(serve: Serve) -> None:
    with connect(serve().address) as remote:
        first = remote.act([seen()], [EpisodeKey(0, "pick", 0)])[0].actions
        remote._connection.socket.shutdown(socket.SHUT_RDWR)
        again = remote.act([seen()], [EpisodeKey(0, "pick", 0)])[0].actions
    assert first.tobytes() == again.tobytes()


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RemoteError, match=f"{url}: cannot be reached.*vlafit serve"):
            connect(url)
    with pytest.raises(RemoteError, match="address.*ws://HOST:PORT"):
        connect("localhost:8000")


# ----------------------------------------------------------------------------------------------------- openpi


def test_openpis_frames_are_answered_with_a_chunk(serve: Serve) -> None:
    with open_openpi(serve()) as client:
        for replan in range(3):
            client.send(openpi(seen()))
            answer = wire.unpack(client.recv(timeout=10))  # type: ignore[arg-type]
            (chunk,) = Summing().act([seen()], [EpisodeKey(0, seen().instruction, replan)])
            assert answer["actions"].tobytes() == chunk.actions.tobytes()
            assert answer["server_timing"]["infer_ms"] > 0


def test_openpis_keys_may_be_nested_or_mapped(serve: Serve) -> None:
    one = seen()
    names = {"observation/exterior": "front", "joints": "state", "hand": "state"}
    frames = [
        {"images": dict(one.images), "state": one.state.tolist(), "prompt": one.instruction},
        {"observation/exterior": one.images["front"], "wrist": one.images["wrist"], "prompt": one.instruction}
        | {"hand": one.state[2:], "joints": one.state[:2]},
    ]
    with open_openpi(serve(names=names)) as client:
        for replan, frame in enumerate(frames):
            client.send(wire.pack(frame))
            answer = wire.unpack(client.recv(timeout=10))  # type: ignore[arg-type]
            (chunk,) = Summing().act([one], [EpisodeKey(0, one.instruction, replan)])
            assert answer["actions"].tobytes() == chunk.actions.tobytes()


def test_what_is_wrong_with_an_observation_is_a_text_that_names_it(serve: Serve) -> None:
    with open_openpi(serve()) as client:
        client.send(
            wire.pack({"observation/wrst": seen().images["wrist"], "state": [0, np.nan, 0], "prompt": "pick"})
        )
        answer = client.recv(timeout=10)
        assert isinstance(answer, str)
        for fact in (
            "camera 'front': missing",
            "camera 'wrist': missing",
            "elbow",
            "wrst",
            "did you mean 'wrist'",
        ):
            assert fact in answer
        client.send(openpi(seen()))
        assert isinstance(client.recv(timeout=10), bytes)


def test_thousands_of_wrong_names_are_not_all_answered(serve: Serve) -> None:
    with open_openpi(serve()) as client:
        client.send(wire.pack({f"key {i}": 0 for i in range(50_000)}))
        answer = client.recv(timeout=10)
    assert isinstance(answer, str) and "and 49992 more" in answer and len(answer) < 2000


@pytest.mark.parametrize("frame", ["text", b"", b"\xc1", msgpack.packb(3), msgpack.packb([])])
def test_what_is_no_frame_is_a_text_and_the_connection_goes_on(serve: Serve, frame: str | bytes) -> None:
    with open_openpi(serve()) as client:
        client.send(frame)
        assert isinstance(client.recv(timeout=10), str)
        client.send(openpi(seen()))
        assert isinstance(client.recv(timeout=10), bytes)


# --------------------------------------------------------------------------------------------------------eval


def vla_eval(kind: str, payload: dict, seq: int) -> bytes:
    return wire.pack({"type": kind, "payload": payload, "seq": seq, "timestamp": 1.0}, text_keys=True)


def test_vla_eval_gets_one_action_an_observation(serve: Serve) -> None:
    actor = Summing()
    running = serve(actor, execution=Execution(replan=2))
    one = seen()
    observed = {
        "images": dict(one.images),
        "task_description": one.instruction,
        "states": one.state.astype(float),
    }
    with dial(running.address, proxy=None) as client:
        client.send(vla_eval("hello", {"harness_version": "0.8.0"}, 1))
        assert msgpack.unpackb(client.recv(timeout=10))["type"] == "hello"
        for episode in (5, 6):
            client.send(vla_eval("episode_start", {"task": {"name": "pick", "episode_idx": episode}}, 2))
            for step in range(4):
                client.send(vla_eval("observation", observed | {"controller_states": np.zeros(9)}, 10 + step))
                answer = wire.unpack(client.recv(timeout=10))  # type: ignore[arg-type]
                (chunk,) = Summing().act([one], [EpisodeKey(episode, "pick", step // 2)])
                assert answer["type"] == "action" and answer["seq"] == 10 + step
                assert answer["payload"]["actions"].tobytes() == chunk.actions[step % 2].tobytes()
            client.send(vla_eval("episode_end", {}, 20))
    assert len(actor.widths) == 4


def test_vla_eval_is_told_of_errors_in_its_own_words(serve: Serve) -> None:
    with dial(serve().address, proxy=None) as client:
        client.recv(timeout=10)
        client.send(vla_eval("observation", {"images": {}, "task_description": "pick", "state": [0] * 3}, 7))
        answer = wire.unpack(client.recv(timeout=10))  # type: ignore[arg-type]
    assert answer["type"] == "error" and answer["seq"] == 7 and "camera 'front'" in answer["payload"]["error"]


OTHERS: dict[str, tuple[dict, str]] = {
    "NaN": ({"state": np.full(3, np.nan)}, "not finite"),
    "no camera": ({"images": {}}, "camera 'front': missing"),
    "another robot": ({"state": np.zeros(26)}, r"shape \(26,\)"),
    "an image of another size": ({"images": {"front": np.zeros((4, 4, 3), np.uint8)}}, "camera 'front'"),
    "no instruction": ({"task_description": ""}, "instruction"),
    "no state": ({"state": None}, "state: missing"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("history", [1, 2])
def test_vla_evals_every_observation_is_compared_not_only_those_that_ask_the_policy(
    serve: Serve, name: str, history: int
) -> None:
    changed, says = OTHERS[name]
    one, actor = seen(), Summing()
    running = serve(actor, {"history": history}, execution=Execution(replan=3))
    good = {"images": dict(one.images), "task_description": one.instruction, "state": one.state}
    (chunk,) = Summing().act([one], [EpisodeKey(0, "pick", 0)])
    with dial(running.address, proxy=None) as client:
        client.recv(timeout=10)
        client.send(vla_eval("episode_start", {"task": {"name": "pick", "episode_idx": 0}}, 1))
        for step, payload in enumerate((good, good | changed, {}, good, good)):
            client.send(vla_eval("observation", payload, step))
            answer = wire.unpack(client.recv(timeout=10))  # type: ignore[arg-type]
            if step in (1, 2):
                assert answer["type"] == "error" and answer["seq"] == step
                assert step == 2 or re.search(says, answer["payload"]["error"])
            else:  # the chunk goes on where it was
                executed = answer["payload"]["actions"].tobytes()
                assert executed == chunk.actions[max(0, step - 2)].tobytes()
    assert len(actor.widths) == 1


def test_a_vla_eval_state_far_outside_is_said_at_whichever_step_it_comes(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(Watching(), execution=Execution(replan=3))
    one = seen()
    good = {"images": dict(one.images), "task_description": one.instruction, "state": np.zeros(3)}
    with dial(running.address, proxy=None) as client:
        client.recv(timeout=10)
        for step, state in enumerate(([0, 0, 0], [0, 57.3, 0], [0, 57.3, 0])):
            client.send(vla_eval("observation", good | {"state": np.float32(state)}, step))
            assert wire.unpack(client.recv(timeout=10))["type"] == "action"  # type: ignore[arg-type]
    assert caplog.text.count("state.elbow = 57.3") == 1


# -------------------------------------------------------------------------------- batches, and bad neighbours


def test_requests_that_wait_are_answered_together_whoever_sent_them(serve: Serve) -> None:
    actor = Summing(width=4)
    running = serve(actor)
    actor.open.clear()
    with ThreadPoolExecutor(5) as pool:
        remotes = [connect(running.address) for _ in range(5)]
        first = pool.submit(remotes[0].act, [seen(0)], [EpisodeKey(0, "pick", 0)])
        assert actor.asked.wait(10)
        others = [
            pool.submit(r.act, [seen(i)], [EpisodeKey(i, "pick", 0)]) for i, r in enumerate(remotes[1:], 1)
        ]
        wait_until(lambda: sum(map(len, running.server._batcher._waiting.values())) == 4)  # type: ignore[union-attr]
        actor.open.set()
        answers = [future.result(timeout=10)[0] for future in [first, *others]]
    assert actor.widths == [1, 4]
    for i, answer in enumerate(answers):
        (alone,) = Summing().act([seen(i)], [EpisodeKey(i, "pick", 0)])
        assert answer.actions.tobytes() == alone.actions.tobytes()
    for remote in remotes:
        remote.close()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for another thread; the deadline only ends a test that fails."""
    tick = threading.Event()
    for _ in range(2000):
        if true():
            return
        tick.wait(0.005)
    raise AssertionError("it never happened")


def test_a_client_that_asks_for_much_does_not_keep_the_others_waiting(serve: Serve) -> None:
    actor = Summing(width=2)
    running = serve(actor)
    actor.open.clear()
    with (
        connect(running.address) as greedy,
        connect(running.address) as modest,
        ThreadPoolExecutor(2) as pool,
    ):
        much = pool.submit(
            greedy.act, [seen(i) for i in range(20)], [EpisodeKey(i, "pick", 0) for i in range(20)]
        )
        assert actor.asked.wait(10)
        little = pool.submit(modest.act, [seen(50)], [EpisodeKey(50, "pick", 0)])
        wait_until(lambda: len(running.server._batcher._waiting) == 2)  # type: ignore[union-attr]
        actor.open.set()
        assert len(little.result(timeout=10)) == 1
        assert len(much.result(timeout=10)) == 20
    assert running.metrics.rows.counts[:2] == [0, 11] or sum(actor.widths) == 21


@pytest.mark.parametrize(("words", "says"), [("too long", "too many tokens"), ("fail", "the policy failed")])
def test_an_observation_that_the_policy_refuses_costs_nobody_else_an_answer(
    serve: Serve, words: str, says: str
) -> None:
    actor = Summing(width=4)
    running = serve(actor)
    actor.open.clear()
    with ThreadPoolExecutor(3) as pool:
        remotes = [connect(running.address) for _ in range(3)]
        calls = [("pick", 0), (words, 1), ("pick", 2)]
        futures = []
        for remote, (text, i) in zip(remotes, calls, strict=True):
            futures.append(pool.submit(remote.act, [seen(i, text)], [EpisodeKey(i, "pick", 0)]))
            if i == 0:
                assert actor.asked.wait(10)
        wait_until(lambda: len(running.server._batcher._waiting) == 2)  # type: ignore[union-attr]
        actor.open.set()
        assert len(futures[0].result(timeout=10)) == len(futures[2].result(timeout=10)) == 1
        with pytest.raises(RemoteError, match=says):
            futures[1].result(timeout=10)
    for remote in remotes:
        remote.close()


def test_a_client_that_vanishes_while_it_waits_harms_nobody(serve: Serve) -> None:
    actor = Summing(width=1)
    running = serve(actor)
    actor.open.clear()
    gone = open_openpi(running)
    gone.send(openpi(seen()))
    assert actor.asked.wait(10)
    gone.socket.close()
    with connect(running.address) as remote, ThreadPoolExecutor(1) as pool:
        future = pool.submit(remote.act, [seen(1)], [EpisodeKey(1, "pick", 0)])
        actor.open.set()
        assert len(future.result(timeout=10)) == 1


def test_a_client_that_takes_no_answers_is_dropped(serve: Serve) -> None:
    running = serve(timeout_s=0.5, max_rate=1e6)
    with socket.create_connection(("127.0.0.1", running.server.port)) as raw:  # type: ignore[union-attr]
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        wait_until(lambda: running.metrics.clients == 1)
        wrong = wire.pack({f"{i}" * 80: 0 for i in range(8)})
        frame = b"\x82\xfe" + len(wrong).to_bytes(2, "big") + b"\0\0\0\0" + wrong  # masked with zeros
        raw.settimeout(0.2)
        try:
            for _ in range(100_000):  # each is answered by a text that is never taken
                raw.sendall(frame)
        except OSError:
            pass
        wait_until(lambda: running.metrics.clients == 0)
        with connect(running.address) as remote:
            assert len(remote.act([seen()], [EpisodeKey(0, "pick", 0)])) == 1


def test_a_policy_that_hangs_is_an_error_of_the_request(serve: Serve) -> None:
    actor = Summing(width=1)
    running = serve(actor, timeout_s=0.2)
    actor.open.clear()
    with connect(running.address) as remote, pytest.raises(RemoteError, match=r"no answer within 0\.2 s"):
        remote.act([seen()], [EpisodeKey(0, "pick", 0)])
    actor.open.set()


def test_many_observations_are_asked_in_frames_that_the_server_reads(serve: Serve) -> None:
    running = serve(max_frame=16_384)
    keys = [EpisodeKey(i, "pick", 0) for i in range(20)]
    with connect(running.address) as remote:
        answers = remote.act([seen(i) for i in range(20)], keys)
    alone = Summing().act([seen(i) for i in range(20)], keys)
    assert [a.actions.tobytes() for a in answers] == [a.actions.tobytes() for a in alone]
    assert 1 < running.metrics.answered["vlafit"] < 20


def test_a_frame_that_is_too_large_ends_its_connection_alone(serve: Serve) -> None:
    running = serve(max_frame=2048)
    with connect(running.address) as small, connect(running.address) as remote:
        with pytest.raises(RemoteError, match="more than the server reads.*--max-frame"):
            remote.act([seen(0, "pick " * 600)], [EpisodeKey(0, "pick", 0)])
        assert len(small.act([seen()], [EpisodeKey(0, "pick", 0)])) == 1


def test_a_client_that_asks_too_often_is_slowed_down(serve: Serve) -> None:
    import time

    with connect(serve(max_rate=50.0).address) as remote:
        began = time.monotonic()
        for _ in range(60):  # 50 at once, and ten more at 50 a second
            remote.act([seen()], [EpisodeKey(0, "pick", 0)])
    assert time.monotonic() - began > 0.15


def test_clients_beyond_the_limit_are_refused(serve: Serve) -> None:
    running = serve(max_clients=1)
    with connect(running.address) as first:
        with pytest.raises(RemoteError, match="1 clients are connected already"):
            connect(running.address)
        first.act([seen()], [EpisodeKey(0, "pick", 0)])


# -------------------------------------------------------------------------------------- tokens, HTTP, the end


def test_without_the_token_nobody_connects(serve: Serve) -> None:
    running = serve(token=TOKEN)
    for token in ("", "another", TOKEN + "0"):
        with pytest.raises(RemoteError, match="401.*Api-Key"):
            connect(running.address, token=token)
    with connect(running.address, token=TOKEN) as remote:
        assert len(remote.act([seen()], [EpisodeKey(0, "pick", 0)])) == 1
    assert get(running, "/healthz")[0] == 200 and get(running, "/metrics")[0] == 401
    assert get(running, "/metrics", Authorization=f"Api-Key {TOKEN}")[0] == 200


def test_no_page_in_a_browser_may_connect(serve: Serve) -> None:
    with pytest.raises(InvalidStatus) as error:
        dial(serve().address, origin="http://evil.example", proxy=None).__enter__()  # type: ignore[arg-type]
    assert error.value.response.status_code == 403


def test_health_and_metrics_are_plain_http(serve: Serve) -> None:
    running = serve()
    with connect(running.address) as remote:
        remote.act([seen(i) for i in range(6)], [EpisodeKey(i, "pick", 0) for i in range(6)])
        assert get(running, "/healthz") == (200, "ok\n") and get(running, "/nowhere")[0] == 404
        status, text = get(running, "/metrics")
    assert status == 200 and text.endswith("\n")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['vlafit_requests_total{protocol="vlafit"}'] == "1" and lines["vlafit_clients"] == "1"
    assert lines["vlafit_batch_rows_sum"] == "6.000000" and lines["vlafit_queue_seconds_count"] == "6"


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/", "/nowhere"])
@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "DELETE", "OPTIONS"])
def test_another_method_than_get_is_answered_by_405(serve: Serve, method: str, path: str) -> None:
    running = serve()
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)  # type: ignore[union-attr]
    connection.request(method, path, body=b"x" * 100_000 if method in ("POST", "PUT") else None)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")
    assert (b"only GET" in answer.read()) == (method != "HEAD")
    connection.close()
    wait_until(lambda: not running.server._busy and running.metrics.clients == 0)  # type: ignore[union-attr]
    assert get(running, "/healthz")[0] == 200


def test_a_request_that_comes_in_pieces_is_answered_all_the_same(serve: Serve) -> None:
    port = serve().server.port  # type: ignore[union-attr]
    for request, status in (
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", b"200"),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for i in range(len(request)):
                raw.sendall(request[i : i + 1])
            assert raw.recv(64).split()[1] == status


def test_a_server_that_stops_answers_what_is_in_work(serve: Serve) -> None:
    actor = Summing()
    running = serve(actor)
    actor.open.clear()
    idle = open_openpi(running)
    with connect(running.address) as remote, ThreadPoolExecutor(1) as pool:
        future = pool.submit(remote.act, [seen()], [EpisodeKey(0, "pick", 0)])
        assert actor.asked.wait(10)
        running.stop()
        wait_until(lambda: get(running, "/healthz")[0] == 503)  # a balancer sends nobody here any more
        with pytest.raises(InvalidStatus) as refused:
            open_openpi(running)
        assert refused.value.response.status_code == 503
        assert not future.done()
        actor.open.set()
        assert len(future.result(timeout=10)) == 1
    with pytest.raises(ConnectionClosed) as error:
        idle.recv(timeout=10)
    assert error.value.rcvd is not None and error.value.rcvd.code == 1001


def test_a_client_that_stays_after_its_answer_does_not_keep_a_server_from_stopping(serve: Serve) -> None:
    actor = Summing()
    running = serve(actor, timeout_s=60)
    actor.open.clear()
    stays = open_openpi(running)
    stays.send(openpi(seen()))
    assert actor.asked.wait(10)
    running.stop()
    wait_until(lambda: get(running, "/healthz")[0] == 503)
    actor.open.set()
    assert isinstance(stays.recv(timeout=10), bytes)
    with pytest.raises(ConnectionClosed) as error:
        stays.recv(timeout=10)
    assert error.value.rcvd is not None and error.value.rcvd.code == 1001
    wait_until(lambda: _refuses_connections(running))


def _refuses_connections(running: Running) -> bool:
    try:
        socket.create_connection(("127.0.0.1", running.server.port), timeout=1).close()  # type: ignore[union-attr]
    except OSError:
        return True
    return False


def test_a_host_that_others_can_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "robot.local"):
        with pytest.raises(ConfigError, match="--token-file"):
            Options(host=host)
    for host in ("127.0.0.1", "::1", "localhost"):
        Options(host=host)
    Options(host="0.0.0.0", token=TOKEN)


def test_what_cannot_be_served_is_refused_before_anybody_connects(serve: Serve) -> None:
    with pytest.raises(ConfigError, match=r"--map\) 'observation/image' = 'top': .*no camera 'top'"):
        serve(names={"observation/image": "top"})
    with pytest.raises(ConfigError, match="real_time .*can continue"):
        serve(execution=Execution("real_time"))
    with pytest.raises(ConfigError, match="a chunk has 6 steps"):
        serve(execution=Execution(replan=5, delay=2))
    running = serve()
    with pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1"):
        serve(port=running.server.port)  # type: ignore[union-attr]


def test_threads_may_share_a_remote_actor(serve: Serve) -> None:
    with connect(serve().address) as remote, ThreadPoolExecutor(8) as pool:
        keys = [EpisodeKey(i, "pick", 0) for i in range(40)]
        answers = list(pool.map(lambda key: remote.act([seen(key.seed)], [key])[0].actions.tobytes(), keys))
    assert answers == [Summing().act([seen(key.seed)], [key])[0].actions.tobytes() for key in keys]
    assert isinstance(remote, RemoteActor)
