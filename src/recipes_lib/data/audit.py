"""What the rows that train show: counted, named with their places, and refused where they cannot
teach what the recipe asks for.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipes_lib.config.recipe import DataSection
from recipes_lib.core.terminal import count
from recipes_lib.data.encoding import Encoded, Supervision, special_ids
from recipes_lib.data.encoding_pairs import EncodedPair
from recipes_lib.data.errors import NUM_LISTED, SettingError, listed
from recipes_lib.data.prompts import default_system_message
from recipes_lib.data.rows import PAIR, DataRow, answer_row, conversation_of, template_values

MOST_UNSUPERVISED = 0.05  # of the rows
# Of the medians of chosen and rejected answers; above it a model may learn the length alone.
MOST_LONGER = 1.2


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


def audit_rows(
    rows: list[DataRow],
    encoded: Mapping[str, Encoded | EncodedPair],
    settings: Supervision,
    tokenizer: Any,
) -> DataAudit:
    """Return what the rows that are used, and their tokens, show."""
    are_pairs = isinstance(encoded[rows[0].id], EncodedPair) if rows else False
    loss_on = "whole text" if settings.whole else "completion"
    if are_pairs:
        loss_on = "chosen against the rejected answer"
    audit = DataAudit(settings.section.prompt_format, loss_on)
    special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    # one of a single character would be found in ordinary text
    escaped = [re.escape(name) for name in special if len(name) > 1]
    special_text = re.compile("|".join(escaped) or "(?!)")  # which matches nothing
    contents = set[bytes]()
    ends = Counter[int]()
    lengths_by_title: dict[str, list[int]] = {}
    for row in rows:
        item = encoded[row.id]
        facts = {
            "truncated": False,
            "lost_end": False,
            "no_supervised_tokens": not item.supervised,
            "without_end_token": False,
            "empty_completions": row.is_empty,
            "changed_by_template": False,
            "other_prompt": False,
            "special_tokens": any(map(special_text.search, row.texts)),
            "duplicates": row.content in contents,
        }
        for side in item.sides:
            was_cut = len(side.ids) < side.tokens_before
            facts["truncated"] |= was_cut
            facts["changed_by_template"] |= side.changed
            facts["other_prompt"] |= side.other_prompt
            if side.end_token >= 0:
                ends[side.end_token] += 1
            else:
                facts["lost_end" if was_cut else "without_end_token"] = True
        for name, is_true in facts.items():
            places = audit.places.setdefault(name, [])
            if is_true:
                places.append(row.place)
        contents.add(row.content)
        for title, length in item.lengths.items():
            lengths_by_title.setdefault(title, []).append(length)
    for end, num_rows in ends.items():
        audit.end_tokens[tokenizer.convert_ids_to_tokens(end)] = num_rows
    for title, lengths in lengths_by_title.items():
        median = int(np.median(lengths))
        audit.tokens[title] = {"total": sum(lengths), "median": median, "max": max(lengths)}
    if are_pairs:
        _compare_lengths(audit)
    date = settings.section.template_date
    if date:
        what = f"prints the date, {date} in every resume, chat and evaluation of this run"
        audit.notes.append(f"chat template: {what}")
    return audit


def _compare_lengths(audit: DataAudit) -> None:
    """Say how long chosen and rejected answers are: a model learns a difference first."""
    medians = [audit.tokens[name]["median"] for name in PAIR]
    longer = medians[0] / max(medians[1], 1)
    what = f"median length: chosen {medians[0]:,} tokens, rejected {medians[1]:,}"
    if 1 / MOST_LONGER <= longer <= MOST_LONGER:
        audit.notes.append(what)
        return
    kind = "longer" if longer > 1 else "shorter"
    hint = "compare answers of equal length, or the loss per token (train.loss_type: sigmoid_norm)"
    audit.warnings.append(f"{what}: DPO may learn to write {kind} answers; {hint}")


def system_message_note(
    rows: Sequence[DataRow], section: DataSection, tokenizer: Any, template: str
) -> list[str]:
    """Return a note about the system message that the template puts where a row has none."""
    without: list[DataRow] = []
    for row in rows:
        if PAIR[0] in row.fields:  # of a pair, the two conversations begin alike
            row = answer_row(row, PAIR[0])
        if conversation_of(row, section.system_prompt)[0]["role"] != "system":
            without.append(row)
    if not without:
        return []
    messages = conversation_of(without[0], section.system_prompt)
    values = template_values(without[0], section.chat_template_kwargs)
    default = default_system_message(messages, tokenizer, template, values)
    if not default:
        return []
    num_rows = f"{len(without)} of {count(len(rows), 'row')}"
    what = f"{num_rows} without a system message get the template's"
    return [f'{what}: "{default}" (data.system_prompt: another)']


def judge(audit: DataAudit, settings: Supervision, evaluates: bool) -> None:
    """Write the warnings, and refuse data that cannot teach what the recipe asks for."""
    used = audit.rows["used"]
    places = audit.places
    if audit.rows["bad"]:
        what = f"{audit.rows['bad']} of {audit.rows['read']} rows cannot be used and are left out"
        audit.warnings.append(f"{what} (on_bad_row: skip):")
        audit.warnings += audit.bad_rows[:NUM_LISTED]
    limit = f"max_length={settings.max_length}"
    lost = len(places["lost_end"])
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
    for name, fact in facts.items():
        rows = places[name]
        if rows:
            audit.warnings.append(f"{len(rows)} of {used} rows: {fact}: {listed(rows, 3)}")
    if audit.end_tokens and settings.eos_token not in audit.end_tokens:
        what = f"turns end with {listed(audit.end_tokens, 3)}, but generation stops at"
        audit.warnings.append(f"{what} {settings.eos_token}: set train.eos_token to the turn's end")
    longer = "raise train.max_length above that, or set data.filters.max_tokens"
    end = "end each assistant turn with a special token, inside any {% generation %} block"
    for name, most, key, hint in (
        ("empty_completions", used - 1, "data.source", "check data.columns"),
        ("no_supervised_tokens", MOST_UNSUPERVISED * used, "train.max_length", longer),
        ("without_end_token", 0, "data.chat_template", end),
    ):
        rows = places[name]
        if len(rows) > most:
            what = f"{len(rows)}/{used} rows: {facts[name]}"
            allowed = f"at most {math.floor(most)} of {used} rows may be so"
            raise SettingError(key, what, listed(rows, 3), f"{allowed}; {hint}")
    if evaluates and not audit.rows["validation"]:
        what = f"none of {used} rows is held out for validation (train.eval_strategy)"
        hint = "add rows, raise data.split.validation, or set train.eval_strategy: 'no'"
        raise SettingError("data.split.validation", what, hint)
