"""Plain tables of scores are compared as they are, and each row that cannot be used is named."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table
from tests.analysis.made_up import compared

from recipes_lib.analysis.claims import Claim
from recipes_lib.analysis.pairs import BY_SEED
from recipes_lib.analysis.readers import known_forms, plain_table, read_results, read_word
from recipes_lib.cli import main
from recipes_lib.core.errors import DataError

Rows = Sequence[dict[str, Any]]


def csv_file(file: Path, rows: Rows) -> Path:
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join("" if cell is None else str(cell) for cell in row.values()))
    file.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return file.with_suffix(".csv")


def jsonl_file(file: Path, rows: Rows) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.with_suffix(".jsonl").write_text(text)
    return file.with_suffix(".jsonl")


def parquet_file(file: Path, rows: Rows) -> Path:
    write_table(pyarrow.Table.from_pylist(list(rows)), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


def scores(chance: float, n: int = 300, seed: int = 0, **cells: Any) -> list[dict[str, Any]]:
    """Rows of questions, each as hard in every arm, and right by a chance that grows with skill."""
    hard, rng = random.Random(1), random.Random(f"{chance}{seed}")
    rows = []
    for number in range(n):
        share = min(1.0, hard.random() * 0.6 + chance)
        rows.append({"question": f"q{number}", "score": int(rng.random() < share)} | cells)
    return rows


def claims_of(*files: Path) -> list[Claim]:
    return list(compared(*files).claims)


@pytest.mark.parametrize("write", [csv_file, jsonl_file, parquet_file])
def test_two_tables_and_one_with_arms_say_the_same(
    tmp_path: Path, write: Callable[[Path, Rows], Path]
) -> None:
    first, second = scores(0.1), scores(0.4)
    (apart,) = claims_of(write(tmp_path / "r8", first), write(tmp_path / "r32", second))
    both = [row | {"arm": "r8"} for row in first] + [row | {"arm": "r32"} for row in second]
    (together,) = claims_of(write(tmp_path / "both", both))
    assert apart.sentence == together.sentence and apart.verdict == "higher"
    assert apart.sentence.startswith("r32 scored better than r8 in score: ")
    assert apart.row.n == 300 and apart.row.unit == "share"
    assert apart.row.second_value == sum(row["score"] for row in first) / 300


def test_losses_are_numbers_and_lower_is_better(tmp_path: Path) -> None:
    rng = random.Random(0)
    losses = [2 + rng.random() for _ in range(100)]
    rows = [
        {"question": n, "score": loss, "metric": "loss", "higher_is_better": "false"}
        for n, loss in enumerate(losses)
    ]
    lower = [row | {"score": row["score"] - rng.random()} for row in rows]
    (claim,) = claims_of(csv_file(tmp_path / "a", rows), csv_file(tmp_path / "b", lower))
    assert claim.row.unit == "number" and claim.row.higher_is_better is False
    assert claim.verdict == "higher" and claim.sentence.startswith("b scored better than a in loss")


def test_each_seed_is_a_training_and_is_paired_with_the_same_seed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for seed in (3, 1, 2):
        rows += scores(0.1, seed=seed, arm="r8", seed_=seed)
        rows += scores(0.4, seed=seed + 9, arm="r32", seed_=seed)
    rows = [{"seed" if key == "seed_" else key: row[key] for key in row} for row in rows]
    (claim,) = claims_of(csv_file(tmp_path / "both", rows))
    assert claim.verdict == "better" and claim.row.trainings == (3, 3)
    assert "3 trainings each" in claim.sentence and "another seed" not in claim.sentence
    left = [row for row in rows if (row["arm"], row["seed"]) != ("r8", 2)]
    (claim,) = claims_of(csv_file(tmp_path / "both", left))
    assert claim.row.trainings == (2, 2) and claim.row.flags == (BY_SEED, "left out: r32-seed2")
    rows[-1]["seed"] = None
    with pytest.raises(DataError, match=r"both\.csv:1801: give a seed to each row of r32, or to"):
        read_results(csv_file(tmp_path / "both", rows))


def test_arms_keep_names_of_any_script(tmp_path: Path) -> None:
    rows = scores(0.1, arm="日本") + scores(0.4, arm="中国")
    (claim,) = claims_of(csv_file(tmp_path / "both", rows))
    assert claim.sentence.startswith("中国 scored better than 日本 in score")


def test_a_file_whose_name_is_a_pattern_is_not_taken_for_others(tmp_path: Path) -> None:
    csv_file(tmp_path / "a", scores(0.4))
    file = csv_file(tmp_path / "[ab]", scores(0.1))
    assert [run.folder for run in read_word(f"arm={file}")] == [file]


def test_scores_that_are_missing_count_both_ways(tmp_path: Path) -> None:
    first, second = scores(0.1), scores(0.4)
    for row in second[:20]:
        row["score"] = None
    files = csv_file(tmp_path / "a", first), csv_file(tmp_path / "b", second[:-30])
    (claim,) = claims_of(*files)
    assert claim.row.n == 300 and claim.row.test is not None
    assert claim.row.test.unresolved == 50 and "50 without a verdict" in claim.sentence
    assert claim.row.flags == ("270 common questions of 300",)
    only_wins = [row for row in first if row["score"]]
    (claim,) = claims_of(csv_file(tmp_path / "a", only_wins), files[1])
    assert claim.verdict == "not shown"


def test_questions_of_one_text_are_one_and_other_texts_under_one_id_are_an_error(tmp_path) -> None:
    rows = [row | {"text": f"text {n // 3}"} for n, row in enumerate(scores(0.2))]
    other = [row | {"text": f"text {n // 3}"} for n, row in enumerate(scores(0.4))]
    (claim,) = claims_of(csv_file(tmp_path / "a", rows), csv_file(tmp_path / "b", other))
    assert claim.row.test is not None and claim.row.test.resolved.questions == 100
    other[0]["text"] = "another"
    (claim,) = claims_of(csv_file(tmp_path / "a", rows), csv_file(tmp_path / "b", other))
    assert [finding.code for finding in claim.stopped_by] == ["texts-differ"]


def test_every_row_that_cannot_be_used_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    cells = ["q1,1,0", "q2,right,0", "q1,0,0", ",1,0", "q3,inf,0", "q4,1,one", "q5,1", "q6,nan,0"]
    cells.append("q7,1e308,0")
    file.write_text("question,score,seed\n" + "\n".join(cells) + "\n")
    with pytest.raises(DataError) as caught:
        read_results(file)
    text = str(caught.value)
    for line, what in ((3, "score 'right'"), (4, "a second score of x for question 'q1'"),
                       (5, "question ''"), (6, "score 'inf'"), (7, "seed 'one'"),
                       (8, "not 3 fields"), (10, "score '1e308'")):  # fmt: skip
        assert f"x.csv:{line}: {what}" in text
    assert "x.csv:2" not in text and "x.csv:9" not in text
    file.write_text('{"question": 1, "score": true}\n{"question": 1, "score": 0.5}\nnothing\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: a second score.*\n.*x\.jsonl:3: .* not JSON"):
        read_results(file.rename(tmp_path / "x.jsonl"))
    file.write_text("question,score,higher_is_better\n1,1,yes\n2,1,no\n")
    with pytest.raises(DataError, match=r"x\.csv:3: higher_is_better of score"):
        read_results(file)
    file.write_text("question,score,arm\n1,1,a b\n2,1,a/b\n")
    with pytest.raises(DataError, match=r"x\.csv:3: arm 'a/b' would be a-b, as 'a b' is"):
        read_results(file)


def test_a_table_beside_its_copy_is_named(tmp_path: Path) -> None:
    first = csv_file(tmp_path / "a", scores(0.3))
    other = csv_file(tmp_path / "b", scores(0.3, seed=1))
    copy = tmp_path / "copy.csv"
    copy.symlink_to(first)
    for second, is_copy in ((copy, True), (other, False)):
        codes = [finding.code for finding in compared(first, second).findings]
        assert ("same-scores" in codes) == is_copy


def test_a_wrong_header_shows_the_form(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    for header, what in (
        ("id,score", "no column question, the columns are 'id', 'score'"),
        ("Question,Score", r"no column question, no column score[\s\S]*did you mean question\?"),
        ("question,score,higher_is_beter", r"did you mean higher_is_better\?"),
        ("question;score", "the header has one column"),
    ):
        file.write_text(f"{header}\n1{',1' * header.count(',')}\n")
        with pytest.raises(DataError, match=what):
            read_results(file)
    file.write_text("question,score\n")
    with pytest.raises(DataError, match=r"^\S+: it has no rows"):
        read_results(file)
    assert plain_table.FORM in known_forms()


def test_the_help_of_compare_has_the_form_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    columns = plain_table.FORM.partition(") ")[2]
    assert columns in " ".join(capsys.readouterr().out.split())


def test_a_report_is_a_file_and_no_folder(tmp_path: Path, capsys) -> None:
    file = str(csv_file(tmp_path / "a", scores(0.1)))
    for folder in ("", str(tmp_path)):
        assert main(["compare", file, "--html", folder]) == 2
        assert "this is a folder" in capsys.readouterr().err


def test_a_result_that_one_arm_has_alone_is_named(tmp_path: Path, capsys) -> None:
    files = [csv_file(tmp_path / name, scores(0.1, seed=n)) for n, name in enumerate("ab")]
    files.append(jsonl_file(tmp_path / "c", scores(0.1, metric="other\nmetric")))
    assert main(["compare", *map(str, files)]) == 0
    assert (
        "warning: c alone has other metric, which is compared with nothing"
        in capsys.readouterr().out
    )
    assert main(["compare", *map(str, files[:2])]) == 0
    assert "compared with nothing" not in capsys.readouterr().out
