"""Reads a plain table of scores, one row for one score of one question.

`arm` is the model or the recipe (without it the file's name), `seed` the training seed of an arm
that was trained several times, `metric` what was measured, `text` the question itself (ids of one
text are one question), and `higher_is_better` is false of losses and error rates.
"""

import difflib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from recipes_lib.analysis.readers.files import arm_name, foreign_run, scored_metric
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import shown_path
from recipes_lib.data.errors import BadRow, BadRows
from recipes_lib.data.readers import read_file
from recipes_lib.evals.log import Sample

FORM = (
    "a table (.csv, .tsv, .jsonl, .parquet) with the columns question, score and, as needed, arm,"
    " seed, metric, text, higher_is_better"
)
SOURCE = "table"
ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class Cells(BaseModel):
    """The cells of a row that are not empty; a question without a score is open."""

    model_config = ConfigDict(coerce_numbers_to_str=True, str_strip_whitespace=True)
    question: str
    score: float | None = Field(default=None, allow_inf_nan=False, ge=-1e100, le=1e100)
    arm: str = ""
    seed: int | None = None
    metric: str = "score"
    text: str | None = None
    higher_is_better: bool = True

    @field_validator("score", mode="before")
    @classmethod
    def _as_number(cls, score: object) -> object:
        words = {"true": 1.0, "false": 0.0, "nan": None}
        return words.get(str(score).strip().lower(), score)


def matches(path: Path) -> bool:
    """Whether a file has the ending of a table."""
    return path.is_file() and path.suffix.lower() in ENDINGS


def read(path: Path) -> list[Run]:
    """Return a run for each arm of a table, of an arm with seeds one for each of them.

    Raises:
        DataError: names the columns that are missing, or every row that cannot be used.
    """
    bad = BadRows()
    rows = read_file(path, bad)
    if rows or not bad:
        _check_header(list(dict.fromkeys(name for row in rows for name in row.fields)), path)
    runs: dict[tuple[str, int | None], dict[tuple[str, str], Cells]] = defaultdict(dict)
    directions: dict[str, bool] = {}  # of each metric
    as_written: dict[str, str] = {}  # of the name of each arm
    are_seeded: dict[str, bool] = {}  # of each arm
    for row in rows:
        given = {name: cell for name, cell in row.fields.items() if str(cell).strip()}
        try:
            cells = Cells.model_validate(given)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                column = str(details["loc"][0])
                bad.add(row, BadRow(f"{column} {given.get(column, '')!r}: {details['msg']}"))
            continue
        arm = arm_name(cells.arm or path.stem, path)
        written = as_written.setdefault(arm, cells.arm)
        scores = runs[arm, cells.seed]
        is_seeded = cells.seed is not None
        if (cells.metric, cells.question) in scores:
            what = f"a second {cells.metric} of {arm} for question {cells.question!r}"
            bad.add(row, BadRow(what, "give repeated answers ids of their own, and one text"))
        elif written != cells.arm:
            bad.add(row, BadRow(f"arm {cells.arm!r} would be {arm}, as {written!r} is"))
        elif directions.setdefault(cells.metric, cells.higher_is_better) != cells.higher_is_better:
            bad.add(row, BadRow(f"higher_is_better of {cells.metric} is not that of earlier rows"))
        elif are_seeded.setdefault(arm, is_seeded) != is_seeded:
            bad.add(row, BadRow(f"give a seed to each row of {arm}, or to none"))
        scores[cells.metric, cells.question] = cells
    if bad:
        raise bad.error()
    return [_run(arm, seed, list(scores.values()), path) for (arm, seed), scores in runs.items()]


def _check_header(columns: Sequence[str], path: Path) -> None:
    """Refuse a table without question or score, or with a column that is nearly one of ours."""
    if not columns:
        raise DataError("it has no rows", FORM, file=shown_path(path))
    missing = [f"no column {name}" for name in ("question", "score") if name not in columns]
    hints = []
    for column in columns:
        near = difflib.get_close_matches(column.strip().lower(), Cells.model_fields, 1, cutoff=0.8)
        if near and near[0] not in columns:
            hints.append(f"did you mean {near[0]}?")
    if missing or hints:
        found = ", ".join(map(repr, columns))
        what = ", ".join([*missing, f"the columns are {found}"])
        raise DataError(what, *hints, FORM, file=shown_path(path))


def _run(arm: str, seed: int | None, rows: Sequence[Cells], path: Path) -> Run:
    """Return one training of an arm, or without a seed a model as it is."""
    samples: dict[tuple[str, bool], list[Sample]] = defaultdict(list)
    for row in rows:
        sample = Sample(id=row.question, value=row.score, input=row.text)
        samples[row.metric, row.higher_is_better].append(sample)
    metrics = [scored_metric(name, scored, higher) for (name, higher), scored in samples.items()]
    return foreign_run(SOURCE, path, arm, metrics, seed=seed)
