"""What a task's file says of its metrics, without lm-eval and without running any of it."""

import os

import pytest

from recipes_lib.evals.lm_eval_files import files_read_by_tasks, metrics_of_task

FILES = {
    "base.yaml": "output_type: generate_until\nmetric_list: [{metric: exact_match}]\n",
    "filters.yaml": "task: filters\ninclude: base.yaml\nfilter_list: [{name: none}, {name: last}]",
    "default.yaml": "task: default\noutput_type: multiple_choice\n",
    "other.yaml": "task: other\ninclude: base.yaml\nmetric_list: [{metric: f1}, {metric: em}]\n",
    "function.yaml": "task: function\nmetric_list: [{metric: !function x.score}]\n",
    "results.yaml": "task: results\ninclude: base.yaml\nprocess_results: !function x.results\n",
    "hub.yaml": "task: hub\nmetric_list: [{metric: rouge, hf_evaluate: true}]\n",
    "python.yaml": "task: python\nclass: !function x.Task\n",
    "group.yaml": "group: both\ntask: [other]\naggregate_metric_list: [{metric: f1}]\n",
    "named.yaml": "group: named\naggregate_metric_list: {metric: f1, filter_list: last}\n",
    "circle.yaml": "task: circle\ninclude: circle.yaml\noutput_type: multiple_choice\n",
}
METRICS = {
    "filters": ("exact_match", "exact_match,last"),
    "default": ("acc", "acc_norm"),
    "other": ("f1", "em"),
    "both": ("f1", "f1,*"),
    "named": ("f1,last",),
    "circle": ("acc", "acc_norm"),
    # only a run can tell
    **dict.fromkeys(["function", "results", "hub", "python", "nothing_of_this_name"]),
}


def test_the_metrics_of_a_task_are_those_that_its_file_lists(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert {task: metrics_of_task(task, str(tmp_path)) for task in METRICS} == METRICS


def test_the_metrics_of_tasks_of_lm_eval_are_known_without_its_index():
    filters = ("exact_match,strict-match", "exact_match,flexible-extract")
    assert metrics_of_task("gsm8k", None) == filters
    assert metrics_of_task("arc_easy", None) == ("acc", "acc_norm")
    assert metrics_of_task("winogrande", None) == ("acc",)
    assert metrics_of_task("ifeval", None) is None  # a function makes its results


@pytest.mark.timeout(20)
def test_a_pipe_that_a_task_includes_is_named_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    task = tmp_path / "task.yaml"
    task.write_text("task: mine\ninclude: pipe.yaml\noutput_type: multiple_choice\n")
    assert {*files_read_by_tasks([str(task)], None, None)} == {task, tmp_path / "pipe.yaml"}
    assert metrics_of_task("mine", str(tmp_path)) == ("acc", "acc_norm")
