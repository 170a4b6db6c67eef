"""generations.jsonl: only what is missing is asked, formats never mix, faults are counted."""

from __future__ import annotations

import json

import pytest

from recipes_lib.core.errors import RecipeError
from recipes_lib.engine import Completion, Decoding
from recipes_lib.eval_log import AnswerFaults, ends_in_loop
from recipes_lib.generation.answers import GenerationIncomplete, Writer


class FakeEngine:
    def __init__(self, fingerprint="weights", fail=()):
        self.fingerprint, self.fail, self.asked = fingerprint, set(fail), []

    def complete(self, requests, decoding):
        for request in requests:
            self.asked.append(request)
            word = request.messages[-1]["content"]
            if word in self.fail:
                yield Completion(key=request.key, error="500: down")
            else:
                yield Completion(key=request.key, text=f"answer to {word}", num_tokens=3)


class FakeFormat:
    hash = "format"

    def render(self, messages):
        return str(messages), (1, 2)


def prompts(*words):
    return {(word, 1, 1): ({"role": "user", "content": word},) for word in words}


def test_a_second_run_asks_only_what_is_missing(tmp_path):
    path = tmp_path / "generations.jsonl"
    first = FakeEngine()
    Writer(path, first, Decoding(), FakeFormat(), "m").answer(prompts("a", "b"))
    second = FakeEngine()
    rows = Writer(path, second, Decoding(), FakeFormat(), "m").answer(prompts("c", "a", "b"))
    rows = list(rows.values())
    assert [request.messages[-1]["content"] for request in second.asked] == ["c"]
    assert [row.text for row in rows] == ["answer to c", "answer to a", "answer to b"]
    assert {(row.finish_reason, row.num_tokens) for row in rows} == {("stop", 3)}
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("change", ["decoding", "seed", "weights"])
def test_another_decoding_seed_or_weights_are_other_answers(tmp_path, change):
    path = tmp_path / "generations.jsonl"
    Writer(path, FakeEngine(), Decoding(temperature=0.7), FakeFormat(), "m").answer(prompts("a"))
    engine = FakeEngine("others" if change == "weights" else "weights")
    decoding = {
        "decoding": Decoding(temperature=0.9),
        "seed": Decoding(temperature=0.7, seed=1),
        "weights": Decoding(temperature=0.7),
    }[change]
    Writer(path, engine, decoding, FakeFormat(), "m").answer(prompts("a"))
    assert len(engine.asked) == 1


def test_a_seed_changes_nothing_for_greedy_answers(tmp_path):
    Writer(tmp_path / "g.jsonl", FakeEngine(), Decoding(seed=1), FakeFormat(), "m").answer(
        prompts("a")
    )
    engine = FakeEngine()
    Writer(tmp_path / "g.jsonl", engine, Decoding(seed=2), FakeFormat(), "m").answer(prompts("a"))
    assert engine.asked == []


def test_answers_to_one_question_have_seeds_of_their_own_and_more_of_them_ask_only_the_new(
    tmp_path,
):
    def drawn(number):
        return {
            ("a", 1, draw): ({"role": "user", "content": "a"},) for draw in range(1, number + 1)
        }

    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    for engine, path, number in zip(engines, "mmn", (2, 4, 4), strict=True):
        path, decoding = tmp_path / path, Decoding(temperature=0.7)
        Writer(path, engine, decoding, FakeFormat(), "m").answer(drawn(number))
    seeds = [[request.seed for request in engine.asked] for engine in engines]
    assert [len(some) for some in seeds] == [2, 2, 4]
    assert seeds[0] + seeds[1] == seeds[2] and len(set(seeds[2])) == 4
    stored = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]
    assert [row["seed"] for row in stored] == seeds[2]
    assert [row.get("draw", 1) for row in stored] == [1, 2, 3, 4]


def test_the_same_weights_in_another_format_are_refused(tmp_path):
    Writer(tmp_path / "g.jsonl", FakeEngine(), Decoding(), FakeFormat(), "m").answer(prompts("a"))
    other = FakeFormat()
    other.hash = "another"
    with pytest.raises(RecipeError, match="another prompt format"):
        Writer(tmp_path / "g.jsonl", FakeEngine(), Decoding(), other, "m")


def test_a_torn_last_line_is_cut_and_asked_again(tmp_path):
    path = tmp_path / "g.jsonl"
    Writer(path, FakeEngine(), Decoding(), FakeFormat(), "m").answer(prompts("a", "b"))
    path.write_bytes(path.read_bytes()[:-20])
    engine = FakeEngine()
    Writer(path, engine, Decoding(), FakeFormat(), "m").answer(prompts("a", "b"))
    assert [request.messages[-1]["content"] for request in engine.asked] == ["b"]


def test_failed_requests_end_with_exit_code_6_and_keep_the_others(tmp_path):
    with pytest.raises(
        GenerationIncomplete, match="1 answers of m are missing: 500: down"
    ) as caught:
        Writer(tmp_path / "g.jsonl", FakeEngine(fail="b"), Decoding(), FakeFormat(), "m").answer(
            prompts("a", "b", "c")
        )
    assert caught.value.exit_code == 6
    assert len((tmp_path / "g.jsonl").read_text().splitlines()) == 2


def test_a_server_that_is_down_is_given_up_after_a_bounded_number_of_failures(tmp_path):
    words = [str(n) for n in range(100)]
    engine = FakeEngine(fail=words)
    with pytest.raises(GenerationIncomplete):
        Writer(tmp_path / "g.jsonl", engine, Decoding(), FakeFormat(), "m").answer(prompts(*words))
    assert len(engine.asked) == 20


def test_empty_cut_identical_and_looping_answers_are_counted():
    loop = "It is so. It is so. It is so. It i"
    faults = AnswerFaults.of(["same", "same", "same", "", "x", loop], 1, 0.4)
    assert (faults.n, faults.empty, faults.cut, faults.loops) == (6, 1, 1, 1)
    assert faults.identical.count == 3 and faults.identical.flagged
    assert not AnswerFaults.of(["same", "", "x"], 1, 0.5).identical.flagged
    assert AnswerFaults.of([], 0).identical.share == 0.0


def test_a_loop_is_a_phrase_of_two_words_three_times_at_the_end():
    assert ends_in_loop("First. " + "- and so on\n" * 3)
    assert ends_in_loop("a b " * 3) and not ends_in_loop("a b " * 2 + "a c")
    assert not ends_in_loop("1. one 2. two 3. three") and not ends_in_loop("so so so")
    assert not ends_in_loop("it is so " * 5 + "but then it ended well")  # it came out of it
