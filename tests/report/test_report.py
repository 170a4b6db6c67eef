"""A report is a function of stored rows: the same bytes each time, every number with its n and
file, every text as data.
"""

from __future__ import annotations

import csv
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic_runs

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.design import load_study
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.measurements import read_measurements
from recipes_lib.compare.published import Published, PublishedNumber
from recipes_lib.compare.validity import check_validity
from recipes_lib.core.project import project_root
from recipes_lib.report.content import Content, gather
from recipes_lib.report.documents import (
    markdown,
    report_html,
    report_latex,
    report_markdown,
    samples_json,
    tex,
    write_report,
)
from recipes_lib.report.figures import COLORS, draw_comparison
from recipes_lib.report.numbers import number_rows, numbers_csv, numbers_json
from recipes_lib.report.provenance import commands
from recipes_lib.report.samples import MAX_CHARACTERS, SampleSet


class Page(HTMLParser):
    """Tags, attributes and the text outside scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.tags or self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)


def test_writing_a_report_twice_gives_the_same_bytes(make_content, tmp_path):
    content = make_content()
    first = {
        path.relative_to(tmp_path / "a"): path.read_bytes()
        for path in write_report(tmp_path / "a", content)
    }
    second = {
        path.relative_to(tmp_path / "b"): path.read_bytes()
        for path in write_report(tmp_path / "b", content)
    }
    assert first == second
    assert {"report.html", "report.md", "report.tex", "numbers.csv", "numbers.json"} <= {
        str(path) for path in first
    }


def test_figures_of_an_earlier_report_are_removed(make_content, tmp_path):
    old = tmp_path / "report" / "figures" / "old.svg"
    old.parent.mkdir(parents=True)
    old.write_text("x")
    write_report(tmp_path / "report", make_content())
    assert not old.exists()


def test_every_number_has_n_and_a_file(make_content):
    for row in number_rows(make_content()):
        if row.kind in (
            "score",
            "comparison",
            "by category",
            "by length",
            "judge audit",
            "noise floor",
        ):
            assert row.n is not None and row.file, row


def test_numbers_agree_between_csv_and_json(make_content):
    content = make_content()
    table = list(csv.DictReader(numbers_csv(content).splitlines()))
    values = json.loads(numbers_json(content))["numbers"]
    assert len(table) == len(values)
    for line, value in zip(table, values, strict=True):
        assert line["value"] == ("" if value.get("value") is None else str(value["value"]))


def test_no_csv_cell_is_a_formula(make_content):
    for line in csv.reader(numbers_csv(make_content(hostile=True)).splitlines()):
        for cell in line:
            if cell[:1] in "=+@\t" and cell:
                raise AssertionError(cell)
            assert not cell.startswith("-") or re.fullmatch(r"-\d[\d.e+-]*", cell), cell


def test_the_page_needs_nothing_else(make_content):
    content = make_content()
    page = Page(report_html(content, draw_comparison(content, ("svg",))))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/svg+xml;base64,")), value


def test_hostile_text_adds_no_tag_and_no_attribute(make_content):
    plain, hostile = make_content(), make_content(hostile=True)
    pages = [Page(report_html(content, ())) for content in (plain, hostile)]
    known = {tag for tag, _ in pages[0].tags} | {"ul", "li", "details", "summary", "b"}
    assert {tag for tag, _ in pages[1].tags} <= known
    assert sum(tag == "script" for tag, _ in pages[1].tags) == 2
    assert not any(name.startswith("on") for _, attributes in pages[1].tags for name in attributes)


def test_samples_cannot_leave_their_script_element(make_content):
    text = samples_json(make_content(hostile=True).samples)
    assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text)["samples"]


def test_control_characters_are_shown_not_obeyed(make_content):
    content = make_content(hostile=True)
    for text in (report_html(content, ()), samples_json(content.samples)):
        assert "\x1b" not in text and "\u202e" not in text and "\\u001b" not in text
    assert "\\\\x1b" in samples_json(content.samples)


def test_a_long_answer_is_cut_and_says_so():
    found = SampleSet()
    place = found.text("x" * 10_000_000)
    assert len(found.texts[place]) < MAX_CHARACTERS + 100
    assert "10,000,000 characters in all" in found.texts[place]


def test_the_first_thing_on_the_page_is_the_answer(make_content):
    content = make_content()
    text = report_html(content, ())
    place = text.index('id="answer"')
    assert place < text.index('id="table"') < text.index('id="samples"')
    assert all(
        sentence.split(":")[0] in text[place : place + 4000]
        for sentence in content.comparison.answer[:2]
    )


def test_every_comparison_sentence_of_the_report_comes_from_claims(make_content):
    content = make_content()
    allowed = {row.sentence for row in content.comparison.rows} | set(content.comparison.answer)
    text = " ".join(Page(report_html(content, ())).words)
    for found in re.findall(r"[\w-]+ is (?:better|worse) than [\w-]+[^.]*\.", text):
        assert any(found.split(":")[0] in sentence for sentence in allowed), found


def test_errors_are_open_and_stop_the_claim_on_the_page(make_content):
    error = Finding(
        "judge-audit",
        "error",
        "The judge failed its audit",
        ("swap consistency 0.3",),
        "use another judge",
    )
    text = report_html(make_content(findings=(error,)), ())
    assert "No claim about" in text and "1 error" in text and "swap consistency 0.3" in text
    assert "no claim" in text


def test_markdown_escapes_what_would_be_markup():
    assert markdown("<b>|x|*y*\n# z") == r"\<b\>\|x\|\*y\* \# z"


@pytest.mark.parametrize(
    "text", [r"\input{/etc/passwd}", "^^5c", "100% $x$ a_b & c # ~", "日本", "\x1b[0m", "A" * 5000]
)
def test_latex_specials_are_escaped(text):
    shown = tex(text)
    for command in re.findall(r"\\[a-zA-Z]+", shown):
        assert command in {
            r"\textbackslash",
            r"\textasciicircum",
            r"\textasciitilde",
            r"\allowbreak",
            r"\textless",
            r"\textgreater",
        }
    assert "^^" not in shown and len(shown) < 4000


def test_the_latex_source_is_escaped_by_default(make_content):
    source = report_latex(make_content(hostile=True), ())
    assert r"\input{" not in source and r"\write18" not in source
    assert source.count(r"\end{document}") == 1


def test_an_arm_has_one_colour_in_every_figure(make_content):
    content = make_content(names=("base", "r8", "r32"))
    drawn = {
        figure.title: figure.files["svg"].decode() for figure in draw_comparison(content, ("svg",))
    }
    ours = COLORS[:3]  # base, r8, r32
    against_r8 = drawn[
        "AlpacaEval win rate against r8, by category"
    ]  # r32 alone was judged against r8
    assert [color in against_r8 for color in ours] == [False, False, True]
    for title in ("Training loss per token", "AlpacaEval win rate against reference, by category"):
        assert all(color in drawn[title] for color in ours)


def effects_of(content: Content) -> list[bytes]:
    drawn = draw_comparison(content, ("svg",))
    return [figure.files["svg"] for figure in drawn if figure.name == "effects"]


def with_rows(content: Content, **changes: object) -> Content:
    rows = [replace(row, **changes) for row in content.comparison.rows]
    return replace(content, comparison=replace(content.comparison, rows=rows))


def test_the_first_picture_is_of_the_effects_whose_claims_stand(make_content):
    content = make_content()
    page = report_html(content, draw_comparison(content, ("svg",)))
    assert page.index('alt="Effects"') < page.index("<nav>")
    assert "![Effects](figures/effects.svg)" in report_markdown(
        content, draw_comparison(content, ("svg",))
    )
    (drawn,) = effects_of(content)
    flipped = {"better": "no difference shown", "no difference shown": "better"}
    first = content.comparison.rows[0]
    assert first.verdict in flipped and first.claimed
    shown, hidden, margin = (
        effects_of(with_rows(content, **change))
        for change in (
            {"verdict": flipped[first.verdict]},
            {"stopped": ("an error",)},
            {"margin": 0.05},
        )
    )
    assert shown != [drawn] and margin != [drawn] and hidden == []


def test_latex_and_markdown_say_how_many_items_are_open_and_which_arms_a_finding_concerns(
    make_content,
):
    content = make_content(
        findings=(Finding("test", "note", "Something differs", (), "", ("r8", "r32")),)
    )
    source, text = report_latex(content, ()), report_markdown(content, ())
    assert (
        "Something differs (r8, r32)" in source
        and "160 (1 open)" in source
        and "160 (1 open)" in text
    )
    assert "n/a n/a" not in source + text


def test_a_column_that_no_row_has_a_value_for_is_left_out(make_content):
    content = make_content()
    bare = replace(
        content,
        comparison=replace(
            content.comparison,
            rows=tuple(replace(row, flags=()) for row in content.comparison.rows),
        ),
    )
    full = replace(
        content,
        comparison=replace(
            content.comparison,
            rows=tuple(replace(row, flags=("x",)) for row in content.comparison.rows),
        ),
    )
    assert "<th>flags</th>" in report_html(full, ()) and "<th>flags</th>" not in report_html(
        bare, ()
    )
    assert "<th>published</th>" not in report_html(full, ())


def test_one_arm_alone_and_runs_without_evaluations_give_a_report(make_content, tmp_path):
    content = make_content(names=("only",))
    assert content.comparison.rows == ()
    assert "Nothing can be compared" in report_html(content, ())


def test_three_arms_with_805_questions_are_written_in_seconds(make_content, tmp_path):
    content = make_content(n=805, names=("base-like", "r8", "r32"))
    begun = time.process_time()
    text = report_html(content, ())
    assert time.process_time() - begun < 5
    assert len(text) < 20_000_000 and len(content.samples.samples) > 3000


def test_unresolved_items_are_shown_with_their_bounds(make_content):
    content = make_content()
    score = next(
        score
        for score in content.comparison.scores
        if score.metric == "mt_bench/grade" and score.arm == "r32"
    )
    assert score.unresolved == 1 and score.lowest < score.value < score.highest
    assert f"({score.lowest:.2f} .. {score.highest:.2f})" in report_html(content, ())


def test_nothing_in_a_report_is_a_secret(make_content, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    for path in write_report(tmp_path / "report", make_content()):
        assert b"hf_abcdefghijklmnop" not in Path(path).read_bytes()


def test_what_is_not_measured_stands_on_top(make_content, tmp_path):
    text = report_html(replace(make_content(), banners=("Not measured yet: a.",)), ())
    assert text.index("Not measured yet: a.") < text.index('id="table"')


def test_a_reason_and_a_warning_are_said_once(make_content):
    reason = "The judge failed its audit somewhere"
    content = make_content(
        names=("r8", "r16", "r32"),
        findings=(Finding("judge-failed-audit", "error", reason, ("0.3",), "another judge"),),
    )
    text = report_markdown(content, ())
    assert (
        all(row.sentence.startswith("No claim about") for row in content.comparison.rows)
        and len(content.comparison.rows) > 6
    )
    clause = reason[0].lower() + reason[1:]
    assert sum(clause in sentence for sentence in content.comparison.answer) == 1
    listed = text[text.index("## Comparisons") : text.index("## Findings")]
    assert (
        listed.count(clause) == 1
        and listed.count("No claim about") == len(content.comparison.rows) - 1
    )
    assert text.count(reason) == 1
    page = report_html(content, ())
    assert page.count(clause) == 2 and page.count(reason) == 1


def test_commands_hold_no_path_of_this_machine(make_content, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    make_content()
    python, root = "/opt/venv/bin/python", project_root()
    for folder in (tmp_path / "runs").iterdir():
        recipe = f"{root}/recipes/quickstart/lora-r8.yaml"
        (folder / "command.txt").write_text(
            f"{python} -m recipes_lib.train {recipe} model.name_or_path=/data/models/llama\n"
        )
        for file in folder.glob("evals/lm_eval/result.json"):
            result = json.loads(file.read_text())
            told = (
                "(cd ../../somewhere/else && lm_eval run --model_args"
                f" pretrained=/data/models/llama,peft={folder}/adapter)"
            )
            file.write_text(
                json.dumps(
                    result
                    | {
                        "lm_eval_command": told,
                        "command": f"{python} -m recipes_lib.cli eval {root}/evals/a.yaml",
                    }
                )
            )
    study = load_study(root / "recipes/studies/quickstart.yaml")
    measurements = read_measurements(
        {folder.name: [folder] for folder in sorted((tmp_path / "runs").iterdir())}
    )
    told = dict(commands(measurements, study))
    assert (
        told["Trainings, as they were started"]
        == (
            (
                "python -m recipes_lib.train recipes/quickstart/lora-r8.yaml"
                " model.name_or_path=.../llama"
            ),
        )
        * 2
    )
    assert "recipes eval evals/a.yaml" in told["Evaluations, as they were started"]
    assert (
        told["lm-eval alone, the same numbers"][0]
        == "(cd .../else && lm_eval run --model_args pretrained=.../llama,peft=runs/r32/adapter)"
    )


def test_what_a_result_warns_of_is_a_finding_and_no_second_time_on_top(make_content, tmp_path):
    make_content()
    warned = (
        "Weak judge: it cannot judge. This judge failed its audit: swap consistency 0.00 (needs >="
        " 0.6)."
    )
    for file in (tmp_path / "runs").glob("*/evals/*/result*.json"):
        result = json.loads(file.read_text())
        if result["judge"]:
            result["judge"]["weak"] = "it cannot judge"
            result["audit"]["banner"] = warned
            file.write_text(
                json.dumps(
                    result
                    | {
                        "banners": [warned, "subset, n=40 of 805"],
                        "missing_references": ["7"],
                    }
                )
            )
    folders = {folder.name: [folder] for folder in sorted((tmp_path / "runs").iterdir())}
    measurements = read_measurements(folders)
    content = gather(
        "study", measurements, compare_arms(measurements, check_validity(None, measurements))
    )
    text = report_markdown(content, ())
    assert text.count("it cannot judge") == 1 and "Weak judge:" not in text
    assert text.count("1 questions need a reference answer") == 2  # of two evaluations


def test_a_number_means_the_same_in_the_table_and_in_the_csv(make_content):
    content = make_content()
    (row,) = (row for row in content.comparison.rows if row.head_to_head)
    (cells,) = (
        cells
        for cells in number_rows(content)
        if cells.kind == "comparison" and cells.against == "head to head"
    )
    assert cells.value == row.first_value and cells.unit == "share"
    assert (cells.low, cells.high) == (
        row.tested.low + 0.5,
        row.tested.high + 0.5,
    ) and cells.low < cells.value < cells.high
    number = PublishedNumber(
        "r8",
        "t",
        "win",
        "win %",
        85.0,
        "85.00",
        interval=(82.0, 88.0),
        beside="alpaca_eval/win_rate",
        factor=0.01,
    )
    told = Published(
        Path("p.yaml"), "a report", "somewhere", (number, replace(number, beside=None)), {"t": "t"}
    )
    ours, other = (
        cells
        for cells in number_rows(replace(content, published=told))
        if cells.kind == "published"
    )
    assert (ours.value, ours.low, ours.high) == pytest.approx(
        (0.85, 0.82, 0.88)
    ) and other.value == 85.0


def test_a_spread_between_seeds_is_in_points_and_no_percentage(tmp_path):
    folders = [synthetic_runs.write_run(tmp_path, f"r8-{seed}", seed=seed) for seed in (42, 43)]
    for folder, skill in zip(folders, (0.4, 0.6), strict=True):
        synthetic_runs.write_lm_eval(folder, 200, skill=skill)
    measurements = read_measurements({"r8": folders})
    (floor,) = gather("study", measurements, compare_arms(measurements)).floor
    means = [
        sum(item.value for item in run.evals[0].measures[0].samples) / 200
        for run in measurements.arms["r8"].runs
    ]
    assert (
        floor.value == pytest.approx(abs(means[0] - means[1]) / 2**0.5) and floor.unit == "points"
    )
    assert f"{100 * floor.value:.1f} points" in report_markdown(
        gather("study", measurements, compare_arms(measurements)), ()
    )


def test_what_a_resumed_run_cost_is_not_told_as_the_whole(make_content, tmp_path):
    make_content()
    folder = tmp_path / "runs" / "r8"
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"resumed": [{"from": "checkpoint-20"}]}))
    result = json.loads((folder / "evals/alpaca_eval/result.json").read_text())
    result["answers"] |= {"fingerprint": "w", "generated_now": {"new_tokens": 90, "seconds": 1.5}}
    result["answers"]["tokens"] = 2000
    (folder / "evals/alpaca_eval/result.json").write_text(json.dumps(result))
    measurements = read_measurements({name: [tmp_path / "runs" / name] for name in ("r8", "r32")})
    told = {
        (cost.arm, cost.what): cost
        for cost in gather("study", measurements, compare_arms(measurements)).costs
    }
    assert (
        told["r8", "training, its last attempt alone"].tokens is None
        and ("r8", "training") not in told
    )
    assert ("r8", "answers, alpaca_eval, the last 90 of 2,000 tokens") in told
    assert told["r32", "training"].tokens == 400_000 and ("r32", "answers, alpaca_eval") in told


def test_each_arm_has_its_device_hours_and_its_peak_memory_beside_the_plan(make_content, tmp_path):
    make_content()
    for name, changes in (
        ("r8", {"resumed": [{"from": "checkpoint-20"}]}),
        ("r32", {"summary": {"seconds": 3600.0, "world_size": 2, "planned_peak_memory_gib": 12.5}}),
    ):
        path = tmp_path / "runs" / name / "run.json"
        state = json.loads(path.read_text())
        summary = state["summary"] | changes.pop("summary", {})
        path.write_text(json.dumps(state | changes | {"summary": summary}))
    measurements = read_measurements({name: [tmp_path / "runs" / name] for name in ("r8", "r32")})
    content = gather("study", measurements, compare_arms(measurements))
    one, other = content.arm_costs
    assert (one.arm, one.partial, other.arm, other.partial) == ("r8", True, "r32", False)
    assert (other.runs, other.training) == (1, 2.0) and other.device_hours >= 2.0
    hours = [
        number for number in number_rows(content) if (number.group or "").startswith("all runs")
    ]
    assert [(number.arm, number.group) for number in hours] == [
        ("r8", "all runs, at least"),
        ("r32", "all runs"),
    ]
    for form in (report_html, report_markdown, report_latex):
        text = form(content, ())
        assert "(planned 12.50)" in text and "at least " in text


def test_a_long_text_that_stands_in_many_samples_is_one_cut_text() -> None:
    """The same question is asked of every arm."""
    found = SampleSet()
    places = [
        found.text(text)
        for text in (
            "a" * (MAX_CHARACTERS + 1),
            "short",
            "a" * (MAX_CHARACTERS + 1),
            "b" * (MAX_CHARACTERS + 1),
        )
    ]
    assert (places, found.cut_texts) == ([0, 1, 0, 2], 2)
    assert found.texts[0].endswith("[cut here: 8,001 characters in all]")
