"""The text side of `migrate`: a flat YAML cut into its keys, and the recipe put together from them.

Keys move as text, so comments, number formats and long templates stay as they were written; only a value that must change is
written anew. Which key goes where is decided in `migrate`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from recipes_lib.recipe.kinds import SECTIONS
from recipes_lib.redaction import is_secret_name

_AS_WRITTEN = object()


@dataclass
class Entry:
    """One top-level key of the flat file: its value and the text it was written with."""

    key: str
    value: Any
    line: int
    text: list[str]
    comments_above: list[str] = field(default_factory=list)
    comment_beside: str = ""


@dataclass
class Migration:
    """A migration in progress, then its result: `text()` of the recipe and the `changes` to list.

    By dotted key, `values` holds what the recipe says and `origins` the flat key it came from; `left` are the lines of what stays behind.
    """

    file: str
    entries: dict[str, Entry]
    changes: list[str] = field(default_factory=list)
    placed: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    waiting_comments: list[str] = field(default_factory=list)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the flat file's value of `key`."""
        return self.entries[key].value if key in self.entries else default

    def move(self, entry: Entry, dotted: str, value: Any = _AS_WRITTEN, note: str = "") -> None:
        """Place an entry under its new name; a `value` replaces the one that was written."""
        key = dotted.split(".", 1)[1]
        lines = self._comments(entry)
        if value is _AS_WRITTEN:
            lines += [re.sub(r"^(['\"]?)" + re.escape(entry.key) + r"\1(?=\s*:)", key, entry.text[0]), *entry.text[1:]]
        else:
            lines += _dump(key, value, entry.comment_beside)
        self._place(dotted, lines, entry.value if value is _AS_WRITTEN else value)
        self.origins[dotted] = entry.key
        renamed = "" if key == entry.key else " (renamed)"
        changed = "" if value is _AS_WRITTEN else f": {_short(entry.value)} -> {_short(value)}"
        self.changes.append(f"{self.file}:{entry.line}: {entry.key} -> {dotted}{renamed}{changed}{f'; {note}' if note else ''}")

    def add(self, dotted: str, value: Any, why: str) -> None:
        """Add a key that the flat file did not have."""
        self._place(dotted, _dump(dotted.split(".", 1)[1], value, f"# {why}"), value)
        self.changes.append(f"added {dotted}: {_short(value)}; {why}")

    def drop(self, entry: Entry, why: str) -> None:
        """Leave out an entry that has no effect here."""
        self._keep_comments(entry)
        self.changes.append(f"{self.file}:{entry.line}: {entry.key} left out; {why}")

    def leave(self, entry: Entry, why: str, *details: str) -> None:
        """Keep an entry as a comment at the end of the recipe."""
        self._keep_comments(entry)
        text = [f"{entry.key}: (not copied)"] if is_secret_name(entry.key) else entry.text
        self.left += [f"# {entry.key}: {why}", *(f"#   {detail}" for detail in details), *(f"#     {line}".rstrip() for line in text)]
        for what in details or ("",):
            self.changes.append(f"{self.file}:{entry.line}: {entry.key} NOT CARRIED OVER{f' ({what})' if what else ''}; {why}")

    def text(self) -> str:
        """Return the recipe as YAML text."""
        lines = [*self.header]
        for section in SECTIONS:
            if section in self.placed:
                lines += ["", f"{section}:", *self.placed[section]]
            elif section == "lora":
                lines += ["", "lora: null"]
        if self.left:
            lines += ["", "# Not carried over by `recipes migrate`, with the lines as they were:", *self.left]
        if any(self.waiting_comments):
            lines += ["", *(line for line in self.waiting_comments if line.strip())]
        return "\n".join(lines).rstrip() + "\n"

    def _place(self, dotted: str, lines: list[str], value: Any) -> None:
        self.placed.setdefault(dotted.split(".", 1)[0], []).extend(f"  {line}" if line.strip() else "" for line in lines)
        self.values[dotted] = value

    def _comments(self, entry: Entry) -> list[str]:
        comments = [line for line in (*self.waiting_comments, *entry.comments_above) if line.strip()]
        self.waiting_comments, entry.comments_above = [], []
        return comments

    def _keep_comments(self, entry: Entry) -> None:
        """Hand the comments above an entry that goes to the next one that stays: they are headings more often than remarks."""
        self.waiting_comments += entry.comments_above


def cut_into_entries(text: str, values: dict[str, Any]) -> tuple[dict[str, Entry], list[str]]:
    """Cut the file into its top-level keys, each with the comment lines above it.

    Returns:
        The entries, and the comment lines at the end of the file.
    """
    lines = text.split("\n")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "anything else was refused before"
    pairs = root.value
    aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    entries: dict[str, Entry] = {}
    if root.flow_style or aliases:  # no line of its own, or text that would lose its anchor: write the values anew
        for key_node, _ in pairs:
            key = key_node.value
            entries[key] = Entry(key, values[key], key_node.start_mark.line + 1, _dump(key, values[key]))
        return entries, [line for line in lines if line.startswith("#")]
    starts = [key_node.start_mark.line for key_node, _ in pairs] + [len(lines)]
    above = [line for line in lines[: starts[0]] if not line.startswith(("---", "%"))]
    for index, (key_node, value_node) in enumerate(pairs):
        block = lines[starts[index] : starts[index + 1]]
        size = len(block)
        while size > 1 and (not block[size - 1].strip() or block[size - 1].startswith("#")):
            size -= 1
        beside = ""
        if value_node.end_mark.line == key_node.start_mark.line:
            rest = block[0][value_node.end_mark.column :].strip()
            beside = rest if rest.startswith("#") else ""
        entries[key_node.value] = Entry(key_node.value, values[key_node.value], starts[index] + 1, block[:size], above, beside)
        above = block[size:]
    return entries, above


def _dump(key: str, value: Any, comment: str = "") -> list[str]:
    """Return `key: value` as YAML lines; mappings of scalars in one line."""
    flow = isinstance(value, dict) and all(not isinstance(item, (dict, list)) for item in value.values())
    if flow:
        lines = [f"{key}: {yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()}"]
    else:
        lines = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000).rstrip("\n").split("\n")
    return [f"{lines[0]}  {comment}", *lines[1:]] if comment and len(lines) == 1 else lines


def _short(value: Any) -> str:
    """Return a value for a line of the list of changes."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).replace("\n...", "").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."
