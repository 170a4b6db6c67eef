"""The audit of supervision.json and the gate before step 1: what was read, what was cut, and what
the loss sees. What would happen silently is counted, and its rows are named.

A text with `</s>` in it can end a turn: such rows are counted, and special tokens are disarmed in
the plain formats (`data.special_tokens: text`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from recipes_lib.data.rows import DataRow, SettingError, listed
from recipes_lib.data.supervision import Encoded, Supervision, special_ids


@dataclass
class Named:
    """Rows of which something is true: how many, and which by id and by file and line."""

    count: int = 0
    ids: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, row: DataRow) -> None:
        """Count one more."""
        self.count += 1
        self.ids.append(row.id)
        self.places.append(row.place)

    def __str__(self) -> str:
        return listed(self.places, 3)


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
    supervised: int


@dataclass
class DataAudit:
    """supervision.json.

    Args:
        training_template: file and hash of TRL's template that conversations were rendered with.
        template_date: what a template prints as the date of the day.
        rows: read, bad, used, train, validation, test, trained (with loss), and filtered by name.
        tokens, supervised_tokens, prompt_tokens: total, p5, p50, p95 and max of a row.
        truncated: cut at `max_length`; lost_end: those that lost their end token.
        other_prompt: asked with other tokens than the row begins with.
        special_tokens: rows whose text has one; found_texts: which, and how often.
        duplicates: rows that another is equal to.
    """

    prompt_format: str
    loss_on: str
    max_length: int | None
    truncation_mode: str
    eos_token: str | None
    training_template: dict[str, str] | None = None
    template_date: str | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    sources: list[SourceCounts] = field(default_factory=list)
    bad_rows: dict[str, Any] = field(default_factory=dict)
    unused_columns: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    supervised_tokens: dict[str, int] = field(default_factory=dict)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    truncated: Named = field(default_factory=Named)
    lost_end: int = 0
    no_supervised_tokens: Named = field(default_factory=Named)
    without_end_token: Named = field(default_factory=Named)
    empty_completions: Named = field(default_factory=Named)
    changed_by_template: Named = field(default_factory=Named)
    other_prompt: Named = field(default_factory=Named)
    special_tokens: Named = field(default_factory=Named)
    found_texts: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    end_tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Supervision) -> DataAudit:
        """Return an empty audit of these settings."""
        return cls(
            prompt_format=settings.section.prompt_format,
            loss_on="whole text" if settings.whole else "completion",
            max_length=settings.max_length,
            truncation_mode="keep_end" if settings.keep_end else "keep_start",
            eos_token=settings.eos_token,
            template_date=settings.section.template_date,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of supervision.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataAudit:
        """Read what `to_dict` returned."""
        return TypeAdapter(cls).validate_python(values)

    def count(self, rows: Sequence[DataRow], encoded: Sequence[Encoded], tokenizer: Any) -> None:
        """Count and name the rows that are used."""
        ends = Counter[int]()
        for row, item in zip(rows, encoded, strict=True):
            was_cut = item.length < item.tokens_before
            self.lost_end += was_cut and not item.ends
            for named, is_true in (
                (self.truncated, was_cut),
                (self.no_supervised_tokens, not item.supervised),
                (self.without_end_token, not was_cut and not item.ends),
                (self.empty_completions, row.is_empty),
                (self.changed_by_template, item.changed),
                (self.other_prompt, item.other_prompt),
            ):
                if is_true:
                    named.add(row)
            ends[item.end_token] += item.end_token >= 0
        tokens = sorted(token for token, count in ends.items() if count)
        self.end_tokens = {
            str(tokenizer.convert_ids_to_tokens(token)): ends[token] for token in tokens
        }
        self.tokens = _distribution(item.length for item in encoded)
        self.supervised_tokens = _distribution(item.supervised for item in encoded)
        self.prompt_tokens = _distribution(item.prompt_tokens for item in encoded)
        special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        pattern = re.compile(
            "|".join(re.escape(name) for name in special if len(name) > 1) or "(?!)"
        )
        for row in rows:
            if texts := [text for said in row.texts for text in pattern.findall(said)]:
                self.special_tokens.add(row)
                for text in texts:
                    self.found_texts[text] = self.found_texts.get(text, 0) + 1

    def check(self, max_unsupervised_fraction: float, *, evaluates: bool = False) -> None:
        """Refuse data that cannot teach what the recipe asks for: the gate before step 1.

        Args:
            evaluates: whether the training computes a validation loss.

        Raises:
            RefusedData: it carries this audit.
        """
        used, bare, open_ended = (
            self.rows["used"],
            self.no_supervised_tokens,
            self.without_end_token,
        )
        too_many = bare.count > max_unsupervised_fraction * used
        if self.empty_completions.count == used:
            what = f"{used}/{used} rows have an empty completion: there is nothing to learn"
            raise RefusedData(self, "data.source", what, "check data.columns")
        if too_many or bare.count == used or not self.rows["trained"]:
            p95 = self.prompt_tokens["p95"]
            key = "train.max_length"
            what = f"at max_length={self.max_length}; p95 prompt is {p95}"
            hint = (
                f"raise train.max_length above {p95}, or leave long rows out with"
                f" data.filters.max_tokens: {self.max_length}"
            )
            if self.prompt_format == "chat" and not self.truncated.count:
                key, what = "data.chat_loss", "as the turn with loss has weight 0"
                hint = "set data.chat_loss: all, or leave these rows out"
            accepted = f"at most {max_unsupervised_fraction:.0%} are accepted"
            raise RefusedData(
                self,
                key,
                f"{bare.count}/{used} rows have no supervised token {what}",
                f"{accepted} (data.max_unsupervised_fraction); {bare}",
                hint,
            )
        if open_ended.count:
            raise RefusedData(
                self,
                "data.chat_template",
                f"{open_ended.count}/{used} rows do not end with a supervised end token: the model"
                f" would not learn to stop: {open_ended}",
                "the template must end an assistant turn with a special token, inside"
                " {% generation %} if it has that",
            )
        if evaluates and not self.rows["validated"]:
            raise RefusedData(
                self,
                "data.split.validation",
                "train.eval_strategy asks for a validation loss, but none of"
                f" {used} rows is held out",
                "add rows, raise data.split.validation, or set train.eval_strategy: 'no'",
            )

    def describe(self) -> list[str]:
        """Return a line where the conversations were rendered with another template than is saved,
        or with a date.
        """
        lines = []
        if template := self.training_template:
            name = f"{template['file']} ({template['sha256'][:12]})"
            lines.append(
                f"chat template: trained through TRL's {name}; the plain one is saved, and answers"
            )
        if self.template_date:
            date = f"{self.template_date}, in every resume, chat and evaluation of this run"
            lines.append(f"chat template: prints the date, fixed to {date}")
        return lines

    def warnings(self) -> list[str]:
        """Return what the user should know before training, one line each."""
        lines = []
        if bad := self.bad_rows["count"]:
            read = self.rows["read"]
            lines.append(
                f"{bad} of {read} rows cannot be used and are left out (on_bad_row: skip):"
            )
            lines += [f"  {num} x {why}" for why, num in [*self.bad_rows["reasons"].items()][:10]]
        for file, columns in self.unused_columns.items():
            lines.append(f"columns that are not used: {listed(columns)} (in {file})")
        texts = listed((f"{name} {num}x" for name, num in self.found_texts.items()), 5)
        acting = "ACTING as special tokens" if self.prompt_format == "chat" else "read as text"
        cut = f"cut at max_length={self.max_length}, {self.lost_end} lose their end"
        for named, what in (
            (self.truncated, cut),
            (self.no_supervised_tokens, "without a supervised token, left out"),
            (self.empty_completions, "with an empty completion teach only the end token"),
            (self.changed_by_template, "of which the chat template changes or leaves out a text"),
            (
                self.other_prompt,
                "that do not begin with the tokens the model is asked with: the prompt ends in a"
                " space, or the template begins a thought (data.chat_template_kwargs:"
                " {enable_thinking: ...})",
            ),
            (self.special_tokens, f"contain special tokens, {acting}: {texts}"),
        ):
            if named.count:
                lines.append(f"{named.count} rows {what}: {named}")
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
