"""Judges made of models: probabilities of the allowed verdicts, written verdicts, and the same
behind an address.
"""

from __future__ import annotations

import threading

import pytest
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.evals.engine_openai import ServerFault
from recipes_lib.evals.judge import Item, ask, build_requests
from recipes_lib.evals.judges import opened, verdict_tokens
from recipes_lib.evals.store import Store

PAIRS = [
    Item("1", "Name a fruit.", "An apple.", "A hammer."),
    Item("2", "Count to three.", "One, two, three. " * 6, "Three."),
    Item("3", "Say hello.", "Hello!", "Good morning to everyone here."),
]
SINGLE = [Item("1", "Name a fruit.", "An apple."), Item("2", "Add 2 and 2.", "4", reference="4")]


def test_probabilities_are_those_of_the_next_token_after_the_lead_in(judge_file):
    import torch

    with opened(judge_file()) as judge:
        requests = list(build_requests(PAIRS, judge.plan("relative"), judge.fingerprint))
        found = {done.key: done for done in judge.complete(requests)}
        replies = [found[request.key] for request in requests]
        model, tokenizer = judge._engine.model, judge.tokenizer
        lead, tokens = verdict_tokens(tokenizer, "[RESULT]", ("A", "B"))
        for request, reply in zip(requests, replies, strict=True):
            ids = [*judge._ids(request.prompt), *lead]
            with torch.no_grad():
                expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
            for verdict in ("A", "B"):
                assert reply.probabilities[verdict] == pytest.approx(
                    float(expected[list(tokens[verdict])].sum()), rel=1e-4
                )


def test_stored_judgments_carry_the_mass_and_are_not_asked_again(judge_file, tmp_path):
    store = Store(tmp_path / "j.jsonl")
    with opened(judge_file()) as judge:
        first = ask(PAIRS, judge, store, judge.plan("relative"))
    with opened(judge_file()) as judge:
        second = ask(PAIRS, judge, store, judge.plan("relative"))
        assert judge._engine is None, "weights were loaded for nothing"
    assert (first.asked, second.asked, second.stored_before) == (6, 0, 6)
    assert all(0 < row["mass"] < 1 and row["status"] == "ok" for row in store)


@pytest.mark.parametrize("style", ["chat", "prometheus"])
def test_a_judge_that_writes_is_parsed_and_its_nonsense_stays_unparsed(judge_file, tmp_path, style):
    store = Store(tmp_path / "j.jsonl")
    with opened(judge_file(mode="generate", prompt_style=style, max_reasks=1)) as judge:
        ask(SINGLE[:1], judge, store, judge.plan("absolute"))
    (row,) = store
    assert row["status"] in ("unparsed", "truncated", "empty") and row["raw"] is not None


def test_weights_mode_and_precision_are_part_of_the_fingerprint(judge_file):
    prints = set()
    for keys in (
        {},
        {"mode": "generate"},
        {"dtype": "bfloat16"},
        {"prompt_style": "prometheus"},
        {"lead_in": "Result:"},
        {"temperature": 0.5},
    ):
        with opened(judge_file(**keys)) as judge:
            prints.add(judge.fingerprint)
    assert len(prints) == 6


def test_long_answers_are_cut_to_the_judges_context(judge_file, tmp_path):
    store = Store(tmp_path / "j.jsonl")
    long = [Item("1", "Tell a story.", "word " * 4000, "tale " * 4000)]
    with opened(judge_file(max_context_tokens=3000)) as judge:
        ask(long, judge, store, judge.plan("relative"))
        request = next(build_requests(long, judge.plan("relative"), ""))
        assert len(judge._ids(request.prompt)) <= 3000
        assert "###Feedback:" in request.prompt.user
    assert all(row["cut"] for row in store)


def test_a_space_of_its_own_before_digits_goes_into_the_lead_in():
    class SpaceIsAToken:
        def encode(self, text, add_special_tokens=False):
            return [ord(char) for char in text]

    lead, tokens = verdict_tokens(SpaceIsAToken(), "[R]", ("1", "2"))
    assert lead == [ord(char) for char in "[R] "] and tokens == {"1": {ord("1")}, "2": {ord("2")}}


def test_a_space_that_merges_with_some_verdicts_only_goes_into_the_lead_in_too():
    class SomeMerge:
        def encode(self, text, add_special_tokens=False):
            head, _, last = text.rpartition(" ")
            return (
                [*map(ord, head), 1000]
                if text.endswith(" 1")
                else [*map(ord, text)]
                if last
                else [*map(ord, head), 32]
            )

    lead, tokens = verdict_tokens(SomeMerge(), "[R]", ("1", "2", "3"))
    assert lead == [ord(char) for char in "[R] "] and tokens == {"1": {49}, "2": {50}, "3": {51}}


def test_verdicts_that_share_their_first_token_are_refused():
    class Letters:
        def encode(self, text, add_special_tokens=False):
            return [ord(char) for char in text]

    with pytest.raises(EnvironmentFault, match="apart by one token"):
        verdict_tokens(Letters(), "[R]", ("4", "45", "5"))


def test_only_a_judge_on_this_machine_takes_the_address_of_one_that_was_started_for_it(
    judge_file, tmp_path, monkeypatch
):
    with FaultyServer(answer="Both fine. [RESULT] A") as server:
        monkeypatch.setenv("RECIPES_JUDGE_URL", server.url)
        with opened(
            judge_file(engine="openai", model=MODEL, base_url="http://localhost:1/v1")
        ) as judge:
            assert ask(PAIRS, judge, Store(tmp_path / "a.jsonl"), judge.plan("relative")).asked == 6
        elsewhere = judge_file(
            engine="openai", model=MODEL, base_url="http://judge.invalid/v1", max_retries=0
        )
        with opened(elsewhere) as judge, pytest.raises(ServerFault, match=r"judge\.invalid"):
            ask(PAIRS, judge, Store(tmp_path / "b.jsonl"), judge.plan("relative"))


@pytest.mark.parametrize("style", ["chat", "prometheus"])
@pytest.mark.parametrize("mode", ["generate", "logits"])
def test_a_served_judge_is_asked_in_both_orders(judge_file, tmp_path, mode, style):
    store = Store(tmp_path / "j.jsonl")
    with FaultyServer(answer="Both fine. [RESULT] A") as server:
        file = judge_file(
            engine="openai", model=MODEL, base_url=server.url, mode=mode, prompt_style=style
        )
        with opened(file) as judge:
            run = ask(PAIRS, judge, store, judge.plan("relative"))
        sent = server.bodies
    assert (
        run.asked == 6
        and {row["value"] for row in store} == {"A"}
        and {row["order"] for row in store} == {"AB", "BA"}
    )
    assert all(("messages" in body) == (style == "chat") for body in sent)
    if mode == "logits":
        assert all(row["mass"] == pytest.approx(0.987, abs=1e-3) for row in store)
        assert all(body["max_tokens"] == 1 for body in sent)


def test_no_judgment_waits_for_another_and_one_that_is_asked_again_comes_after_the_others(
    judge_file, tmp_path
):
    """The first reply is held back until the last of 80 requests has arrived: with four in flight,
    a wait for a batch would never end.
    """
    pairs = [Item(str(n), "Name a fruit.", f"An apple, {n}.", "A pear.") for n in range(40)]
    last, held, store = threading.Event(), [], Store(tmp_path / "j.jsonl")
    mumbled = b'200:{"choices": [{"text": "Both have their merits."}]}'

    def faults(number):
        if number == 1:
            held.append(last.wait(60))
        if number == 80:
            last.set()
        return mumbled if number == 2 else None

    with FaultyServer(answer="The first. [RESULT] A", faults=faults) as server:
        keys = {"model": MODEL, "base_url": server.url, "concurrency": 4}
        with opened(judge_file(engine="openai", mode="generate", **keys)) as judge:
            run = ask(pairs, judge, store, judge.plan("relative"))
        temperatures = [body["temperature"] for body in server.bodies]
    assert held == [True] and (run.asked, run.reasked, len(store)) == (80, 1, 80)
    assert temperatures == [0.0] * 80 + [0.7]


def test_a_template_without_a_system_role_gets_one_message(judge_file, tmp_path):
    """Gemma 2 and the like refuse a system message: here the fallback, behind an address a key."""
    from transformers import AutoTokenizer

    with opened(judge_file(mode="generate")) as judge:
        request = next(build_requests(PAIRS, judge.plan("relative"), ""))
        judge.tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'system' %}"
            "{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}"
        )
        text = judge.tokenizer.decode(judge._ids(request.prompt))
        assert "You are a fair judge." in text and AutoTokenizer

    def faults(number):
        roles = [message["role"] for message in server.bodies[number - 1]["messages"]]
        return "400" if "system" in roles else None

    with FaultyServer(answer="Both fine. [RESULT] A", faults=faults) as server:
        keys = {"engine": "openai", "model": MODEL, "base_url": server.url, "mode": "generate"}
        store = Store(tmp_path / "a.jsonl")
        with opened(judge_file(**keys)) as judge:
            run = ask(PAIRS, judge, store, judge.plan("relative"))
        assert run.failed.total == 6 and "system_role" in str(run.failed)
        with opened(judge_file(**keys, system_role=False)) as judge:
            assert ask(PAIRS, judge, store, judge.plan("relative")).asked == 6


def test_a_judge_that_answers_in_json_is_asked_for_it(judge_file, tmp_path):
    store = Store(tmp_path / "j.jsonl")
    with FaultyServer(answer='{"feedback": "fuller", "result": "A"}') as server:
        keys = {"engine": "openai", "model": MODEL, "base_url": server.url, "mode": "json"}
        with opened(judge_file(**keys)) as judge:
            ask(PAIRS, judge, store, judge.plan("relative"))
        form = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert form["properties"]["result"]["enum"] == ["A", "B"]
    assert {row["value"] for row in store} == {"A"}
