"""Foreign judgments as samples: comparisons and grades, with what their source made of them.

A record keeps what the source made of the judge's text beside what the text says. A comparison that
was judged in one order keeps one verdict: its outcome is the recorded one, and nothing stands for
the other order. A text without a verdict has no value, whatever its source counted it as.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from recipes_lib.core.json_files import Row
from recipes_lib.eval_log import SCORE, Sample
from recipes_lib.foreign.files import Foreign
from recipes_lib.judging.outcomes import outcome_of
from recipes_lib.judging.prometheus import OUR_GRADING
from recipes_lib.judging.verdicts import parse_absolute

KNOWN_JUDGMENTS = (
    "known: the original study's CSV and JSONL, alpaca_eval annotations, FastChat JSONL"
)

# the original study's rule: the last standalone digit of the text is the score
_STANDALONE_DIGIT = re.compile(r"\b[1-5]\b")
_OUTCOMES = {"A": "win", "B": "loss", "Tie": "tie"}


@dataclass(frozen=True, kw_only=True)
class Record(Sample):
    """One judgment of a foreign file, unresolved where the judge's text holds no verdict by the
    study's own rule.

    `recorded` is the outcome the study counted (None in grading), `score` the number it averaged.
    `strict` says whether our parser finds a verdict too (None: not our format). `input` is what the
    judge was shown.
    """

    model: str = ""
    against: str = ""
    recorded: str | None = None
    score: float | None = None
    flipped: bool | None = None
    strict: bool | None = None

    @property
    def conversation(self) -> tuple[str, str, str]:
        """What the turns of one conversation have in common."""
        return self.model, self.against, self.id


@dataclass(frozen=True)
class JudgmentFormat:
    """How one program writes judgments: the reader of a row, whether they compare (`pairs`) or
    grade, how many questions its set has, how they were judged, and what is not in the file.
    """

    read: Callable[[Row], Record]
    pairs: bool = True
    size: int = 0
    flags: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgments:
    """The judgments of one file; grades go up to `highest`."""

    file: Foreign
    records: list[Record] = field(repr=False)
    both_orders: bool
    highest: int

    @property
    def format(self) -> JudgmentFormat:
        """What is known of all files of this format."""
        return JUDGMENT_FORMATS[str(self.file.format)]

    @property
    def pairs(self) -> bool:
        """Whether two answers are compared."""
        return self.format.pairs

    @property
    def suite(self) -> str:
        """Our suite of the same questions."""
        return "alpaca_eval" if "alpaca" in str(self.file.format) else "mt_bench"


def read_judgments(file: Foreign) -> Judgments:
    """Return the judgments of a file.

    Raises:
        DataError: it holds something else or nothing, or a row does not fit its format.
    """
    if not file.rows:
        raise file.error("0 judgments")
    if file.format not in JUDGMENT_FORMATS:
        raise file.unknown("a known format of judgments", KNOWN_JUDGMENTS)
    records, read = [], JUDGMENT_FORMATS[file.format].read
    for number, (line, row) in enumerate(file.rows, 1):
        try:
            records.append(read(row))
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            what = f"not a row of {file.format}: {type(fault).__name__} {fault}"
            if read is _original_csv:
                what = f"row {number} has no preference A, B or Tie or no score: {fault}"
            raise file.error(what, line=line) from None
    # our own annotations say what each order gave
    seen = any(record.flipped is not None for record in records)
    ten = read is _fastchat_single and OUR_GRADING not in (file.rows[0][1].get("judge") or ())
    return Judgments(
        file,
        records,
        both_orders=read is _fastchat_pair or seen or _swapped_pairs(records),
        highest=10 if ten else 5,
    )


def _original_csv(row: Row) -> Record:
    """The original study's comparison: the model is always A, the score is the last standalone
    digit, no digit became a tie.
    """
    feedback, preference = row["feedback"] or "", row["preference"]
    recorded, parsed = _OUTCOMES[preference], bool(_STANDALONE_DIGIT.search(feedback))
    answer, opponent = row["your_answer (A)"] or "", row["baseline_answer (B)"] or ""
    return Record(
        id=row["instruction"],
        value=SCORE[recorded] if parsed else None,
        outcome=recorded if parsed else "unresolved",
        verdicts=(preference.replace("Tie", "tie") if parsed else "unparsed",),
        lengths=(len(answer), len(opponent)),
        answer=answer,
        opponent=opponent,
        raws=(feedback,),
        recorded=recorded,
        score=float(row["score (A vs B)"]),
        strict=parse_absolute(feedback).value is not None,
    )


def _original_mt_bench(row: Row) -> Record:
    """The original study's grading of one turn; question and answer are shortened in its files."""
    verdict = parse_absolute(row["raw"])
    score = verdict.value if isinstance(verdict.value, int) else None
    return Record(
        id=str(row["question_id"]),
        turn=int(row["turn"]),
        **graded_fields(score),
        input=row.get("question"),
        answer=row.get("answer"),
        raws=(row["raw"] or "",),
        shortened=True,
        strict=score is not None,
    )


def graded_fields(score: float | None) -> Row:
    """Return the fields that a grade gives a record, or that its absence does."""
    if score is None:
        return {"value": None, "outcome": "unresolved", "verdicts": ("unparsed",), "score": None}
    said = str(int(score)) if float(score).is_integer() else str(score)
    return {"value": score, "outcome": "graded", "verdicts": (said,), "score": score}


def _alpaca_eval(row: Row) -> Record:
    """The library's annotation: preference 1 = reference, 2 = model, 1.5 and 0 = draw, None = no
    verdict.
    """
    value = None if row["preference"] is None else float(row["preference"])
    if value is not None and not (value == 0 or 1 <= value <= 2):
        raise ValueError(f"preference {value}")
    value = 1.5 if value == 0 else value
    outcome = None if value is None else "win" if value > 1.5 else "loss" if value < 1.5 else "tie"
    orders = [one for one in (row.get("preference_by_order") or {}).values() if one is not None]
    return Record(
        id=row["instruction"],
        value=None if value is None else value - 1,
        outcome=outcome or "unresolved",
        verdicts=({"win": "A", "loss": "B", "tie": "tie", None: "unparsed"}[outcome],),
        lengths=tuple(len(text) for text in (row["output_2"], row["output_1"]) if text is not None),
        answer=row["output_2"],
        opponent=row["output_1"],
        model=str(row.get("generator_2", "")),
        against=str(row.get("generator_1", "")),
        recorded=outcome,
        flipped=orders[0] != orders[1] if len(orders) == 2 else None,
    )


def _fastchat_single(row: Row) -> Record:
    """FastChat's grading: score -1 is a judgment without a rating."""
    score = None if row["score"] == -1 else float(row["score"])
    return Record(
        id=str(row["question_id"]),
        turn=int(row["turn"]),
        **graded_fields(score),
        input=row.get("user_prompt"),
        raws=(row["judgment"] or "",),
        model=str(row["model"]),
    )


def _fastchat_pair(row: Row) -> Record:
    """FastChat's comparison: game 1 shows model_1 as A, game 2 as B; a win needs both, "error" is a
    game without a verdict.
    """
    games = (row["g1_winner"], row["g2_winner"])
    if not all(game in ("model_1", "model_2", "tie", "error") for game in games):
        raise ValueError(f"winners {games}")
    # a tie beside a game without a verdict says nothing about the pair
    none = "unparsed" if "error" in games else "tie"
    first = {"model_1": "A", "model_2": "B"}.get(games[0], none)
    second = {"model_1": "B", "model_2": "A"}.get(games[1], none)
    outcome = outcome_of((first, second))
    return Record(
        id=str(row["question_id"]),
        turn=int(row.get("turn", 1)),
        value=SCORE.get(outcome),
        outcome=outcome,
        verdicts=(first, second),
        input=row.get("g1_user_prompt"),
        raws=(row.get("g1_judgment") or "", row.get("g2_judgment") or ""),
        model=str(row["model_1"]),
        against=str(row["model_2"]),
        recorded=None if outcome == "unresolved" else outcome,
        flipped="error" not in games and games[0] != games[1],
    )


_NO_ANSWERS = "the answers are not in a file of judgments: import model_answer too"
_SHORT_ANSWERS = "the answers: the file holds their first 200 characters"
# what a file of answers beside the judgments makes good
WITHOUT_ANSWERS = (_NO_ANSWERS, _SHORT_ANSWERS)
JUDGMENT_FORMATS = {
    "original-alpaca-eval-csv": JudgmentFormat(
        _original_csv,
        size=805,
        flags=("one order, the model always first",),
        lacks=(
            "the second order was never judged",
            "the prompt of the judge is not in the file",
        ),
    ),
    "original-mt-bench-jsonl": JudgmentFormat(
        _original_mt_bench,
        pairs=False,
        size=80,
        flags=("each turn judged alone",),
        lacks=(
            _SHORT_ANSWERS,
            "reference answers and the second turn's context were never shown to the judge",
        ),
    ),
    "alpaca-eval-annotations": JudgmentFormat(
        _alpaca_eval,
        flags=("one order per pair",),
        lacks=("which answer stood first is not in the file, and each pair was judged once",),
    ),
    "fastchat-single": JudgmentFormat(_fastchat_single, pairs=False, size=80, lacks=(_NO_ANSWERS,)),
    "fastchat-pair": JudgmentFormat(_fastchat_pair, size=80, lacks=(_NO_ANSWERS,)),
}


def missing_turns(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Return question and turn of each turn that others have and this conversation lacks."""
    turns: dict[tuple[str, str, str], set[int]] = {}
    for record in records:
        turns.setdefault(record.conversation, set()).add(record.turn)
    every = sorted(set().union(*turns.values()))
    return [(item[2], turn) for item, seen in turns.items() for turn in every if turn not in seen]


def _swapped_pairs(records: Sequence[Record]) -> bool:
    """Whether every comparison occurs with its answers exchanged too."""
    pairs = {(one.id, one.answer, one.opponent) for one in records if one.answer != one.opponent}
    return bool(pairs) and all((item, second, first) in pairs for item, first, second in pairs)
