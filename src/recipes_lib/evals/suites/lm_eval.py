"""lm-eval through `simple_evaluate` on the loaded model, with the options of `lm_eval run`; its
results and samples are kept as they are. The printed command gives the same numbers.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes_lib.core.errors import EnvironmentFault, RecipesError, one_line
from recipes_lib.core.files import file_hash, hash_of, write_text
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import EvalLog, Metric, Sample, write_lines
from recipes_lib.evals.recipe import check_allowed
from recipes_lib.evals.suites import Suite, metric_of, shown_rate
from recipes_lib.weights.load import model_path

if TYPE_CHECKING:
    from recipes_lib.evals.models import Model
    from recipes_lib.evals.recipe import EvalRecipe

_SHARE = re.compile(r"(?:^|_)acc(?:$|_)|^exact_match|^em$|^mc[12]$|^pass@|^f1$|^contains$")
# in a task file: a file of rows, or a folder of them
_DATA = re.compile(r"([\w./-]+\.(?:jsonl?|csv|parquet)\b)|data(?:_dir|set_path): *[\"']?([\w./-]+)")
# instead of auto, which tries 64 rows of the model's whole context: minutes, and more memory than
# most machines have
_CPU_BATCH = 8
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


class LMEval(Suite):
    """lm-eval for the models of one eval recipe."""

    title = "lm-eval"

    def reads(self, model: Any) -> Any:
        """Return the hashes of the files of rows that task files of one's own name."""
        data = self.recipe.data
        tasks = sorted(Path(data.include_path).rglob("*.yaml")) if data.include_path else ()
        texts = [task.read_text("utf-8", "replace") for task in tasks]
        names = {name or folder for text in texts for name, folder in _DATA.findall(text)}
        places = [Path(data.folder or ".", name) for name in sorted(names)]
        files = [file for place in places for file in (place, *sorted(place.rglob("*")))]
        return [file_hash(file) for file in files if file.is_file()]

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        recipe, suite = self.recipe, self.recipe.suite
        folder = model.folder(recipe.name).resolve()
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        with _inside(recipe):
            from lm_eval import simple_evaluate
            from lm_eval.config.evaluate_config import EvaluatorConfig
            from lm_eval.models.huggingface import HFLM
            from lm_eval.utils import handle_non_serializable

            config = dict(**_config(recipe, model), **suite.options)
            file = folder / "lm_eval.yaml"
            write_text(file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            settings = asdict(EvaluatorConfig.from_config(file))
            # lm_eval (0.4.13) would tie a head and embeddings that were trained apart
            network.tie_weights = lambda *_, **__: None
            try:
                harness = HFLM(
                    pretrained=network,
                    tokenizer=model.tokenizer,
                    batch_size=config["batch_size"],
                    chat_template_args=dict(model.recipe.data.chat_template_kwargs),
                )
            finally:
                del network.tie_weights
            manager, tasks = _tasks(recipe)
            known = inspect.signature(simple_evaluate).parameters
            options = {name: value for name, value in settings.items() if name in known}
            options |= dict(zip(_SEEDS, settings["seed"] or [None] * 4, strict=True))
            options |= {"model": harness, "tasks": tasks, "task_manager": manager}
            # lm-eval's cache knows neither the model nor the batches, on which rounding depends
            cache = str(folder / "cache" / hash_of(model.fingerprint, config)[:16])
            results = simple_evaluate(**options | {"use_cache": cache, "log_samples": True})
        # as plain values, which is how lm_eval itself writes them
        results = json.loads(json.dumps(results, default=handle_non_serializable))
        samples = results.pop("samples", {})
        for task, rows in samples.items():
            write_lines(folder / "samples" / f"samples_{task}.jsonl", rows)
        own = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "lm_eval_results.json", own)
        metrics = tuple(metrics_of(results, samples))
        line = shlex.join(["lm_eval", "run", "--config", str(file)])
        if recipe.data.folder:
            line = f"(cd {shlex.quote(str(recipe.data.folder))} && {line})"
        return EvalLog(
            suite=suite.name,
            eval=recipe.name,
            n=sum(metric.n for metric in metrics if not metric.parts),
            subset=None if suite.limit is None else f"subset, limit={suite.limit} per task",
            metrics=metrics,
            lm_eval_command=f"{line}  # after recipes merge {model.name}"
            if _needs_merge(model)
            else line,
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


def load_tasks(recipe: EvalRecipe, remote_code: bool = False) -> int:
    """Build the tasks without a model, which fetches their data; return the number of items.

    Args:
        remote_code: whether the command line allowed code of the tasks.
    """
    check_allowed([recipe], remote_code)
    with _inside(recipe):
        manager, tasks = _tasks(recipe)
        return sum(len(task.eval_docs) for task in manager.load(tasks)["tasks"].values())


def _batch_size(recipe: EvalRecipe) -> Any:
    """`suite.batch_size`; a number in place of auto where there is no GPU to try its memory."""
    import torch

    size = recipe.suite.batch_size
    return _CPU_BATCH if str(size).startswith("auto") and not torch.cuda.is_available() else size


def _tasks(recipe: EvalRecipe) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and the tasks with their patterns filled in. Its own tasks take ten
    seconds to index: they are left out where the recipe's folder has each task and part of a group.
    """
    from lm_eval.tasks import TaskManager

    folder, tasks = recipe.data.include_path, recipe.suite.tasks or []
    manager = TaskManager(include_path=folder, include_defaults=False)

    def suffices(task: Any) -> bool:
        name = task.get("group") or task.get("task") if isinstance(task, dict) else task
        entry = manager.task_index.get(name)
        parts = (entry.cfg or {}).get("task") if entry and name in manager.all_groups else ()
        return entry is not None and all(map(suffices, parts or ()))

    if not all(map(suffices, tasks)):
        manager = TaskManager(include_path=folder)
    names = [name for task in tasks for name in manager.match_tasks([task]) or [task]]
    return manager, [*dict.fromkeys(names)]


@contextlib.contextmanager
def _inside(recipe: EvalRecipe) -> Iterator[None]:
    """Let lm-eval work in `data.folder`, its log at errors, and what it raises as one line."""
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
        where = f"; its task files are in {shown_path(Path(folder))}" if folder else ""
        raise recipe.document.error(
            "suite.tasks",
            f"lm-eval cannot run {names}: {type(error).__name__}: {one_line(error)}{where}",
            "lm-eval's own traceback: recipes --debug eval",
        ) from error
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

    def said_of(task: str, key: str) -> Any:
        return (results.get(key) or {}).get(task)

    def parts(group: str) -> list[str]:
        """Every task and group below a group; nothing of a task."""
        below = said_of(group, "group_subtasks") or ()
        return [name for part in below for name in (part, *parts(part))]

    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, pipeline = name.partition(",")
            if not pipeline or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            rows = [row for row in samples.get(task, ()) if row.get("filter", "none") == pipeline]
            rows = [row for row in rows if isinstance(row.get(metric), int | float)]
            items = [_sample(row, metric, task) for row in rows]
            scores = [item.value or 0.0 for item in items]
            in_range = all(0 <= score <= 1 for score in (*scores, value))
            unit: Any = "share" if _SHARE.search(metric) and in_range else "number"
            facts: dict[str, Any] = {
                "task": task,
                "higher_is_better": (said_of(task, "higher_is_better") or {}).get(metric),
                "parts": tuple(parts(task)),
                "num_fewshot": said_of(task, "n-shot"),
                "version": str(said_of(task, "versions") or "") or None,
            }
            key = metric if pipeline == "none" else f"{metric},{pipeline}"
            label = f"{task} {key.replace(',', ', ')}"
            if scores and abs(sum(scores) / len(scores) - value) <= 1e-6:
                yield metric_of(key, label, items, unit, **facts)
                continue
            # a corpus score, or a group
            if isinstance(error := values.get(f"{metric}_stderr,{pipeline}"), int | float):
                facts |= {"low": value - 1.96 * error, "high": value + 1.96 * error}
            count = (said_of(task, "n-samples") or {}).get("effective", 0)
            yield Metric(key, label, unit=unit, value=value, n=count, **facts)


def _sample(row: Mapping[str, Any], metric: str, task: str) -> Sample:
    """A sample of lm-eval's on one metric."""
    doc, value = row.get("doc") or {}, float(row[metric])
    return Sample(
        f"{row['doc_id']}:{str(row.get('doc_hash', ''))[:12]}",
        category=str(doc.get("subject") or doc.get("category") or task),
        value=value,
        outcome={1.0: "right", 0.0: "wrong"}.get(value, "scored"),
    )


# ---- the configuration that gives the same numbers ----


def _config(recipe: EvalRecipe, model: Model) -> dict[str, Any]:
    """What `lm_eval run --config` takes, without the recipe's own options."""
    suite = recipe.suite
    config = {
        "model": "hf",
        "model_args": _model_args(model),
        "tasks": suite.tasks,
        "num_fewshot": suite.num_fewshot,
        "limit": suite.limit,
        "batch_size": _batch_size(recipe),
        "apply_chat_template": suite.apply_chat_template,
        "include_path": recipe.data.include_path,
    }
    return {name: value for name, value in config.items() if value is not None}


def _model_args(model: Model) -> dict[str, Any]:
    section, trained = model.recipe.model, model.trained
    path, adapter = Path(model_path(section)), None
    if trained and (trained.full or _needs_merge(model)):
        path = (trained.weights if trained.full else trained.merged).resolve()
    elif trained:
        adapter = str(trained.weights.resolve())
    arguments = {
        "pretrained": str(path.resolve() if path.is_dir() else path),
        "dtype": section.dtype,
        "peft": adapter,
        "tokenizer": adapter,
        "revision": section.revision,
        "trust_remote_code": section.trust_remote_code,
        "chat_template_args": dict(model.recipe.data.chat_template_kwargs),
    }
    loading = model.recipe.quantization or {}
    arguments |= {key: loading[key] for key in loading if key.startswith(("load_in", "bnb_"))}
    return {key: value for key, value in arguments.items() if value}


def _needs_merge(model: Model) -> bool:
    """Whether lm_eval itself would tie a head that was trained apart."""
    return bool(model.trained and (model.recipe.lora or {}).get("modules_to_save"))
