"""Rows that hold questions or answers of an evaluation: a model that was trained on them is not
tested by it.

A text of 13 words or more is in a row that holds at least half of its 13-grams; a shorter one only
in a row of which it is a whole field or message.
Source of the 13-grams: Brown et al., "Language Models are Few-Shot Learners", appendix C.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Literal

from recipes_lib.data.rows import DataRow

GRAM = 13
SHARE = 0.5
# An answer of fewer words ("Paris.") is no sign that its question was seen.
FEWEST_WORDS = {"question": 1, "answer": 8}
ACCIDENTAL = 0.01  # of the questions: "What is the meaning of life?" is asked everywhere
NUM_KEPT = 100
# Chinese, Japanese, Thai, Lao, Burmese and Khmer: each character counts as a word
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf\u1000-\u1049\u1050-\u109f\u1780-\u17d3"
    "\u17e0-\u17e9\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
TextPart = Literal["question", "answer"]


@dataclass(frozen=True)
class EvalText:
    """A question of an evaluation, or an answer to it that counts as right."""

    question: str
    part: TextPart
    text: str


@dataclass(frozen=True)
class Leak:
    """A row that holds a text of an evaluation: `share` of its 13-grams, or a short one whole."""

    place: str
    row: str
    question: str
    part: TextPart
    share: float
    short: bool = False
    begins: str = ""  # how the text begins

    def __str__(self) -> str:
        share = "whole" if self.short else f"{self.share:.0%} of its {GRAM}-grams"
        text = "question" if self.part == "question" else "answer to question"
        return f"{self.place}: {text} {self.question} ({share}): {self.begins}"


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """What training rows hold of one evaluation."""

    rows: int = 0  # that were searched
    questions: int = 0
    leaked_rows: int = 0
    leaked_questions: int = 0
    found: list[Leak] = field(default_factory=list)  # the first `NUM_KEPT`
    why: str = ""  # nothing was searched

    @property
    def is_error(self) -> bool:
        """Whether an evaluation of a model that was trained on these rows says nothing: short texts
        of a few questions are written by two people without one of them having read the other.
        """
        is_rare = self.leaked_questions < ACCIDENTAL * self.questions
        return bool(self.found) and not (is_rare and all(leak.short for leak in self.found))

    def summary(self, name: str) -> str:
        """Return one sentence about the evaluation `name`."""
        if self.why:
            return f"not searched for the questions of {name}: {self.why}"
        if not self.found:
            questions = f"{self.questions:,} questions of {name}"
            return f"none of the {questions} is word for word in the {self.rows:,} training rows"
        return (
            f"{self.leaked_questions:,} of {self.questions:,} questions of {name} (or their"
            f" answers) are in {self.leaked_rows:,} of {self.rows:,} training rows"
        )

    def lines(self, limit: int) -> list[str]:
        """Return the first leaks, a line each, and how many more rows there are."""
        first = self.found[:limit]
        lines = [str(leak) for leak in first]
        num_more = self.leaked_rows - len({leak.row for leak in first})
        if num_more > 0:
            lines.append(f"... and {num_more:,} more rows")
        return lines


def find_leaks(
    rows: Iterable[DataRow], evals: Mapping[str, Sequence[EvalText]]
) -> dict[str, Leaks]:
    """Return what rows hold of the texts of each evaluation, by its name."""
    # 13-gram, or all words of a short text -> the eval texts that it is a sign of
    owners: dict[tuple[str, ...], list[tuple[str, EvalText]]] = defaultdict(list)
    num_grams: dict[tuple[str, EvalText], int] = {}
    for name, texts in evals.items():
        grams = {text: _grams(text.text, FEWEST_WORDS[text.part]) for text in texts}
        questions = defaultdict[tuple[str, ...], set[str]](set)  # that a gram stands in
        for text, of_text in grams.items():
            for gram in of_text:
                questions[gram].add(text.question)
        for text, of_text in grams.items():
            # of a question that is listed twice, no gram is in one question only
            signs_of_text = {gram for gram in of_text if len(questions[gram]) == 1} or of_text
            num_grams[name, text] = len(signs_of_text)
            for gram in signs_of_text:
                owners[gram].append((name, text))

    # rows -> leaks
    leaks: dict[str, list[Leak]] = {name: [] for name in evals}
    num_rows = 0
    for row in rows:
        num_rows += 1
        grams_of_row: dict[tuple[str, ...], None] = {}
        for row_text in row.texts:
            grams_of_row |= _grams(row_text)
        signs = Counter[tuple[str, EvalText]]()
        for gram in grams_of_row:
            for owner in owners.get(gram, ()):
                signs[owner] += 1
        for (name, text), num_found in signs.items():
            share = num_found / num_grams[name, text]
            if share >= SHARE:
                leak = Leak(
                    place=row.place,
                    row=row.id,
                    question=text.question,
                    part=text.part,
                    share=share,
                    short=len(_WORD.findall(text.text.casefold())) < GRAM,
                    begins=shorten(text.text, 60, placeholder="..."),
                )
                leaks[name].append(leak)
    result = {}
    for name, of_eval in leaks.items():
        of_eval.sort(key=lambda leak: leak.short)  # long ones first: one of them is an error
        result[name] = Leaks(
            rows=num_rows,
            questions=len({text.question for text in evals[name]}),
            leaked_rows=len({leak.row for leak in of_eval}),
            leaked_questions=len({leak.question for leak in of_eval}),
            found=of_eval[:NUM_KEPT],
        )
    return result


def _grams(text: str, fewest: int = 1) -> dict[tuple[str, ...], None]:
    """Return the 13-grams of a text, or a shorter one as a whole; none for less than `fewest`.
    They are keys, because a set of texts has another order in each process.
    """
    words = _WORD.findall(text.casefold())
    if len(words) < GRAM:
        return {tuple(words): None} if len(words) >= fewest else {}
    shifted = [words[start:] for start in range(GRAM)]
    return dict.fromkeys(zip(*shifted, strict=False))
