"""THE training script: recipe -> SFTTrainer or DPOTrainer -> run directory.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml
        -m recipes_lib.train RECIPE [section.key=value ...]

The same line trains on a laptop's CPU, one GPU, several (DDP, FSDP2) or several machines: only the
accelerate config differs. Run it again after any interruption, and it continues.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from recipes_lib.config.launch import TRAIN_FLAGS
from recipes_lib.config.recipe import DPO, Recipe, load_recipe
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.ranks import on_main_rank, world_size
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.training import stopping
from recipes_lib.training.launch_check import leave_gpus_out

# gloo's group waits for ever where a rank frees its model before the others
_KEPT: list[object] = []


def train(
    recipe: Recipe, run: RunDirectory, options: argparse.Namespace, stop: stopping.StopRequest
) -> int:
    """The straight line from recipe to weights, which every rank walks; return the exit code.

    What only one may do (folders, files, messages) rank 0 does inside `on_main_rank`, which hands
    its result, or its error, to all: all go on or all stop.
    """
    quiet_libraries()
    # Here and not on top: a process for the CPU has hidden the GPUs before torch looks for them,
    # and `--help` needs none of this.
    import torch

    from recipes_lib.config.upstream import build_train_config, check_packages
    from recipes_lib.core.environment import library_versions
    from recipes_lib.core.ranks import say_once
    from recipes_lib.data.prepare import prepare_data
    from recipes_lib.data.prompts import chat_template, template_date
    from recipes_lib.training import launch_check
    from recipes_lib.training.attempt import begin_attempt, save_and_check, summarise_training
    from recipes_lib.training.build import build_trainer, read_model, start_up_lines
    from recipes_lib.training.finished import nothing_to_do
    from recipes_lib.training.resume_guard import guarded_values
    from recipes_lib.weights.load import base_fingerprint, load_checked_tokenizer
    from recipes_lib.weights.runs import check_base_run

    # recipe -> arguments. The processes meet here; what is refused now leaves no run behind.
    launch_check.check_request(recipe, torch.cuda.device_count())
    launch_check.shard_on_cpus()
    args = build_train_config(recipe, run.checkpoints, world_size())
    active = launch_check.what_runs()
    launch_line = launch_check.check_launch(active)

    # lock, signals, and the record of how it ended
    with begin_attempt(run, recipe, stop) as attempt:
        if attempt.finished:
            say_once(nothing_to_do(run, recipe))
            return ExitCode.DONE

        # arguments -> tokenizer -> rows; rows without anything to learn from stop the run
        check_packages(recipe)
        tokenizer = load_checked_tokenizer(recipe, active, options.trust_remote_code)
        # A template that prints the date prints that of the run's first day in every attempt.
        date = on_main_rank(
            lambda: template_date(recipe.data, tokenizer, attempt.earlier.get("template_date"))
        )
        dated = recipe.data.model_copy(update={"template_date": date})
        recipe = attempt.recipe = dataclasses.replace(recipe, data=dated)
        data = prepare_data(recipe, tokenizer)
        if recipe.data.prompt_format == "chat":
            # so that the tokenizer beside the weights carries the template that renders prompts
            tokenizer.chat_template = chat_template(recipe.data, tokenizer)
        audited = (f"warning: {warning}" for warning in data.audit.warnings)
        for line in (*data.audit.notes, *audited):
            say_once(line)

        # rows -> checkpoint. A resumed run must share every guarded value with its beginning.
        guard = guarded_values(
            recipe, data.fingerprint, active.world_size, active.distributed_type, library_versions()
        )
        guard |= {"prompt_format_hash": data.prompt_format_hash, "tokens_hash": data.tokens_hash}
        guard["base_weights"] = on_main_rank(lambda: base_fingerprint(recipe))
        if data.audit.training_template is not None:
            guard["training_template_hash"] = data.audit.training_template["sha256"]
        record = {"launch": launch_line, "template_date": date}
        checkpoint = on_main_rank(
            lambda: attempt.continue_or_start(data, options.resume_anyway, guard, **record)
        )
        attempt.owns_records = True
        args.eval_on_start &= checkpoint is None

        # checkpoint -> model -> trainer
        on_main_rank(lambda: check_base_run(recipe.model.name_or_path))
        model = read_model(recipe, tokenizer, active)
        if recipe.stage == DPO:
            data = attempt.add_reference(data, model, args, guard, options.resume_anyway)
        trainer = build_trainer(recipe, args, model, tokenizer, data, run, stop, guard)
        if world_size() > 1:
            _KEPT.append(trainer)
        launch_check.check_launch(launch_check.what_runs(trainer.accelerator))
        for line in (f"run {run.path}", *start_up_lines(trainer, launch_line)):
            say_once(line)

        # trainer -> weights. Until here a signal ends the process; from here on it asks for a
        # checkpoint after the step.
        attempt.begin_steps()
        trainer.train(resume_from_checkpoint=checkpoint)
        if stop.agreed:
            return on_main_rank(lambda: attempt.record_stop(trainer.state))
        summary = on_main_rank(lambda: summarise_training(trainer, data))
        say_once("saving the weights, and comparing them with the trained ones ...")
        check = save_and_check(trainer, attempt, summary)
        on_main_rank(lambda: attempt.record_finish(summary, check))
        return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Train one recipe to its end or to a checkpoint; return the exit code (`ExitCode`)."""
    options, overrides = parse_arguments(argv)
    stopping.end_with_launcher()
    leave_gpus_out()
    recipe = None
    try:
        stop = stopping.StopRequest()
        with stopping.handling(stop.on_signal):
            # one process resolves it, and all train the same
            recipe = on_main_rank(lambda: load_recipe(options.recipe, overrides))
            code = train(recipe, RunDirectory(recipe.name), options, stop)
    except Exception as error:
        if options.debug:
            raise
        return stopping.report(error, RunDirectory(recipe.name).path if recipe else None)
    return stopping.exit_status(code, on_every_rank=True)


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the overrides (`section.key=value`) as they were typed."""
    parser = argparse.ArgumentParser(
        prog="recipes_lib.train", description="Fine-tune a model from a recipe.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="a recipe YAML; section.key=value after it overrides values")
    for name, text in TRAIN_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    stopping.end_process(main())
