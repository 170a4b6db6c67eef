"""Run folders as trainings and evaluations leave them, made up: nothing was trained or judged."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.readers import read_results
from recipes_lib.analysis.runs import Run, arms_of
from recipes_lib.core.files import write_json
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.log import (
    REFERENCE,
    AnswerFacts,
    Check,
    EvalLog,
    JudgeFacts,
    Metric,
    Sample,
    Scorecard,
    log_file,
    write_lines,
    write_log,
)

JUDGE = JudgeFacts(
    name="prometheus-7b-v2", fingerprint="f" * 64, model="prometheus-eval/prometheus-7b-v2.0"
)
CARD = Scorecard(
    judge="f" * 64,
    checks=(
        Check(check="swap consistency", value=0.9, n=100, needs="at least 0.6", result="pass"),
        Check(check="agreement with labels", needs="at least 0.6"),
    ),
)
OUTCOMES = {1.0: ("win", ("A", "B")), 0.5: ("tie", ("A", "A")), 0.0: ("loss", ("B", "A"))}
CATEGORIES = ("open_qa", "closed_qa", "summarization")
Text = Callable[[str, str], str]


def plain_text(who: str, question: str) -> str:
    """An answer of ordinary length."""
    letters = random.Random(who + question).choices("abcdefghijklmnopqrstuvwxyz     ", k=70)
    return f"{who} answers question {question} as follows: {''.join(letters)}."


def write_run(root, name, *, seed=42, rank=8, steps=40, **resolved) -> Path:
    """Write a trained run without evaluations, and return its folder."""
    folder = root / name
    rng = random.Random(f"{name}{seed}")
    summary = {"steps": steps, "training_rows": 1200, "seconds": 310.5, "world_size": 1}
    summary |= {"last_training_loss": 1.2, "last_validation_loss": 1.3}
    summary |= {"tokens_per_second": 1288.3, "peak_memory_gib": 11.2}
    guard = {"data_fingerprint": "d" * 64, "prompt_format_hash": "p" * 64}
    RunDirectory(name, root).write_state("finished", guard=guard, summary=summary)
    environment = {
        "libraries": {"torch": "2.13.0", "trl": "1.16.0"},
        "git": {"commit": "c" * 40, "dirty": False},
        "devices": ["NVIDIA H100 80GB HBM3, 79 GiB"],
    }
    write_json(folder / "environment.json", environment)
    model = {"name_or_path": "some/model", "dtype": "bfloat16"}
    values = {"model": model, "lora": {"r": rank}, "train": {"seed": seed}}
    write_json(folder / "resolved.yaml", values | resolved)
    command = f"recipes train recipes/some/r{rank}.yaml run.name={name}\n"
    (folder / "command.txt").write_text(command)
    losses = [2.1 - 0.9 * step / steps + rng.gauss(0, 0.03) for step in range(1, steps + 1)]
    lines = [{"step": n, "loss": loss, "learning_rate": 1e-4} for n, loss in enumerate(losses, 1)]
    write_lines(folder / "metrics.jsonl", [*lines, {"step": steps, "eval_loss": 1.3}])
    return folder


def write_judged(
    folder: Path,
    n: int,
    *,
    against: str = REFERENCE,
    skill: float = 0.5,
    flips: float = 0.1,
    text: Text = plain_text,
    values: Sequence[float] | None = None,
    name: str = "alpaca_eval",
    **facts: Any,
) -> Path:
    """Write a comparison of answers, each won by chance `skill` or with the outcomes `values`."""
    rng = random.Random(f"{folder.name}{against}{n}{name}")
    drawn = [0.5 if rng.random() < flips else float(rng.random() < skill) for _ in range(n)]
    samples = []
    for number, value in enumerate(values or drawn):
        outcome, verdicts = OUTCOMES[value]
        question = f"q{number:05d}"
        answer, other = text(folder.name, question), text(against, question)
        raws = tuple(f"{word} is better. [RESULT] {word}" for word in verdicts)
        about = {"input": f"What about {question}?", "category": CATEGORIES[number % 3]}
        texts = {"answer": answer, "opponent": other, "raws": raws, **about}
        texts |= {"outcome": outcome, "verdicts": verdicts}
        samples.append(Sample(question, value=value, **texts))
    metric = Metric("win_rate", "AlpacaEval win rate", tuple(samples), opponent=against)
    facts = {"judge": JUDGE, "audit": CARD, "against": against} | facts
    return write_eval(folder, name, "alpaca_eval", [metric], **facts)


def write_values(
    folder: Path,
    values: Sequence[float | None],
    *,
    name: str = "checks",
    suite: str = "checks",
    metric: str = "pass_rate",
    unit: Any = "share",
    higher: bool | None = True,
    about: Sequence[dict[str, str]] | None = None,
    **facts: Any,
) -> Path:
    """Write one metric with these values, a question for each."""
    samples = [
        Sample(
            id=f"q{number:05d}",
            value=value,
            outcome="unresolved" if value is None else "scored",
            **{"input": f"Question {number}?"} | (about[number] if about else {}),
        )
        for number, value in enumerate(values)
    ]
    label = metric.replace("_", " ")
    made = Metric(metric, label, tuple(samples), unit=unit, higher_is_better=higher)
    return write_eval(folder, name, suite, [made], **facts)


def write_eval(folder, name, suite, metrics, **facts) -> Path:
    """Write an evaluation of these metrics, and return its result file."""
    whole = []
    for metric in metrics:
        values = [each.value for each in metric.samples if each.value is not None]
        mean = sum(values) / len(values) if values else metric.value
        whole.append(replace(metric, value=mean, n=len(values)))
    fingerprint = f"weights of {folder.name}"
    known: dict[str, Any] = {
        "answers": AnswerFacts(name=folder.name, models=("some/model",), fingerprint=fingerprint),
        "recipe": {"suite": {"name": suite}},
        "command": f"recipes eval evals/{name}.yaml {folder.name}",
        "file": log_file(folder, name, facts.get("against")),
    }
    log = EvalLog(suite=suite, eval=name, target=folder.name, metrics=tuple(whole), **known | facts)
    write_log(log)
    return log.file


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    value = json.loads(file.read_text())
    how(value)
    file.write_text(json.dumps(value))


def change_lines(file: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change every line of a JSON-lines file."""
    rows = [how(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_one(path: Path) -> Run:
    """Return the one run of a file or folder."""
    (run,) = read_results(path) or ()
    return run


def compared(*paths: Path) -> Conclusion:
    """Compare files or folders of other programs."""
    runs = [run for path in paths for run in read_results(path) or ()]
    assert len(runs) >= len(paths)
    return conclude(arms_of(runs))
