"""lm-eval through `simple_evaluate` on the loaded model: every option under lm_eval's own name, its
results and samples kept as they are. The printed command gives the same numbers: it reads
lm_eval.yaml, which lies beside the result.

lm-eval's cache is keyed without the model and without what shares a batch, so each model
fingerprint and set of requests has a cache of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes_lib.config.documents import did_you_mean
from recipes_lib.core.errors import EnvironmentFault, RecipesError, one_line
from recipes_lib.core.files import hash_of, write_text
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import EvalLog, Metric, Sample, write_lines
from recipes_lib.evals.questions import check_allowed
from recipes_lib.evals.suites import Suite
from recipes_lib.evals.task_files import metrics_in
from recipes_lib.evals.verdicts import metric_of, shown_rate
from recipes_lib.weights.load import model_path

if TYPE_CHECKING:
    from recipes_lib.evals.models import Loaded, Model
    from recipes_lib.evals.recipe import EvalRecipe

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
# keywords of simple_evaluate that are one key of lm_eval's file, with its defaults
_SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}


class LMEval(Suite, name="lm_eval"):
    """lm-eval for the models of one eval recipe."""

    title = "lm-eval"

    def prepare(self, models: Sequence[Model]) -> None:
        """Refuse a server: lm-eval has engines of its own for that."""
        if self.recipe.generation.engine == "openai":
            hint = "run lm_eval with --model local-completions; recipes compare reads its output"
            raise self.recipe.error("generation.engine", "lm_eval asks the weights here", hint)

    def measure(self, loaded: Loaded) -> EvalLog:
        """Return the log of one model.

        Raises:
            RecipeError: an unknown task or option, or a mistake in a task file.
            EnvironmentFault: lm-eval is not installed, or a data set cannot be had.
        """
        recipe, model = self.recipe, loaded.model
        suite, folder = recipe.suite, model.folder(recipe.name).resolve()
        settings = {name: getattr(suite, name) for name in _SETTINGS} | suite.options
        # rounding depends on what shares a batch, so answers of another set are not reused
        requests = [suite.tasks, settings, _batch_size(recipe)]
        cache = folder / "cache" / hash_of(model.fingerprint, requests)[:16]
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _inside(recipe):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.utils import handle_non_serializable

            with _untied(loaded.network):
                network = HFLM(
                    pretrained=loaded.network,
                    tokenizer=model.prompts.tokenizer,
                    batch_size=_batch_size(recipe),
                    chat_template_args=dict(model.recipe.data.chat_template_kwargs),
                )
            results = simple_evaluate(
                model=network,
                tasks=suite.tasks,
                task_manager=_task_manager(recipe),
                use_cache=str(cache),
                log_samples=True,
                **settings,
            )
        # as plain values, which is how lm_eval itself writes them
        results = json.loads(json.dumps(results, default=handle_non_serializable))
        samples = results.pop("samples", {})
        for task, rows in samples.items():
            write_lines(folder / "samples" / f"samples_{task}.jsonl", rows)
        own = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "lm_eval_results.json", own)
        metrics = tuple(metrics_of(results, samples))
        return EvalLog(
            suite=suite.name,
            eval=recipe.name,
            n=sum(metric.n for metric in metrics if not metric.parts),
            subset=None if suite.limit is None else f"subset, limit={suite.limit} per task",
            metrics=metrics,
            lm_eval_command=_write_command(recipe, model, folder / "lm_eval.yaml"),
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [["task", "metric", "few-shot", "n", *(log.target for log in logs)]]
        tables = [{(metric.task, metric.metric): metric for metric in log.metrics} for log in logs]
        for key in dict.fromkeys(key for table in tables for key in table):
            cells = [table.get(key) for table in tables]
            first = next(cell for cell in cells if cell)
            shots = "-" if first.num_fewshot is None else str(first.num_fewshot)
            shown = [shown_rate(cell, 4, "number") if cell else "-" for cell in cells]
            rows.append([*key, shots, str(first.n), *shown])
        return aligned(rows)


def _batch_size(recipe: EvalRecipe) -> Any:
    """`suite.batch_size`; a number in place of auto where there is no GPU to try its memory."""
    import torch

    size = recipe.suite.batch_size
    return _CPU_BATCH if str(size).startswith("auto") and not torch.cuda.is_available() else size


@contextlib.contextmanager
def _untied(network: Any) -> Iterator[None]:
    """Keep lm_eval (0.4.13) from tying a head and embeddings that were trained apart: it calls
    `tie_weights` on what it is given.
    """
    configs = (network.config, network.config.get_text_config())
    before = [getattr(config, "tie_word_embeddings", False) for config in configs]
    for config in configs:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.tie_word_embeddings = value


def _task_manager(recipe: EvalRecipe) -> Any:
    """lm-eval's task manager; its own tasks take ten seconds to index and are left out where the
    recipe's suffice.
    """
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import TaskManager

    folder, tasks = recipe.data.include_path, recipe.suite.tasks or []
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            hints = (*did_you_mean(task, manager.all_tasks), "all tasks: lm_eval ls tasks")
            raise recipe.error("suite.tasks", f"lm-eval has no task '{task}'", *hints)
    if folder and not recipe.generation.trust_remote_code:
        for metric, error in metrics_in(Path(folder)):
            if metric not in metric_registry:
                raise error
    return manager


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
    with _inside(recipe):
        tasks = _task_manager(recipe).load(recipe.suite.tasks or [])["tasks"]
        return sum(len(task.eval_docs) for task in tasks.values())


@contextlib.contextmanager
def _inside(recipe: EvalRecipe) -> Iterator[None]:
    """Let lm-eval work: in `data.folder`, its log at errors, and whatever a task, an option or
    lm-eval itself raises told in a line.
    """
    names, folder = ", ".join(recipe.suite.tasks or ()), recipe.data.include_path
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.chdir(recipe.data.folder or "."):
            yield
    except RecipesError:
        raise
    except ImportError as error:
        hint = "pip install -e '.[eval]'; IFEval and MATH also need '.[chat-evals]'"
        raise EnvironmentFault(f"{names}: {one_line(error)}", hint) from None
    except (ConnectionError, FileNotFoundError) as error:
        hint = "files are meant from data.folder, where a folder can also stand in for a Hub name"
        raise EnvironmentFault(f"{names}: cannot load data: {one_line(error)}", hint) from None
    except Exception as error:  # lm-eval raises what its tasks, filters and metrics raise
        text = f"{type(error).__name__}: {one_line(error)}"
        key, hint = "suite.tasks", "lm-eval's own traceback: recipes --debug eval"
        if isinstance(error, TypeError) and "simple_evaluate" in text:
            key, hint = "suite.options", "see lm_eval.simple_evaluate"
        elif isinstance(error, AssertionError) and "max_gen_toks" in text:
            key, hint = "suite.gen_kwargs", "suite.gen_kwargs={max_gen_toks: N} asks for fewer"
        where = f"; its task files are in {shown_path(Path(folder))}" if folder else ""
        raise recipe.error(key, f"lm-eval cannot run {names}: {text}{where}", hint) from error
    finally:
        logging.disable(before)


# ---- results ----


def metrics_of(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[Metric]:
    """Yield one metric per task (or group), metric and filter of lm-eval's results.

    Args:
        results: the content of lm-eval's results file.
        samples: the rows of its samples files by task.
    """
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, pipeline = name.partition(",")
            if not pipeline or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            items = [
                item
                for row in samples.get(task, ())
                if row.get("filter", "none") == pipeline and (item := _sample(row, metric, task))
            ]
            known = [item.value for item in items if item.value is not None]
            in_range = all(0 <= number <= 1 for number in (*known, value))
            unit: Any = "share" if _SHARE.search(metric) and in_range else "number"
            suffix = "" if pipeline == "none" else pipeline
            facts: dict[str, Any] = {
                "task": task,
                "higher_is_better": _direction(results, task, metric),
                "parts": tuple(_parts(results, task)),
                "num_fewshot": (results.get("n-shot") or {}).get(task),
                "version": str((results.get("versions") or {}).get(task, "")) or None,
            }
            key = f"{metric},{suffix}" if suffix else metric
            label = f"{task} {metric}, {suffix}" if suffix else f"{task} {metric}"
            if known and abs(sum(known) / len(known) - value) <= 1e-6:
                yield metric_of(key, label, items, unit, **facts)
                continue
            error = values.get(f"{metric}_stderr,{pipeline}")  # a corpus score, or a group
            half = 1.96 * error if isinstance(error, int | float) else None
            yield Metric(
                key,
                label,
                unit=unit,
                value=value,
                low=None if half is None else value - half,
                high=None if half is None else value + half,
                n=((results.get("n-samples") or {}).get(task) or {}).get("effective", 0),
                **facts,
            )


def _sample(row: Mapping[str, Any], metric: str, task: str) -> Sample | None:
    """A sample of lm-eval's on one metric; None where it has no number there."""
    value = row.get(metric)
    if not isinstance(value, int | float):
        return None
    doc = row.get("doc") or {}
    return Sample(
        f"{row['doc_id']}:{str(row.get('doc_hash', ''))[:12]}",
        category=str(doc.get("subject") or doc.get("category") or task),
        value=float(value),
        outcome={1.0: "right", 0.0: "wrong"}.get(float(value), "scored"),
    )


def _parts(results: Mapping[str, Any], group: str) -> list[str]:
    """Every task and group below a group; nothing of a task."""
    below = (results.get("group_subtasks") or {}).get(group) or ()
    return [name for part in below for name in (part, *_parts(results, part))]


def _direction(results: Mapping[str, Any], task: str, metric: str) -> bool | None:
    """Whether more of a metric is better, by the results' table of directions or the task's own
    metrics; None where neither says it.
    """
    listed = ((results.get("configs") or {}).get(task) or {}).get("metric_list") or ()
    own = [entry.get("higher_is_better") for entry in listed if entry.get("metric") == metric]
    table = (results.get("higher_is_better") or {}).get(task) or {}
    return next((value for value in (table.get(metric), *own) if isinstance(value, bool)), None)


# ---- the command that gives the same numbers ----


def _write_command(recipe: EvalRecipe, model: Model, file: Path) -> str:
    """Write lm_eval's configuration, and return the line that runs it."""
    suite = recipe.suite
    config: dict[str, Any] = {"model": "hf", "model_args": _model_args(model), "tasks": suite.tasks}
    config |= {name: getattr(suite, name) for name in _SETTINGS}
    config |= {"batch_size": _batch_size(recipe), "include_path": recipe.data.include_path}
    if not suite.apply_chat_template:
        del config["fewshot_as_multiturn"]
    others = {name: value for name, value in suite.options.items() if name not in _SEEDS}
    if len(others) < len(suite.options):
        config["seed"] = [suite.options.get(name, usual) for name, usual in _SEEDS.items()]
    without = sorted(others.keys() & {"bootstrap_iters"})
    config |= {name: value for name, value in others.items() if name not in without}
    config = {name: value for name, value in config.items() if value is not None}
    write_text(file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    line = shlex.join(["lm_eval", "run", "--config", str(file)])
    if recipe.data.folder:
        line = f"(cd {shlex.quote(str(recipe.data.folder))} && {line})"
    notes = [f"lm_eval has no option for {', '.join(without)}"] if without else []
    if _needs_merge(model):
        notes.append(f"after recipes merge {model.name}")
    return f"{line}  # {'; '.join(notes)}" if notes else line


def _model_args(model: Model) -> dict[str, Any]:
    """lm-eval's model_args for a model."""
    section, trained = model.recipe.model, model.trained
    arguments: dict[str, Any] = {"pretrained": model_path(section), "dtype": section.dtype}
    if trained and trained.full:
        arguments["pretrained"] = trained.weights
    elif trained and _needs_merge(model):
        arguments["pretrained"] = trained.merged
    elif trained:
        arguments["peft"] = arguments["tokenizer"] = str(trained.weights.resolve())
    if Path(arguments["pretrained"]).is_dir() or trained:
        arguments["pretrained"] = str(Path(arguments["pretrained"]).resolve())
    if section.revision:
        arguments["revision"] = section.revision
    if section.trust_remote_code:
        arguments["trust_remote_code"] = True
    if kwargs := model.recipe.data.chat_template_kwargs:
        arguments["chat_template_args"] = dict(kwargs)
    quantization = model.recipe.quantization or {}
    return arguments | {
        key: value for key, value in quantization.items() if key.startswith(("load_in", "bnb_"))
    }


def _needs_merge(model: Model) -> bool:
    """Whether lm_eval would tie what an adapter trained apart."""
    return bool(model.trained and (model.recipe.lora or {}).get("modules_to_save"))
