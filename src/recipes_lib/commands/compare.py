"""`recipes compare RUN RUN...`: the tested table of a study for any runs that were evaluated alike.
Reads files only.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.compare.aims import Aims, Margin, is_named
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import RunDirectory, open_run, read_resolved
from recipes_lib.core.terminal import next_step, say, say_json, warn

if TYPE_CHECKING:
    from recipes_lib.compare.claims import Comparison
    from recipes_lib.compare.measurements import Measurements

_BASE = "base"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    runs = "runs that `recipes eval` evaluated; `base` is the base model of the others"
    add("runs", nargs="+", metavar="RUN", help=runs)
    margin = "the difference that does not matter on a metric: win_rate='2 points', loss=0.005"
    add("--margin", metavar="METRIC=M", action="append", default=[], help=margin)
    html = "write the report of a study about these runs, one file that needs nothing else"
    add("--html", metavar="FILE", help=html)
    add("--json", action="store_true", help="print one JSON object: rows, scores, findings")


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    # numpy, which `recipes compare --help` does without
    from recipes_lib.compare.claims import compare_arms
    from recipes_lib.compare.measurements import read_measurements
    from recipes_lib.compare.table_lines import comparison_lines
    from recipes_lib.compare.validity import check_validity

    folders = run_folders(args.runs)
    damaged: list[DamagedFile] = []
    measurements = read_measurements(
        {name: [folder] for name, folder in folders.items()}, damaged.append
    )
    for error in damaged:
        warn(f"an evaluation is damaged and left out: {error}")
    aims = Aims(margins=dict(map(_margin, args.margin)))
    findings = check_validity(None, measurements)
    comparison = compare_arms(measurements, findings, aims=aims)
    if not comparison.scores and (damaged or not comparison.rows):
        if damaged:
            raise damaged[0]
        raise RecipeError(
            f"{'none of these runs has an' if len(folders) > 1 else 'the run has no'} evaluation"
            " with a result",
            "evaluate first: recipes eval evals/quickstart/alpaca_eval.yaml"
            f" {shlex.join(args.runs)}",
        )
    for word in aims.margins:
        if not any(is_named(word, row.metric) for row in comparison.rows):
            known = ", ".join(dict.fromkeys(row.metric for row in comparison.rows))
            raise RecipeError(
                f"--margin {word}: these runs have no such metric in common",
                f"metrics: {known or 'none'}",
            )
    if args.json:
        say_json(comparison.to_dict())
    else:
        say("\n".join(comparison_lines(comparison)))
    if args.html:
        _write_html(Path(args.html), comparison, measurements)
    if args.json:
        return ExitCode.DONE
    if args.html:
        say(f"\nreport: {shown_path(Path(args.html))}")
    if len(folders) == 1:
        next_step(f"recipes compare {args.runs[0]} OTHER_RUN   (base works too)")
    elif not args.html:
        next_step(f"recipes compare {shlex.join(args.runs)} --html report.html")
    else:
        next_step(
            "recipes study plan recipes/studies/quickstart.yaml   (declares what may differ, so"
            " that a cause can be named)"
        )
    return ExitCode.DONE


def _margin(word: str) -> tuple[str, Margin]:
    metric, _, value = word.partition("=")
    margin = Margin.read(value)
    if margin is None or not metric:
        raise RecipeError(
            f"--margin {word}: no margin",
            "for example --margin win_rate='2 points' --margin loss=0.005",
        )
    return metric, margin


def run_folders(words: list[str]) -> dict[str, Path]:
    """Return the folders of the runs by name, the base models first.

    Raises:
        RecipeError: a word is no run, a run is named twice, or `base` is asked for and none of the
            runs' bases was evaluated.
    """
    named: dict[str, RunDirectory] = {}
    for one in (open_run(word) for word in words if word != _BASE):
        if one.name in named:
            raise RecipeError(
                f"run '{one.name}' is named twice", "a run compared with itself shows nothing"
            )
        named[one.name] = one
    if _BASE not in words:
        return {name: one.path for name, one in named.items()}
    if not named:
        raise RecipeError("base of what?", "name at least one run: recipes compare RUN base")
    bases = {base.name: base for one in named.values() for base in _bases_of(one)}
    if not bases:
        raise RecipeError(
            "the base of these runs was never evaluated",
            f"recipes eval EVAL {next(iter(named))} --against base evaluates it too; or name its"
            " model: recipes eval EVAL MODEL",
        )
    if len(bases) == 1:
        bases = {_BASE: next(iter(bases.values()))}
    return {name: one.path for name, one in (bases | named).items()}


def _bases_of(run: RunDirectory) -> list[RunDirectory]:
    """The run directories of a run's base, asked in the same prompt format; the same weights in
    another format are another subject.
    """
    resolved = read_resolved(run.path)
    ours, wanted = resolved.get("model") or {}, run.read_state().get("guard", {})
    prompt = wanted.get("prompt_format_hash")
    found = []
    for path in sorted(run.root.glob("base--*/run.json")):
        record = read_object(path)
        told = record.get("stand_in") or {}
        model = told.get("model") or {}
        alike = ("name_or_path", "revision", "dtype")
        same = all(model.get(key) == ours.get(key) for key in alike)
        quantization = told.get("quantization") == resolved.get("quantization")
        if same and quantization and prompt in (None, record.get("prompt_format_hash")):
            found.append(RunDirectory(path.parent.name, run.root))
    return found


def _write_html(path: Path, comparison: Comparison, measurements: Measurements) -> None:
    from recipes_lib.report.content import gather
    from recipes_lib.report.documents import report_html
    from recipes_lib.report.figures import draw_comparison

    content = gather("comparison", measurements, comparison)
    if path.is_dir():
        raise RecipeError(
            f"--html {path} is a folder", f"name a file: --html {path / 'report.html'}"
        )
    try:
        write_text(path, report_html(content, draw_comparison(content, ("svg",))))
    except OSError as error:
        raise EnvironmentFault(f"--html: {error.strerror}", file=path) from None
