"""Results of lm-eval with samples, and annotations of alpaca_eval, as arms; nothing is made up."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.core.files import hash_of
from recipes_lib.evals.log import AnswerFacts, EvalLog, JudgeFacts, Metric, Sample, with_groups
from recipes_lib.evals.suites.lm_eval import metrics_of

_MODEL = re.compile(r"^(pretrained|peft|path|model|tokenizer|delta|revision)=")
_AGAIN = "run lm-eval again with --log_samples and --output_path"
FOLDERS = "lm-eval: the folder of --output_path; alpaca_eval: its annotations.json"


def read_foreign(path: Path) -> Run | None:
    """Return what a folder or a file of another program holds; None where it is none."""
    if path.is_dir():
        results = sorted(path.glob("results*.json")) or sorted(path.glob("*/results*.json"))
        if results:
            return _lm_eval(path, results[-1])
        annotations = sorted(path.glob("*annotations*.json"))
        return _alpaca_eval(annotations[0]) if annotations else None
    if not path.is_file() or path.suffix != ".json":
        return None
    content = _json(path)
    if isinstance(content, Mapping) and "results" in content and "configs" in content:
        return _lm_eval(path.parent, path)
    rows = isinstance(content, list) and bool(content) and isinstance(content[0], Mapping)
    if rows and {"instruction", "preference", "output_2"} <= content[0].keys():
        return _alpaca_eval(path)
    what = "neither results of lm-eval nor annotations of alpaca_eval"
    raise DataError(what, FOLDERS, file=path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"is not JSON: {error}", file=path) from None


def _run(name: str, folder: Path, log: EvalLog) -> Run:
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or folder.name
    return Run(clean, folder, state={"kind": "answers"}, evals=(log,), foreign=True)


# ---- alpaca_eval ----


def _alpaca_eval(path: Path) -> Run:
    """Annotations: preference 1 is the first output, 2 the second, 0 and 1.5 a draw, anything
    between them a weighted verdict.
    """
    rows = _json(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"annotation {number} is not an object", file=path)
    names = {key: {str(row.get(key)) for row in rows} for key in ("generator_2", "annotator")}
    for key, values in names.items():
        if len(values) > 1:
            what = f"has several values of {key}: {', '.join(sorted(values)[:3])}"
            raise DataError(what, "one file is one model and one judge", file=path)
    rivals = sorted({str(row.get("generator_1") or "reference") for row in rows})
    samples = []
    for number, row in enumerate(rows, 1):
        try:
            samples.append(_annotation(row))
        except (KeyError, TypeError, ValueError) as error:
            what = f"annotation {number} cannot be read: {type(error).__name__} {error}"
            raise DataError(what, file=path) from None
    if len({sample.id for sample in samples}) < len(samples):
        raise DataError("holds an instruction twice", "keep one annotation of each", file=path)
    model, judge = min(names["generator_2"]), min(names["annotator"])
    known = [sample.value for sample in samples if sample.value is not None]
    metric = Metric(
        "win_rate",
        "AlpacaEval win rate",
        tuple(samples),
        value=sum(known) / len(known) if known else None,
        n=len(known),
        opponent=" and ".join(rivals),
        eval="alpaca_eval",
        suite="alpaca_eval",
        file=path,
    )
    log = EvalLog(
        suite="alpaca_eval",
        eval="alpaca_eval",
        target=model,
        against=metric.opponent,
        n=len(samples),
        metrics=(metric,),
        answers=AnswerFacts(name=model, models=(model,)),
        judge=JudgeFacts(name=judge, fingerprint=judge, model=judge),
        notes=("each pair was judged once, its order at random",),
        source="alpaca_eval",
        file=path,
    )
    return _run(model, path.parent, log)


def _annotation(row: Mapping[str, Any]) -> Sample:
    preference = None if row["preference"] is None else float(row["preference"])
    if preference is not None and preference != 0 and not 1 <= preference <= 2:
        raise ValueError(f"preference {preference}")
    value = None if preference is None else 0.5 if preference == 0 else preference - 1
    outcomes = {None: "unresolved", 1.0: "win", 0.5: "tie", 0.0: "loss"}
    answer, opponent = str(row["output_2"]), str(row["output_1"])
    return Sample(
        id=hashlib.sha256(str(row["instruction"]).encode("utf-8", "replace")).hexdigest()[:16],
        category=str(row.get("dataset") or "all"),
        value=value,
        outcome=outcomes.get(value, "scored"),
        lengths=(len(answer), len(opponent)),
        input=str(row["instruction"]),
        answer=answer,
        opponent=opponent,
    )


# ---- lm-eval ----


def _lm_eval(folder: Path, path: Path) -> Run:
    """The results of one lm-eval command, with the samples of the same date."""
    content = _json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("results"), Mapping):
        raise DataError("holds no results of lm-eval", _AGAIN, file=path)
    stamp = path.stem.removeprefix("results")
    samples: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(path.parent.glob(f"samples_*{stamp}.jsonl")):
        samples[file.stem.removeprefix("samples_").removesuffix(stamp)] = list(_rows(file))
    prompts = sorted(
        f"{row['doc_id']} {row.get('prompt_hash')}" for rows in samples.values() for row in rows
    )
    known = [
        replace(metric, eval="lm_eval", suite="lm_eval", file=path)
        for metric in metrics_of(content, samples)
    ]
    metrics = list(with_groups(known))
    if not any(metric.samples for metric in metrics):
        raise DataError("no samples lie beside it, so nothing can be paired", _AGAIN, file=path)
    config = content.get("config") or {}
    arguments = _arguments(config.get("model_args"))
    model = str(content.get("model_name") or arguments.get("pretrained") or path.parent.name)
    settings = {key: config.get(key) for key in ("limit", "gen_kwargs") if config.get(key)}
    free = {key: value for key, value in arguments.items() if not _MODEL.match(f"{key}=")}
    facts = {
        "lm_eval": content.get("lm_eval_version"),
        "transformers": content.get("transformers_version"),
        "model arguments": ", ".join(f"{key}={free[key]}" for key in sorted(free)),
        "chat template": content.get("chat_template_sha") or "none",
        "prompts": hash_of(prompts)[:12],
    }
    log = EvalLog(
        suite="lm_eval",
        eval="lm_eval",
        target=model,
        n=sum(metric.n for metric in metrics if not metric.parts),
        subset=f"limit {config['limit']}" if config.get("limit") else None,
        metrics=tuple(metrics),
        answers=AnswerFacts(name=model, models=(model,), dtype=free.get("dtype")),
        recipe={"suite": settings},
        libraries={key: value for key, value in facts.items() if value},
        git={"commit": content.get("git_hash")},
        source="lm-eval",
        file=path,
    )
    return _run(model, folder, log)


def _arguments(text: Any) -> dict[str, str]:
    """lm-eval's model_args, a text or a mapping."""
    if isinstance(text, Mapping):
        return {str(key): str(value) for key, value in text.items()}
    parts = (part.partition("=") for part in str(text or "").split(",") if "=" in part)
    return {key.strip(): value.strip() for key, _, value in parts}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["doc_id"]
            except (ValueError, KeyError, TypeError):
                what = "is not a sample of lm-eval"
                raise DataError(what, _AGAIN, file=path, line=number) from None
            yield row


def unique_names(runs: Sequence[Run]) -> dict[str, Run]:
    """Return runs by name; two of one name are told apart by their folders."""
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.name].append(run)
    named: dict[str, Run] = {}
    for run in runs:
        name = run.name if len(by_name[run.name]) == 1 else f"{run.name}-{run.folder.name}"
        if name in named:
            hint = "a run compared with itself shows nothing"
            raise RecipeError(f"'{run.name}' is named twice", hint)
        named[name] = run
    return named
