"""What one foreign file gives to an evaluation: measures with their samples, judgments, answers,
and what it could not give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.json_files import Row
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.foreign.files import Foreign
from recipes_lib.judging.store import text_hash

# FastChat's 80 questions: ten ids to a category.
_CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)


@dataclass
class Part:
    """One file's share of one evaluation.

    `judgments` and `answers` are rows of our own stores. `lacks` says what could not be carried
    over, `facts` goes into result.json. `rows_of` is the model whose rows these are, where the file
    holds several.
    """

    eval: str
    file: Foreign
    measures: list[Measure] = field(default_factory=list)
    judgments: list[Row] = field(default_factory=list)
    answers: list[Row] = field(default_factory=list)
    models: tuple[str, ...] = ()
    opponent: str | None = None
    rows_of: str | None = None
    flags: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    facts: Row = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """The samples of all measures."""
        return [one for measure in self.measures for one in measure.samples]


def mt_bench_category(question: str) -> str:
    """Return the category of one of MT-Bench's 80 questions; "all" for any other question.

    Example:
        >>> mt_bench_category("81"), mt_bench_category("111"), mt_bench_category("my-question")
        ('writing', 'math', 'all')
    """
    place = (int(question) - 81) // 10 if question.isdigit() else -1
    return _CATEGORIES[place] if 0 <= place < len(_CATEGORIES) else "all"


def question_id(instruction: str) -> str:
    """Return the id of a question that comes without one: a hash of its text, the same in every
    file.
    """
    return text_hash(instruction.strip())[:12]


def one_model(file: Foreign, names: Sequence[str], wanted: str | None) -> str:
    """Return the model whose rows are meant.

    Raises:
        DataError: the file holds several and none was named.
        RecipeError: the one that was named is not there.
    """
    found = list(dict.fromkeys(names))
    if wanted is None:
        if len(found) > 1:
            shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
            raise file.error(f"holds {len(found)} models: {shown}", f"name one: --model {found[0]}")
        return found[0]
    if wanted in found or found == [
        ""
    ]:  # a file that names no model is about the one that is meant
        return wanted if wanted in found else ""
    near = did_you_mean(wanted, found, "--model ")
    raise RecipeError(
        f"{file.path.name} holds no model '{wanted}'",
        *near,
        f"models there: {', '.join(found[:8])}",
    )


def check_unique(file: Foreign, keys: Sequence[tuple[str, int]], rows: Sequence[Any]) -> list[Any]:
    """Return the rows without exact repetitions.

    Raises:
        DataError: two different rows stand under one question and turn; the ids are listed.
    """
    seen: dict[tuple[str, int], Any] = {}
    twice = [key for key, row in zip(keys, rows, strict=True) if seen.setdefault(key, row) != row]
    if twice:
        ids = ", ".join(f"{question} turn {turn}" for question, turn in dict.fromkeys(twice[:20]))
        raise file.error(
            f"{len(twice)} rows stand under a question and turn that is there already: {ids}",
            "keep one of each",
        )
    return list(seen.values())
