"""The engine behind an address: what may pass is tried again, what cannot pass ends at once."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import resource
import threading
import time

import httpx2
import pytest
from tests.generation.faulty_server import MODEL, FaultyServer

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.engine import Decoding, Request
from recipes_lib.generation.openai_engine import OpenAIEngine, Server, ServerFault, retry_after


def engine_for(server, **settings):
    settings = {
        "timeout_s": 0.6,
        "max_retries": 2,
        "first_pause_s": 0.02,
        "concurrency": 4,
    } | settings
    return OpenAIEngine(Server(base_url=server.url, model=MODEL, **settings))


def ask(engine, count=1, **fields):
    fields = fields or {"prompt": "Hello there"}
    return {
        done.key: done
        for done in engine.complete(
            [Request(key=str(n), **fields) for n in range(count)], Decoding()
        )
    }


@pytest.mark.parametrize("fault", ["429:0", "500", "503", "drop", "hang", "drip", "nonsense"])
def test_what_may_pass_is_tried_again(fault):
    with FaultyServer(faults=lambda number: fault if number == 1 else None) as server:
        engine = engine_for(server)
        done = ask(engine)["0"]
    assert (done.error, done.text, engine.retries) == (None, "echo: Hello there", 1)


@pytest.mark.parametrize("fault", ["500", "hang", "drip", "nonsense"])
def test_what_does_not_pass_ends_after_the_last_attempt(fault):
    with FaultyServer(faults=lambda number: fault) as server:
        engine = engine_for(server, timeout_s=0.2)
        done = ask(engine)["0"]
        assert len(server.bodies) == 3
    assert done.error and not done.refused


def test_the_pause_the_server_asks_for_is_kept():
    with FaultyServer(faults=lambda number: "429:1" if number == 1 else None) as server:
        engine = engine_for(server)
        started = time.monotonic()
        assert ask(engine)["0"].error is None
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_address_ends_everything_at_once_with_the_servers_words(status):
    with FaultyServer(faults=lambda number: status) as server:
        engine = engine_for(server)
        with pytest.raises(ServerFault, match=f"made-up {status}") as caught:
            ask(engine, 8)
        assert len(server.bodies) <= 8 and caught.value.exit_code == 6


@pytest.mark.parametrize("status", ["400", "402", "413", "422"])
def test_a_refused_body_is_the_requests_own_fault_and_not_tried_again(status):
    with FaultyServer(faults=lambda number: status) as server:
        done = ask(engine_for(server))["0"]
        assert len(server.bodies) == 1
    assert done.refused and done.error == f"{status}: made-up {status}"


@pytest.mark.parametrize("status", ["400", "422"])
def test_a_server_that_takes_no_token_ids_is_told_apart(status):
    with FaultyServer(faults=lambda number: status) as server:
        done = ask(engine_for(server), prompt="x", ids=(1, 2))["0"]
        judged = ask(
            OpenAIEngine(Server(base_url=server.url, model=MODEL), logprobs=True), prompt="x"
        )["0"]
    assert "cannot answer for runs" in done.error and "generation.engine=transformers" in done.error
    assert "judge.mode: generate" in judged.error


def test_a_server_without_log_probabilities_says_what_to_set():
    with FaultyServer(
        faults=lambda number: "body:" + json.dumps({"choices": [{"text": "A", "logprobs": None}]})
    ) as server:
        engine = OpenAIEngine(
            Server(base_url=server.url, model=MODEL, max_retries=0), logprobs=True
        )
        assert "judge.mode: generate" in ask(engine, prompt="x")["0"].error


def test_a_reply_of_another_model_ends_everything():
    with FaultyServer(
        faults=lambda number: (
            "body:" + json.dumps({"model": "stranger", "choices": [{"text": "A"}]})
        )
    ) as server:
        engine = engine_for(server)
        with pytest.raises(
            ServerFault, match=f"answered as 'stranger', not as '{MODEL}'"
        ) as caught:
            ask(engine)
    assert caught.value.exit_code == 6


HOSTILE = {
    "lone surrogate": b'{"choices": [{"text": "fine \\ud800 [RESULT] A"}]}',
    "invalid UTF-8": b'{"choices": [{"text": "fine \xff\xfe [RESULT] A"}]}',
    "NUL": b'{"choices": [{"text": "fine \\u0000 [RESULT] A"}]}',
    "NaN in usage": (
        b'{"choices": [{"text": "fine [RESULT] A"}], "usage": {"completion_tokens": NaN}}'
    ),
    "huge number": (
        b'{"choices": [{"text": "fine [RESULT] A"}], "usage": {"completion_tokens": '
        + b"9" * 5000
        + b"}}"
    ),
    "a list of parts": (
        b'{"choices": [{"message": {"content": [{"type": "text", "text": "fine [RESULT] A"}]}}]}'
    ),
    "a number for a reason": (
        b'{"choices": [{"text": "fine [RESULT] A", "finish_reason": 3}], "usage": "none",'
        b' "model": 7}'
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_any_bytes_of_a_reply_leave_a_text_that_can_be_written(what):
    with FaultyServer(faults=lambda number: b"200:" + HOSTILE[what]) as server:
        done = ask(engine_for(server))["0"]
    assert done.error is None and done.finish_reason == "stop" and done.num_tokens == 0
    assert done.text.startswith("fine ") and done.text.endswith("[RESULT] A")
    done.text.encode()


@pytest.mark.parametrize("choice", [b'{"message": {"content": null}}', b'{"text": null}', b"{}"])
def test_a_reply_without_content_is_an_empty_text(choice):
    with FaultyServer(faults=lambda number: b'200:{"choices": [%b]}' % choice) as server:
        done = ask(engine_for(server))["0"]
    assert (done.text, done.finish_reason, done.error) == ("", "stop", None)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"choices": [{"text": {"a": 1}}]}',
        b"null",
        b"[1]",
        b'{"choices": []}',
        b'{"choices": 3}',
        b"",
        b"\xff\x00",
    ],
)
def test_what_is_no_reply_at_all_fails_alone(body):
    with FaultyServer(faults=lambda number: b"200:" + body if number <= 3 else None) as server:
        done = ask(engine_for(server, concurrency=1), 2)
    assert done["0"].error and not done["0"].refused
    assert done["1"].error is None


@pytest.mark.parametrize(
    "words", [b"\xff\x00 no", b"[" * 100_000, b'{"error": NaN}', b'{"detail": "\\ud800"}']
)
def test_any_bytes_of_a_refusal_are_shown(words):
    with FaultyServer(faults=lambda number: b"422:" + words) as server:
        done = ask(engine_for(server))["0"]
    assert done.refused and done.error.startswith("422: ") and len(done.error) < 400
    done.error.encode()


@pytest.mark.parametrize("status", [b"200", b"500"])
def test_a_reply_that_unpacks_to_a_gigabyte_takes_little_memory(status):
    bomb = gzip.compress(b"\0" * (1 << 26)) * 16
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FaultyServer(faults=lambda number: status + b"/gzip:" + bomb) as server:
        done = ask(engine_for(server, timeout_s=20, max_retries=0))["0"]
    assert "longer than 4 MiB when unpacked" in done.error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10


def test_a_packed_reply_is_read_although_none_was_asked_for():
    with FaultyServer(
        faults=lambda number: b"200/GZIP:" + gzip.compress(b'{"choices": [{"text": "hello"}]}')
    ) as server:
        assert ask(engine_for(server))["0"].text == "hello"


@pytest.mark.parametrize(
    "location",
    [
        b"http://127.0.0.1:99999/",
        b"http://127.0.0.1:1/",
        b"file:///etc/passwd",
        b"http://[",
        b"\xff",
        b"",
    ],
)
def test_no_redirect_is_followed_and_the_address_it_names_is_shown(location):
    with FaultyServer(faults=lambda number: (b"307", location)) as server:
        done = ask(engine_for(server))["0"]
        assert len(server.bodies) == 1
    assert (
        done.refused
        and done.error.startswith("307: it sends requests on to ")
        and "set base_url" in done.error
    )
    done.error.encode()


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_reply_that_the_server_broke_off_is_asked_again_and_is_no_answer(reason):
    half = b'200:{"choices": [{"text": "half a rea", "finish_reason": "' + reason.encode() + b'"}]}'
    with FaultyServer(faults=lambda number: half if number == 1 else None) as server:
        assert ask(engine_for(server))["0"].text == "echo: Hello there"
    with FaultyServer(faults=lambda number: half) as server:
        assert f"finish_reason {reason}" in ask(engine_for(server))["0"].error


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_server_that_can_do_less_at_once_is_asked_less_and_loses_nothing(status):
    active, most, lock = [0], [0], threading.Lock()

    def faults(number):
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
            fits = active[0] <= 4
        time.sleep(0.02)
        with lock:
            active[0] -= 1
        return None if fits else status

    with FaultyServer(faults=faults) as server:
        done = ask(engine_for(server, concurrency=64, max_retries=2, timeout_s=10), 200)
        asked = len(server.bodies)
    assert len(done) == 200 and not any(one.error for one in done.values())
    assert most[0] > 4 and asked < 800


@pytest.mark.parametrize("how", ["refuses connections", "is too late"])
def test_a_server_that_is_overrun_in_another_way_is_asked_less_too(how, monkeypatch):
    active, limits = 0, []
    with FaultyServer() as server:
        engine = engine_for(server, concurrency=64, max_retries=12, first_pause_s=0.001)

    async def post(client, request, decoding):
        nonlocal active
        active += 1
        limits.append(engine._allowed)
        try:
            if active > 8:
                raise httpx2.ConnectError("refused") if how.startswith("ref") else TimeoutError
            await asyncio.sleep(0)
            return {"choices": [{"text": "well"}]}
        finally:
            active -= 1

    monkeypatch.setattr(engine, "_post", post)
    done = ask(engine, 200)
    assert len(done) == 200 and not any(one.error for one in done.values())
    assert limits[0] == 64 and min(limits) < 64


def test_another_model_on_the_server_is_refused_before_anything_is_asked():
    with (
        FaultyServer() as server,
        pytest.raises(EnvironmentFault, match=f"does not serve 'other'[^$]*{MODEL}"),
    ):
        OpenAIEngine(Server(base_url=server.url, model="other"))


def test_no_server_at_all_says_so_and_ends_with_exit_code_6():
    with pytest.raises(ServerFault, match="does not answer") as caught:
        OpenAIEngine(
            Server(base_url="http://127.0.0.1:9/v1", model=MODEL, max_retries=1, first_pause_s=0.01)
        )
    assert caught.value.exit_code == 6


def test_a_missing_key_variable_is_named(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with FaultyServer() as server, pytest.raises(EnvironmentFault, match="MY_KEY is not set"):
        engine_for(server, api_key_variable="MY_KEY")


def test_no_more_requests_than_allowed_are_in_flight():
    active, most = [0], [0]

    def faults(number):
        active[0] += 1
        most[0] = max(most[0], active[0])
        time.sleep(0.05)
        active[0] -= 1

    with FaultyServer(faults=faults) as server:
        assert len(ask(engine_for(server, concurrency=3), 12)) == 12
    assert 1 < most[0] <= 3


def test_token_ids_are_sent_as_they_are_and_messages_go_to_the_chat_endpoint():
    with FaultyServer() as server:
        engine = engine_for(server)
        ask(engine, prompt="x", ids=(1, 2, 3))
        ask(engine, messages=({"role": "user", "content": "hi"},))
    assert server.bodies[0]["prompt"] == [1, 2, 3]
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "hi"}]


def test_first_token_probabilities_come_from_both_endpoints():
    with FaultyServer() as server:
        engine = OpenAIEngine(Server(base_url=server.url, model=MODEL), logprobs=True)
        expected = {" A": math.exp(-0.1), " B": math.exp(-2.5)}
        assert ask(engine, prompt="x")["0"].probabilities == expected
        chat = ({"role": "user", "content": "hi"},)
        assert ask(engine, messages=chat)["0"].probabilities == expected


def test_retry_after_reads_seconds_and_dates_and_ignores_nonsense():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "9999"}) == 120.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
