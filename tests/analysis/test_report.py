"""The report answers first, opens offline, shows model output as text, and has every number."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import time
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
from tests.analysis.made_up import (
    JUDGE,
    change_lines,
    plain_text,
    write_judged,
    write_run,
    write_values,
)

from recipes_lib.analysis.aims import Aims, Design, TunedArm
from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.curves import MOST_POINTS, read_curves
from recipes_lib.analysis.lines import conclusion_lines, pair_rows, table_of_tests
from recipes_lib.analysis.readers import ours
from recipes_lib.analysis.readers.ours import load_arms
from recipes_lib.analysis.report import report_html, write_report
from recipes_lib.analysis.text import question_text
from recipes_lib.evals.log import read_eval_log, write_lines, write_log
from recipes_lib.evals.recipe import load_eval

HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }} </script><img src=x onerror=alert(2)> \x1b[31m"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, list[Path]]:
    made = {}
    for arm, rank, skill in (("r8", 8, 0.4), ("r32", 32, 0.8)):
        folder = write_run(tmp_path, f"study--{arm}", rank=rank)
        write_judged(folder, 60, skill=skill)
        write_values(folder, [float(n % 10 < 10 * skill) for n in range(50)])
        made[arm] = [folder]
    return made


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_answer_stands_before_everything_else(folders: dict[str, list[Path]]) -> None:
    arms = load_arms(folders)
    conclusion = conclude(arms, Aims("win_rate"), Design("study", "Does rank matter?"))
    page = report_html(conclusion, arms, Design("study", "Does rank matter?"))
    places = [page.index(f'id="{name}"') for name in ("answer", "table", "findings", "training")]
    assert places == sorted(places)
    assert "The r32 run scored better than the r8 run" in page[places[0] : places[1]]
    for sentence in conclusion.answer:
        assert re.search(r"\d.*\[.*\].*n = ", sentence)  # a number, its interval, its n


def test_the_page_needs_nothing_else_and_runs_nothing_of_a_model(folders) -> None:
    hostile = {"category": HOSTILE, "raws": [HOSTILE]}
    for (folder,) in folders.values():
        write_judged(folder, 30, text=lambda who, question: HOSTILE + plain_text(who, question))
        change_lines(folder / "evals/alpaca_eval/items.jsonl", lambda row: row | hostile)
    arms, design = load_arms(folders), Design(HOSTILE, HOSTILE)
    page = report_html(conclude(arms, design=design), arms, design)
    tags = Tags(page).found
    assert not [tag for tag in tags if tag[0] in ("img", "link", "iframe") or "src" in tag[1]]
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "default-src 'none'" in page and "\x1b" not in page and "49" not in page[:500]
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)


# Loads the report at the width of a phone or a screen, turns a page by button and key, asks for
# questions that r32 answers better, and writes what is there.
READER = """<iframe src="report/report.html" width="WIDTH" height="800"></iframe><pre></pre><script>
onload = () => setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument;
  const place = () => page.getElementById("place").textContent;
  const choose = (name, value) => {
    const select = page.getElementById("filters")[name];
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  const ticks = [...page.querySelectorAll(".ticks span span")];
  ticks.forEach((tick) => { tick.style.left = "100%"; });  // the end of the axis
  const ends = ticks.map((tick) => tick.getBoundingClientRect().right);
  const width = Math.max(page.documentElement.scrollWidth, ...ends);
  const seen = [place(), width <= WIDTH, page.images.length];
  page.getElementById("next").click();
  seen.push(place());
  page.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  seen.push(place(), page.querySelectorAll("#question .sides .text:not(.raw)").length);
  choose("better", "r32");
  choose("worse", "r8");
  seen.push(place().replace("1 of ", ""));
  choose("better", "r8");
  choose("worse", "r32");
  seen.push(place().replace("1 of ", ""));
  const style = (name) => document.defaultView.getComputedStyle(page.querySelector(name));
  seen.push(parseInt(style(".forest .label").fontSize) >= 12, style("body").backgroundColor);
  document.querySelector("pre").textContent = seen.join(", ");
}, 500);</script>"""


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "is_dark"), [(390, False), (390, True), (1100, True)])
def test_in_a_browser_questions_can_be_paged_and_filtered_by_who_answers_better(
    width, is_dark, folders, tmp_path
) -> None:
    """And a phone shows all of it, a dark screen on a dark page."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("no chromium") if os.environ.get("CI") else pytest.skip("no chromium")
    for (folder,) in folders.values():
        change_lines(
            folder / "evals/alpaca_eval/items.jsonl", lambda row: row | {"raws": [HOSTILE]}
        )
    arms = load_arms(folders)
    write_report(tmp_path / "report", conclude(arms), arms)
    (tmp_path / "reader.html").write_text(READER.replace("WIDTH", str(width)))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += ["--blink-settings=preferredColorScheme=0"] * is_dark
    command = [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", "reader.html"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    values = {arm: win_rate_values(folder) for arm, (folder,) in folders.items()}
    better = sum(values["r32"][id] > values["r8"][id] for id in values["r8"])
    worse = sum(values["r32"][id] < values["r8"][id] for id in values["r8"])
    assert better > worse > 0
    # two arms and the reference that both were judged against
    paper = "rgb(20, 25, 30)" if is_dark else "rgb(255, 255, 255)"
    expected = f"1 of 60, true, 0, 2 of 60, 3 of 60, 3, {better}, {worse}, true, {paper}</pre>"
    assert expected in done.stdout, done.stdout[-2000:]


def test_the_forest_has_whole_labels_a_dot_per_seed_and_the_better_side(tmp_path: Path) -> None:
    made: dict[str, list[Path]] = defaultdict(list)
    name = "questions-with-a-name-that-was-cut-in-the-middle"
    for arm, skill in (("r8", 0.4), ("r32-with-a-name-of-its-own", 0.8)):
        for seed in (1, 2, 3):
            folder = write_run(tmp_path, f"{arm}-s{seed}", seed=seed)
            values = [float((n + seed) % 10 < 10 * skill) for n in range(53)]
            write_values(folder, values, name=name)
            losses = [2.0 - skill + n / 100 for n in range(53)]
            write_values(
                folder, losses, metric="loss", name="held_out", unit="number", higher=False
            )
            made[arm].append(folder)
    arms = load_arms(made)
    conclusion = conclude(arms)
    page = report_html(conclusion, arms)
    figure = page.partition('id="forest">')[2].partition("</figure>")[0]
    assert "r32-with-a-name-of-its-own − r8: " in figure and "…" not in figure
    first_panel, second_panel = figure.split('class="panel"')[1:]
    by_name = {"loss" in panel: panel for panel in (first_panel, second_panel)}
    assert "← second arm better" in by_name[False] and "← first arm better" in by_name[True]
    assert by_name[False].count('class="seed"') == 3 and "points</span>" in by_name[False]
    places = [float(place) for place in re.findall(r"left:([\d.-]+)%", figure)]
    assert places and all(0 <= place <= 100 for place in places)
    curves = page.partition('id="curves">')[2].partition("</figure>")[0]
    assert curves.count("<polyline") == 18 and curves.count('class="arm"') == 2  # 3 of each run
    row = next(row for row in conclusion.table.rows if row.unit == "share")
    assert fmean(row.by_seed) == pytest.approx(row.difference)


def test_an_evaluation_is_called_by_its_title_that_of_now_before_the_recorded_one(tmp_path) -> None:
    folder = write_run(tmp_path, "r8")
    recorded = {"title": "support questions"}
    write_values(folder, [1.0, 0.0], metric="pass_rate_on_checks", recipe=recorded)
    (run,) = ours.read(folder)
    assert next(iter(run.metrics)).label == "pass rate on support questions"
    for title, label in (("tickets", "pass rate on tickets"), (None, "pass rate on checks")):
        ((_, run),) = load_arms({"r8": [folder]}, {"checks": title}).runs
        assert next(iter(run.metrics)).label == label
    eval = "evals/quickstart/house_style.yaml"
    settings = load_eval(eval, ["title=the style"]).settings_key()
    assert settings == load_eval(eval).settings_key()  # nothing is computed again


def win_rate_values(folder: Path) -> dict[str, float]:
    log = read_eval_log(folder / "evals/alpaca_eval/result.json")
    return {sample.id: sample.value or 0 for sample in log.metrics[0].samples}


def test_every_number_has_its_n_and_its_file(folders, tmp_path) -> None:
    """And no cell of the table is a formula."""
    write_values(folders["r8"][0], [1.0, 0.0] * 10, metric="=cmd()", name="formula")
    arms = load_arms({**folders, "=SUM(A1)": [write_run(tmp_path, "A2")]})
    conclusion = conclude(arms)
    write_report(tmp_path / "report", conclusion, arms)
    names = {"numbers.json", "numbers.csv", "report.md", "report.html"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    rows = json.loads((tmp_path / "report/numbers.json").read_text())
    kinds = {row["kind"] for row in rows}
    assert {"comparison", "score", "category", "training", "answers", "judge audit"} <= kinds
    for row in rows:
        assert row["n"] is not None, row
        assert row["kind"] in ("answers", "judge audit") or row["file"], row
    (row,) = (each for each in rows if each["kind"] == "comparison" and "win" in each["metric"])
    low, high = row["low_95_not_corrected"], row["high_95_not_corrected"]
    assert low < row["difference"] < high and row["verdict"] == "higher"
    with (tmp_path / "report/numbers.csv").open(newline="") as file:
        cells = [list(row.values()) for row in csv.DictReader(file)]
    assert len(cells) == len(rows)
    assert not [cell for row in cells for cell in row if cell.startswith("=")]
    text = (tmp_path / "report/report.md").read_text()
    said = [*conclusion.answer, *conclusion.cannot_say, table_of_tests(conclusion.table)]
    said += [f"- {finding.severity}: {finding.title}" for finding in conclusion.findings]
    for claims in conclusion.pairs.values():
        said += [" | ".join(cells) for cells in pair_rows(claims)]
    for line in said:  # a bar of a table ends a cell, and is no text
        assert re.sub(r"([\\`*<>])", r"\\\1", line) in text


def test_intervals_say_that_they_are_not_corrected_and_the_tests_at_which_level(folders) -> None:
    arms = load_arms(folders)
    for aims, said in (
        (Aims(), "2 tests, corrected together (Holm), at 5%."),
        (
            Aims("win_rate"),
            "2 tests, corrected together (Holm): 1 of the primary metric at 4%, 1 other at 1%.",
        ),
    ):
        conclusion = conclude(arms, aims)
        page, text = report_html(conclusion, arms), "\n".join(conclusion_lines(conclusion))
        for shown in (page, text):
            assert said in shown and "effect [95%, not corrected]" in shown
            assert "effect [95%]" not in shown


def test_a_page_of_two_runs_with_1_085_questions_is_small(tmp_path: Path) -> None:
    folders = {}
    for arm in ("a", "b"):
        folder = write_run(tmp_path, arm, steps=2000)
        write_judged(folder, 805, text=lambda who, question: plain_text(who, question) * 4)
        write_judged(folder, 80, name="other")
        write_values(folder, [float(n % 2) for n in range(200)])
        folders[arm] = [folder]
    arms = load_arms(folders)
    assert len(report_html(conclude(arms), arms)) <= 600_000


def test_a_page_of_long_questions_without_answers_is_small(tmp_path: Path) -> None:
    values = [float(n % 2) for n in range(500)]
    about = [{"input": f"Question {n}: {plain_text('who', str(n)) * 30}"} for n in range(500)]
    folders = {arm: [write_run(tmp_path, arm)] for arm in ("a", "b")}
    for (folder,) in folders.values():
        write_values(folder, values, about=about)
    arms = load_arms(folders)
    assert len(report_html(conclude(arms), arms)) <= 600_000


def test_curves_are_read_streaming_and_have_at_most_a_thousand_points(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_lines(file, ({"step": step, "loss": 1 / step} for step in range(1, 25_001)))
    tracemalloc.start()
    points = read_curves(file)["loss"].points
    assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 2
    tracemalloc.stop()
    assert 100 < len(points) <= MOST_POINTS
    assert points[0] == (1, 1.0) and points[-1] == (25_000, 1 / 25_000)
    gaps = {after[0] - before[0] for before, after in itertools.pairwise(points[:-1])}
    assert len(gaps) == 1  # evenly


@pytest.mark.slow
def test_100_000_judgments_are_a_report_in_ten_seconds(tmp_path: Path) -> None:
    folders = {}
    for arm in "abcde":
        folders[arm] = [write_run(tmp_path, arm)]
        write_judged(folders[arm][0], 10_000)
    started = time.process_time()
    arms = load_arms(folders)
    write_report(tmp_path / "report", conclude(arms), arms)
    assert time.process_time() - started < 10


def test_what_was_tuned_published_and_audited_is_shown(folders: dict[str, list[Path]]) -> None:
    for (folder,) in folders.values():
        log = read_eval_log(folder / "evals/alpaca_eval/result.json")
        write_log(replace(log, subset="60 of 805"))
    arms = load_arms(folders)
    tuned = {"r8": TunedArm("train.learning_rate", (1e-4, 2e-4), 2e-4, (1.31, None), 1042)}
    reference = {"r8": {"checks/pass_rate": 0.41}, "r32": {"mmlu": 0.4}}
    design = Design("study", "Does rank matter?", tuned=tuned, reference=reference)
    page = report_html(conclude(arms, design=design), arms, design)
    words = ["0.0002", "1.3100", "41.0%", "not measured"]
    assert all(word in page for word in (*words, "swap consistency", "60 of 805"))
    assert JUDGE.name in page


def test_an_arm_without_anything_is_a_page_too(tmp_path: Path) -> None:
    arms = load_arms({"a": [tmp_path / "gone"], "b": []})
    conclusion = conclude(arms, design=Design("s", "What?", missing=("train.a",), command="go"))
    assert "nothing to compare" in report_html(conclusion, arms)
    assert conclusion.cannot_say == ["Interim: train.a still missing. Fix: go."]


def test_an_interim_report_has_no_win_rate_of_one_arm_against_another(folders, tmp_path) -> None:
    """It is their difference, in scores and by category; nor are there intervals of one arm."""
    write_judged(folders["r32"][0], 60, against="study--r8", skill=0.8)
    arms = load_arms(folders)
    for missing in ((), ("training study--r64",)):
        conclusion = conclude(arms, design=Design("study", "Does rank matter?", missing=missing))
        write_report(tmp_path / "report", conclusion, arms)
        rows = json.loads((tmp_path / "report/numbers.json").read_text())
        kinds = {row["kind"] for row in rows}
        assert ("category" in kinds) == ("comparison" in kinds) == (not missing)
        scores = [row for row in rows if row["kind"] == "score"]
        assert any(row["opponent"] == "r8" for row in scores) == (not missing)
        has_intervals = any(row["low_95_not_corrected"] is not None for row in scores)
        assert scores and has_intervals == (not missing)


def test_every_question_of_a_study_stands_as_the_words_of_the_study() -> None:
    for question in ("Does r32 help?", "r32 beats r8 by 12 points.", "Why is r32\nbetter?"):
        words = " ".join(question.split())
        assert question_text(question) == f"The study asks, in its own words: {words}"
