"""Which files lm-eval's task loader will read and import, found without importing any of them.

A task's file is code: its `!function` values are imported, its `class` is made, and its templates
are jinja outside a sandbox (lm_eval 0.4.13). So the question is which files the loader reads,
whatever key of an eval recipe leads it there.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

TASK_SUFFIXES = (".yaml", ".yml")
# the keys of an eval recipe that lead the loader to files
_TASKS = "suite.tasks"
_INCLUDE_PATH = "data.include_path"


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
