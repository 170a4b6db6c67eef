"""The report: one HTML page that needs nothing else, report.md, numbers.csv and numbers.json.

The page answers first, then says what cannot be said and what would mend it. Every number has its n
and its file. Text of models is escaped, or stands in a JSON block that no parser runs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipes_lib.analysis import plots, text
from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.checks import SEVERITIES
from recipes_lib.analysis.claims import Conclusion, effect_text, limits_text, where_text
from recipes_lib.analysis.runs import Arms, Run
from recipes_lib.analysis.samples import collect_samples
from recipes_lib.analysis.stats import Limits
from recipes_lib.analysis.summary import report_markdown
from recipes_lib.analysis.table import Score, score_interval
from recipes_lib.core.files import write_text
from recipes_lib.core.project import project_root, runs_root
from recipes_lib.core.terminal import printable
from recipes_lib.evals.log import EvalLog, Sample, answer_faults

TEMPLATES = Path(__file__).parent / "templates"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")  # a spreadsheet would calculate it
_PYTHON = re.compile(r"(?<!\S)\S*python[\d.]* -m (recipes_lib\.\w+)")
_PATH = re.compile(r"(?<![\w./:~-])(?:/|(?:\.\./)+)(?:[^\s/'\",;)]+/)+([^\s/'\",;)]+)")


def write_report(
    folder: Path, conclusion: Conclusion, arms: Arms, design: Design | None = None
) -> list[Path]:
    """Write report.html, report.md, numbers.csv and numbers.json, and return them."""
    numbers = list(number_rows(conclusion, arms))
    texts = {
        "numbers.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        "numbers.csv": _csv(numbers),
        "report.md": report_markdown(conclusion),
        "report.html": report_html(conclusion, arms, design),
    }
    for name, content in texts.items():
        write_text(folder / name, content)
    return [folder / name for name in texts]


def report_html(conclusion: Conclusion, arms: Arms, design: Design | None = None) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "value": text.metric_text,
        "number": text.plain_number,
        "p": text.p_text,
        "effect": effect_text,
        "limits": limits_text,
        "where": where_text,
        "interval": lambda limits, unit: text.interval_text(limits, unit, signed=False),
    }
    style, script = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8"))
        for name in ("report.css", "samples.js")
    )
    samples = collect_samples(arms)
    pairs = dict.fromkeys(claim.row.arms for claim in conclusion.claims)
    findings = [
        (severity, of_severity)
        for severity in SEVERITIES
        if (of_severity := [each for each in conclusion.findings if each.severity == severity])
    ]
    return environment.get_template("report.html.jinja").render(
        name=design.name if design else "comparison",
        conclusion=conclusion,
        pairs=[
            (pair, [claim for claim in conclusion.claims if claim.row.arms == pair])
            for pair in pairs
        ],
        findings=findings,
        forest=Markup(plots.forest(conclusion.claims)),
        curves=Markup(plots.curves(arms)),
        reference=_reference(conclusion, design),
        answers=answer_counts(arms),
        trainings=trainings(arms),
        tuned=design.tuned if design else {},
        categories=categories(arms),
        audits=_audits(arms),
        samples=samples,
        sample_data=Markup(samples.json()),
        commands=commands(arms, design),
        provenance=provenance(arms, design),
        style=style,
        script=script,
    )


# ---- Trainings, answers, categories, audits ----


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training's numbers; losses are per token, of one run, and not tested."""

    arm: str
    run: str
    seed: int | None
    steps: int | None
    rows: int | None
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None
    device_hours: float | None
    launch: str
    devices: str
    file: str


def trainings(arms: Arms) -> list[Training]:
    """Return one line per run that was trained."""
    return [
        _training(arm.name, run)
        for arm in arms
        for run in arm.runs
        if not run.is_base and (run.curves or run.state.get("summary"))
    ]


def _training(arm: str, run: Run) -> Training:
    summary = run.state.get("summary") or {}
    last = {name: curve.last[1] for name, curve in run.curves.items() if curve.last}
    reached = [int(curve.last[0]) for curve in run.curves.values() if curve.last]
    devices = run.environment.get("devices") or ["not recorded"]
    seconds = summary.get("seconds")  # of a resumed training those of its last attempt alone
    hours = None
    if seconds is not None and not run.state.get("resumed"):
        hours = float(seconds) * int(summary.get("world_size") or 1) / 3600
    return Training(
        arm=arm,
        run=run.name,
        seed=run.seed,
        steps=summary.get("steps") or max(reached, default=None),
        rows=summary.get("training_rows"),
        loss=summary.get("last_training_loss") or last.get("loss"),
        validation_loss=summary.get("last_validation_loss") or last.get("eval_loss"),
        tokens_per_second=summary.get("tokens_per_second"),
        peak_memory_gib=summary.get("peak_memory_gib"),
        device_hours=hours,
        launch=str(run.state.get("launch") or "not recorded"),
        devices=f"{len(devices)} x {devices[0]}" if len(devices) > 1 else str(devices[0]),
        file=f"{run.name}/run.json",
    )


def answer_counts(arms: Arms) -> list[dict[str, Any]]:
    """Return what is wrong with the answers of each arm, by evaluation, over all its trainings."""
    by_arm: dict[tuple[str, str], dict[str, list[int]]] = {}
    for arm in arms:
        for run in arm.runs:
            for log in {log.eval: log for log in reversed(run.evals)}.values():
                for what, (times, n) in answer_faults(log).items():
                    counts = by_arm.setdefault((arm.name, log.eval), {}).setdefault(what, [0, 0])
                    counts[0] += times
                    counts[1] += n
    return [
        {"arm": arm, "eval": name, "n": max(n for _, n in faults.values()), "faults": faults}
        for (arm, name), faults in by_arm.items()
    ]


@dataclass(frozen=True)
class Category:
    """One arm on the questions of one category."""

    metric: str
    category: str
    arm: str
    unit: str
    value: float | None
    interval: Limits | None
    n: int
    file: str


def categories(arms: Arms) -> dict[str, list[Category]]:
    """Return metrics by category, where a judged or checked evaluation has several."""
    by_title: dict[str, list[Category]] = defaultdict(list)
    metrics = ((arm, metric) for arm in arms for run in arm.runs[:1] for metric in run.metrics)
    for arm, metric in metrics:
        samples: dict[str, list[Sample]] = defaultdict(list)
        for sample in metric.samples:
            samples[sample.category] += [sample] if sample.value is not None else []
        if metric.suite in ("lm_eval", "heldout_loss") or not 1 < len(samples) <= 50:
            continue
        opponent = arms.opponent(metric.opponent)
        title = f"{metric.label} against {opponent}" if opponent else metric.label
        file = "/".join(metric.file.parts[-4:])
        for name, some in samples.items():
            value, limits = None, None
            if some:
                values = np.array([[sample.value for sample in some]], dtype=float)
                value = float(values.mean())
                limits = score_interval(values, [sample.id for sample in some], metric.unit)
            row = Category(title, name, arm.name, metric.unit, value, limits, len(some), file)
            by_title[title].append(row)
    return {title: sorted(rows, key=lambda row: row.category) for title, rows in by_title.items()}


def _audits(arms: Arms) -> list[tuple[str, Any, Any]]:
    """The audit of each judge in each evaluation: that of the result with the most judgments."""
    audits: dict[tuple[str, str], tuple[str, Any, Any]] = {}
    for _, log in sorted(arms.logs, key=lambda logged: _weight(logged[1])):
        if log.judge and log.audit:
            audits[log.eval, log.judge.fingerprint] = log.eval, log.judge, log.audit
    return list(audits.values())


def _weight(log: EvalLog) -> tuple[int, int]:
    """How many checks an audit has measured, of how many judgments."""
    if log.audit is None:
        return 0, 0
    measured = sum(check.result != "not measured" for check in log.audit.checks)
    return measured, log.audit.asked


def _reference(
    conclusion: Conclusion, design: Design | None
) -> list[tuple[str, str, float, Score | None]]:
    """Published numbers beside ours: (arm, metric, published, our score)."""
    ours = {(score.arm, score.metric): score for score in reversed(conclusion.table.scores)}
    return [
        (arm, metric, value, ours.get((arm, metric)))
        for arm, numbers in (design.reference if design else {}).items()
        for metric, value in numbers.items()
    ]


# ---- Numbers ----


def number_rows(conclusion: Conclusion, arms: Arms) -> Iterator[dict[str, Any]]:
    """Yield every number of a report with its kind, n, interval and file."""
    for claim in conclusion.claims:
        row = claim.row.to_dict()
        row["flags"] = "; ".join(row["flags"])
        row["trainings"] = min(row["trainings"])
        row["p_not_worse"], row["p_not_better"] = row.pop("p_margin") or (None, None)
        yield _number("comparison", row | {"verdict": claim.verdict, "within": claim.within})
    for score in conclusion.table.scores:
        yield _number("score", asdict(score))
    for rows in categories(arms).values():
        for category in rows:
            yield _number("category", asdict(category))
    for training in trainings(arms):
        yield _number("training", {"n": 1, **asdict(training)})
    for counts in answer_counts(arms):
        for what, (times, n) in counts["faults"].items():
            known = {"arm": counts["arm"], "eval": counts["eval"], "metric": what}
            yield _number("answers", {**known, "value": times, "n": n})
    for name, judge, card in _audits(arms):
        for check in card.checks:
            values = asdict(check)
            known = {"metric": values.pop("check"), "eval": name, "label": judge.name}
            yield _number("judge audit", known | values)


def _number(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """One row of the numbers: an interval is two columns, files are one."""
    if "interval" in values:
        values["low"], values["high"] = values.pop("interval") or (None, None)
    if "files" in values:
        values["file"] = " ".join(values.pop("files"))
    return {"kind": kind, **values}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


# ---- Where it comes from ----


def commands(arms: Arms, design: Design | None) -> list[tuple[str, list[str]]]:
    """Return the commands that make this report again, whole and step by step."""
    runs = [run for arm in arms for run in arm.runs]
    if design is None:
        names = [str(run.folder) if run.foreign else run.name for run in runs]
        return [("This table", [portable_command(f"recipes compare {shlex.join(names)}")])]
    sources = {
        "Everything": [design.command] if design.command else [],
        "Trainings": [line for run in runs if (line := _command_of(run))],
        "Evaluations": [log.command for run in runs for log in run.evals if log.command],
        "lm-eval alone": [log.lm_eval_command or "" for run in runs for log in run.evals],
    }
    lines = {
        title: list(dict.fromkeys(portable_command(line) for line in some if line))
        for title, some in sources.items()
    }
    return [(title, some) for title, some in lines.items() if some]


def _command_of(run: Run) -> str:
    path = run.folder / "command.txt"
    content = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return content.splitlines()[-1] if content else ""


def portable_command(command: str) -> str:
    """Return a command without the paths of the machine it ran on: relative to the project or as
    `runs/...`, else the last name alone.

    Example:
        >>> portable_command("/opt/bin/python -m recipes_lib.cli eval /somewhere/else/my.yaml r8")
        'recipes eval .../my.yaml r8'
    """
    shown = _PYTHON.sub(
        lambda match: "recipes" if match[1].endswith("cli") else f"python -m {match[1]}", command
    )
    for folder, name in ((runs_root(), "runs/"), (project_root(), "")):
        shown = re.sub(rf"(?<![\w./~-]){re.escape(str(folder.resolve()))}/", name, shown)
    return _PATH.sub(r".../\1", shown)


def provenance(arms: Arms, design: Design | None) -> list[tuple[str, str]]:
    """Return code, versions, devices, data, prompts and judges, as the runs recorded them."""
    lines: dict[str, dict[str, None]] = defaultdict(dict)

    def add(name: str, value: object) -> None:
        if value:
            lines[name][str(value)] = None

    def code(git: Any) -> str:
        commit = str((git or {}).get("commit") or "")[:12]
        return f"{commit} with changes" if commit and git.get("dirty") else commit

    for arm in arms:
        for run in arm.runs:
            libraries = (run.environment.get("libraries") or {}).items()
            add("code at training", code(run.environment.get("git")))
            add(
                "libraries",
                ", ".join(f"{name} {version}" for name, version in libraries if version),
            )
            add("devices", ", ".join(dict.fromkeys(run.environment.get("devices") or [])))
            guard = run.state.get("guard") or {}
            add("data, sha256", str(guard.get("data_fingerprint") or "")[:16])
            add("runs", f"{arm.name}: {run.name}")
            for log in run.evals:
                add("code at evaluation", code(log.git))
                add("written by", log.source)
                if log.judge:
                    model = portable_command(log.judge.model)
                    print_ = log.judge.fingerprint[:12]
                    add("judges", f"{log.judge.name} ({model}, {log.judge.mode}, {print_})")
                if log.answers.prompt_format_hash:
                    prompt = f"{log.answers.prompt_format} {log.answers.prompt_format_hash[:12]}"
                    add("prompt formats", prompt)
    if design is not None:
        factors = [f"{name}: {', '.join(keys)}" for name, keys in design.factors.items()]
        add("declared factors", "; ".join(factors))
    return [(name, "; ".join(values)) for name, values in lines.items()]
