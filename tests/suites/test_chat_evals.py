"""The evals for chat models run offline on small local copies of their data, with the adapter's
chat template, and ask what their headers say.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tests.results import results_of

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.eval_recipe import load_eval
from recipes_lib.evaluate import evaluate_all
from recipes_lib.suites.harness import load_tasks

PROJECT = Path(__file__).resolve().parents[2]
SHORT = ["suite.limit=2", "suite.batch_size=2", "suite.gen_kwargs={max_gen_toks: 4}"]


@pytest.fixture(scope="module", autouse=True)
def one_index() -> Iterator[None]:
    """lm-eval's own tasks are indexed once, not for each test: ten seconds."""
    import lm_eval.tasks

    found = functools.cache(lm_eval.tasks.TaskManager)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", found)
        yield


@pytest.fixture(autouse=True)
def no_other_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets kept of sets of these names, from the Hub or another folder, is not found."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def hub_copy(folder: Path, name: str, config: str, rows: dict[str, list[dict]]) -> None:
    """Write a data set as it lies on the Hub: a file per split, and a README that names them."""
    here = folder / name
    here.mkdir(parents=True)
    files = ""
    for split, of_split in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in of_split)
        (here / f"{split}.jsonl").write_text(text)
        files += f"      - {{split: {split}, path: {split}.jsonl}}\n"
    head = f"configs:\n  - config_name: {config}\n    data_files:\n{files}"
    (here / "README.md").write_text(f"---\n{head}---\n")


def asked(name: str, folder: Path, *words: str) -> tuple[dict, list[dict]]:
    """Evaluate the run `one`; return the result and lm-eval's samples of its first task."""
    recipe = load_eval(PROJECT / f"evals/{name}.yaml", [*SHORT, f"data.folder={folder}", *words])
    (result,) = results_of([recipe], ["one"])
    files = sorted(Path("runs/one/evals").glob(f"{recipe.name}*/samples/*.jsonl"))
    return result, [json.loads(line) for line in files[0].read_text().splitlines()]


@pytest.fixture
def gsm8k(tmp_path: Path, make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_run("one", 1)
    monkeypatch.chdir(tmp_path)
    row = {"question": "Two and 2,000?", "answer": "2 + 2000 = 2002\n#### 2,002"}
    hub_copy(tmp_path / "hub", "openai/gsm8k", "main", {"train": [row] * 3, "test": [row] * 3})
    return tmp_path / "hub"


@pytest.mark.slow
def test_gsm8k_as_a_chat_shows_eight_examples_as_turns_of_the_template(gsm8k):
    result, samples = asked("gsm8k_chat", gsm8k)
    assert {row["num_fewshot"] for row in result["tasks"]} == {8}
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("<|user|>") == 9 and prompt.count("<|assistant|>") == 9
    assert prompt.count("The final answer is") > 8 and "Two and 2,000?" in prompt


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("So 2002.\nThe answer is: 2002", "2002"),
        ("The answer is 3. No: the final answer is wrong. The final answer is $2,002.", "2,002"),
        ("2002 #### 2002.50", "2002.5"),
        ("2002", "[invalid]"),
    ],
)
def test_the_metamath_form_reads_the_answer_as_pefts_comparison_does(said, found):
    from lm_eval.api.instance import Instance
    from lm_eval.filters import build_filter_ensemble

    task = yaml.safe_load((PROJECT / "evals/lm_eval/gsm8k_metamath.yaml").read_text())
    (chain,) = task["filter_list"]
    parts = [(part.pop("function"), part) for part in chain["filter"]]
    instance = Instance("generate_until", {}, ("", {}), 0)
    instance.resps = [said]
    build_filter_ensemble(chain["name"], parts).apply([instance])
    assert instance.filtered_resps[chain["name"]] == found


def test_the_metamath_eval_asks_in_the_words_that_its_recipes_train(gsm8k):
    _, samples = asked("gsm8k_metamath", gsm8k)
    prompt = samples[0]["arguments"][0][0]
    assert prompt == "Question: Two and 2,000? Think step by step.\nAnswer:"
    assert samples[0]["target"] == "2,002"


@pytest.mark.slow
def test_mmlu_pro_runs_on_a_local_copy_with_all_subjects(tmp_path, make_run, monkeypatch):
    make_run("one", 1)
    monkeypatch.chdir(tmp_path)
    names = "biology business chemistry economics engineering health history law math other"
    subjects = [*names.split(), "philosophy", "physics", "psychology", "computer science"]
    rows = [
        {
            "question": f"Pick {subject}",
            "options": ["one", "two"],
            "answer": "A",
            "answer_index": 0,
            "cot_content": "A: Let's think step by step. The answer is (A).",
            "category": subject,
        }
        for subject in subjects
    ]
    hub_copy(tmp_path / "hub", "TIGER-Lab/MMLU-Pro", "default", {"validation": rows, "test": rows})
    result, samples = asked("mmlu_pro", tmp_path / "hub", "suite.num_fewshot=1")
    whole = next(row for row in result["tasks"] if row["task"] == "mmlu_pro")
    assert len(whole["parts"]) == 14 and len(result["tasks"]) == 15
    assert "<|user|>" in samples[0]["arguments"][0][0]


@pytest.fixture
def chat_evals() -> None:
    """The packages of the extra chat-evals; continuous integration has them (`make setup`)."""
    missing = [name for name in ("langdetect", "math_verify", "antlr4") if not find_spec(name)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"{', '.join(missing)} missing: pip install -e '.[chat-evals]'")


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nltk's folder with a punkt_tab that knows no abbreviations; nothing is fetched."""
    import nltk

    english = tmp_path / "nltk_data/tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    files = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")
    for name in files:
        (english / name).write_text("")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk_data")])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    return english.parent


@pytest.fixture
def ifeval(tmp_path: Path, make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of IFEval with the instructions that need sentences, words and languages."""
    make_run("one", 1)
    monkeypatch.chdir(tmp_path)
    none = dict.fromkeys(("relation", "num_sentences", "capital_relation", "capital_frequency"))
    asked = {
        "length_constraints:number_sentences": {"relation": "at least", "num_sentences": 1},
        "change_case:capital_word_frequency": {
            "capital_relation": "at least",
            "capital_frequency": 200,
        },
        "language:response_language": {"language": "kn"},
    }
    rows = [
        {
            "key": 1,
            "prompt": "Write no comma.",
            "instruction_id_list": ["punctuation:no_comma", *asked],
            "kwargs": [none, *({**none, **words} for words in asked.values())],
        }
    ]
    hub_copy(tmp_path / "hub", "google/IFEval", "default", {"train": rows * 2})
    return tmp_path / "hub"


@pytest.mark.slow
def test_ifeval_checks_each_instruction_of_a_local_copy(chat_evals, punkt, ifeval):
    result, samples = asked("ifeval", ifeval)
    assert {row["n"] for row in result["tasks"]} == {2} and len(result["tasks"]) == 4
    assert samples[0]["arguments"][0][0].endswith("Write no comma.</s>\n<|assistant|>\n")
    said = samples[0]["filtered_resps"][0]
    sentence = bool(said.strip())
    followed = [sentence and "," not in said, sentence, False, False]
    assert samples[0]["inst_level_strict_acc"] == followed
    assert samples[0]["prompt_level_strict_acc"] is False

    with pytest.raises(RecipeError, match="1280") as caught:  # more than the model's context
        evaluate_all([load_eval(PROJECT / "evals/ifeval.yaml", [f"data.folder={ifeval}"])], ["one"])
    assert "max_gen_toks" in caught.value.hints[0]


def test_without_its_tables_of_sentences_ifeval_is_refused_before_a_model_is_loaded(punkt, ifeval):
    shutil.rmtree(punkt)
    for ask in (lambda recipe: evaluate_all([recipe], ["one"]), load_tasks):
        with pytest.raises(EnvironmentFault, match="punkt_tab, which is not on this") as caught:
            ask(load_eval(PROJECT / "evals/ifeval.yaml", [f"data.folder={ifeval}"]))
        assert "python -m nltk.downloader punkt_tab" in caught.value.hints[0]


@pytest.mark.slow
def test_math_shows_four_examples_as_turns_and_compares_answers_as_mathematics(
    chat_evals, tmp_path, make_run, monkeypatch
):
    make_run("one", 1)
    monkeypatch.chdir(tmp_path)
    row = {"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "level": 1}
    hub_copy(tmp_path / "hub", "HuggingFaceH4/MATH-500", "default", {"test": [row] * 3})
    result, samples = asked("math", tmp_path / "hub")
    assert {row["metric"] for row in result["tasks"]} == {"exact_match", "math_verify"}
    assert {(row["n"], row["num_fewshot"]) for row in result["tasks"]} == {(2, 4)}
    assert samples[0]["arguments"][0][0].count("<|user|>") == 5

    from lm_eval.tasks.minerva_math.utils import process_results

    right = "Final Answer: The final answer is $\\frac{4}{2}$. I hope it is correct."
    assert process_results(samples[0]["doc"], [right])["math_verify"] == 1
    assert process_results(samples[0]["doc"], [right.replace("4", "6")])["math_verify"] == 0


@pytest.mark.slow
def test_an_eval_whose_package_is_not_here_says_which_and_how_to_get_it(ifeval, punkt, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    recipe = load_eval(PROJECT / "evals/ifeval.yaml", [f"data.folder={ifeval}"])
    with pytest.raises(EnvironmentFault, match=r"ifeval: .*langdetect") as caught:
        load_tasks(recipe)
    assert "pip install -c constraints.txt -e '.[chat-evals]'" in caught.value.hints[0]
