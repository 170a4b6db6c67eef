"""AlpacaEval style from answers to a result; alpaca_eval's own functions read the files that stand
beside it, and give its number.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.evals.audit import HUMAN
from recipes_lib.evals.recipe import load_eval
from recipes_lib.evals.run import evaluate

QUESTIONS = Path(__file__).resolve().parents[2] / "evals/quickstart/alpaca_eval/questions.json"
WIN_RATE = """
import json, sys
from alpaca_eval.metrics.winrate import get_winrate
rate = get_winrate(json.load(open(sys.argv[1])))
print(json.dumps({name: float(rate[name]) for name in ("win_rate", "n_total", "n_draws")}))
"""


class UndecidedServer(FaultyServer):
    """A judge of every opinion, and sometimes of none."""

    opinions = itertools.cycle(["[RESULT] A", "[RESULT] B", "[RESULT] B", "[RESULT] A", "Both."])
    answer = property(lambda self: next(self.opinions), lambda self, value: None)


@pytest.mark.slow
def test_alpaca_evals_win_rate_of_our_annotations_is_ours(judge_file, runs_folder, tmp_path):
    if importlib.util.find_spec("alpaca_eval") is None:
        pytest.skip("alpaca-eval is not installed")
    questions = json.loads(QUESTIONS.read_text())
    answers = [{"instruction": row["instruction"], "output": "Yes."} for row in questions]
    answers[0]["output"] = questions[0]["output"]  # identical answers tie
    answers[1]["output"] = ""  # an empty answer loses
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    path = tmp_path / "support.yaml"
    path.write_text(
        f"extends: judge.yaml\nsuite: {{name: alpaca_eval}}\ndata: {{questions: {QUESTIONS}}}\n"
        "metrics: {probe_pairs: 0}\njudge: {concurrency: 1}\n"
    )
    with UndecidedServer() as server:
        judge_file(model=MODEL, engine="openai", base_url=server.url, mode="generate")
        (log,) = evaluate([load_eval(path)], [str(tmp_path / "answers.json")])
    (metric,) = log.metrics
    outcomes = [sample.outcome for sample in metric.samples]
    assert {*outcomes} == {"win", "loss", "tie", "unresolved"}
    (file,) = log.file.parent.glob("samples/annotations.json")
    command = [sys.executable, "-W", "ignore", "-c", WIN_RATE, str(file)]
    rate = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert rate["win_rate"] / 100 == pytest.approx(metric.value)
    assert rate["n_total"] == metric.n < len(questions)
    assert rate["n_draws"] == outcomes.count("tie")


def finds_the_good_one(server: FaultyServer) -> str:
    """The verdict on the last request: for the good answer wherever it stands."""
    prompt = server.bodies[-1]["messages"][-1]["content"]
    first, second = prompt.partition("###Response A:")[2].split("###Response B:")
    return f"[RESULT] {'A' if first.count('good') > second.count('good') else 'B'}"


class SoundServer(FaultyServer):
    answer = property(finds_the_good_one, lambda self, value: None)


def test_a_sound_judge_passes_its_probes_with_every_model(judge_file, runs_folder, tmp_path):
    """Probes are made of the pairs of the first model; verdicts on them say nothing about pairs of
    the second one with the same ids.
    """
    questions = [{"instruction": f"Question {n}?", "output": f"A good one, {n}."} for n in range(8)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    for name, text in (("better", "A good, good one."), ("worse", "A poor one.")):
        rows = [{**row, "output": text, "generator": name} for row in questions]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    # people's labels of the first model's pairs, with the answers exchanged
    label = {"opponent_answer": "A good, good one.", "label": "loss"}
    labels = [{"instruction": row["instruction"], "answer": row["output"]} for row in questions]
    lines = [json.dumps(row | label) + "\n" for row in labels]
    (tmp_path / "labels.jsonl").write_text("".join(lines))
    path = tmp_path / "support.yaml"
    path.write_text(
        "extends: judge.yaml\nsuite: {name: alpaca_eval}\njudge: {concurrency: 1}\n"
        "data: {questions: questions.json, labels: labels.jsonl}\n"
    )
    with SoundServer() as server:
        judge_file(model=MODEL, engine="openai", base_url=server.url, mode="generate")
        words = [str(tmp_path / f"{name}.json") for name in ("better", "worse")]
        better, worse = evaluate([load_eval(path)], words)
    assert [log.metrics[0].value for log in (better, worse)] == [1.0, 0.0]
    for log in (better, worse):
        assert log.audit is not None and not log.audit.failed, log.target
        assert [check.check for check in log.audit.not_measured] == [HUMAN] * (log is worse)
