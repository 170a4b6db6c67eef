"""The scores of a log of Inspect AI as metrics: one for each scorer, or part of its values."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from recipes_lib.analysis.readers.files import scored_metric
from recipes_lib.evals.log import Metric, Sample

# inspect_ai/scorer/_metric.py: value_to_float
_WORDS = {"c": 1.0, "p": 0.5, "i": 0.0, "n": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_MEANS = ("accuracy", "mean")  # which are one number: the mean over epochs, then over questions
_Key = tuple[str, int]  # a sample's id and its epoch


def metrics_of(
    content: Mapping[str, Any], rows: Mapping[_Key, Mapping[str, Any]]
) -> Iterator[Metric]:
    """Yield the metrics of a log. One whose samples do not have the mean that Inspect reports, as
    of a scorer with conversions of its own, has its total alone and is never tested.

    Args:
        content: the log.
        rows: all samples that were to be asked, empty where they are missing.
    """
    task = content["eval"]["task"]
    version = str(content["eval"].get("task_version", 0))
    for name, values in _values(rows).items():
        reported = _reported(content, name)
        numbers: dict[str, list[float]] = defaultdict(list)  # by question
        samples = []
        for (id, epoch), row in rows.items():
            text = row.get("input")
            if isinstance(text, list):
                text = "\n".join(str(message.get("content")) for message in text)
            number = _number(values.get((id, epoch)))
            answer = (row.get("output") or {}).get("completion")
            samples.append(Sample(id=id, turn=epoch, value=number, input=text, answer=answer))
            if number is not None:
                numbers[id].append(number)
        # the direction is known of right and wrong alone
        is_right = "accuracy" in reported or {*map(str, values.values())} <= {*"CPIN"}
        metric = scored_metric(
            name, samples, True if is_right else None, task=task, version=version
        )
        stated = [reported[key]["value"] for key in _MEANS if key in reported]
        mean = fmean(map(fmean, numbers.values())) if numbers else 0.0
        if stated and abs(mean - stated[0]) > 1e-6:
            yield Metric(name, metric.label, task=task, value=stated[0], n=metric.n)
        else:
            yield metric


def not_read(content: Mapping[str, Any]) -> list[str]:
    """Return what a log reports beside means and their spread."""
    lines = []
    for result in (content.get("results") or {}).get("scores") or ():
        reducer = result.get("reducer")
        if reducer not in (None, "mean"):
            lines.append(f"{result['name']} of the epochs' {reducer} is not read")
            continue
        for metric in result["metrics"]:
            if metric not in (*_MEANS, "stderr", "bootstrap_stderr", "std", "var"):
                lines.append(f"{metric} of {result['name']} is not read")
    return lines


def _values(rows: Mapping[_Key, Mapping[str, Any]]) -> dict[str, dict[_Key, Any]]:
    """Return the scores by scorer, or by scorer and part where a score has several."""
    values: dict[str, dict[_Key, Any]] = defaultdict(dict)
    for key, row in rows.items():
        for scorer, score in (row.get("scores") or {}).items():
            if isinstance(score["value"], dict):
                for part, value in score["value"].items():
                    values[f"{scorer}/{part}"][key] = value
            else:
                values[scorer][key] = score["value"]
    return values


def _reported(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what Inspect reports of a scorer or a part: each metric with its value."""
    for result in (content.get("results") or {}).get("scores") or ():
        names = (result["name"], f"{result.get('scorer')}/{result['name']}")
        if name in names and result.get("reducer") in (None, "mean"):
            return dict(result["metrics"])
    return {}


def _number(value: Any) -> float | None:
    """Return a score as Inspect's `value_to_float` does; None of what has no finite cube."""
    if isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) <= 1e100 else None
