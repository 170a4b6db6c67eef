"""Reads results of lm-eval: the folder or the file of `--output_path`, or one of its results files.

A command of lm-eval writes one results file and, with `--log_samples`, a samples file per task, all
with the date of its end in their names:

    DIR/MODEL/results_DATE.json   DIR/MODEL/samples_TASK_DATE.jsonl   --output_path DIR
    DIR/NAME_DATE.json            DIR/samples_TASK_DATE.jsonl         --output_path DIR/NAME.json

(lm_eval 0.4.13, loggers/evaluation_tracker.py.) A folder may hold several models and several
commands of a model: each model is a run, with each task from the newest command that has it. What
is not read is listed in `Run.unread`.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes_lib.analysis.readers.files import ADDRESS, arm_name, parsed_json
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import object_or_none, parsed_line, read_rows
from recipes_lib.evals.log import NOT_RECORDED, AnswerFacts, EvalLog, Metric, with_groups
from recipes_lib.evals.suites.lm_eval import is_share, metrics_of

FORM = "lm-eval: the folder of --output_path"
SUITE = "lm_eval"
_AGAIN = "run lm-eval again with --log_samples and --output_path"
_DATE = re.compile(r"_\d{4}-\d\d-\d\dT[\d.-]+$")
_KEYS = {"results", "configs"}
# Arguments that say which weights answer. They are what is compared, so no difference of asking.
_OF_THE_WEIGHTS = ("pretrained", "peft", "path", "model", "tokenizer", "delta", "revision")
_NO_SAMPLES = "no samples beside it, so nothing can be paired"
# What a task's configuration says about asking and scoring that its prompts do not show.
_OF_THE_TASK = ("generation_kwargs", "repeats", "filter_list", "metric_list")


@dataclass(frozen=True)
class Results:
    """One results file, with the samples of the same command."""

    file: Path  # where it has none, one of its samples files
    content: Mapping[str, Any] = field(repr=False)

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
    def identity(self) -> list[str]:
        """What tells models of one name apart, such as `revision=step2`, and the form of asking."""
        words = [f"{key}={self.arguments[key]}" for key in _OF_THE_WEIGHTS if key in self.arguments]
        if self.content.get("chat_template_sha"):
            words.append("chat")
        return words

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of the samples files, by task; a task without a file has none."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for file in sorted(self.file.parent.glob(f"samples_*{_date_of(self.file)}.jsonl")):
            if _date_of(file) == _date_of(self.file):
                task = file.stem.removeprefix("samples_").removesuffix(_date_of(self.file))
                rows[task] = list(read_rows(file, may_be_cut=False))
        return rows

    def rows_of(self, metric: Metric) -> dict[str, dict[str, Any]]:
        """Return the rows of a metric's task and filter by the number of their document."""
        pipeline = metric.metric.partition(",")[2] or "none"
        rows = self.samples.get(metric.task, ())
        return {str(row["doc_id"]): row for row in rows if row.get("filter", "none") == pipeline}


def matches(path: Path) -> bool:
    """Whether a file holds results of lm-eval, or a folder has its files in it or one below."""
    if path.is_dir():
        return bool(_results_files(path) or _samples_files(path))
    return path.suffix == ".json" and (_is_results(path) or bool(_of_output_path(path)))


def read(path: Path) -> list[Run]:
    """Return a run for each model of a folder or a results file.

    Raises:
        DataError: a damaged file, or results without samples, which nothing can be paired with.
    """
    by_model: dict[tuple[str, ...], list[Results]] = defaultdict(list)
    for results in _commands(path):
        by_model[str(results.file.parent), results.model, *results.identity].append(results)
    names = Counter(commands[0].model for commands in by_model.values())
    runs = []
    for commands in by_model.values():
        folder = path if len(by_model) == 1 else commands[0].file.parent
        name = commands[0].model
        if names[name] > 1:
            name = "-".join([name, *commands[0].identity])
        runs.append(_run(name, folder, commands))
    return runs


def _commands(path: Path) -> list[Results]:
    """Return the commands that wrote the files at a path."""
    files = [path]
    if path.is_dir():
        files = _results_files(path)
    elif not path.exists():
        files = _of_output_path(path)
    commands = []
    for file in files:
        content = parsed_json(file)
        if not isinstance(content, Mapping) or not isinstance(content.get("results"), Mapping):
            raise DataError("holds no results of lm-eval", _AGAIN, file=file)
        commands.append(Results(file, content))
    if not files:
        first_files: dict[tuple[Path, str], Path] = {}
        for file in _samples_files(path):
            first_files.setdefault((file.parent, _date_of(file)), file)
        for file in first_files.values():
            commands.append(Results(file, _shown_by(Results(file, {}).samples)))
    return commands


def _shown_by(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what a results file would say of these rows, as far as they show it."""
    content: dict[str, Any] = {"results": {}, "higher_is_better": {}, "unread": []}
    for task, rows in samples.items():
        values: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for row in rows:
            for metric in row.get("metrics") or ():
                values[metric, row.get("filter", "none")].append(row.get(metric))
        means = content["results"][task] = {}
        for (metric, pipeline), of_rows in values.items():
            if all(isinstance(value, int | float) for value in of_rows):
                means[f"{metric},{pipeline}"] = fmean(of_rows)
            else:
                content["unread"].append(f"{metric} of {task}: no numbers, and no results file")
        # of other metrics nothing says which values are good
        content["higher_is_better"][task] = {name: True for name, _ in values if is_share(name)}
    return content


def _results_files(folder: Path) -> list[Path]:
    """Return the files whose names are those of results, whether they can be read or not."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    dated = [file for file in files if _DATE.search(file.stem) and _is_results(file)]
    return [file for file in files if file.stem.startswith("results") or file in dated]


def _is_results(file: Path) -> bool:
    return (object_or_none(file) or {}).keys() >= _KEYS


def _samples_files(folder: Path) -> list[Path]:
    """Return the files of rows of lm-eval: their first row has the number of its document."""
    found = []
    files = sorted([*folder.glob("samples_*.jsonl"), *folder.glob("*/samples_*.jsonl")])
    for file in filter(Path.is_file, files):
        with file.open("rb") as lines:
            row = parsed_line(lines.readline()) or {}
        if "doc_id" in row:
            found.append(file)
    return found


def _of_output_path(path: Path) -> list[Path]:
    """Return the results files of `--output_path DIR/NAME.json`, which lm-eval gives a date."""
    files = sorted(path.parent.glob(f"{path.stem}_*.json"))
    return [file for file in files if path.stem + _date_of(file) == file.stem]


def _date_of(file: Path) -> str:
    """When a command ended, as the name of its file says; it sorts by time."""
    found = _DATE.search(file.stem)
    return found[0] if found else ""


def _run(name: str, folder: Path, commands: Sequence[Results]) -> Run:
    """Return the run of one model: each task is read from the newest command that has it."""
    newest_first = sorted(commands, key=lambda results: _date_of(results.file), reverse=True)
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
        unread += results.content.get("unread") or ()
        log = _log(results, new_tasks)
        for metric in log.metrics:
            unread += _missing_rows(results, metric)
        logs.append(log)
        read_tasks.update(new_tasks)
    if not logs:
        raise DataError(f"it has {_NO_SAMPLES}", _AGAIN, file=newest_first[0].file)
    place = newest_first[0].file.parent
    dates = {_date_of(file) for file in _results_files(place)}
    for file in _samples_files(place) if dates else ():
        if _date_of(file) not in dates:
            unread.append(f"{file.name}: its command has no results file here")
    return Run(
        name=arm_name(name, folder),
        folder=folder,
        state={"kind": "answers"},
        evals=tuple(logs),
        foreign=True,
        unread=tuple(unread),
    )


def _missing_rows(results: Results, metric: Metric) -> Iterator[str]:
    """Say of which metric rows are not there any more."""
    name = metric.metric.partition(",")[0]
    num_rows = sum(name in row for row in results.rows_of(metric).values())
    if num_rows < metric.asked and not metric.parts:
        file = f"samples_{metric.task}{_date_of(results.file)}.jsonl"
        found = f"{num_rows} of the {metric.asked} rows of {metric.metric} can be read"
        yield f"{file}: {found}; restore the file, or evaluate again"


def _log(results: Results, tasks: Sequence[str]) -> EvalLog:
    """Return what one command says about some of its tasks."""
    metrics = [metric for metric in _metrics(results) if metric.task in tasks]
    limit = results.config.get("limit")
    part = {"limit": limit} if limit else {}
    phrases = []
    for task in tasks:
        counts = (results.content.get("n-samples") or {}).get(task) or {}
        if counts.get("effective", 0) < counts.get("original", 0):
            phrases.append(f"{counts['effective']} of {counts['original']} questions of {task}")
    chosen = ", ".join(phrases)
    if chosen and not limit:
        part["samples"] = chosen
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
            dtype=results.config.get("model_dtype") or results.arguments.get("dtype"),
        ),
        recipe=_asked(results, tasks) | {"suite": part},
        libraries=_facts(results),
        git={"commit": results.content.get("git_hash")},
        source="lm-eval",
    )


def _metrics(results: Results) -> Iterator[Metric]:
    metrics = []
    for metric in metrics_of(results.content, results.samples):
        rows = results.rows_of(metric)
        samples = []
        for sample in metric.samples:
            # metrics_of begins an id with the document's number
            row = rows[sample.id.partition(":")[0]]
            prompt = str(row.get("prompt_hash") or "")
            question, answer = _texts(row)
            samples.append(replace(sample, prompt=prompt, input=question, answer=answer))
        name = metric.metric.partition(",")[0]
        # a task may give some documents no value of a metric, which their rows then do not list
        unscored = sum(name not in row.get("metrics", [name]) for row in rows.values())
        placed = replace(metric, samples=tuple(samples), eval=SUITE, suite=SUITE, file=results.file)
        metrics.append(replace(placed, asked=metric.asked - unscored))
    return with_groups(metrics)


def _texts(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return what a model was given for a row, a prompt with the choices, and what it generated."""
    requests = row.get("arguments") or ()
    if isinstance(requests, Mapping):  # gen_args_0, gen_args_1, ...; lists before 0.4.3
        requests = requests.values()
    parts: list[Any] = []
    for request in requests:
        parts += request.values() if isinstance(request, Mapping) else request
    texts = dict.fromkeys(part for part in parts if isinstance(part, str))
    answer = None
    if len(texts) < len(parts) and not isinstance(parts[-1], str):  # settings of a generation
        answer = row.get("resps")
    while isinstance(answer, list):  # the first of several
        answer = answer[0] if answer else None
    return "\n".join(texts) or None, answer


def _asked(results: Results, tasks: Sequence[str]) -> dict[str, Any]:
    """Return how a command asked and scored. What lm-eval always records and this file does not
    say is "not recorded": it may be anything.
    """
    content = results.content
    settings: dict[str, Any] = {}
    for key in ("chat template", "system instruction"):
        recorded = f"{key.replace(' ', '_')}_sha"
        settings[key] = content[recorded] or "none" if recorded in content else NOT_RECORDED
    settings["gen_kwargs"] = str(results.config.get("gen_kwargs") or "none")
    shots = content.get("n-shot") or {}
    if any(shots.get(task) for task in tasks):  # else no seed chose an example
        settings["few-shot seed"] = results.config.get("fewshot_seed", NOT_RECORDED)
    for task in tasks:
        configuration = (content.get("configs") or {}).get(task) or {}
        for key in _OF_THE_TASK:
            if key in configuration:
                settings[f"{task}: {key}"] = ADDRESS.sub("", str(configuration[key]))
    return settings


def _facts(results: Results) -> dict[str, Any]:
    """Return how the answers of a command were computed, or that this is not recorded."""
    arguments = results.arguments
    other_keys = sorted(arguments.keys() - {*_OF_THE_WEIGHTS})
    other_arguments = ", ".join(f"{key}={arguments[key]}" for key in other_keys)
    tokenizer = arguments.get("tokenizer")
    names = [arguments.get(key) for key in _OF_THE_WEIGHTS if key != "tokenizer"]
    if not tokenizer or tokenizer in names:
        tokenizer = "the model's own"
    if "model_args" not in results.config:
        other_arguments = NOT_RECORDED
        tokenizer = NOT_RECORDED
    return {
        "lm_eval": results.content.get("lm_eval_version") or NOT_RECORDED,
        "transformers": results.content.get("transformers_version") or NOT_RECORDED,
        "backend": results.config.get("model") or NOT_RECORDED,
        "model arguments": other_arguments or "none",
        "tokenizer": tokenizer,
    }
