"""Small files that other programs wrote are read, each mean as the program itself reports it.

`results/` holds what lm-eval 0.4.13, lighteval 0.13.0 and HELM (crfm-helm 0.5) left of two tiny
models with random weights; HELM's two say one letter, whatever they are asked.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from pyarrow import Table
from pyarrow.parquet import read_table, write_table
from tests.analysis.made_up import compared

from recipes_lib.analysis.claims import Conclusion
from recipes_lib.analysis.readers import read_results
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.evals.log import Metric

RESULTS = Path(__file__).with_name("results")


def runs_of(path: Path) -> dict[str, Run]:
    return {run.name: run for run in read_results(path) or ()}


def metrics_of(run: Run) -> dict[str, Metric]:
    return {metric.name: metric for metric in run.metrics}


def titles(conclusion: Conclusion, code: str) -> list[str]:
    return [finding.title for finding in conclusion.findings if finding.code == code]


@pytest.mark.parametrize("model", ["tiny-1", "tiny-2"])
def test_lighteval_s_means_are_its_own(model: str) -> None:
    run = runs_of(RESULTS / "lighteval")[model]
    (file,) = (RESULTS / "lighteval/results" / model).iterdir()
    reported = json.loads(file.read_text())["results"]
    metrics = metrics_of(run)
    for task, values in reported.items():
        for name, value in values.items():
            if task != "all" and not name.endswith("_stderr"):
                metric = metrics.pop(f"lighteval/{task.partition('|')[0]}/{name}")
                assert metric.value == pytest.approx(value, abs=1e-12)
                # an F1 of the whole task has no value for each question
                assert len(metric.samples) == (0 if name == "loglikelihood_f1" else metric.n)
                assert metric.higher_is_better and metric.num_fewshot == 0
    assert not metrics and not run.unread


def test_lighteval_is_compared_and_says_what_it_does_not_record() -> None:
    conclusion = compared(RESULTS / "lighteval")
    row = next(each.row for each in conclusion.claims if each.row.metric.endswith("choice/acc"))
    assert row.test and row.n == 12
    (title,) = titles(conclusion, "not-recorded")
    assert "chat template" in title and "backend" in title and "precision" not in title


def test_lighteval_s_newest_command_is_read_and_other_prompts_stop_the_verdict(tmp_path) -> None:
    shutil.copytree(RESULTS / "lighteval/details", tmp_path / "details")
    (folder,) = (tmp_path / "details/tiny-2").iterdir()
    later = folder.with_name("2027-01-01T00-00-00.0")
    later.mkdir()
    file = next(folder.glob("details_tiny_choice*"))
    rows = read_table(file).to_pylist()
    for row in rows:
        row["doc"]["instruction"] = "Be brief."
    new = later / file.name.replace(folder.name, later.name)
    write_table(Table.from_pylist(rows), new)
    run = runs_of(tmp_path)["tiny-2"]
    assert run.unread == (f"{file.name}: older results of tiny_choice",)
    conclusion = compared(tmp_path)  # its results are not there
    (title,) = titles(conclusion, "protocol-differs")
    assert "tiny_choice: prompts" in title
    assert "system instruction" in " ".join(titles(conclusion, "not-recorded"))
    assert all(claim.row.higher_is_better is None for claim in conclusion.claims)
    (tmp_path / "results/tiny-2").mkdir(parents=True)
    (tmp_path / f"results/tiny-2/results_{folder.name}.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        runs_of(tmp_path)


@pytest.mark.parametrize("model", ["tiny-even", "tiny-odd"])
def test_helm_s_means_are_its_own(model: str) -> None:
    run = runs_of(RESULTS / "helm")[model]
    folder = RESULTS / f"helm/simple_mcqa:model={model.replace('-', '_')}"
    reported = {}
    for statistic in json.loads((folder / "stats.json").read_text()):
        if "perturbation" not in statistic["name"]:
            reported[statistic["name"]["name"]] = statistic.get("mean")
    assert len(metrics_of(run)) == 8
    for name, metric in metrics_of(run).items():
        assert metric.value == pytest.approx(reported[name.rpartition("/")[2]], abs=1e-12)
        assert metric.n == 8 and metric.higher_is_better and metric.num_fewshot == 5
    assert metrics_of(run)["helm/simple_mcqa/exact_match"].value in (0.625, 0.375)


def test_helm_is_compared_by_folder_and_part_of_its_instances_is_named(tmp_path: Path) -> None:
    folders = sorted((RESULTS / "helm").iterdir())
    conclusion = compared(*folders)
    assert {score.arm for score in conclusion.table.scores} == {"tiny-even", "tiny-odd"}
    assert titles(conclusion, "other-subset")[0].endswith("fewer than 30 of the questions in helm")
    assert titles(conclusion, "no-texts")
    shutil.copytree(RESULTS / "helm", tmp_path / "helm")
    file = tmp_path / "helm/simple_mcqa:model=tiny_odd/run_spec.json"
    specification = json.loads(file.read_text())
    specification["adapter_spec"]["temperature"] = 1.0
    file.write_text(json.dumps(specification))
    assert "gen_kwargs" in titles(compared(tmp_path / "helm"), "protocol-differs")[0]


def test_instances_that_both_folders_of_helm_lost_count_both_ways(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "helm", tmp_path / "helm")
    for file in (tmp_path / "helm").glob("*/per_instance_stats.json"):
        file.write_text(json.dumps(json.loads(file.read_text())[:5]))
    conclusion = compared(tmp_path / "helm")
    row = conclusion.claims[0].row
    assert row.test and row.n == 8 and row.test.unresolved == 3
    assert row.flags == ("5 common questions of 8",) and conclusion.table.scores[0].unresolved == 3


def test_instances_that_helm_perturbed_are_not_read_and_trials_are_one_question(tmp_path) -> None:
    shutil.copytree(RESULTS / "helm", tmp_path / "helm")
    for file in (tmp_path / "helm").glob("*/per_instance_stats.json"):
        rows = json.loads(file.read_text())
        again = [row | {"train_trial_index": 1} for row in rows]
        perturbed = [row | {"perturbation": {"name": "typos"}} for row in rows]
        file.write_text(json.dumps(rows + again + perturbed))
    conclusion = compared(tmp_path / "helm")
    row = conclusion.claims[0].row
    assert row.test and row.n == 16 and row.test.resolved.questions == 8


@pytest.mark.parametrize("model", ["tiny-1", "tiny-2"])
def test_lm_eval_s_means_are_its_own(model: str) -> None:
    run = runs_of(RESULTS / "lm_eval")[model]
    (file,) = (RESULTS / "lm_eval" / model).glob("results*")
    metrics = metrics_of(run)
    num_shown = 0
    for task, values in json.loads(file.read_text())["results"].items():
        for key, value in values.items():
            name, _, pipeline = key.partition(",")
            if pipeline and not name.endswith("_stderr"):
                suffix = "" if pipeline == "none" else f",{pipeline}"
                metric = metrics.pop(f"lm_eval/{task}/{name}{suffix}")
                assert metric.value == pytest.approx(value, abs=1e-12)
                num_shown += not metric.samples  # values of one question are lists
    assert not metrics and not run.unread and num_shown == 3


def test_lm_eval_s_prompts_and_answers_are_read_with_its_groups_filters_and_repeats() -> None:
    runs = runs_of(RESULTS / "lm_eval")
    metrics = metrics_of(runs["tiny-1"])
    assert len(metrics["lm_eval/tiny_group/acc"].samples) == 24
    first = metrics["lm_eval/tiny_sum/exact_match,first"].samples[0]
    assert first.input == "What is 0 plus 0?" and first.answer and first.prompt
    choice = metrics["lm_eval/tiny_choice/acc"].samples[0]
    assert choice.answer is None and len(str(choice.input).splitlines()) == 4
    conclusion = compared(RESULTS / "lm_eval")
    assert not titles(conclusion, "protocol-differs") and not titles(conclusion, "not-recorded")


def test_a_mean_of_helm_that_is_no_finite_number_is_open(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "helm", tmp_path / "helm")
    file = next((tmp_path / "helm").glob("*tiny_odd/per_instance_stats.json"))
    instances = json.loads(file.read_text())
    for instance, mean in zip(instances, (float("inf"), 1e308, float("nan")), strict=False):
        for statistic in instance["stats"]:
            if statistic["name"]["name"] == "exact_match":
                statistic["mean"] = mean
    file.write_text(json.dumps(instances))
    metric = metrics_of(runs_of(tmp_path / "helm")["tiny-odd"])["helm/simple_mcqa/exact_match"]
    assert [sample.value for sample in metric.samples].count(None) == 3


def test_a_damaged_file_is_named_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "all")
    helm = tmp_path / "all/helm/simple_mcqa:model=tiny_odd"
    for name in ("stats.json", "per_instance_stats.json"):
        text = (helm / name).read_text()
        (helm / name).write_text("{}")
        with pytest.raises(DataError, match=rf"/{name}: is damaged: no JSON list"):
            read_results(helm.parent)
        (helm / name).write_text(text)
    (helm / "per_instance_stats.json").unlink()
    with pytest.raises(DataError, match=r"/per_instance_stats\.json: is missing, or no file"):
        read_results(helm.parent)
    details = next((tmp_path / "all/lighteval").rglob("*choice*.parquet"))
    write_table(Table.from_pylist([{"doc": {"id": "1"}}]), details)
    with pytest.raises(DataError, match=r"\.parquet row 1: has no doc or no metric"):
        read_results(tmp_path / "all/lighteval")
    for begin, found in (("samples_tiny_sum", "0 of the 6 rows"), ("results", "is missing, or no")):
        (file,) = (tmp_path / "all/lm_eval/tiny-1").glob(f"{begin}*")
        file.unlink()
        os.mkfifo(file)
        try:
            said = str(runs_of(tmp_path / "all/lm_eval")["tiny-1"].unread)
        except DataError as error:
            said = str(error)
        assert found in said and file.name in said
