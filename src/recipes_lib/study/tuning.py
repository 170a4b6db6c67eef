"""Which value of its grid an arm is trained with: chosen once, by the validation loss of a training
of each value, and recorded in the study's folder (steps/choose.ARM/done.json).

The trainings of the grid have a seed of their own and stand for nothing else: the arm's seeds are
trained anew, and no eval sees the others. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes_lib.compare.design import Arm, Study, Tuning
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.core.json_files import read_rows
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study.arms import choice_name, study_folder
from recipes_lib.study.graph import Failure, Graph, Step


def with_choices(study: Study) -> Study:
    """Return the study with the values that were chosen for its arms, as they are recorded; what
    was chosen of another grid does not count.
    """
    steps = Graph(study_folder(study) / "steps", ())

    def chosen(arm: Arm) -> Arm:
        record = steps.read(choice_name(arm), "done.json") if arm.tuning else None
        if record is None or arm.tuning is None or record["inputs"] != arm.tuning.inputs:
            return arm
        return arm.tuned(record["chosen"], record["losses"])

    return dataclasses.replace(study, arms=tuple(map(chosen, study.arms)))


def choose(
    study: Study, graph: Graph, steps: Sequence[Step], say: Callable[[str], None]
) -> dict[str, Failure]:
    """Choose for each of these steps whose trainings are done, and record it; return the failures.

    The lowest validation loss wins, of equal ones the value that stands first in the grid. A
    training that diverged has none and cannot win.
    """
    failed = {}
    for step in steps:
        arm = study.arm(step.arm)
        assert arm.tuning is not None
        grid = arm.tuning
        losses = [(graph.read(name, "done.json") or {}).get("loss") for name in step.upstream]
        finite = [loss for loss in losses if loss is not None]
        if not finite:
            why = f"arm '{arm.name}': its training diverged at every {grid.key} of {grid.grid}"
            failed[step.name] = graph.fail(step, why, ExitCode.NUMERICS)
            continue
        best = grid.values[losses.index(min(finite))]
        graph.finish(step, digest_of(best), [], chosen=best, losses=losses)
        say(f"{step.name}: {choice_text(arm.tuned(best, losses).tuning)}")
    return failed


def choice_text(tuning: Tuning | None) -> str:
    """Return what was chosen, by which losses."""
    assert tuning is not None
    losses = (
        f"{value}: {'diverged' if loss is None else f'{loss:.4f}'}"
        for value, loss in zip(tuning.values, tuning.losses, strict=True)
    )
    return f"{tuning.key} {tuning.chosen} (validation loss of {', '.join(losses)})"


def validation_loss(run: RunDirectory, summary: Mapping[str, Any]) -> float | None:
    """Return the validation loss of the weights that a training kept: of the checkpoint it chose,
    else of its end. None where there is no finite one.
    """
    loss, best = summary.get("last_validation_loss"), summary.get("best_step")
    for row in read_rows(run.metrics, skip_damaged=True) if best is not None else ():
        if row.get("step") == best and "eval_loss" in row:
            loss = row["eval_loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else None
