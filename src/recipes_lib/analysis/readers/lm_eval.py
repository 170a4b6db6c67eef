"""Reads results of lm-eval: the folder of `--output_path` or one of its results files.

A command of lm-eval writes one results file and, with `--log_samples`, a samples file per task, all
with the date of its end in their names:

    DIR/MODEL/results_DATE.json   DIR/MODEL/samples_TASK_DATE.jsonl   --output_path DIR
    DIR/NAME_DATE.json            DIR/samples_TASK_DATE.jsonl         --output_path DIR/NAME.json

(lm_eval 0.4.13, loggers/evaluation_tracker.py.) A folder may hold several models and several
commands of a model: each model is a run, with each task from the newest command that has it.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.analysis.readers.files import arm_name, parsed_json
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import object_or_none, read_rows
from recipes_lib.evals.log import AnswerFacts, EvalLog, Metric, with_groups
from recipes_lib.evals.suites.lm_eval import metrics_of

FORM = "lm-eval: the folder of --output_path"
SUITE = "lm_eval"
_AGAIN = "run lm-eval again with --log_samples and --output_path"
_DATE = re.compile(r"_\d{4}-\d\d-\d\dT[\d.-]+$")
_KEYS = {"results", "configs"}
# Arguments that say which weights answer. They are what is compared, so no difference of asking.
_OF_THE_WEIGHTS = ("pretrained", "peft", "path", "model", "tokenizer", "delta", "revision")
_NO_SAMPLES = "no samples beside it, so nothing can be paired"
_NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Results:
    """One results file, with the samples of the same command."""

    file: Path
    content: Mapping[str, Any] = field(repr=False)

    @property
    def date(self) -> str:
        """When the command ended, as its file name says; it sorts by time."""
        found = _DATE.search(self.file.stem)
        return found[0] if found else ""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """How the command was called."""
        return self.content.get("config") or {}

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The model's arguments, which lm-eval records as a mapping or as `key=value,...`."""
        given = self.config.get("model_args")
        if not isinstance(given, Mapping):
            parts = str(given or "").split(",")
            given = dict(part.split("=", 1) for part in parts if "=" in part)
        return {str(key).strip(): str(value) for key, value in given.items()}

    @property
    def model(self) -> str:
        """The model's name."""
        name = self.content.get("model_name") or self.arguments.get("pretrained")
        return str(name or self.file.parent.name)

    @property
    def weights_arguments(self) -> list[str]:
        """The arguments that say which weights answered, such as `revision=step2`."""
        arguments = self.arguments
        return [f"{key}={arguments[key]}" for key in _OF_THE_WEIGHTS if key in arguments]

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of the samples files, by task; a task without a file has none."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for file in sorted(self.file.parent.glob(f"samples_*{self.date}.jsonl")):
            task = file.stem.removeprefix("samples_").removesuffix(self.date)
            rows[task] = list(read_rows(file))
        return rows


def matches(path: Path) -> bool:
    """Whether a file holds results of lm-eval, or a folder has such files in it or one below."""
    if path.is_dir():
        return bool(_results_files(path))
    return path.suffix == ".json" and _is_results(path)


def read(path: Path) -> list[Run]:
    """Return a run for each model of a folder or a results file.

    Raises:
        DataError: a damaged file, or results without samples, which nothing can be paired with.
    """
    by_model: dict[tuple[str, ...], list[Results]] = defaultdict(list)
    for file in _results_files(path) if path.is_dir() else [path]:
        content = parsed_json(file)
        if not isinstance(content, Mapping) or not isinstance(content.get("results"), Mapping):
            raise DataError("holds no results of lm-eval", _AGAIN, file=file)
        results = Results(file, content)
        by_model[str(file.parent), results.model, *results.weights_arguments].append(results)
    names = Counter(commands[0].model for commands in by_model.values())
    runs = []
    for commands in by_model.values():
        folder = path if len(by_model) == 1 else commands[0].file.parent
        name = commands[0].model
        if names[name] > 1:
            name = "-".join([name, *commands[0].weights_arguments])
        runs.append(_run(name, folder, commands))
    return runs


def _results_files(folder: Path) -> list[Path]:
    """Return the files whose names are those of results, whether they can be read or not."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    return [
        file
        for file in files
        if file.stem.startswith("results") or (_DATE.search(file.stem) and _is_results(file))
    ]


def _is_results(file: Path) -> bool:
    return (object_or_none(file) or {}).keys() >= _KEYS


def _run(name: str, folder: Path, commands: Sequence[Results]) -> Run:
    """Return the run of one model: each task is read from the newest command that has it."""
    newest_first = sorted(commands, key=lambda results: results.date, reverse=True)
    read_tasks: set[str] = set()
    logs: list[EvalLog] = []
    unread: list[str] = []
    for results in newest_first:
        tasks = list(results.content["results"])
        new_tasks = [task for task in tasks if task not in read_tasks]
        older = [task for task in tasks if task in read_tasks]
        if older:
            unread.append(f"{results.file.name}: older results of {', '.join(older)}")
        if not new_tasks:
            continue  # nothing of it is compared, so its samples are not read
        rows = list(itertools.chain.from_iterable(results.samples.values()))
        if not rows or any("doc_id" not in row for row in rows):  # the number of its document
            unread.append(f"{results.file.name}: {_NO_SAMPLES}")
            continue
        logs.append(_log(results, new_tasks))
        read_tasks.update(new_tasks)
    if not logs:
        raise DataError(f"it has {_NO_SAMPLES}", _AGAIN, file=newest_first[0].file)
    return Run(
        name=arm_name(name, folder),
        folder=folder,
        state={"kind": "answers"},
        evals=tuple(logs),
        foreign=True,
        unread=tuple(unread),
    )


def _log(results: Results, tasks: Sequence[str]) -> EvalLog:
    """Return what one command says about some of its tasks."""
    metrics = [metric for metric in _metrics(results) if metric.task in tasks]
    limit = results.config.get("limit")
    settings: dict[str, Any] = {"gen_kwargs": str(results.config.get("gen_kwargs") or "none")}
    if limit:
        settings["limit"] = limit
    phrases = []  # how many questions of which tasks were asked, where that is not all of them
    for task in tasks:
        counts = (results.content.get("n-samples") or {}).get(task) or {}
        asked = counts.get("effective")
        existing = counts.get("original")
        if asked is not None and existing is not None and asked < existing:
            phrases.append(f"{asked} of {existing} questions of {task}")
    chosen = ", ".join(phrases)
    if chosen and not limit:
        settings["samples"] = chosen
    return EvalLog(
        suite=SUITE,
        eval=SUITE,
        file=results.file,
        target=results.model,
        n=sum(metric.n for metric in metrics if not metric.parts),
        subset=f"limit {limit}" if limit else chosen or None,
        metrics=tuple(metrics),
        answers=AnswerFacts(
            name=results.model,
            models=(results.model,),
            dtype=results.arguments.get("dtype"),
        ),
        recipe={"suite": settings},
        libraries=_facts(results),
        git={"commit": results.content.get("git_hash")},
        source="lm-eval",
    )


def _metrics(results: Results) -> Iterator[Metric]:
    metrics = []
    for metric in metrics_of(results.content, results.samples):
        prompts = {
            str(row["doc_id"]): str(row.get("prompt_hash") or "")
            for row in results.samples.get(metric.task, ())
        }
        samples = tuple(
            # metrics_of begins an id with the document's number
            replace(sample, prompt=prompts[sample.id.partition(":")[0]])
            for sample in metric.samples
        )
        placed = replace(metric, samples=samples, eval=SUITE, suite=SUITE, file=results.file)
        metrics.append(placed)
    return with_groups(metrics)


def _facts(results: Results) -> dict[str, Any]:
    """Return how a command asked, apart from its tasks' settings. What lm-eval always records and
    this file does not say is "not recorded": it may be anything.
    """
    content = results.content
    config = results.config
    arguments = results.arguments
    other_keys = sorted(arguments.keys() - {*_OF_THE_WEIGHTS})
    other_arguments = ", ".join(f"{key}={arguments[key]}" for key in other_keys)
    tokenizer = arguments.get("tokenizer")
    names = [arguments.get(key) for key in _OF_THE_WEIGHTS if key != "tokenizer"]
    if not tokenizer or tokenizer in names:
        tokenizer = "the model's own"
    facts = {
        "lm_eval": content.get("lm_eval_version") or _NOT_RECORDED,
        "transformers": content.get("transformers_version") or _NOT_RECORDED,
        "backend": config.get("model") or _NOT_RECORDED,
        "model arguments": other_arguments or "none",
        "tokenizer": tokenizer,
        "chat template": content.get("chat_template_sha") or "none",
        "system instruction": content.get("system_instruction_sha") or "none",
        "few-shot seed": config.get("fewshot_seed"),
    }
    return {name: value for name, value in facts.items() if value is not None}
