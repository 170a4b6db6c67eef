"""One attempt at one run, from its lock to its recorded outcome; `train.py` calls it in order."""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from recipes_lib.config.recipe import RECIPE_FILE, Recipe
from recipes_lib.config.upstream import autocast_dtype
from recipes_lib.core import ranks
from recipes_lib.core.environment import command_line, environment
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, explain_fault
from recipes_lib.core.files import Row, publish, sync, utc_now, write_json, write_text
from recipes_lib.core.run_directory import RunDirectory, State, run_lock
from recipes_lib.core.terminal import count, next_step, say
from recipes_lib.data.prepare import PreparedData
from recipes_lib.data.sources import source_hashes
from recipes_lib.training import metrics, resume_guard
from recipes_lib.training.build import count_quantized
from recipes_lib.training.finished import damage_of_finished
from recipes_lib.training.reference import add_reference
from recipes_lib.training.stopping import EXIT_CODES, StopRequest
from recipes_lib.training.trainer import ExactTrainer
from recipes_lib.weights.card import write_card
from recipes_lib.weights.load import base_fingerprint, model_path
from recipes_lib.weights.proof import check_saved

REFERENCE = "reference_hash"  # in the guard of a run of pairs


@dataclass
class Attempt:
    """This process's part of one attempt."""

    run: RunDirectory
    recipe: Recipe
    stop: StopRequest
    earlier: Row = field(default_factory=dict)  # rank 0: run.json as it was
    finished: bool = False  # and its weights are whole
    owns_records: bool = False  # the records are this attempt's; a refused one changes none

    @property
    def weights(self) -> Path:
        """The folder of the final weights."""
        return self.run.weights(self.recipe.lora is None)

    def begin(self, stack: ExitStack) -> tuple[bool, bool]:
        """Rank 0: lock the run until `stack` closes; return `finished` and `owns_records`."""
        run = self.run
        stack.enter_context(run_lock(run.path))
        if run.exists():
            self.earlier = run.read_state()
        if self.earlier.get("state") == "finished":
            damage = damage_of_finished(run, self.recipe, self.earlier)
            if damage is None:
                return True, False
            say(f"run '{run.name}' is finished, but {damage}: resuming from a checkpoint")
        run.stop_file.unlink(missing_ok=True)  # it asked an attempt that is over
        if not self.earlier:
            run.write_state("running", attempts=1, exit_code=None, error=None)
            self._write_settings()
        return False, not self.earlier

    def continue_or_start(
        self, data: PreparedData, resume_anyway: bool, guard: dict[str, object], **recorded: Any
    ) -> Path | None:
        """Rank 0: return the newest complete checkpoint, if any; refuse to mix its settings."""
        run = self.run
        newest, broken = resume_guard.find_newest(run.checkpoints)
        # run.json before the checkpoint: what --resume-anyway changed is the run's from then on, in
        # `resumed` too, even if that attempt saved nothing; a checkpoint's own for a lost run.json
        begun_with = dict(self.earlier.get("guard") or {})
        if not begun_with and newest is not None:
            begun_with = resume_guard.read_marker(newest)["guard"]
        reference = begun_with.pop(REFERENCE, None)  # compared once the base is loaded
        changed: dict[str, tuple[object, object]] = {}
        if begun_with:
            changed = resume_guard.differences(begun_with, guard)
        if None in changed.get("base_weights", ()):
            # the base was not on this machine then, or is not now: its hash is not known
            del changed["base_weights"]
        if reference is not None and not changed:  # else the base may be another: compute it anew
            guard[REFERENCE] = reference
        resumed = list(self.earlier.get("resumed", []))
        if newest is not None:
            is_other_launch = any(key.startswith("launch.") for key in changed)
            if is_other_launch or (changed and not resume_anyway):
                resume_guard.refuse_changes(run.name, changed)
            resumed.append({"from": newest.name, "changed": changed})

        # nothing was refused: from here on the run's files are this attempt's
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        for checkpoint, reason in broken.items():
            aside = resume_guard.set_aside(checkpoint, ".incomplete")
            say(f"skipping {checkpoint.name}: {reason}; set aside as {aside.name}")
        num_anew = metrics.restore_lines(run.metrics, newest)
        if num_anew and newest is not None:
            lines = count(num_anew, "line")
            say(f"{run.metrics.name}: {lines} missing or damaged, written anew from {newest.name}")
        if self.earlier.get("state") == "finished" and self.weights.is_dir():
            resume_guard.set_aside(self.weights, ".damaged")
        self._write_settings()  # now with the date that its template prints
        write_json(run.path / "environment.json", environment())
        write_json(run.path / "supervision.json", vars(data.audit))
        write_json(run.path / "splits.json", data.splits)
        run.write_state(
            "running",
            exit_code=None,
            error=None,
            steps_began=None,
            **recorded,
            attempts=self.earlier.get("attempts", 0) + 1,
            resumed=resumed,
            data_files=source_hashes(self.recipe.data),
            guard=guard,
        )
        others = ""
        if changed:
            others = f", with changed settings: {', '.join(changed)}"
        if newest is not None:
            say(f"resuming {newest.name}{others or ' (recipe, data, versions unchanged)'}")
        elif broken or changed:
            say(f"no complete checkpoint: training starts from the beginning{others}")
        return newest

    def add_reference(
        self, data: PreparedData, model: Any, args: Any, guard: dict[str, Any], resume_anyway: bool
    ) -> PreparedData:
        """Every rank: return the pairs with their reference, which the guard then holds; refuse one
        that is not what the run began with.
        """
        known = ranks.on_main_rank(lambda: guard.get(REFERENCE))
        splits = {"train": data.train}
        if data.validation is not None:
            splits["validation"] = data.validation
        splits, digest = add_reference(
            splits,
            model,
            args,
            folder=self.run.path,
            tokens_hash=data.tokens_hash,
            known=known,
        )
        if known not in (None, digest) and not resume_anyway:
            what = f"run '{self.run.name}': the base no longer gives the reference it began with"
            hint = "restore its reference.safetensors, or start a new run with run.name=OTHER"
            raise RecipeError(what, hint)
        guard[REFERENCE] = digest
        ranks.on_main_rank(lambda: self.run.write_state("running", guard=guard))
        return dataclasses.replace(data, train=splits["train"], validation=splits.get("validation"))

    def _write_settings(self) -> None:
        if self.recipe.path.parent.resolve() != self.run.path.resolve():  # not its own resolved one
            write_text(self.run.path / "recipe.yaml", self.recipe.document.text)
        self.recipe.write(self.run.path / RECIPE_FILE)
        write_text(self.run.path / "command.txt", command_line() + "\n")

    def begin_steps(self) -> None:
        """Every rank: from now on a signal asks for a checkpoint, as run.json says."""
        self.stop.wait_for_step()
        ranks.on_main_rank(lambda: self.run.write_state("running", steps_began=utc_now()))

    def record_failure(self, code: int, error: str) -> None:
        """Note in run.json how this attempt ended, unless a full disk prevents it."""
        if not self.owns_records:
            return
        with suppress(OSError, RecipesError):
            if self.run.exists() and self.run.read_state()["state"] == "running":
                state: State = "stopped" if code in EXIT_CODES.values() else "failed"
                self.run.write_state(state, exit_code=code, error=error)

    def record_stop(self, state: TrainerState) -> ExitCode:
        """Rank 0: record a stop whose checkpoint is written, and return the exit code."""
        code = EXIT_CODES[self.stop.agreed]
        step = state.global_step
        self.run.stop_file.unlink(missing_ok=True)
        self.run.write_state("stopped", exit_code=int(code), step=step, error=None)
        where = f"stopped at step {step}/{state.max_steps}"
        say(f"{where}: checkpoint-{step} is complete (exit code {int(code)})")
        return code

    def record_finish(self, summary: Mapping[str, Any], check: Mapping[str, Any]) -> None:
        """Rank 0: put all on the disk, and only then call the run finished."""
        run = self.run
        if run.metrics.is_file():
            sync(run.metrics)
        run.stop_file.unlink(missing_ok=True)
        run.write_state("finished", exit_code=0, error=None, summary=summary, weights_check=check)
        equal = f"{check['tensors']} trained tensors equal the files, byte for byte"
        say(f"finished: {self.weights} ({equal})")
        next_step("chat", run.name)


@contextmanager
def begin_attempt(run: RunDirectory, recipe: Recipe, stop: StopRequest) -> Iterator[Attempt]:
    """Hold a run for one attempt: rank 0 has the lock, and all ranks leave together."""
    attempt = Attempt(run, recipe, stop)
    stop.stop_file = run.stop_file
    stop.record = attempt.record_failure
    with ExitStack() as stack:
        try:
            begun = ranks.on_main_rank(lambda: attempt.begin(stack))
            attempt.finished, attempt.owns_records = begun
            yield attempt
            ranks.meet()
        except ranks.AnotherRankFailed:
            raise
        except Exception as error:
            fault = error if isinstance(error, RecipesError) else explain_fault(error)
            if fault is None and ranks.world_size() > 1:
                # a lost connection: give the kernel a moment to end the rank that was killed
                time.sleep(1.0)
                fault = ranks.killed_rank()
            if ranks.rank() == 0 or not getattr(error, "on_every_rank", False):
                code = fault.exit_code if fault else ExitCode.FAILED
                reason = str(fault or f"{type(error).__name__}: {error}")
                attempt.record_failure(int(code), reason)
            if fault is None or fault is error:
                raise
            raise fault from error


def summarise_training(trainer: ExactTrainer, data: PreparedData) -> dict[str, object]:
    """Return what run.json and the card say of all steps, those of earlier attempts too."""
    args = trainer.args
    state = trainer.state
    tokens = trainer.tokens_trained
    seconds_timed = (trainer.seconds_before or 0.0) + time.monotonic() - trainer.began
    device = "cpu"
    if args.device.type != "cpu":
        device = torch.cuda.get_device_name()
    summary: dict[str, object] = {
        "steps": state.global_step,
        "training_rows": len(data.train),
        "validation_rows": len(data.validation) if data.validation is not None else 0,
        "tokens": tokens,
        "seconds": trainer.seconds_so_far(),
        "tokens_per_second": round((tokens - trainer.tokens_untimed) / seconds_timed, 1),
        "quantized_layers": count_quantized(trainer.model),
        "peak_memory_gib": round(metrics.peak_memory_gib(), 2),
        "world_size": args.world_size,
        "device": device,
    }
    for name, key in (("training", "loss"), ("validation", "eval_loss")):
        losses = [row[key] for row in state.log_history if key in row] or [None]
        summary[f"first_{name}_loss"] = losses[0]
        summary[f"last_{name}_loss"] = losses[-1]
    if args.load_best_model_at_end and state.best_model_checkpoint:
        summary["best_step"] = int(state.best_model_checkpoint.rpartition("-")[2])
    return summary


def save_and_check(
    trainer: ExactTrainer, attempt: Attempt, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Save the final weights, prove them, and only then give them their name; every rank calls."""
    recipe = attempt.recipe
    scratch = attempt.run.path / "weights.unchecked"
    ranks.on_main_rank(lambda: shutil.rmtree(scratch, ignore_errors=True))
    trainer.save_model(str(scratch))  # a collective under FSDP2: every rank takes part
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    dtype = autocast_dtype(trainer.args)
    try:
        check = check_saved(
            trainer.model,
            scratch,
            base=model_path(recipe.model),
            base_fingerprint=ranks.on_main_rank(lambda: base_fingerprint(recipe)),
            autocast=str(dtype).removeprefix("torch.") if dtype else None,
            # a warm-up begins with a learning rate of 0
            may_change_nothing=trainer.state.max_steps == 1 and rates == [0.0],
        )
    except RecipesError as error:
        error.hints = (*error.hints, f"the weights are kept in {scratch}")
        raise
    ranks.on_main_rank(lambda: write_card(scratch, recipe, summary))
    ranks.on_main_rank(lambda: publish(scratch, attempt.weights))
    return check
