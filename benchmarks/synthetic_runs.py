"""Run folders as an evaluation leaves them, made up: for the report's benchmark and tests. Nothing
here was trained or judged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.eval_log import Measure, Sample
from recipes_lib.judging.audit import audit
from recipes_lib.judging.outcomes import grade_sample, pair_sample, pair_samples, summarise
from recipes_lib.judging.store import text_hash
from recipes_lib.statistics.intervals import mean_interval
from recipes_lib.suites import mt_bench as suite
from recipes_lib.suites.questions import Question

CATEGORIES = (
    "open_qa",
    "closed_qa",
    "summarization",
    "classification",
    "brainstorming",
    "creative_writing",
)
JUDGE = {
    "name": "prometheus-7b-v2",
    "fingerprint": "f" * 64,
    "model": "prometheus-eval/prometheus-7b-v2.0",
    "mode": "text",
    "weak": None,
}
Text = Callable[[str, str], str]


def plain_text(who: str, question: str) -> str:
    """An answer of ordinary length."""
    return (
        f"{who} answers question {question}. "
        + "It explains the point in a few plain sentences and gives an example. " * 5
    )


def write_run(root: Path, name: str, *, seed: int = 42, rank: int = 8, steps: int = 40) -> Path:
    """Write a trained run without evaluations, and return its folder."""
    folder = root / name
    rng = random.Random(f"{name}{seed}")
    summary = {
        "steps": steps,
        "training_rows": 1200,
        "first_training_loss": 2.1,
        "last_training_loss": 1.2,
        "first_validation_loss": 1.9,
        "last_validation_loss": 1.3 - rank / 1000,
        "tokens": 400_000,
        "seconds": 310.5,
        "tokens_per_second": 1288.3,
        "peak_memory_gib": 11.2 + rank / 100,
        "world_size": 1,
    }
    guard = {"data_fingerprint": "d" * 64, "prompt_format_hash": "p" * 64, "lora.r": rank}
    write_json(
        folder / "run.json",
        {
            "format_version": 1,
            "name": name,
            "created": "2026-01-01T00:00:00+00:00",
            "state": "finished",
            "updated": "2026-01-01T00:00:00+00:00",
            "launch": "one process, world size 1",
            "guard": guard,
            "summary": summary,
        },
    )
    environment = {
        "python": "3.11.7",
        "libraries": {"torch": "2.13.0", "trl": "1.16.0"},
        "git": {"commit": "c" * 40, "dirty": False},
        "devices": ["NVIDIA H100 80GB HBM3, 79 GiB"],
    }
    write_json(folder / "environment.json", environment)
    (folder / "resolved.yaml").write_text(
        "model: {name_or_path: some/model, revision: null, dtype: bfloat16}\nquantization: null\n"
        f"lora: {{r: {rank}}}\ntrain: {{seed: {seed}}}\n"
    )
    (folder / "command.txt").write_text(
        f"recipes train recipes/some/r{rank}.yaml run.name={name}\n"
    )
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "loss": 2.1 - 0.9 * step / steps + rng.gauss(0, 0.03),
            "learning_rate": 2e-4 * (1 - step / steps),
            "tokens_per_second": 1288 + rng.gauss(0, 30),
            "peak_memory_gib": summary["peak_memory_gib"],
        }
        lines.append(line)
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 1.9 - (0.6 + rank / 1000) * step / steps})
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def write_alpaca_eval(
    folder: Path,
    n: int,
    *,
    against: str = "reference",
    skill: float = 0.5,
    flips: float = 0.1,
    unparsed: float = 0.0,
    text: Text = plain_text,
    category: Callable[[int], str] | None = None,
    raw: Callable[[str], str] | None = None,
) -> None:
    """Write an AlpacaEval comparison of a run: items and result.

    Args:
        skill: chance that a pair whose orders agree is won.
        flips: share of pairs whose verdict turns with the order; unparsed: share of verdicts
            without a result.
    """
    rng = random.Random(f"{folder.name}{against}{n}")
    items: list[Sample] = []
    rows = []
    for number in range(n):
        name = f"q{number:05d}"
        group = category(number) if category else CATEGORIES[number % len(CATEGORIES)]
        win = rng.random() < skill
        said = {"AB": "A" if win else "B", "BA": "B" if win else "A"}
        if rng.random() < flips:
            said["BA"] = said["AB"]
        verdicts = []
        for order in ("AB", "BA"):
            ok = rng.random() >= unparsed
            words = (
                raw(said[order])
                if raw
                else f"Response {said[order]} is fuller and clearer than the other one."
            )
            verdict = {
                "kind": "relative",
                "order": order,
                "status": "ok" if ok else "unparsed",
                "value": said[order] if ok else None,
                "source": "judge",
                "mass": None,
                "raw": f"{words} [RESULT] {said[order]}" if ok else words,
            }
            verdicts.append(verdict)
            rows.append(
                _judgment(
                    name, order, verdict, {"category": group}, [len(plain_text("x", name))] * 2
                )
            )
        answer, other = text(folder.name, name), text(against, name)
        items.append(
            pair_sample(
                name,
                {verdict["order"]: verdict for verdict in verdicts},
                category=group,
                input=text("instruction", name),
                answer=answer,
                opponent=other,
                lengths=(len(answer), len(other)),
            )
        )
    suffix = "" if against == "reference" else f".against-{against}"
    file = folder / "evals" / "alpaca_eval" / f"result{suffix}.json"
    pairs = summarise(pair_samples(rows))
    result = _result("alpaca_eval", folder.name, against, n, audit(rows)) | {
        "pairs": pairs.to_dict(),
        "mean_score": None,
    }
    measure = Measure(
        "alpaca_eval",
        "alpaca_eval",
        "win_rate",
        "AlpacaEval win rate",
        tuple(items),
        file,
        against,
        reported=pairs.score.estimate,
        reported_n=pairs.n,
    )
    _write_result(file, result, measure)


def write_mt_bench(
    folder: Path,
    n: int = 80,
    *,
    skill: float = 3.0,
    text: Text = plain_text,
    missing: Iterable[int] = (),
) -> None:
    """Write MT-Bench grades of a run, two turns each; `missing` are questions whose second turn has
    no verdict.
    """
    rng = random.Random(f"{folder.name}mt")
    questions = [
        Question(
            str(80 + number), (f"first {number}?", f"second {number}?"), CATEGORIES[number % 4]
        )
        for number in range(n)
    ]
    items: list[Sample] = []
    rows = []
    for number, question in enumerate(questions):
        turns = [text(folder.name, f"{question.id}.{turn}") for turn in (1, 2)]
        for turn in (1, 2):
            grade = min(5, max(1, round(rng.gauss(skill, 1.2))))
            ok = not (turn == 2 and number in set(missing))
            verdict = {
                "kind": "absolute",
                "order": "single",
                "status": "ok" if ok else "unparsed",
                "value": grade if ok else None,
                "source": "judge",
                "raw": f"Feedback. [RESULT] {grade}",
            }
            meta = {"category": question.category, "turn": turn, "question": question.id}
            answer = turns[turn - 1]
            rows.append(
                _judgment(
                    f"{question.id}:{turn}",
                    "single",
                    verdict,
                    meta,
                    [len(answer)],
                    [text_hash(answer)],
                )
            )
            items.append(
                grade_sample(
                    question.id,
                    rows[-1],
                    turn=turn,
                    category=question.category,
                    lengths=(len(answer),),
                    input=question.turns[turn - 1],
                    answer=answer,
                )
            )
    file = folder / "evals" / "mt_bench" / "result.json"
    write_lines(file.with_name("judgments.jsonl"), rows)
    numbers = suite.summary(questions, rows)
    measure = Measure(
        "mt_bench",
        "mt_bench",
        "grade",
        "MT-Bench mean grade, 1-5",
        tuple(items),
        file,
        unit="grade",
        reported=numbers["score"]["estimate"],
        reported_n=numbers["score"]["n"],
    )
    result = _result("mt_bench", folder.name, None, n, audit(rows))
    judged = {"judgment_keys": [row["key"] for row in rows]}
    _write_result(file, {**result, **judged, **numbers}, measure)


def write_lm_eval(
    folder: Path, n: int = 200, *, skill: float = 0.5, task: str = "arc_easy"
) -> None:
    """Write one lm-eval task of a run: right and wrong answers, paired through the question's
    difficulty.
    """
    hard = random.Random(task)
    values = [float(hard.random() < skill) for _ in range(n)]
    samples = [
        {
            "doc_id": number,
            "doc": {"subject": "general"},
            "filter": "none",
            "doc_hash": text_hash(f"{task}{number}"),
            "acc": value,
        }
        for number, value in enumerate(values)
    ]
    place = folder / "evals" / "lm_eval"
    write_lines(place / "samples" / f"samples_{task}.jsonl", samples)
    interval = mean_interval(values)
    row = {
        "task": task,
        "metric": "acc",
        "filter": "none",
        "value": sum(values) / n,
        "stderr": None,
        "low": interval.low,
        "high": interval.high,
        "n": n,
        "num_fewshot": 0,
        "version": 1,
        "higher_is_better": True,
    }
    result = _result("lm_eval", folder.name, None, n, None) | {
        "tasks": [row],
        "lm_eval_command": f"lm_eval run --tasks {task}",
    }
    write_json(place / "result.json", result)


def write_study(root: Path, names: Sequence[str], n: int, **options: Any) -> dict[str, list[Path]]:
    """Write runs that were judged against the reference and head to head, and return their folders
    by arm.
    """
    folders = {
        name: write_run(root, name, rank=8 * (number + 1)) for number, name in enumerate(names)
    }
    for number, (name, folder) in enumerate(folders.items()):
        write_alpaca_eval(folder, n, skill=0.5 + 0.05 * number, **options)
        for other in list(names)[:number]:
            write_alpaca_eval(folder, n, against=other, skill=0.6, **options)
        write_mt_bench(folder, skill=3 + 0.3 * number, missing=(3,) if number else ())
        write_lm_eval(folder, skill=0.5 + 0.04 * number)
        del name
    return {name: [folder] for name, folder in folders.items()}


def _judgment(
    question: str,
    order: str,
    verdict: dict[str, Any],
    meta: dict[str, Any],
    lengths: list[int],
    hashes: list[str] | None = None,
) -> dict[str, Any]:
    return {
        "key": f"{question}{order}",
        "question_id": question,
        "order": order,
        "judge": JUDGE["fingerprint"],
        "lengths": lengths,
        "answer_hashes": hashes or [],
        "marker_in_answer": False,
        "cut": False,
        "attempts": [],
        "meta": meta,
        **verdict,
    }


def _result(
    name: str, target: str, against: str | None, n: int, card: dict[str, Any] | None
) -> dict[str, Any]:
    answers = {
        "name": target,
        "models": ["some/model"],
        "prompt_format": "dolly",
        "prompt_format_hash": "p" * 64,
        "generated_now": {"new_tokens": 9000, "seconds": 41.5},
        "decoding": {"temperature": 0.0},
    }
    return {
        "format_version": 1,
        "suite": name,
        "eval": name,
        "target": target,
        "against": against,
        "n": n,
        "subset": None,
        "banners": [],
        "answers": answers,
        "opponent": None,
        "judge": JUDGE if card else None,
        "audit": card,
        "command": f"recipes eval evals/{name}.yaml",
        "git": {"commit": "c" * 40, "dirty": False},
        "recipe": {"name": name},
    }


def _write_result(file: Path, result: dict[str, Any], measure: Measure) -> None:
    """Write a result as an evaluation does: its items first."""
    items = file.with_name(file.name.replace("result", "items") + "l")
    write_lines(items, (one.to_dict(measure.metric) for one in measure.samples))
    write_json(file, result | {"written": "2026-01-01", "measures": [measure.to_dict()]})


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8", errors="surrogatepass")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
