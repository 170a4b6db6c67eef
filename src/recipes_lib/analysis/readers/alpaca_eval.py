"""Reads annotations of alpaca_eval: one file is one model, judged by one annotator.

    MODEL/CONFIG/annotations.json   MODEL/CONFIG/leaderboard.csv

(alpaca_eval 0.6.6.) CONFIG is the annotator's; the leaderboard has the length-controlled win rate,
which comes from a model of all annotations: it is shown, and cannot be tested.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from recipes_lib.analysis.readers.files import foreign_run, parsed_json
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.evals.log import REFERENCE, UNRESOLVED, JudgeFacts, Metric, Sample, text_hash
from recipes_lib.evals.suites import metric_of

FORM = "alpaca_eval: its annotations.json"
SOURCE = "alpaca_eval"
ANNOTATOR = "annotator's config"
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
    return sorted(folder.glob("*annotations*.json")) or sorted(folder.glob("*/annotations.json"))


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
    run = foreign_run(
        SOURCE,
        path,
        model,
        list(_metrics(rows, samples, opponent, path)),
        against=opponent,
        judge=JudgeFacts(name=judge, fingerprint=judge, model=judge),
        recipe=_config(path, model),
        notes=("each pair was judged once, in random order",),
    )
    return replace(run, folder=given)


def _only_value(rows: Sequence[Annotation], key: str, path: Path) -> str:
    """Return what all rows say under a key."""
    values = {getattr(row, key) for row in rows}
    if len(values) > 1:
        what = f"has several values of {key}: {', '.join(sorted(values)[:3])}"
        raise DataError(what, "one file is one model and one judge", file=path)
    return str(min(values))


def _config(path: Path, model: str) -> dict[str, str]:
    """Return which configuration the annotator had: by its file, or by the folder of its name."""
    file = path.with_name("configs.yaml")
    if file.is_file():
        return {ANNOTATOR: text_hash(file.read_text(encoding="utf-8"))[:12]}
    if path.resolve().parent.parent.name == model:
        return {ANNOTATOR: path.resolve().parent.name}
    return {}


def _metrics(
    rows: Sequence[Annotation], samples: Sequence[Sample], opponent: str, path: Path
) -> Iterator[Metric]:
    percent = None
    asked = 0
    leaderboard = path.with_name("leaderboard.csv")
    if leaderboard.is_file():
        with leaderboard.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row.get("") == rows[0].generator_2:  # the first column has no name
                    percent = row.get("length_controlled_winrate")
                    # it counts the annotations that have a verdict
                    num_open = sum(sample.value is None for sample in samples)
                    asked = int(float(row.get("n_total") or 0)) + num_open
    yield metric_of("win_rate", "AlpacaEval win rate", samples, opponent=opponent, asked=asked)
    if percent:
        label = "AlpacaEval length-controlled win rate"
        value = float(percent) / 100
        name = "length_controlled_winrate"
        yield Metric(name, label, value=value, n=len(rows), opponent=opponent)
