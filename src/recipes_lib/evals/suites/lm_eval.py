"""lm-eval through `simple_evaluate` on the loaded model, with the options of `lm_eval run`. The
printed command gives the same numbers.
"""

import contextlib
import inspect
import json
import logging
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.core.errors import EnvironmentFault, RecipesError, missing_extra, one_line
from recipes_lib.core.files import hash_of, write_json, write_text
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import EvalLog, Metric, Sample, write_lines
from recipes_lib.evals.models import Model
from recipes_lib.evals.recipe import EvalRecipe, check_allowed
from recipes_lib.evals.suites import Suite, metric_of, shown_rate
from recipes_lib.weights.load import model_path

_SHARE = re.compile(r"(?:^|_)acc(?:$|_)|^exact_match|^em$|^mc[12]$|^pass@|^f1$|^contains$")
# instead of auto, which tries 64 rows of the model's whole context: minutes, and more memory than
# most machines have
_CPU_BATCH = 8
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


class LMEval(Suite):
    """lm-eval for the models of one eval recipe."""

    title = "lm-eval"

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        recipe = self.recipe
        folder = model.folder(recipe.name).resolve()
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        # lm_eval (0.4.13) would tie a head and embeddings that were trained apart
        needs_merge = bool(model.trained and (model.recipe.lora or {}).get("modules_to_save"))
        config = _config(recipe, model, needs_merge)
        config_file = folder / "lm_eval.yaml"
        with _inside(recipe):
            from lm_eval.utils import handle_non_serializable

            config = dict(**config, **recipe.suite.options)  # an error where a key is in both
            write_text(config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            # lm-eval's cache knows neither the model nor the batches, on which rounding depends
            cache = folder / "cache" / hash_of(model.fingerprint, config)[:16]
            results = _evaluated(recipe, model, network, config_file, cache)
        # as plain values, which is how lm_eval itself writes them
        results = json.loads(json.dumps(results, default=handle_non_serializable))
        samples = results.pop("samples", {})
        for task, rows in samples.items():
            write_lines(folder / "samples" / f"samples_{task}.jsonl", rows)
        write_json(folder / "lm_eval_results.json", results)

        metrics = tuple(metrics_of(results, samples))
        num_items = {metric.task: metric.n for metric in metrics if not metric.parts}
        command = shlex.join(["lm_eval", "run", "--config", str(config_file)])
        if recipe.data.folder:
            command = f"(cd {shlex.quote(str(recipe.data.folder))} && {command})"
        if needs_merge:
            command += f"  # after recipes merge {model.name}"
        subset = None
        counts = (results.get("n-samples") or {}).values()
        num_asked = sum(count.get("effective", 0) for count in counts)
        num_all = sum(count.get("original", 0) for count in counts)
        if recipe.suite.limit is not None:
            subset = f"subset, limit={recipe.suite.limit} per task"
        elif num_asked < num_all:  # by the option `samples`
            subset = f"subset, {num_asked} chosen items of {num_all}"
        n = sum(num_items.values())
        return self.new_log(metrics, n=n, subset=subset, lm_eval_command=command)

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [["task", "metric", "few-shot", "n", *(log.target for log in logs)]]
        metrics: dict[tuple[str, str], dict[str, Metric]] = defaultdict(dict)  # by the model
        for log in logs:
            for metric in log.metrics:
                metrics[metric.task, metric.metric][log.target] = metric
        for (task, name), by_model in metrics.items():
            first = next(iter(by_model.values()))
            shots = "-" if first.num_fewshot is None else str(first.num_fewshot)
            row = [task, name, shots, str(first.n)]
            for log in logs:
                of_model = by_model.get(log.target)
                row.append(shown_rate(of_model, 4, "number") if of_model else "-")
            rows.append(row)
        return aligned(rows)


def _evaluated(
    recipe: EvalRecipe, model: Model, network: Any, config_file: Path, cache: Path
) -> dict[str, Any]:
    """What `simple_evaluate` returns for a loaded model, asked as the command with this file is."""
    from lm_eval import simple_evaluate
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.models.huggingface import HFLM

    settings = asdict(EvaluatorConfig.from_config(config_file))
    # HFLM ties a head to the embeddings as it takes a network over
    network.tie_weights = lambda *_, **__: None
    try:
        harness = _short_probes(HFLM)(
            pretrained=network,
            tokenizer=model.tokenizer,
            batch_size=settings["batch_size"],
            # else lm_eval (0.4.13) turns off the autocast that it runs inside
            mixed_precision_dtype=settings["model_args"].get("mixed_precision_dtype"),
            chat_template_args=dict(model.recipe.data.chat_template_kwargs),
        )
    finally:
        del network.tie_weights
    manager, tasks = _tasks(recipe)
    parameters = inspect.signature(simple_evaluate).parameters
    options = {name: value for name, value in settings.items() if name in parameters}
    options |= dict(zip(_SEEDS, settings["seed"] or [None] * 4, strict=True))
    options |= {"model": harness, "tasks": tasks, "task_manager": manager}
    options |= {"use_cache": str(cache), "log_samples": True}
    return simple_evaluate(**options)


def load_tasks(recipe: EvalRecipe, remote_code: bool = False) -> int:
    """Build the tasks without a model, which fetches their data; return the number of items."""
    check_allowed([recipe], remote_code)
    with _inside(recipe):
        manager, tasks = _tasks(recipe)
        return sum(len(task.eval_docs) for task in manager.load(tasks)["tasks"].values())


def _tasks(recipe: EvalRecipe) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and the tasks with their patterns filled in. lm-eval's own tasks take
    ten seconds to index: they are left out where the recipe's folder has all that is asked for.
    """
    from lm_eval.tasks import TaskManager

    folder = recipe.data.include_path
    tasks = recipe.suite.tasks or []
    manager = TaskManager(include_path=folder, include_defaults=False)
    # a group of the folder may have tasks of lm-eval
    complete = manager.task_index.keys() - set(manager.all_groups)
    if not complete.issuperset(tasks):
        manager = TaskManager(include_path=folder)
    names: dict[str, None] = {}
    for task in tasks:
        names |= dict.fromkeys(manager.match_tasks([task]) or [task])
    return manager, list(names)


@contextlib.contextmanager
def _inside(recipe: EvalRecipe) -> Iterator[None]:
    """Let lm-eval work in `data.folder`, its log at errors, and what it raises as one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.chdir(recipe.data.folder or "."):
            yield
    except RecipesError:
        raise
    except Exception as error:  # lm-eval raises what its tasks, filters and metrics raise
        fault = missing_extra(error)
        if fault is not None:
            raise fault from error
        names = ", ".join(recipe.suite.tasks or ())
        what = f"lm-eval cannot run {names}: {type(error).__name__}: {one_line(error)}"
        hint = "lm-eval's traceback: recipes --debug eval; IFEval and MATH need '.[chat-evals]'"
        if isinstance(error, ImportError | ConnectionError | FileNotFoundError):
            raise EnvironmentFault(what, hint) from error
        raise recipe.document.error("suite.tasks", what, hint) from error
    finally:
        logging.disable(before)


def _short_probes(harness: type[Any]) -> type[Any]:
    """lm-eval's model whose `batch_size: auto` tries batches as long as the requests, where lm_eval
    (0.4.13) tries the model's whole context for generation: with 131,072 tokens it ends at batches
    of 1, whatever the requests need.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    class ShortProbes(harness):
        longest: int | None = None  # tokens of the longest request, with the answer to generate
        _max_length: int | None

        def generate_until(self, requests: Sequence[Any], *args: Any, **options: Any) -> Any:
            def length(request: Any) -> int:
                prompt, generation = request.args
                limits = normalize_gen_kwargs(dict(generation), self.max_gen_toks)
                return len(self.tok_encode(prompt)) + int(limits["max_gen_toks"])

            with self._probing(map(length, requests)):
                return super().generate_until(requests, *args, **options)

        def loglikelihood_rolling(self, requests: Sequence[Any], *args: Any, **options: Any) -> Any:
            # a longer text is read in windows of the whole context
            with self._probing(len(self.tok_encode(request.args[0])) for request in requests):
                return super().loglikelihood_rolling(requests, *args, **options)

        @contextlib.contextmanager
        def _probing(self, lengths: Iterable[int]) -> Iterator[None]:
            if self.batch_size == "auto":
                self.longest = max(lengths, default=None)
            try:
                yield
            finally:
                self.longest = None

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            if requests or self.longest is None:
                return int(super()._detect_batch_size(requests, pos))
            before = self._max_length
            # for the probe alone: no request is cut by it
            self._max_length = min(self.longest, self.max_length)
            try:
                return int(super()._detect_batch_size(requests, pos))
            finally:
                self._max_length = before

    return ShortProbes


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
            if pipeline and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield _metric_of(results, samples.get(task, ()), task, metric, pipeline)


def _metric_of(
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    task: str,
    metric: str,
    pipeline: str,
) -> Metric:
    """One metric of a task or group: the mean of its samples, or without them as it is reported."""

    def fact(key: str) -> Any:
        return (results.get(key) or {}).get(task)

    value = results["results"][task][f"{metric},{pipeline}"]
    scored = [
        row
        for row in rows
        if row.get("filter", "none") == pipeline and isinstance(row.get(metric), int | float)
    ]
    scores = [float(row[metric]) for row in scored]
    in_range = all(0 <= score <= 1 for score in (*scores, value))
    name = metric
    if pipeline != "none":
        name = f"{metric},{pipeline}"
    facts: dict[str, Any] = {
        "metric": name,
        "label": f"{task} {name.replace(',', ', ')}",
        "unit": "share" if is_share(metric) and in_range else "number",
        "task": task,
        "higher_is_better": (fact("higher_is_better") or {}).get(metric),
        "parts": tuple(_parts_of(results, task)),
        "num_fewshot": fact("n-shot"),
        "asked": (fact("n-samples") or {}).get("effective", 0),
        "version": str(fact("versions") or "") or None,
    }
    if scores and abs(sum(scores) / len(scores) - value) <= 1e-6:
        return metric_of(samples=_samples_of(scored, scores), **facts)
    # a score of the whole corpus, or of a group
    error = results["results"][task].get(f"{metric}_stderr,{pipeline}")
    if isinstance(error, int | float):
        facts |= {"low": value - 1.96 * error, "high": value + 1.96 * error}
    return Metric(value=value, n=facts["asked"], **facts)


def is_share(metric: str) -> bool:
    """Return whether a metric of lm-eval is a share of right answers, by its name."""
    return bool(_SHARE.search(metric))


def _parts_of(results: Mapping[str, Any], group: str) -> list[str]:
    """Every task and group below a group; nothing of a task."""
    parts: list[str] = []
    for part in (results.get("group_subtasks") or {}).get(group) or ():
        parts.append(part)
        parts += _parts_of(results, part)
    return parts


def _samples_of(rows: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> list[Sample]:
    """Return the samples of a metric. Rows that ask a model for exactly the same, under whatever
    ids, are one question: `same_as` is the first of them.
    """
    samples = []
    first_id: dict[str, str] = {}  # by what was asked
    for row, score in zip(rows, scores, strict=True):
        name = f"{row['doc_id']}:{str(row.get('doc_hash', ''))[:12]}"
        outcome = "scored"
        if score == 1.0:
            outcome = "right"
        elif score == 0.0:
            outcome = "wrong"
        same_as = ""
        if row.get("arguments"):
            asked = hash_of(row["arguments"], row.get("target"))
            earlier = first_id.setdefault(asked, name)
            if earlier != name:
                same_as = earlier
        samples.append(Sample(name, value=score, outcome=outcome, same_as=same_as))
    return samples


# ---- the configuration that gives the same numbers ----


def _config(recipe: EvalRecipe, model: Model, needs_merge: bool) -> dict[str, Any]:
    """What `lm_eval run --config` takes, without the recipe's own options."""
    import torch

    section = model.recipe.model
    trained = model.trained
    path = Path(model_path(section))
    adapter = None
    if trained and trained.full:
        path = trained.weights
    elif trained and needs_merge:
        path = trained.merged
    elif trained:
        adapter = str(trained.weights.resolve())
    arguments = {
        "pretrained": str(path.resolve() if path.is_dir() else path),
        "dtype": section.dtype,
        "mixed_precision_dtype": trained.saved.get("autocast") if trained else None,
        "peft": adapter,
        "tokenizer": adapter,
        "revision": section.revision,
        "trust_remote_code": section.trust_remote_code,
        "chat_template_args": dict(model.recipe.data.chat_template_kwargs),
    }
    loading = (model.recipe.quantization or {}).items()
    arguments |= {key: value for key, value in loading if key.startswith(("load_in", "bnb_"))}
    config = recipe.suite.model_dump(exclude={"name", "options"})
    config["model"] = "hf"
    config["include_path"] = recipe.data.include_path
    config["model_args"] = {key: value for key, value in arguments.items() if value}
    if str(config["batch_size"]).startswith("auto") and not torch.cuda.is_available():
        config["batch_size"] = _CPU_BATCH
    return {key: value for key, value in config.items() if value is not None}
