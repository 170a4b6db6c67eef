"""What readers of other programs' files share."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.evals.log import AnswerFacts, EvalLog, Metric, Sample, Unit
from recipes_lib.evals.suites import metric_of

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function or object, another one in every process


def parsed_json(path: Path, kind: type = object) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: it cannot be read, is not JSON, or is no list or dict where `kind` is that.
    """
    if not path.is_file():  # a pipe would be waited for
        raise DataError("is missing, or no file", file=path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"is not JSON: {error}", file=path) from None
    if not isinstance(content, kind):
        raise DataError(f"is damaged: no JSON {kind.__name__}", file=path)
    return content


def arm_name(model: str, folder: Path) -> str:
    """Return a model's name as the name of an arm: letters of any script, digits, dots, dashes."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.")
    return name or folder.name


def foreign_run(
    source: str,
    file: Path,
    model: str,
    metrics: Sequence[Metric],
    *,
    seed: int | None = None,
    unread: Sequence[str] = (),
    **facts: Any,
) -> Run:
    """Return the run of one model: without a training seed a model as it is.

    Args:
        source: the program that wrote the file; its evaluations and metrics are named after it.
        facts: of the `EvalLog`, how it asked.
    """
    placed = [replace(metric, eval=source, suite=source, file=file) for metric in metrics]
    log = EvalLog(
        suite=source,
        eval=source,
        file=file,
        target=model,
        n=sum(len(metric.samples) for metric in placed),
        metrics=tuple(placed),
        source=source,
        **{"answers": AnswerFacts(name=model, models=(model,))} | facts,
    )
    arm = arm_name(model, file.parent)
    run = Run(
        name=arm,
        folder=file,
        state={"kind": "answers"},
        evals=(log,),
        foreign=True,
        unread=tuple(unread),
    )
    if seed is None:
        return run
    return replace(run, name=f"{arm}-seed{seed}", state={}, arm=arm, seed=seed)


def scored_metric(
    name: str, samples: Sequence[Sample], higher_is_better: bool | None, **facts: Any
) -> Metric:
    """Return the metric of samples: a share where all values lie from 0 to 1, else a number."""
    values = [sample.value for sample in samples if sample.value is not None]
    unit: Unit = "share" if all(0 <= value <= 1 for value in values) else "number"
    scored = [
        sample if sample.value is None else replace(sample, outcome="scored") for sample in samples
    ]
    label = f"{facts.get('task', '')} {name}".strip()
    return metric_of(name, label, scored, unit, higher_is_better=higher_is_better, **facts)
