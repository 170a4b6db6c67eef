"""What a report prints to be typed runs as it stands, and shows no path of another machine."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.analysis.made_up import plain_text, write_judged, write_run
from tests.study.study_files import write_tiny_study

from recipes_lib.analysis.aims import Aims, Design, Margin
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.printed_commands import (
    audit_again,
    commands,
    evaluate_again,
    portable_command,
)
from recipes_lib.analysis.readers.ours import load_arms
from recipes_lib.analysis.report import report_html
from recipes_lib.analysis.runs import Arms
from recipes_lib.cli import main
from recipes_lib.evals.log import EvalLog, read_eval_log, write_log

PYTHON = "/opt/env/bin/python3.12 -m recipes_lib.cli"
MINE = EvalLog(suite="alpaca_eval", eval="alpaca_eval", target="r8", file=Path("result.json"))


def test_an_installed_command_is_shown_as_it_is_typed() -> None:
    installed = "/opt/env/bin/python3.12 /opt/env/bin/recipes eval evals/alpaca_eval.yaml r8"
    assert portable_command(installed) == "recipes eval evals/alpaca_eval.yaml r8"


def test_a_result_is_made_again_by_the_command_that_made_it() -> None:
    line = f"{PYTHON} eval evals/alpaca_eval.yaml evals/mt_bench.yaml r8 --against r32"
    log = replace(MINE, command=line)
    again = "recipes eval evals/alpaca_eval.yaml r8 --against r32"  # no other eval
    assert evaluate_again(log, None) == again
    setting = "generation.max_new_tokens=64"
    assert evaluate_again(log, None, setting) == f"{again} {setting}"
    longer = replace(log, command=f"{line} generation.max_new_tokens=32")
    assert evaluate_again(longer, None, setting) == f"{again} {setting}"
    design = Design("s", "What?", command="recipes study run s.yaml")
    of_study = replace(MINE, command=f"{PYTHON} study run s.yaml")
    assert evaluate_again(of_study, design) == design.command
    said = "set generation.max_new_tokens: 64 in the recipe of alpaca_eval, then recipes study"
    assert evaluate_again(of_study, design, setting).startswith(said)
    hidden = replace(MINE, command=f"{PYTHON} eval /somewhere/else/mine.yaml r8")
    assert evaluate_again(hidden, None) == "run the command in result.json again"
    assert evaluate_again(MINE, None, setting) == f"evaluate it again, with {setting}"


def test_an_audit_names_the_judge_file_of_the_eval() -> None:
    for log, judge in (
        (MINE, "evals/judges/prometheus-7b-v2.yaml"),
        (replace(MINE, eval="quickstart--mt_bench"), "evals/judges/quickstart.yaml"),
    ):
        assert f"recipes judge audit --judge {judge} --labels labels.jsonl" in audit_again(
            log, None
        )
    assert "--judge" not in audit_again(replace(MINE, eval="mine--x"), None)


def test_a_comparison_is_made_again_with_its_margins(tmp_path: Path) -> None:
    folders = {name: [write_run(tmp_path, name)] for name in ("one", "two")}
    for folder in (*folders["one"], *folders["two"]):
        write_judged(folder, 40)
    arms = load_arms(folders)
    margins = {"win_rate": Margin(0.02, points=True)}
    ((_, lines),) = commands(arms, None, conclude(arms, Aims(margins=margins)).aims.margins)
    assert lines == ["recipes compare one two --margin 'win_rate=2 points'"]
    assert Margin.read("2 points") == margins["win_rate"]


def test_what_to_read_is_a_link_to_the_rows(tmp_path: Path) -> None:
    folders = {name: [write_run(tmp_path, name)] for name in ("one", "two")}
    write_judged(folders["one"][0], 40)
    write_judged(folders["two"][0], 40, text=lambda who, question: plain_text(who, "all"))
    arms = load_arms(folders)
    conclusion = conclude(arms)
    file = "two/evals/alpaca_eval/items.jsonl"
    (line,) = (line for line in conclusion.cannot_say if "same text" in line)
    assert "Fix: read some of them: " in line and line.endswith(f"{file}.")
    page = report_html(conclusion, arms)
    links = re.findall(r'<a href="#questions" data-rows="(\d)">[^<]*' + re.escape(file), page)
    groups = json.loads(page.split('id="question-data">')[1].split("</script>")[0])["groups"]
    assert len(links) == 2 and groups[int(links[0])]["arm"] == "two"  # beside the answer too


# ---- On a small study ----


def printed(conclusion: dict[str, object] | Conclusion, page: str) -> list[str]:
    """Every command of this project in the fixes of a report, and in its last section."""
    findings = conclusion["findings"] if isinstance(conclusion, dict) else conclusion.findings
    texts = [row["remedy"] if isinstance(row, dict) else row.remedy for row in findings]
    texts += page.split('<section id="again">')[1].split("<dl>")[0].splitlines()
    texts = [text.replace("&#39;", "'").replace("<pre>", "\n") for text in texts]
    found = [re.search(r"recipes (?:study|eval|compare|judge|train) .*", text) for text in texts]
    lines = [match[0].partition("</pre>")[0] for match in found if match]
    return list(dict.fromkeys(lines))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """A function that runs a command as a shell would, and lets it know how it was called."""

    def run(line: str) -> int:
        words = shlex.split(line)
        argv = [sys.executable, "-m", "recipes_lib.cli", *words[1:]]
        monkeypatch.setattr(sys, "orig_argv", argv)
        return main(words[1:])

    return run


@pytest.mark.slow
def test_every_command_that_a_report_prints_runs(
    runs_folder: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    typed: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a study, and of a comparison of runs that were evaluated one by one."""
    folder = write_tiny_study(tmp_path / "study", tiny_model_dir).parent
    monkeypatch.chdir(folder)
    for name, old, new in (
        ("tiny.yaml", ", mt_bench.yaml, lm_eval.yaml", ""),
        ("alpaca_eval.yaml", "probe_pairs: 1", "probe_pairs: 0"),  # the judge is not audited
    ):
        (folder / name).write_text((folder / name).read_text().replace(old, new))
    pair = {"instruction": "Name a color.", "answer": "Red.", "opponent_answer": "A cat."}
    (folder / "labels.jsonl").write_text(json.dumps(pair | {"label": "win"}) + "\n")
    assert typed("recipes study run tiny.yaml") == 0
    report = json.loads((runs_folder / "tiny/comparison.json").read_text())
    lines = printed(report, (runs_folder / "tiny/report/report.html").read_text())
    assert {line.split()[1] for line in lines} == {"study", "judge"}
    failed = {line: code for line in lines if (code := typed(line))}
    assert not failed
    # the opponent's weights are others now
    command = "recipes eval alpaca_eval.yaml tiny--r8 --against tiny--r4"
    assert typed(command) == 0
    file = runs_folder / "tiny--r8/evals/study--alpaca_eval/result.against-tiny--r4.json"
    log = read_eval_log(file)
    assert log.opponent
    write_log(replace(log, opponent=replace(log.opponent, fingerprint="former")))
    arms: Arms = load_arms({name: [runs_folder / f"tiny--{name}"] for name in ("r4", "r8")})
    conclusion = conclude(arms)
    assert "former-opponent" in {finding.code for finding in conclusion.findings}
    lines = printed(conclusion, report_html(conclusion, arms))
    assert {line.split()[1] for line in lines} == {"eval", "compare"}
    failed = {line: code for line in lines if (code := typed(line))}
    assert not failed
