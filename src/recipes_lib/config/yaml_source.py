"""Strict YAML: text -> plain values plus the line of every key, and one-line errors for everything
YAML can get wrong.

PyYAML only parses here; values are built from its nodes, so that duplicate keys, tags, alias bombs
and the YAML 1.1 spellings that surprise people (`NO`, `010`, `1:30`) are seen. What a key means is
not this module's business.
"""

from __future__ import annotations

import difflib
import re
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import project_root

KeyPath = tuple[str | int, ...]
_MAX_BYTES = 1_000_000
_MAX_VALUES = 10_000  # aliases expanded; a recipe has some hundred
_MAX_INTEGER = 2**63 - 1  # what a 64-bit number holds; nothing that reads a recipe takes more
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\Z")
_HEADER = re.compile(r"\A(?:#[ -~]*\n)+")
# Without these libyaml reads a text as PyYAML does, in a fifteenth of the time.
_PYYAML_ALONE = re.compile(r"[^\n -~]|[!%>?|]")
_FAST_LOADER = getattr(yaml, "CSafeLoader", None)  # absent where PyYAML was built without libyaml
_TAG = "tag:yaml.org,2002:"
_NUMBERS = yaml.constructor.SafeConstructor()
_BOOLEANS = {"yes": True, "no": False, "on": True, "off": False, "true": True, "false": False}


@dataclass
class YamlSource:
    """The content of one YAML file.

    `lines` maps the path of a key (or list item) to its line; `warnings` are errors that do not
    stop anything; `problems` are errors about single keys and values, beside which the rest of the
    file can still be read.
    """

    file: str
    text: str
    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    warnings: list[RecipeError] = field(default_factory=list)
    problems: list[RecipeError] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer that refuses tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; a tag in front of it is an error."""
        event = self.peek_event()
        if getattr(event, "tag", None) is not None and not isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="tags are not allowed in recipes", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def read_yaml(path: Path, file: str | None = None, *, keep_going: bool = False) -> YamlSource:
    """Read a YAML file strictly.

    Args:
        file: the path as the user typed it, for messages.
        keep_going: as for `parse_yaml`.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8 text, or is not the YAML a recipe may
            consist of.
    """
    file = file or str(path)
    return parse_yaml(_read_text(path, file), file, keep_going=keep_going)


def parse_yaml(
    text: str, file: str, *, numbered: bool = True, keep_going: bool = False
) -> YamlSource:
    """Parse YAML text strictly.

    Args:
        numbered: false for text that is not a file (an override): its errors carry no line.
        keep_going: leave `problems` to the caller, who reports them with everything else that is
            wrong.

    Raises:
        RecipeError: as `read_yaml`.
    """
    source = YamlSource(file, text)
    try:
        if (node := _compose(text)) is not None:
            source.values = _Builder(source, numbered=numbered).build(node, ())
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, file, numbered) from None
    except RecursionError:
        raise RecipeError("YAML is nested too deeply", file=file) from None
    if source.problems and not keep_going:
        raise RecipeErrors(source.problems)
    return source


@lru_cache(maxsize=256)
def _compose(text: str) -> yaml.Node | None:
    """Compose a text once: a base is read again for every recipe that extends it, and PyYAML takes
    milliseconds a page, a third of them on the comment at the top. What libyaml refuses is left to
    PyYAML, whose words our errors are made of.
    """
    text = _HEADER.sub(_blank_lines, text, count=1)
    if _FAST_LOADER and not _PYYAML_ALONE.search(text):
        with suppress(yaml.YAMLError):
            return yaml.compose(text, Loader=_FAST_LOADER)
    return yaml.compose(text, Loader=_Loader)


def _blank_lines(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


def no_such_file(path: Path, file: str) -> RecipeError:
    """Return the error for a file that is not there, with the files of similar name in
    its folder.
    """
    folder = path.parent
    if path.suffix == "" and (recipes := _recipes_like(str(path))):
        near = f"did you mean {' or '.join(recipes)}?"
        return RecipeError("no such file or recipe", near, "all recipes: recipes ls", file=file)
    if path.is_symlink():
        return RecipeError("is a link that leads nowhere", file=file)
    if not folder.is_dir():
        return RecipeError("no such file", f"the folder {folder} does not exist", file=file)
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    found = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    alike = " or ".join(str(Path(file).parent / name) for name in found)
    return RecipeError("no such file", *([f"did you mean {alike}?"] if alike else []), file=file)


def _recipes_like(name: str) -> list[str]:
    """Return the short names of the project's recipes that end in `name`, or else are
    near to it.
    """
    folder = project_root() / "recipes"
    files = [*folder.glob("[!_]*.yaml"), *folder.glob("*/[!_]*.yaml")]
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    ending = sorted(full for full in names if full.endswith(f"/{name}"))
    return ending or difflib.get_close_matches(name, names, n=3, cutoff=0.6)


def _read_text(path: Path, file: str) -> str:
    """Return the file's text, newlines normalised and a byte order mark removed."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise RecipeError("is a folder, not a YAML file", file=file)
        if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
            what = "is a pipe or a device, not a file"
            raise RecipeError(what, "write the text to a file first", file=file)
        if found.st_size > _MAX_BYTES:
            raise RecipeError("is larger than 1 MB: not a recipe", file=file)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise no_such_file(path, file) from None
    except OSError as error:
        what = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise RecipeError(what, file=file) from None
    except ValueError as error:  # a NUL byte in the name
        raise RecipeError(f"cannot be a file name: {error}", file=file) from None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RecipeError("is UTF-16 text; save it as UTF-8", file=file)
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise RecipeError("contains NUL bytes: not a text file", file=file, line=line)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        what = f"is not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8"
        raise RecipeError(what, file=file, line=line) from None


def _syntax_error(error: yaml.YAMLError, text: str, file: str, numbered: bool) -> RecipeError:
    """Translate PyYAML's error: one line that says what is wrong, then the place with a caret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        what = getattr(error, "reason", None) or str(error).splitlines()[0]
        position = getattr(error, "position", None)
        line = text[:position].count("\n") + 1 if isinstance(position, int) else None
        return RecipeError(f"YAML: {what}", file=file, line=line)
    problem, context, mark = error.problem or "", error.context or "", error.problem_mark
    if "quoted scalar" in context:
        problem, mark = "this quote is never closed", error.context_mark
    elif "flow" in context:
        problem = f"this bracket is never closed, or a comma is missing ({problem})"
        mark = error.context_mark
    elif r"'\t'" in problem:
        problem = "a tab cannot indent; use spaces"
    elif "mapping values are not allowed" in problem:
        problem = (
            "a second ':' on one line, or indentation that does not fit; quote text that holds ': '"
        )
    elif "expected <block end>" in problem:
        problem = "the indentation does not fit the lines above"
    elif "could not find expected ':'" in problem:
        problem = "a line without ':', or text that should be quoted"
    elif "expected a single document" in context:
        problem = "only one document per file; remove the '---' line"
    if mark is None:
        return RecipeError(problem, file=file)
    lines = text.split("\n")
    excerpt = lines[mark.line].replace("\t", " ") if mark.line < len(lines) else ""
    start, line = max(0, mark.column - 60), mark.line + 1 if numbered else None
    caret = " " * (mark.column - start) + "^"
    return RecipeError(problem, excerpt[start : start + 100], caret, file=file, line=line)


class _Builder:
    """Builds plain values from PyYAML's nodes and records lines, duplicates and surprising
    spellings.
    """

    def __init__(self, source: YamlSource, *, numbered: bool) -> None:
        self.source = source
        self.numbered = numbered
        self.count = 0
        self.open: list[yaml.Node] = []
        self.problems = source.problems

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of `node`, which lies at `path`."""
        self.count += 1
        if self.count > _MAX_VALUES or any(node is above for above in self.open):
            raise self.error(node, f"aliases expand to more than {_MAX_VALUES:,} values")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        self.open.append(node)
        value: Any
        if isinstance(node, yaml.SequenceNode):
            value = []
            for index, item in enumerate(node.value):
                self.source.lines[*path, index] = item.start_mark.line + 1
                value.append(self.build(item, (*path, index)))
        else:
            value = self.mapping(node, path)
        self.open.pop()
        return value

    def mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """Return a mapping; keys are text as written."""
        value: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(self.error(key_node, "a key must be plain text"))
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            dotted = ".".join(map(str, (*path, key)))
            if key == "<<":
                what = "merge keys (<<) are not allowed; use 'extends' to share values"
                self.problems.append(self.error(key_node, what))
            elif key in value:
                what = f"duplicate key '{dotted}': lines {first[key]} and {line}"
                self.problems.append(self.error(key_node, what))
            first.setdefault(key, line)
            self.source.lines[*path, key] = line
            value[key] = self.build(value_node, (*path, key))
        return value

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        """Return a scalar as YAML 1.1 reads it, floats like 2e-5 included, with a warning where
        that surprises.
        """
        text, tag = node.value, node.tag.removeprefix(_TAG)
        if "${" in text:
            what = f"{_prefix(path)}no interpolation in recipes: {text!r} would be taken literally"
            self.problems.append(
                self.error(node, what, "write the value itself; share values with 'extends'")
            )
        if node.style:  # quoted
            return text
        if tag == "null":
            return None
        if tag == "bool":
            if text.lower() not in ("true", "false"):
                self.warn(node, path, text, str(_BOOLEANS[text.lower()]).lower())
            return _BOOLEANS[text.lower()]
        if tag in ("int", "float"):
            return self.number(node, path, tag)
        if _NUMBER.match(text) and not text.lstrip("+-").isdigit():
            return float(text)
        if tag == "timestamp" or (text.isdigit() and text.startswith("0")):
            self.warn(node, path, text, f'the text "{text}"')
        return text

    def number(self, node: yaml.ScalarNode, path: KeyPath, tag: str) -> int | float:
        """Return a number; base 60 and octal are read as YAML 1.1 does and warned about."""
        text = node.value
        read = _NUMBERS.construct_yaml_int if tag == "int" else _NUMBERS.construct_yaml_float
        try:
            value = read(node)
        except (ValueError, OverflowError):  # thousands of digits, or a form such as 0x_ without
            value = _MAX_INTEGER + 1
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            shown = text if len(text) <= 40 else f"{text[:20]}... ({len(text):,} characters)"
            what = f"{_prefix(path)}{shown} is not a number that fits in 64 bits"
            self.problems.append(self.error(node, what))
            return 0
        octal = tag == "int" and re.match(r"[-+]*0\d", text)
        if ":" in text or octal:
            self.warn(node, path, text, str(value))
        return value

    def warn(self, node: yaml.Node, path: KeyPath, text: str, read_as: str) -> None:
        """Record that a plain value is not read the way it looks."""
        what = f"warning: {_prefix(path)}{text} is read as {read_as}"
        quote = f'if it is text, quote it: "{text}"'
        self.source.warnings.append(self.error(node, what, quote))

    def error(self, node: yaml.Node, what: str, *hints: str) -> RecipeError:
        """Return an error at the node's place."""
        line = node.start_mark.line + 1 if self.numbered else None
        return RecipeError(what, *hints, file=self.source.file, line=line)


def _prefix(path: KeyPath) -> str:
    """Return the dotted key and a colon, as messages about a value begin; nothing for a value
    without a key.
    """
    return f"{'.'.join(map(str, path))}: " if path else ""
