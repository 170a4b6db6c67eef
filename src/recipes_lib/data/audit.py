"""The audit of supervision.json and the gate before step 1: what was read, what was cut, and what
the loss sees. What would happen silently is counted, and its rows are named.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipes_lib.data.rows import DataRow, SettingError, listed
from recipes_lib.data.supervision import Encoded, Supervision, special_ids


@dataclass
class DataAudit:
    """supervision.json."""

    prompt_format: str
    loss_on: str
    rows: dict[str, Any]  # numbers: read, bad, used, train, ...; trained and validated have loss
    tokens: dict[str, dict[str, int]]  # total, p5, p50, p95 and max of a row
    places: dict[str, list[str]]  # file and line of the rows of which something is true
    end_tokens: dict[str, int]  # how many rows end with each
    bad_rows: dict[str, list[str]] = field(default_factory=dict)  # why rows were left out
    unused_columns: dict[str, list[str]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)  # the rows that each has and gives
    training_template: dict[str, str] | None = None  # file and hash of TRL's
    notes: list[str] = field(default_factory=list)  # how conversations are rendered
    warnings: list[str] = field(default_factory=list)  # what the user should know before training

    @classmethod
    def of(
        cls, settings: Supervision, rows: list[DataRow], items: list[Encoded], tokenizer: Any
    ) -> DataAudit:
        """Count and name the rows that are used."""
        special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        texts = re.compile("|".join(re.escape(name) for name in special if len(name) > 1) or "(?!)")
        places: dict[str, list[str]] = defaultdict(list)
        for row, item in zip(rows, items, strict=True):
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
            }.items():
                places[name] += [row.place] if is_true else []
        ends = Counter(item.end_token for item in items if item.end_token >= 0)
        return cls(
            prompt_format=settings.section.prompt_format,
            loss_on="whole text" if settings.whole else "completion",
            rows={"used": len(rows), "duplicates": len(rows) - len({row.content for row in rows})},
            tokens={
                "prompt": _distribution(item.prompt_tokens for item in items),
                "row, as trained": _distribution(len(item.ids) for item in items),
                "with loss": _distribution(item.supervised for item in items),
            },
            places=dict(places),
            end_tokens={tokenizer.convert_ids_to_tokens(end): ends[end] for end in ends},
        )

    def describe(self, settings: Supervision) -> None:
        """Fill in the notes and the warnings, once everything is counted."""
        if template := self.training_template:
            name = f"{template['file']} ({template['sha256'][:12]})"
            what = f"trained through TRL's {name}; the plain one is saved, and answers"
            self.notes.append(f"chat template: {what}")
        if date := settings.section.template_date:
            what = f"prints the date, fixed to {date} for this run"
            self.notes.append(f"chat template: {what}, in every resume, chat and evaluation")
        lines = self.warnings
        if bad := self.rows["bad"]:
            what = f"{bad} of {self.rows['read']} rows cannot be used and are left out"
            lines.append(f"{what} (on_bad_row: skip):")
            reasons = [*self.bad_rows.items()][:10]
            lines += [f"  {len(places)} x {what}: {listed(places, 3)}" for what, places in reasons]
        for file, columns in self.unused_columns.items():
            lines.append(f"columns that are not used: {listed(columns)} (in {file})")
        lost = len(self.places["lost_end"])
        acting = "ACTING as special tokens" if self.prompt_format == "chat" else "read as text"
        for name, what in (
            ("truncated", f"cut at max_length={settings.max_length}, {lost} lose their end"),
            ("no_supervised_tokens", "without a supervised token, left out"),
            ("empty_completions", "with an empty completion teach only the end token"),
            ("changed_by_template", "where the chat template changes or drops text"),
            (
                "other_prompt",
                "that do not begin as the model is asked: the prompt ends in a space, or the"
                " template begins a thought (data.chat_template_kwargs: {enable_thinking: ...})",
            ),
            ("special_tokens", f"contain special tokens, {acting}"),
        ):
            if places := self.places[name]:
                lines.append(f"{len(places)} rows {what}: {listed(places, 3)}")
        if self.rows["duplicates"]:
            lines.append(f"{self.rows['duplicates']} exact duplicates")
        if self.end_tokens and settings.eos_token not in self.end_tokens:
            ends, eos = listed(self.end_tokens, 3), settings.eos_token
            what = f"turns end with {ends}, but generation stops at {eos}"
            lines.append(f"{what}: set train.eos_token to the turn's end")
        if not self.rows["validation"]:
            lines.append("no validation rows")

    def check(self, settings: Supervision, *, evaluates: bool) -> None:
        """Raise RefusedData where the data cannot teach what the recipe asks for, before step 1."""
        used, bare = self.rows["used"], self.places["no_supervised_tokens"]
        most = settings.section.max_unsupervised_fraction
        if len(self.places["empty_completions"]) == used:
            what = f"{used}/{used} rows have an empty completion: there is nothing to learn"
            raise RefusedData(self, "data.source", what, "check data.columns")
        if len(bare) > most * used or not self.rows["trained"]:
            p95 = self.tokens["prompt"]["p95"]
            what = f"{len(bare)}/{used} rows have no supervised token"
            what += f" at max_length={settings.max_length}; p95 prompt is {p95}"
            accepted = f"at most {most:.0%} are accepted (data.max_unsupervised_fraction)"
            hint = f"raise train.max_length above {p95}, or set data.filters.max_tokens"
            accepted += f"; {listed(bare, 3)}"
            raise RefusedData(self, "train.max_length", what, accepted, hint)
        if endless := self.places["without_end_token"]:
            what = f"{len(endless)}/{used} rows do not end with a supervised end token"
            why = f"the model would not learn to stop: {listed(endless, 3)}"
            hint = "end each assistant turn with a special token, inside any {% generation %} block"
            raise RefusedData(self, "data.chat_template", what, why, hint)
        if evaluates and not self.rows["validated"]:
            what = f"none of {used} rows is held out for the validation of train.eval_strategy"
            hint = "add rows, raise data.split.validation, or set train.eval_strategy: 'no'"
            raise RefusedData(self, "data.split.validation", what, hint)


class RefusedData(SettingError):
    """Data that cannot teach what the recipe asks for, with what was counted."""

    def __init__(self, audit: DataAudit, key: str, what: str, *hints: str) -> None:
        super().__init__(key, what, *hints)
        self.audit = audit


def _distribution(lengths: Iterable[int]) -> dict[str, int]:
    """Return the total, and per row the percentiles and the maximum, as whole tokens."""
    values = np.fromiter(lengths, dtype=np.int64)
    p5, p50, p95 = map(int, np.percentile(values, (5, 50, 95), method="nearest"))
    return {"total": int(values.sum()), "p5": p5, "p50": p50, "p95": p95, "max": int(values.max())}
