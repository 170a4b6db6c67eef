"""The report: one HTML page that needs nothing else, report.md, numbers.csv and numbers.json.

The page begins with the answer, then says what cannot be said and how to fix it. Every number has
its n and its file. Model text is escaped, or stands in a JSON block that no parser runs.
"""

import csv
import io
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from recipes_lib.analysis import plots, row_text, text
from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.claims import Conclusion
from recipes_lib.analysis.differences import code_text
from recipes_lib.analysis.findings import SEVERITIES
from recipes_lib.analysis.lines import effect_title, table_of_tests
from recipes_lib.analysis.markdown import report_markdown
from recipes_lib.analysis.printed_commands import commands, portable_command
from recipes_lib.analysis.questions import question_data
from recipes_lib.analysis.runs import Arms
from recipes_lib.core.files import write_text
from recipes_lib.core.terminal import printable, shown_duration
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.recipe import ROW_SUITES
from recipes_lib.evals.suites import numbers_of
from recipes_lib.stats import ALPHA

TEMPLATES = Path(__file__).parent / "templates"
_MOST_CATEGORIES = 50
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")  # a spreadsheet would calculate it


def write_report(
    folder: Path, conclusion: Conclusion, arms: Arms, design: Design | None = None
) -> None:
    """Write report.html, report.md, numbers.csv and numbers.json."""
    numbers = list(number_rows(conclusion, arms))
    write_text(folder / "numbers.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "numbers.csv", _csv(numbers))
    write_text(folder / "report.md", report_markdown(conclusion))
    write_text(folder / "report.html", report_html(conclusion, arms, design))


def report_html(conclusion: Conclusion, arms: Arms, design: Design | None = None) -> str:
    """Return the page."""
    questions = question_data(arms)
    scores = {(score.arm, score.metric): score for score in reversed(conclusion.table.scores)}
    # safe inside a script element
    questions_json = json.dumps(questions, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        questions_json = questions_json.replace(character, f"\\u{ord(character):04x}")
    return _page().render(
        name=design.name if design else "comparison",
        conclusion=conclusion,
        severities=SEVERITIES,
        effect_title=effect_title(conclusion.table.alpha),
        level=row_text.confidence_text(conclusion.table.alpha),
        forest=plots.forest(conclusion.claims),
        curves=plots.curves(arms),
        reference=design.reference if design else {},
        scores=scores,
        answers=answers_by_arm(arms),
        trainings=trainings(arms),
        tuned=design.tuned if design else {},
        categories={} if conclusion.waiting else categories(arms),
        audited=_audited(arms),
        questions=questions,
        linked=partial(_with_links, groups=questions["groups"]),
        question_data=Markup(questions_json),
        commands=commands(arms, design, conclusion.aims.margins),
        provenance=provenance(arms, design),
        style=Markup((TEMPLATES / "report.css").read_text("utf-8")),
        script=Markup((TEMPLATES / "questions.js").read_text("utf-8")),
    )


@cache  # compiling it takes longer than writing a page
def _page() -> Template:
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
        "duration": lambda seconds: shown_duration(seconds) if seconds else "–",
        "effect": row_text.effect_text,
        "limits": row_text.limits_text,
        "where": row_text.where_text,
        "tests": table_of_tests,
        "interval": lambda limits, unit: text.interval_text(limits, unit, signed=False),
    }
    return environment.get_template("report.html.jinja")


def _with_links(line: str, groups: list[dict[str, Any]]) -> Markup:
    """A line in which the name of a file of rows leads to these rows in the browser."""
    html = str(escape(printable(line)))
    for number, group in enumerate(groups):
        file = re.escape(str(escape(f"{group['folder']}/items")))
        link = rf'<a href="#questions" data-rows="{number}">\1</a>'
        html = re.sub(rf"((?<=\s)[^\s<>]*{file}[^\s<>]*\.jsonl)", link, html, count=1)
    return Markup(html)


def trainings(arms: Arms) -> list[dict[str, Any]]:
    """Return the numbers of each training; losses are per token, of one run, and not tested."""
    rows = []
    for arm, run in arms.runs:
        summary = run.state.get("summary") or {}
        if run.is_base or not (run.curves or summary):
            continue
        last_points = {name: curve.points[-1] for name, curve in run.curves.items()}
        _, loss = last_points.get("loss", (0, None))
        _, eval_loss = last_points.get("eval_loss", (0, None))
        last_step = max((int(step) for step, _ in last_points.values()), default=None)
        devices = run.environment.get("devices") or ["not recorded"]
        hardware = devices[0]
        if len(devices) > 1:
            hardware = f"{len(devices)} x {devices[0]}"
        row = {
            "arm": arm,
            "run": run.name,
            "seed": run.seed,
            "steps": summary.get("steps") or last_step,
            "rows": summary.get("training_rows"),
            "loss": summary.get("last_training_loss") or loss,
            "validation_loss": summary.get("last_validation_loss") or eval_loss,
            "seconds": summary.get("seconds"),
            "tokens_per_second": summary.get("tokens_per_second"),
            "peak_memory_gib": summary.get("peak_memory_gib"),
            "devices": hardware,
            "file": f"{run.name}/run.json",
        }
        rows.append(row)
    return rows


def answers_by_arm(arms: Arms) -> list[dict[str, Any]]:
    """Return what is known of the answers of each arm and evaluation: their number and median
    length, the replies of judges about them, and their faults as (faulty answers, all).
    """
    by_eval: dict[tuple[str, str], list[EvalLog]] = defaultdict(list)
    for arm, log in arms.logs:
        by_eval[arm, log.eval].append(log)
    rows = []
    for (arm, eval), logs in by_eval.items():
        # Results against several opponents are about the same answers: the first one counts.
        first_logs = {log.file.parent: log for log in reversed(logs)}
        samples = {
            (folder, sample.key): sample
            for folder, log in first_logs.items()
            for metric in log.metrics
            for sample in metric.samples
            if sample.answer is not None
        }
        faults: dict[str, tuple[int, int]] = {}
        for log in first_logs.values():
            for fault, (faulty, n) in log.faults.items():
                faulty_before, n_before = faults.get(fault, (0, 0))
                faults[fault] = (faulty_before + faulty, n_before + n)
        if samples:
            row: dict[str, Any] = {"arm": arm, "eval": eval, "n": len(samples), "faults": faults}
            row["median_characters"] = median(
                len(str(sample.answer)) for sample in samples.values()
            )
            row["judge_replies"] = sum(_num_judge_replies(log) for log in logs)
            rows.append(row)
    return rows


def _num_judge_replies(log: EvalLog) -> int:
    return sum(len(sample.raws) for metric in log.metrics[:1] for sample in metric.samples)


def categories(arms: Arms) -> dict[str, list[dict[str, Any]]]:
    """Return each arm by category, where a judged or checked evaluation has several."""
    by_title: dict[str, list[dict[str, Any]]] = defaultdict(list)
    metrics = [(arm.name, metric) for arm in arms for run in arm.runs[:1] for metric in run.metrics]
    for arm, metric in metrics:
        if metric.suite == "lm_eval" or metric.suite in ROW_SUITES:
            continue
        samples: dict[str, list[Sample]] = defaultdict(list)
        for sample in metric.samples:
            of_category = samples[sample.category]  # there is one too where no sample has a value
            if sample.value is not None:
                of_category.append(sample)
        if not 1 < len(samples) <= _MOST_CATEGORIES:
            continue
        title = metric.label
        opponent = arms.opponent(metric.opponent)
        if opponent:
            title += f" against {opponent}"
        for category, of_category in samples.items():
            row: dict[str, Any] = {"metric": title, "arm": arm, "unit": metric.unit}
            row["file"] = "/".join(metric.file.parts[-4:])
            row["category"] = category
            row |= dict.fromkeys(["value", "low", "high"])
            values = [sample.value for sample in of_category]
            row |= numbers_of(values, [sample.id for sample in of_category], metric.unit)
            by_title[title].append(row)
    for rows in by_title.values():
        rows.sort(key=lambda row: str(row["category"]))
    return by_title


def _audited(arms: Arms) -> list[EvalLog]:
    """A log of each judge in each evaluation: that whose audit measured most checks."""
    logs = [log for _, log in arms.logs if log.judge and log.audit]
    logs.sort(key=lambda log: -len(log.audit.not_measured) if log.audit else 0)
    # of several logs of one judge the last one stays
    return list({(log.eval, log.judge and log.judge.fingerprint): log for log in logs}.values())


def number_rows(conclusion: Conclusion, arms: Arms) -> Iterator[dict[str, Any]]:
    """Yield every number of a report with its kind, n, interval and file."""
    for claim in conclusion.claims:
        row = claim.row.to_dict()
        row["flags"] = "; ".join(row["flags"])
        row["trainings"] = min(row["trainings"])
        row["by_seed"] = "; ".join(map(str, row["by_seed"]))
        row["p_not_worse"], row["p_not_better"] = row.pop("p_margin") or (None, None)
        yield _number("comparison", row | {"verdict": claim.verdict, "within": claim.within})
    for score in conclusion.table.scores:
        yield _number("score", asdict(score))
    if not conclusion.waiting:
        for rows in categories(arms).values():
            for row in rows:
                yield _number("category", row)
    for row in trainings(arms):
        yield _number("training", {"n": 1, **row})
    for of_eval in answers_by_arm(arms):
        numbers = {fault: faulty for fault, (faulty, _) in of_eval["faults"].items()}
        numbers |= {name: of_eval[name] for name in ("median_characters", "judge_replies")}
        for name, value in numbers.items():
            row = {key: of_eval[key] for key in ("arm", "eval", "n")}
            yield _number("answers", row | {"metric": name, "value": value})
    for log in _audited(arms):
        assert log.judge and log.audit
        for check in log.audit.checks:
            row = {"metric": check.check, "eval": log.eval, "label": log.judge.name}
            yield _number("judge audit", row | asdict(check))


def _number(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """One row of the numbers: an interval is two columns, files are one."""
    if "interval" in values:
        values["low"], values["high"] = values.pop("interval") or (None, None)
    if "files" in values:
        values["file"] = " ".join(values.pop("files"))
    # The correction for many tests is of p alone.
    level = row_text.confidence_text(values.get("alpha", ALPHA)).removesuffix("%")
    ends = {end: f"{end}_{level}_not_corrected" for end in ("low", "high")}
    named = {ends.get(key, key): value for key, value in values.items()}
    return {"kind": kind, **named}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(itertools.chain(*rows)))
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def provenance(arms: Arms, design: Design | None) -> list[tuple[str, str]]:
    """Return code, versions, devices, data, prompts and judges, as the runs recorded them."""
    facts: dict[str, dict[str, None]] = defaultdict(dict)  # by name, each value once, in order
    for arm, run in arms.runs:
        libraries = (run.environment.get("libraries") or {}).items()
        versions = [f"{name} {version}" for name, version in libraries if version]
        devices = dict.fromkeys(run.environment.get("devices") or [])
        data = (run.state.get("guard") or {}).get("data_fingerprint")
        facts["code at training"][code_text(run.environment.get("git"))] = None
        facts["libraries"][", ".join(versions)] = None
        facts["devices"][", ".join(devices)] = None
        facts["data, sha256"][str(data or "")[:16]] = None
        facts["runs"][f"{arm}: {run.name}"] = None
    for _, log in arms.logs:
        facts["code at evaluation"][code_text(log.git)] = None
        facts["written by"][log.source] = None
        if log.judge:
            model = portable_command(log.judge.model)
            details = f"{model}, {log.judge.mode}, {log.judge.fingerprint[:12]}"
            facts["judges"][f"{log.judge.name} ({details})"] = None
        if log.answers.prompt_format_hash:
            prompt = f"{log.answers.prompt_format} {log.answers.prompt_format_hash[:12]}"
            facts["prompt formats"][prompt] = None
    if design:
        for name, keys in design.factors.items():
            facts["declared factors"][f"{name}: {', '.join(keys)}"] = None
    lines = {name: "; ".join(filter(None, values)) for name, values in facts.items()}
    return [(name, line) for name, line in lines.items() if line]
