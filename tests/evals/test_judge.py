"""The loop asks in both orders, stores once, asks again with recorded seeds, and gives up in time;
judges in this process and behind an address.
"""

import itertools
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.evals.fake_judges import FakeJudge, reply, sound
from tests.evals.faulty_server import MODEL, FaultyServer, chaos

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.evals.asking import EvaluationIncomplete
from recipes_lib.evals.audit import pair_samples
from recipes_lib.evals.judge import Judge, opened, verdict_tokens
from recipes_lib.evals.judgments import Item, ask, build_requests
from recipes_lib.evals.log import Store
from recipes_lib.evals.recipe import load_judge_file

PROJECT = Path(__file__).resolve().parents[2]
PAIRS = [
    Item("1", "Name a fruit.", "An apple.", "A hammer."),
    Item("2", "Count to three.", "One, two, three. " * 6, "Three."),
    Item("3", "Say hello.", "Hello!", "Good morning to everyone here."),
]


def pairs(number: int) -> list[Item]:
    long = "long answer "
    return [Item(str(n), f"Question {n}", long * (n % 3 + 1), "short") for n in range(number)]


def test_each_pair_is_asked_in_both_orders_and_only_once(tmp_path: Path) -> None:
    judge, store = FakeJudge(sound), Store(tmp_path / "j.jsonl")
    rows = ask(pairs(10), judge, store)
    assert len(rows) == len(store) == len(judge.asked) == 20
    assert {(row["question_id"], row["order"]) for row in rows} == {
        (str(n), order) for n in range(10) for order in ("AB", "BA")
    }
    again = FakeJudge(sound)
    assert ask(pairs(10), again, Store(store.path)) == rows and not again.asked
    assert {sample.outcome for sample in pair_samples(store.values())} == {"win"}
    answers = [each.answers for each in build_requests([Item("q", "x", "ours", "other")], judge)]
    assert answers == [("ours", "other"), ("other", "ours")]


def test_another_judge_prompt_or_answer_is_another_judgment() -> None:
    def keys(item: Item, rubric: str = "helpfulness", fingerprint: str = "j") -> set[str]:
        path = str(PROJECT / f"evals/rubrics/{rubric}.txt")
        judge = FakeJudge(sound, fingerprint=fingerprint, rubric=path)
        return {request.row["key"] for request in build_requests([item], judge)}

    item = Item("q", "x", "a", "b")
    changed = [keys(item, fingerprint="k"), keys(item, rubric="correctness")]
    changed += [keys(replace(item, opponent="c")), keys(replace(item, reference="r"))]
    assert not any(keys(item) & other for other in changed)


def test_empty_and_identical_answers_are_decided_without_the_judge(tmp_path: Path) -> None:
    def count_tokens(text: str) -> int:
        raise AssertionError("a prompt that is not sent was counted")

    judge, store = FakeJudge(sound, count_tokens), Store(tmp_path / "j.jsonl")
    answers = [(" \n", "b"), ("a", ""), ("", ""), ("é", "é ")]
    ask([Item(str(n), "x", *both) for n, both in enumerate(answers)], judge, store)
    assert not judge.asked and len(store) == 2 * len(answers)
    outcomes = [sample.outcome for sample in pair_samples(store.values())]
    assert outcomes == ["loss", "win", "tie", "tie"]
    (row,) = ask([Item("empty", "x", "")], judge, Store(tmp_path / "absolute.jsonl"))
    assert row["value"] == 1


def test_every_reply_gets_a_status_and_only_a_verdict_a_value(tmp_path: Path) -> None:
    cases = [
        ("truncated", reply("so [RESULT] A", finish_reason="length")),
        ("truncated", reply(finish_reason="prompt_too_long")),
        ("empty", reply("")),
        ("unparsed", reply(probabilities={"A": float("nan"), "B": 0.5})),
        ("unparsed", reply(probabilities={"A": 0.2, "B": 0.2})),
    ]
    for number, (status, given) in enumerate(cases):
        store = Store(tmp_path / f"{number}.jsonl")
        rows = ask(pairs(1), FakeJudge(lambda request, given=given: given), store)
        assert {(row["status"], row["value"]) for row in rows} == {(status, None)}, given
    refused = reply(finish_reason="refused", refusal="http://x: content_filter")
    judge = FakeJudge(lambda request: refused if request.row["order"] == "AB" else sound(request))
    first, second = ask(pairs(1), judge, Store(tmp_path / "refused.jsonl"))
    assert (first["status"], first["value"], second["status"]) == ("refused", None, "ok")
    judge = FakeJudge(sound, lambda text: len(text.split()), max_context_tokens=570)
    rows = ask(pairs(2), judge, Store(tmp_path / "long.jsonl"))
    assert not judge.asked and {row["status"] for row in rows} == {"truncated"}


def test_what_failed_is_missing_and_the_same_command_asks_it(tmp_path: Path) -> None:
    """Timeouts, refused bodies, a server that dies after six replies, and Ctrl-C: each reply was
    stored before the next one was waited for.
    """
    timeout, died = reply(error="timeout"), reply(error="503: overloaded")
    refused = reply(error="402: pay first")
    cases = [
        (lambda n, good: good if n % 2 else timeout, 20, r"20 of 40 judg.*: timeout \(20 times\)"),
        (lambda n, good: refused, 0, r"40 of 40 judg.*pay first \(20 times\)"),
        (lambda n, good: good if n < 6 else died, 6, r"34 of 40 judg.*: 503: overloaded \(20"),
        (lambda n, good: good if n < 1 else died, 1, r"39 of 40 judg.*\n  1 judgment stored; run"),
        (lambda n, good: good if n < 5 else 1 / 0, 5, None),
    ]
    for number, (given, num_stored, words) in enumerate(cases):
        path, calls = tmp_path / f"{number}.jsonl", itertools.count()
        judge = FakeJudge(
            lambda request, given=given, calls=calls: given(next(calls), sound(request))
        )
        error = EvaluationIncomplete if words else ZeroDivisionError
        with pytest.raises(error, match=words) as caught:
            ask(pairs(20), judge, Store(path))
        assert getattr(caught.value, "exit_code", 6) == 6
        assert len(Store(path)) == num_stored
        rest = FakeJudge(sound)
        ask(pairs(20), rest, Store(path))
        assert len(rest.asked) == 40 - num_stored


def test_probabilities_are_those_of_the_next_token_and_weights_load_once(judge_file, tmp_path):
    import torch

    store = Store(tmp_path / "j.jsonl")
    with opened(judge_file()) as judge:
        rows = ask(PAIRS, judge, store)
        requests = list(build_requests(PAIRS, judge))
        assert len(requests) == len(rows) == 6
        with judge._engine.using() as model:
            pass
        lead, tokens = verdict_tokens(judge.tokenizer, "[RESULT]", ("A", "B"))
        for request, row in zip(requests, rows, strict=True):
            messages = [{"role": "user", "content": request.prompt}]
            options = {"add_generation_prompt": True, "return_dict": False}
            ids = [*judge.tokenizer.apply_chat_template(messages, **options), *lead]
            with torch.no_grad():
                expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
            for verdict, token in tokens.items():
                share = pytest.approx(float(expected[token]), rel=1e-4)
                assert row["probabilities"][verdict] == share
            assert row["status"] == "ok"
    with opened(judge_file()) as judge:
        assert ask(PAIRS, judge, store) == rows
        assert judge._engine is None, "weights were loaded for nothing"


def test_every_way_to_ask_is_in_the_fingerprint_and_nonsense_has_no_verdict(judge_file, tmp_path):
    prints = set()
    written = {"mode": "generate"}
    changes = [{}, {"dtype": "bfloat16"}, written]
    changes += [written | {"prompt_style": "prometheus"}, written | {"temperature": 0.5}]
    for keys in changes:
        with opened(judge_file(**keys)) as judge:
            prints.add(judge.fingerprint)
            (row,) = ask([Item("1", "Hi", "Hello.")], judge, Store(tmp_path / judge.fingerprint))
        assert (row["status"] == "ok") == ("mode" not in keys) == ("probabilities" in row), keys
    assert len(prints) == 5


def test_a_hub_judge_is_fetched_before_its_fingerprint_is_taken(judge_file, monkeypatch):
    cached: list[str] = []

    def fetch(*_, **__):
        cached.append("/hub/snapshots/0123/config.json")
        return SimpleNamespace(encode=list)

    found = lambda *_, **__: cached[0] if cached else None  # noqa: E731
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    monkeypatch.setattr("recipes_lib.evals.judge.load_tokenizer", fetch)
    Judge(judge_file(model="owner/judge"), fetch=False)  # a study's status asks no network
    assert not cached
    first, second = (Judge(judge_file(model="owner/judge")).fingerprint for _ in range(2))
    assert first == second
    with pytest.raises(RecipeError, match="/nowhere/judge"):
        Judge(judge_file(model="/nowhere/judge"))


def test_verdicts_are_told_apart_by_one_token_or_refused():
    def letters(text, **_):
        return [ord(char) for char in text]

    def some_merge(text, **_):
        """The space merges with 1 alone."""
        return [*letters(text)[:-2], 1000] if text.endswith(" 1") else letters(text)

    for encode, lead_in, one in ((letters, "[R] ", 49), (some_merge, "[R]", 1000)):
        tokens = {"1": one, "2": 50 if one == 49 else 32}
        found = verdict_tokens(SimpleNamespace(encode=encode), "[R]", ("1", "2"))
        assert found == (letters(lead_in), tokens)
    with pytest.raises(EnvironmentFault, match="no single token for each"):
        verdict_tokens(SimpleNamespace(encode=letters), "[R]", ("4", "45", "5"))


def served(judge_file, url: str, **keys):
    usual = {"engine": "openai", "model": MODEL, "base_url": url, "mode": "generate"}
    return judge_file(**usual | keys)


def test_a_served_judge_is_asked_in_both_orders_in_every_mode_and_style(judge_file, tmp_path):
    for mode, style in itertools.product(("generate", "json"), ("chat", "prometheus")):
        text = '{"feedback": "fuller", "result": "A"}' if mode == "json" else "Fine. [RESULT] A"
        with FaultyServer(answer=text) as server:
            section = served(judge_file, server.url, mode=mode, prompt_style=style)
            with opened(section) as judge:
                rows = ask(PAIRS, judge, Store(tmp_path / f"{mode}-{style}.jsonl"))
            sent = server.bodies
        assert len(rows) == len(sent) == 6 and {row["value"] for row in rows} == {"A"}, mode
        assert sorted(row["order"] for row in rows) == ["AB"] * 3 + ["BA"] * 3
        assert all(("messages" in body) == (style == "chat") for body in sent)
        if mode == "json" and style == "chat":
            (message,) = sent[0]["messages"]
            assert message["role"] == "user"  # Gemma 2 has no system role
            form = sent[0]["response_format"]["json_schema"]["schema"]
            assert form["properties"]["result"]["enum"] == ["A", "B"]


def test_only_a_judge_here_takes_the_address_of_one_started_for_it(
    judge_file, tmp_path, monkeypatch
):
    store = Store(tmp_path / "a.jsonl")
    with FaultyServer(answer="Both fine. [RESULT] A") as server:
        monkeypatch.setenv("RECIPES_JUDGE_URL", server.url)
        elsewhere = served(judge_file, "http://judge.invalid/v1", max_retries=0)
        with opened(elsewhere) as judge, pytest.raises(EvaluationIncomplete, match="invalid"):
            ask(PAIRS, judge, store)
        with opened(served(judge_file, "http://localhost:1/v1")) as judge:
            assert len(ask(PAIRS, judge, store)) == 6


MANY = [Item(str(n), f"Question {n}?", f"First {n}.", f"Second {n}.") for n in range(150)]


def judge_many(judge: str, judgments: str) -> None:
    """Run in a process of its own, which the test below kills."""
    with opened(load_judge_file(judge).judge) as opened_judge:
        ask(MANY, opened_judge, Store(judgments))


@pytest.mark.slow
def test_faults_and_deaths_lose_no_judgment_and_ask_none_twice(judge_file, tmp_path):
    """300 judgments: a third of the requests go wrong, the server dies in the middle of the first
    two commands, and the third one is killed with SIGKILL.
    """
    path, ends = tmp_path / "j.jsonl", []
    for life in range(9):
        stored = {(row["question_id"], row["order"]) for row in Store(path).values()}
        trouble, last = chaos(life), {0: 60, 1: 120}.get(life, 10**9)
        process: list[subprocess.Popen] = []

        def faults(number: int, trouble=trouble, last=last, process=process):
            if process and number == 100:
                process[0].kill()
            return "drop" if number > last else trouble(number)

        with FaultyServer(faults=faults, answer="A is fuller. [RESULT] A") as server:
            served(judge_file, server.url, concurrency=16, timeout_s=0.5, max_retries=3)
            if life == 2:
                code = "import sys; from tests.evals.test_judge import judge_many as judge;"
                command = [sys.executable, "-c", f"{code} judge(*sys.argv[1:])"]
                process += [
                    subprocess.Popen([*command, tmp_path / "judge.yaml", path], cwd=PROJECT)
                ]
                ends.append(process[0].wait(200))
            else:
                ends.append(6)
                with suppress(EvaluationIncomplete):
                    judge_many(str(tmp_path / "judge.yaml"), path)
                    ends[-1] = 0
            assert not {asked_in(body) for body in server.bodies} & stored
        assert len(Store(path)) > len(stored)
        if ends[-1] == 0:
            break
    rows = list(Store(path).values())
    assert ends[:3] == [6, 6, -signal.SIGKILL] and ends[-1] == 0
    assert len({(row["question_id"], row["order"]) for row in rows}) == len(rows) == 300
    assert {row["value"] for row in rows} == {"A"}


def asked_in(body: dict) -> tuple[str, str]:
    """The pair and the order that a request asks for."""
    text = body["messages"][-1]["content"]
    first, number = re.search(r"(First|Second) (\d+)\.\n", text).groups()
    return number, "AB" if first == "First" else "BA"


def test_a_judge_whose_server_never_starts_is_an_error_and_no_endless_wait(
    judge_file, tmp_path, monkeypatch
):
    """launch/with_judge.sh that was killed leaves its file; one that ended has removed it."""
    wanted = tmp_path / "judge.wanted"
    monkeypatch.setenv("RECIPES_JUDGE_WANTED", str(wanted))
    monkeypatch.setenv("JUDGE_START_S", "0.2")
    monkeypatch.setattr("recipes_lib.evals.judge._SCRIPT_ENDS_S", 0.2)
    section = served(judge_file, "http://localhost:1/v1")
    with opened(section) as judge, pytest.raises(EnvironmentFault, match="no judge that answers"):
        ask(PAIRS, judge, Store(tmp_path / "a.jsonl"))
    monkeypatch.setenv("JUDGE_START_S", "100")
    monkeypatch.setattr("time.sleep", lambda _: wanted.unlink())
    with opened(section) as judge, pytest.raises(EnvironmentFault, match="ended before"):
        ask(PAIRS, judge, Store(tmp_path / "a.jsonl"))
