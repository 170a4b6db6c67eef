"""NAME=GLOB puts several trainings into one arm, whichever program evaluated them."""

import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.analysis.made_up import write_run, write_values

from recipes_lib.analysis.claims import Claim, Conclusion, conclude
from recipes_lib.analysis.pairs import BY_SEED, EXCHANGEABLE
from recipes_lib.analysis.printed_commands import commands
from recipes_lib.analysis.readers import read_word
from recipes_lib.analysis.runs import Arms, arms_of
from recipes_lib.cli import main
from recipes_lib.core.errors import DataError, RecipeError

Scores = NDArray[np.float64]  # trainings x questions
WORDS = ("a=a-s*", "b=b-s*")


def table(path: Path, scores: Scores) -> None:
    """Write one training as a table without a seed."""
    rows = [f"q{number},{score:g}\n" for number, score in enumerate(scores)]
    path.with_suffix(".csv").write_text("question,score\n" + "".join(rows))


def lm_eval_folder(path: Path, scores: Scores) -> None:
    """Write one training as a folder of lm-eval."""
    date = "2026-01-01T00-00-00.0"
    path.mkdir(exist_ok=True)
    rows = []
    for number, score in enumerate(scores):
        row = {"doc_id": number, "doc": {"question": f"q{number}"}, "filter": "none"}
        rows.append(json.dumps(row | {"doc_hash": f"h{number}", "prompt_hash": "p", "acc": score}))
    (path / f"samples_arc_{date}.jsonl").write_text("\n".join(rows) + "\n")
    results = {
        "results": {"arc": {"alias": "arc", "acc,none": float(scores.mean())}},
        "configs": {"arc": {}},
        "higher_is_better": {"arc": {"acc": True}},
        "n-shot": {"arc": 0},
        "config": {"model_args": f"pretrained={path.name}"},
        "model_name": path.name,
    }
    (path / f"results_{date}.json").write_text(json.dumps(results))


def arms_from(*words: str) -> Arms:
    return arms_of([run for word in words for run in read_word(word)])


def concluded(*words: str) -> Conclusion:
    return conclude(arms_from(*words))


def only_claim(*words: str) -> Claim:
    (claim,) = concluded(*words).claims
    return claim


def drawn(rng: np.random.Generator, n: int, shift: float = 0.0, deviation: float = 0.03) -> Scores:
    """Three trainings that differ by `deviation`, on questions as hard for each arm."""
    hard = np.random.default_rng(7).uniform(-0.15, 0.15, n)
    skill = 0.5 + shift + deviation * rng.uniform(-math.sqrt(3), math.sqrt(3), (3, 1))
    return (rng.random((3, n)) < skill + hard).astype(float)


def write_arms(write: Callable[[Path, Scores], None], first: Scores, second: Scores) -> None:
    for name, trainings in (("a", first), ("b", second)):
        for number, scores in enumerate(trainings):
            write(Path(f"{name}-s{number}"), scores)


@pytest.fixture
def rng(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.random.Generator:
    monkeypatch.chdir(tmp_path)
    return np.random.default_rng(3)


@pytest.mark.parametrize("write", [table, lm_eval_folder])
def test_trainings_without_seeds_are_exchangeable_and_the_sentence_says_so(write, rng) -> None:
    write_arms(write, drawn(rng, 300), drawn(rng, 300, shift=0.3))
    claim = only_claim(*WORDS)
    assert claim.verdict == "better" and claim.row.trainings == (3, 3)
    assert claim.row.arms == ("b", "a") and claim.row.flags == (EXCHANGEABLE,)
    assert f"3 trainings each ({EXCHANGEABLE})." in claim.sentence
    assert "another seed" not in claim.sentence
    once = only_claim("a=a-s0*", "b=b-s1*")
    assert once.verdict == "higher" and "One training each" in once.sentence
    beside_a_model = only_claim("a-s0.csv" if write is table else "a-s0", "b=b-s*")
    assert beside_a_model.row.trainings == (3, 0) and beside_a_model.verdict == "better"


def test_runs_of_this_project_are_paired_by_their_seeds(rng, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    for name, shift in (("a", 0.0), ("b", 0.3)):
        for seed, scores in zip((42, 43, 44), drawn(rng, 300, shift), strict=True):
            write_values(write_run(tmp_path / "runs", f"{name}-s{seed}", seed=seed), list(scores))
    for words in (WORDS, ("a=runs/a-s*", "b=runs/b-s*")):  # their names, or their folders
        claim = only_claim(*words)
        assert claim.verdict == "better" and BY_SEED in claim.row.flags
        assert claim.row.trainings == (3, 3) and not claim.cause
    shutil.copytree("runs/a-s42", "runs/a-s42-again")
    with pytest.raises(DataError, match="second training of a with seed 42"):
        read_word("a=a-s*")


def test_other_seeds_are_said_and_one_file_may_have_all_trainings_of_an_arm(rng) -> None:
    for name, seeds in (("a", (1, 2, 3)), ("b", (1, 2, 3)), ("c", (4, 5, 6))):
        rows = []
        for seed, scores in zip(seeds, drawn(rng, 100), strict=True):
            rows += [f"q{number},{score:g},{seed}\n" for number, score in enumerate(scores)]
        Path(f"{name}.csv").write_text("question,score,seed\n" + "".join(rows))
    for first in ("a.csv", "a=a.csv"):
        assert only_claim(first, "b=b.csv").row.flags == (BY_SEED,)
        row = only_claim(first, "c.csv").row
        assert row.flags == ("different seeds in each arm",) and row.trainings == (3, 3)


def test_trainings_that_have_no_partner_are_named(rng) -> None:
    write_arms(table, drawn(rng, 100), drawn(rng, 100))
    Path("a-s1.csv").unlink()
    claim = only_claim(*WORDS)
    assert claim.row.trainings == (2, 2) and claim.row.flags == (EXCHANGEABLE, "left out: b-s2")


def test_one_training_does_not_count_twice(rng) -> None:
    write_arms(table, drawn(rng, 100), drawn(rng, 100, shift=0.3))
    shutil.copy("a-s0.csv", "a-s9.csv")
    claim = only_claim(*WORDS)
    assert claim.verdict == "no verdict"
    assert "2 trainings of a have the same answers and scores" in claim.sentence
    with pytest.raises(RecipeError, match=r"a-s0\.csv is in two arms: a and x"):
        concluded("a=a-s*", "x=a-s0*")


def test_a_name_without_results_or_with_several_models_is_refused(rng) -> None:
    with pytest.raises(RecipeError, match="NAME=GLOB"):
        read_word("a=nothing*")
    with pytest.raises(RecipeError, match="NAME=GLOB"):
        read_word("a=")
    Path("both.csv").write_text("question,score,arm\n1,1,r8\n1,1,r32\n")
    with pytest.raises(DataError, match=r"both\.csv: holds r8 and r32, and a is one arm"):
        read_word("a=both.csv")
    Path("lr=1.csv").write_text("question,score\n1,1\n")
    (run,) = read_word("lr=1.csv")  # a path that is there is no pattern
    assert run.arm == ""


@pytest.mark.parametrize("pattern", [".", "/", "**a", "[", ""])
def test_a_pattern_that_matches_no_results_is_refused(pattern: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no results"):
        read_word(f"a={pattern}")


def test_the_command_of_a_report_has_the_patterns(rng, capsys) -> None:
    write_arms(table, drawn(rng, 100), drawn(rng, 100))
    ((_, (line,)),) = commands(arms_from(*WORDS), None, {})
    assert shlex.split(line) == ["recipes", "compare", *WORDS]
    assert main(["compare", *WORDS, "--html", "report.html"]) == 0
    assert EXCHANGEABLE in capsys.readouterr().out
    assert EXCHANGEABLE in Path("report.html").read_text()
    assert main(["compare", "--help"]) == 0
    assert "NAME=GLOB" in capsys.readouterr().out


STUDIES = pytest.mark.parametrize(
    "studies",
    [pytest.param(100, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.nightly)],
)


@STUDIES
@pytest.mark.parametrize("deviation", [0.0, 0.06])
@pytest.mark.parametrize("write", [table, lm_eval_folder])
def test_claims_about_equal_arms_are_seldom_false(write, deviation, studies, rng) -> None:
    """Through the files, the reader and the claims; 5.3% are promised (docs/statistics.md)."""
    false = 0
    for _ in range(studies):
        write_arms(write, *(drawn(rng, 80, deviation=deviation) for _ in "ab"))
        false += only_claim(*WORDS).verdict in ("better", "worse")
    assert false / studies <= 0.053 + 2 * math.sqrt(0.05 * 0.95 / studies)
