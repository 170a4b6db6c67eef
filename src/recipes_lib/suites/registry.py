"""From an eval recipe to its suite; the tables of results for the terminal, and the schemas of eval
recipes and of result.json. The suites there are stand in `eval_recipe.SUITE_FACTS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.schema import fields_of, file_schema, object_schema, sections_schema
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import say
from recipes_lib.eval_log import EvalLog, ImportedFile, Measure, Sample
from recipes_lib.eval_recipe import (
    SUITE_FACTS,
    EvalDataSection,
    EvalRecipe,
    GenerationSection,
    MetricsSection,
    SuiteSection,
)
from recipes_lib.judging.judge_file import JudgeSection
from recipes_lib.judging.outcomes import PairSummary
from recipes_lib.statistics.intervals import Interval
from recipes_lib.suites.judged import JudgedSuite
from recipes_lib.suites.suite import Asker, suite_class


def suite_of(
    recipe: EvalRecipe,
    words: Sequence[str],
    against: str | None = None,
    *,
    allow_format_differences: bool = False,
    remote_code: bool = False,
) -> Asker:
    """Return the suite of an eval recipe for targets; see `JudgedSuite` for the words."""
    kind = suite_class(recipe.suite.name)
    if issubclass(kind, JudgedSuite):
        return kind(recipe, words, against, allow_format_differences, remote_code)
    return kind(recipe, words, remote_code)


def say_results(logs: Sequence[EvalLog]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(log.eval for log in logs):
        mine = [log for log in logs if log.eval == name]
        say(tables(mine))
        for log in mine:
            if log.lm_eval_command:
                say(f"$ {log.lm_eval_command}")
        say()
    for log in logs:
        say(f"kept in {shown_path(log.file)}")


def tables(logs: Sequence[EvalLog]) -> str:
    """Return the tables of the logs of one suite."""
    lines = [f"{logs[0].eval}: {_what(logs[0])}", ""]
    said: dict[str, list[str]] = {}
    for log in logs:
        for banner in log.banners:
            said.setdefault(banner, []).append(log.target)
    for banner, targets in said.items():
        lines.append(
            f"! {banner}" if len(targets) == len(logs) else f"! {', '.join(targets)}: {banner}"
        )
    lines += [""] if said else []
    lines += suite_class(logs[0].suite).table(logs)
    return "\n".join(lines)


def _what(log: EvalLog) -> str:
    if log.judge is None:
        return suite_class(log.suite).TITLE
    return f"{log.n} questions, judge {log.judge.name} ({log.judge.model}, {log.judge.mode})"


_JUDGE_FILE_HELP = (
    "A judge file, relative to the eval recipe (judges/prometheus-7b-v2.yaml). Keys beside it"
    " replace the file's."
)


def eval_schema() -> JsonSchema:
    """Return the schema of an eval recipe; its section judge has the keys of a judge file, and
    `file`.
    """
    classes = {
        "suite": SuiteSection,
        "data": EvalDataSection,
        "generation": GenerationSection,
        "judge": JudgeSection,
        "metrics": MetricsSection,
    }
    properties = sections_schema(classes)
    names = " ".join(f"{name}: {suite_class(name).HELP}" for name in SUITE_FACTS)
    properties["suite"]["properties"]["name"] = {"description": names, "enum": list(SUITE_FACTS)}
    properties["suite"]["required"] = ["name"]
    judge = properties["judge"]
    judge["properties"] = {
        "file": {"type": "string", "description": _JUDGE_FILE_HELP},
        **judge["properties"],
    }
    return file_schema("eval", "An eval recipe", properties=properties, required=["suite"])


def eval_result_schema() -> JsonSchema:
    """Return the schema of result.json and of a line of items.jsonl, from the dataclasses of the
    log and the numbers that each suite names.
    """
    header, inside = fields_of(EvalLog), ("eval", "suite", "samples", "file")
    for name in ("file", "numbers"):
        del header[name]
    header |= {
        "format_version": {"const": 1},
        "suite": {"enum": list(SUITE_FACTS)},
        "audit": {"type": ["object", "null"], "required": ["checks", "banner"]},
        "measures": {
            "description": "Metrics, whose samples are in items.jsonl.",
            "type": "array",
            "items": object_schema(
                {name: one for name, one in fields_of(Measure).items() if name not in inside},
                ["metric", "label"],
            ),
        },
    }
    always = ["format_version", "suite", "eval", "target", "against", "subset", "banners"]
    place: JsonSchema = {
        "description": "Where this result is kept; only in what is printed.",
        "type": "string",
    }
    result: JsonSchema = {
        "type": "object",
        "required": [*always, "answers", "recipe", "written", "command", "libraries", "measures"],
        "properties": {**header, "file": place},
        "allOf": [
            {
                "if": {"properties": {"suite": {"const": name}}},
                "then": {"required": list(suite.NUMBERS), "properties": suite.NUMBERS},
            }
            for name in SUITE_FACTS
            for suite in [suite_class(name)]
        ],
    }
    imported: JsonSchema = {
        "description": "An evaluation that `recipes import` made of another program's files.",
        "type": "object",
        "required": [*always, "imported", "flags", "lacks", "answers"],
        "properties": {
            **{name: header[name] for name in ("format_version", "flags", "lacks", "measures")},
            "suite": {"enum": ["alpaca_eval", "mt_bench", "lm_eval"]},
            "imported": {
                "type": "array",
                "minItems": 1,
                "items": object_schema(fields_of(ImportedFile)),
            },
            "missing": {
                "type": "array",
                "items": {"type": "object", "required": ["question_id", "turn"]},
            },
            "replays": header["replays"],
        },
        "not": {"required": ["written"]},
    }
    sample = fields_of(Sample)
    names = {"id": "question_id", "input": "instruction", "opponent": "opponent_answer"}
    sample = {names.get(name, name): schema for name, schema in sample.items()}
    texts = ("instruction", "answer", "opponent_answer", "metric", "task")
    sample |= dict.fromkeys(texts, JsonSchema(type="string"))
    shares = ("win_rate", "score", "swap_consistency", "first_position")
    of_interval: JsonSchema = {"$ref": "#/$defs/interval"}
    pairs = fields_of(PairSummary) | dict.fromkeys(shares, of_interval)
    pairs["score_bounds"] = {"type": "object", "additionalProperties": of_interval}
    schema = file_schema("eval_result", "recipes eval --json, and result.json of an evaluation")
    del schema["type"], schema["additionalProperties"]
    return {
        **schema,
        "description": (
            "One result for one target; for several targets, their results in the order of the"
            " command line. items.jsonl beside it has a `sample` a line."
        ),
        "oneOf": [
            {"$ref": "#/$defs/result"},
            {"$ref": "#/$defs/imported"},
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["results"],
                "properties": {
                    "results": {
                        "type": "array",
                        "minItems": 2,
                        "items": {"$ref": "#/$defs/result"},
                    }
                },
            },
        ],
        "$defs": {
            "interval": object_schema(fields_of(Interval)),
            "pairs": {
                "description": (PairSummary.__doc__ or "").partition("\n")[0],
                **object_schema(pairs),
            },
            "sample": object_schema(sample, ["metric", "question_id", "value", "outcome"]),
            "result": result,
            "imported": imported,
        },
    }
