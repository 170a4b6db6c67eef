"""The audit of supervision.json and the gate before step 1: what was read, what was cut, and what
the loss sees. What would happen silently is counted, and its rows are named by id.

A text with `</s>` or `### Response:` in it can end a turn or open a false one: all are counted, and
special tokens are disarmed in the plain formats (`data.special_tokens: text`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import numpy as np

from recipes_lib.core.project import shown_path
from recipes_lib.data.examples import BadRows, Example, SettingError, SkippedRows, listed
from recipes_lib.data.prompts import PROMPT_FORMATS, Twin
from recipes_lib.data.rows import Rows
from recipes_lib.data.splits import SPLITS, TEST, TRAIN, VALIDATION, Splits
from recipes_lib.data.supervision import DecodedSpan, Supervision, decoded_spans, special_ids

NUM_REASONS = 10
NUM_SHOWN = 3
FOREIGN_MARKERS = (
    *("[INST]", "[/INST]", "<<SYS>>"),
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>"),
)
Found = dict[str, dict[str, int]]


class Distribution(TypedDict):
    """Tokens (or turns): the total, and per row percentiles and the maximum."""

    total: int
    p5: int
    p50: int
    p95: int
    max: int


class NamedRows(TypedDict):
    """Rows of which something is true: how many, and which, split by split."""

    count: int
    fraction: float
    ids: list[str]
    places: list[str]


class EmptyRows(TypedDict):
    """Rows with nothing to learn but the end token."""

    count: int
    ids: list[str]


class TruncatedRows(NamedRows):
    """Rows that were cut at `max_length`, and how many of them lost their end token."""

    lost_end_token: int


class RowCounts(TypedDict):
    """Rows from file to training; `trained` are those of `train` with a supervised token."""

    read: int
    bad: int
    filtered: dict[str, int]
    used: int
    train: int
    validation: int
    test: int
    trained: int


class SourceCounts(TypedDict):
    """What one source of the mixture has and gives; rows that train count as often as they do."""

    source: str
    weight: float
    max_examples: int | None
    rows: int
    used: int
    train: int
    validation: int
    test: int
    supervised: int


class Occurrences(TypedDict):
    """How often something stands in the conversations, and in how many rows."""

    count: int
    rows: int


class ConversationCounts(TypedDict):
    """Turns of user and assistant, and what is called and thought in them."""

    turns: Distribution
    tool_calls: Occurrences
    thoughts: Occurrences


class Injected(TypedDict):
    """Texts that were found in rows: times by text, and the texts by id of the row."""

    num_rows: int
    count: dict[str, int]
    rows: dict[str, list[str]]


class InjectedTokens(Injected):
    """Special tokens in the rows' texts, which are read as text or as special tokens."""

    treated_as: str


class Duplicates(TypedDict):
    """Rows with the same content, and with nearly the same, by their ids."""

    exact_groups: list[list[str]]
    exact_rows: int
    across_splits: list[list[str]]
    moved_to_train: list[str]
    near_groups: list[list[str]]


class EndTokens(TypedDict):
    """How many of the rows that were not cut end in a token that the loss sees."""

    untruncated_rows: int
    of_which_supervised: int


class ShownRow(TypedDict):
    """A row of the train split as the loss sees it."""

    id: str
    place: str
    spans: list[DecodedSpan]


class DataAudit(TypedDict):
    """supervision.json."""

    prompt_format: str
    training_template: dict[str, str] | None
    loss_on: str
    max_length: int | None
    truncation_mode: str
    eos_token: str | None
    rows: RowCounts
    sources: list[SourceCounts]
    bad_rows: SkippedRows
    unused_columns: dict[str, list[str]]
    unread_files: dict[str, list[str]]
    tokens: Distribution
    supervised_tokens: Distribution
    prompt_tokens: Distribution
    completion_tokens: Distribution
    conversations: ConversationCounts | None
    tokens_per_split: dict[str, dict[str, int]]
    truncated: TruncatedRows
    no_supervised_tokens: NamedRows
    changed_by_template: NamedRows
    unlike_prompt: NamedRows
    empty_completions: EmptyRows
    special_token_injections: InjectedTokens
    template_markers: Injected
    duplicates: Duplicates
    boundary_merges: int
    end_token_supervised: EndTokens
    without_end_token: NamedRows
    end_tokens: dict[str, int]
    examples: list[ShownRow]


class Injections:
    """Counts special tokens and template markers in the texts, batch by batch: id of a row -> text
    -> occurrences.
    """

    def __init__(self, tokenizer: Any, prompt_format: str) -> None:
        special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        headings = re.findall(r"### \w+:", "".join(PROMPT_FORMATS[prompt_format].headings[1:]))
        self._special = [name for name in special if len(name) > 1]
        self._markers = [name for name in [*headings, *FOREIGN_MARKERS] if name not in special]
        self.special_tokens: Found = {}
        self.markers: Found = {}

    def search(self, batch: Sequence[Example]) -> None:
        """Look for all of them, first in all texts at once: most data has none."""
        texts = ["\0".join(example.texts) for example in batch]
        whole = "\0".join(texts)
        for needles, found in (
            (self._special, self.special_tokens),
            (self._markers, self.markers),
        ):
            present = [needle for needle in needles if needle[:3] in whole and needle in whole]
            for example, text in zip(batch, texts, strict=True) if present else ():
                if here := {needle: times for needle in present if (times := text.count(needle))}:
                    found[example.id] = here


def audit_rows(
    rows: Rows,
    tokens: np.ndarray,
    splits: Splits,
    settings: Supervision,
    tokenizer: Any,
    *,
    filtered: Mapping[str, int],
    skipped: BadRows,
    injections: Injections,
    encoded: Any,
    twin: Twin | None,
) -> DataAudit:
    """Count and name; the result is plain JSON.

    Args:
        rows: those used, before rows without supervised tokens are dropped.
        tokens: `preparation.TOKEN_NUMBERS` of these rows, `encoded` their ids and labels.
        filtered: name of a filter -> number of rows it left out.
    """

    def named(mask: np.ndarray) -> NamedRows:
        """The rows that a mask names, split by split."""
        chosen = [rows[i] for name in SPLITS for i in dict.fromkeys(splits.rows[name]) if mask[i]]
        return {
            "count": len(chosen),
            "fraction": len(chosen) / len(rows) if len(rows) else 0.0,
            "ids": [example.id for example in chosen],
            "places": [example.place for example in chosen],
        }

    def occurrences(name: str) -> Occurrences:
        return {"count": int(tokens[name].sum()), "rows": int((tokens[name] > 0).sum())}

    cut, bare = tokens["length"] < tokens["tokens_before"], tokens["supervised"] == 0
    empty = named(np.array([example.empty for example in rows.examples], dtype=bool))
    ending, num_ending = np.unique(
        tokens["end_token"][tokens["end_token"] >= 0], return_counts=True
    )
    section = settings.section
    chat = section.prompt_format == "chat"
    as_text = not chat and section.special_tokens == "text"
    counts: ConversationCounts = {
        "turns": _distribution(tokens["turns"]),
        "tool_calls": occurrences("tool_calls"),
        "thoughts": occurrences("thoughts"),
    }
    return {
        "prompt_format": section.prompt_format,
        "training_template": {"file": twin.file.name, "sha256": twin.hash} if twin else None,
        "loss_on": "whole text" if settings.whole else "completion",
        "max_length": settings.max_length,
        "truncation_mode": "keep_end" if settings.keep_end else "keep_start",
        "eos_token": settings.eos_token,
        "rows": {
            "read": rows.num_read,
            "bad": len(skipped.found),
            "filtered": dict(filtered),
            "used": len(rows),
            "train": len(splits.rows[TRAIN]),
            "validation": len(splits.rows[VALIDATION]),
            "test": len(splits.rows[TEST]),
            "trained": int((~bare[splits.rows[TRAIN]]).sum()),
        },
        "sources": _sources(rows, tokens, splits),
        "bad_rows": skipped.record(),
        "unused_columns": rows.unused_columns(),
        "unread_files": rows.unread,
        "tokens": _distribution(tokens["length"]),
        "supervised_tokens": _distribution(tokens["supervised"]),
        "prompt_tokens": _distribution(tokens["prompt_tokens"]),
        "completion_tokens": _distribution(tokens["tokens_before"] - tokens["prompt_tokens"]),
        "conversations": counts if chat else None,
        "tokens_per_split": {
            name: {
                "tokens": int(tokens["length"][splits.rows[name]].sum()),
                "supervised": int(tokens["supervised"][splits.rows[name]].sum()),
            }
            for name in SPLITS
        },
        "truncated": {**named(cut), "lost_end_token": int((cut & (tokens["ends"] == 0)).sum())},
        "no_supervised_tokens": named(bare),
        "changed_by_template": named(tokens["changed"] == 1),
        "unlike_prompt": named(tokens["unlike_prompt"] == 1),
        "empty_completions": {"count": empty["count"], "ids": empty["ids"]},
        "special_token_injections": {
            "treated_as": "text" if as_text else "special tokens",
            **_injection(injections.special_tokens, rows),
        },
        "template_markers": _injection(injections.markers, rows),
        "duplicates": {
            "exact_groups": splits.exact_groups,
            "exact_rows": sum(map(len, splits.exact_groups)) - len(splits.exact_groups),
            "across_splits": splits.across,
            "moved_to_train": splits.moved,
            "near_groups": splits.near_groups,
        },
        "boundary_merges": int(tokens["boundary_merge"].sum()),
        "end_token_supervised": {
            "untruncated_rows": int((~cut).sum()),
            "of_which_supervised": int((~cut & (tokens["ends"] == 1)).sum()),
        },
        "without_end_token": named(~cut & (tokens["ends"] == 0)),
        "end_tokens": {
            str(tokenizer.convert_ids_to_tokens(token)): num
            for token, num in zip(ending.tolist(), num_ending.tolist(), strict=True)
        },
        "examples": [
            {
                "id": rows[i].id,
                "place": rows[i].place,
                "spans": decoded_spans(tokenizer, encoded[i]["input_ids"], encoded[i]["labels"]),
            }
            for i in list(dict.fromkeys(splits.rows[TRAIN]))[:NUM_SHOWN]
        ],
    }


def _sources(rows: Rows, tokens: np.ndarray, splits: Splits) -> list[SourceCounts]:
    places = np.array([rows.source_of(index) for index in range(len(rows))], dtype=int)
    counts: list[SourceCounts] = []
    for number, (source, num_rows) in enumerate(rows.sources):
        own = {name: [i for i in splits.rows[name] if places[i] == number] for name in SPLITS}
        counts.append(
            {
                "source": shown_path(Path(source.source)),
                "weight": source.weight,
                "max_examples": source.max_examples,
                "rows": num_rows,
                "used": int((places == number).sum()),
                "train": len(own[TRAIN]),
                "validation": len(own[VALIDATION]),
                "test": len(own[TEST]),
                "supervised": int(tokens["supervised"][own[TRAIN]].sum()),
            }
        )
    return counts


def _injection(found: Found, rows: Rows) -> Injected:
    """What was found in the rows that are used."""
    used = {example.id for example in rows.examples} if found else ()
    found = {id: texts for id, texts in found.items() if id in used}
    count = Counter[str]()
    for texts in found.values():
        count.update(texts)
    return {
        "num_rows": len(found),
        "count": dict(sorted(count.items())),
        "rows": {id: sorted(texts) for id, texts in found.items()},
    }


def _distribution(lengths: np.ndarray) -> Distribution:
    """Total, and per row the percentiles and the maximum, as whole tokens."""
    if not len(lengths):
        lengths = np.zeros(1, dtype=int)
    p5, p50, p95 = map(int, np.percentile(lengths, (5, 50, 95), method="nearest"))
    total, largest = int(lengths.sum()), int(lengths.max())
    return {"total": total, "p5": p5, "p50": p50, "p95": p95, "max": largest}


def check_audit(
    audit: DataAudit, max_unsupervised_fraction: float, *, evaluates: bool = False
) -> None:
    """The gate: refuse data that cannot teach what the recipe asks for.

    Args:
        evaluates: whether the training computes a validation loss.

    Raises:
        SettingError: it carries the `audit`.
    """

    def refuse(key: str, what: str, *hints: str) -> NoReturn:
        error = SettingError(key, what, *hints)
        error.audit = audit
        raise error

    used, bare = audit["rows"]["used"], audit["no_supervised_tokens"]
    limit, p95 = audit["max_length"], audit["prompt_tokens"]["p95"]
    if audit["empty_completions"]["count"] == used:
        what = f"{used}/{used} rows have an empty completion: there is nothing to learn"
        refuse("data.source", what, "check data.columns")
    num = bare["count"]
    if num > max_unsupervised_fraction * used or num == used or not audit["rows"]["trained"]:
        if audit["prompt_format"] == "chat" and not audit["truncated"]["count"]:
            refuse(
                "data.chat_loss",
                f"{num}/{used} rows have nothing to train on: the turn with loss has weight 0;"
                f" {listed(bare['places'], 5)}",
                "set data.chat_loss: all, or leave these rows out",
            )
        bare_rows = f"{num}/{used} rows have no supervised token at max_length={limit}"
        what = f"{bare_rows}; p95 prompt is {p95}"
        longer = f"raise train.max_length above {p95}"
        if num == used:
            refuse("train.max_length", what, longer)
        accepted = (
            f"at most {max_unsupervised_fraction:.0%} are accepted (data.max_unsupervised_fraction)"
        )
        refuse(
            "train.max_length",
            what,
            f"{accepted}; rows {listed(bare['ids'], 5)}",
            f"{longer}, or leave long rows out with data.filters.max_tokens: {limit}",
        )
    end = audit["end_token_supervised"]
    if missing := end["untruncated_rows"] - end["of_which_supervised"]:
        refuse(
            "data.chat_template",
            f"{missing}/{used} rows do not end with a supervised end token: the model would not"
            f" learn to stop: {listed(audit['without_end_token']['places'], 3)}",
            "the template must end an assistant turn with a special token, inside {% generation %}"
            " if it has that",
        )
    if evaluates and not audit["tokens_per_split"][VALIDATION]["supervised"]:
        refuse(
            "data.split.validation",
            f"train.eval_strategy asks for a validation loss, but none of {used} rows is held out",
            "add rows, raise data.split.validation, or set train.eval_strategy: 'no'",
        )


def describe_conversations(audit: DataAudit) -> list[str]:
    """One line where rows are more than a question and its answer."""
    found = audit["conversations"]
    if found is None or (
        found["turns"]["max"] <= 2
        and not found["tool_calls"]["count"]
        and not found["thoughts"]["count"]
    ):
        return []
    parts = [f"{found['turns']['total']:,} turns, at most {found['turns']['max']} in a row"]
    parts += [
        f"{one['count']:,} {words} in {one['rows']:,} rows"
        for one, words in ((found["tool_calls"], "tool calls"), (found["thoughts"], "thoughts"))
    ]
    return [f"conversations: {'; '.join(parts)}"]


def describe_template(audit: DataAudit) -> list[str]:
    """One line where the conversations were rendered with another template than is saved."""
    twin = audit["training_template"]
    if twin is None:
        return []
    return [
        f"chat template: trained through TRL's {twin['file']} ({twin['sha256'][:12]}); the"
        " plain one is saved, and answers"
    ]


def warnings_of(audit: DataAudit) -> list[str]:
    """What the user should know before training, one line each; empty when all is well."""
    cut, bare, bad = audit["truncated"], audit["no_supervised_tokens"], audit["bad_rows"]
    empty, changed = audit["empty_completions"]["count"], audit["changed_by_template"]
    unlike = audit["unlike_prompt"]
    injected, markers = audit["special_token_injections"], audit["template_markers"]
    duplicates, merged = audit["duplicates"], audit["boundary_merges"]
    moved, across = len(duplicates["moved_to_train"]), len(duplicates["across_splits"])
    acts = "read as text" if injected["treated_as"] == "text" else "ACTING as special tokens"

    def found(injection: Injected) -> str:
        return f"{listed(injection['count'], 5)}; rows {listed(injection['rows'], 5)}"

    notes: list[tuple[Any, str]] = [
        (
            bad["count"],
            f"{bad['count']} of {audit['rows']['read']} rows cannot be used and are left out"
            " (data.on_bad_row: skip):",
        ),
        *(
            (True, f"  {count} x {reason}")
            for reason, count in list(bad["reasons"].items())[:NUM_REASONS]
        ),
        *(
            (True, f"columns that are not used: {listed(columns)} (in {file})")
            for file, columns in audit["unused_columns"].items()
        ),
        *(
            (True, f"files that are not read: {listed(files)} (in {folder})")
            for folder, files in audit["unread_files"].items()
        ),
        (
            cut["count"],
            f"{cut['count']} rows ({cut['fraction']:.1%}) are cut at"
            f" max_length={audit['max_length']}, {cut['lost_end_token']} lose their end token",
        ),
        (
            bare["count"],
            f"{bare['count']} rows have no supervised token and are left out:"
            f" {listed(bare['ids'], 5)}",
        ),
        (
            empty,
            f"{empty} rows have an empty completion and teach only the end token"
            " (data.filters.drop_empty_completions):"
            f" {listed(audit['empty_completions']['ids'], 5)}",
        ),
        (
            changed["count"],
            f"{changed['count']} rows have a message of which the chat template leaves out or"
            f" changes something: {listed(changed['places'], 3)}",
        ),
        (
            unlike["count"],
            f"{unlike['count']} rows have an answer that does not go on from what the chat template"
            f" ends a prompt with (a thought begun?): {listed(unlike['places'], 3)}; an argument of"
            " the template may change its prompts (data.chat_template_kwargs: {enable_thinking:"
            " ...})",
        ),
        (
            injected["num_rows"],
            f"{injected['num_rows']} rows contain special tokens, {acts}: {found(injected)}",
        ),
        (
            markers["num_rows"],
            f"{markers['num_rows']} rows contain template markers: {found(markers)}",
        ),
        (
            duplicates["exact_rows"] or duplicates["near_groups"],
            f"{duplicates['exact_rows']} exact duplicates, {len(duplicates['near_groups'])} groups"
            " that differ only in case or white space",
        ),
        (
            moved,
            f"{moved} held-out rows moved into training, because an exact duplicate is there",
        ),
        (
            across and not moved,
            f"{across} groups of exact duplicates lie in more than one split: reported, not moved",
        ),
        (
            merged,
            f"{merged} rows have a token that holds the prompt's end and the completion's start: it"
            " counts as completion, and generation starts from other tokens",
        ),
        (
            audit["end_tokens"] and audit["eos_token"] not in audit["end_tokens"],
            f"turns end with {listed(audit['end_tokens'], 3)}, but generation stops at"
            f" {audit['eos_token']}: set train.eos_token to the turn's end",
        ),
        (not audit["rows"]["validation"], "no validation rows"),
    ]
    return [line for applies, line in notes if applies]
