"""Reads annotations of alpaca_eval: one file is one model, judged by one annotator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from recipes_lib.analysis.readers.files import arm_name, parsed_json
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.evals.log import (
    REFERENCE,
    UNRESOLVED,
    AnswerFacts,
    EvalLog,
    JudgeFacts,
    Metric,
    Sample,
    text_hash,
)
from recipes_lib.evals.suites import metric_of

FORM = "alpaca_eval: its annotations.json"
SOURCE = "alpaca_eval"
_KEYS = {"instruction", "preference", "output_2"}
_OUTCOMES = {None: UNRESOLVED, 1.0: "win", 0.5: "tie", 0.0: "loss"}


class Annotation(BaseModel):
    """What alpaca_eval writes of one pair: preference 1 is the first output, 2 the second, 0 and
    1.5 a draw, anything between them a weighted verdict.
    """

    instruction: str
    preference: float | None
    output_1: str
    output_2: str
    generator_1: str | None = None
    generator_2: str = ""
    annotator: str = ""
    dataset: str | None = None

    @field_validator("preference")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        if value is not None and value != 0 and not 1 <= value <= 2:
            raise ValueError(f"{value:g} is not 0 or between 1 and 2")
        return value

    def sample(self) -> Sample:
        """Return the pair as one value: 1 where the model won, 0 where it lost."""
        value = None
        if self.preference == 0:
            value = 0.5
        elif self.preference is not None:
            value = self.preference - 1
        return Sample(
            id=text_hash(self.instruction)[:16],
            category=self.dataset or "all",
            value=value,
            outcome=_OUTCOMES.get(value, "scored"),
            input=self.instruction,
            answer=self.output_2,
            opponent=self.output_1,
        )


def matches(path: Path) -> bool:
    """Whether a file is a list of annotations, or a folder holds such a file by its name."""
    if path.is_dir():
        return bool(_annotation_files(path))
    if not path.is_file() or path.suffix != ".json":
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError):
        return False
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, Mapping) and first.keys() >= _KEYS


def read(path: Path) -> list[Run]:
    """Return the runs of annotations, one a file.

    Raises:
        DataError: a damaged annotation, two models or judges in one file, or none named; or several
            files of one model in a folder.
    """
    files = _annotation_files(path) if path.is_dir() else [path]
    runs = [_read_file(file, path) for file in files]
    if len({run.name for run in runs}) < len(runs):
        what = f"holds several annotations of one model: {', '.join(file.name for file in files)}"
        raise DataError(what, "name one of these files", file=path)
    return runs


def _annotation_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*annotations*.json"))


def _read_file(path: Path, given: Path) -> Run:
    """Return the run of one file; `given`, the file or its folder, tells it from its namesakes."""
    try:
        rows = TypeAdapter(list[Annotation]).validate_python(parsed_json(path))
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        number, *keys = details["loc"]
        what = f"annotation {int(number) + 1}: {'.'.join(map(str, keys))}: {details['msg']}"
        raise DataError(what, file=path) from None
    model = _only_value(rows, "generator_2", path)
    judge = _only_value(rows, "annotator", path)
    if not judge:
        what = "names no annotator, so nobody can know which judge decided"
        raise DataError(what, "add the name of its config to each row: annotator", file=path)
    samples = [row.sample() for row in rows]
    if len({sample.id for sample in samples}) < len(samples):
        raise DataError("holds an instruction twice", "keep one annotation of each", file=path)
    opponent = " and ".join(sorted({row.generator_1 or REFERENCE for row in rows}))
    log = EvalLog(
        suite=SOURCE,
        eval=SOURCE,
        file=path,
        target=model,
        against=opponent,
        n=len(samples),
        metrics=(_win_rate(samples, opponent, path),),
        answers=AnswerFacts(name=model, models=(model,)),
        judge=JudgeFacts(name=judge, fingerprint=judge, model=judge),
        notes=("each pair was judged once, in random order",),
        source=SOURCE,
    )
    return Run(
        name=arm_name(model, path.parent),
        folder=given,
        state={"kind": "answers"},
        evals=(log,),
        foreign=True,
    )


def _only_value(rows: Sequence[Annotation], key: str, path: Path) -> str:
    """Return what all rows say under a key."""
    values = {getattr(row, key) for row in rows}
    if len(values) > 1:
        what = f"has several values of {key}: {', '.join(sorted(values)[:3])}"
        raise DataError(what, "one file is one model and one judge", file=path)
    return str(min(values))


def _win_rate(samples: Sequence[Sample], opponent: str, path: Path) -> Metric:
    return metric_of(
        "win_rate",
        "AlpacaEval win rate",
        samples,
        opponent=opponent,
        eval=SOURCE,
        suite=SOURCE,
        file=path,
    )
