"""The rows of a recipe: read from a local file, a folder, a Hub data set, or a mixture of these (a
local path wins over a Hub id of the same name), selected, and split into training, validation and
test. Columns of any spelling become our fields (texts, or messages); errors name rows by file and
line, or a key of the recipe.

Values are not converted, so `datasets` reads no text: its CSV reader turns the answer "NA" into
null and "007" into 7, and its JSON reader names no line.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.documents import did_you_mean, near_file
from recipes_lib.config.recipe import (
    DATA_FORMATS,
    HUB_ID,
    DataSection,
    Recipe,
    SourcePart,
    SplitSection,
    data_format,
)
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import remembered_hash
from recipes_lib.core.project import shown_path

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
Numbered = tuple[int | None, Any]  # a row, its JSON text, or why it is none
NUM_LISTED = 10
# One turn of a conversation, as the chat templates read it: role and content; of the assistant also
# reasoning_content, tool_calls (in OpenAI's spelling) and weight (0 for no loss).
Message = dict[str, Any]
CALL = "function_call"  # ShareGPT's turn that is nothing but calls
# Every name of a role -> ours: OpenAI's, and ShareGPT's, as its `from` key has them.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
OF_TOOLS = ("tool_call_id", "name")
# The sets of fields that a prompt format can read, the best first.
FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dolly": (("instruction", "response"),),
    "alpaca": (("instruction", "response"),),
    "raw": (("prompt", "completion"), ("text",)),
    "chat": (("messages",), ("prompt", "completion"), ("instruction", "response")),
}
OF_CHAT = ("system", "tools", "chat_template_kwargs")
# The names that files use for our fields.
COLUMNS = {
    **{name: (name,) for name in ("id", "prompt", "completion", "text", "chat_template_kwargs")},
    "instruction": ("instruction", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "answer"),
    "messages": ("messages", "conversations"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}


@dataclass(slots=True)
class DataRow:
    """One row: where it stands, its texts and its identity."""

    file: str  # `FILE row N` where the format has no lines
    line: int | None
    fields: dict[str, Any]  # our names -> text or messages; tools and template arguments are JSON
    source: int = 0  # position of its source in the mixture
    id: str = ""  # unique label in splits.json
    content: bytes = b""  # SHA-256 of the normalised texts, which alone decides the split

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @property
    def texts(self) -> list[str]:
        """All texts, of conversations all that each message says."""
        texts: list[str] = []
        for value in self.fields.values():
            if isinstance(value, str):
                texts.append(value)
            else:
                texts += [text for message in value for text in message_texts(message)]
        return texts

    @property
    def is_empty(self) -> bool:
        """Whether a text that the row should teach is empty."""
        for name in ("response", "completion", "text"):
            if isinstance(self.fields.get(name), str):
                return not self.fields[name].strip()
        messages = self.fields.get("messages") or self.fields["completion"]
        taught = [each for each in messages if each["role"] == "assistant" and "weight" not in each]
        return not all("".join(message_texts(message)).strip() for message in taught)


# ---- errors ----


class SettingError(DataError):
    """A data error that a key of the recipe causes."""

    def __init__(self, key: str, what: str, *hints: str) -> None:
        super().__init__(what, *hints)
        self.key = key


class BadRow(DataError):
    """Why one row cannot be used, and what to do; `BadRows` says which row."""


def place(recipe: Recipe, error: DataError) -> DataError:
    """Give an error without a file the place of its key, or of `data.source`, in the recipe."""
    if error.file is None:
        at = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file, error.line = at.file, at.line
    return error


class BadRows(list[BadRow]):
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def add(self, row: DataRow, reason: BadRow) -> None:
        """Note a row; its texts are not kept."""
        reason.file, reason.line = row.file, row.line
        self.append(reason.with_traceback(None))

    def lines(self) -> list[str]:
        """Return a line for each row, its place and its error, in the order of the files."""
        self.sort(key=lambda reason: (str(reason.file), reason.line or 0))
        return [str(DataError(each.what, file=each.file, line=each.line)) for each in self]

    def error(self, num_rows: int | None = None) -> DataError:
        """Return one error for all of them, of `num_rows` that were read."""
        lines, first = self.lines()[1:], self[0]
        more = [f"... and {len(lines) - NUM_LISTED} more"] if len(lines) > NUM_LISTED else []
        hints = dict.fromkeys(hint for reason in self for hint in reason.hints)
        if num_rows is not None and len(self) < num_rows:
            count = f"{len(self)} of {num_rows}"
            more.append(f"to leave out bad rows ({count}): data.on_bad_row: skip")
        lines = [*lines[:NUM_LISTED], *hints, *more]
        return DataError(first.what, *lines, file=first.file, line=first.line)


def listed(names: Iterable[Any], limit: int = NUM_LISTED) -> str:
    """Return the first names of a list, and how many there are more: `a, b, ... (2 more)`."""
    names = [str(name) for name in names]
    rest = [f"... ({len(names) - limit} more)"] if len(names) > limit else []
    return ", ".join([*names[:limit], *rest])


# ---- values ----


def parsed_json(value: Any, kind: type, what: str) -> Any:
    """Return a value of the kind (list or dict), or what it is as JSON text; or raise a BadRow."""
    try:
        value = json.loads(value) if isinstance(value, str | bytes) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise BadRow(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def checked_text(value: Any, what: str) -> str:
    """Return a text, or raise a BadRow where it is none or has half of a UTF-16 pair."""
    if not isinstance(value, str):
        raise BadRow(f"{what}: expected text, found {type(value).__name__.removesuffix('Type')}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what}: {error}") from None
    return value


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: None, empty, or empty as JSON."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


# ---- conversations ----


def read_messages(value: Any, what: str) -> list[Message]:
    """Return messages of any spelling in ours."""
    messages = parsed_json(value, list, what)
    return [_read_message(each, f"{what}, message {at}") for at, each in enumerate(messages)]


def _read_message(given: Any, what: str) -> Message:
    given = parsed_json(given, dict, what)
    speaker = given.get("role") or given.get("from")
    role = ROLES.get(str(speaker))
    if role is None:
        raise BadRow(f"{what}: unknown role {speaker!r}; roles are {', '.join(ROLES)}")
    what = f"{what} ({role})"
    message: Message = {"role": role}
    content = given["content"] if given.get("content") is not None else given.get("value")
    if role == "assistant":
        calls = content if speaker == CALL else given.get("tool_calls")
        if thoughts := next((given[key] for key in THOUGHTS if given.get(key)), None):
            message["reasoning_content"] = checked_text(thoughts, f"{what}: thoughts")
        if not is_blank(calls):
            message["tool_calls"] = _read_calls(calls, what)
        if speaker == CALL or (content is None and len(message) > 1):
            content = ""  # only calls or thoughts
    message |= {key: given[key] for key in OF_TOOLS if given.get(key)}
    message["content"] = _content_text(content, role, what)
    weight = given.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(f"{what}: weight {weight!r}: an assistant turn may have 0 (no loss) or 1")
    return message | ({"weight": 0} if weight == 0 and role == "assistant" else {})


def _content_text(content: Any, role: str, what: str) -> str:
    """Return the text of a content, of its parts, or of what a tool returned as JSON."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if all(part.get("type") == "text" for part in parts):
            return "".join(checked_text(part.get("text"), f"{what}: a part") for part in parts)
        if role != "tool":
            raise BadRow(f"{what}: only content parts {{type: text, text: ...}} are read")
    if role == "tool" and isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    return checked_text(content, what)


def _read_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Return tool calls of any spelling (OpenAI's, `{name, arguments}`, JSON text of either)."""
    value, calls = parsed_json(value, object, f"{what}: the tool call"), []
    for given in value if isinstance(value, list) else [value]:
        function = given.get("function", given) if isinstance(given, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not function or not isinstance(name, str) or not name:
            raise BadRow(f"{what}: a tool call needs a name, as in {{name, arguments}}")
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = parsed_json(arguments, dict, f"{what}: the arguments of tool call '{name}'")
        called = {"name": name, "arguments": arguments}
        checked_text(json.dumps(called, ensure_ascii=False), what)
        identity = {"id": given["id"]} if given.get("id") else {}
        calls.append({**identity, "type": "function", "function": called})
    return calls


def _json_text(name: str, value: Any, what: str) -> str:
    """Return tools in OpenAI's spelling (also of bare functions), or template arguments without
    those that are null, as JSON text.
    """
    if name == "tools":
        tools = [parsed_json(tool, dict, what) for tool in parsed_json(value, list, what)]
        functions = [parsed_json(tool.get("function", tool), dict, what) for tool in tools]
        if not all(isinstance(function.get("name"), str) for function in functions):
            raise BadRow(f"{what}: a tool is not a function with a name")
        value = [{"type": "function", "function": function} for function in functions]
    else:
        given = parsed_json(value, dict, what)
        value = {key: inner for key, inner in given.items() if inner is not None}
    return checked_text(json.dumps(value, ensure_ascii=False), what)


def template_values(row: DataRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the template and the row's tools; the row's own arguments win."""
    own, tools = row.fields.get("chat_template_kwargs"), row.fields.get("tools")
    values = {**given, **json.loads(own or "{}")}
    return {**values, "tools": json.loads(tools)} if tools else values


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """Return all that a message says: its thoughts, its content, and its tool calls as JSON."""
    thoughts = [message["reasoning_content"]] if "reasoning_content" in message else []
    calls = message.get("tool_calls", ())
    called = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    return [*thoughts, message["content"], *called]


def conversation_of(row: DataRow, system_prompt: str | None) -> list[Message]:
    """Return the row as a conversation: its messages, or one user and one assistant turn. A system
    message or a `system` column of the row wins over the recipe's `system_prompt`.
    """
    fields = row.fields
    if "messages" in fields:
        messages = fields["messages"]
    elif isinstance(fields.get("prompt"), list):
        messages = [*fields["prompt"], *fields["completion"]]
    else:
        names = ("prompt", "completion") if "prompt" in fields else ("instruction", "response")
        question, answer = (fields[name] for name in names)
        if fields.get("context", "").strip():
            question += f"\n\n{fields['context']}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return with_system_prompt(messages, fields.get("system") or system_prompt)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Return the conversation with a system message in front, unless it has one already."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def check_roles(messages: Sequence[Message]) -> None:
    """Check who speaks when: a system message or none, then user and assistant in turn, the results
    of tools between two turns of the assistant, who is last.
    """
    roles = [message["role"] for message in messages]
    in_order = re.match("s?(ua(t+a)*)*", "".join(role[0] for role in roles))
    number = in_order.end() if in_order else 0
    if number < len(roles) or "assistant" not in roles:
        expected = "expected user and assistant in turn, assistant last"
        raise BadRow(f"roles from message {number} on: {listed(roles[number:], 3)}; {expected}")


# ---- columns ----


def fields_by_format(
    columns: Mapping[Any, str], present: Sequence[str]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return our names -> columns, as mapped or by their usual names; and for each prompt format
    that can read such rows, the first set of fields.
    """
    usual = {name: [each for each in COLUMNS[name] if each in present] for name in COLUMNS}
    names = {name: known[0] for name, known in usual.items() if known} | {**columns}
    sets = {
        prompt_format: [fields for fields in choices if {*fields} <= names.keys()]
        for prompt_format, choices in FIELDS.items()
    }
    return names, {prompt_format: fields[0] for prompt_format, fields in sets.items() if fields}


def map_columns(
    rows: Sequence[DataRow], section: DataSection, columns: Mapping[Any, str], bad: BadRows
) -> list[DataRow]:
    """Give the rows of one source our fields in place of its columns (`columns`: our name -> the
    file's), and return the usable rows.
    """
    prompt_format = section.prompt_format
    present = [*dict.fromkeys(name for row in rows for name in row.fields)]
    for name, column in columns.items():
        if column not in present:
            what = f"data.columns.{name}: the data has no column '{column}'"
            hints = did_you_mean(column, present) or [f"columns are {', '.join(present)}"]
            raise SettingError("data.columns", what, *hints)
    names, fields = fields_by_format(columns, present)
    if prompt_format not in fields:
        expected = " / ".join("+".join(each) for each in FIELDS[prompt_format])
        what = f"columns are {', '.join(present)}; expected {expected}"
        fitting = [f"data.prompt_format: {other}" for other in fields]
        hint = " or ".join([*fitting, "data.columns: {<our name>: <your column>}"])
        raise SettingError("data.prompt_format", what, f"set {hint}")
    read = {*fields[prompt_format], "id", *(OF_CHAT if prompt_format == "chat" else ())}
    read |= {"context"} if "instruction" in read else set()
    names = {name: names[name] for name in names if name in read}
    usable = []
    for row in rows:
        values, row.fields = row.fields, {}
        try:
            _fill(row, values, names, is_chat=prompt_format == "chat")
            usable.append(row)
        except BadRow as reason:
            bad.add(row, reason)
    return usable


def _fill(row: DataRow, values: Mapping[str, Any], names: Mapping[str, str], is_chat: bool) -> None:
    fields = row.fields
    for name, column in names.items():
        value, what = values.get(column), f"column '{column}'"
        is_half = is_chat and name in ("prompt", "completion") and isinstance(value, list)
        if name == "id":
            row.id = str(value) if isinstance(value, str | int) else ""
        elif name in ("tools", "chat_template_kwargs"):
            fields |= {} if is_blank(value) else {name: _json_text(name, value, what)}
        elif name == "messages" or is_half:
            fields[name] = read_messages(value, what)
        elif value is not None or name not in ("context", "system"):
            fields[name] = checked_text(value, what)
    if isinstance(fields.get("prompt"), list) != isinstance(fields.get("completion"), list):
        raise BadRow("prompt and completion: one is text, the other a list of messages")
    if is_chat:
        check_roles(conversation_of(row, None))


# ---- sources ----


def listed_sources(section: DataSection) -> list[SourcePart]:
    """Return the sources that `data.source` names, with all of their keys; a single one is a
    mixture of one.
    """
    for key in ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss"):
        is_set = getattr(section, key) != DataSection.model_fields[key].default
        if is_set and section.prompt_format != "chat":
            what = f"data.{key} works only in prompt_format chat, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = section.model_dump(include={"subset", "source_split", "revision"})
    sources = []
    for part in [section.source] if isinstance(section.source, str) else section.source:
        own = {"source": part} if isinstance(part, str) else part.model_dump(exclude_none=True)
        columns = section.columns | (getattr(part, "columns", None) or {})
        sources.append(SourcePart.model_construct(**{**shared, **own, "columns": columns}))
    return sources


def is_on_hub(source: SourcePart) -> bool:
    """Return whether no file or folder has a source's name, and it is not named like a file."""
    path = Path(source.source).expanduser()
    return not (path.exists() or data_format(path)) and bool(HUB_ID.fullmatch(source.source))


def needs_hub(section: DataSection) -> bool:
    """Return whether some of the rows are on the Hub."""
    return any(map(is_on_hub, listed_sources(section)))


def load_rows(source: SourcePart, bad: BadRows | None = None) -> list[DataRow]:
    """Return the rows of one source, as `read_file` returns them."""
    if not is_on_hub(source):
        return [row for file in source_files(source) for row in read_file(file, bad)]
    rows = enumerate(map(without_nulls, hub_data_set(source)), 1)
    return [DataRow(f"{source.source} row {number}", None, row) for number, row in rows]


def source_files(source: SourcePart) -> list[Path]:
    """Return the files of a local source, or raise an error that names the nearest."""
    path = Path(source.source).expanduser()
    if path.exists():
        return [path] if path.is_file() else data_files(path, source.source_split or "train")
    hints = [*near_file(path), f"looked in {shown_path(path.parent.resolve())}"]
    raise SettingError("data.source", f"no such file or folder: {shown_path(path)}", *hints)


def source_hashes(section: DataSection) -> dict[str, str]:
    """Return the SHA-256 of each local file of a recipe's rows, by its number and name."""
    return {
        f"data {number} {file.name}": remembered_hash(file)
        for number, source in enumerate(listed_sources(section), 1)
        if not is_on_hub(source)
        for file in source_files(source)
    }


def data_files(folder: Path, split: str) -> list[Path]:
    """Return a folder's data files of a split, as `datasets` tells them by their names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    place, kinds = str(folder.resolve()), list(DATA_FORMATS)
    try:
        patterns = get_data_patterns(place)
        files = DataFilesDict.from_patterns(patterns, place, allowed_extensions=kinds)
    except OSError:  # there is none
        files = {}
    by_split = {str(name): sorted(map(Path, paths)) for name, paths in files.items() if paths}
    if split not in by_split:
        what = f"no data file of the split '{split}' in this folder"
        hint = f"splits: {', '.join(by_split) or 'none'}; known endings: {', '.join(kinds)}"
        raise DataError(what, hint, file=shown_path(folder))
    return by_split[split]


def hub_data_set(source: SourcePart) -> Dataset:
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline."""
    import datasets

    name, keys = source.source, {"split": source.source_split, "revision": source.revision}
    try:
        return datasets.load_dataset(name, source.subset, **keys)
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"'{name}' is not a file or folder, nor found on the Hub: {one_line(error)}"
        hint = f"check the name (private: hf auth login), or put a file at {name}/train.jsonl"
        raise SettingError("data.source", what, hint) from error


# ---- files ----


def read_file(path: Path, bad: BadRows | None = None) -> list[DataRow]:
    """Return the rows of a data file with its columns. Lines that are no rows are added to `bad`;
    without it, they are an error.
    """
    path = path.expanduser()
    kind, file = data_format(path), shown_path(path)
    if kind is None or not path.is_file():  # or a pipe, which may never end
        what = f"not a data file; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what if path.exists() else "no such file", file=file)
    rows, no_rows = [], BadRows() if bad is None else bad
    try:
        for number, (line, values) in enumerate(_READERS[kind](path), 1):
            row = DataRow(file if line else f"{file} row {number}", line, {})
            try:
                if isinstance(values, BadRow):
                    raise values
                row.fields = parsed_json(values, dict, "the row")
                rows.append(row)
            except BadRow as reason:
                no_rows.add(row, reason)
    except Exception as error:  # of a codec, csv, pyarrow or the disk
        raise DataError(f"cannot be read as {kind[1:]}: {one_line(error)}", file=file) from None
    if bad is None and len(no_rows):
        raise no_rows.error()
    return rows


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _read_json(path: Path) -> Iterator[Numbered]:
    """Read a list of objects, or JSON Lines under the name .json."""
    content = path.read_bytes()
    if not content.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        return _read_jsonl(path)
    return ((None, row) for row in json.loads(content))


def _read_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        sign = "\t" if data_format(path) == ".tsv" else ","
        reader = csv.DictReader(stream, delimiter=sign, strict=True)
        names, start = reader.fieldnames or [], reader.line_num + 1
        for row in reader:
            is_whole = None not in row and None not in row.values()
            yield start, row if is_whole else BadRow(f"not {len(names)} fields like the header")
            start = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow.parquet import read_table

    for batch in read_table(path).to_batches():
        yield from ((None, without_nulls(row)) for row in batch.to_pylist())


def without_nulls(value: Any) -> Any:
    """Return the value without the keys that Arrow fills in with null, as another row has them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


_READERS = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
}


# ---- rows ----


@dataclass(frozen=True)
class Rows:
    """The usable rows of all sources in file order."""

    rows: list[DataRow]  # their ids are unique
    sources: list[SourcePart]
    num_read: int  # rows in the files, those that cannot be used included


def read_data(section: DataSection, bad: BadRows) -> Rows:
    """Read, check and name the rows of all sources; those that cannot be used go to `bad`."""
    rows, num_read, sources = list[DataRow](), 0, listed_sources(section)
    for number, source in enumerate(sources):
        num_bad = len(bad)
        read = load_rows(source, bad)
        num_read += len(read) + len(bad) - num_bad
        if not read:
            raise bad.error() if bad else SettingError("data.source", f"0 rows in {source.source}")
        usable = map_columns(read, section, source.columns or {}, bad)
        for row in usable:
            row.source, row.content = number, content_hash(row.fields)
        taken = round(min(len(usable), source.max_examples or len(usable)) * min(source.weight, 1))
        rows += first_in_hash_order(usable, max(taken, 1), section.split.seed)
    times = Counter[str]()
    for row in rows:  # ids are labels: the file's or a hash, numbered where they repeat
        row.id = row.id or row.content[:8].hex()
        times[row.id] += 1
        while (number := times[row.id]) > 1:
            row.id += f"#{number}"
            times[row.id] += 1
    used = first_in_hash_order(rows, section.max_examples, section.split.seed)
    return Rows(used, sources, num_read)


def split_rows(
    rows: Sequence[DataRow], section: SplitSection, least: int = 1
) -> dict[str, list[DataRow]]:
    """Return the rows of each split, in file order; `least` of them have to train."""
    sides, both = [TRAIN] * len(rows), round(section.validation + section.test, 6)
    if section.method == "published":  # two calls, as the original study's script
        from datasets import Dataset

        if not (section.validation and section.test and both < 1):
            raise SettingError("data.split", "published needs validation, test and training rows")
        first = Dataset.from_dict({"row": range(len(rows))}).train_test_split(
            both, seed=section.seed
        )
        tested = math.ceil(round(len(first["test"]) * section.test / both, 6))
        second = first["test"].train_test_split(tested, seed=section.seed)
        for name, part in ((VALIDATION, second["train"]), (TEST, second["test"])):
            for number in part["row"]:
                sides[number] = name
    elif section.method == "hash":
        places = [unit_interval(row.content.hex(), str(section.seed)) for row in rows]
        low, high = section.validation, 1 - section.test
        if low and len({*places}) > 1:  # a small data set has a validation and a test row, too
            low = max(low, math.nextafter(min(places), 1))
        if section.test and len({*places}) > (2 if low else 1):
            high = min(high, max(places))
        sides = [VALIDATION if at < low else TEST if at >= high else TRAIN for at in places]
    divided: dict[str, list[DataRow]] = {name: [] for name in SPLITS}
    for row, side in zip(rows, sides, strict=True):
        divided[side].append(row)
    if (left := len(divided[TRAIN])) < least:
        what = f"{left} rows are left for training, of {len(rows)}; a step needs {least}"
        hint = "lower run.global_batch_size or data.split.validation; raise data.filters.max_tokens"
        raise SettingError("data.split", what, hint)
    return divided


def train_rows(section: DataSection, files: object = None) -> list[DataRow]:
    """Return the usable rows that train, without a tokenizer, and so before `max_tokens`; an error
    where the files are not those that a run recorded (`source_hashes`).
    """
    if files is not None and source_hashes(section) != files:
        raise DataError("the data has changed since the run was trained")
    return split_rows(read_data(section, BadRows()).rows, section.split)[TRAIN]


def check_rows(recipe: Recipe) -> list[DataError]:
    """Return the errors in rows that are all in local files, without a tokenizer."""
    bad, section = BadRows(), recipe.data
    try:
        read = None if needs_hub(section) else read_data(section, bad)
        if read and bad and (section.on_bad_row == "error" or not read.rows):
            raise bad.error(read.num_read)
        if read and len(read.sources) == 1:  # of a mixture, rows may repeat
            split_rows(read.rows, section.split, recipe.run.global_batch_size or 1)
    except DataError as error:
        return [place(recipe, error)]
    return []


def unit_interval(key: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on the key and the salt alone.

    Example:
        >>> round(unit_interval("row-1", "42"), 3), round(unit_interval("row-1", "43"), 3)
        (0.501, 0.853)
    """
    return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big") / 2**64


def first_in_hash_order(rows: Sequence[DataRow], limit: int | None, seed: int) -> list[DataRow]:
    """Return the `limit` rows that come first in hash order, in file order. The salt is not the
    split's, so that they fall on all sides.
    """
    if limit is None or len(rows) <= limit:
        return list(rows)
    places = [unit_interval(row.content.hex(), f"order:{seed}") for row in rows]
    first = sorted(range(len(rows)), key=places.__getitem__)[:limit]
    return [rows[index] for index in sorted(first)]


def content_hash(fields: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a row's texts, whatever the prompt format and the order of columns;
    empty fields leave no trace.
    """
    parts: list[Any] = []
    for name, value in sorted(fields.items()):
        if isinstance(value, str):
            parts += [[name, text]] if (text := _normalised(value)) else []
            continue
        turns = [[message["role"], *map(_normalised, message_texts(message))] for message in value]
        for turn, message in zip(turns, value, strict=True):
            turn += [0] if "weight" in message else []
        parts.append([name, turns])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def formats_of(data: Path) -> tuple[str, ...]:
    """Return the prompt formats that can read the first row of a file or folder, best first."""
    file = source_files(SourcePart.model_construct(source=str(data)))[0]
    names = [name for row in read_file(file)[:1] for name in row.fields]
    formats = tuple(fields_by_format({}, names)[1])
    if not formats:
        what = f"columns {', '.join(names)} are not understood" if names else "0 rows or columns"
        hint = "docs/data.md lists the known ones; or start without --data and set data.columns"
        raise DataError(what, hint, file=shown_path(file), line=1)
    return formats
