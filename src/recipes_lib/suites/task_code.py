"""What in an eval recipe, and in the lm-eval task files it brings, would run Python code. Reads the
files; runs nothing of them.

lm-eval imports what a task file names with `!function`, loads a metric that it does not know from a
folder or the Hub, and fills templates with an interpreter that can reach the whole process. A
generation setting can name code too. All of that runs only if the eval recipe
(`generation.trust_remote_code`) and the command line (`--trust-remote-code`) allow it; templates of
such a folder are filled in a sandbox until then (`harness`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.loader import Document
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import shown_path
from recipes_lib.suites.task_names import lm_eval_folder

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
        document.error(("suite", *path), f"suite.{'.'.join(map(str, path))} runs code", ALLOW)
        for path, value in _walk(
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
    for path, value in _walk(values):
        if path[-1] == "metric" and isinstance(value, str) and value not in known:
            found.append(value)
    return found


def _walk(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every key path below plain values, with its value."""
    items = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values)
        if isinstance(values, list)
        else ()
    )
    for key, value in items:
        yield (*path, key), value
        yield from _walk(value, (*path, key))


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
