"""What the first row of somebody's data file tells: which prompt formats can read it, and which of
its columns are ours.

`recipes new --data` asks here, so that the recipe it writes reads the rows as they are. Files are
opened by the same readers as in training, and a damaged one is refused in the same words.
"""

from __future__ import annotations

from pathlib import Path

from recipes_lib.config.new_recipe import OwnRows
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import refuse_pipe
from recipes_lib.data.examples import shown_real_path
from recipes_lib.data.files import columns_of, data_format, guessed_delimiter, read_file
from recipes_lib.data.sources import data_files

# Names that files use for ours, best first; `input` is the question where nothing else is, and the
# context beside an instruction.
_SYNONYMS = {
    "instruction": ("instruction", "question", "query", "input_text", "input"),
    "response": ("response", "output", "answer", "completion", "target"),
    "context": ("context", "input"),
}
_TEXTS = (
    (("chat",), {"messages"}),
    (("raw", "chat"), {"prompt", "completion"}),
    (("raw",), {"text"}),
)


def look_at(data: Path) -> OwnRows:
    """Guess from the first row of a file (of a folder: of its first training file) how to read the
    rows.

    Raises:
        DataError: no such file, no row, damaged, or columns that mean nothing to us.
    """
    if not data.exists():
        raise DataError(
            "no such file",
            "for a data set on the Hub: start without --data and set data.source",
            file=shown_real_path(data),
        )
    refuse_pipe(data, shown_real_path(data))
    if data.is_file() and data_format(data) is None:
        read_file(data)  # says which endings are known
    file = data_files(data, "train")[0] if data.is_dir() else data
    delimiter = guessed_delimiter(file)
    rows = read_file(file, max_rows=1, delimiter=delimiter).rows
    names = columns_of(rows)
    if not names:
        raise DataError("has no row with named columns", file=shown_real_path(file))
    for prompt_formats, needed in _TEXTS:
        if needed <= set(names) and "response" not in names:
            return OwnRows(data, prompt_formats, whole_text=needed == {"text"}, delimiter=delimiter)
    if "conversations" in names:
        return OwnRows(data, ("chat",), {"messages": "conversations"}, delimiter=delimiter)
    columns = {
        ours: next((name for name in synonyms if name in names), "")
        for ours, synonyms in _SYNONYMS.items()
    }
    if not columns["instruction"] or not columns["response"]:
        what = f"columns {', '.join(names)} are not understood"
        hint = "rename them, or start without --data and set data.source and data.columns yourself"
        raise DataError(what, hint, file=shown_real_path(file), line=1)
    if columns["context"] == columns["instruction"]:  # one column is not two
        return OwnRows(
            data, ("dolly", "alpaca", "chat"), columns | {"context": ""}, delimiter=delimiter
        )
    renamed = {ours: name for ours, name in columns.items() if name and name != ours}
    return OwnRows(data, ("dolly", "alpaca", "chat"), renamed, delimiter=delimiter)
