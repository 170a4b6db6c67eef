"""Reads details of lighteval: the folder of `--output-dir`, written with `--save-details`.

    OUT/results/MODEL/results_DATE.json   OUT/details/MODEL/DATE/details_TASK|SHOTS_DATE.parquet

(lighteval 0.13, logging/evaluation_tracker.py.) Each model is an arm, with each task from the
newest command that has it.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes_lib.analysis.readers.files import ADDRESS, foreign_run, parsed_json, scored_metric
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import hash_of
from recipes_lib.data.readers import read_file
from recipes_lib.evals.log import NOT_RECORDED, AnswerFacts, Metric, Sample

FORM = "lighteval: the folder of --output-dir, with --save-details"
_DETAILS = re.compile(r"details_(.+)\|(\d+)_(\d{4}-\d\d-\d\dT[\d.-]+)\.parquet")
# What of a document decides how a model is asked; the rest says how it is scored.
_ASKED = ("query", "choices", "instruction", "fewshot_samples", "generation_size", "stop_sequences")


def matches(path: Path) -> bool:
    """Whether a folder has details of lighteval in it."""
    return path.is_dir() and bool(_files(path))


def read(path: Path) -> list[Run]:
    """Return a run for each model of a folder.

    Raises:
        DataError: a damaged file.
    """
    by_model: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(_files(path), key=lambda file: file.parent.name, reverse=True):
        by_model[file.parent.parent].append(file)
    return [_run(folder, files) for folder, files in sorted(by_model.items())]


def _files(folder: Path) -> list[Path]:
    pattern = "details_*.parquet"
    files = [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]
    files += (folder / "details").rglob(pattern)
    return [file for file in files if _DETAILS.fullmatch(file.name)]


def _results_of(details: Path) -> Mapping[str, Any]:
    """Return the results of the command that wrote a file of details; nothing where it is gone."""
    above, _, model = str(details.resolve().parent.parent).rpartition("/details/")
    file = Path(above, "results", model, f"results_{details.parent.name}.json")
    return parsed_json(file, dict) if file.exists() else {}


def _run(folder: Path, newest_first: list[Path]) -> Run:
    metrics: dict[str, list[Metric]] = {}  # by task
    settings: dict[str, Any] = {}
    unread: list[str] = []
    general: Mapping[str, Any] = {}
    for file in newest_first:
        task, shots, _ = _DETAILS.fullmatch(file.name).groups()  # type: ignore[union-attr]
        if task in metrics:
            unread.append(f"{file.name}: older results of {task}")
            continue
        results = _results_of(file)
        general = results.get("config_general") or general
        declared = (results.get("config_tasks") or {}).get(f"{task}|{shots}") or {}
        reported = (results.get("results") or {}).get(f"{task}|{shots}") or {}
        settings[f"{task}: scoring"] = ADDRESS.sub("", str(declared.get("metrics", NOT_RECORDED)))
        version = str(declared.get("version", "")) or None
        facts = {"task": task, "num_fewshot": int(shots), "version": version}
        metrics[task] = list(_metrics(file, declared.get("metrics") or (), reported, facts))
    model = general.get("model_config") or {}
    name = str(general.get("model_name") or folder.name)
    # without an override the tokenizer's own, where it has one; whether it has is not said
    settings["chat template"] = model.get("override_chat_template") or NOT_RECORDED
    libraries = {"backend": NOT_RECORDED}
    if model:
        settings["system instruction"] = model.get("system_prompt") or "none"
        settings["gen_kwargs"] = str(model.get("generation_parameters"))
        libraries["tokenizer"] = model.get("tokenizer") or "the model's own"
        libraries["lighteval"] = general.get("lighteval_sha") or "?"
    return foreign_run(
        "lighteval",
        folder,
        name,
        [metric for of_task in metrics.values() for metric in of_task],
        unread=unread,
        recipe=settings,
        subset=f"max_samples {general['max_samples']}" if general.get("max_samples") else None,
        answers=AnswerFacts(name=name, models=(name,), dtype=model.get("dtype")),
        libraries=libraries,
    )


def _metrics(
    file: Path, declared: Any, reported: Mapping[str, Any], facts: dict[str, Any]
) -> Iterator[Metric]:
    """Yield the metrics of a task: means of its documents, or what lighteval reported of all."""
    higher_is_better = {str(each["metric_name"]): each["higher_is_better"] for each in declared}
    samples: dict[str, list[Sample]] = defaultdict(list)
    for row in read_file(file):
        if not row.fields.keys() >= {"doc", "metric"}:
            raise DataError("has no doc or no metric", file=row.file, line=row.line)
        document = row.fields["doc"]
        text = "\n".join([document["query"], *document.get("choices", ())])
        asked = hash_of(*[document.get(key) for key in _ASKED])
        answers = (row.fields.get("model_response") or {}).get("text") or [None]
        facts_of_row = {"prompt": asked, "input": text, "answer": answers[0]}
        for name, value in row.fields["metric"].items():
            if isinstance(value, int | float):
                samples[name].append(Sample(str(document["id"]), value=value, **facts_of_row))
    names = [name for name in reported if not name.endswith("_stderr")]
    for name in dict.fromkeys([*samples, *names]):
        of_rows = samples.get(name, [])
        total = reported.get(name)
        mean = sum(sample.value or 0.0 for sample in of_rows) / max(len(of_rows), 1)
        if of_rows and (total is None or abs(mean - total) <= 1e-6):
            yield scored_metric(name, of_rows, higher_is_better.get(name), **facts)
        elif total is not None:  # of all documents together
            yield Metric(name, f"{facts['task']} {name}", value=total, unit="number", **facts)
