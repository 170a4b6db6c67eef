"""From a recipe and a tokenizer to data sets for TRL: the token ids of each row, their labels, and
an audit that counts and names what would happen silently.
"""

import hashlib
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.recipe import DPO, Recipe
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import file_hash, hash_of, read_object, write_json
from recipes_lib.core.ranks import meet, on_main_rank, rank, world_size
from recipes_lib.data.audit import DataAudit, audit_rows, judge, system_message_note
from recipes_lib.data.cache import folder_of, keep_rows
from recipes_lib.data.encoding import Encoded, Supervision, encode
from recipes_lib.data.encoding_pairs import EncodedPair, encode_pair
from recipes_lib.data.errors import BadRow, BadRows, SettingError, place
from recipes_lib.data.prompts import chat_template, format_hash, training_template, unread_argument
from recipes_lib.data.reading import Rows, read_data
from recipes_lib.data.rows import DataRow
from recipes_lib.data.sources import hub_data_set, is_on_hub, listed_sources, source_hashes
from recipes_lib.data.splits import TEST, TRAIN, VALIDATION, first_in_hash_order, split_rows

if TYPE_CHECKING:
    from datasets import Dataset

_RECORD = "prepared.json"


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records. The data sets have the columns
    `input_ids`, `labels` (-100 where there is no loss) and `example_id`; of pairs `prompt_ids`,
    `chosen_ids`, `rejected_ids` and `example_id`. They are truncated, and rows without supervised
    tokens are dropped.
    """

    train: "Dataset"
    validation: "Dataset | None"
    test: "Dataset | None"
    audit: DataAudit  # supervision.json, where all dropped rows are named
    splits: dict[str, Any]  # splits.json
    fingerprint: str  # of the ids and texts of all rows, in order
    tokens_hash: str  # of their token ids and labels
    prompt_format_hash: str


def prepare_data(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Read, split, tokenise and audit the data of a recipe; every rank has to call."""
    from datasets import disable_progress_bars, load_from_disk

    disable_progress_bars()
    try:
        section = recipe.data
        if recipe.stage == DPO:  # what stands before the two answers is their prompt
            section = section.model_copy(update={"chat_loss": "last"})
        settings = Supervision.of(section, recipe.train, tokenizer)
        key = on_main_rank(lambda: _keep(recipe, settings, tokenizer))
        if world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):  # several machines
            if rank() != 0 and os.environ.get("LOCAL_RANK", "0") == "0":
                _keep(recipe, settings, tokenizer, expected=key)
            meet()
    except DataError as error:
        raise place(recipe, error) from error.__cause__
    folder = folder_of(key)
    record = read_object(folder / _RECORD)
    sets: dict[str, Any] = dict(load_from_disk(str(folder)))
    return PreparedData(
        train=sets.get(TRAIN),
        validation=sets.get(VALIDATION),
        test=sets.get(TEST),
        audit=DataAudit(**record.pop("audit")),
        **record,
    )


def _keep(
    recipe: Recipe, settings: Supervision, tokenizer: Any, expected: str | None = None
) -> str:
    """Have the prepared rows in this machine's cache, whole; return their key. `expected` is the
    key on rank 0's machine: with another one, the ranks would train other rows.
    """
    key = _key(recipe, settings, tokenizer)
    if expected not in (None, key):
        what = "the rows of this machine would not be those of rank 0's"
        hint = "give all machines the same data files, and the same versions of the packages"
        raise DataError(f"{socket.gethostname()}: {what}", hint)
    keep_rows(key, lambda folder: _prepare(recipe, settings, tokenizer, key, folder))
    return key


def _key(recipe: Recipe, settings: Supervision, tokenizer: Any) -> str:
    """Return a hash of all that decides what is prepared: rows, settings, tokenizer, our code."""
    import tokenizers
    import transformers

    section = recipe.data
    train = recipe.train
    parts: list[Any] = [
        [str(settings), train.get("completion_only_loss"), train.get("eval_strategy")],
        recipe.stage,
        [tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()],
        [format_hash(section, tokenizer), training_template(section, tokenizer)],
        [tokenizers.__version__, transformers.__version__],
        # other code of ours may prepare other rows
        [file_hash(file) for file in sorted(Path(__file__).parent.glob("*.py"))],
        source_hashes(section),
    ]
    on_hub = filter(is_on_hub, listed_sources(section))
    fingerprints = [hub_data_set(source)._fingerprint for source in on_hub]
    return hash_of(parts, fingerprints)[:32]


def _prepare(recipe: Recipe, settings: Supervision, tokenizer: Any, key: str, folder: Path) -> None:
    """Write the data sets of the splits that have rows, and the rest of `PreparedData`."""
    import pyarrow
    from datasets import Dataset, DatasetDict

    section = recipe.data
    bad = BadRows()

    # files -> rows
    read = read_data(section, bad, recipe.stage)
    has_texts = any("text" in row.fields for row in read.rows)
    if has_texts and recipe.train.get("completion_only_loss") is True:
        what = "train.completion_only_loss: true needs prompt and completion, not texts"
        raise SettingError("train.completion_only_loss", what, "remove it: all of a text has loss")

    # rows -> tokens
    training = None
    encode_row: Callable[..., Encoded | EncodedPair] = encode_pair
    if recipe.stage != DPO:
        encode_row = encode
        training = training_template(section, tokenizer)  # TRL's: the name of its file, its text
    template = None
    if section.prompt_format == "chat":
        template = training[1] if training else chat_template(section, tokenizer)
        unread = unread_argument(section.chat_template_kwargs, template)
        if unread:
            raise SettingError("data.chat_template_kwargs", f"data.{unread.what}", *unread.hints)
    encoded: dict[str, Encoded | EncodedPair] = {}
    for row in read.rows:
        try:
            encoded[row.id] = encode_row(row, settings, tokenizer, template)
        except BadRow as reason:
            bad.add(row, reason)
    if len(bad) and (section.on_bad_row == "error" or not encoded):
        raise bad.error(read.num_read)
    most = section.filters.max_tokens or math.inf
    rows = [row for row in read.rows if row.id in encoded and encoded[row.id].tokens_before <= most]

    # tokens -> splits -> data sets
    parts = split_rows(rows, section.split)
    for name, part in parts.items():
        parts[name] = [row for row in part if encoded[row.id].supervised]
    parts[TRAIN] = _repeated(parts[TRAIN], read, section.split.seed)
    audit = audit_rows(rows, encoded, settings, tokenizer)
    audit.warnings += read.notes
    if template is not None:
        audit.notes += system_message_note(rows, settings.section, tokenizer, template)
    if training is not None:
        sha256 = hashlib.sha256(training[1].encode()).hexdigest()
        audit.training_template = {"file": training[0], "sha256": sha256}
        what = f"trained with TRL's {training[0]} ({sha256[:12]}); the plain one is saved and"
        audit.notes.append(f"chat template: {what} used to answer")
    num_too_long = len(encoded) - len(rows)
    audit.rows = {"read": read.num_read, "bad": len(bad), "too_long": num_too_long}
    audit.rows |= {"used": len(rows)} | {name: len(part) for name, part in parts.items()}
    audit.bad_rows = bad.lines()
    if recipe.stage == DPO:
        for what, number in Counter(reason.what for reason in bad).most_common():
            audit.notes.append(f"left out: {number} x {what}")
    judge(audit, settings, recipe.train.get("eval_strategy", "no") != "no")
    splits: dict[str, Any] = {"method": section.split.method}
    contents = {}
    sets = {}
    digest = hashlib.sha256()
    for name, part in parts.items():
        splits[name] = {"count": len(part), "ids": [row.id for row in part]}
        contents[name] = [row.content.hex() for row in part]
        columns: dict[str, list[Any]] = {}
        for row in part:
            for side in encoded[row.id].sides:  # labels say where an answer begins
                digest.update(side.ids.tobytes() + side.labels.tobytes())
            for column, values in encoded[row.id].columns.items():
                columns.setdefault(column, []).append(values)
        columns["example_id"] = [row.id for row in part]
        if part:  # columns of no rows have no types
            # without a fingerprint, `datasets` would pickle the table, in three times its memory
            sets[name] = Dataset(pyarrow.table(columns), fingerprint=key + name)
    DatasetDict(sets).save_to_disk(folder)
    record = {
        "audit": asdict(audit),
        "splits": splits,
        "fingerprint": hash_of(splits, contents),
        "tokens_hash": digest.hexdigest(),
        "prompt_format_hash": format_hash(section, tokenizer, eos_token=settings.eos_token),
    }
    write_json(folder / _RECORD, record)


def _repeated(rows: Sequence[DataRow], read: Rows, seed: int) -> list[DataRow]:
    """Return training rows as often as the weights of their sources say: whole times all of them,
    and the first in hash order once more.
    """
    times: dict[str, int] = {}
    for number, source in enumerate(read.sources):
        whole, part = divmod(max(source.weight, 1), 1)
        of_source = [row for row in rows if row.source == number]
        times |= {row.id: int(whole) for row in of_source}
        for row in first_in_hash_order(of_source, round(part * len(of_source)), seed):
            times[row.id] += 1
    repeated = []
    for row in rows:
        repeated += [row] * times[row.id]
    return repeated
