"""The report: one HTML page that needs nothing else, report.md, numbers.csv and numbers.json.

The page begins with the answer, then says what cannot be said and how to fix it. Every number has
its n and its file. Model text is escaped, or stands in a JSON block that no parser runs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from recipes_lib.analysis import plots, row_text, text
from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.claims import Conclusion
from recipes_lib.analysis.differences import code_text
from recipes_lib.analysis.findings import SEVERITIES
from recipes_lib.analysis.lines import report_markdown, tests_text
from recipes_lib.analysis.printed_commands import commands, portable_command
from recipes_lib.analysis.runs import Arms
from recipes_lib.core.files import write_text
from recipes_lib.core.terminal import printable
from recipes_lib.evals.log import ORDERS, Sample
from recipes_lib.evals.suites import numbers_of

TEMPLATES = Path(__file__).parent / "templates"
MOST_CHARACTERS, LONGEST_TEXT = 330_000, 4_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")  # a spreadsheet would calculate it
# The correction for many tests is of p alone.
_INTERVAL_COLUMNS = {"low": "low_95_not_corrected", "high": "high_95_not_corrected"}


def write_report(
    folder: Path, conclusion: Conclusion, arms: Arms, design: Design | None = None
) -> None:
    """Write report.html, report.md, numbers.csv and numbers.json."""
    numbers = list(number_rows(conclusion, arms))
    texts = {
        "numbers.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        "numbers.csv": _csv(numbers),
        "report.md": report_markdown(conclusion),
        "report.html": report_html(conclusion, arms, design),
    }
    for name, content in texts.items():
        write_text(folder / name, content)


def report_html(conclusion: Conclusion, arms: Arms, design: Design | None = None) -> str:
    """Return the page."""
    samples = sample_data(arms)
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
        "effect": row_text.effect_text,
        "limits": row_text.limits_text,
        "where": row_text.where_text,
        "tests": tests_text,
        "interval": lambda limits, unit: text.interval_text(limits, unit, signed=False),
        "linked": partial(_with_links, samples=samples),
    }
    style, script = (
        Markup((TEMPLATES / name).read_text("utf-8")) for name in ("report.css", "samples.js")
    )
    ours = {(score.arm, score.metric): score for score in reversed(conclusion.table.scores)}
    findings = [
        (severity, of_severity)
        for severity in SEVERITIES
        if (of_severity := [each for each in conclusion.findings if each.severity == severity])
    ]
    return environment.get_template("report.html.jinja").render(
        name=design.name if design else "comparison",
        conclusion=conclusion,
        findings=findings,
        forest=Markup(plots.forest(conclusion.claims)),
        curves=Markup(plots.curves(arms)),
        reference=[
            (arm, metric, published, ours.get((arm, metric)))
            for arm, numbers in (design.reference if design else {}).items()
            for metric, published in numbers.items()
        ],
        answers=answer_counts(arms),
        trainings=trainings(arms),
        tuned=design.tuned if design else {},
        categories={} if conclusion.waiting else categories(arms),
        audits=_audits(arms),
        samples=samples,
        sample_data=Markup(script_json(samples)),
        commands=commands(arms, design, conclusion.margins),
        provenance=provenance(arms, design),
        style=style,
        script=script,
    )


def _with_links(line: str, samples: dict[str, Any]) -> Markup:
    """A line in which the name of a file of rows leads to these rows in the browser of samples."""
    shown = str(escape(printable(line)))
    for number, group in enumerate(samples["groups"]):
        file = re.escape(str(escape(f"{group['folder']}/items")))
        link = rf'<a href="#samples" data-rows="{number}">\1</a>'
        shown = re.sub(rf"((?<=\s)[^\s<>]*{file}[^\s<>]*\.jsonl)", link, shown, count=1)
    return Markup(shown)


# ---- Trainings, answers, categories, audits ----


def trainings(arms: Arms) -> list[dict[str, Any]]:
    """Return the numbers of each training; losses are per token, of one run, and not tested."""
    rows = []
    for arm, run in ((each, run) for each in arms for run in each.runs if not run.is_base):
        summary = run.state.get("summary") or {}
        if not (run.curves or summary):
            continue
        last = {name: curve.points[-1] for name, curve in run.curves.items()}
        ends = [*last.values()]
        loss, eval_loss = (last.get(name, (0, None))[1] for name in ("loss", "eval_loss"))
        devices = run.environment.get("devices") or ["not recorded"]
        rows.append(
            {
                "arm": arm.name,
                "run": run.name,
                "seed": run.seed,
                "steps": summary.get("steps") or max((int(step) for step, _ in ends), default=None),
                "rows": summary.get("training_rows"),
                "loss": summary.get("last_training_loss") or loss,
                "validation_loss": summary.get("last_validation_loss") or eval_loss,
                "tokens_per_second": summary.get("tokens_per_second"),
                "peak_memory_gib": summary.get("peak_memory_gib"),
                "devices": f"{len(devices)} x {devices[0]}" if devices[1:] else devices[0],
                "file": f"{run.name}/run.json",
            }
        )
    return rows


def answer_counts(arms: Arms) -> list[tuple[str, str, dict[str, tuple[int, int]]]]:
    """Return the faults in each arm's answers by evaluation, over all its trainings, as (faulty,
    all).
    """
    by_arm: dict[tuple[str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    for arm in arms:
        for log in {log.file.parent: log for log in reversed(arm.logs)}.values():
            counts = by_arm[arm.name, log.eval]
            for what, (times, n) in log.faults.items():
                before = counts.get(what, (0, 0))
                counts[what] = before[0] + times, before[1] + n
    return [(arm, name, counts) for (arm, name), counts in by_arm.items() if counts]


def categories(arms: Arms) -> dict[str, list[dict[str, Any]]]:
    """Return each arm by category, where a judged or checked evaluation has several."""
    by_title: dict[str, list[dict[str, Any]]] = defaultdict(list)
    metrics = ((arm, metric) for arm in arms for run in arm.runs[:1] for metric in run.metrics)
    for arm, metric in metrics:
        samples: dict[str, list[Sample]] = defaultdict(list)
        for sample in metric.samples:
            samples[sample.category] += [sample] if sample.value is not None else []
        if metric.suite in ("lm_eval", "heldout_loss") or not 1 < len(samples) <= 50:
            continue
        opponent = arms.opponent(metric.opponent)
        title = f"{metric.label} against {opponent}" if opponent else metric.label
        about = {"metric": title, "arm": arm.name, "unit": metric.unit}
        about["file"] = "/".join(metric.file.parts[-4:])
        for name, some in samples.items():
            known = [each.value for each in some], [each.id for each in some], metric.unit
            unknown = dict.fromkeys(("value", "low", "high"))
            row = {**about, "category": name, **unknown, **numbers_of(*known)}
            by_title[title].append(row)
    return {
        title: sorted(rows, key=lambda row: str(row["category"]))
        for title, rows in by_title.items()
    }


def _audits(arms: Arms) -> list[tuple[str, Any, Any]]:
    """The audit of each judge in each evaluation: that which measured most checks."""
    logs = [log for _, log in arms.logs if log.judge and log.audit]
    logs.sort(key=lambda log: -len(log.audit.not_measured) if log.audit else 0)
    audits = {(log.eval, log.judge and log.judge.fingerprint): log for log in logs}
    return [(log.eval, log.judge, log.audit) for log in audits.values()]


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
    by_category = {} if conclusion.waiting else categories(arms)
    for rows in by_category.values():
        yield from (_number("category", row) for row in rows)
    yield from (_number("training", {"n": 1, **row}) for row in trainings(arms))
    for arm, name, faults in answer_counts(arms):
        for what, (times, n) in faults.items():
            known = {"arm": arm, "eval": name, "metric": what}
            yield _number("answers", {**known, "value": times, "n": n})
    for name, judge, card in _audits(arms):
        for check in card.checks:
            known = {"metric": check.check, "eval": name, "label": judge.name}
            yield _number("judge audit", known | asdict(check))


def _number(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """One row of the numbers: an interval is two columns, files are one."""
    if "interval" in values:
        values["low"], values["high"] = values.pop("interval") or (None, None)
    if "files" in values:
        values["file"] = " ".join(values.pop("files"))
    named = {_INTERVAL_COLUMNS.get(key, key): value for key, value in values.items()}
    return {"kind": kind, **named}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(key for row in rows for key in row))
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


# ---- Where it comes from ----


def provenance(arms: Arms, design: Design | None) -> list[tuple[str, str]]:
    """Return code, versions, devices, data, prompts and judges, as the runs recorded them."""
    facts: dict[str, dict[str, None]] = defaultdict(dict)
    for arm, run in ((each, run) for each in arms for run in each.runs):
        libraries = (run.environment.get("libraries") or {}).items()
        known = ", ".join(f"{name} {version}" for name, version in libraries if version)
        facts["code at training"][code_text(run.environment.get("git"))] = None
        facts["libraries"][known] = None
        facts["devices"][", ".join(dict.fromkeys(run.environment.get("devices") or []))] = None
        data = (run.state.get("guard") or {}).get("data_fingerprint")
        facts["data, sha256"][str(data or "")[:16]] = None
        facts["runs"][f"{arm.name}: {run.name}"] = None
        for log in run.evals:
            judge, answers = log.judge, log.answers
            facts["code at evaluation"][code_text(log.git)] = None
            facts["written by"][log.source] = None
            if judge:
                known = f"{portable_command(judge.model)}, {judge.mode}, {judge.fingerprint[:12]}"
                facts["judges"][f"{judge.name} ({known})"] = None
            if answers.prompt_format_hash:
                prompt = f"{answers.prompt_format} {answers.prompt_format_hash[:12]}"
                facts["prompt formats"][prompt] = None
    for name, keys in (design.factors if design else {}).items():
        facts["declared factors"][f"{name}: {', '.join(keys)}"] = None
    lines = {name: "; ".join(filter(None, values)) for name, values in facts.items()}
    return [(name, line) for name, line in lines.items() if line]


# ---- Samples: text of models, which stays text ----


def sample_data(arms: Arms) -> dict[str, Any]:
    """Return the samples of every evaluation that has texts, comparisons between arms first.

    A page holds what fits into `MOST_CHARACTERS`, evenly chosen. A sample is (group, question,
    category, outcome, turned, place of the input, of the answer, of the opponent's answer,
    verdicts), a verdict (order, what was said, place of its text).
    """
    pages: list[tuple[dict[str, str], list[Sample]]] = []
    size, places = 0, dict[str, int]()  # of all texts; a question stands there once for all arms
    for arm, log in sorted(
        arms.logs, key=lambda logged: arms.opponent(logged[1].against) not in arms.by_name
    ):
        # of the comparison, else of the first metric
        metrics = sorted(log.metrics, key=lambda metric: metric.opponent is None)[:1]
        some = [
            each for metric in metrics for each in metric.samples if each.answer or any(each.raws)
        ]
        opponent = arms.opponent(log.against) or ""
        how = f"against {opponent}" if opponent else "graded" if log.judge else "checked by rules"
        group = {"title": f"{log.eval}: {arm} {how}", "arm": arm, "opponent": opponent}
        group["folder"] = "/".join(log.file.parent.parts[-3:])
        pages += [(group, some)] if some else []
        for sample in some:
            texts = [sample.answer, sample.opponent, *sample.raws]
            size += 80 + sum(min(len(text or ""), LONGEST_TEXT) for text in texts)

    def place(text: str | None) -> int | None:
        if text is None:
            return None
        if len(text) > LONGEST_TEXT:
            text = f"{text[:LONGEST_TEXT]}\n[cut here: {len(text):,} characters in all]"
        return places.setdefault(printable(text), len(places))

    step = max(1, -(-size // MOST_CHARACTERS))
    return {
        "total": sum(len(some) for _, some in pages),
        "groups": [group for group, _ in pages],
        "samples": [
            _sample(number, sample, place)
            for number, (_, some) in enumerate(pages)
            for sample in some[::step]
        ],
        "texts": [*places],
    }


def _sample(group: int, sample: Sample, place: Callable[[str | None], int | None]) -> list[object]:
    name = sample.id
    if sample.turn > 1:
        name = f"{name}, turn {sample.turn}"
    orders = ORDERS if sample.opponent is not None else ("grade",)
    said = zip(orders, sample.verdicts, sample.raws, strict=False)
    graded = sample.outcome == "graded" and sample.value is not None
    return [
        group,
        printable(name),
        printable(sample.category),
        f"grade {sample.value:g}" if graded else sample.outcome,
        int(sample.flip),
        place(sample.input or f"question {sample.id}"),
        place(sample.answer or ""),
        place(sample.opponent),
        [[order, printable(verdict), place(raw)] for order, verdict, raw in said],
    ]


def script_json(value: object) -> str:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
