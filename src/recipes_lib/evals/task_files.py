"""The names of lm-eval's tasks, read off their files without importing it."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.documents import Origin, did_you_mean
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import shown_path

_LARGEST = 1 << 20  # bytes: a folder of one's own may hold data and weights too
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# what follows `task:`, `group:`, `tag:`, or the dash of a list
_NAMES = re.compile(
    r"^(?:[\"']?(?:task|group|tag)[\"']?[ \t]*:|[ \t]*-[ \t])[ \t]*([^#\n]+)", re.MULTILINE
)


def task_errors(tasks: Sequence[str], own: Path | None, place: Origin) -> Iterator[RecipeError]:
    """Yield an error for each name or pattern (`mmlu_*`) of a task, also in the groups of one's own
    folder, that neither lm-eval nor the folder has; none where lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return
    known, groups = _own_names(own) if own else (set[str](), {})
    waiting = [(task, place) for task in tasks]
    while waiting:
        name, at = waiting.pop(0)
        waiting += groups.pop(name, [])
        if name in known:
            continue
        known |= _library_names(Path(spec.origin).parent / "tasks")
        if name not in known and not fnmatch.filter(known, name):
            hints = [*did_you_mean(name, sorted(known)), "all tasks: lm_eval ls tasks"]
            what = f"lm-eval has no task '{name}'"
            yield RecipeError(what, *hints, file=at.file, line=at.line)


def _texts_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files in a folder that may be lm-eval's, with their text."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            readable = path.suffix in ("", ".yaml") and path.is_file()
            if readable and path.stat().st_size <= _LARGEST:
                yield path, path.read_text(encoding="utf-8", errors="replace")


@cache
def _library_names(folder: Path) -> frozenset[str]:
    """The names of lm-eval's tasks, groups and tags, read as text: half a second, where its own
    index takes ten. There may be a few too many, never one too few.
    """
    values = (value for _, text in _texts_in(folder) for value in _NAMES.findall(text))
    return frozenset(name.strip(" \t[]\"'") for value in values for name in value.split(","))


def _own_names(folder: Path) -> tuple[set[str], dict[str, list[tuple[str, Origin]]]]:
    """The names of tasks, groups and tags in a folder, and the parts of its groups by place."""
    known: set[str] = set()
    groups: dict[str, list[tuple[str, Origin]]] = {}
    for path, text in _texts_in(folder):
        try:
            tree = yaml.compose(text, Loader=_LOADER)
        except (yaml.YAMLError, RecursionError):
            continue  # lm-eval passes over it too
        content = tree.value if isinstance(tree, yaml.MappingNode) else []
        keys = {key.value: value for key, value in content if isinstance(key, yaml.ScalarNode)}
        for key in ("task", "group", "tag"):
            value = keys.get(key)
            listed = value.value if isinstance(value, yaml.SequenceNode) else [value]
            names = [node for node in listed if isinstance(node, yaml.ScalarNode)]
            if key != "task" or "group" not in keys:
                known |= {node.value for node in names}
            elif "dataset_path" not in keys:  # which makes tasks of what is no name
                groups[str(keys["group"].value)] = [
                    (node.value, Origin(shown_path(path), node.start_mark.line + 1))
                    for node in names
                ]
    return known, groups
