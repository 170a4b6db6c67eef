"""From a recipe and a tokenizer to data sets for TRL: the token ids of each row, their labels, and
an audit that counts and names what would happen silently.

Loss is found in 3 ways, as in TRL:

1. Text pairs: the completion begins where the tokens of both texts together differ from those of
   the prompt alone.
2. Conversations under a template with `{% generation %}` markers, or TRL's training template: the
   markers say what the assistant wrote.
3. Conversations under any other template: the text between the prompt that asks for a turn and the
   conversation up to its end, where both begin the whole text.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from recipes_lib.config.recipe import MAX_LENGTH, DataSection, Recipe
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import file_hash, hash_of, read_object, sync_tree, write_json
from recipes_lib.core.project import cache_root
from recipes_lib.core.ranks import on_main_rank
from recipes_lib.core.terminal import count
from recipes_lib.data.conversations import THOUGHTS
from recipes_lib.data.errors import NUM_LISTED, BadRow, BadRows, SettingError, listed, place
from recipes_lib.data.prompts import (
    GENERATION,
    Span,
    chat_template,
    check_tool_calls,
    default_system_message,
    format_hash,
    prompt_and_completion,
    render_chat,
    training_template,
    unread_argument,
)
from recipes_lib.data.reading import Rows, read_data
from recipes_lib.data.rows import DataRow, conversation_of, template_values
from recipes_lib.data.sources import hub_data_set, is_on_hub, listed_sources, source_hashes
from recipes_lib.data.splits import SPLITS, TRAIN, first_in_hash_order, split_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IGNORED = -100  # labels with this value carry no loss
MOST_UNSUPERVISED = 0.05  # of the rows
_RECORD = "prepared.json"
_REWRITTEN = (
    "the chat template renders earlier messages differently when more follow: no loss mask is"
    " possible",
    "use TRL's training template for it (data.chat_template: trl:NAME), mark the assistant's text"
    " with {% generation %} ... {% endgeneration %}, or set data.chat_loss: last",
)


@dataclass(slots=True)
class Encoded:
    """The tokens of one row."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # the same where there is loss, -100 elsewhere
    end_token: int  # the special token that ends the last answer, -1 for none or if it was cut
    tokens_before: int  # before truncation
    prompt_tokens: int  # before truncation, those that are not learnt
    changed: bool = False  # the chat template left out or changed the text of a message
    other_prompt: bool = False  # does not begin with the tokens that the model is asked with

    @property
    def supervised(self) -> int:
        """Number of tokens with loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The settings that decide about loss, taken from `data` and `train`."""

    section: DataSection
    whole: bool  # loss on every token, the prompt included
    max_length: int | None  # longest row in tokens
    keep_end: bool  # cut the start of rows that are too long instead of their end
    eos_token: str | None
    ends: frozenset[int]  # tokens that may end an answer: EOS, in `chat` all special ones

    @classmethod
    def of(cls, section: DataSection, train: dict[str, Any], tokenizer: Any) -> Supervision:
        """Read the settings, and refuse those that cannot act."""
        is_chat, answers_only = section.prompt_format == "chat", train.get("assistant_only_loss")
        eos_token = train.get("eos_token") or getattr(tokenizer, "eos_token", None)
        if answers_only and not is_chat:
            key = "train.assistant_only_loss"
            what = f"{key}: true needs prompt_format chat, not {section.prompt_format}"
            raise SettingError(key, what, "loss on the completion alone is already the default")
        if not getattr(tokenizer, "is_fast", False) or not (is_chat or eos_token):
            what = "training needs a fast tokenizer (tokenizer.json), and an EOS token to end rows"
            raise SettingError("model.name_or_path", what, "set train.eos_token")
        ends = special_ids(tokenizer) if is_chat else {tokenizer.convert_tokens_to_ids(eos_token)}
        splits_itself = train.get("packing") and train.get("packing_strategy", "bfd") != "bfd"
        return cls(
            section=section,
            whole=train.get("completion_only_loss") is False and not answers_only,
            max_length=None if splits_itself else train.get("max_length", MAX_LENGTH),
            keep_end=train.get("truncation_mode", "keep_start") == "keep_end",
            eos_token=eos_token,
            ends=frozenset(ends),
        )


@dataclass
class DataAudit:
    """supervision.json."""

    prompt_format: str
    loss_on: str
    rows: dict[str, Any] = field(default_factory=dict)  # read, bad, too_long, used; of each split
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)  # total, median, max of a row
    places: dict[str, list[str]] = field(default_factory=dict)  # of rows of which something is true
    end_tokens: dict[str, int] = field(default_factory=dict)  # how many rows end with each
    bad_rows: list[str] = field(default_factory=list)  # that were left out, and why
    training_template: dict[str, str] | None = None  # file and hash of TRL's
    notes: list[str] = field(default_factory=list)  # how conversations are rendered
    warnings: list[str] = field(default_factory=list)  # what the user should know before training


@dataclass(frozen=True)
class PreparedData:
    """What training needs and what the run directory records.

    The data sets have the columns `input_ids`, `labels` (-100 where there is no loss) and
    `example_id`. They are truncated, and rows without supervised tokens are dropped.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
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
        settings = Supervision.of(recipe.data, recipe.train, tokenizer)
        folder = on_main_rank(lambda: _prepared_folder(recipe, settings, tokenizer))
        if not (folder / _RECORD).is_file():  # on another machine, which has a disk of its own
            folder = _prepared_folder(recipe, settings, tokenizer)
    except DataError as error:
        raise place(recipe, error) from error.__cause__
    record = read_object(folder / _RECORD, remedy=f"delete {folder}")
    parts: dict[str, Any] = dict.fromkeys(SPLITS) | dict(load_from_disk(str(folder)))
    return PreparedData(**parts, **record | {"audit": DataAudit(**record["audit"])})


# ---- the cache ----


def _prepared_folder(recipe: Recipe, settings: Supervision, tokenizer: Any) -> Path:
    """Return the folder of the prepared data. Its record is written last: without it, the rest is
    what a process left that was killed.
    """
    key = _key(recipe, settings, tokenizer)
    folder = cache_root() / "rows" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # arms of a study start at the same time
        if not (folder / _RECORD).is_file():
            parts, record = _prepare(recipe, settings, tokenizer, key)
            parts.save_to_disk(folder)
            sync_tree(folder)
            write_json(folder / _RECORD, record)
    return folder


def _key(recipe: Recipe, settings: Supervision, tokenizer: Any) -> str:
    """Return a hash of all that decides what is prepared: rows, settings, tokenizer, our code."""
    import tokenizers
    import transformers

    section, train = recipe.data, recipe.train
    parts: list[Any] = [
        [str(settings), train.get("completion_only_loss"), train.get("eval_strategy")],
        [tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()],
        [format_hash(section, tokenizer), training_template(section, tokenizer)],
        [tokenizers.__version__, transformers.__version__],
        [file_hash(file) for file in sorted(Path(__file__).parent.glob("*.py"))],
        source_hashes(section),
    ]
    on_hub = filter(is_on_hub, listed_sources(section))
    return hash_of(parts, [hub_data_set(source)._fingerprint for source in on_hub])[:32]


# ---- the work ----


def _prepare(
    recipe: Recipe, settings: Supervision, tokenizer: Any, key: str
) -> tuple[DatasetDict, dict[str, Any]]:
    """Return the data sets of the splits that have rows, and the rest of `PreparedData`."""
    from datasets import DatasetDict

    section, bad = recipe.data, BadRows()

    # files -> rows
    read = read_data(section, bad)
    is_text = any("text" in row.fields for row in read.rows)
    if is_text and recipe.train.get("completion_only_loss") is True:
        what = "train.completion_only_loss: true needs prompt and completion, not texts"
        raise SettingError("train.completion_only_loss", what, "remove it: all of a text has loss")

    # rows -> tokens
    template, training = None, training_template(section, tokenizer)  # TRL's: its file, its text
    if section.prompt_format == "chat":
        template = training[1] if training else chat_template(section, tokenizer)
        if reason := unread_argument(section.chat_template_kwargs, template):
            raise SettingError("data.chat_template_kwargs", f"data.{reason.what}", *reason.hints)
    encoded: dict[str, Encoded] = {}
    for row in read.rows:
        try:
            encoded[row.id] = encode(row, settings, tokenizer, template)
        except BadRow as reason:
            bad.add(row, reason)
    if len(bad) and (section.on_bad_row == "error" or not encoded):
        raise bad.error(read.num_read)
    most = section.filters.max_tokens or math.inf
    rows = [row for row in read.rows if row.id in encoded and encoded[row.id].tokens_before <= most]

    # tokens -> splits -> data sets
    parts = split_rows(rows, section.split)
    for name in SPLITS:
        parts[name] = [row for row in parts[name] if encoded[row.id].supervised]
    parts[TRAIN] = _repeated(parts[TRAIN], read, section.split.seed)
    audit = _audit(rows, encoded, settings, tokenizer)
    audit.warnings += read.notes
    if template is not None:
        audit.notes += _system_message_note(rows, settings.section, tokenizer, template)
    if training is not None:
        sha256 = hashlib.sha256(training[1].encode()).hexdigest()
        audit.training_template = {"file": training[0], "sha256": sha256}
        what = f"trained with TRL's {training[0]} ({sha256[:12]}); the plain one is saved and"
        audit.notes.append(f"chat template: {what} used to answer")
    counts = {"read": read.num_read, "bad": len(bad), "too_long": len(encoded) - len(rows)}
    audit.rows = counts | {"used": len(rows)} | {name: len(part) for name, part in parts.items()}
    audit.bad_rows = bad.lines()
    _judge(audit, settings, recipe.train.get("eval_strategy", "no") != "no")
    splits: dict[str, Any] = {"method": section.split.method}
    for name, part in parts.items():
        splits[name] = {"count": len(part), "ids": [row.id for row in part]}
    contents = {name: [row.content.hex() for row in part] for name, part in parts.items()}
    digest = hashlib.sha256()
    for row in (row for part in parts.values() for row in part):
        digest.update(encoded[row.id].ids.tobytes() + encoded[row.id].labels.tobytes())
    sets = {name: _data_set(part, encoded, key + name) for name, part in parts.items() if part}
    return DatasetDict(sets), {
        "audit": asdict(audit),
        "splits": splits,
        "fingerprint": hash_of(splits, contents),
        "tokens_hash": digest.hexdigest(),
        "prompt_format_hash": format_hash(section, tokenizer, eos_token=settings.eos_token),
    }


def _repeated(rows: Sequence[DataRow], read: Rows, seed: int) -> list[DataRow]:
    """Return training rows as often as the weights of their sources say: whole times all of them,
    and the first in hash order once more.
    """
    times: dict[str, int] = {}
    for number, source in enumerate(read.sources):
        whole, part = divmod(max(source.weight, 1), 1)
        own = [row for row in rows if row.source == number]
        times |= {row.id: int(whole) for row in own}
        for row in first_in_hash_order(own, round(part * len(own)), seed):
            times[row.id] += 1
    return [row for row in rows for _ in range(times[row.id])]


def _data_set(rows: Sequence[DataRow], encoded: dict[str, Encoded], name: str) -> Dataset:
    import datasets
    import pyarrow

    columns = {
        "input_ids": [encoded[row.id].ids for row in rows],
        "labels": [encoded[row.id].labels for row in rows],
        "example_id": [row.id for row in rows],
    }
    # without a fingerprint, `datasets` would pickle the table, in three times its memory
    return datasets.Dataset(pyarrow.table(columns), fingerprint=name)


# ---- the audit ----


def _audit(
    rows: list[DataRow], encoded: dict[str, Encoded], settings: Supervision, tokenizer: Any
) -> DataAudit:
    """Return what the rows that are used, and their tokens, show."""
    loss_on = "whole text" if settings.whole else "completion"
    audit = DataAudit(settings.section.prompt_format, loss_on)
    special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    texts = re.compile("|".join(re.escape(name) for name in special if len(name) > 1) or "(?!)")
    seen = set[bytes]()
    for row in rows:
        item = encoded[row.id]
        was_cut, has_end = len(item.ids) < item.tokens_before, item.end_token >= 0
        for name, is_true in {
            "truncated": was_cut,
            "lost_end": was_cut and not has_end,
            "no_supervised_tokens": not item.supervised,
            "without_end_token": not was_cut and not has_end,
            "empty_completions": row.is_empty,
            "changed_by_template": item.changed,
            "other_prompt": item.other_prompt,
            "special_tokens": any(map(texts.search, row.texts)),
            "duplicates": row.content in seen,
        }.items():
            audit.places.setdefault(name, []).extend([row.place] if is_true else [])
        seen.add(row.content)
    items = [encoded[row.id] for row in rows]
    ends = Counter(item.end_token for item in items if item.end_token >= 0)
    audit.end_tokens = {tokenizer.convert_ids_to_tokens(end): ends[end] for end in ends}
    for title, lengths in (
        ("prompt", [item.prompt_tokens for item in items]),
        ("row, as trained", [len(item.ids) for item in items]),
        ("with loss", [item.supervised for item in items]),
    ):
        counts = {"total": sum(lengths), "median": int(np.median(lengths)), "max": max(lengths)}
        audit.tokens[title] = counts
    if date := settings.section.template_date:
        what = f"prints the date, {date} in every resume, chat and evaluation of this run"
        audit.notes.append(f"chat template: {what}")
    return audit


def _system_message_note(
    rows: Sequence[DataRow], section: DataSection, tokenizer: Any, template: str
) -> list[str]:
    """Return a note about the system message that the template puts where a row has none."""
    without = []
    for row in rows:
        messages = conversation_of(row, section.system_prompt)
        if messages[0]["role"] != "system":
            without.append((row, messages))
    if not without:
        return []
    row, messages = without[0]
    values = template_values(row, section.chat_template_kwargs)
    default = default_system_message(messages, tokenizer, template, values)
    if not default:
        return []
    what = (
        f"{len(without)} of {count(len(rows), 'row')} without a system message get the template's"
    )
    return [f'{what}: "{default}" (data.system_prompt: another)']


def _judge(audit: DataAudit, settings: Supervision, evaluates: bool) -> None:
    """Write the warnings, and refuse data that cannot teach what the recipe asks for."""
    used, places, warnings = audit.rows["used"], audit.places, audit.warnings
    if bad := audit.rows["bad"]:
        what = f"{bad} of {audit.rows['read']} rows cannot be used and are left out"
        warnings += [f"{what} (on_bad_row: skip):", *audit.bad_rows[:NUM_LISTED]]
    limit, lost = f"max_length={settings.max_length}", len(places["lost_end"])
    longest = audit.tokens["prompt"]["max"]
    acting = "ACTING as such" if audit.prompt_format == "chat" else "read as text"
    facts = {
        "truncated": f"cut at {limit}, {lost} of them lose their end token",
        "no_supervised_tokens": f"no supervised token at {limit}; the longest prompt has {longest}",
        "empty_completions": "an empty completion, which teaches only the end token",
        "without_end_token": "no supervised end token, so the model would not learn to stop",
        "changed_by_template": "the chat template changes or drops text",
        "other_prompt": "do not begin with the generation prompt: it ends in space, or the template"
        " begins a thought (data.chat_template_kwargs: {enable_thinking: ...})",
        "special_tokens": f"special tokens in the text, {acting}",
        "duplicates": "exact duplicates",
    }
    for name, what in facts.items():
        if rows := places[name]:
            warnings.append(f"{len(rows)} of {used} rows: {what}: {listed(rows, 3)}")
    if audit.end_tokens and settings.eos_token not in audit.end_tokens:
        what = f"turns end with {listed(audit.end_tokens, 3)}, but generation stops at"
        warnings.append(f"{what} {settings.eos_token}: set train.eos_token to the turn's end")
    longer = "raise train.max_length above that, or set data.filters.max_tokens"
    end = "end each assistant turn with a special token, inside any {% generation %} block"
    for name, most, key, hint in (
        ("empty_completions", used - 1, "data.source", "check data.columns"),
        ("no_supervised_tokens", MOST_UNSUPERVISED * used, "train.max_length", longer),
        ("without_end_token", 0, "data.chat_template", end),
    ):
        if len(rows := places[name]) > most:
            what = f"{len(rows)}/{used} rows: {facts[name]}"
            allowed = f"at most {math.floor(most)} of {used} rows may be so"
            raise SettingError(key, what, listed(rows, 3), f"{allowed}; {hint}")
    if evaluates and not audit.rows["validation"]:
        what = f"none of {used} rows is held out for validation (train.eval_strategy)"
        hint = "add rows, raise data.split.validation, or set train.eval_strategy: 'no'"
        raise SettingError("data.split.validation", what, hint)


# ---- one row ----


def _tokenised(section: DataSection, tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Return the ids of a text, and the offsets of a conversation. A template brings its own BOS,
    plain formats get it here; an EOS that the tokenizer appends by itself is taken off, as it would
    tell the model to stop before it started.
    """
    is_chat = section.prompt_format == "chat"
    batch = tokenizer(
        text,
        add_special_tokens=not is_chat,
        split_special_tokens=not is_chat,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = batch["input_ids"]
    if not is_chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids, batch["offset_mapping"]


def prompt_ids(section: DataSection, tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of what `generation_prompt` returned, tokenised as in training."""
    return _tokenised(section, tokenizer, prompt)[0]


def encode(
    row: DataRow, settings: Supervision, tokenizer: Any, template: str | None = None
) -> Encoded:
    """Tokenise a row, and cut it if it is too long; a `BadRow` says why it cannot be used.
    Conversations are rendered with `template`; plain formats have none.
    """
    if template is not None:
        return _encode_chat(row, settings, tokenizer, template)
    section = settings.section
    prompt, completion = prompt_and_completion(row, section.prompt_format)
    ids = _tokenised(section, tokenizer, (prompt or "") + completion)[0]
    ids.append(tokenizer.convert_tokens_to_ids(settings.eos_token))
    asked = [] if prompt is None else prompt_ids(section, tokenizer, prompt)
    start = _num_common(asked, ids)
    encoded = _labelled(ids, [(min(start, len(ids) - 1), len(ids))], settings)
    encoded.other_prompt = start < len(asked)
    return encoded


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _labelled(ids: Sequence[int], spans: Sequence[Span], settings: Supervision) -> Encoded:
    """Label the tokens in `spans`, and cut a row that is too long."""
    tokens = np.array(ids, dtype=np.int32)
    labels = np.full_like(tokens, IGNORED)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    answer_end = spans[-1][1] if spans else 0
    prompt_tokens = int((labels == IGNORED).sum())
    labels = tokens if settings.whole else labels
    limit = settings.max_length or len(tokens)
    first = max(len(tokens) - limit, 0) if settings.keep_end else 0
    has_end = first < answer_end <= first + limit and ids[answer_end - 1] in settings.ends
    return Encoded(
        ids=tokens[first : first + limit],
        labels=labels[first : first + limit],
        end_token=ids[answer_end - 1] if has_end else -1,
        tokens_before=len(tokens),
        prompt_tokens=prompt_tokens,
    )


def _encode_chat(row: DataRow, settings: Supervision, tokenizer: Any, template: str) -> Encoded:
    section = settings.section
    messages = conversation_of(row, section.system_prompt)
    values = template_values(row, section.chat_template_kwargs)
    own = values.keys() - {"tools"} if "chat_template_kwargs" in row.fields else ()
    if reason := unread_argument(own, template):
        raise reason
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[-1:] if section.chat_loss == "last" else answers
    learned = [index for index in answers if "weight" not in messages[index]]
    if not learned:
        raise BadRow("nothing to train on: every assistant turn that may be learned has weight 0")
    if settings.whole and row.has_weights:
        raise BadRow("weight 0: with train.completion_only_loss: false, all of the text has loss")

    # messages -> text, and of each turn what is to be learned
    chat = [{key: message[key] for key in message if key != "weight"} for message in messages]
    render = partial(render_chat, tokenizer=tokenizer, template=template, values=values)
    try:
        text, marks = render(chat)
        check_tool_calls(chat, learned, text, render)
        prompts = {index: render(chat[:index], prompt=True)[0] for index in answers}
        if GENERATION.search(template):
            turns = dict(zip(answers, _marked_turns(text, marks, [*prompts.values()]), strict=True))
        else:
            turns = {}
            for index in learned:
                prompt, until = prompts[index], render(chat[: index + 1])[0]
                if not text.startswith(until) or not until.startswith(prompt):
                    raise BadRow(*_REWRITTEN)
                turns[index] = [(len(prompt), len(until))]
    except BadRow:
        raise
    except Exception as error:  # Jinja's own errors, and whatever `raise_exception` is given
        hint = "change the rows, or choose another template (data.chat_template)"
        what = f"the chat template refuses the conversation: {one_line(error)}"
        raise BadRow(what, hint) from None

    # text -> tokens
    ids, offsets = _tokenised(section, tokenizer, text)
    parts = [part for index in learned for part in turns[index]]
    spans = _token_spans(text, parts, ids, offsets, settings.ends)
    said = [tokenizer.decode(ids[slice(*span)], skip_special_tokens=True) for span in spans]
    if not ((said and all(map(str.strip, said))) or row.is_empty):
        what = "the chat template renders none of the assistant's text, which teaches silence"
        hint = "choose one for plain text, or one that supports tools, such as trl:qwen2_5"
        raise BadRow(what, f"{hint} (data.chat_template)")
    encoded = _labelled(ids, spans, settings)
    asked = prompt_ids(section, tokenizer, prompts[answers[-1]])
    follows = all(text.startswith(prompts[index]) for index in learned)
    encoded.other_prompt = ids[: len(asked)] != asked or not follows
    words = [message.get(key, "") for message in messages for key in ("content", THOUGHTS[0])]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    words += [call["function"]["name"] for call in calls]
    encoded.changed = any(word.strip() not in text for word in words)
    return encoded


def _token_spans(
    text: str, parts: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span], special: Any
) -> list[Span]:
    """Return the tokens of each part up to its end-of-turn token, without white space behind it."""
    ends, spans = [end for _, end in offsets], []
    for part in parts:
        first, last = (bisect_right(ends, place) for place in part)
        kept = last
        while kept > first and not text[slice(*offsets[kept - 1])].strip():
            kept -= 1
        last = kept if kept > first and ids[kept - 1] in special else last
        if first < last:
            spans.append((first, last))
    return spans


def _marked_turns(text: str, marked: Sequence[Span], prompts: Sequence[str]) -> list[list[Span]]:
    """Return the marks of each turn behind its prompt: some templates mark the role's tag, too."""
    marks: list[Span] = []
    for start, end in marked:
        if marks and marks[-1][1] == start:  # the text and the end token, marked apart
            start = marks.pop()[0]
        marks.append((start, end))
    starts = [len(prompt) for prompt in prompts]
    if not all(map(text.startswith, prompts)):
        # The model is asked behind the role's tag and, say, a thought that the prompt begins.
        own = marks[-1:] if len(prompts) == 1 else marks
        if len(own) != len(prompts):
            raise BadRow(*_REWRITTEN)
        for number, (prompt, (first, last)) in enumerate(zip(prompts, own, strict=True)):
            starts[number] = min(max(_num_common(text, prompt), first), last)
    turns: list[list[Span]] = [[] for _ in prompts]
    for first, last in marks:
        number = bisect_left(starts, last) - 1
        if number >= 0:
            turns[number].append((max(first, starts[number]), last))
    return turns


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens: bos, eos, unk, pad, and those that a model adds."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def decoded_spans(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Any]:
    """Return the text of a row cut where loss begins and ends, as pairs of text and `has_loss`."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    spans = groupby(zip(ids, labels, strict=True), key=lambda pair: bool(pair[1] != IGNORED))
    return [(decode([int(token) for token, _ in span]), has_loss) for has_loss, span in spans]
