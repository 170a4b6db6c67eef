"""What was measured, read from run folders: evaluations, training curves, facts about each run; and
from results of lm-eval with samples and annotations of alpaca_eval. Nothing is made up.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from recipes_lib.config.documents import read
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.core.files import hash_of, read_object, read_rows
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.evals.log import (
    REFERENCE,
    AnswerFacts,
    EvalLog,
    JudgeFacts,
    Metric,
    Sample,
    read_eval_logs,
    text_hash,
    with_groups,
)
from recipes_lib.evals.suites import metric_of
from recipes_lib.evals.suites.lm_eval import metrics_of

MOST_POINTS = 1_000
_MODEL = ("pretrained", "peft", "path", "model", "tokenizer", "delta", "revision")
_AGAIN = "run lm-eval again with --log_samples and --output_path"
FOLDERS = "lm-eval: the folder of --output_path; alpaca_eval: its annotations.json"
CURVES = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}


@dataclass
class Curve:
    """Points (step, value) of one thing that a training logged, thinned while they are read."""

    points: list[tuple[float, float]] = field(default_factory=list)
    count: int = 0
    every: int = 1  # how many points each stands for; the last one stands for itself

    def add(self, step: float, value: float) -> None:
        """Add a point; of more than `MOST_POINTS` every second one is dropped."""
        if (self.count - 1) % self.every:
            self.points.pop()
        self.points.append((step, value))
        self.count += 1
        if len(self.points) > MOST_POINTS:
            self.points = self.points[::2]
            self.every *= 2


def read_curves(file: Path) -> dict[str, Curve]:
    """Return the curves of metrics.jsonl; nothing of it stays in memory but them."""
    curves: dict[str, Curve] = {}
    for row in read_rows(file):
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name in CURVES:
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, Curve()).add(step, value)
    return curves


@dataclass(frozen=True)
class Run:
    """One run: what its folder says, each part empty where the file is absent."""

    name: str
    folder: Path
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)  # run.json
    resolved: Mapping[str, Any] = field(default_factory=dict, repr=False)  # resolved.yaml
    environment: Mapping[str, Any] = field(default_factory=dict, repr=False)
    splits: Mapping[str, Any] = field(default_factory=dict, repr=False)
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)
    evals: tuple[EvalLog, ...] = field(default=(), repr=False)
    unfinished: tuple[str, ...] = ()  # evaluations with judgments or answers and no result
    seed: int | None = None
    foreign: bool = False  # another program's files

    @property
    def is_base(self) -> bool:
        """Whether this is a model that was not trained here."""
        return self.name.startswith("base--") or self.state.get("kind") in ("base", "answers")

    @property
    def metrics(self) -> Iterator[Metric]:
        """Every metric of every evaluation."""
        return (metric for log in self.evals for metric in log.metrics)


@dataclass(frozen=True)
class ArmRuns:
    """One arm: one run per training seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def logs(self) -> list[EvalLog]:
        """Every evaluation of every run."""
        return [log for run in self.runs for log in run.evals]

    @property
    def is_base(self) -> bool:
        """Whether the arm is a model that was not trained here."""
        return bool(self.runs) and all(run.is_base for run in self.runs)


@dataclass(frozen=True)
class Arms:
    """All arms by name, in the order of the study."""

    by_name: Mapping[str, ArmRuns]

    def __getitem__(self, name: str) -> ArmRuns:
        return self.by_name[name]

    def __iter__(self) -> Iterator[ArmRuns]:
        return iter(self.by_name.values())

    @cached_property
    def of_run(self) -> dict[str, str]:
        """The arm of each run's name: an opponent in a result is a run, in a report an arm."""
        return {run.name: arm.name for arm in self for run in arm.runs}

    @property
    def logs(self) -> list[tuple[str, EvalLog]]:
        """Every evaluation with its arm."""
        return [(arm.name, log) for arm in self for log in arm.logs]

    def opponent(self, run: str | None) -> str | None:
        """Return the arm of an opponent, or the opponent as it is and never under an arm's name."""
        if run is None:
            return None
        if run in self.of_run and run != REFERENCE:
            return self.of_run[run]
        if run not in self.by_name and run not in self.of_run:
            return run
        return "the reference answers" if run == REFERENCE else f"another run, {run}"


def load_arms(folders: Mapping[str, Sequence[Path]]) -> Arms:
    """Return everything that was measured, of each arm the folders (one per seed) that exist."""
    runs = {name: map(load_run, filter(Path.is_dir, paths)) for name, paths in folders.items()}
    return Arms({name: ArmRuns(name, tuple(loaded)) for name, loaded in runs.items()})


def load_run(folder: Path) -> Run:
    """Return what one run's folder holds."""
    file = folder / "resolved.yaml"  # a base has none
    resolved = read(file).values or {} if file.is_file() else {}
    evals, unfinished = read_eval_logs(folder)
    seed = (resolved.get("train") or {}).get("seed")
    return Run(
        name=folder.name,
        folder=folder,
        state=read_object(folder / "run.json"),
        resolved=resolved,
        environment=read_object(folder / "environment.json"),
        splits=read_object(folder / "splits.json"),
        curves=read_curves(folder / "metrics.jsonl"),
        evals=evals,
        unfinished=unfinished,
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
    )


def run_place(path: Path) -> str:
    """Return a file of a run as `runs/<run>/...`, wherever the runs lie."""
    root, whole = runs_root().resolve(), path.resolve()
    if whole.is_relative_to(root):
        return f"runs/{whole.relative_to(root).as_posix()}"
    return shown_path(path)


def question_of(samples: Sequence[Sample]) -> dict[str, str]:
    """Return the question behind each id: asked again under another id it is no new evidence."""
    texts: dict[str, dict[int, str]] = {}
    same: dict[str, str] = {}
    for sample in samples:
        if sample.same_as:
            same[sample.id] = sample.same_as
        elif sample.input and sample.input.strip():
            texts.setdefault(sample.id, {})[sample.turn] = " ".join(sample.input.split()).casefold()
    first: dict[tuple[tuple[int, str], ...], str] = {}
    known = {id: first.setdefault(tuple(sorted(text.items())), id) for id, text in texts.items()}
    return known | same


# ---- Results of other programs ----


def read_foreign(path: Path) -> Run | None:
    """Return what a folder or a file of another program holds; None where it is none."""
    if path.is_dir():
        results = sorted(path.glob("results*.json")) or sorted(path.glob("*/results*.json"))
        if results:
            return _lm_eval(path, results[-1])
        annotations = sorted(path.glob("*annotations*.json"))
        return _alpaca_eval(annotations[0]) if annotations else None
    if not path.is_file() or path.suffix != ".json":
        return None
    content = _json(path)
    if isinstance(content, Mapping) and {"results", "configs"} <= content.keys():
        return _lm_eval(path.parent, path)
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, Mapping) and {"instruction", "preference", "output_2"} <= first.keys():
        return _alpaca_eval(path)
    what = "neither results of lm-eval nor annotations of alpaca_eval"
    raise DataError(what, FOLDERS, file=path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"is not JSON: {error}", file=path) from None


def _run(name: str, folder: Path, log: EvalLog) -> Run:
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or folder.name
    return Run(clean, folder, state={"kind": "answers"}, evals=(log,), foreign=True)


class _Annotation(BaseModel):
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
        value = 0.5 if self.preference == 0 else self.preference and self.preference - 1
        outcomes = {None: "unresolved", 1.0: "win", 0.5: "tie", 0.0: "loss"}
        return Sample(
            id=text_hash(self.instruction)[:16],
            category=self.dataset or "all",
            value=value,
            outcome=outcomes.get(value, "scored"),
            input=self.instruction,
            answer=self.output_2,
            opponent=self.output_1,
        )


def _alpaca_eval(path: Path) -> Run:
    try:
        rows = TypeAdapter(list[_Annotation]).validate_python(_json(path))
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        number, *where = details["loc"]
        what = f"annotation {int(number) + 1}: {'.'.join(map(str, where))}: {details['msg']}"
        raise DataError(what, file=path) from None
    names = {key: {getattr(row, key) for row in rows} for key in ("generator_2", "annotator")}
    for key, values in names.items():
        if len(values) > 1:
            what = f"has several values of {key}: {', '.join(sorted(values)[:3])}"
            raise DataError(what, "one file is one model and one judge", file=path)
    samples = [row.sample() for row in rows]
    if len({sample.id for sample in samples}) < len(samples):
        raise DataError("holds an instruction twice", "keep one annotation of each", file=path)
    model, judge = min(names["generator_2"]), min(names["annotator"])
    place: dict[str, Any] = {"eval": "alpaca_eval", "suite": "alpaca_eval", "file": path}
    opponent = " and ".join(sorted({row.generator_1 or REFERENCE for row in rows}))
    metric = metric_of("win_rate", "AlpacaEval win rate", samples, opponent=opponent, **place)
    log = EvalLog(
        target=model,
        against=opponent,
        n=len(samples),
        metrics=(metric,),
        answers=AnswerFacts(name=model, models=(model,)),
        judge=JudgeFacts(name=judge, fingerprint=judge, model=judge),
        notes=("each pair was judged once, in random order",),
        source="alpaca_eval",
        **place,
    )
    return _run(model, path.parent, log)


# ---- lm-eval ----


def _lm_eval(folder: Path, path: Path) -> Run:
    """The results of one lm-eval command, with the samples of the same date."""
    content = _json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("results"), Mapping):
        raise DataError("holds no results of lm-eval", _AGAIN, file=path)
    stamp = path.stem.removeprefix("results")
    samples = {
        file.stem.removeprefix("samples_").removesuffix(stamp): list(read_rows(file))
        for file in sorted(path.parent.glob(f"samples_*{stamp}.jsonl"))
    }
    rows = [row for of_task in samples.values() for row in of_task]
    if not rows or not all("doc_id" in row for row in rows):
        raise DataError("it has no samples beside it, so nothing can be paired", _AGAIN, file=path)
    prompts = sorted(f"{row['doc_id']} {row.get('prompt_hash')}" for row in rows)
    place: dict[str, Any] = {"eval": "lm_eval", "suite": "lm_eval", "file": path}
    known = [replace(metric, **place) for metric in metrics_of(content, samples)]
    metrics = tuple(with_groups(known))
    config = content.get("config") or {}
    given = config.get("model_args")
    if not isinstance(given, Mapping):
        given = dict(part.split("=", 1) for part in str(given or "").split(",") if "=" in part)
    arguments = {str(key).strip(): str(value) for key, value in given.items()}
    model = str(content.get("model_name") or arguments.get("pretrained") or path.parent.name)
    limit = config.get("limit")
    settings = {"limit": limit} if limit else {}
    settings["gen_kwargs"] = str(config.get("gen_kwargs") or "none")
    free = {key: value for key, value in arguments.items() if key not in _MODEL}
    facts = {
        "lm_eval": content.get("lm_eval_version"),
        "transformers": content.get("transformers_version"),
        "model arguments": ", ".join(f"{key}={free[key]}" for key in sorted(free)) or "none",
        "chat template": content.get("chat_template_sha") or "none",
        "prompts": hash_of(prompts)[:12],
    }
    log = EvalLog(
        target=model,
        n=sum(metric.n for metric in metrics if not metric.parts),
        subset=f"limit {limit}" if limit else None,
        metrics=metrics,
        answers=AnswerFacts(name=model, models=(model,), dtype=free.get("dtype")),
        recipe={"suite": settings},
        libraries={key: value for key, value in facts.items() if value},
        git={"commit": content.get("git_hash")},
        source="lm-eval",
        **place,
    )
    return _run(model, folder, log)


def arms_of(runs: Sequence[Run]) -> Arms:
    """Return each run as an arm; runs with the same name are named by their folders."""
    times, arms = Counter(run.name for run in runs), dict[str, ArmRuns]()
    for run in runs:
        name = f"{run.name}-{run.folder.name}" if times[run.name] > 1 else run.name
        if name in arms:
            hint = "a run compared with itself shows nothing"
            raise RecipeError(f"'{run.name}' is named twice", hint)
        arms[name] = ArmRuns(name, (run,))
    return Arms(arms)
