"""The names of lm-eval's tasks, groups and tags, read off its task files as text: half a second,
where lm-eval's own index takes ten.

What is read may hold a few names too many, never one too few: a name that is missing here is no
task.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from recipes_lib.config.suggestions import did_you_mean

_NOT_TASKS = (
    ".py",
    ".pyc",
    ".md",
    ".json",
    ".jsonl",
    ".txt",
    ".csv",
)  # tasks are .yaml files, and what they include has any name
_LARGEST = 1 << 20  # bytes: a folder of one's own may hold data and weights too
_KEY = re.compile(r"^[\"']?(?:task|group|tag)[\"']?[ \t]*:(.*(?:\n[ \t]*-[ \t].*)*)", re.MULTILINE)
_DASH = re.compile(r"^\s*-\s+")
_NAME = re.compile(r"[^\s,\[\]\"'#](?:[^,\[\]\"'#]*[^\s,\[\]\"'#])?")


def lm_eval_folder() -> Path | None:
    """Return where lm-eval lies, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).resolve() if places else None


def unknown_tasks(tasks: Sequence[str], own: Path | None = None) -> dict[str, list[str]]:
    """Return the tasks that neither lm-eval nor a folder has, each with what to do; none where
    lm-eval is not installed.

    Args:
        tasks: names or patterns (`mmlu_*`).
        own: folder with further task files.
    """
    known = _names_in(own) if own else set()
    library = lm_eval_folder()
    if library is None or all(map(known.__contains__, tasks)):
        return {}
    known |= _own_names_of(library)
    unknown = [task for task in tasks if task not in known and not fnmatch.filter(known, task)]
    return {
        task: [*did_you_mean(task, sorted(known)), "all tasks: lm_eval ls tasks"]
        for task in unknown
    }


@lru_cache(maxsize=1)
def _own_names_of(library: Path) -> frozenset[str]:
    """The names that come with lm-eval; its files do not change while a command runs."""
    return frozenset(_names_in(library / "tasks"))


def _names_in(folder: Path) -> set[str]:
    """The names in the files of a folder that may be task files."""
    names: set[str] = set()
    for path in folder.rglob("*"):
        try:
            if path.suffix in _NOT_TASKS or not path.is_file() or path.stat().st_size > _LARGEST:
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # lm-eval cannot read it either
        for value in _KEY.findall(text):
            for line in value.split("\n"):
                names.update(_NAME.findall(_DASH.sub("", line).partition("#")[0]))
    return names
