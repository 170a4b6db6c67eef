"""The audit of supervision.json and the gate before step 1: what was read, what was cut, and what
the loss sees. What would happen silently is counted, and its rows are named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from recipes_lib.data.rows import DataRow, SettingError, listed
from recipes_lib.data.supervision import Encoded, Supervision, special_ids


@dataclass
class SourceCounts:
    """What one source of a mixture has and gives; rows that train count as often as they do."""

    source: str
    weight: float
    rows: int
    used: int
    train: int
    validation: int
    test: int


@dataclass
class DataAudit:
    """supervision.json. Rows of which something is true are named by file and line.

    Args:
        training_template: file and hash of TRL's template that conversations were rendered with.
        template_date: what a template prints as the date of the day.
        rows: read, bad, used, train, validation, test, trained (with loss), and filtered by name.
        bad_rows: why rows were left out, with how many and where.
        tokens, supervised_tokens, prompt_tokens: total, p5, p50, p95 and max of a row.
        truncated: cut at `max_length`; lost_end: how many lost their end token.
        other_prompt: asked with other tokens than the row begins with.
        special_tokens: their text has one.
        duplicates: rows that another is equal to.
    """

    prompt_format: str
    loss_on: str
    max_length: int | None
    eos_token: str | None
    template_date: str | None = None
    training_template: dict[str, str] | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    sources: list[SourceCounts] = field(default_factory=list)
    bad_rows: dict[str, list[str]] = field(default_factory=dict)
    unused_columns: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    supervised_tokens: dict[str, int] = field(default_factory=dict)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    lost_end: int = 0
    no_supervised_tokens: list[str] = field(default_factory=list)
    without_end_token: list[str] = field(default_factory=list)
    empty_completions: list[str] = field(default_factory=list)
    changed_by_template: list[str] = field(default_factory=list)
    other_prompt: list[str] = field(default_factory=list)
    special_tokens: list[str] = field(default_factory=list)
    duplicates: int = 0
    end_tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        settings: Supervision,
        rows: Sequence[DataRow],
        encoded: Sequence[Encoded],
        tokenizer: Any,
    ) -> DataAudit:
        """Count and name the rows that are used."""
        audit = cls(
            prompt_format=settings.section.prompt_format,
            loss_on="whole text" if settings.whole else "completion",
            max_length=settings.max_length,
            eos_token=settings.eos_token,
            template_date=settings.section.template_date,
        )
        special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        texts = re.compile("|".join(re.escape(name) for name in special if len(name) > 1) or "(?!)")
        ends = Counter[str]()
        for row, item in zip(rows, encoded, strict=True):
            was_cut = len(item.ids) < item.tokens_before
            has_end = item.end_token >= 0
            for names, is_true in (
                (audit.truncated, was_cut),
                (audit.no_supervised_tokens, not item.supervised),
                (audit.without_end_token, not was_cut and not has_end),
                (audit.empty_completions, row.is_empty),
                (audit.changed_by_template, item.changed),
                (audit.other_prompt, item.other_prompt),
                (audit.special_tokens, any(map(texts.search, row.texts))),
            ):
                if is_true:
                    names.append(row.place)
            audit.lost_end += was_cut and not has_end
            if has_end:
                ends[tokenizer.convert_ids_to_tokens(item.end_token)] += 1
        audit.end_tokens = dict(ends)
        audit.tokens = _distribution(len(item.ids) for item in encoded)
        audit.supervised_tokens = _distribution(item.supervised for item in encoded)
        audit.prompt_tokens = _distribution(item.prompt_tokens for item in encoded)
        audit.duplicates = len(rows) - len({row.content for row in rows})
        return audit

    def to_dict(self) -> dict[str, Any]:
        """Return the content of supervision.json."""
        return asdict(self)

    def check(self, max_unsupervised_fraction: float, *, evaluates: bool) -> None:
        """Raise RefusedData where the data cannot teach what the recipe asks for: the gate before
        step 1. `evaluates` is whether the training computes a validation loss.
        """
        used, bare = self.rows["used"], len(self.no_supervised_tokens)
        if len(self.empty_completions) == used:
            what = f"{used}/{used} rows have an empty completion: there is nothing to learn"
            raise RefusedData(self, "data.source", what, "check data.columns")
        if bare > max_unsupervised_fraction * used or not self.rows["trained"]:
            what = f"{bare}/{used} rows have no supervised token"
            accepted = (
                f"at most {max_unsupervised_fraction:.0%} are accepted"
                f" (data.max_unsupervised_fraction); {listed(self.no_supervised_tokens, 3)}"
            )
            p95 = self.prompt_tokens["p95"]
            what += f" at max_length={self.max_length}; p95 prompt is {p95}"
            hint = f"raise train.max_length above {p95}, or set data.filters.max_tokens"
            raise RefusedData(self, "train.max_length", what, accepted, hint)
        if endless := self.without_end_token:
            what = f"{len(endless)}/{used} rows do not end with a supervised end token"
            why = f"the model would not learn to stop: {listed(endless, 3)}"
            hint = "end each assistant turn with a special token, inside any {% generation %} block"
            raise RefusedData(self, "data.chat_template", what, why, hint)
        if evaluates and not self.rows["validated"]:
            what = (
                f"none of {used} rows is held out for the validation that train.eval_strategy asks"
            )
            hint = "add rows, raise data.split.validation, or set train.eval_strategy: 'no'"
            raise RefusedData(self, "data.split.validation", what, hint)

    def describe(self) -> list[str]:
        """Return how conversations are rendered otherwise than by the template that is saved."""
        lines = []
        if template := self.training_template:
            name = f"{template['file']} ({template['sha256'][:12]})"
            lines.append(f"trained through TRL's {name}; the plain one is saved, and answers")
        if self.template_date:
            date = f"fixed to {self.template_date} for this run"
            lines.append(f"prints the date, {date}, in every resume, chat and evaluation")
        return [f"chat template: {line}" for line in lines]

    def warnings(self) -> list[str]:
        """Return what the user should know before training, one line each."""
        lines = []
        if bad := self.rows["bad"]:
            what = f"{bad} of {self.rows['read']} rows cannot be used and are left out"
            lines.append(f"{what} (on_bad_row: skip):")
            reasons = [*self.bad_rows.items()][:10]
            lines += [f"  {len(places)} x {what}: {listed(places, 3)}" for what, places in reasons]
        for file, columns in self.unused_columns.items():
            lines.append(f"columns that are not used: {listed(columns)} (in {file})")
        acting = "ACTING as special tokens" if self.prompt_format == "chat" else "read as text"
        for places, what in (
            (
                self.truncated,
                f"cut at max_length={self.max_length}, {self.lost_end} lose their end",
            ),
            (self.no_supervised_tokens, "without a supervised token, left out"),
            (self.empty_completions, "with an empty completion teach only the end token"),
            (self.changed_by_template, "where the chat template changes or drops text"),
            (
                self.other_prompt,
                "that do not begin as the model is asked: the prompt ends in a space, or the"
                " template begins a thought (data.chat_template_kwargs: {enable_thinking: ...})",
            ),
            (self.special_tokens, f"contain special tokens, {acting}"),
        ):
            if places:
                lines.append(f"{len(places)} rows {what}: {listed(places, 3)}")
        if self.duplicates:
            lines.append(f"{self.duplicates} exact duplicates")
        if self.end_tokens and self.eos_token not in self.end_tokens:
            lines.append(
                f"turns end with {listed(self.end_tokens, 3)}, but generation stops at"
                f" {self.eos_token}: set train.eos_token to the turn's end"
            )
        if not self.rows["validation"]:
            lines.append("no validation rows")
        return lines


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
