"""lm-eval's task files, read without importing it: which tasks there are, and what one's own would
run or read.

lm-eval imports what a task file names with `!function`, loads a metric that it does not know from a
folder or the Hub, reads whatever file `data_files` names, and fills templates with an interpreter
that can reach the whole process. All of that needs generation.trust_remote_code and
--trust-remote-code.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import nodes

from recipes_lib.config.documents import Document, did_you_mean
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, shown_path

ALLOW = "read that code; then set generation.trust_remote_code: true and pass --trust-remote-code"
_LARGEST = 1 << 20  # bytes: a folder of one's own may hold data and weights too
# what follows `task:`, `group:`, `tag:`, or the dash of a list
_NAMES = re.compile(
    r"^(?:[\"']?(?:task|group|tag)[\"']?[ \t]*:|[ \t]*-[ \t])[ \t]*([^#\n]+)", re.MULTILINE
)
_PLAIN = "tag:yaml.org,2002:"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_READ = ("data_files", "data_dir", "dataset_path")
_CODE_KEYS = ("trust_remote_code", "custom_generate", "confirm_run_unsafe_code", "hf_evaluate")
# what a template may call: methods of texts, lists and mappings that change nothing
_CALLS = {
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "join", "replace"),
    *("lower", "upper", "title", "capitalize", "startswith", "endswith", "find", "index", "count"),
    *("get", "items", "keys", "values", "range"),
}
# names that lead from a template into the interpreter
_INTERPRETER = {"lipsum", "cycler", "joiner", "namespace", "dict", "self", "loop"}
_LOOP = ("index", "index0", "first", "last", "length")
_STATEMENTS = (nodes.Output, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock)


def unknown_tasks(tasks: Sequence[str], own: Path | None = None) -> dict[str, list[str]]:
    """Return the tasks that neither lm-eval nor a folder has, each with what to do; none where
    lm-eval is not installed.

    Args:
        tasks: names or patterns (`mmlu_*`).
        own: folder with further task files.
    """
    library = _library()
    known = _names_in(own) if own else frozenset()
    if library is None or known.issuperset(tasks):
        return {}
    known |= _names_in(library / "tasks")
    unknown = [task for task in tasks if task not in known and not fnmatch.filter(known, task)]
    hint = "all tasks: lm_eval ls tasks"
    return {task: [*did_you_mean(task, sorted(known)), hint] for task in unknown}


def _library() -> Path | None:
    """Where lm-eval lies; None where it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


@cache
def _metrics() -> frozenset[str]:
    """The names of lm-eval's own metrics, none where it is not installed. It loads the code of any
    other from a folder or the Hub.
    """
    library = _library()
    text = (library / "api/metrics.py").read_text(encoding="utf-8") if library else ""
    return frozenset(re.findall(r'metric="([^"]+)"', text))


@lru_cache(maxsize=2)
def _names_in(folder: Path) -> frozenset[str]:
    """The names of tasks, groups and tags in a folder, read off its files as text: half a second,
    where lm-eval's own index takes ten. There may be a few too many, never one too few.
    """
    names: set[str] = set()
    for place, _, files in os.walk(folder):
        for path in (Path(place, name) for name in files):
            readable = path.suffix in ("", ".yaml") and path.is_file()
            if readable and path.stat().st_size <= _LARGEST:
                for value in _NAMES.findall(path.read_text(encoding="utf-8", errors="replace")):
                    names.update(name.strip(" \t[]\"'") for name in value.split(","))
    return frozenset(names)


# ---- what a task would run or read ----


def code_in(document: Document) -> list[RecipeError]:
    """Return one error for each place of an eval recipe and its task files that would run code, or
    read files outside the recipe's folder, the project and `data.folder`.
    """
    suite, data = document.values.get("suite", {}), document.values.get("data", {})
    errors = [
        document.error(f"suite.{section}", f"suite.{section}: {what}", ALLOW)
        for section in ("gen_kwargs", "options")
        for key, node in _nodes(yaml.compose(yaml.safe_dump(suite.get(section))))
        if (what := _code_of(key, node))
    ]
    if folder := data.get("include_path"):
        named = data.get("folder")
        base = Path(document.absolute("data.folder", named)) if named else Path.cwd()
        seen: set[Path] = set()
        for path in sorted(Path(document.absolute("data.include_path", folder)).rglob("*.yaml")):
            errors += _in_file(path, base, readable(document.path), seen)
    return errors


def readable(recipe: Path) -> list[Path]:
    """Return the folders that an eval recipe may read: its own, and the project that it lies in."""
    own, project = recipe.resolve().parent, project_root().resolve()
    return [own, project] if own.is_relative_to(project) else [own]


def _in_file(
    path: Path, base: Path, allowed: Sequence[Path], seen: set[Path]
) -> Iterator[RecipeError]:
    """Yield what one task file and the files it includes would run or read; lm-eval's own files are
    trusted as lm-eval is.
    """
    path, library = path.resolve(), _library()
    if path in seen or (library and path.is_relative_to(library)):
        return
    seen.add(path)
    if not _is_inside(path, allowed):
        yield RecipeError("a task file is outside this recipe's folder", ALLOW, file=path)
        return
    for key, node in _nodes(_tree(path)):
        what, value = _code_of(key, node), _text(node)
        if key in _READ and value and not _may_read(key, value, base, allowed):
            what = f"this task reads {value}, outside this recipe's folder"
        if what:
            yield RecipeError(what, ALLOW, file=shown_path(path), line=node.start_mark.line + 1)
        if key == "include" and value:
            yield from _in_file(path.parent / value, base, allowed, seen)


def _code_of(key: str, node: yaml.Node) -> str | None:
    """What a value lets run: a function, code beside a model or a data set, a decoding loop, a
    model's answers, a metric's code, a template.
    """
    value = _text(node)
    is_on = value.lower() not in ("", "false", "no", "off", "0")
    if not node.tag.startswith(_PLAIN) or "python/" in node.tag:
        return f"this task runs code: {node.tag} {value[:80]}".rstrip()
    if is_on and (key in _CODE_KEYS or (key and "custom_generate" in value)):
        return f"this task runs code: {key}: {value[:100]}"
    if is_on and key == "metric" and _metrics() and value not in _metrics():
        return f"lm-eval has no metric '{value[:100]}' and would run the code of one"
    if ("{{" in value or "{%" in value) and (reason := _could_run_code(value)):
        return f"this template could run code: {reason}"
    return None


def _may_read(key: str, value: str, base: Path, allowed: Sequence[Path]) -> bool:
    """Whether a task's data are inside the allowed folders, links in them and matches of a pattern
    included, or on the network. A folder that is not here is one of the Hub.
    """
    if "://" in value:
        return value.startswith(("https://", "http://", "hf://")) and "::" not in value
    place = base / value
    if value.startswith("~") or (key == "data_files" and not _is_inside(place.resolve(), allowed)):
        return False
    return all(
        _is_inside(path.resolve(), allowed)
        and all(_is_inside(inner.resolve(), allowed) for inner in path.rglob("*"))
        for path in map(Path, glob.iglob(str(place), recursive=True))  # noqa: PTH207 (patterns)
    )


def _is_inside(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _tree(path: Path) -> yaml.Node | None:
    """A task file as YAML nodes; None where lm-eval cannot read it either and passes it over."""
    try:
        return yaml.compose(path.read_bytes(), Loader=_LOADER)
    except RecursionError:
        raise RecipeError("is nested too deeply to be read", file=shown_path(path)) from None
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _text(node: yaml.Node) -> str:
    """The text of a scalar; empty for null, lists and mappings."""
    is_text = isinstance(node, yaml.ScalarNode) and node.tag != f"{_PLAIN}null"
    return node.value if is_text else ""


def _nodes(tree: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Yield every node with the key that it stands under; below data_files all are files."""
    waiting, visited = [("", tree)] if tree else [], set()
    while waiting:
        key, node = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        yield key, node
        if isinstance(node, yaml.SequenceNode):
            waiting += [(key, inner) for inner in node.value]
        elif isinstance(node, yaml.MappingNode):
            for name, inner in node.value:
                waiting += [("", name), (key if key == "data_files" else _text(name), inner)]


def _could_run_code(template: str) -> str | None:
    """Return what of a template could run code or reach the interpreter. Without a call nothing
    runs, so only calls of harmless methods are allowed.
    """
    try:
        tree = jinja2.Environment().parse(template)
    except (jinja2.TemplateError, RecursionError):
        return None  # it is never filled
    # `loop.index` is harmless, though `loop` alone is not
    loops = {id(node.node) for node in tree.find_all(nodes.Getattr) if node.attr in _LOOP}
    for node in tree.find_all(nodes.Node):
        if isinstance(node, nodes.Call):
            called = getattr(node.node, "attr", getattr(node.node, "name", "something"))
            if called not in _CALLS:
                return f"it calls {called}"
        elif isinstance(node, nodes.Name) and id(node) not in loops:
            if node.name in _INTERPRETER:
                return node.name
        elif isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            return f".{node.attr}"
        elif isinstance(node, nodes.Filter) and node.name == "attr":
            return "the filter attr"
        elif isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            return type(node).__name__.lower()
    return None
