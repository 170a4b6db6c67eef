"""The evaluation log: what an evaluation of one target says about who answered, who judged and
every sample.

Suites and the readers of other programs' files make logs; comparison, validity checks, reports and
replay read nothing else. How a log lies on disk is known to `eval_files` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from recipes_lib.core.json_files import Row
from recipes_lib.data.leaks import Leak, Leaks

if TYPE_CHECKING:
    from recipes_lib.statistics.intervals import StoredBounds, StoredInterval

ORDERS = ("AB", "BA")
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}

_FORMAT_VERSION = 1
# the opponent of a result that was judged against the questions' own reference answers
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer with what the judge, or the task's metric, made of it.

    Samples of one `id` (its turns, and its draws: several answers to one question) are not
    independent. `human` is the value that people gave it, where they were asked. `value` is 1, 0.5
    or 0 for a pair, a grade, or a task's score; None where there is no verdict, and `outcome` is
    "unresolved" then. `verdicts` are what was said in order AB and BA (a grade alone in grading),
    or the status of the missing verdict; `raws` are the texts behind them. `lengths` are
    characters: the answer, then its opponent's. Texts are None where the files do not hold them;
    `shortened` says that they hold only the beginning of the answer. `same_as` is the id of the
    first sample with the same text, where no `input` tells it.
    """

    id: str
    turn: int = field(default=1, metadata={"minimum": 1})
    category: str = "all"
    value: float | None = None
    outcome: str = "unresolved"
    verdicts: tuple[str, ...] = ()
    by_rule: bool = False
    lengths: tuple[int, ...] = ()
    input: str | None = field(default=None, repr=False)
    answer: str | None = field(default=None, repr=False)
    opponent: str | None = field(default=None, repr=False)
    raws: tuple[str | None, ...] = field(default=(), repr=False)
    shortened: bool = False
    same_as: str = ""
    draw: int = field(default=1, metadata={"minimum": 1})
    human: float | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Its question and turn."""
        return self.id, self.turn

    @property
    def key(self) -> tuple[str, int, int]:
        """What pairs this sample with the same one of another target."""
        return *self.place, self.draw

    @property
    def resolved(self) -> bool:
        """Whether there is an outcome."""
        return self.outcome != "unresolved"

    @property
    def flip(self) -> bool:
        """Whether the judge named the same place in both orders, so that its verdict turned with
        the order.
        """
        return not self.by_rule and self.verdicts in (("A", "A"), ("B", "B"))

    def to_dict(self, metric: str, task: str = "") -> dict[str, object]:
        """Return the sample of a metric as a line of items.jsonl; `from_dict` reads it."""
        texts = {"instruction": self.input, "answer": self.answer, "opponent_answer": self.opponent}
        return {
            "metric": metric,
            **({"task": task} if task else {}),
            "value": self.value,
            "outcome": self.outcome,
            "question_id": self.id,
            "turn": self.turn,
            "category": self.category,
            "verdicts": list(self.verdicts),
            "raws": list(self.raws),
            "lengths": list(self.lengths),
            **{name: text for name, text in texts.items() if text is not None},
            **{name: True for name in ("by_rule", "shortened") if getattr(self, name)},
            **({"same_as": self.same_as} if self.same_as else {}),
            **({"draw": self.draw} if self.draw > 1 else {}),
            **({} if self.human is None else {"human": self.human}),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        """Return a line of items.jsonl as a sample.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            id=str(row["question_id"]),
            turn=int(row.get("turn") or 1),
            category=row.get("category") or "all",
            value=None if row.get("value") is None else float(row["value"]),
            outcome=row["outcome"],
            verdicts=tuple(row.get("verdicts") or ()),
            by_rule=bool(row.get("by_rule")),
            lengths=tuple(row.get("lengths") or ()),
            input=row.get("instruction"),
            answer=row.get("answer"),
            opponent=row.get("opponent_answer"),
            raws=tuple(row.get("raws") or ()),
            shortened=bool(row.get("shortened")),
            same_as=str(row.get("same_as") or ""),
            draw=int(row.get("draw") or 1),
            human=None if row.get("human") is None else float(row["human"]),
        )


@dataclass(frozen=True)
class Measure:
    """One metric of one evaluation: all its samples, or the reported value alone where there are
    none.

    `parts` are the tasks and groups below a group of lm-eval, whose samples are those of its tasks.
    """

    eval: str
    suite: str
    metric: str
    label: str
    samples: tuple[Sample, ...] = field(repr=False)
    file: Path
    opponent: str | None = None
    task: str = ""
    higher_is_better: bool | None = (
        True  # None where the files do not say it: nothing is ranked then
    )
    unit: str = "share"  # "share" (0..1), "grade" (1..5, or the scale in the label) or "number"
    reported: float | None = None
    reported_n: int | None = None
    # the metric of this evaluation that is compared in its place where two arms share that one
    instead_of: str = ""
    parts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return what result.json says about the metric, whose samples stand in items.jsonl; what
        has its usual value is left out.
        """
        known = {
            name: getattr(self, name)
            for name in ("opponent", "task", "reported", "reported_n", "instead_of")
            if getattr(self, name) not in (None, "")
        }
        known |= {"parts": list(self.parts)} if self.parts else {}
        direction = {} if self.higher_is_better else {"higher_is_better": self.higher_is_better}
        return {"metric": self.metric, "label": self.label, "unit": self.unit} | known | direction

    @property
    def key(self) -> tuple[str, str, str]:
        """What the same metric of another arm has too; the opponent is left out because it may be
        the other arm.
        """
        return self.eval, self.task, self.metric

    @property
    def name(self) -> str:
        """The key as one word, as findings name metrics: `alpaca_eval/win_rate`,
        `lm_eval/arc_easy/acc_norm`.
        """
        return "/".join(part for part in self.key if part)


@dataclass(frozen=True, kw_only=True)
class Identical:
    """How many questions got the most frequent answer, where that is more than one."""

    count: int = 0
    share: float = 0.0
    text: str | None = None
    flagged: bool = False


@dataclass(frozen=True, kw_only=True)
class AnswerFaults:
    """What is wrong with answers taken together; `cut` is None where a file does not tell, `loops`
    in results of earlier releases.
    """

    n: int = 0
    empty: int = 0
    cut: int | None = None
    identical: Identical = field(default_factory=Identical)
    loops: int | None = None

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        cut: int | None,
        max_identical_fraction: float = 0.1,
        questions: Sequence[str] | None = None,
    ) -> AnswerFaults:
        """Return what is wrong with answers; two alike are not flagged, however few the questions
        are.

        Args:
            cut: how many were cut.
            questions: what each answers; None where each answers another one. Answers that are
                alike to one question alone are not one answer for many.
        """
        given = [text.strip() for text in texts]
        asked: dict[str, set[object]] = {}
        for text, question in zip(given, questions or range(len(given)), strict=True):
            asked.setdefault(text, set()).add(question)
        counts = Counter(given)
        often = Counter({text: counts[text] for text, mine in asked.items() if len(mine) > 1})
        text, most = often.most_common(1)[0] if often else ("", 0)
        identical = Identical()
        if most > 1:
            share = most / len(texts)
            flagged = share > max_identical_fraction and most > 2
            identical = Identical(count=most, share=share, text=text[:200], flagged=flagged)
        loops = sum(map(ends_in_loop, texts))
        return cls(n=len(texts), empty=counts[""], cut=cut, identical=identical, loops=loops)


def ends_in_loop(answer: str) -> bool:
    """Whether an answer ends in a phrase of two words or more that stands there three times; its
    last word may be cut.

    Source: Holtzman et al. (2020), "The Curious Case of Neural Text Degeneration", whose repetition
        is the same.

    Example:
        >>> ends_in_loop("I think so. I think so. I think so. I th"), ends_in_loop("no, no, no")
        (True, False)
    """
    words = answer.split()
    for end in (words, words[:-1]):
        for size in range(2, len(end) // 3 + 1):
            if end[-1] != end[-1 - size]:  # most places need no copy
                continue
            if end[-size:] == end[-2 * size : -size] == end[-3 * size : -2 * size]:
                return True
    return False


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the last command answered anew. `batch_tokens` are the padded tokens of its batches;
    None where a server made them.
    """

    new_tokens: int = 0
    seconds: float = 0.0
    batch_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerFacts:
    """Who answered and how. `models` are the names of the weights behind the answers,
    `fingerprint` their hash; `tokens` are those of all answers, also of earlier commands.
    """

    name: str | None = None
    models: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    prompt_format: str | None = None
    prompt_format_hash: str | None = None
    decoding: dict[str, Any] | None = None
    dtype: str | None = None
    quantized: bool | None = None
    imported_from: str | None = None
    answers: AnswerFaults | None = None
    generated_now: Speed | None = None
    tokens: int | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, Any] | None) -> AnswerFacts | None:
        """Return what result.json says about answers."""
        if row is None:
            return None
        known = _known(cls, row)
        if faults := row.get("answers"):
            identical = Identical(**_known(Identical, faults.get("identical") or {}))
            known["answers"] = AnswerFaults(
                **_known(AnswerFaults, faults) | {"identical": identical}
            )
        if speed := row.get("generated_now"):
            known["generated_now"] = Speed(**_known(Speed, speed))
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class JudgeFacts:
    """Who judged. `weak` is why its numbers mean little; `weights` the hash of its weights where
    they were here, `run` ours that it was merged from.
    """

    name: str | None = None
    fingerprint: str | None = None
    model: str | None = None
    revision: str | None = None
    engine: str | None = None
    mode: str | None = None
    prompt_style: str | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    max_context_tokens: int | None = None
    weak: str | None = None
    weights: str | None = None
    run: str | None = None


class Check(TypedDict):
    """One check of a judge's audit; `result` is pass, fail or not measured."""

    check: str
    value: float | None
    needs: str
    result: str


class ProbeResult(TypedDict):
    """What a judge said about one kind of probe; `split` is of identical pairs."""

    verdicts: int
    not_ok: int
    share: StoredInterval
    split: NotRequired[StoredInterval]


class StoredContradictions(TypedDict):
    """How often verdicts and the judge's own words disagree.

    `for_first` are those whose verdict favours Response A against the words; `direction` puts it in
    words.
    """

    n: int
    decidable: int
    count: int
    for_first: int
    rate: float | None
    interval: StoredInterval
    direction: str | None


class Agreement(TypedDict):
    """How far a judge agrees with people's labels."""

    n: int
    unresolved: int
    outcome_accuracy: StoredInterval
    outcome_accuracy_bounds: StoredBounds
    kappa: StoredInterval
    verdict_accuracy: StoredInterval
    above_chance: bool | None


class LabelledPairs(TypedDict):
    """The pairs with human labels that a judge was audited on: `pairs` of all that the files
    have.
    """

    files: list[str]
    pairs: int
    of: int
    subset: str | None


class OtherMode(TypedDict):
    """How often a judge says the same in its other verdict mode."""

    other: str
    asked: int
    agreement: StoredInterval


class Scorecard(TypedDict, total=False):
    """A judge's scorecard as `judging.audit` makes it (schema/judge_audit.schema.json); a result
    that was imported, or is of an earlier release, may lack a key. `labels` to `modes` are of an
    audit on labelled pairs.
    """

    judge: str | None
    judgments: int
    asked: int
    by_rule: int
    statuses: dict[str, int]
    unparsed: StoredInterval
    reasked: int
    marker_in_answer: int
    cut: int
    mean_mass: float | None
    swap_consistency: StoredInterval
    first_position: StoredInterval
    length: dict[str, StoredInterval]
    contradictions: StoredContradictions
    probes: dict[str, ProbeResult]
    probes_from: str
    human: Agreement | None
    checks: list[Check]
    banner: str | None
    labels: LabelledPairs
    judge_facts: Mapping[str, Any]
    folder: str
    modes: OtherMode | None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task of lm-eval, or of a group: `parts` are all that is below it."""

    task: str
    metric: str
    filter: str = "none"
    value: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    n: int | None = None
    num_fewshot: int | None = None
    version: Any = None
    higher_is_better: bool | None = None
    parts: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> TaskScore:
        """Return a row of the table in result.json."""
        return cls(**_known(cls, row))

    def to_dict(self) -> Row:
        """Return the row for result.json; a task has no parts."""
        return {key: value for key, value in asdict(self).items() if key != "parts" or value}

    @property
    def shown(self) -> str:
        """The metric, with its filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


@dataclass(frozen=True, kw_only=True)
class ImportedFile:
    """A file of another program that an evaluation was made of."""

    file: str
    sha256: str
    format: str


@dataclass(frozen=True, kw_only=True)
class EvalLog:
    """One evaluation of one target.

    `against` is None for a suite without an opponent. `numbers` are the suite's own; `tasks` and
    `protocol` are lm-eval's. `leaks` is what the target's training rows hold of the questions, None
    where it has none or nobody looked. `banners` must be read before the numbers, heaviest first.
    `replays` are what `recipes judge replay` says about imported files of judgments, `lacks` what
    they do not hold, `flags` how they were judged. `key` is the hash of everything that the result
    depends on (`eval_key.result_key`). `file` is result.json.
    """

    suite: str
    eval: str
    target: str = ""
    against: str | None = None
    n: int | None = None
    subset: str | None = None
    banners: list[str] = field(default_factory=list)
    answers: AnswerFacts = field(default_factory=AnswerFacts)
    opponent: AnswerFacts | None = None
    judge: JudgeFacts | None = None
    audit: Scorecard | None = None
    missing_references: list[str] = field(default_factory=list)
    numbers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tasks: tuple[TaskScore, ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    lm_eval_command: str | None = None
    measures: tuple[Measure, ...] = ()
    imported: tuple[ImportedFile, ...] = ()
    leaks: Leaks | None = None
    flags: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    replays: list[dict[str, Any]] = field(default_factory=list)
    recipe: Mapping[str, Any] = field(default_factory=dict, repr=False)
    key: str = ""
    written: str | None = None
    command: str | None = None
    git: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, Any] = field(default_factory=dict, repr=False)
    file: Path

    @property
    def place(self) -> str:
        """The result file inside the runs folder: <run>/evals/<eval>/result.json."""
        return "/".join(self.file.parts[-4:])

    @property
    def is_imported(self) -> bool:
        """Whether the log was made of another program's files."""
        return bool(self.imported)

    def to_dict(self) -> dict[str, object]:
        """Return result.json: of a suite without a judge, no judge; the suite's numbers among the
        other keys.
        """
        mine = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.judge is None:
            for name in ("n", "opponent", "judge", "audit", "missing_references"):
                del mine[name]
        for name in ("file", "numbers", "imported", "flags", "lacks", "replays"):
            mine.pop(name)
        if self.suite != "lm_eval":
            for name in ("tasks", "protocol", "lm_eval_command"):
                del mine[name]
        mine["answers"] = _without_unknown(self.answers)
        if self.opponent is not None:
            mine["opponent"] = _without_unknown(self.opponent)
        if self.judge is not None:
            mine["judge"] = asdict(self.judge)
        mine["leaks"] = asdict(self.leaks) if self.leaks else None
        if self.tasks:
            mine["tasks"] = [task.to_dict() for task in self.tasks]
        mine["measures"] = [measure.to_dict() for measure in self.measures]
        return {"format_version": _FORMAT_VERSION, **mine, **self.numbers}

    @classmethod
    def from_dict(
        cls, row: Mapping[str, Any], eval: str, file: Path, measures: Sequence[Measure] = ()
    ) -> EvalLog:
        """Return the log of a result file, also of an earlier release, with its measures."""
        known = _known(cls, row)
        known |= {
            "eval": eval,
            "answers": AnswerFacts.from_dict(row.get("answers")) or AnswerFacts(),
            "opponent": AnswerFacts.from_dict(row.get("opponent")),
            "judge": JudgeFacts(**_known(JudgeFacts, row["judge"])) if row.get("judge") else None,
            "tasks": tuple(map(TaskScore.from_dict, row.get("tasks") or ())),
            "leaks": _leaks(row.get("leaks")),
            "imported": tuple(
                ImportedFile(**_known(ImportedFile, one)) for one in row.get("imported") or ()
            ),
            "numbers": {name: value for name, value in row.items() if name not in known},
            "measures": tuple(measures),
            "file": file,
        }
        return cls(**known)


def _known(cls: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields; null where a list or mapping belongs is left out."""
    return {
        one.name: row[one.name]
        for one in fields(cls)
        if one.name in row and (row[one.name] is not None or one.default is None)
    }


def _leaks(row: Mapping[str, Any] | None) -> Leaks | None:
    """What result.json says about leaked questions."""
    if row is None:
        return None
    found = [Leak(**_known(Leak, one)) for one in row.get("found") or ()]
    return Leaks(**_known(Leaks, row) | {"found": found})


def _without_unknown(answers: AnswerFacts) -> dict[str, object]:
    optional = ("decoding", "dtype", "quantized", "imported_from", "tokens")
    return {
        name: value
        for name, value in asdict(answers).items()
        if value is not None or name not in optional
    }


def no_reference(missing: Sequence[str]) -> list[str]:
    """Return the line about questions that should be graded against a reference and have none."""
    if not missing:
        return []
    return [
        f"{len(missing)} questions need a reference answer and have none, so they are graded"
        f" without: {', '.join(missing[:8])}"
    ]
