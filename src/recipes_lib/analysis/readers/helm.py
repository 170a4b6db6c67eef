"""Reads runs of HELM: a folder with per_instance_stats.json, or the suite's folder of such folders.

    SUITE/SCENARIO:ARGUMENTS,model=MODEL/per_instance_stats.json, stats.json, run_spec.json

(crfm-helm 0.5.) Each model is an arm. Instances that were perturbed are not read, nor the counts
and times that HELM keeps beside its metrics. Trials of an instance are answers to one question.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.analysis.readers.files import foreign_run, parsed_json, scored_metric
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import object_or_none
from recipes_lib.evals.log import NOT_RECORDED, Metric, Sample

FORM = "HELM: a run's folder, or the folder of a suite's runs"
SOURCE = "helm"
_STATS = "per_instance_stats.json"
_FILES = (_STATS, "run_spec.json")  # a folder that has one lacks the other by accident
# The files do not say which values are good; of these it is known.
_RIGHT = re.compile(r"match|f1|rouge|bleu|acc|correct|pass|iou|ndcg", re.IGNORECASE)
_BOOKKEEPING = re.compile(
    r"num_|training_|inference_|finish_reason|batch_size|prompt_truncated|max_prob|logprob"
)
_GENERATION = ("temperature", "max_tokens", "stop_sequences", "num_outputs")
_NO_ASKING = {"model", "model_deployment", "max_train_instances", "max_eval_instances"}


def matches(path: Path) -> bool:
    """Whether a folder is a run of HELM, or holds some."""
    return path.is_dir() and bool(_run_folders(path))


def read(path: Path) -> list[Run]:
    """Return a run for each model of a folder.

    Raises:
        DataError: a file is damaged or gone.
    """
    by_model: dict[str, dict[Path, Mapping[str, Any]]] = defaultdict(dict)
    for folder in _run_folders(path):
        specification = object_or_none(folder / "run_spec.json") or {}
        model = (specification.get("adapter_spec") or {}).get("model")
        if not model:
            raise DataError("does not name the model", "copy it too", file=folder / "run_spec.json")
        by_model[model][folder] = specification
    return [_run(model, path, folders) for model, folders in by_model.items()]


def _run_folders(path: Path) -> list[Path]:
    folders = {file.parent for name in _FILES for file in path.glob(name)}
    return sorted(folders | {file.parent for name in _FILES for file in path.glob(f"*/{name}")})


def _run(model: str, path: Path, folders: Mapping[Path, Mapping[str, Any]]) -> Run:
    metrics: list[Metric] = []
    settings: dict[str, Any] = {"chat template": NOT_RECORDED}
    parts = []  # of the instances
    hosts = set()
    for folder, specification in folders.items():
        adapter = specification["adapter_spec"]
        name = str(specification.get("name") or folder.name)
        task = re.sub(r",?\bmodel=[^,]*", "", name).rstrip(":,")
        of_run = _metrics(folder, task, adapter.get("max_train_instances"))
        metrics += of_run
        settings[f"{task}: gen_kwargs"] = str([adapter.get(key) for key in _GENERATION])
        settings[f"{task}: system instruction"] = adapter.get("instructions") or "none"
        for key in adapter.keys() - {*_NO_ASKING, *_GENERATION, "instructions"}:
            settings[f"{task}: {key}"] = str(adapter[key])
        most = adapter.get("max_eval_instances")
        if of_run and most and max(metric.n for metric in of_run) >= most:
            parts.append(f"{most} instances of {task}")
        hosts.add(str(adapter.get("model_deployment") or NOT_RECORDED).partition("/")[0])
    return foreign_run(
        SOURCE,
        path,
        model,
        metrics,
        recipe=settings,
        subset=", ".join(parts) or None,
        libraries={"backend": " and ".join(sorted(hosts)), "tokenizer": NOT_RECORDED},
    )


def _metrics(folder: Path, task: str, num_fewshot: int | None) -> list[Metric]:
    asked = 0
    means = folder / "stats.json"  # it counts the instances of each split
    for statistic in parsed_json(means, list) if means.exists() else ():
        name = statistic["name"]
        if name["name"] == "num_instances" and not name.get("perturbation"):
            asked += round(statistic.get("mean", 0))
    samples: dict[str, list[Sample]] = defaultdict(list)
    instances = parsed_json(folder / _STATS, list)
    if not instances:
        raise DataError("holds no instances", "evaluate again", file=folder / _STATS)
    for instance in instances:
        if instance.get("perturbation"):
            continue
        id = instance["instance_id"]
        trial = instance["train_trial_index"]
        for statistic in instance["stats"]:
            name = statistic["name"]["name"]
            if "mean" in statistic and not _BOOKKEEPING.match(name):
                mean = float(statistic["mean"])
                # a sum of squares of more overflows; NaN is not below it either
                value = mean if abs(mean) <= 1e100 else None
                samples[name].append(Sample(id, turn=trial + 1, value=value))
    metrics = []
    for name, of_metric in samples.items():
        higher = True if _RIGHT.search(name) else None
        metric = scored_metric(name, of_metric, higher, task=task, num_fewshot=num_fewshot)
        metrics.append(replace(metric, asked=asked))
    return metrics
