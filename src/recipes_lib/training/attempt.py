"""One attempt at one run, from its lock to its recorded outcome: what stands around the straight
line of `train.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config.launch import Active
from recipes_lib.config.recipe import RECIPE_FILE, Recipe
from recipes_lib.core.environment import command_line, environment
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, explain_fault
from recipes_lib.core.files import utc_now, write_json, write_text
from recipes_lib.core.lock import run_lock
from recipes_lib.core.ranks import meet, on_main_rank, rank
from recipes_lib.core.run_directory import RunDirectory, RunState, State
from recipes_lib.core.terminal import say
from recipes_lib.data.prepare import PreparedData
from recipes_lib.training import checkpoints, metrics
from recipes_lib.training.resume_guard import check_resume, recipe_differences
from recipes_lib.training.stopping import StopRequest
from recipes_lib.weights.runs import weights_damage


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that an attempt goes on from.

    Args:
        marker: read at once: the rotation may delete the checkpoint later.
        changes: {key: [before, now]} of the guarded values that differ, as the user insisted.
    """

    checkpoint: Path
    marker: checkpoints.Marker
    changes: dict[str, list[object]]


@dataclass
class Attempt:
    """This process's part of one attempt.

    Args:
        earlier: run.json as an earlier attempt left it; empty where there was none, and on other
            ranks.
        finished: whether the run is finished and its weights are whole.
        is_ours: rank 0: whether run.json is this attempt's to write: once a new run was begun or an
            earlier one taken over. A refused attempt leaves every record as it was.
    """

    run: RunDirectory
    recipe: Recipe
    stop: StopRequest
    earlier: RunState = field(default_factory=lambda: RunState())
    finished: bool = False
    is_ours: bool = False

    def begin(self) -> bool:
        """Rank 0, under the lock: look at what an earlier attempt recorded, or begin the record of
        a new run; return `finished`.
        """
        self.run.check_inside()
        self.earlier = self.run.read_state() if self.run.exists() else RunState()
        if self.earlier.get("state") == "finished":
            changed = recipe_differences(self.recipe, self.earlier.get("guard", {}))
            if changed:
                what = (
                    f"run '{self.run.name}' is finished, with other settings: {', '.join(changed)}"
                )
                raise RecipeError(what, "start a new run with run.name=OTHER")
            damage = weights_damage(self.run, self.recipe.lora is None)
            if damage is None:
                return True
            say(
                f"run '{self.run.name}' is finished, but {damage}; going on from its newest whole"
                " checkpoint, or from the beginning where there is none"
            )
        if self.earlier.get("kind") == "answers":
            raise RecipeError(
                f"run '{self.run.name}' holds answers of a file and cannot be trained",
                "start a new run with run.name=OTHER",
            )
        # one that nobody took away asked an attempt that is over
        self.run.stop_file.unlink(missing_ok=True)
        if not self.earlier:
            self.run.write_state("running", attempts=1, exit_code=None, error=None)
            write_provenance(self.run, self.recipe)
            self.is_ours = True
        return False

    def continue_or_start(
        self,
        data: PreparedData,
        guard: dict[str, object],
        active: Active,
        options: argparse.Namespace,
        **recorded: Any,
    ) -> Resumption | None:
        """Rank 0: choose the newest complete checkpoint, or None; refuse to continue it with other
        settings, and make run.json this attempt's.

        Args:
            guard: every value that a resumed run must share with its beginning.
            **recorded: further fields of run.json.

        Raises:
            RecipeError: guarded values differ.
            EnvironmentFault: the checkpoint lacks optimizer, scheduler or random state.
        """
        run, resumption = self.run, None
        resumed = self.earlier.get("resumed", [])
        newest, broken = checkpoints.find_newest(run.checkpoints)
        if newest is not None:
            marker = checkpoints.read_marker(newest)
            begun = self.earlier.get("guard") or marker["guard"]
            changes = check_resume(run.name, begun, guard, options.resume_anyway)
            if not options.allow_partial_resume:
                checkpoints.check_resumable(newest, active.world_size)
            resumption = Resumption(newest, marker, changes)
            resumed = [
                *resumed,
                {"from": newest.name, "changed": changes, "partial": options.allow_partial_resume},
            ]
        # nothing was refused: from here on the run's files are this attempt's
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        for checkpoint, reason in broken.items():
            aside = checkpoints.set_aside(checkpoint, ".incomplete")
            say(f"skipping {checkpoint.name}: {reason}; set aside as {aside.name}")
        metrics.forget_after(run.metrics, newest)
        self._take_over(data, guard=guard, resumed=resumed, **recorded)
        if resumption is not None:
            how = "recipe, data, versions unchanged"
            if resumption.changes:
                how = f"--resume-anyway over {len(resumption.changes)} changes"
            say(f"resuming {resumption.checkpoint.name} ({how})")
        return resumption

    def _take_over(self, data: PreparedData, **fields: Any) -> None:
        """Rank 0: nothing was refused, so from here on the run's records are this attempt's."""
        if self.earlier:
            fields["attempts"] = self.earlier.get("attempts", 0) + 1
            write_provenance(self.run, self.recipe)
        write_settings(self.run, self.recipe)  # now with the date that its template prints
        weights = self.run.weights(self.recipe.lora is None)
        if self.earlier.get("state") == "finished" and weights.is_dir():
            checkpoints.set_aside(weights, ".damaged")
        write_json(self.run.path / "supervision.json", data.audit.to_dict())
        write_json(self.run.path / "splits.json", data.splits)
        fields |= {"exit_code": None, "error": None, "steps_began": None}
        self.run.write_state("running", **fields)
        self.is_ours = True

    def begin_steps(self) -> None:
        """Every rank: from now on a signal asks for a checkpoint. `recipes train` reads in run.json
        that there is something to save.
        """
        self.stop.wait_for_step()
        on_main_rank(lambda: self.run.write_state("running", steps_began=utc_now()))

    def record_failure(self, code: int, error: str) -> None:
        """Note in run.json how this attempt ended. On a full disk the note may be lost, the error
        itself must not be.
        """
        if rank() != 0 or not self.is_ours:
            return
        with suppress(OSError, RecipesError):
            if self.run.exists() and self.run.read_state()["state"] == "running":
                stopped = code in {ExitCode.PREEMPTED, ExitCode.INTERRUPTED}
                state: State = "preempted" if stopped else "failed"
                self.run.write_state(state, exit_code=code, error=error)


@contextmanager
def attempt(run: RunDirectory, recipe: Recipe, stop: StopRequest) -> Iterator[Attempt]:
    """Hold a run for one attempt: rank 0 has the lock, an error is recorded while the run is still
    ours, and all ranks leave together.

    Raises:
        RecipeError: the run is finished with other settings, or holds answers of a file.
        EnvironmentFault: another process holds the run.
    """
    this = Attempt(run, recipe, stop)
    stop.stop_file, stop.record = run.stop_file, this.record_failure
    with ExitStack() as stack:

        def begin() -> bool:
            stack.enter_context(run_lock(run.path))
            return this.begin()

        try:
            this.finished = on_main_rank(begin)
            yield this
            meet()
        except Exception as error:
            fault = error if isinstance(error, RecipesError) else explain_fault(error)
            code = int(fault.exit_code if fault else ExitCode.FAILED)
            this.record_failure(code, str(fault or f"{type(error).__name__}: {error}"))
            if fault is None or fault is error:
                raise
            raise fault from error


def write_settings(run: RunDirectory, recipe: Recipe) -> None:
    """Write recipe.yaml as it was, and resolved.yaml."""
    write_text(run.path / "recipe.yaml", recipe.text)
    recipe.write(run.path / RECIPE_FILE)


def write_provenance(run: RunDirectory, recipe: Recipe) -> None:
    """Write what a run is made of: its settings, command.txt and environment.json."""
    write_settings(run, recipe)
    write_text(run.path / "command.txt", command_line() + "\n")
    write_json(run.path / "environment.json", environment())
