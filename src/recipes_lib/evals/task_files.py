"""lm-eval's task files, read without importing it: which tasks there are, what one's own would run
or read, and mistakes in them.

Names of tasks, groups and tags are read off the files as text: half a second, where lm-eval's own
index takes ten. There may be a few names too many, never one too few.

lm-eval imports what a task file names with `!function`, loads a metric that it does not know from a
folder or the Hub, reads whatever file `data_files` names, and fills templates with an interpreter
that can reach the whole process. All of that needs generation.trust_remote_code and
--trust-remote-code.
"""

from __future__ import annotations

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

import jinja2
import jinja2.meta
import jinja2.nodes
import yaml

from recipes_lib.config.documents import Document, did_you_mean
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, shown_path

ALLOW = "read that code; then set generation.trust_remote_code: true and pass --trust-remote-code"
_NOT_TASKS = (".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv")
_LARGEST = 1 << 20  # bytes: a folder of one's own may hold data and weights too
_KEY = re.compile(r"^[\"']?(?:task|group|tag)[\"']?[ \t]*:(.*(?:\n[ \t]*-[ \t].*)*)", re.MULTILINE)
_DASH = re.compile(r"^\s*-\s+")
_NAME = re.compile(r"[^\s,\[\]\"'#](?:[^,\[\]\"'#]*[^\s,\[\]\"'#])?")
_PLAIN_TAG = "tag:yaml.org,2002:"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the parser that lm-eval takes
_OUTPUT_TYPES = ("generate_until", "loglikelihood", "loglikelihood_rolling", "multiple_choice")
_CODE_KEYS = ("trust_remote_code", "custom_generate", "confirm_run_unsafe_code", "hf_evaluate")
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "description")


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


# ---- what a task would run or read ----


def code_in(document: Document, folder: Path | None) -> list[RecipeError]:
    """Return one error for each place of an eval recipe and its task files that would run code, or
    read files outside the recipe's folder, the project and `data.folder`.

    Args:
        document: the eval recipe.
        folder: its `data.include_path`; None where it has none.
    """
    suite = document.values.get("suite", {})
    found = [
        document.error(f"suite.{section}", f"suite.{section}: {key} runs code", ALLOW)
        for section in ("gen_kwargs", "options")
        for key, value in _pairs(suite.get(section) or {})
        if _names_code(key, value) or (isinstance(value, str) and "custom_generate" in value)
    ]
    named = document.values.get("data", {}).get("folder")
    base = Path(document.absolute("data.folder", named)) if named else Path.cwd()
    seen: set[Path] = set()
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        found += _in_file(path, base, readable(document.path), seen)
    return found


def readable(recipe: Path) -> list[Path]:
    """Return the folders that an eval recipe may read: its own, and the project that it lies in."""
    own, project = recipe.resolve().parent, project_root().resolve()
    return [own, project] if own.is_relative_to(project) else [own]


def _pairs(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key with its value below a value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _pairs(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, key)
    else:
        yield key, value


def _names_code(key: str, value: Any) -> bool:
    """Whether a setting lets code run: code beside a model or a data set, a decoding loop, a
    model's answers executed, a metric's code.
    """
    on = value not in (None, False, "", "false", "False", "no", "off", 0)
    named = on and key in _CODE_KEYS
    plain = str(value).replace("_", "").replace("-", "").isalnum()
    return named or (key == "metric" and isinstance(value, str) and not plain)


def _in_file(
    path: Path, base: Path, allowed: Sequence[Path], seen: set[Path]
) -> Iterator[RecipeError]:
    """Yield what one task file and the files it includes would run or read; lm-eval's own files are
    trusted as lm-eval is.
    """
    path = path.resolve()
    if path in seen or ((library := lm_eval_folder()) and path.is_relative_to(library)):
        return
    seen.add(path)
    if not any(path.is_relative_to(place) for place in allowed):
        yield RecipeError("a task file is outside this recipe's folder", ALLOW, file=path)
        return
    try:
        node = yaml.compose(path.read_bytes(), Loader=_LOADER)
    except RecursionError:
        yield RecipeError("is nested too deeply to be read", ALLOW, file=shown_path(path))
        return
    except (OSError, ValueError, yaml.YAMLError):
        return  # lm-eval cannot read it either and passes it over
    for key, one in _nodes(node):
        place: dict[str, Any] = {"file": shown_path(path), "line": one.start_mark.line + 1}
        value = one.value if isinstance(one, yaml.ScalarNode) else ""
        if not one.tag.startswith(_PLAIN_TAG) or one.tag.startswith(f"{_PLAIN_TAG}python/"):
            what = f"this task runs code: {one.tag} {value[:80]}".rstrip()
            yield RecipeError(what, ALLOW, **place)
        if key != "confirm_run_unsafe_code" and value and _names_code(key, value):
            yield RecipeError(f"this task runs code: {key}: {value[:100]}", ALLOW, **place)
        if ("{{" in value or "{%" in value) and (why := _reaches_out(value)):
            yield RecipeError(f"this template could run code: {why}", ALLOW, **place)
        if key == "data_files" and value and "://" not in value:
            file = (base / value).resolve()
            if not any(file.is_relative_to(folder) for folder in allowed):
                what = f"this task reads {value}, outside this recipe's folder"
                yield RecipeError(what, ALLOW, **place)
        if key == "include" and value:
            yield from _in_file(path.parent / value, base, allowed, seen)


def _nodes(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Yield every node with the key that it stands under; below data_files all are files."""
    waiting, visited = [("", node)] if node else [], set()
    while waiting:
        key, one = waiting.pop()
        if id(one) in visited:
            continue
        visited.add(id(one))
        yield key, one
        if isinstance(one, yaml.SequenceNode):
            waiting += [(key, inner) for inner in one.value]
        elif isinstance(one, yaml.MappingNode):
            for name, inner in one.value:
                is_file = key == "data_files"
                waiting.append(("", name))
                own = name.value if isinstance(name, yaml.ScalarNode) else ""
                waiting.append((key if is_file else own, inner))


def _reaches_out(template: str) -> str | None:
    """Return what of a template could reach more than its own document: private names, the filter
    `attr`, and texts that are themselves formats.
    """
    try:
        tree = jinja2.Environment().parse(template)
    except (jinja2.TemplateError, RecursionError):
        return None  # it is never filled
    for node in tree.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem, jinja2.nodes.Filter)):
        if isinstance(node, jinja2.nodes.Filter):
            if node.name in ("attr", "map", "format"):
                return f"the filter {node.name}"
        elif isinstance(node, jinja2.nodes.Getattr):
            if node.attr.startswith("_") or node.attr in ("format", "format_map", "mro"):
                return f".{node.attr}"
        elif isinstance(node.arg, jinja2.nodes.Const):
            if str(node.arg.value).startswith("_"):
                return f"[{node.arg.value!r}]"
        elif isinstance(node.arg, jinja2.nodes.Concat | jinja2.nodes.Add | jinja2.nodes.Filter):
            return "a name that is put together"
    return None


# ---- mistakes ----


class _AnyTag(yaml.SafeLoader):
    """Reads lm-eval's files without running the functions they name (`!function`)."""


_AnyTag.add_multi_constructor("", lambda loader, suffix, node: None)


def own_tasks(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the tasks that a folder's files define, with their file and values."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
        except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError):
            continue  # lm-eval cannot read it either
        if isinstance(values, dict) and isinstance(values.get("task"), str):
            found[values["task"]] = path, values
    return found


def wrong_in_tasks(tasks: Sequence[str], folder: Path, data: Path) -> Iterator[RecipeError]:
    """Yield the mistakes in one's own tasks that can be seen without lm-eval: an unknown kind of
    output, a data file that is not there, a template that is none or names no column.

    Args:
        data: the folder that relative data paths are meant from.
    """
    own = own_tasks(folder)
    for task in tasks:
        if task not in own or "include" in own[task][1]:
            continue
        path, values = own[task]
        lines = path.read_text(encoding="utf-8").splitlines()

        def error(
            key: str, what: str, *hints: str, path: Path = path, lines: list[str] = lines
        ) -> RecipeError:
            line = next((n for n, text in enumerate(lines, 1) if text.startswith(key)), 1)
            return RecipeError(what, *hints, file=shown_path(path), line=line)

        kind = values.get("output_type", "generate_until")
        if kind not in _OUTPUT_TYPES:
            hints = did_you_mean(str(kind), list(_OUTPUT_TYPES))
            yield error("output_type", f"unknown output_type '{kind}'", *hints)
        columns: set[str] | None = None
        if values.get("dataset_path") == "json":
            files = (values.get("dataset_kwargs") or {}).get("data_files") or {}
            for name in dict.fromkeys(str(value) for _, value in _pairs(files)):
                file = data / name
                if "://" not in name and not any(mark in name for mark in "*?["):
                    if not file.is_file():
                        yield error("dataset_kwargs", f"no such data file: {shown_path(file)}")
                    else:
                        columns = (columns or set()) | _columns(file)
        for key in _TEMPLATES:
            if isinstance(template := values.get(key), str):
                yield from (
                    error(key, what, *hints) for what, hints in _wrong_template(template, columns)
                )


def _columns(file: Path) -> set[str]:
    """The columns of the first row of a JSON-lines file; none where it is something else."""
    try:
        with file.open(encoding="utf-8") as stream:
            row = json.loads(stream.readline())
        return set(row) if isinstance(row, dict) else set()
    except (OSError, ValueError):
        return set()


def _wrong_template(template: str, columns: set[str] | None) -> Iterator[tuple[str, list[str]]]:
    environment = jinja2.Environment()
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
        if "filter" not in str(error):  # lm-eval has filters of its own
            yield f"the template is none: {error.message}", []
        return
    for name in sorted(names - (columns or names)):
        yield (
            f"the rows have no column '{name}'",
            [
                *did_you_mean(name, sorted(columns or ())),
                f"columns: {', '.join(sorted(columns or ()))}",
            ],
        )
