"""The engine behind an address: what may pass is tried again, what cannot pass ends at once."""

import json
import time
from functools import partial
from threading import Lock
from typing import Any

import pytest
from tests.evals.faulty_server import MODEL, NONSENSE, Fault, FaultyServer

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.evals.asking import EvaluationIncomplete, ServerDown, ServerGone, ask_missing
from recipes_lib.evals.engines import answered_by
from recipes_lib.evals.engines.base import Completion, Request, Sampling
from recipes_lib.evals.engines.server import ServerEngine
from recipes_lib.evals.log import Store
from recipes_lib.evals.recipe import GenerationSection

CHAT = {"messages": ({"role": "user", "content": "hi"},)}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("recipes_lib.evals.engines.server.LONGEST_PAUSE_S", 0.0)


def engine_for(server: FaultyServer, model: str = MODEL, **settings: Any) -> ServerEngine:
    usual = {"timeout_s": 0.6, "max_retries": 2, "concurrency": 1, "base_url": server.url}
    return ServerEngine(GenerationSection(engine="openai", **usual | settings), model)


def ask(engine: ServerEngine, number: int = 1, **fields: Any) -> list[Completion]:
    sampling = fields.pop("sampling", Sampling())
    fields = fields or {"prompt": "Hello there"}
    requests = [Request(key=str(n), **fields) for n in range(number)]
    return sorted(engine.complete(requests, sampling), key=lambda done: int(done.key))


def always(fault: Fault, most: int = 1000) -> FaultyServer:
    """A server whose first replies are a fault."""
    return FaultyServer(faults=lambda number: fault if number <= most else None)


def test_what_may_pass_is_tried_again_and_fails_alone_after_the_last_attempt():
    for fault in ("429:0", "500", "503", "drop", "hang"):
        with always(fault, 1) as server:
            done = ask(engine_for(server), 2)
            assert [each.error for each in done] == [None, None], fault
            assert done[0].text == "echo: Hello there"
    for fault in ("500", "hang", "drip", NONSENSE, "drop"):
        with always(fault, 1) as server:
            failed, answered = ask(engine_for(server, timeout_s=0.2, max_retries=0), 2)
            assert failed.error and answered.error is None, fault


def test_a_slow_server_is_asked_no_more_at_once_than_it_answers_in_time():
    """It works on what it was asked, one by one, also when nobody waits for it any more."""
    turn = Lock()

    def take_time(number: int) -> None:
        with turn:
            time.sleep(0.03)

    with FaultyServer(faults=take_time) as server:
        done = ask(engine_for(server, concurrency=64, max_retries=0), 64)
        assert not [each.error for each in done if each.error]


def test_what_a_server_refuses_is_asked_once_and_has_no_answer():
    for status in ("400", "401", "402", "403", "404"):
        with always(status) as server:
            (done,) = ask(engine_for(server))
            assert len(server.bodies) == 1
        assert f"made-up {status}" in str(done.error)


# what servers say of one request that they will never answer -> its finish_reason
FINAL = {
    b'400:{"message": "This model\'s maximum context length is 2048 tokens"}': "prompt_too_long",
    b'400:{"error": {"code": "context_length_exceeded", "message": "no"}}': "prompt_too_long",
    b'400:{"error": {"message": "the request exceeds the available context size"}}': (
        "prompt_too_long"
    ),
    b"413:Payload Too Large": "prompt_too_long",
    b'400:{"error": {"code": "content_filter", "message": "no"}}': "refused",
    b'422:{"detail": "cannot be processed"}': "refused",
}


def test_a_request_that_is_refused_for_good_is_no_fault_and_is_asked_once():
    for fault, reason in FINAL.items():
        with always(fault) as server:
            (done,) = ask(engine_for(server))
            assert len(server.bodies) == 1
        assert (done.error, done.finish_reason, done.text) == (None, reason, ""), fault
        assert done.refusal


def test_refusals_are_stored_with_the_first_answer_and_never_where_there_is_none(tmp_path):
    """A server that refuses everything is set up wrongly: that says nothing of the requests."""
    refusal = b"422:no"
    path = tmp_path / "answers.jsonl"
    requests = {str(n): Request(key=str(n), prompt=f"Hi {n}") for n in range(30)}

    def keep(request: Request, done: Completion) -> dict[str, str]:
        return {"key": request.key, "text": done.text, "finish_reason": done.finish_reason}

    def ask_all(server: FaultyServer) -> Store:
        complete = partial(engine_for(server).complete, sampling=Sampling())
        store = Store(path)
        ask_missing(store, requests, complete, keep, "answer")
        return store

    nothing = pytest.raises(EvaluationIncomplete, match="the server refused every request")
    with always(refusal) as server, nothing:
        ask_all(server)
    assert not len(Store(path))
    with FaultyServer(faults=lambda number: refusal if number <= 25 else None) as server:
        store = ask_all(server)
    reasons = [row["finish_reason"] for row in store.values()]
    assert reasons == ["refused"] * 25 + ["stop"] * 5
    with always(refusal) as server:
        assert len(ask_all(server)) == 30 and not server.bodies


def test_no_reply_is_lost_when_too_many_requests_fail(tmp_path, monkeypatch):
    """Most of 60 requests in flight are refused; what the server answered is not asked again."""
    monkeypatch.setattr("recipes_lib.evals.engines.server.FIRST_IN_FLIGHT", 60)
    with FaultyServer(faults=lambda number: None if number % 30 == 0 else "400") as server:
        engine, store = engine_for(server, concurrency=60), Store(tmp_path / "answers.jsonl")
        requests = {str(n): Request(key=str(n), prompt="Hi") for n in range(300)}

        def keep(request: Request, done: Completion) -> dict[str, str]:
            return {"key": request.key, "text": done.text}

        for _ in range(2):
            with pytest.raises(ServerGone):
                complete = partial(engine.complete, sampling=Sampling())
                ask_missing(store, requests, complete, keep, "answer")
        given = sum(server.faults(number + 1) is None for number in range(len(server.bodies)))
        assert len(store) == given >= 4 and len(server.bodies) < 300


def test_a_server_that_wants_another_name_for_the_token_limit_gets_it():
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    refusal = b"400:" + json.dumps({"error": {"message": message}}).encode()

    def faults(number: int) -> bytes | None:
        return refusal if "max_tokens" in server.bodies[number - 1] else None

    for in_flight in (1, 8):
        with FaultyServer(faults=faults) as server:
            done = ask(engine_for(server, concurrency=in_flight), 9, **CHAT)
            assert not any(each.error for each in done)
            limits = {body.get("max_completion_tokens") for body in server.bodies}
        assert limits == {None, 512}


def test_anything_else_of_a_request_is_passed_on_and_part_of_the_fingerprint():
    """So is the address: under one name another server may answer with other weights."""
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with FaultyServer() as server:
        plain, own = engine_for(server), engine_for(server, extra_body=extra)
        moved = plain.server.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
        prints = {answered_by(each, MODEL, None) for each in (plain.server, own.server, moved)}
        assert len(prints) == 3
        ask(own, **CHAT)
        ask(plain, prompt="x", ids=(1, 2, 3))
        ask(plain, **CHAT, schema={"type": "object"})
        ask(ServerEngine(own.server, MODEL, [2]), prompt="x", ids=(1, 2, 3))
    first, second, third, trained = server.bodies
    # all of a run's sampling is ours; a hosted model may refuse keys that it does not know
    assert trained["stop_token_ids"] == [2] and trained["top_k"] == -1 and "top_k" not in first
    assert trained["repetition_penalty"] == 1.0 and trained["chat_template_kwargs"]
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert first["temperature"] == 0 and second["prompt"] == [1, 2, 3]
    assert third["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_any_bytes_of_a_reply_leave_a_text_that_can_be_written_or_fail_alone():
    fine = b'"fine \\ud800 \\u0000 [RESULT] A"'
    for content, text in ((fine, "fine \ufffd \ufffd [RESULT] A"), (b"null", "")):
        choices = b'"choices": [{"message": {"content": %b}}]' % content
        with always(b'200:{"usage": NaN, "model": 7, %b}' % choices) as server:
            (done,) = ask(engine_for(server), **CHAT)
        assert (done.text, done.error, done.finish_reason) == (text, None, "stop")
    unreadable = [b"[" * 100_000, b"null", b"[1]", b"", b"\xff\x00"]
    unreadable += [b'{"choices": []}', b'{"choices": 3}', b'{"choices": [{"text": {"a": 1}}]}']
    unreadable += [b'{"choices": [{"text": "a", "finish_reason": "abort"}]}', b'{"choices": [{}]}']
    for body in unreadable:
        with always(b"200:" + body, 1) as server:
            failed, answered = ask(engine_for(server), 2)
        assert failed.error and answered.error is None, body[:40]
    with always(b'200:{"choices": [{"message": null}]}') as server:
        assert ask(engine_for(server), **CHAT)[0].error
    for words in (b"\xff\x00 no", b"[" * 100_000, b'{"error": NaN}', b'{"detail": "\\ud800"}'):
        for status in (b"422:", b"400:"):
            with always(status + words) as server:
                (done,) = ask(engine_for(server))
            reason = done.error or done.refusal
            assert reason and len(reason.encode()) < 1000, words[:20]


def test_another_model_or_no_server_has_no_answer():
    (done,) = ask(
        ServerEngine(GenerationSection(base_url="http://127.0.0.1:9/v1", max_retries=0), MODEL)
    )
    assert "127.0.0.1:9" in str(done.error)
    with always(b'200:{"model": "stranger", "choices": [{"text": "A"}]}') as server:
        (done,) = ask(engine_for(server))
    assert "'stranger' answered" in str(done.error)


def test_a_key_that_the_server_echoes_is_masked(monkeypatch):
    monkeypatch.setenv("MY_KEY", "corp-zebra-violin-42")
    with always(b'400:{"error": {"message": "Incorrect key: corp-zebra-violin-42"}}') as server:
        (done,) = ask(engine_for(server, api_key_variable="MY_KEY"))
        assert "Incorrect key: ***" in str(done.error)
        for value in ("", "two\nlines"):
            monkeypatch.setenv("MY_KEY", value)
            with pytest.raises(EnvironmentFault, match="MY_KEY is not set"):
                engine_for(server, api_key_variable="MY_KEY")


def test_no_more_requests_than_allowed_are_in_flight():
    active, most = [0], [0]

    def faults(number: int) -> None:
        active[0] += 1
        most[0] = max(most[0], active[0])
        time.sleep(0.05)
        active[0] -= 1

    with FaultyServer(faults=faults) as server:
        assert len(ask(engine_for(server, concurrency=3), 12)) == 12
    assert 1 < most[0] <= 3


def test_a_server_that_is_down_is_told_from_one_that_refuses_a_model(tmp_path):
    """Another model may be served; nobody is, where the connection ends."""
    for fault, kind in (("404", ServerGone), ("503", ServerDown), ("drop", ServerDown)):
        requests = {str(n): Request(key=str(n), prompt="Hi") for n in range(30)}
        with always(fault) as server, pytest.raises(ServerGone) as caught:
            engine = engine_for(server, max_retries=0)
            complete = partial(engine.complete, sampling=Sampling())
            store = Store(tmp_path / f"{fault}.jsonl")
            ask_missing(store, requests, complete, lambda *_: {}, "answer")
        assert type(caught.value) is kind, fault
