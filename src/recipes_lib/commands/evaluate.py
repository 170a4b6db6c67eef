"""`recipes eval`, `recipes judge audit` and `recipes compare`: results, and what they show."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from recipes_lib.analysis.aims import Aims, Margin, is_named
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import ExitCode, RecipeError, print_error
from recipes_lib.core.files import write_text
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say

# The forms that the readers take (`FORM` of each), without importing them for --help.
_RESULTS = (
    "evaluated runs, or results of other programs: folders of lm-eval, lighteval or HELM,"
    " annotations of alpaca_eval, logs of Inspect AI, tables (.csv, .tsv, .jsonl, .parquet) with"
    " the columns question, score and, as needed, arm, seed, metric, text, higher_is_better;"
    " several trainings of an arm: NAME=GLOB, such as 'r8=out/r8-s*'"
)


def run_eval(
    eval: Annotated[str, "one or more eval recipes, such as evals/quickstart/alpaca_eval.yaml"],
    run_or_model: Annotated[list[str], "runs, base, Hub ids, model folders, or files of answers"],
    overrides: Sequence[str] = (),
    *,
    against: Annotated[str | None, "the opponent: reference, base, another run or model"] = None,
    trust_remote_code: Annotated[
        bool, "allow code of models and tasks, if the recipe asks"
    ] = False,
    json: Annotated[bool, "print one JSON object: result.json, or a list of them"] = False,
) -> int:
    """Answer an eval's questions, judge, and print a table."""
    from recipes_lib.evals.log import to_json
    from recipes_lib.evals.run import evaluate, say_results, split_words

    recipes, words = split_words([eval, *run_or_model], list(overrides))
    progress = sys.stderr if json else sys.stdout
    with contextlib.redirect_stdout(progress):
        logs = evaluate(recipes, words, against, remote_code=trust_remote_code)
    if json:
        results = [to_json(log) | {"file": shown_path(log.file)} for log in logs]
        if len(results) == 1:
            return print_json(results[0])
        return print_json({"results": results})
    say_results(logs)
    return next_step("compare", *dict.fromkeys(log.target for log in logs))


def run_judge_audit(
    *,
    judge: Annotated[str, "the judge's file: model and thresholds"],
    labels: Annotated[Path, "rows: instruction, answer, opponent_answer, label"],
    limit: Annotated[int | None, "ask about N pairs; a later, larger N adds the rest"] = None,
    probe_pairs: Annotated[int, "pairs for the two probes, 4 judgments each", 0] = 10,
    json: Annotated[bool, "print the scorecard as JSON"] = False,
) -> int:
    """Ask a judge about labelled pairs, and print its scorecard."""
    from recipes_lib.evals.audit import scorecard_lines
    from recipes_lib.evals.judged import audit_on_labels
    from recipes_lib.evals.recipe import load_judge_file

    load_judge_file(judge)  # a wrong file is refused before torch is imported
    quiet_libraries()
    card, folder = audit_on_labels(judge, labels, limit, probe_pairs)
    if json:
        return print_json(asdict(card))
    say(*scorecard_lines(card), f"kept in {shown_path(folder)}")
    return ExitCode.DONE


def run_compare(
    runs: Annotated[list[str], _RESULTS],
    *,
    margin: Annotated[list[str], "negligible differences: win_rate='2 points' loss=0.005"] = [],
    gate: Annotated[
        list[str], "like --margin, for CI: exit 1 if it is not shown to hold against the first"
    ] = [],
    html: Annotated[Path | None, "write the report as one self-contained file"] = None,
    markdown: Annotated[bool, "print Markdown, for the comment of a pull request"] = False,
    json: Annotated[bool, "print one JSON object: rows, scores, findings"] = False,
) -> int:
    """Print the tested table of runs, or of results of other programs."""
    # numpy, which `recipes compare --help` does without
    from recipes_lib.analysis.claims import conclude
    from recipes_lib.analysis.gate import gate as gate_arms
    from recipes_lib.analysis.lines import conclusion_lines
    from recipes_lib.analysis.markdown import report_markdown
    from recipes_lib.analysis.ownership import check_ownership
    from recipes_lib.analysis.readers import read_word
    from recipes_lib.analysis.report import report_html
    from recipes_lib.analysis.runs import arms_of

    if html and html.is_dir():
        raise RecipeError(f"--html {html}: this is a folder", "name a file, such as report.html")
    measured = []
    for word in runs:
        measured += read_word(word)
    for run in measured:
        check_ownership(run)
    arms = arms_of(measured)
    gated = dict(_margin("--gate", word) for word in gate)
    aims = Aims(margins=dict(_margin("--margin", word) for word in margin) | gated)
    conclusion = conclude(arms, aims)
    if not conclusion.table.scores:
        what = "none of these has an evaluation with a result"
        command = shlex.join(["recipes", "eval", "evals/quickstart/lm_eval.yaml"] + runs)
        raise RecipeError(what, f"evaluate first, for example: {command}")
    metrics = dict.fromkeys(row.metric for row in conclusion.table.rows)
    for word in aims.margins:
        if not any(is_named(word, metric) for metric in metrics):
            what = f"margin {word}: these have no such metric in common"
            raise RecipeError(what, f"metrics: {', '.join(metrics) or 'none'}")
    if html:
        write_text(html, report_html(conclusion, arms))
    code = ExitCode.DONE
    verdict: list[str] = []
    if gate:
        names = [arm.name for arm in arms]
        code, verdict = gate_arms(conclusion, names, baseline=names[0], metrics=gated)
    if json:
        value = conclusion.to_dict()
        if gate:
            value |= {"gate": verdict, "exit_code": int(code)}
        print_json(value)
        return code
    if markdown:
        print(report_markdown(conclusion), end="")
        if verdict:
            say(*verdict)
        # on stderr: stdout is the comment
        print_error(f"next: {shlex.join(['recipes', 'compare', *runs, '--html', 'report.html'])}")
        return code
    say(*conclusion_lines(conclusion), is_result=bool(conclusion.claims))
    if gate:
        say("", *verdict)
    if html:
        say(f"\nreport: {shown_path(html)}")
    else:
        next_step("compare", *runs, "--html", "report.html")
    return code


def _margin(flag: str, word: str) -> tuple[str, Margin]:
    metric, _, value = word.partition("=")
    margin = Margin.read(value)
    what = "not METRIC=NUMBER or METRIC='NUMBER points'"
    if margin is not None and metric:
        what = margin.fits(metric)
    if margin is None or what:
        hint = f"for example {flag} win_rate='2 points' loss=0.005"
        raise RecipeError(f"{flag} {word}: {what}", hint)
    return metric, margin
