"""The plan of an evaluation, held to evaluations: how many answers and judgments they store, how
long their prompts are, and what they take of data that are not here.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.json_files import read_rows
from recipes_lib.core.project import project_root
from recipes_lib.data.preparation import prepare_data
from recipes_lib.eval_recipe import EvalRecipe, load_eval
from recipes_lib.evaluate import evaluate_all
from recipes_lib.generation import judges, transformers_engine
from recipes_lib.generation.transformers_engine import TransformersEngine
from recipes_lib.planning.lengths import lengths_of
from recipes_lib.suites import answering, eval_plan
from recipes_lib.suites.eval_plan import PROBE_JUDGMENTS, EvalPlan, Work, plan_eval

ROOT = project_root()
SMALL = ROOT / "evals/quickstart"
QUESTIONS = {
    "alpaca_eval": f"questions: {SMALL}/alpaca_eval/questions.json",
    "mt_bench": (
        f"questions: {SMALL}/mt_bench/question.jsonl\n"
        f"  references: {SMALL}/mt_bench/reference_answer.jsonl"
    ),
    "checks": f"questions: {SMALL}/house_style/prompts.jsonl",
}


@pytest.fixture
def small(judge_file: Any, tmp_path: Path) -> Any:
    """A function that loads a small eval recipe, judged by the tiny model."""
    judge_file()

    def make(suite: str, *overrides: str) -> EvalRecipe:
        judged = "judge: {file: judge.yaml}\nmetrics: {probe_pairs: 2}\n" * (suite != "checks")
        path = tmp_path / f"{suite}.yaml"
        path.write_text(
            f"suite: {{name: {suite}}}\ndata:\n  {QUESTIONS[suite]}\n  max_questions: 3\n"
            f"generation: {{max_new_tokens: 6}}\n{judged}"
        )
        return load_eval(path, overrides)

    return make


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of what the engine is asked, call by call."""
    seen: list[list[int]] = []
    complete = TransformersEngine.complete

    def spy(self: Any, requests: Any, decoding: Any) -> Any:
        requests = list(requests)
        seen.append([len(one.ids) for one in requests])
        return complete(self, requests, decoding)

    monkeypatch.setattr(TransformersEngine, "complete", spy)
    return seen


def part(plan: EvalPlan, what: str) -> Work:
    (found,) = (one for one in plan.parts if one.what == what)
    return found


def stored(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for file in sorted(run.rglob(name)) for row in read_rows(file)]


def test_alpaca_eval_stores_the_answers_and_judgments_that_the_plan_counts(
    small: Any, make_run: Any, prompts: list[list[int]]
) -> None:
    run = make_run("one", 1)
    words = ("generation.samples=2", "generation.temperature=0.9", "metrics.absolute=true")
    recipe = small("alpaca_eval", *words)
    plan = plan_eval(recipe, "one", "cpu")
    evaluate_all([recipe], ["one"])
    answers, judged = part(plan, "answers"), part(plan, "judgments")
    assert (
        (plan.questions, answers.requests) == (3, len(stored(run, "generations.jsonl"))) == (3, 6)
    )
    kinds = Counter(
        "probe" if row["meta"].get("probe") else row["kind"]
        for row in stored(run, "judgments*.jsonl")
    )
    assert kinds == {"relative": 12, "absolute": 6, "probe": 2 * PROBE_JUDGMENTS}
    assert judged.requests == kinds.total()
    assert "12 in both orders, 24 probes" in judged.details and "6 graded" in judged.details
    # the format is written out, so that prompts are counted to the token
    assert (answers.read.low, answers.read.high) == (sum(prompts[0]), sum(prompts[0]))
    assert answers.written.high == 6 * 6


def test_mt_bench_against_a_base_stores_the_turns_and_judgments_that_the_plan_counts(
    small: Any, make_run: Any, runs_folder: Path
) -> None:
    run = make_run("one", 1)
    recipe = small("mt_bench")
    plan, alone = plan_eval(recipe, "one", "cpu", "base"), plan_eval(recipe, "one", "cpu")
    evaluate_all([recipe], ["one"], "base")
    mine, base = (one for one in plan.parts if one.what == "answers")
    (of_base,) = runs_folder.glob("base--*")
    assert mine.requests == len(stored(run, "generations.jsonl")) == 6
    assert base.requests == len(stored(of_base, "generations.jsonl")) == 6
    assert base.loading == 0 < mine.loading
    rows = stored(run, "judgments*.jsonl")
    kinds = Counter("probe" if one["meta"].get("probe") else one["kind"] for one in rows)
    assert kinds == {"absolute": 6, "relative": 12, "probe": 2 * PROBE_JUDGMENTS}
    assert part(plan, "judgments").requests == kinds.total()
    assert part(alone, "judgments").requests == kinds["absolute"]
    no_pairs = plan_eval(small("mt_bench", "metrics.pairwise=false"), "one", "cpu", "base")
    assert part(no_pairs, "judgments").requests == 6 + 2 * PROBE_JUDGMENTS


def test_the_engine_takes_the_batches_that_the_plan_says(
    small: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("one", 1)
    recipe, taken = small("checks", "data.max_questions=20"), []
    generate = TransformersEngine._generate

    def spy(self: Any, batch: Any, decoding: Any) -> Any:
        taken.append((self.batch_tokens, len(batch)))
        return generate(self, batch, decoding)

    monkeypatch.setattr(TransformersEngine, "_generate", spy)
    (first,) = plan_eval(recipe, "one", "cpu").parts
    assert first.memory is not None
    card_gib = 0.8 + first.memory.weights  # nothing is free beside Python and the weights
    monkeypatch.setattr("recipes_lib.planning.cards.available_gib", lambda: card_gib)
    monkeypatch.setattr(transformers_engine, "available_gib", lambda: 0.0)
    plan = plan_eval(recipe, "one", "cpu")
    evaluate_all([recipe], ["one"])
    (answers,) = plan.parts
    assert answers.batches is not None and answers.memory is not None
    assert {tokens for tokens, _ in taken} == {answers.batch_tokens}
    assert (answers.batches.high, answers.rows) == (len(taken), max(rows for _, rows in taken))
    assert len(taken) > 1


def test_a_batch_that_the_recipe_names_is_the_plans(small: Any, make_run: Any) -> None:
    make_run("one", 1)
    words = ("generation.batch_tokens=60",)
    (answers,) = plan_eval(small("checks", *words), "one", "h100").parts
    assert answers.batch_tokens == 60 and answers.batches is not None and answers.batches.low == 3


def test_answers_of_the_references_length_are_the_least_and_max_new_tokens_the_most(
    small: Any, make_run: Any, tiny_tokenizer: Any
) -> None:
    make_run("one", 1)
    recipe = small("alpaca_eval", "generation.max_new_tokens=200")
    plan = plan_eval(recipe, "one", "h100")
    answers, judged = part(plan, "answers"), part(plan, "judgments")
    rows = json.loads((SMALL / "alpaca_eval/questions.json").read_text())[:3]
    given = [len(tiny_tokenizer(row["output"]).input_ids) for row in rows]
    assert (answers.written.low, answers.written.high) == (sum(given), 600)
    assert answers.writing is not None and answers.step is not None and answers.kernels is not None
    # one batch: as many steps as its longest answer has tokens
    assert answers.writing.high == pytest.approx(200 * answers.step.high, rel=0.02)
    assert answers.writing.low == pytest.approx(max(given) * answers.step.low, rel=0.02)
    assert judged.read.low < judged.read.high and judged.written.high == 0  # it reads verdicts
    written = plan_eval(
        small("alpaca_eval", "judge.mode=generate", "judge.max_new_tokens=9"), "one", "h100"
    )
    assert part(written, "judgments").written.high == 9 * (6 + 2 * PROBE_JUDGMENTS)


def test_a_judges_prompts_are_as_long_as_those_it_is_asked(
    small: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's answers are made the references with a word more, as the plan's least has it."""
    make_run("one", 1)
    recipe = small("alpaca_eval", "generation.max_new_tokens=300", "metrics.probe_pairs=0")
    planned = part(plan_eval(recipe, "one", "cpu"), "judgments").read.low
    real: list[int] = []
    read, answer = judges._LocalJudge._read, answering.answer_questions

    def spy(self: Any, asked: Any, allowed: Any) -> Any:
        real.extend(len(one.ids) for one in asked)
        return read(self, asked, allowed)

    def longer(recipe: Any, subject: Any, questions: Any, *rest: Any) -> Any:
        found, given = answer(recipe, subject, questions, *rest), dict(recipe_references(questions))
        for key, row in found.rows.items():
            found.rows[key] = replace(row, text=f"{given[key[0]]} so")
        return found

    monkeypatch.setattr("recipes_lib.suites.judged.answer_questions", longer)
    monkeypatch.setattr(judges._LocalJudge, "_read", spy)
    evaluate_all([recipe], ["one"])
    assert len(real) == 6
    assert planned == pytest.approx(sum(real), rel=0.05)


def recipe_references(questions: Any) -> list[tuple[str, str]]:
    return [(one.id, one.reference[0]) for one in questions]


# ---- Who answers ----


def test_a_recipe_is_planned_as_the_run_it_will_be(
    small: Any, make_run: Any, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, runs_folder: Path
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(runs_folder))
    make_run("one", 1, dtype="float32")
    recipe = small("checks")
    run, untrained = (plan_eval(recipe, word, "h100") for word in ("one", str(tiny_recipe)))
    assert (run.to_train, untrained.to_train) == (False, True)
    first, second = run.parts[0], untrained.parts[0]
    assert (first.requests, first.read) == (second.requests, second.read)
    # it is trained without half precision, which the run's recipe leaves on
    assert first.kernels is not None and second.kernels is not None
    assert first.kernels - second.kernels == (51 - 39) * 2 + (56 - 54) + (7 - 4) * 4


def test_what_cannot_be_planned_is_one_line(
    small: Any, make_run: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small("alpaca_eval")
    for word, said in (("nowhere", "no run named 'nowhere'"), ("./nowhere", "no run named")):
        with pytest.raises(RecipeError, match=said):
            plan_eval(recipe, word, "h100")
    with pytest.raises(EnvironmentFault, match="no plan: 'nobody/nothing'") as fault:
        plan_eval(recipe, "nobody/nothing", "h100")
    assert str(fault.value).startswith("command line: ")
    with pytest.raises(EnvironmentFault, match="no plan: 'a/judge'") as fault:
        plan_eval(small("alpaca_eval", "judge.model=a/judge"), str(tiny_recipe), "h100")
    assert "judge.yaml" in str(fault.value)
    with pytest.raises(RecipeError, match="there is no card 'h10'"):
        plan_eval(recipe, str(tiny_recipe), "h10")
    with pytest.raises(RecipeError, match="has no reference opponent"):
        plan_eval(small("mt_bench"), str(tiny_recipe), "h100", "reference")
    with pytest.raises(RecipeError, match="--against has no meaning for checks"):
        plan_eval(small("checks"), str(tiny_recipe), "h100", "base")
    with pytest.raises(RecipeError, match="has no base of its own"):
        plan_eval(recipe, "meta-llama/Llama-2-7b-hf", "h100", "base")
    with pytest.raises(RecipeError, match=r"no prompt of the answers fits the 512 tokens"):
        (tmp_path / "long.jsonl").write_text(
            json.dumps({"prompt": "word " * 2000, "check": "contains", "expected": "x"}) + "\n"
        )
        plan_eval(small("checks", f"data.questions={tmp_path}/long.jsonl"), str(tiny_recipe), "cpu")


def test_a_server_has_no_time_and_its_model_may_be_unknown_here(small: Any) -> None:
    words = ("generation.engine=openai", "generation.base_url=http://127.0.0.1:1/v1")
    plan = plan_eval(small("checks", *words, "generation.concurrency=7"), "my-model", "h100")
    (answers,) = plan.parts
    assert (answers.requests, answers.at_once, answers.seconds) == (3, 7, None)
    assert plan.unknown == ("answers (a server)",) and plan.fits
    assert plan.seconds.high == 0


# ---- Questions that are not here ----


def without_the_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_published_suites_are_planned_where_their_questions_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_the_questions(monkeypatch, tmp_path)
    alpaca = plan_eval(
        load_eval(ROOT / "evals/alpaca_eval.yaml"), "llama2-7b-dolly/qlora-r32", "h100"
    )
    assert (alpaca.questions, part(alpaca, "answers").requests) == (805, 805)
    assert part(alpaca, "judgments").requests == 805 * 2 + 25 * PROBE_JUDGMENTS
    assert part(alpaca, "judgments").at_once == 256
    assert "are not here" in alpaca.lengths
    bench = plan_eval(load_eval(ROOT / "evals/mt_bench.yaml"), "llama2-7b-dolly/qlora-r32", "h100")
    assert (bench.questions, part(bench, "answers").requests) == (80, 160)
    assert part(bench, "judgments").requests == 160
    assert "of 30 questions" in bench.notes[0]
    few = load_eval(ROOT / "evals/alpaca_eval.yaml", ["data.max_questions=10"])
    assert plan_eval(few, "llama2-7b-dolly/qlora-r32", "h100").questions == 10


def test_other_questions_that_are_not_here_are_not_guessed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_the_questions(monkeypatch, tmp_path)
    (tmp_path / "odd.yaml").write_text(
        "suite: {name: checks}\ndata: {questions: 'owner/name:rows.jsonl'}\n"
    )
    with pytest.raises(EnvironmentFault, match="a plan fetches nothing"):
        plan_eval(load_eval(tmp_path / "odd.yaml"), "llama2-7b-dolly/qlora-r32", "h100")


def test_the_lengths_of_alpaca_eval_are_those_of_its_questions(shared_data: Path) -> None:
    file = shared_data / "alpaca_eval/alpaca_eval_reference_text_davinci_003.json"
    if not file.is_file():
        pytest.skip("AlpacaEval's questions are not here")
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert len(rows) == 805
    for name, key in (("_INSTRUCTIONS", "instruction"), ("_OUTPUTS", "output")):
        sizes = sorted(len(row[key]) for row in rows)
        twentieths = [sizes[round(place * 804 / 20)] for place in range(21)]
        assert [int(word) for word in getattr(eval_plan, name).split()] == twentieths
        spread = eval_plan._spread(getattr(eval_plan, name), 805)
        assert sum(spread) == pytest.approx(sum(sizes), rel=0.12)


# ---- Suites that ask nothing of their own ----


def test_held_out_rows_are_those_of_the_split_and_their_passes_those_of_the_suite(
    tiny_recipe: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    split = "  split: {validation: 0.1, test: 0.2}\n"
    text = tiny_recipe.read_text().replace("data: {source: ", "data:\n  source: ")
    text = text.replace(", prompt_format: dolly}", f"\n  prompt_format: dolly\n{split}")
    tiny_recipe.write_text(text)
    recipe = load_recipe(tiny_recipe)
    prepared = prepare_data(recipe, tiny_tokenizer)
    lengths = lengths_of(recipe, 512)
    assert (lengths.test, lengths.validation) == (len(prepared.test), len(prepared.validation))
    for name, rows in (("test", prepared.test), ("validation", prepared.validation)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"suite: {{name: heldout_loss}}\ndata: {{questions: {name}}}\n")
        plan = plan_eval(load_eval(path), str(tiny_recipe), "cpu")
        (work,) = plan.parts
        real = sum(len(ids) for ids in rows["input_ids"])
        assert (plan.questions, work.requests) == (len(rows), len(rows))
        assert work.read.low == pytest.approx(real, rel=0.15)
        assert work.memory is not None and work.batches is not None and work.batches.low > 1
        few = plan_eval(load_eval(path, ["data.max_questions=2"]), str(tiny_recipe), "cpu")
        assert few.questions == 2


def test_a_loss_without_rows_or_weights_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "loss.yaml"
    path.write_text("suite: {name: heldout_loss}\ndata: {questions: test}\n")
    recipe = load_eval(path)
    with pytest.raises(RecipeError, match="holds no test rows out"):
        plan_eval(recipe, str(tiny_recipe), "cpu")
    with pytest.raises(RecipeError, match="has no recipe, so no test split"):
        plan_eval(recipe, "meta-llama/Llama-2-7b-hf", "h100")
    words = ["generation.engine=openai", "generation.base_url=http://127.0.0.1:1/v1"]
    with pytest.raises(RecipeError, match="needs the weights in this process"):
        plan_eval(load_eval(path, words), str(tiny_recipe), "h100")


def test_the_logits_of_a_loss_are_in_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "loss.yaml"
    rows = ROOT / "recipes/quickstart/data/instructions.jsonl"
    path.write_text(f"suite: {{name: heldout_loss}}\ndata: {{questions: {rows}}}\n")
    words = "llama2-7b-dolly/lora-bf16-r32"
    (work,) = plan_eval(load_eval(path), words, "h100").parts
    assert work.memory is not None and work.requests == 328
    # logits, their copy in float32 and their logarithms, of at most 16,384 tokens
    assert 0.8 < work.memory.logits * 2**30 / (16384 * 32000 * 10) <= 1
    assert work.memory.kept == 0


def test_lm_eval_has_the_requests_that_are_known_and_says_which_are_not(tmp_path: Path) -> None:
    model = "llama2-7b-dolly/lora-bf16-r32"
    (known,) = plan_eval(load_eval(ROOT / "evals/lm_eval.yaml"), model, "h100").parts
    assert known.requests == 4 * (14042 + 1172 + 2376) + 1319 + 7 * 817
    assert known.reading is not None and known.reading.low > 60
    assert known.unknown == ("what gsm8k writes (lm-eval chooses its batches)",)
    path = tmp_path / "some.yaml"
    path.write_text("suite: {name: lm_eval, tasks: [arc_easy, lambada_openai], limit: 10}\n")
    some = plan_eval(load_eval(path), model, "h100")
    assert some.parts[0].requests is None and some.questions is None
    assert some.unknown == ("lambada_openai (its requests are not known without its data)",)
    path.write_text("suite: {name: lm_eval, tasks: [arc_easy, ifeval], limit: 0.5}\n")
    assert plan_eval(load_eval(path), model, "h100").parts[0].requests == 4 * 1188 + 270


def test_a_model_that_does_not_fit_has_no_time() -> None:
    recipe = load_eval(ROOT / "evals/alpaca_eval.yaml")
    plan = plan_eval(recipe, "meta-llama/Llama-3.1-70B", "h100")
    assert not plan.fits and part(plan, "answers").seconds is None
    assert plan.unknown == ("answers (they do not fit)", "judgments (a server)")
