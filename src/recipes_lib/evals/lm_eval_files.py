"""Which files lm-eval's task loader will read and import, and which metrics a task's file lists,
found without importing any of them.

A task's file is code: its `!function` values are imported, its `class` is made, and its templates
are jinja outside a sandbox (lm_eval 0.4.13). So the question is which files the loader reads,
whatever key of an eval recipe leads it there.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TASK_SUFFIXES = (".yaml", ".yml")
# the keys of an eval recipe that lead the loader to files
_TASKS = "suite.tasks"
_INCLUDE_PATH = "data.include_path"
# the metrics of a task that lists none, by its output_type (lm_eval 0.4.13, api/registry.py)
_DEFAULT_METRICS = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}


class _Loader(yaml.SafeLoader):
    """Reads a task's file with every tag as plain text, and remembers its `!function` values."""

    functions: list[str]


def _as_text(loader: _Loader, tag: str, node: yaml.Node) -> Any:
    """The value of a tag that lm-eval knows, as text."""
    text = str(node.value)
    if tag == "function":
        loader.functions.append(text)
    return text


_Loader.add_multi_constructor("!", _as_text)


def files_read_by_tasks(
    tasks: Sequence[str], include_path: str | None, folder: str | None
) -> dict[Path, str]:
    """Return the task files and Python files that lm-eval's loader would read, each resolved and
    with the key of the eval recipe that leads there.

    Args:
        tasks: names, patterns or paths of tasks; lm-eval takes every file as a path.
        include_path: the folder of one's own tasks.
        folder: where lm-eval works: paths count from there.
    """
    found: dict[Path, str] = {}
    for task in tasks:
        path = Path(folder or ".", Path(task).expanduser())
        if path.is_file():
            _add(path, _TASKS, folder, found)
    if include_path is not None:
        for path in sorted(Path(include_path).rglob("*")):
            if path.suffix in TASK_SUFFIXES and path.is_file():
                _add(path, _INCLUDE_PATH, folder, found)
    return found


def is_trusted(file: Path, project: Path) -> bool:
    """Return whether a file is of the project, of lm-eval, or of another installed package."""
    roots = [project, *_installed()]
    return any(file.is_relative_to(root) for root in roots)


def _installed() -> Iterator[Path]:
    """The folders of installed packages, the standard library, and lm-eval."""
    for name in ("purelib", "platlib", "stdlib"):
        yield Path(sysconfig.get_path(name)).resolve()
    spec = importlib.util.find_spec("lm_eval")
    if spec and spec.origin:
        yield Path(spec.origin).resolve().parent


def _add(path: Path, key: str, folder: str | None, found: dict[Path, str]) -> None:
    """Add a task's file, the files it includes, and the modules of its functions."""
    path = path.resolve()
    if path in found:
        return
    found[path] = key
    if not path.is_file():
        return
    values, functions = _read(path)
    for function in functions:
        module = _module_file(function, path.parent, folder)
        if module is not None:
            found.setdefault(module, key)
    included = values.get("include") or []
    if not isinstance(included, list):
        included = [included]
    for name in included:
        # an absolute name stays as it is
        _add(path.parent / str(name), key, folder, found)


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of a task's file, and its functions; nothing of one that is no YAML mapping,
    which lm-eval's loader refuses.
    """
    try:
        loader = _Loader(path.read_text("utf-8"))
        loader.functions = []
        values = loader.get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}, []
    if not isinstance(values, dict):
        return {}, []
    return values, loader.functions


def _module_file(function: str, beside: Path, folder: str | None) -> Path | None:
    """The file that a `!function` value imports: the one beside the task's file first, as
    lm-eval's loader has it, else a module that Python finds, also in the folder of work.
    """
    name = function.rpartition(".")[0]
    if not name:
        return None
    relative = name.replace(".", "/")
    for place in (beside, Path(folder or "."), Path()):
        for file in (place / f"{relative}.py", place / relative / "__init__.py"):
            if file.is_file():
                return file.resolve()
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or spec.origin in ("built-in", "frozen"):
        return None
    return Path(spec.origin).resolve()


# ---- the metrics of a task ----


@dataclass
class _TaskFile:
    """A task's file with what it includes: its values, and which of these are functions."""

    values: dict[str, Any] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)


def metrics_of_task(task: str, include_path: str | None) -> tuple[str, ...] | None:
    """Return the metrics that lm-eval will report of a task or a group, by the names that a result
    has (`acc`, `exact_match,strict-match`; `acc,*` with any filter); None where only a run can
    tell.

    Args:
        task: the name of a task or group; of a pattern or a path nothing is known.
        include_path: the folder of one's own tasks, which come before lm-eval's.
    """
    for path in _candidates(task, include_path):
        file = _with_includes(path, set())
        if file.values.get("group") == task:
            return _metrics_of_group(file)
        if file.values.get("task") == task:
            return _metrics_of_file(file)
    return None


def _candidates(task: str, include_path: str | None) -> Iterator[Path]:
    """Yield the files that may declare a task: all of one's own, and of lm-eval's 14,000 those in
    a folder that the task's name begins with, and those of its name.
    """
    if include_path is not None:
        yield from sorted(Path(include_path).rglob("*.yaml"))
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.origin:
        return
    for folder in sorted((Path(spec.origin).parent / "tasks").glob("*/")):
        if task.startswith(folder.name):
            yield from sorted(folder.rglob("*.yaml"))
        else:
            yield from sorted(folder.rglob(f"{task}.yaml"))


def _with_includes(path: Path, seen: set[Path]) -> _TaskFile:
    """Return a task's file over the files it includes: its own values win, as in lm-eval."""
    path = path.resolve()
    if path in seen:  # a circle, which lm-eval refuses
        return _TaskFile()
    seen.add(path)
    values, functions = _read(path)
    file = _TaskFile(functions=set(functions))
    included = values.pop("include", None) or []
    if not isinstance(included, list):
        included = [included]
    for name in included:
        base = _with_includes(path.parent / str(name), seen)
        file.values.update(base.values)
        file.functions |= base.functions
    file.values.update(values)
    return file


def _metrics_of_file(file: _TaskFile) -> tuple[str, ...] | None:
    """Return the metrics of a task's file: each metric of its list with each of its filters.

    A Python task, a function that makes the results, and a metric that is a function or comes from
    the Hub may report any name.
    """
    values = file.values
    if "class" in values or values.get("process_results") in file.functions:
        return None
    listed = values.get("metric_list")
    if listed is None:
        names = list(_DEFAULT_METRICS.get(str(values.get("output_type")), ()))
    else:
        names = []
        for metric in _mappings(listed):
            if metric.get("hf_evaluate") or metric.get("metric") in file.functions:
                return None
            names.append(str(metric.get("metric")))
    filters = [str(one.get("name")) for one in _mappings(values.get("filter_list"))]
    metrics = _filtered(names, filters or ["none"])
    return metrics or None


def _metrics_of_group(file: _TaskFile) -> tuple[str, ...] | None:
    """Return the metrics that a group adds up; without a list of filters, of its tasks' ones."""
    metrics: list[str] = []
    for metric in _mappings(file.values.get("aggregate_metric_list")):
        filters = metric.get("filter_list")
        if filters is None:
            filters = ["none", "*"]
        if isinstance(filters, str):
            filters = [filters]
        metrics += _filtered([str(metric.get("metric"))], filters)
    return tuple(metrics) or None


def _filtered(metrics: Sequence[str], filters: Sequence[str]) -> tuple[str, ...]:
    """Return the names that results have: a metric alone where its filter is `none`."""
    names = []
    for metric in metrics:
        for pipeline in filters:
            name = f"{metric},{pipeline}"
            if pipeline == "none":
                name = metric
            names.append(name)
    return tuple(names)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list, or of a single one; nothing of anything else."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return []
    return [entry for entry in value if isinstance(entry, dict)]
