"""Which files lm-eval's task loader will read and import, and which metrics a task's file lists,
found without importing any of them.

A task's file is code: its `!function` values are imported, its `class` is made, and its templates
are jinja outside a sandbox (lm_eval 0.4.13). So the question is which files the loader reads,
whatever key of an eval recipe leads it there.
"""

import importlib.util
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TASK_SUFFIXES = (".yaml", ".yml")
# the metrics of a task that lists none, by its output_type (lm_eval 0.4.13, api/registry.py)
_DEFAULT_METRICS = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}


class _Loader(yaml.SafeLoader):
    """Reads a task's file with every tag as plain text, and remembers its `!function` values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.functions: list[str] = []

    def text_of(self, tag: str, node: yaml.Node) -> str:
        """Return the value of a tag that lm-eval knows."""
        text = str(node.value)
        if tag == "function":
            self.functions.append(text)
        return text


_Loader.add_multi_constructor("!", _Loader.text_of)


@dataclass
class _TaskFile:
    """A task's file: its values, and which of these are functions."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)


def _with_includes(path: Path, seen: set[Path]) -> Iterator[_TaskFile]:
    """Yield the files that a task's file includes, then itself: a later one's values win, as in
    lm-eval. A file that is seen already is not read again. One that is not there or no YAML
    mapping, which lm-eval's loader refuses, has no values.
    """
    path = path.resolve()
    if path in seen:
        return
    seen.add(path)
    file = _TaskFile(path)
    if path.is_file():  # a pipe or a device would be read for ever
        try:
            loader = _Loader(path.read_text("utf-8"))
            values = loader.get_single_data()
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            values = None
        if isinstance(values, dict):
            file = _TaskFile(path, values, loader.functions)
    included = file.values.pop("include", None) or []
    if not isinstance(included, list):
        included = [included]
    for name in included:
        # an absolute name stays as it is
        yield from _with_includes(path.parent / str(name), seen)
    yield file


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
    roots = [(Path(folder or ".", Path(task).expanduser()), "suite.tasks") for task in tasks]
    if include_path is not None:
        paths = sorted(Path(include_path).rglob("*"))
        roots += [(path, "data.include_path") for path in paths if path.suffix in TASK_SUFFIXES]
    found: dict[Path, str] = {}
    seen: set[Path] = set()
    for path, key in roots:
        if not path.is_file():
            continue
        for file in _with_includes(path, seen):
            found.setdefault(file.path, key)
            for function in file.functions:
                module = _module_file(function, file.path.parent, folder)
                if module is not None:
                    found.setdefault(module, key)
    return found


def is_trusted(file: Path, project: Path) -> bool:
    """Return whether a file is of the project, of lm-eval, or of another installed package."""
    names = ("purelib", "platlib", "stdlib")
    roots = [project, *(Path(sysconfig.get_path(name)).resolve() for name in names)]
    lm_eval = _installed_file("lm_eval")
    if lm_eval is not None:
        roots.append(lm_eval.parent)
    return any(file.is_relative_to(root) for root in roots)


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
    return _installed_file(name.partition(".")[0])


def _installed_file(module: str) -> Path | None:
    """The file that Python would import for a module's name; None where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or spec.origin in ("built-in", "frozen"):
        return None
    return Path(spec.origin).resolve()


def metrics_of_task(task: str, include_path: str | None) -> tuple[str, ...] | None:
    """Return the metrics that lm-eval will report of a task or a group, by the names that a result
    has (`acc`, `exact_match,strict-match`; `acc,*` with any filter); None where only a run can
    tell.

    Args:
        task: the name of a task or group; of a pattern or a path nothing is known.
        include_path: the folder of one's own tasks, which come before lm-eval's.
    """
    for path in _candidates(task, include_path):
        values: dict[str, Any] = {}
        functions: set[str] = set()
        for file in _with_includes(path, set()):
            values.update(file.values)
            functions.update(file.functions)
        if values.get("group") == task:
            return _metrics_of_group(values)
        if values.get("task") == task:
            return _metrics_of_file(values, functions)
    return None


def _candidates(task: str, include_path: str | None) -> Iterator[Path]:
    """Yield the files that may declare a task: all of one's own, and of lm-eval's 14,000 those in
    a folder that the task's name begins with, and those of its name.
    """
    if include_path is not None:
        yield from sorted(Path(include_path).rglob("*.yaml"))
    lm_eval = _installed_file("lm_eval")
    if lm_eval is None:
        return
    for folder in sorted((lm_eval.parent / "tasks").glob("*/")):
        pattern = "*.yaml" if task.startswith(folder.name) else f"{task}.yaml"
        yield from sorted(folder.rglob(pattern))


def _metrics_of_file(values: Mapping[str, Any], functions: set[str]) -> tuple[str, ...] | None:
    """Return the metrics of a task's file: each metric of its list with each of its filters.

    A Python task, a function that makes the results, and a metric that is a function or comes from
    the Hub may report any name.
    """
    if "class" in values or values.get("process_results") in functions:
        return None
    listed = values.get("metric_list")
    if listed is None:
        names = list(_DEFAULT_METRICS.get(str(values.get("output_type")), ()))
    else:
        names = []
        for metric in _mappings(listed):
            if metric.get("hf_evaluate") or metric.get("metric") in functions:
                return None
            names.append(str(metric.get("metric")))
    filters = [str(pipeline.get("name")) for pipeline in _mappings(values.get("filter_list"))]
    metrics = [_filtered(name, pipeline) for name in names for pipeline in filters or ["none"]]
    return tuple(metrics) or None


def _metrics_of_group(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the metrics that a group adds up; without a list of filters, of its tasks' ones."""
    metrics: list[str] = []
    for metric in _mappings(values.get("aggregate_metric_list")):
        filters = metric.get("filter_list")
        if filters is None:
            filters = ["none", "*"]
        if isinstance(filters, str):
            filters = [filters]
        metrics += [_filtered(str(metric.get("metric")), pipeline) for pipeline in filters]
    return tuple(metrics) or None


def _filtered(metric: str, pipeline: str) -> str:
    """The name that results have: a metric alone where its filter is `none`."""
    return metric if pipeline == "none" else f"{metric},{pipeline}"


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list, or of a single one; nothing of anything else."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return []
    return [entry for entry in value if isinstance(entry, dict)]
