"""A YAML file with its `extends` and command-line overrides -> one tree of values, each with the
file and line it came from.

Mappings merge key by key, lists and scalars replace, `null` sets null. Several parents are applied
in the order given, each file once, so a diamond is legal. Whether the values make sense is decided
in `validation`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config import kinds
from recipes_lib.config.documents import COMMAND_LINE, Origin
from recipes_lib.config.yaml_source import KeyPath, YamlSource, no_such_file, parse_yaml, read_yaml
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import check_run_name, shown_path


@dataclass
class Document:
    """A loaded YAML file: merged values, the origin of every key path, and the value that an
    overridden key had before.

    `problems` are errors that reading the file found about single keys and values.
    """

    path: Path
    kind: kinds.Kind
    values: dict[str, Any]
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    warnings: list[RecipeError] = field(default_factory=list)
    problems: list[RecipeError] = field(default_factory=list)
    text: str = ""
    levels: int = 0
    replaced: dict[KeyPath, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The path as a user would type it."""
        return shown_path(self.path)

    def origin(self, path: KeyPath) -> Origin:
        """Return the origin of the value at `path`, or of the nearest key above it."""
        above = (path[:length] for length in range(len(path), 0, -1))
        return next((self.origins[key] for key in above if key in self.origins), Origin(self.file))

    def error(self, path: KeyPath, what: str, *hints: str) -> RecipeError:
        """Return an error placed where the value at `path` was written."""
        origin = self.origin(path)
        return RecipeError(what, *hints, file=origin.file, line=origin.line)

    def folder(self, path: KeyPath) -> Path:
        """Return the folder that a relative path at `path` is meant from: that of the file that
        wrote it; the working directory for the command line.
        """
        origin = self.origins.get(path)
        if origin is None:
            return self.path.parent
        return Path.cwd() if origin.file == COMMAND_LINE else Path(origin.file).parent


def run_name(document: Document) -> str:
    """Return the run's name: `run.name`, else `<folder>--<file stem>`.

    Raises:
        RecipeError: the name cannot be a folder name.
    """
    given = (document.values.get("run") or {}).get("name")
    origin = document.origin(("run", "name"))
    name = (
        f"{document.path.resolve().parent.name}--{document.path.stem}" if given is None else given
    )
    return check_run_name(name, origin.file, origin.line)


def load_document(
    path: str | Path, overrides: Sequence[str] = (), *, keep_going: bool = False
) -> Document:
    """Load a YAML file of any kind; recipes and bases with everything they extend.

    Args:
        overrides: `section.key=value` words from the command line.
        keep_going: leave what is wrong with single keys and values (a duplicate key) in the
            document's `problems`, for a caller that goes on to check the rest and reports
            everything at once.

    Raises:
        RecipeError: unreadable file, YAML error, unknown kind, broken `extends`, malformed
            override.
    """
    path = Path(path)
    source = read_yaml(path, shown_path(path), keep_going=True)
    kind = kinds.kind_of(source.values, source.text, source.file)
    document = Document(path, kind, {}, text=source.text)
    if kind.name in ("recipe", "base"):
        parts, document.levels = _with_parents(path, source)
    else:
        parts = [source]
    parts += [
        _parse_override(override, kind.keys if kind.name == "study" else ())
        for override in overrides
    ]
    for part in parts:
        _merge(document, part)
    if document.problems and not keep_going:
        raise RecipeErrors(document.problems)
    return document


def _with_parents(path: Path, source: YamlSource) -> tuple[list[YamlSource], int]:
    """Return the file and all it extends, parents before children, each once; and the number of
    levels above it.
    """
    ordered: dict[Path, YamlSource] = {}
    deepest = 0

    def visit(path: Path, source: YamlSource, stack: tuple[Path, ...]) -> None:
        nonlocal deepest
        deepest = max(deepest, len(stack))
        stack = (*stack, _real(path))
        for name, line in _parents(source):
            parent = Path(os.path.normpath(path.parent / name))
            if _real(parent) in stack:
                steps = (*stack[stack.index(_real(parent)) :], _real(parent))
                circle = " -> ".join(step.name for step in steps)
                what = f"extends goes in a circle: {circle}"
                raise RecipeError(what, file=source.file, line=line)
            visit(parent, _read_parent(parent, name, source, line), stack)
        ordered.setdefault(_real(path), source)

    visit(path, source, ())
    return list(ordered.values()), deepest


def _real(path: Path) -> Path:
    """Return a path without links; where a link leads to itself `resolve` would raise."""
    return Path(os.path.realpath(path))


def _parents(source: YamlSource) -> Iterable[tuple[str, int | None]]:
    names = source.values.get("extends")
    items = names if isinstance(names, list) else [] if "extends" not in source.values else [names]
    for index, name in enumerate(items):
        line = source.lines.get(("extends", index), source.lines[("extends",)])
        if not isinstance(name, str) or not name or "\0" in name:
            raise RecipeError(
                "extends must be a file name or a list of file names", file=source.file, line=line
            )
        yield name, line


def _read_parent(parent: Path, name: str, child: YamlSource, line: int | None) -> YamlSource:
    """Read a file named under `extends`; errors about its absence are placed at the
    child's line.
    """
    if not parent.is_file():
        what = f"extends a file that does not exist: {shown_path(parent)}"
        raise RecipeError(what, *no_such_file(parent, name).hints, file=child.file, line=line)
    source = read_yaml(parent, shown_path(parent), keep_going=True)
    kind = kinds.kind_of(source.values, source.text, source.file)
    if kind.name not in ("recipe", "base"):
        raise RecipeError(f"extends {name}, which is {kind.title}", file=child.file, line=line)
    return source


def _merge(document: Document, source: YamlSource) -> None:
    """Write the values of `source` over the document's."""
    document.warnings.extend(source.warnings)
    document.problems.extend(source.problems)

    def write(target: dict[str, Any], values: dict[str, Any], path: KeyPath) -> None:
        for key, value in values.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                if source.file != COMMAND_LINE:
                    document.origins[here] = Origin(source.file, source.lines.get(here))
                write(target[key], value, here)
                continue
            for stale in [known for known in document.origins if known[: len(here)] == here]:
                del document.origins[stale]
            if key in target and target[key] != value:
                document.replaced[here] = target[key]
            target[key] = value
            for known, line in source.lines.items():
                if known[: len(here)] == here:
                    document.origins[known] = Origin(source.file, line)
            document.origins.setdefault(here, Origin(source.file))

    values = {key: value for key, value in source.values.items() if key != "extends"}
    write(document.values, values, ())


def _parse_override(word: str, plain_keys: Collection[str] = ()) -> YamlSource:
    """Turn `section.key=value` into the tree that holds this one value.

    Args:
        plain_keys: top-level keys of this kind of file, which need no section.
    """
    name, separator, text = word.removeprefix("--").partition("=")
    keys = name.split(".")
    what = ""
    if not separator or not all(keys):
        what, text = f"'{word}' is not section.key=value", text or "VALUE"
    elif len(keys) == 1 and name not in (*kinds.SECTIONS, *plain_keys):
        what = f"'{name}' needs its section"
    if what:
        raise RecipeError(what, file=COMMAND_LINE)
    source = parse_yaml(text, COMMAND_LINE, numbered=False, keep_going=True)
    value = source.values
    for key in reversed(keys):
        value = {key: value}
    lines: dict[KeyPath, Any] = {tuple(keys[:length]): None for length in range(1, len(keys) + 1)}
    lines |= {(*keys, *path): None for path in source.lines}
    for warning in source.warnings:
        warning.what = f"{warning.what} ({name})"
    for problem in source.problems:
        problem.what = f"{name}: {problem.what}"
    return YamlSource(COMMAND_LINE, text, value, lines, source.warnings, source.problems)
