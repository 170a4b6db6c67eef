"""One attempt at one run, from the lock to the final state. `train.py` calls the methods in order; every rank does.

What only one process may do (folders, files, messages) rank 0 does, and its errors reach all ranks (`ranks.on_main_rank`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.errors import ExitCode, Interrupted, Preempted, RecipeError, RecipeErrors, RecipesError
from recipes_lib.faults import check_address_space, explain_fault
from recipes_lib.runs.directory import RunDirectory, State
from recipes_lib.terminal import next_step, say
from recipes_lib.training.ranks import leave_together, meet, on_main_rank, rank

if TYPE_CHECKING:
    from recipes_lib.recipe.recipe import Recipe
    from recipes_lib.training.trainer import RecipeTrainer


@contextmanager
def open_session(recipe: Recipe, run: RunDirectory, options: argparse.Namespace) -> Iterator[Session]:
    """Start this process's part of a run: launcher checked, run locked, signals handled, and the outcome recorded at the end.

    Raises:
        RecipeError: the launcher does something else than it was asked for, or the batch cannot be divided.
        EnvironmentFault: another process holds the run.
    """
    from recipes_lib.runs.lock import run_lock

    quiet_libraries()
    session = Session(recipe, run, options)
    with ExitStack() as stack:
        stack.enter_context(session.stop.listening())

        def begin() -> None:
            stack.enter_context(run_lock(run.path))
            session.read_earlier_attempt()

        try:
            on_main_rank(begin)
            session.already_finished = on_main_rank(lambda: session.already_finished)
            yield session
            leave_together(session)
        except RecipesError as error:
            session.record_failure(int(error.exit_code), str(error))
            raise
        except BaseException as error:
            fault = stop_behind(error) or explain_fault(error)
            session.record_failure(int(fault.exit_code if fault else ExitCode.FAILED), str(fault or f"{type(error).__name__}: {error}"))
            if fault:
                raise fault from error
            raise


class Session:
    """The state of one attempt; each method is one stage."""

    def __init__(self, recipe: Recipe, run: RunDirectory, options: argparse.Namespace) -> None:
        import torch
        from accelerate import PartialState

        from recipes_lib.recipe.upstream import build_sft_config
        from recipes_lib.training import fsdp_on_cpu
        from recipes_lib.training.hub import push_target
        from recipes_lib.training.launch_check import active_launch, check_gpus, check_launch, check_precision, what_was_asked
        from recipes_lib.training.stopping import StopRequest

        self.recipe, self.run, self.options = recipe, run, options
        self.stop = StopRequest(run.stop_file)
        self.already_finished = False
        self.taken_over = False
        self.earlier: dict[str, Any] = {}
        self.changes: dict[str, list[Any]] = {}
        self.guard: dict[str, Any] = {}
        self.checkpoint: Path | None = None
        self.marker: dict[str, Any] = {}
        self.planned: dict[str, Any] | None = None
        self.trainer: RecipeTrainer
        check_gpus(torch.cuda.device_count())
        check_precision(recipe)
        if fsdp_on_cpu.is_wanted():
            fsdp_on_cpu.install()
        self.args = build_sft_config(recipe, run.checkpoints, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        self.push_to = push_target(recipe)
        state = PartialState()
        fsdp = state.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.active = active_launch("FSDP" if fsdp else state.distributed_type, state.num_processes, state.device)
        self.asked = what_was_asked()
        self.launch_line = check_launch(self.asked, self.active)

    def say(self, text: str) -> None:
        """Print from rank 0."""
        if rank() == 0:
            say(text)

    # ---- The run directory ----

    def read_earlier_attempt(self) -> None:
        """Rank 0: take over what an earlier attempt at this run recorded, and write what is known of this one."""
        from recipes_lib.runs.resume_guard import recipe_differences
        from recipes_lib.training.trained import weights_damage

        self.run.check_inside()
        self.earlier = self.run.read_state() if self.run.exists() else {}
        if self.earlier.get("state") == "finished":
            changed = recipe_differences(self.recipe, self.earlier.get("guard", {}))
            if changed:
                what = f"run '{self.run.name}' is finished, with other settings: {', '.join(changed)}"
                raise RecipeError(what, "start a new run with run.name=OTHER")
            damage = weights_damage(self.run, self.recipe.lora is None)
            if damage is None:
                self.already_finished = True
                restore_settings(self.run, self.recipe)
                return
            what = "going on from its newest whole checkpoint, or from the beginning where there is none"
            say(f"run '{self.run.name}' is finished, but {damage}; {what}")
        if self.earlier.get("state") == "imported":
            raise RecipeError(f"run '{self.run.name}' was imported and cannot be trained", "start a new run with run.name=OTHER")
        self.run.stop_file.unlink(missing_ok=True)
        if not self.earlier:
            self.run.write_state("running", attempts=1, exit_code=None, error=None)
            write_provenance(self.run, self.recipe)
            self.taken_over = True

    def take_over_run(self, **fields: Any) -> None:
        """Rank 0: from here on the run's record is this attempt's; an attempt that was refused has left it as it was."""
        from recipes_lib.atomic_files import write_json
        from recipes_lib.data.preparation import data_folders
        from recipes_lib.training.checkpoints import set_aside

        folders = [str(folder.resolve()) for folder in data_folders(self.recipe)]
        if self.earlier:
            fields["attempts"] = self.earlier.get("attempts", 0) + 1
            write_provenance(self.run, self.recipe)
        if self.earlier.get("state") == "finished" and (weights := self.run.weights(self.recipe.lora is None)).is_dir():
            set_aside(weights, ".damaged")
        write_json(self.run.path / "supervision.json", self.data.audit)
        write_json(self.run.path / "splits.json", self.data.splits)
        self.run.write_state("running", exit_code=None, error=None, data_folders=folders, **fields)
        self.taken_over = True

    def record_failure(self, code: int, error: str) -> None:
        """Note in run.json how this attempt ended; a run that it did not begin or take over is left alone.

        On a full disk the note may be lost; the error itself must not be, so it is not replaced by one about the note.
        """
        if rank() != 0 or not self.taken_over:
            return
        with suppress(OSError, RecipesError):
            if self.run.exists() and self.run.read_state()["state"] == "running":
                state: State = "preempted" if code in {ExitCode.PREEMPTED, ExitCode.INTERRUPTED} else "failed"
                self.run.write_state(state, exit_code=code, error=error)

    def report_finished(self) -> int:
        """A finished run is not trained again."""
        weights = self.run.weights(self.recipe.lora is None)
        self.say(f"run '{self.run.name}' is already finished, nothing to do: {weights}")
        self.say("to train it again, choose another run.name")
        return ExitCode.DONE

    # ---- Stages ----

    def prepare_data(self) -> None:
        """Check the recipe against its model (stage 2), then tokenise, split and audit.

        The audit is a gate: rows without anything to learn from stop the run here.
        """
        from recipes_lib.data.audit import warnings_of
        from recipes_lib.data.preparation import data_folders, prepare_data
        from recipes_lib.data.prompts import chat_template
        from recipes_lib.recipe.check import check_upstream
        from recipes_lib.recipe.upstream import check_packages
        from recipes_lib.training.model import load_tokenizer
        from recipes_lib.training.trackers import check_trackers

        check_trackers(self.recipe, self.args)
        check_packages(self.recipe)
        unchecked: list[RecipeError] = []
        if errors := check_upstream(self.recipe, remote_code=self.options.trust_remote_code, notes=unchecked):
            raise RecipeErrors(errors)
        self.tokenizer = load_tokenizer(self.recipe)
        if unchecked and (errors := check_upstream(self.recipe, remote_code=self.options.trust_remote_code)):  # its files are here now
            raise RecipeErrors(errors)
        self.data = prepare_data(self.recipe, self.tokenizer)
        if self.recipe.data.prompt_format == "chat":  # so that the tokenizer beside the weights carries the template they were trained with
            self.tokenizer.chat_template = chat_template(self.recipe.data, self.tokenizer, data_folders(self.recipe))

        for line in (*map(str, self.recipe.warnings), *(f"warning: {warning}" for warning in warnings_of(self.data.audit))):
            self.say(line)

    def check_resume(self) -> None:
        """Find the newest complete checkpoint, and refuse to continue it with other settings."""
        from recipes_lib.runs.manifest import library_versions
        from recipes_lib.runs.resume_guard import check_resume, guarded_values
        from recipes_lib.training import checkpoints, metrics

        world_size = self.active.world_size
        guard = guarded_values(self.recipe, self.data.fingerprint, world_size, self.active.distributed_type, library_versions())
        guard["prompt_format_hash"] = self.data.prompt_format_hash

        self.guard = guard

        def decide() -> Path | None:
            self.run.checkpoints.mkdir(parents=True, exist_ok=True)
            found = checkpoints.newest_complete(self.run.checkpoints, report=say)
            if found is not None:
                self.changes = check_resume(
                    self.run.name,
                    self.earlier.get("guard") or checkpoints.read_marker(found).get("guard", guard),
                    guard,
                    self.options.resume_anyway,
                )
                checkpoints.check_resumable(found, world_size, self.options.allow_partial_resume)
            pending = found is not None and checkpoints.read_marker(found).get("evaluation_pending", False)
            metrics.forget_after(self.run.metrics, int(found.name.split("-")[1]) if found else -1, evaluated=not pending)
            resumed = self.earlier.get("resumed", [])
            if found is not None:
                resumed = [*resumed, {"from": found.name, "changed": self.changes, "partial": self.options.allow_partial_resume}]
            self.take_over_run(guard=guard, resumed=resumed, launch=self.launch_line, planned=self._planned())
            return found

        self.checkpoint = on_main_rank(decide)
        if self.checkpoint is not None:
            self.marker = checkpoints.read_marker(self.checkpoint)  # read now: the rotation may delete the checkpoint later
            unchanged = "recipe, data, versions unchanged" if not self.changes else f"--resume-anyway over {len(self.changes)} changes"
            self.say(f"resuming {self.checkpoint.name} ({unchanged})")

    def _planned(self) -> dict[str, Any] | None:
        """Rank 0: the plan of this training, from its real rows, to stand in run.json beside what is measured."""
        from recipes_lib.planning.gate import plan_of_active

        lengths = [len(ids) for ids in self.data.train[:20_000]["input_ids"]]
        validation = len(self.data.validation) if self.data.validation is not None else 0
        self.planned = plan_of_active(self.recipe, self.active, lengths, len(self.data.train), validation)
        return self.planned

    def load_model(self) -> None:
        """Load the base model, quantized if the recipe says so."""
        from recipes_lib.recipe.upstream import build_quantization_config
        from recipes_lib.training.model import load_model
        from recipes_lib.training.trained import check_base_run

        on_main_rank(lambda: check_base_run(self.recipe.model.name_or_path))
        key = "model.attn_implementation"
        if self.recipe.model.attn_implementation == "flex_attention" and self.active.device.startswith("cpu"):
            raise self.recipe.error(key, f"{key}: flex_attention has no backward pass on a CPU", "use sdpa, or leave the key out")
        self.model = load_model(self.recipe, self.tokenizer, build_quantization_config(self.recipe))
        meet()  # each rank reads the weights itself, and a slow share serves one after the other

    def build_trainer(self) -> None:
        """Build the trainer, and make sure that the distribution is the one that was promised before the model was loaded."""
        from recipes_lib.training.build import build_trainer
        from recipes_lib.training.launch_check import active_launch, check_launch

        facts = {"run": self.run.name, "data_fingerprint": self.data.fingerprint, "guard": self.guard}
        self.trainer = build_trainer(self.recipe, self.args, self.model, self.tokenizer, self.data, self.run, self.stop, facts)
        del self.model
        accelerator = self.trainer.accelerator
        check_launch(self.asked, active_launch(accelerator.distributed_type, accelerator.num_processes, accelerator.device))
        if self.checkpoint is not None:
            self.trainer.resume_facts(self.marker, exactly=not (self.changes or self.options.allow_partial_resume))

    def announce(self) -> None:
        """Say what is about to happen: the batch arithmetic, what is trained, and what is really active."""
        from recipes_lib.recipe.architectures import describe_targets
        from recipes_lib.recipe.batch import describe_batch, describe_last_step, planned_steps
        from recipes_lib.recipe.schedule import describe_schedule
        from recipes_lib.training.build import count_quantized, describe_exchange, describe_trainable

        args, trainer = self.args, self.trainer
        padding = ", padding-free" if args.padding_free or trainer.flattens else ", packed" if args.packing else ""
        precision = "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else str(trainer.model.dtype).removeprefix("torch.")
        attention = getattr(trainer.model.config, "_attn_implementation", "unknown")
        shape = {"per_device": args.per_device_train_batch_size, "accumulation": args.gradient_accumulation_steps}
        shape["world_size"] = self.active.world_size
        rows, drop_last = len(trainer.train_dataset), args.dataloader_drop_last
        steps = planned_steps(rows, **shape, epochs=args.num_train_epochs, max_steps=args.max_steps, drop_last=drop_last)
        scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        self.quantized_layers = count_quantized(trainer.model)
        self.say(f"run {self.run.path}")
        self.say(f"launch: {self.launch_line}; precision {precision}; attention {attention}{padding}; seed {args.seed}")
        self.say(f"batch: {describe_batch(rows, steps, **shape)}")
        last = describe_last_step(rows, **shape, drop_last=drop_last)
        if last and steps[1] >= steps[0]:
            self.say(f"epoch: {last}")
        self.say(f"schedule: {describe_schedule(scheduler, args.learning_rate, args.warmup_steps, steps[1])}")
        raised = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
        self.say(f"trains: {describe_trainable(trainer.model, raised=raised)}")
        if self.recipe.lora is not None:
            self.say(describe_targets(trainer.model))
        if trainer.is_fsdp_enabled and (args.gradient_accumulation_steps > 1 or trainer.max_tokens is not None):
            self.say(f"gradients: {describe_exchange(trainer.model, trainer.syncs_each_batch)}")

    def run_trainer(self) -> None:
        """Train, from the beginning or from the checkpoint, until the planned end or a stop."""
        from recipes_lib.training.stopping import EvaluationStopped

        self.stop.wait_for_step()
        started = time.monotonic()
        try:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except EvaluationStopped:  # in an evaluation that an earlier stop had put off: the old checkpoint still says so
            pass
        self.seconds = time.monotonic() - started

    @property
    def stopped(self) -> bool:
        """Whether all ranks agreed to stop before the planned end, or in the validation after it."""
        return bool(self.stop.agreed)

    # ---- The end ----

    def close_as_stopped(self) -> int:
        """The checkpoint is written; say how to go on."""
        from recipes_lib.training.stopping import EXIT_CODES

        code = EXIT_CODES[self.stop.agreed]

        def record() -> None:
            self.run.stop_file.unlink(missing_ok=True)
            step, last = self.trainer.state.global_step, self.trainer.state.max_steps
            self.run.write_state("preempted", exit_code=int(code), step=step, error=None)
            where = "in the validation after the last step," if step >= last else "at"
            say(f"stopped {where} step {step}/{last}: checkpoint-{step} is complete (exit code {int(code)})")
            next_step("run the same command again to resume")

        on_main_rank(record)
        return code

    def close_as_finished(self) -> int:
        """Save and check the weights, draw the curves, and only then call the run finished."""
        from recipes_lib.atomic_files import sync, sync_tree
        from recipes_lib.training.figures import draw_figures
        from recipes_lib.training.finish import save_and_check
        from recipes_lib.training.hub import push_finished_run
        from recipes_lib.training.summary import beside_the_plan, summarise_training

        self.stop.close()
        summary = on_main_rank(lambda: summarise_training(self))
        self.say("saving the weights, and reloading them to check that they are what was trained ...")
        check = save_and_check(self.trainer, self.recipe, self.data, self.run, summary)

        def record() -> None:
            draw_figures(self.run.metrics, self.run.figures, self.run.name)
            sync_tree(self.run.figures)
            if self.run.metrics.is_file():
                sync(self.run.metrics)
            self.run.stop_file.unlink(missing_ok=True)
            self.run.write_state("finished", exit_code=0, error=None, summary=summary, weights_check=check)
            weights = self.run.weights(self.recipe.lora is None)
            reload = check["reload"]
            say(f"finished: {weights} (reloaded: logits differ by at most {reload['largest']:.2g} of {reload['scale']:.2g})")
            say(beside_the_plan(summary))
            if self.push_to:
                say(f"pushed: {push_finished_run(self.run, self.push_to)}")
            next_step(f"recipes chat {self.run.name}")

        on_main_rank(record)
        return ExitCode.DONE


def restore_settings(run: RunDirectory, recipe: Recipe) -> None:
    """Write the settings of a finished run again where a disk damaged them; they were compared with the recipe's."""
    from recipes_lib.recipe.recipe import load_recipe

    try:
        load_recipe(run.path / "resolved.yaml")
    except RecipeError as error:
        say(f"{error}; written again")
        write_provenance(run, recipe)


def write_provenance(run: RunDirectory, recipe: Recipe) -> None:
    """Write recipe.yaml (as it was), resolved.yaml, command.txt and environment.json."""
    import yaml

    from recipes_lib.atomic_files import write_json, write_text
    from recipes_lib.runs.manifest import command_line, environment

    write_text(run.path / "recipe.yaml", recipe.path.read_text(encoding="utf-8-sig"))
    write_text(run.path / "resolved.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
    write_text(run.path / "command.txt", command_line() + "\n")
    write_json(run.path / "environment.json", environment())


def quiet_libraries() -> None:
    """Leave the terminal to this project's own lines; libraries still report errors."""
    import warnings

    check_address_space()
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\.")
    # PEFT doubles the rank for the experts' two fused matrices, and then looks for the pattern among modules, where no parameter is
    warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match .*: \['\.\*.*\.gate_up_proj'\]")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def stop_behind(error: BaseException | None) -> RecipesError | None:
    """Return the stop request that an error hides: transformers turns one that arrives during its lazy imports into a RuntimeError."""
    while error is not None:
        if isinstance(error, Preempted | Interrupted):
            return error
        error = error.__cause__ or error.__context__
    return None
