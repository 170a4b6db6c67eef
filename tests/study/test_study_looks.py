"""A study with looks: it tests after some of its seeds, and stops or trains on by what it saw."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.analysis import made_up
from tests.study import stand_in

from recipes_lib.cli import main
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import write_json
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals import run as evaluating
from recipes_lib.study import run as running
from recipes_lib.study.config import load_study
from recipes_lib.study.lock import LOCK, current_part, read_lock, shown_looks
from recipes_lib.study.report import conclude_study, report_study
from recipes_lib.study.run import StudyRunner
from recipes_lib.study.trainings import StudyRun, is_trained, study_trainings

QUESTIONS = 200
LUCK = {"42": -0.02, "43": 0.0, "44": 0.02, "45": -0.01, "46": 0.01}  # of a seed
EQUAL = {"r4": 0.5, "r8": 0.5}
CLOSE = {"r4": 0.5, "r8": 0.59}  # neither shown nor futile after three seeds
APART = {"r4": 0.3, "r8": 0.8}
Run = Callable[..., tuple[int, str]]


def outcomes(run: str, arm: str, rates: dict[str, float]) -> list[float]:
    """Return what a training has right; the same whenever it is asked again."""
    right = round(QUESTIONS * (rates[arm] + LUCK.get(run[-2:], LUCK["42"]) * (arm != "r4")))
    values = [1.0] * right + [0.0] * (QUESTIONS - right)
    random.Random(run).shuffle(values)
    return values


@pytest.fixture
def study(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study of two arms with five seeds and two looks, and stand-ins for work."""

    def train_here(runner: StudyRunner, training: StudyRun, shares: object) -> None:
        recipe = RunDirectory("tiny").path / "recipes" / f"{training.run}.yaml"
        training.recipe.write(recipe)
        monkeypatch.setattr(sys, "argv", ["recipes", "train", str(recipe)])
        if stand_in.main():
            runner.failed[training.run] = 1, "no memory"

    monkeypatch.setattr(StudyRunner, "_train_one", train_here)
    monkeypatch.setattr(running.progress, "is_evaluated", lambda result: result.file.is_file())
    house_style = Path(__file__).parents[2] / "evals/quickstart/house_style.yaml"
    file = study_folder / "tiny.yaml"
    text = file.read_text().partition("seeds:")[0]
    text += "seeds: [42, 43, 44, 45, 46]\nlooks: [3, 5]\ninclude_base: false\n"
    text += f"evals: [{house_style}]\n"
    file.write_text(text)
    return file


@pytest.fixture
def run(study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the study as its file is now; return the exit code and what was printed."""

    def ran(
        rates: dict[str, float], before: Callable[[], None] = list, **options: object
    ) -> tuple[int, str]:
        def evaluate(tasks, **_) -> None:
            before()
            for task in tasks:
                for name in task.words:
                    folder = RunDirectory(name).path
                    values = outcomes(name, name.split("--")[1], rates)
                    made_up.write_values(folder, values, name=task.recipe.name, suite="checks")

        monkeypatch.setattr(evaluating, "evaluate_tasks", evaluate)
        code = StudyRunner(load_study(study), report_study, **options).run()
        return code, capsys.readouterr().out

    return ran


def trained(study: Path) -> int:
    return sum(map(is_trained, study_trainings(load_study(study))))


def answer_of(study: Path) -> str:
    _, _, conclusion = conclude_study(load_study(study))
    return " ".join(conclusion.answer)


def test_a_clear_difference_stops_the_study_at_its_first_look(study: Path, run: Run) -> None:
    code, _ = run(APART)
    assert (code, trained(study)) == (ExitCode.DONE, 6)
    text = answer_of(study)
    assert "r8 is better than r4" in text and "[99%: +" in text and "(looks)" in text
    assert "Stopped at look 1 of 2, after 3 of 5 seeds; tested at 1%, its share of 5%." in text
    assert "4 trainings saved." in text
    page = RunDirectory("tiny").path / "report"
    html = (page / "report.html").read_text()
    assert "Stopped at look 1 of 2" in html and "Differences with 99% intervals" in html
    assert "effect [99%, not corrected]" in (page / "report.md").read_text()
    comparison, *_ = json.loads((page / "numbers.json").read_text())
    assert comparison["low_99_not_corrected"] > 0 and "low_95_not_corrected" not in comparison
    assert (run(APART)[0], trained(study)) == (ExitCode.DONE, 6)


def test_equal_arms_stop_for_futility_and_the_sentence_says_so(study: Path, run: Run) -> None:
    assert (run(EQUAL)[0], trained(study)) == (ExitCode.DONE, 6)
    text = answer_of(study)
    assert "No difference shown between r8 and r4" in text
    assert "With the 2 remaining seeds the chance of showing one was under 10%." in text
    assert "80% of such studies" not in text


def test_an_undecided_study_trains_on_and_ends_at_its_last_look(study: Path, run: Run) -> None:
    code, said = run(CLOSE)
    assert (code, trained(study)) == (ExitCode.DONE, 10), said
    text = answer_of(study)
    assert "[96%: +" in text and "Ended at look 2 of 2, after 5 of 5 seeds; tested at 4%" in text
    shown = shown_looks(load_study(study))
    assert [record["stops"] for record in shown.values()] == [False, True]
    assert [record["seeds"] for record in shown.values()] == [3, 5]
    lock = read_lock(load_study(study))  # which the notes leave whole
    assert lock is not None and lock["looks"]["after"] == [3, 5]
    state = RunDirectory("tiny--r8--seed46").read_state()
    assert state["design_locks"] == {"tiny": lock["hash"]}


def test_between_two_looks_no_difference_is_told_and_what_is_open_is(study, run, capsys) -> None:
    run(CLOSE)
    shutil.rmtree(RunDirectory("tiny--r8--seed46").path)
    text = answer_of(study)
    assert text.startswith("Interim: 2 training or results still missing.")
    assert "Look 1 of 2, after 3 of 5 seeds, left r8 and r4 undecided." in text
    assert main(["study", "status", str(study)]) == ExitCode.DONE
    assert "training tiny--r8--seed46" in capsys.readouterr().out
    assert main(["study", "report", str(study), "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.parametrize("rates", [EQUAL, CLOSE, APART])
def test_a_study_killed_anywhere_ends_with_the_same_decision_numbers_and_page(
    study: Path, run: Run, rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed before each of its trainings and evaluations in turn."""
    run(rates)
    folder = RunDirectory("tiny").path
    files = [folder / "report" / name for name in ("numbers.json", "report.md", "report.html")]
    whole = [file.read_bytes() for file in files]
    seen = {number: record["results"] for number, record in shown_looks(load_study(study)).items()}
    shutil.rmtree(folder.parent)
    work = 0

    def one_piece_of_work() -> None:
        nonlocal work
        work += 1
        if work > 1:
            raise SystemError("killed")

    train = StudyRunner._train_one

    def train_one(runner: StudyRunner, *arguments: object) -> None:
        one_piece_of_work()
        train(runner, *arguments)

    monkeypatch.setattr(StudyRunner, "_train_one", train_one)
    kills = 0
    is_done = False
    while not is_done:
        assert kills < 20
        work = 0
        try:
            run(rates, one_piece_of_work)
            is_done = True
        except SystemError:
            kills += 1
    assert kills >= 6
    assert [file.read_bytes() for file in files] == whole
    shown = shown_looks(load_study(study))
    assert {number: record["results"] for number, record in shown.items()} == seen


def test_a_job_that_only_evaluates_leaves_the_next_look_to_other_jobs(study, run) -> None:
    run(CLOSE)
    for seed in (45, 46):
        for arm in ("r4", "r8"):
            shutil.rmtree(RunDirectory(f"tiny--{arm}--seed{seed}").path)
    code, said = run(CLOSE, train=False)
    assert code == ExitCode.DONE and "failed" not in said


def test_a_job_learns_from_a_look_whether_the_study_goes_on(study, run, capsys) -> None:
    question = ["study", "status", str(study), "--look", "1"]
    assert main(question) == ExitCode.EVALUATION_INCOMPLETE
    run(CLOSE)
    assert main(question) == ExitCode.DONE
    assert main([*question[:-1], "2"]) == ExitCode.FAILED
    assert "the study ends at look 2" in capsys.readouterr().out


def test_a_failed_arm_keeps_its_look_from_being_taken(study, run, monkeypatch) -> None:
    monkeypatch.setenv("FAIL", "r8--seed43")
    code, said = run(APART)
    assert code == ExitCode.FAILED and "failed: tiny--r8--seed43" in said
    assert trained(study) == 5 and not shown_looks(load_study(study))
    assert answer_of(study).startswith("Interim")
    monkeypatch.delenv("FAIL")
    assert (run(APART)[0], trained(study)) == (ExitCode.DONE, 6)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("looks: [3, 5]", "looks: [2, 3, 5]", "looks.after changed"),
        ("looks: [3, 5]", "", "looks"),
        ("[42, 43, 44, 45, 46]", "[43, 42, 44, 45, 46]", "seeds.r4 changed"),
        ("[42, 43, 44, 45, 46]\nlooks: [3, 5]", "[42, 43, 44]", "looks.after changed"),
    ],
)
def test_looks_and_seeds_cannot_be_taken_back(study, run, old, new, said) -> None:
    """Who stops by hand at a look that went on, or looks anew, has no verdict."""
    run(CLOSE)
    study.write_text(study.read_text().replace(old, new))
    _, _, conclusion = conclude_study(load_study(study))
    assert conclusion.descriptive.startswith("Exploratory") and said in conclusion.descriptive
    assert all(claim.verdict == "no verdict" for claim in conclusion.claims)


def test_a_study_that_ended_at_a_look_has_ended_though_its_design_changed(study, run) -> None:
    run(APART)
    text = study.read_text()
    study.write_text(text.replace("question: ", "question: Now, "))
    conclusion, missing = report_study(load_study(study))
    assert conclusion.descriptive.startswith("Exploratory: ") and not missing
    study.write_text(text)
    assert current_part(load_study(study)).aims.look.number == 1  # nor was it noted otherwise
    assert "r8 is better than r4" in answer_of(study)


def test_looks_added_after_the_results_of_a_lock_without_them_are_seen(study, run) -> None:
    text = study.read_text()
    study.write_text(text.replace("looks: [3, 5]\n", ""))
    run(CLOSE)
    assert not conclude_study(load_study(study))[2].descriptive
    study.write_text(text)
    assert "looks" in conclude_study(load_study(study))[2].descriptive


def test_results_that_a_look_saw_must_stay_as_they_are(study, run) -> None:
    run(CLOSE)
    folder = RunDirectory("tiny--r8").path
    values = outcomes("another", "r8", APART)
    made_up.write_values(folder, values, name="quickstart--house_style", suite="checks")
    _, _, conclusion = conclude_study(load_study(study))
    assert "what look 1 of 2, after 3 of 5 seeds saw changed since" in conclusion.descriptive
    report_study(load_study(study))  # which keeps the first hash
    assert conclude_study(load_study(study))[2].descriptive


@pytest.mark.parametrize("shown", [None, [], [1], "1", {}, [{"look": 1}]])
def test_damaged_notes_of_looks_leave_no_verdict(study, run, shown) -> None:
    run(CLOSE)
    file = RunDirectory("tiny").path / LOCK
    write_json(file, json.loads(file.read_text()) | {"shown": shown})
    for action in ("plan", "status", "report"):
        assert main(["study", action, str(study)]) == ExitCode.DONE
    assert "design.json is damaged" in conclude_study(load_study(study))[2].descriptive


def test_a_study_whose_lock_is_lost_after_a_look_trains_to_its_end(study, run) -> None:
    """No look can be noted without it, and a study that waits for one would never end."""
    run(APART)
    (RunDirectory("tiny").path / LOCK).unlink()
    assert (run(APART)[0], trained(study)) == (ExitCode.DONE, 10)
    _, design, conclusion = conclude_study(load_study(study))
    assert not design.missing and conclusion.descriptive.startswith("Exploratory")


def test_an_equivalent_pair_needs_no_more_seeds(study, run) -> None:
    study.write_text(f"{study.read_text()}margins: {{pass_rate: 20 points}}\n")
    assert (run(EQUAL)[0], trained(study)) == (ExitCode.DONE, 6)
    assert "are equivalent within 20.0 points" in answer_of(study)


def test_an_arm_not_worse_than_the_baseline_is_decided_and_not_between_two_others(study, run):
    margin = "margins: {pass_rate: 12 points}\n"
    study.write_text(f"{study.read_text()}{margin}")
    assert (run({"r4": 0.5, "r8": 0.58})[0], trained(study)) == (ExitCode.DONE, 6)
    assert "r8 is not worse than r4 by more than 12.0 points" in answer_of(study)
    third = "r8: r8.yaml\n  r16: {recipe: r8.yaml, overrides: [lora.r=16, lora.lora_alpha=32]}"
    study.write_text(study.read_text().replace("r8: r8.yaml", third))
    shutil.rmtree(RunDirectory("tiny").root)
    run({"r4": 0.5, "r8": 0.58, "r16": 0.66})
    assert trained(study) == 15
    undecided = [record["stops"] for record in shown_looks(load_study(study)).values()]
    assert undecided == [False, True]


def test_a_plan_names_the_look_and_what_it_saves(study, run, capsys) -> None:
    assert main(["study", "plan", str(study)]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "trainings: 6 of 6 to do, for look 1 of 2, after 3 of 5 seeds" in said
    assert "looks after 3 and 5 seeds, " in said and "trainings of 10 if none differs" in said
    assert "the base" not in said
    run(APART)
    assert main(["study", "plan", str(study)]) == ExitCode.DONE
    assert "trainings: 0 of 6 to do" in capsys.readouterr().out
    assert current_part(load_study(study)).aims.look.number == 1
    based = ["study", "plan", str(study), "include_base=true"]
    assert main(based) == ExitCode.DONE
    assert "a look under 4 seeds seldom decides one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ("[5, 3]", "two or more rising numbers"),
        ("[5]", "two or more rising numbers"),
        ("[1, 5]", "at least 2 seeds"),
        ("[2, 4]", "after 4 seeds, and 5 are declared"),
    ],
)
def test_wrong_looks_are_refused_with_their_line(study: Path, looks: str, said: str) -> None:
    study.write_text(study.read_text().replace("[3, 5]", looks))
    with pytest.raises(RecipesError, match=said) as refused:
        load_study(study)
    assert "tiny.yaml:9" in str(refused.value)


def test_looks_need_one_list_of_seeds_for_all_arms(study: Path) -> None:
    arm = "r4: {recipe: r4.yaml, seeds: [43, 42, 44, 45, 46]}"
    study.write_text(study.read_text().replace("r4: r4.yaml", arm))
    with pytest.raises(RecipesError, match="r8 has other seeds than r4, or another order"):
        load_study(study)


@pytest.mark.parametrize("copies", [[], ["tiny"], 7, "tiny", None])
def test_design_locks_of_a_wrong_type_are_one_line_of_every_verb(study, run, capsys, copies):
    run(APART)
    file = RunDirectory("tiny--r8").state_file
    write_json(file, json.loads(file.read_text()) | {"design_locks": copies})
    verbs = [["study", action, str(study)] for action in ("plan", "status", "run", "report")]
    for words in [*verbs, ["compare", "tiny--r4", "tiny--r8"]]:
        code = main(words)
        said = capsys.readouterr().err.splitlines()
        assert code in (ExitCode.ENVIRONMENT, ExitCode.DATA), (words, said)
        assert "run.json: is damaged: design_locks is not a JSON object" in said[0], (words, said)
        assert len(said) <= 2
