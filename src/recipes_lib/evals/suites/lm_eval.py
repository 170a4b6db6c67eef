"""lm-eval through `simple_evaluate` on the loaded model: every option under lm_eval's own name, its
results and samples kept as they are. The printed command gives the same numbers.

lm-eval's cache is keyed without the model and without what shares a batch, so each model
fingerprint and set of requests has a cache of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.core.errors import (
    EnvironmentFault,
    RecipeError,
    RecipesError,
    one_line,
)
from recipes_lib.core.files import hash_of, write_text
from recipes_lib.core.lock import waiting_lock
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import AnswerFacts, EvalLog, Metric, Sample, log_file, write_lines
from recipes_lib.evals.models import Loaded, Model
from recipes_lib.evals.questions import check_allowed
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.evals.task_files import ALLOW, own_tasks, wrong_in_tasks
from recipes_lib.evals.verdicts import metric_of, number
from recipes_lib.weights.load import model_path

_SHARE = re.compile(r"(?:^|_)acc(?:$|_)|^exact_match|^em$|^mc[12]$|^pass@|^f1$|^contains$")
# instead of auto, which tries 64 rows of the model's whole context: minutes, and more memory than
# most machines have
_CPU_BATCH = 8
_SETTINGS = (
    "num_fewshot",
    "limit",
    "apply_chat_template",
    "system_instruction",
    "fewshot_as_multiturn",
    "gen_kwargs",
)
_OURS = ("model", "model_args", "tasks", "task_manager", "use_cache", "log_samples", "samples")
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


class LMEval:
    """lm-eval for the models of one eval recipe."""

    title = "lm-eval"

    def __init__(self, recipe: EvalRecipe) -> None:
        self.recipe = recipe
        if unknown := sorted(set(recipe.suite.options) & set(_OURS)):
            what = f"suite.options.{unknown[0]} is set by the eval recipe itself"
            raise recipe.error("suite.options", what)
        if recipe.generation.engine == "openai":
            hint = "run the printed command with --model local-completions, and compare its output"
            raise recipe.error("generation.engine", "lm_eval asks the weights here", hint)
        _need_punkt(recipe)

    def run(self, loaded: Loaded, key: str) -> EvalLog:
        """Return the log of one model.

        Raises:
            RecipeError: an unknown task or option, or a mistake in a task file.
            EnvironmentFault: lm-eval is not installed, or a data set cannot be had.
        """
        recipe, model = self.recipe, loaded.model
        folder = model.run.path / "evals" / recipe.name
        model.record()
        using = loaded.using() if loaded.using else contextlib.nullcontext()
        with waiting_lock(folder), _quiet(), _inside(recipe), using:
            found = self._evaluate(loaded, folder)
        samples = found.pop("samples", {})
        _keep(folder, found, samples)
        file = log_file(model.run.path, recipe.name, None)
        metrics = tuple(metrics_of(found, samples))
        limit = recipe.suite.limit
        subset = f"subset, limit={limit} per task" if limit is not None else None
        return EvalLog(
            suite=recipe.suite.name,
            eval=recipe.name,
            target=model.name,
            key=key,
            n=sum(one.n for one in metrics if not one.parts),
            subset=subset,
            banners=(subset,) if subset else (),
            metrics=metrics,
            answers=AnswerFacts(
                name=model.name,
                models=(model.recipe.model.name_or_path,),
                fingerprint=model.fingerprint,
                dtype=model.recipe.model.dtype,
                quantized=model.quantized,
            ),
            lm_eval_command=plain_command(recipe, model),
            file=file,
        )

    def _evaluate(self, loaded: Loaded, folder: Path) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        recipe, suite = self.recipe, self.recipe.suite
        settings = {name: getattr(suite, name) for name in _SETTINGS} | suite.options
        # Rounding depends on what shares a batch, so answers of another set are not reused.
        requests = [suite.tasks, settings, _batch_size(recipe)]
        cache = folder / "cache" / hash_of(loaded.model.fingerprint, requests)[:16]
        cache.parent.mkdir(parents=True, exist_ok=True)
        network = _harness_model(recipe, loaded)
        try:
            manager = _task_manager(recipe)
            found = simple_evaluate(
                model=network,
                tasks=list(suite.tasks or []),
                task_manager=manager,
                use_cache=str(cache),
                log_samples=True,
                **settings,
            )
        except RecipesError:
            raise
        except (ConnectionError, FileNotFoundError) as error:
            hint = (
                "offline: set data.folder to a folder that holds the data sets under their Hub"
                " names"
            )
            what = f"a task's data cannot be loaded: {one_line(error)}"
            raise EnvironmentFault(what, hint) from None
        except ImportError as error:
            names = ", ".join(suite.tasks or ())
            hint = "IFEval and MATH: pip install -c constraints.txt -e '.[chat-evals]'"
            raise EnvironmentFault(f"{names}: {one_line(error)}", hint) from None
        except Exception as error:  # lm-eval raises what its tasks, filters and metrics raise
            raise _explained(recipe, error) from error
        return dict(found)

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [["task", "metric", "few-shot", "n", *(log.target for log in logs)]]
        found = [{(one.task, one.metric): one for one in log.metrics} for log in logs]
        for key in dict.fromkeys(key for table in found for key in table):
            cells = [table.get(key) for table in found]
            first = next(cell for cell in cells if cell)
            shots = "-" if first.num_fewshot is None else str(first.num_fewshot)
            rows.append([*key, shots, str(first.n), *map(_score, cells)])
        return aligned(rows)


def _score(one: Metric | None) -> str:
    if one is None:
        return "-"
    limits = "" if one.low is None else f" [{number(one.low, 3)}, {number(one.high, 3)}]"
    return f"{number(one.value, 4)}{limits}"


def _batch_size(recipe: EvalRecipe) -> Any:
    """`suite.batch_size`; a number in place of auto where there is no GPU whose memory could be
    tried.
    """
    import torch

    size = recipe.suite.batch_size
    return _CPU_BATCH if str(size).startswith("auto") and not torch.cuda.is_available() else size


def _harness_model(recipe: EvalRecipe, loaded: Loaded) -> Any:
    """The loaded model as lm-eval takes it.

    Raises:
        RecipeError: lm-eval would tie a head and embeddings that were trained apart.
    """
    from lm_eval.models.huggingface import HFLM

    network, model = loaded.network, loaded.model
    head = network.get_output_embeddings()
    before = head.weight.data_ptr() if head is not None else None
    harness = HFLM(
        pretrained=network,
        tokenizer=model.prompts.tokenizer,
        batch_size=_batch_size(recipe),
        chat_template_args=dict(model.recipe.data.chat_template_kwargs),
    )
    head = network.get_output_embeddings()
    if head is not None and head.weight.data_ptr() != before:  # lm_eval 0.4.13 ties what it gets
        what = f"lm_eval would tie {model.name}'s head and embeddings, which were trained apart"
        hint = f"recipes merge {model.name}, then evaluate {shown_path(model.run.path / 'merged')}"
        raise RecipeError(what, hint)
    return harness


def _task_manager(recipe: EvalRecipe) -> Any:
    """lm-eval's task manager; its own tasks take ten seconds to index and are left out where the
    recipe's suffice.
    """
    from lm_eval.tasks import TaskManager

    own = Path(recipe.data.include_path).resolve() if recipe.data.include_path else None
    names = own_tasks(own) if own else {}
    wanted = list(recipe.suite.tasks or [])
    manager = TaskManager(
        include_path=str(own) if own else None, include_defaults=not set(wanted) <= names.keys()
    )
    unknown = [name for name in wanted if not manager.match_tasks([name])]
    if unknown:
        hints = (*did_you_mean(unknown[0], manager.all_tasks), "all tasks: lm_eval ls tasks")
        raise recipe.error("suite.tasks", f"lm-eval has no task '{unknown[0]}'", *hints)
    if not recipe.generation.trust_remote_code:
        _check_metrics(names)
    return manager


def _check_metrics(tasks: Mapping[str, tuple[Path, dict[str, Any]]]) -> None:
    """Refuse a metric that lm-eval does not have: it would load the code of one with that name from
    a folder or the Hub.
    """
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    for path, values in tasks.values():
        for one in values.get("metric_list") or ():
            name = one.get("metric") if isinstance(one, dict) else None
            if isinstance(name, str) and name not in metric_registry:
                near = did_you_mean(name, list(metric_registry))
                what = f"lm-eval has no metric '{name}' and would run the code of one"
                raise RecipeError(what, *near, ALLOW, file=shown_path(path))


def _explained(recipe: EvalRecipe, error: Exception) -> RecipeError:
    """Say in one line what a task, an option or lm-eval itself has against the evaluation."""
    text = one_line(error)
    if isinstance(error, TypeError) and "unexpected keyword" in text:
        hint = "see lm_eval.simple_evaluate"
        return recipe.error("suite.options", f"suite.options: {text}", hint)
    if isinstance(error, AssertionError) and text.startswith("Invalid configuration"):
        hint = "suite.gen_kwargs={max_gen_toks: N} asks for fewer, and cuts the answers"
        return recipe.error("suite.gen_kwargs", text, hint)
    folder = recipe.data.include_path
    if folder:
        base = Path(recipe.data.folder) if recipe.data.folder else Path.cwd()
        for found in wrong_in_tasks(recipe.suite.tasks or (), Path(folder), base):
            return found
    names = ", ".join(recipe.suite.tasks or ())
    what = f"lm-eval cannot run {names}: {type(error).__name__}: {text}"
    hint = f"the task files are in {shown_path(Path(folder))}" if folder else "see lm_eval's docs"
    return recipe.error("suite.tasks", what, hint, "lm-eval's own traceback: recipes --debug eval")


def _keep(
    folder: Path, found: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write lm-eval's own results and samples as they are."""
    from lm_eval.utils import handle_non_serializable

    own = json.dumps(found, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n"
    write_text(folder / "lm_eval_results.json", own)
    for task, rows in samples.items():
        plain = (json.loads(json.dumps(row, default=handle_non_serializable)) for row in rows)
        write_lines(folder / "samples" / f"samples_{task}.jsonl", plain)


def metrics_of(
    found: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[Metric]:
    """Yield one metric per task (or group), metric and filter of lm-eval's results."""
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            items = [
                item
                for row in samples.get(task, ())
                if row.get("filter", "none") == chosen and (item := scored(row, metric, task))
            ]
            values_ = [item.value for item in items if item.value is not None]
            is_mean = values_ and abs(sum(values_) / len(values_) - value) <= 1e-6
            in_range = all(0 <= one <= 1 for one in (*values_, value))
            shown_name = metric if chosen == "none" else f"{metric}, {chosen}"
            label = f"{task} {shown_name}"
            known: dict[str, Any] = {
                "task": task,
                "higher_is_better": direction(found, task, metric),
                "parts": tuple(parts_of(found, task)),
                "num_fewshot": (found.get("n-shot") or {}).get(task),
                "version": str((found.get("versions") or {}).get(task, "")) or None,
            }
            unit: Any = "share" if _SHARE.search(metric) and in_range else "number"
            key = metric if chosen == "none" else f"{metric},{chosen}"
            if is_mean:
                yield metric_of(key, label, items, unit, **known)
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            half = 1.96 * error if isinstance(error, int | float) else None
            count = ((found.get("n-samples") or {}).get(task) or {}).get("effective", 0)
            yield Metric(
                key,
                label,
                unit=unit,
                value=value,
                low=None if half is None else value - half,
                high=None if half is None else value + half,
                n=count,
                **known,
            )


def scored(row: Mapping[str, Any], metric: str, task: str) -> Sample | None:
    """Return a sample of lm-eval's on one metric; None where it has no number there."""
    value = row.get(metric)
    if not isinstance(value, int | float):
        return None
    outcome = {1.0: "right", 0.0: "wrong"}.get(float(value), "scored")
    doc = row.get("doc") or {}
    category = str(doc.get("subject") or doc.get("category") or task)
    name = f"{row['doc_id']}:{str(row.get('doc_hash', ''))[:12]}"
    return Sample(name, category=category, value=float(value), outcome=outcome)


def parts_of(found: Mapping[str, Any], group: str) -> list[str]:
    """Return every task and group below a group of lm-eval's results; nothing of a task.

    Example:
        >>> parts_of({"group_subtasks": {"mmlu": ["stem"], "stem": ["physics"]}}, "mmlu")
        ['stem', 'physics']
    """
    below = (found.get("group_subtasks") or {}).get(group) or ()
    return [name for part in below for name in (part, *parts_of(found, part))]


def direction(found: Mapping[str, Any], task: str, metric: str) -> bool | None:
    """Return whether more of a metric is better, as lm-eval's results say it; None where they do
    not: their own table of directions counts, then the metric list of the task's config.
    """
    known = [((found.get("higher_is_better") or {}).get(task) or {}).get(metric)]
    listed = ((found.get("configs") or {}).get(task) or {}).get("metric_list") or ()
    known += [
        one.get("higher_is_better")
        for one in listed
        if isinstance(one, Mapping) and one.get("metric") == metric
    ]
    return next((found_ for found_ in known if isinstance(found_, bool)), None)


# ---- the command that gives the same numbers ----


def plain_command(recipe: EvalRecipe, model: Model) -> str:
    """Return the `lm_eval` line that gives the same numbers."""
    suite = recipe.suite
    flags: dict[str, object] = {  # True stands for a flag without a value
        "model": "hf",
        "model_args": _text(_model_args(model)),
        "tasks": ",".join(suite.tasks or []),
        "batch_size": _batch_size(recipe),
        "num_fewshot": suite.num_fewshot,
        "limit": suite.limit,
        "system_instruction": suite.system_instruction,
        "apply_chat_template": suite.apply_chat_template,
        "gen_kwargs": _text(suite.gen_kwargs or {}) or None,
        "include_path": recipe.data.include_path,
        **{name: suite.options[name] for name in _CLI_OPTIONS if name in suite.options},
    }
    if suite.apply_chat_template and not suite.fewshot_as_multiturn:
        flags["fewshot_as_multiturn"] = "false"
    if any(name in suite.options for name in _SEEDS):
        seeds = (suite.options.get(name, default) for name, default in _SEEDS.items())
        flags["seed"] = ",".join(map(str, seeds))
    words = ["lm_eval", "run"]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    line = shlex.join(words)
    folder = recipe.data.folder
    if folder and (place := os.path.relpath(folder)) != ".":
        line = f"(cd {shlex.quote(place)} && {line})"
    without = [name for name in suite.options if name not in (*_CLI_OPTIONS, *_SEEDS)]
    return f"{line}  # lm_eval has no flag for {', '.join(without)}" if without else line


def _text(values: Mapping[str, Any]) -> str:
    if any(isinstance(value, dict) for value in values.values()):
        return json.dumps(values)  # lm_eval reads either form
    return ",".join(f"{key}={value}" for key, value in values.items())


def _model_args(model: Model) -> dict[str, object]:
    """lm-eval's model_args for a model."""
    section, trained = model.recipe.model, model.trained
    arguments: dict[str, object] = {"pretrained": model_path(section), "dtype": section.dtype}
    if section.revision:
        arguments["revision"] = section.revision
    if section.trust_remote_code:
        arguments["trust_remote_code"] = True
    if trained and trained.full:
        arguments["pretrained"] = str(trained.weights)
    elif trained:
        arguments |= {"peft": str(trained.weights), "tokenizer": str(trained.weights)}
    if kwargs := model.recipe.data.chat_template_kwargs:
        arguments["chat_template_args"] = dict(kwargs)
    return arguments | {
        key: value
        for key, value in (model.recipe.quantization or {}).items()
        if key.startswith(("load_in", "bnb_"))
    }


# ---- surroundings ----


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
    _need_punkt(recipe)
    with _quiet(), _inside(recipe):
        try:
            tasks = _task_manager(recipe).load(list(recipe.suite.tasks or []))["tasks"]
        except ImportError as error:
            raise EnvironmentFault(one_line(error), "pip install -e '.[chat-evals]'") from None
        return sum(len(task.eval_docs) for task in tasks.values())


def _need_punkt(recipe: EvalRecipe) -> None:
    """Fetch the tables with which IFEval finds the ends of sentences: lm-eval goes on without them
    and fails after the last answer.

    Raises:
        EnvironmentFault: they cannot be had.
    """
    if not any("ifeval" in task or task == "leaderboard" for task in recipe.suite.tasks or ()):
        return
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english")
    except ImportError:
        return  # the task says it with the other packages that it needs
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            what = "ifeval needs nltk's punkt_tab, which is not on this machine"
            raise EnvironmentFault(
                what, "with a network: python -m nltk.downloader punkt_tab"
            ) from (None)


@contextlib.contextmanager
def _inside(recipe: EvalRecipe) -> Iterator[None]:
    """Work in `data.folder` while the tasks load and run."""
    with contextlib.chdir(recipe.data.folder) if recipe.data.folder else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log at errors."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        what = f"lm_eval cannot be imported: {error}"
        raise EnvironmentFault(what, "pip install -e '.[eval]'") from None
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
