"""Which value of its grid an arm is trained with: chosen once, by the validation loss of a training
of each value, and recorded in runs/<study>/choices.json.

The trainings of the grid have a seed of their own and stand for nothing else: the arm's seeds are
trained anew, and no eval sees the others. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import hash_of, object_or_none, read_rows, write_json
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.sources import source_hashes
from recipes_lib.study.config import Arm, Study
from recipes_lib.study.runs import Failure, candidate_runs, has_diverged, is_trained, study_folder
from recipes_lib.training.resume_guard import guarded_values


def with_choices(study: Study) -> Study:
    """Return the study with the values that were chosen for its arms, as they are recorded; a
    choice of another grid, or of other settings, does not count.
    """
    choices = object_or_none(_record(study)) or {}

    def chosen(arm: Arm) -> Arm:
        record = choices.get(arm.name) if arm.tuning else None
        if record is None or record["of"] != _depends_on(arm):
            return arm
        return arm.tuned(record["chosen"], record["losses"])

    return replace(study, arms=tuple(map(chosen, study.arms)))


def choose(study: Study, say: Callable[[str], None]) -> dict[str, Failure]:
    """Choose for each arm whose trainings have all ended, and record it; return the failures by
    arm.

    The lowest validation loss wins, of equal ones the value that stands first in the grid. A
    training that diverged has none and cannot win.
    """
    failed = {}
    for arm in study.arms:
        tuning, tried = arm.tuning, candidate_runs(study, arm)
        if tuning is None or tuning.chosen is not None:
            continue
        if not all(is_trained(training) or has_diverged(training) for training in tried):
            continue
        losses = [
            None if has_diverged(training) else validation_loss(training.directory)
            for training in tried
        ]
        finite = [loss for loss in losses if loss is not None]
        if not finite:
            values = ", ".join(map(str, tuning.values))
            error = f"arm '{arm.name}': its training diverged at every {tuning.key} of {values}"
            failed[arm.name] = Failure(error, int(ExitCode.NUMERICS))
            continue
        best = tuning.values[losses.index(min(finite))]
        record = {"of": _depends_on(arm), "key": tuning.key, "chosen": best, "losses": losses}
        write_json(_record(study), {**(object_or_none(_record(study)) or {}), arm.name: record})
        tried_values = ", ".join(
            f"{value}: {'diverged' if loss is None else f'{loss:.4f}'}"
            for value, loss in zip(tuning.values, losses, strict=True)
        )
        say(f"{arm.name}: {tuning.key} {best} (validation loss of {tried_values})")
    return failed


def validation_loss(run: RunDirectory) -> float | None:
    """Return the validation loss of the weights that a training kept: of the checkpoint it chose,
    else of its end. None where there is no finite one.
    """
    summary: Mapping[str, Any] = run.read_state().get("summary") or {}
    loss, best = summary.get("last_validation_loss"), summary.get("best_step")
    for row in read_rows(run.metrics, skip_damaged=True) if best is not None else ():
        if row.get("step") == best and "eval_loss" in row:
            loss = row["eval_loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else None


def _record(study: Study) -> Path:
    return study_folder(study) / "choices.json"


def _depends_on(arm: Arm) -> str:
    """A hash of what a choice depends on: the settings and the data of the grid's trainings."""
    values: list[object] = [arm.tuning.key, arm.tuning.values] if arm.tuning else []
    for candidate in arm.candidates:
        world = candidate.launch.world_size
        values.append(guarded_values(candidate.recipe, "", world, "", {}))
        with suppress(RecipesError):  # data that is not there is the training's error
            values.append(source_hashes(candidate.recipe.data))
    return hash_of(values)
