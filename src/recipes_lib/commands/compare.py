"""`recipes compare RUN RUN...`: the tested table of a study for any runs that were evaluated alike.
Reads files only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import RunDirectory, open_run, read_resolved
from recipes_lib.core.terminal import next_step, say, warn

if TYPE_CHECKING:
    from recipes_lib.compare.claims import Comparison
    from recipes_lib.compare.measurements import Measurements

_BASE = "base"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="runs that `recipes eval` evaluated; `base` is the base model of the others",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write the report of a study about these runs, one file that needs nothing else",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: rows, scores, findings"
    )


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from recipes_lib.compare.claims import compare_arms
    from recipes_lib.compare.measurements import read_measurements
    from recipes_lib.compare.validity import check_validity

    folders = run_folders(args.runs)
    damaged: list[DamagedFile] = []
    measurements = read_measurements(
        {name: [folder] for name, folder in folders.items()}, damaged.append
    )
    for error in damaged:
        warn(f"an evaluation is damaged and left out: {error}")
    if not any(
        True for arm in measurements.arms.values() for one in arm.runs for _ in one.measures()
    ):
        if damaged:
            raise damaged[0]
        raise RecipeError(
            f"{'none of these runs has an' if len(folders) > 1 else 'the run has no'} evaluation"
            " with a result",
            f"evaluate first: recipes eval evals/quickstart/alpaca_eval.yaml {' '.join(args.runs)}",
        )
    comparison = compare_arms(measurements, check_validity(None, measurements))
    if args.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        say("\n".join(lines_of(comparison)))
    if args.html:
        _write_html(Path(args.html), comparison, measurements, quiet=args.json)
    if not args.json:
        _next(args, folders)
    return int(ExitCode.DONE)


def run_folders(words: list[str]) -> dict[str, Path]:
    """Return the folders of the runs by name, the base models first.

    Raises:
        RecipeError: a word is no run, a run is named twice, or `base` is asked for and none of the
            runs' bases was evaluated.
    """
    named = [open_run(word) for word in words if word != _BASE]
    if _BASE in words and not named:
        raise RecipeError("base of what?", "name at least one run: recipes compare RUN base")
    twice = [
        one.name
        for number, one in enumerate(named)
        if one.name in [other.name for other in named[:number]]
    ]
    if twice:
        raise RecipeError(
            f"run '{twice[0]}' is named twice", "a run compared with itself shows nothing"
        )
    found: dict[str, RunDirectory] = {}
    if _BASE in words:
        bases = {
            base.name: base
            for one in named
            for base in _bases_of(one.read_state(), one.path, one.root)
        }
        if not bases:
            raise RecipeError(
                "the base of these runs was never evaluated",
                f"recipes eval EVAL {named[0].name} --against base evaluates it too; or name its"
                " model: recipes eval EVAL MODEL",
            )
        found = {_BASE: next(iter(bases.values()))} if len(bases) == 1 else dict(bases)
    return {name: one.path for name, one in {**found, **{one.name: one for one in named}}.items()}


def _bases_of(state: dict[str, Any], folder: Path, root: Path) -> list[Any]:
    """The run directories of a run's base, asked in the same prompt format; the same weights in
    another format are another subject.
    """
    resolved = read_resolved(folder)
    wanted = state.get("guard", {}).get("prompt_format_hash")
    found = []
    for path in sorted(root.glob("base--*/run.json")):
        record = read_object(path)
        model, ours = (record.get("stand_in") or {}).get("model") or {}, resolved.get("model") or {}
        same = all(model.get(key) == ours.get(key) for key in ("name_or_path", "revision", "dtype"))
        quantization = (record.get("stand_in") or {}).get("quantization") == resolved.get(
            "quantization"
        )
        if same and quantization and (wanted is None or record.get("prompt_format_hash") == wanted):
            found.append(RunDirectory(path.parent.name, root))
    return found


def _write_html(
    path: Path, comparison: Comparison, measurements: Measurements, quiet: bool
) -> None:
    """Write the report as one file."""
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
    if not quiet:
        say(f"\nreport: {shown_path(path)}")


def lines_of(comparison: Comparison) -> list[str]:
    """Return what the terminal shows: the answer, the table by pairs of arms, the scores of a
    single run, the findings.
    """
    from recipes_lib.compare.table_lines import finding_lines, pair_lines, score_lines

    lines = list(comparison.answer) if comparison.rows else []
    for pair in dict.fromkeys(row.arms for row in comparison.rows):
        lines += ["", *pair_lines([row for row in comparison.rows if row.arms == pair])]
    if not comparison.rows:
        lines += score_lines(comparison.scores)
    return [*lines, *finding_lines(comparison.findings)]


def _next(args: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Name the next command."""
    if len(folders) == 1:
        next_step(f"recipes compare {args.runs[0]} OTHER_RUN   (base works too)")
    elif not args.html:
        next_step(f"recipes compare {' '.join(args.runs)} --html report.html")
    else:
        next_step(
            "recipes study plan recipes/studies/quickstart.yaml   (declares what may differ, so"
            " that a cause can be named)"
        )
