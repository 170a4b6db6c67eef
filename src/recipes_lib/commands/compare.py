"""`recipes compare A B...`: the tested table of runs, lm-eval folders or alpaca_eval annotations.

Reads files only, and writes nothing but what --html names.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.analysis.aims import Aims, Margin, is_named
from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.files import DamagedFile, read_object, write_text
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import RunDirectory, open_run, read_resolved
from recipes_lib.core.terminal import next_step, print_json, say, warn

if TYPE_CHECKING:
    from recipes_lib.analysis.claims import Conclusion
    from recipes_lib.analysis.runs import Arms, Run

_BASE = "base"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    runs = (
        "runs that `recipes eval` evaluated, `base` for the base model of the others, folders of"
        " lm-eval with samples, annotations.json of alpaca_eval"
    )
    add("runs", nargs="+", metavar="RUN", help=runs)
    margin = "the difference that does not matter on a metric: win_rate='2 points', loss=0.005"
    add("--margin", metavar="METRIC=M", action="append", default=[], help=margin)
    add("--html", metavar="FILE", help="write the report, one file that needs nothing else")
    add("--json", action="store_true", help="print one JSON object: rows, scores, findings")


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    # numpy, which `recipes compare --help` does without
    from recipes_lib.analysis.claims import conclude
    from recipes_lib.analysis.summary import conclusion_lines

    damaged: list[DamagedFile] = []
    arms = load_words(args.runs, damaged)
    for error in damaged:
        warn(f"an evaluation is damaged and left out: {error}")
    aims = Aims(margins=dict(map(_margin, args.margin)))
    conclusion = conclude(arms, aims)
    if not conclusion.table.scores:
        if damaged:
            raise damaged[0]
        raise RecipeError(
            "none of these has an evaluation with a result",
            f"evaluate first: recipes eval evals/quickstart/alpaca_eval.yaml {' '.join(args.runs)}",
        )
    for word in aims.margins:
        if not any(is_named(word, row.metric) for row in conclusion.table.rows):
            known = ", ".join(dict.fromkeys(row.metric for row in conclusion.table.rows))
            what = f"--margin {word}: these have no such metric in common"
            raise RecipeError(what, f"metrics: {known or 'none'}")
    if args.json:
        print_json(conclusion.to_dict())
    else:
        say("\n".join(conclusion_lines(conclusion)))
    if args.html:
        _write_html(Path(args.html), conclusion, arms)
    if args.json:
        return ExitCode.DONE
    if args.html:
        say(f"\nreport: {shown_path(Path(args.html))}")
        next_step("a study declares what may differ, so that a cause can be named: docs/studies.md")
    elif len(arms.by_name) == 1:
        next_step(f"recipes compare {args.runs[0]} OTHER   (base works too)")
    else:
        next_step(f"recipes compare {' '.join(args.runs)} --html report.html")
    return ExitCode.DONE


def _margin(word: str) -> tuple[str, Margin]:
    metric, _, value = word.partition("=")
    margin = Margin.read(value)
    hint = "for example --margin win_rate='2 points' --margin loss=0.005"
    if margin is None or not metric:
        raise RecipeError(f"--margin {word}: no margin", hint)
    if wrong := margin.fits(metric):
        raise RecipeError(f"--margin {word}: {wrong}", hint)
    return metric, margin


def load_words(words: list[str], damaged: list[DamagedFile]) -> Arms:
    """Return what words on the command line name, base models first.

    Raises:
        RecipeError: a word names nothing, a run is named twice, or `base` is asked for and none of
            the runs' bases was evaluated.
    """
    from recipes_lib.analysis.foreign import read_foreign, unique_names
    from recipes_lib.analysis.runs import ArmRuns, Arms, load_run

    foreign: dict[str, Run] = {}
    for word in (word for word in words if word != _BASE):
        path = Path(word)
        is_run = path.is_dir() and (path / "run.json").is_file()
        if path.exists() and not is_run and (run := read_foreign(path)):
            foreign[word] = run
    named = [open_run(word) for word in words if word != _BASE and word not in foreign]
    runs = [load_run(one.path, damaged.append) for one in named]
    if _BASE in words:
        if not named:
            raise RecipeError("base of what?", "name at least one run: recipes compare RUN base")
        bases = [load_run(one.path, damaged.append) for one in _evaluated_bases(named)]
        if len(bases) == 1:
            bases = [replace(bases[0], name=_BASE, state={**bases[0].state, "kind": "base"})]
        runs = [*bases, *runs]
    known = unique_names([*runs, *foreign.values()])
    return Arms({name: ArmRuns(name, (run,)) for name, run in known.items()})


def _evaluated_bases(named: list[RunDirectory]) -> list[RunDirectory]:
    bases = {base.name: base for one in named for base in _bases_of(one)}
    if not bases:
        raise RecipeError(
            "the base of these runs was never evaluated",
            f"recipes eval EVAL {named[0].name} --against base evaluates it too; or name its model:"
            " recipes eval EVAL MODEL",
        )
    return list(bases.values())


def _bases_of(run: RunDirectory) -> list[RunDirectory]:
    """The run directories of a run's base, asked in the same prompt format; the same weights in
    another format are another subject.
    """
    resolved = read_resolved(run.path)
    ours = resolved.get("model") or {}
    prompt = run.read_state().get("guard", {}).get("prompt_format_hash")
    found = []
    for path in sorted(run.root.glob("base--*/run.json")):
        record = read_object(path)
        asked = record.get("stand_in") or {}
        model = asked.get("model") or {}
        same = all(model.get(key) == ours.get(key) for key in ("name_or_path", "revision", "dtype"))
        quantization = asked.get("quantization") == resolved.get("quantization")
        if same and quantization and prompt in (None, record.get("prompt_format_hash")):
            found.append(RunDirectory(path.parent.name, run.root))
    return found


def _write_html(path: Path, conclusion: Conclusion, arms: Arms) -> None:
    from recipes_lib.analysis.report import report_html

    if path.is_dir():
        hint = f"name a file: --html {path / 'report.html'}"
        raise RecipeError(f"--html {path} is a folder", hint)
    try:
        write_text(path, report_html(conclusion, arms))
    except OSError as error:
        raise EnvironmentFault(f"--html: {error.strerror}", file=path) from None
