"""lm-eval through `simple_evaluate`: adapters without merging, every option under lm_eval's own
name, its results kept untouched.

All targets of a base share the loaded model. Under `accelerate launch` every process loads it and
does its share of the items. lm-eval's cache is keyed without the model and without what shares a
batch, so each model fingerprint and set of requests has a cache of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.lm_eval import (
    ALLOW,
    PROTOCOL,
    code_in,
    metric_direction,
    parts_of,
    unknown_metrics,
)
from recipes_lib.config.schema import fields_of, object_schema
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors, first_line
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_lock import waiting_lock
from recipes_lib.core.terminal import aligned
from recipes_lib.eval_files import finite, lm_eval_measures, log_file
from recipes_lib.eval_log import AnswerFacts, EvalLog, TaskScore
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.subjects import Subject
from recipes_lib.generation.targets import Target
from recipes_lib.statistics.intervals import mean_interval, wilson
from recipes_lib.suites.suite import Suite
from recipes_lib.weights.base import model_path

_CLI_OPTIONS = (
    "max_batch_size",
    "device",
    "check_integrity",
    "write_out",
    "predict_only",
    "confirm_run_unsafe_code",
)
_SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}  # lm_eval's defaults
# instead of auto, which tries 64 rows of the model's whole context: minutes, and more memory than
# most machines have
_CPU_BATCH = 8
_COLUMNS = fields_of(TaskScore)
_OURS = (
    "model",
    "model_args",
    "tasks",
    "task_manager",
    "use_cache",
    "log_samples",
    "samples",
    "evaluation_tracker",
)


class Harness(Suite):
    """lm-eval for the targets of one eval recipe, one loaded base at a time.

    Under `accelerate launch` every rank visits every subject and the first rank has the results.

    Raises:
        RecipeError: a word is no target, or a wrong option.
        EnvironmentFault: the processes of a launch do not find each other.
    """

    TITLE = "lm-eval"
    HELP = "tasks of the harness."
    NUMBERS: ClassVar[dict[str, JsonSchema]] = {
        "tasks": {
            "type": "array",
            "items": object_schema(_COLUMNS, [name for name in _COLUMNS if name != "parts"]),
        },
        "protocol": {},
        "lm_eval_command": {},
        "lm_eval_results": {},
    }

    def __init__(self, recipe: EvalRecipe, words: Sequence[str], remote_code: bool = False) -> None:
        super().__init__(recipe, words, remote_code)
        if unknown := sorted(set(recipe.suite.options) & set(_OURS)):
            raise recipe.error(
                "suite.options", f"suite.options.{unknown[0]} is set by the eval recipe itself"
            )
        check_allowed(recipe, remote_code)
        check_punkt(recipe)
        self._together = None if alone() else _joined()

    def visit(self, subject: Subject) -> list[EvalLog]:
        """Evaluate one of `targets`, and return its log; nothing on other ranks than the first.

        Raises:
            RecipeError: an unknown task or option.
            EnvironmentFault: lm-eval is not installed, or a data set cannot be had.
        """
        first = self._together is None or self._together.is_main_process
        with (
            waiting_lock(subject.run.path / "evals" / self.recipe.name)
            if first
            else contextlib.nullcontext()
        ):
            result = _run(self.recipe, subject, _live_model(self.recipe, subject, self._together))
        return [result] if result else []

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        head = ["task", "metric", "few-shot", "n", *(log.target for log in logs)]
        found = [{(row.task, row.metric, row.filter): row for row in log.tasks} for log in logs]
        rows = []
        for key in dict.fromkeys(key for table in found for key in table):
            cells = [table.get(key) for table in found]
            first = next(cell for cell in cells if cell)
            name = key[1] if key[2] == "none" else f"{key[1]} ({key[2]})"
            shots = "-" if first.num_fewshot is None else str(first.num_fewshot)
            rows.append(
                [
                    key[0],
                    name,
                    shots,
                    str(first.n),
                    *("-" if cell is None else _score(cell) for cell in cells),
                ]
            )
        return aligned([head, *rows])


def _score(row: TaskScore) -> str:
    limits = "" if row.low is None else f" [{row.low:.3f}, {row.high:.3f}]"
    return f"{row.value:.4f}{limits}"


def check_allowed(recipe: EvalRecipe, remote_code: bool) -> None:
    """Refuse an eval recipe whose tasks or options run code, unless the command line allowed it.

    Raises:
        RecipeErrors: naming each place.
    """
    if found := [] if remote_code else code_in(recipe.document, _include_path(recipe)):
        raise RecipeErrors(
            RecipeError(one.what, "pass --trust-remote-code as well", file=one.file, line=one.line)
            for one in found
        )


def alone() -> bool:
    """Whether this is the only process."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _joined() -> Any:
    """Join the other processes of the launch: a GPU each, or cores of the processor."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(
        timeout=datetime.timedelta(weeks=1)
    )  # ranks wait for the slowest one's share
    together = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    if together.num_processes != int(os.environ["WORLD_SIZE"]):
        raise EnvironmentFault(
            f"{os.environ['WORLD_SIZE']} processes were started, {together.num_processes} found"
            " each other"
        )
    return together


def _batch_size(recipe: EvalRecipe) -> Any:
    """`suite.batch_size`; a number in place of auto where there is no GPU whose memory could be
    tried.
    """
    import torch

    size = recipe.suite.batch_size
    return _CPU_BATCH if str(size).startswith("auto") and not torch.cuda.is_available() else size


def plain_command(recipe: EvalRecipe, target: Target) -> str:
    """Return the `lm_eval` line that gives the same numbers."""
    suite = recipe.suite
    flags: dict[str, object] = {  # True stands for a flag without a value
        "model": "hf",
        "model_args": _pairs(_named_arguments(target)),
        "tasks": ",".join(suite.tasks or []),
        "batch_size": _batch_size(recipe),
        "num_fewshot": suite.num_fewshot,
        "limit": suite.limit,
        "system_instruction": suite.system_instruction,
        "apply_chat_template": suite.apply_chat_template,
        "fewshot_as_multiturn": (
            "false" if suite.apply_chat_template and not suite.fewshot_as_multiturn else None
        ),
        "gen_kwargs": _pairs(suite.gen_kwargs or {}) or None,
        "include_path": _include_path(recipe),
        **{
            name: value
            for name, value in suite.options.items()
            if name in _CLI_OPTIONS and value not in (None, False)
        },
    }
    if any(name in suite.options for name in _SEEDS):
        seeds = (suite.options.get(name, default) for name, default in _SEEDS.items())
        flags["seed"] = ",".join(map(str, seeds))
    words = ["lm_eval", "run"]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    line, folder = shlex.join(words), recipe.data.folder
    if folder and (place := os.path.relpath(recipe.resolve("data.folder", folder))) != ".":
        line = f"(cd {shlex.quote(place)} && {line})"
    without = [name for name in suite.options if name not in (*_CLI_OPTIONS, *_SEEDS)]
    notes = [f"lm_eval has no flag for {', '.join(without)}"] if without else []
    if target.trained and (target.recipe.lora or {}).get("modules_to_save"):
        notes.append(
            "on a base with tied embeddings lm_eval ties the trained ones again: give it the merged"
            " model"
        )
    return f"{line}  # {'; '.join(notes)}" if notes else line


def _pairs(values: Mapping[str, Any]) -> str:
    if any(isinstance(value, dict) for value in values.values()):
        return json.dumps(values)  # lm_eval reads either form
    return ",".join(f"{key}={value}" for key, value in values.items())


def _named_arguments(target: Target) -> dict[str, object]:
    """lm-eval's model_args for a target."""
    section = target.recipe.model
    arguments: dict[str, object] = {"pretrained": model_path(section), "dtype": section.dtype}
    if section.revision:
        arguments["revision"] = section.revision
    if section.trust_remote_code:
        arguments["trust_remote_code"] = True
    if target.trained and target.recipe.lora is None:
        arguments["pretrained"] = str(target.trained.weights)
    elif target.trained:
        arguments |= {"peft": str(target.trained.weights), "tokenizer": str(target.trained.weights)}
    if kwargs := target.recipe.data.chat_template_kwargs:
        arguments["chat_template_args"] = dict(kwargs)
    quantization = target.recipe.quantization or {}
    return arguments | {
        key: value for key, value in quantization.items() if key.startswith(("load_in", "bnb_"))
    }


def _live_model(recipe: EvalRecipe, subject: Subject, together: Any) -> Any:
    """The loaded model as lm-eval takes it; as one of several processes it is told its share, which
    lm-eval itself only does on GPUs.
    """
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        assert subject.model is not None
        with _tied_as_trained(subject.model):
            model = HFLM(
                pretrained=subject.model,
                tokenizer=subject.prompts.tokenizer,
                batch_size=_batch_size(recipe),
                chat_template_args=dict(subject.target.recipe.data.chat_template_kwargs),
            )
    if together is not None:
        model.accelerator, model._rank, model._world_size = (
            together,
            together.process_index,
            together.num_processes,
        )
    return model


@contextlib.contextmanager
def _tied_as_trained(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying head and embeddings of a loaded model: with `lora.modules_to_save`
    they were trained apart.
    """
    model.__dict__["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]


def _run(recipe: EvalRecipe, subject: Subject, model: Any) -> EvalLog | None:
    """Evaluate one subject, keep lm-eval's files and return our log; None on other ranks than
    the first.
    """
    suite = recipe.suite
    folder = subject.run.path / "evals" / recipe.name
    settings = {
        name: getattr(suite, name) for name in PROTOCOL if name != "batch_size"
    } | suite.options
    command = plain_command(
        recipe, subject.target
    )  # on every rank: finding a packaged model is work that the ranks do together
    # Rounding depends on what shares a batch, so answers of another set of requests are not reused.
    requests = [suite.tasks, settings, _batch_size(recipe), os.environ.get("WORLD_SIZE", "1")]
    cache = folder / "cache" / hash_of(subject.fingerprint, requests)[:16]
    with (
        _quiet(),
        _inside(recipe) as own,
        _sandboxed(recipe),
        _missing_packages(recipe),
        subject.using() if subject.using else contextlib.nullcontext(),
    ):
        from lm_eval import simple_evaluate

        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(suite.tasks or []),
                task_manager=_task_manager(recipe, own),
                use_cache=str(cache),
                log_samples=True,
                **settings,
            )
        except TypeError as error:
            if "unexpected keyword" in str(error):
                raise recipe.error(
                    "suite.options", f"suite.options: {error}", "see lm_eval.simple_evaluate"
                ) from None
            raise
        except AssertionError as error:
            if str(error).startswith("Invalid configuration"):
                hint = "suite.gen_kwargs={max_gen_toks: N} asks for fewer, and cuts the answers"
                raise recipe.error("suite.gen_kwargs", first_line(error), hint) from None
            raise
        except (ConnectionError, FileNotFoundError) as error:
            reason = first_line(error)
            hint = (
                "offline: set data.folder to a folder that holds the data sets under their Hub"
                " names"
            )
            raise EnvironmentFault(f"a task's data cannot be loaded: {reason}", hint) from None
    if found is None:
        return None
    subject.record()
    return _keep(recipe, subject, dict(found), folder, command)


def _keep(
    recipe: EvalRecipe, subject: Subject, found: dict[str, Any], folder: Path, command: str
) -> EvalLog:
    """Write lm-eval's own results and samples as they are, and return our log."""
    from lm_eval.utils import handle_non_serializable

    samples = found.pop("samples", {})
    own = json.dumps(found, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n"
    write_text(folder / "lm_eval_results.json", own)
    for task, rows in samples.items():
        lines = (
            json.dumps(row, ensure_ascii=False, default=handle_non_serializable) + "\n"
            for row in rows
        )
        write_text(folder / "samples" / f"samples_{task}.jsonl", "".join(lines))
    limited = recipe.suite.limit is not None
    sizes = found.get("n-samples", {})
    whole = {task: size["original"] for task, size in sizes.items()}
    subset = (
        f"subset, limit={recipe.suite.limit} of {max(whole.values(), default=0)} per task at most"
        if limited
        else None
    )
    file, tasks = log_file(subject.run.path, recipe.name, None), _tasks(found, samples)
    measures = lm_eval_measures(
        recipe.name, file, tasks, lambda task: map(finite, samples.get(task, ()))
    )
    return EvalLog(
        suite="lm_eval",
        eval=recipe.name,
        target=subject.name,
        subset=subset,
        banners=[subset] if subset else [],
        answers=AnswerFacts(
            name=subject.name,
            models=[subject.target.recipe.model.name_or_path],
            fingerprint=subject.fingerprint,
            dtype=subject.target.recipe.model.dtype,
            quantized=subject.target.recipe.base_format is not None,
        ),
        tasks=tuple(tasks),
        protocol=(
            {name: getattr(recipe.suite, name) for name in PROTOCOL}
            | {"batch_size": _batch_size(recipe)}
            | recipe.suite.options
        ),
        lm_eval_command=command,
        numbers={"lm_eval_results": "lm_eval_results.json"},
        measures=tuple(measures),
        file=file,
    )


def _tasks(found: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> list[TaskScore]:
    """One row per task (or group) and metric: value, interval, n, few-shot protocol."""
    rows = []
    for task, metrics in found["results"].items():
        sizes = found.get("n-samples", {}).get(task, {})
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            scores = [
                row[metric]
                for row in samples.get(task, [])
                if row.get("filter", "none") == chosen
                and isinstance(row.get(metric), int | float | bool)
            ]
            error = metrics.get(f"{metric}_stderr,{chosen}")
            low, high, method = _interval(value, error, scores)
            rows.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=chosen,
                    value=value,
                    stderr=error if isinstance(error, int | float) else None,
                    low=low,
                    high=high,
                    interval=method,
                    n=sizes.get("effective", len(scores)),
                    num_fewshot=found.get("n-shot", {}).get(task),
                    version=found.get("versions", {}).get(task),
                    higher_is_better=metric_direction(found, task, metric),
                    parts=parts_of(found, task),
                )
            )
    return rows


def _interval(
    value: float, error: Any, scores: Sequence[float]
) -> tuple[float | None, float | None, str | None]:
    """An interval and its method: from the samples where the metric is their mean, else from
    lm-eval's standard error.
    """
    if scores and abs(sum(scores) / len(scores) - value) < 1e-9:
        whole = all(score in (0, 1) for score in scores)
        interval = (
            wilson(int(sum(scores)), len(scores))
            if whole
            else mean_interval([float(score) for score in scores])
        )
        if min(scores) >= 0 and max(scores) <= 1:
            interval = interval.within(0, 1)
        return interval.low, interval.high, interval.method
    if isinstance(error, int | float):
        return value - 1.96 * error, value + 1.96 * error, "1.96 standard errors of lm_eval"
    return None, None, None


def _task_manager(recipe: EvalRecipe, own: Path | None) -> Any:
    """lm-eval's task manager; its own tasks take ten seconds to index and are left out where the
    recipe's suffice.

    Args:
        own: folder of the recipe's tasks.
    """
    from lm_eval.tasks import TaskManager

    names = _task_names(own) if own else set()
    wanted = list(recipe.suite.tasks or [])
    manager = TaskManager(
        include_path=str(own) if own else None, include_defaults=not set(wanted) <= names
    )
    unknown = [name for name in wanted if not manager.match_tasks([name])]
    if unknown:
        raise recipe.error(
            "suite.tasks",
            f"lm-eval has no task '{unknown[0]}'",
            *did_you_mean(unknown[0], manager.all_tasks),
            "all tasks: lm_eval ls tasks",
        )
    if own and not recipe.generation.trust_remote_code:
        _check_metrics(manager, own)
    return manager


def _check_metrics(manager: Any, own: Path) -> None:
    """Refuse a metric that lm-eval does not have: it would load the code of one with that name from
    a folder or the Hub.
    """
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    for entry in manager.task_index.values():
        if entry.yaml_path and Path(entry.yaml_path).is_relative_to(own):
            for name in unknown_metrics(entry.cfg, metric_registry):
                raise RecipeError(
                    f"lm-eval has no metric '{name}' and would run the code of one",
                    ALLOW,
                    file=shown_path(entry.yaml_path),
                )


@contextlib.contextmanager
def _sandboxed(recipe: EvalRecipe) -> Iterator[None]:
    """Fill the templates of a recipe's own tasks in Jinja's sandbox, unless its code may run
    anyway: lm-eval's reach the whole process.
    """
    if not recipe.data.include_path or recipe.generation.trust_remote_code:
        yield
        return
    import lm_eval.utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import SandboxedEnvironment

    usual = lm_eval.utils.env
    safe = SandboxedEnvironment(
        loader=usual.loader,
        undefined=usual.undefined,
        keep_trailing_newline=usual.keep_trailing_newline,
    )
    safe.filters |= {
        name: usual.filters[name] for name in usual.filters.keys() - safe.filters.keys()
    }
    lm_eval.utils.env = safe
    try:
        yield
    except SecurityError as error:
        raise recipe.error(
            "data.include_path", f"a template of these tasks would run code: {error}", ALLOW
        ) from None
    finally:
        lm_eval.utils.env = usual


def check_punkt(recipe: EvalRecipe) -> None:
    """Fetch the tables with which IFEval finds the ends of sentences, where they are not here.

    lm-eval asks for them too, goes on without, and would fail after the last answer.

    Raises:
        EnvironmentFault: they cannot be had.
    """
    asked = [task for task in recipe.suite.tasks or () if "ifeval" in task or task == "leaderboard"]
    if not asked or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english")
    except ImportError:
        return  # the tasks say it with the other packages that they need
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            raise EnvironmentFault(
                f"{asked[0]} finds sentences with nltk's punkt_tab, which is not on this machine",
                "with a network: python -m nltk.downloader punkt_tab",
                "without: unpack punkt_tab.zip of nltk_data into ~/nltk_data/tokenizers, or into"
                " the same of a folder that NLTK_DATA names",
            ) from None


@contextlib.contextmanager
def _missing_packages(recipe: EvalRecipe) -> Iterator[None]:
    """Say in one line that the code of a task needs more than lm-eval brings."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentFault(
            f"{', '.join(recipe.suite.tasks or ())}: {first_line(error)}",
            "IFEval and MATH: pip install -c constraints.txt -e '.[chat-evals]'",
        ) from None


def load_tasks(recipe: EvalRecipe, remote_code: bool = False) -> int:
    """Build the tasks without a model, which fetches their data where it is not here yet; return
    the number of items.

    Args:
        remote_code: whether the command line allowed code of the tasks.

    Raises:
        RecipeError: a task that does not exist, or runs code that is not allowed.
        EnvironmentFault: a task's own code needs what is not installed.
    """
    check_allowed(recipe, remote_code)
    check_punkt(recipe)
    with _quiet(), _inside(recipe) as own, _sandboxed(recipe), _missing_packages(recipe):
        tasks = _task_manager(recipe, own).load(list(recipe.suite.tasks or []))["tasks"]
        return sum(len(task.eval_docs) for task in tasks.values())


def _include_path(recipe: EvalRecipe) -> Path | None:
    return (
        recipe.resolve("data.include_path", recipe.data.include_path).resolve()
        if recipe.data.include_path
        else None
    )


def _task_names(folder: Path) -> set[str]:
    """The tasks that a folder's files define."""
    names = set()
    for path in folder.rglob("*.yaml"):
        with contextlib.suppress(
            yaml.YAMLError, UnicodeDecodeError, OSError
        ):  # lm_eval says what is wrong with it
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
            names |= (
                {values["task"]}
                if isinstance(values, dict) and isinstance(values.get("task"), str)
                else set()
            )
    return names


class _AnyTag(yaml.SafeLoader):
    """Reads lm-eval's files without running the functions they name (`!function`)."""


_AnyTag.add_multi_constructor("", lambda loader, suffix, node: None)


@contextlib.contextmanager
def _inside(recipe: EvalRecipe) -> Iterator[Path | None]:
    """Work in `data.folder` while the tasks load; gives the folder of the recipe's own tasks, found
    from where the user stands.
    """
    own = _include_path(recipe)
    if not recipe.data.folder:
        yield own
        return
    folder = recipe.resolve("data.folder", recipe.data.folder)
    if not folder.is_dir():
        raise recipe.error("data.folder", f"data.folder: no such folder: {folder}")
    with contextlib.chdir(folder):
        yield own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log at errors."""
    import logging

    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            f"lm_eval cannot be imported: {error}", "pip install -e '.[eval]'"
        ) from None
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
