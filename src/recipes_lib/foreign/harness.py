"""lm_eval's own files as an evaluation of ours: the table of its results JSON, and its samples
where they were kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from recipes_lib.core.json_files import Row
from recipes_lib.foreign.files import Foreign
from recipes_lib.foreign.parts import Part
from recipes_lib.suites.harness import metric_direction

_PROTOCOL = (
    "num_fewshot",
    "limit",
    "batch_size",
    "apply_chat_template",
    "system_instruction",
    "fewshot_as_multiturn",
    "gen_kwargs",
)
_CHANCE = 1e-6


def read_results(file: Foreign, samples: Sequence[Foreign]) -> Part:
    """Return the evaluation of one results file with the samples beside it.

    Raises:
        DataError: a number in the file is none, or samples do not add up to the results.
    """
    found = file.rows[0][1]
    by_task = {sample.task: [row for _, row in sample.rows] for sample in samples}
    tasks = [
        row
        for task, metrics in found["results"].items()
        for row in _task_rows(file, found, task, metrics)
    ]
    if not tasks:
        raise file.error("holds no result", "a task needs keys like 'acc,none'")
    for sample in samples:
        _check_samples(sample, [row for row in tasks if row["task"] == sample.task])
    config: Row = found.get("config") or {}
    limit = config.get("limit")
    counted = [row for row in tasks if row["n"] is not None]
    lacks = []
    if len(counted) < len(tasks):
        lacks.append(
            "the number of items behind the results is not in the file, so they have no interval of"
            " ours"
        )
    bare = dict.fromkeys(row["task"] for row in tasks if row["task"] not in by_task)
    if bare:
        lacks.append(
            f"{len(bare)} tasks and groups have no samples: their numbers can be shown, and tested"
            " against nothing"
        )
    facts = {
        "tasks": tasks,
        "subset": f"subset, limit={limit:g} per task" if isinstance(limit, int | float) else None,
        "protocol": (
            {name: config.get(name) for name in _PROTOCOL}
            | {"model_args": config.get("model_args"), "model": config.get("model")}
        ),
        "samples": {
            task: [json.dumps(row, ensure_ascii=False) for row in rows]
            for task, rows in by_task.items()
        },
    }
    models = tuple(str(found[key]) for key in ("model_name", "model_source") if found.get(key))[:1]
    return Part("lm_eval", file, models=models, lacks=tuple(lacks), facts=facts)


def _task_rows(file: Foreign, found: Row, task: str, metrics: Row) -> list[Row]:
    """One row per metric and filter of a task or a group."""
    rows = []
    for name, value in metrics.items():
        metric, _, chosen = name.partition(",")
        if not chosen or metric.endswith("_stderr") or isinstance(value, str):
            continue
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise file.error(f"{task}: {name} is {value!r}, which is no finite number")
        error = metrics.get(f"{metric}_stderr,{chosen}")
        error = error if isinstance(error, int | float) and math.isfinite(error) else None
        limits = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
        configs, sizes = found.get("configs") or {}, (found.get("n-samples") or {}).get(task) or {}
        rows.append(
            {
                "task": task,
                "metric": metric,
                "filter": chosen,
                "value": value,
                "stderr": error,
                "low": limits[0],
                "high": limits[1],
                "interval": None if error is None else "1.96 standard errors of lm_eval",
                "n": sizes.get("effective"),
                "num_fewshot": (
                    (found.get("n-shot") or {}).get(
                        task, (configs.get(task) or {}).get("num_fewshot")
                    )
                ),
                "version": (found.get("versions") or {}).get(task),
                "higher_is_better": metric_direction(found, task, metric),
            }
        )
    return rows


def _check_samples(sample: Foreign, rows: Sequence[Row]) -> None:
    """Compare samples with the results they are said to be behind.

    Raises:
        DataError: there is no such task, or numbers differ.
    """
    if not rows:
        raise sample.error(
            f"samples of task '{sample.task}', which the results do not have",
            "name the results file of the same evaluation",
        )
    for row in rows:
        scores = [
            float(line[row["metric"]])
            for _, line in sample.rows
            if line.get("filter", "none") == row["filter"]
            and isinstance(line.get(row["metric"]), int | float | bool)
        ]
        if row["n"] is not None and scores and len(scores) != row["n"]:
            raise sample.error(
                f"{len(scores)} samples, and the results say {row['n']}",
                "are they of the same evaluation?",
            )
        whole = bool(scores) and all(score in (0.0, 1.0) for score in scores)
        if whole and abs(sum(scores) / len(scores) - row["value"]) > _CHANCE:
            mean = sum(scores) / len(scores)
            what = f"its mean {row['metric']} is {mean:.4f}, and the results say {row['value']:.4f}"
            raise sample.error(what, "are they of the same evaluation?")


def samples_alone(samples: Sequence[Foreign]) -> Any:
    """Return the error for samples without a results file."""
    return samples[0].error(
        "samples without lm_eval's results JSON", "name results_*.json beside them"
    )
