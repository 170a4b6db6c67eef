"""The engine behind an address: what may pass is tried again, what cannot pass ends at once."""

from __future__ import annotations

import time

import pytest
from tests.generation.faulty_server import MODEL, FaultyServer

from recipes_lib.errors import EnvironmentFault
from recipes_lib.generation.engine import Decoding, Request
from recipes_lib.generation.openai_engine import OpenAIEngine, Server, ServerUnreachable, retry_after


def engine_for(server, **settings):
    settings = {"timeout_s": 0.6, "max_retries": 2, "first_pause_s": 0.02, "concurrency": 4} | settings
    return OpenAIEngine(Server(base_url=server.url, model=MODEL, **settings))


def ask(engine, count=1, **fields):
    fields = fields or {"prompt": "Hello there"}
    return {done.key: done for done in engine.complete([Request(key=str(n), **fields) for n in range(count)], Decoding())}


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
    assert done.error and not done.permanent


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
        with pytest.raises(EnvironmentFault, match=f"made-up {status}"):
            ask(engine, 8)
        assert len(server.bodies) <= 8


def test_a_refused_body_is_the_requests_own_fault_and_not_tried_again():
    with FaultyServer(faults=lambda number: "400") as server:
        done = ask(engine_for(server))["0"]
        assert len(server.bodies) == 1
    assert done.permanent and "made-up 400" in done.error


def test_another_model_on_the_server_is_refused_before_anything_is_asked():
    with FaultyServer() as server, pytest.raises(EnvironmentFault, match=f"does not serve 'other'[^$]*{MODEL}"):
        OpenAIEngine(Server(base_url=server.url, model="other"))


def test_no_server_at_all_says_so_and_ends_with_exit_code_6():
    with pytest.raises(ServerUnreachable, match="does not answer") as caught:
        OpenAIEngine(Server(base_url="http://127.0.0.1:9/v1", model=MODEL, max_retries=1, first_pause_s=0.01))
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
        assert ask(engine, prompt="x")["0"].logprobs == {" A": -0.1, " B": -2.5}
        assert ask(engine, messages=({"role": "user", "content": "hi"},))["0"].logprobs == {" A": -0.1, " B": -2.5}


def test_retry_after_reads_seconds_and_dates_and_ignores_nonsense():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "9999"}) == 120.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
