"""What our recipes and command lines take of lm-eval, read without importing it: the names of its
tasks, code that task files would run, its flags, and what its results say.

Names of tasks, groups and tags are read off the task files as text: half a second, where lm-eval's
own index takes ten. There may be a few names too many, never one too few.

lm-eval imports what a task file names with `!function`, loads a metric that it does not know from a
folder or the Hub, and fills templates with an interpreter that can reach the whole process. A
generation setting can name code too. All of that runs only if the eval recipe
(`generation.trust_remote_code`) and the command line (`--trust-remote-code`) allow it; templates of
such a folder are filled in a sandbox until then (`suites.harness`).
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import dotted, walk
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import shown_path

# the options of `simple_evaluate` that decide how items are asked
PROTOCOL = (
    "num_fewshot",
    "limit",
    "batch_size",
    "apply_chat_template",
    "system_instruction",
    "fewshot_as_multiturn",
    "gen_kwargs",
)
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
    # 16,000 files, of which pathlib would take as long again as reading them does
    paths = (f"{place}/{name}" for place, _, files in os.walk(folder) for name in files)
    for path in paths:
        if path.endswith(_NOT_TASKS):
            continue
        try:
            found = os.stat(path)  # noqa: PTH116
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
                continue
            with open(path, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123
                text = stream.read()
        except OSError:
            continue  # lm-eval cannot read it either
        for value in _KEY.findall(text):
            for line in value.split("\n"):
                names.update(_NAME.findall(_DASH.sub("", line).partition("#")[0]))
    return names


ALLOW = "read that code; then set generation.trust_remote_code: true and pass --trust-remote-code"
_PLAIN_TAG = "tag:yaml.org,2002:"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the parser that lm-eval takes


def code_in(document: Document, folder: Path | None) -> list[RecipeError]:
    """Return one error for each place of an eval recipe and its task files that would run code.

    Args:
        document: the eval recipe.
        folder: its `data.include_path`; None where it has none.
    """
    suite = document.values.get("suite", {})
    found = [
        document.error(("suite", *path), f"suite.{dotted(path)} runs code", ALLOW)
        for path, value in walk(
            {name: suite[name] for name in ("gen_kwargs", "options") if suite.get(name)}
        )
        if _names_code(str(path[-1]), value)
        or (isinstance(value, str) and "custom_generate" in value)
    ]
    seen: set[Path] = set()
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        found += _in_file(path, seen)
    return found


def unknown_metrics(values: Any, known: Any) -> list[str]:
    """Return the metrics in a task's values that lm-eval would load from somewhere else, because it
    does not have them.

    Args:
        values: a task or group as lm-eval read it.
        known: the metrics that lm-eval has.
    """
    found = []
    for path, value in walk(values):
        if path[-1] == "metric" and isinstance(value, str) and value not in known:
            found.append(value)
    return found


def _names_code(key: str, value: Any) -> bool:
    """Whether a setting lets code run: code beside a model or a data set, a decoding loop, a
    model's answers executed, a metric's code.
    """
    on = value not in (None, False, "", "false", "False", "no", "off", 0)
    named = on and key in (
        "trust_remote_code",
        "custom_generate",
        "confirm_run_unsafe_code",
        "hf_evaluate",
    )
    return named or (
        key == "metric"
        and isinstance(value, str)
        and not value.replace("_", "").replace("-", "").isalnum()
    )


def _in_file(path: Path, seen: set[Path]) -> Iterator[RecipeError]:
    """Yield what one task file and the files it includes would run; lm-eval's own files are trusted
    as lm-eval is.
    """
    path = path.resolve()
    if path in seen or ((library := lm_eval_folder()) and path.is_relative_to(library)):
        return
    seen.add(path)
    try:
        node = yaml.compose(path.read_bytes(), Loader=_LOADER)
    except RecursionError:
        yield RecipeError("is nested too deeply to be read", ALLOW, file=shown_path(path))
        return
    except (OSError, ValueError, yaml.YAMLError):
        return  # lm-eval cannot read it either and passes it over
    waiting, visited = [node] if node else [], set()
    while waiting:
        one = waiting.pop()
        if id(one) in visited:
            continue
        visited.add(id(one))
        line = one.start_mark.line + 1
        if not one.tag.startswith(_PLAIN_TAG) or one.tag.startswith(f"{_PLAIN_TAG}python/"):
            what = f"{one.tag} {one.value}" if isinstance(one, yaml.ScalarNode) else one.tag
            yield RecipeError(
                f"this task runs code: {what[:100]}", ALLOW, file=shown_path(path), line=line
            )
        if isinstance(one, yaml.SequenceNode):
            waiting += one.value
        if not isinstance(one, yaml.MappingNode):
            continue
        for key, value in one.value:
            waiting += [key, value]
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (
                isinstance(value, yaml.ScalarNode)
                and _names_code(key.value, value.value)
                and key.value != "confirm_run_unsafe_code"
            ):
                what = f"this task runs code: {key.value}: {value.value[:100]}"
                yield RecipeError(what, ALLOW, file=shown_path(path), line=key.start_mark.line + 1)
            if key.value == "include":
                for name in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(name, yaml.ScalarNode):
                        yield from _in_file(path.parent / name.value, seen)


_FLAGS = (
    "tasks",
    "limit",
    "num_fewshot",
    "batch_size",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
)
_TOP_LEVEL_COMMA = re.compile(r""",(?=(?:[^\[\]{}"']|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})*$)""")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare lm_eval's flags."""
    group = parser.add_argument_group("lm_eval", "options under lm_eval's own names")
    for name in _FLAGS:
        if name == "apply_chat_template":
            group.add_argument(f"--{name}", action="store_true", default=None)
        else:
            group.add_argument(
                f"--{name}", metavar="true|false" if name == "fewshot_as_multiturn" else "X"
            )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return `section.key=value` words for the flags that were given.

    Example:
        >>> overrides_of(argparse.Namespace(tasks="arc_easy,gsm8k", limit="20", apply_chat_template=True, gen_kwargs=None))
        ['suite.tasks=[arc_easy, gsm8k]', 'suite.limit=20', 'suite.apply_chat_template=true']
    """  # noqa: E501
    words = []
    for name in _FLAGS:
        value = getattr(args, name, None)
        if value is None or value is False:
            continue
        if name == "tasks":
            value = f"[{', '.join(part.strip() for part in value.split(','))}]"
        elif name == "gen_kwargs" and not value.startswith("{"):
            pairs = (part.strip().partition("=") for part in _TOP_LEVEL_COMMA.split(value))
            value = "{" + ", ".join(f"{key}: {text}" for key, _, text in pairs) + "}"
        elif name == "system_instruction":
            value = json.dumps(
                value
            )  # a text stays that text, whatever YAML makes of `:`, `#` or `yes`
        words.append(f"suite.{name}={'true' if value is True else value}")
    return words


def parts_of(found: Mapping[str, Any], group: str) -> list[str]:
    """Return every task and group below a group of lm-eval's results; nothing of a task.

    Example:
        >>> parts_of({"group_subtasks": {"mmlu": ["stem"], "stem": ["physics"]}}, "mmlu")
        ['stem', 'physics']
    """
    below = (found.get("group_subtasks") or {}).get(group) or ()
    return [name for part in below for name in (part, *parts_of(found, part))]


def metric_direction(found: Mapping[str, Any], task: str, metric: str) -> bool | None:
    """Return whether more of a metric is better, as lm-eval's results say it; None where they do
    not.

    Args:
        found: lm-eval's results: their own table of directions counts, then the metric list of the
            task's config.
    """
    known = [((found.get("higher_is_better") or {}).get(task) or {}).get(metric)]
    listed = ((found.get("configs") or {}).get(task) or {}).get("metric_list") or ()
    known += [
        one.get("higher_is_better")
        for one in listed
        if isinstance(one, Mapping) and one.get("metric") == metric
    ]
    return next((direction for direction in known if isinstance(direction, bool)), None)
