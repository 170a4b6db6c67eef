"""THE training script: recipe -> SFTTrainer -> run directory.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml -m recipes_lib.train RECIPE [section.key=value ...]

The same line trains on a laptop's CPU, one GPU, several (DDP, FSDP2) or several machines: only the accelerate config differs.
Run it again after any interruption and it continues from the newest complete checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from recipes_lib.errors import DataError, ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.faults import explain_fault
from recipes_lib.recipe.recipe import Recipe, load_recipe
from recipes_lib.runs.directory import RunDirectory
from recipes_lib.training.launch_check import leave_gpus_out
from recipes_lib.training.ranks import EXIT_CODE_FILE, end_process, note_error, rank


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the overrides (`section.key=value`) as they were typed."""
    parser = argparse.ArgumentParser(prog="recipes_lib.train", description="Fine-tune a model from a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe YAML; any `section.key=value` after it overrides a value")
    parser.add_argument("--resume-anyway", action="store_true", help="continue a run although settings that change its result differ")
    parser.add_argument(
        "--allow-partial-resume", action="store_true", help="continue from a checkpoint that lacks optimizer or random state"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow code that ships with the model, if the recipe asks for it too"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one recipe to its planned end, or to a checkpoint it can continue from; return the exit code (`errors.ExitCode`)."""
    options, overrides = parse_arguments(argv)
    leave_gpus_out()
    recipe = None
    try:
        with ending_at_once():
            recipe = load_recipe(options.recipe, overrides)
            code = train(recipe, RunDirectory(recipe.name), options)
    except RecipesError as error:
        if options.debug:
            raise
        note_error(error)
        if rank() == 0:
            print_error(error)
        same_everywhere = isinstance(error, RecipeError | DataError) or getattr(error, "on_every_rank", "WORLD_SIZE" not in os.environ)
        return exit_status(int(error.exit_code), on_every_rank=same_everywhere)
    except Exception as error:
        if options.debug:
            raise
        from recipes_lib.training.defects import as_message

        note_error(error)
        same_everywhere = getattr(error, "on_every_rank", False)
        message = explain_fault(error) or as_message(error, RunDirectory(recipe.name).path if recipe else None)
        if rank() == 0 or not same_everywhere:
            print_error(message)
        return exit_status(int(message.exit_code), on_every_rank=same_everywhere)
    return exit_status(code, on_every_rank=True)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end this process with one line, until the session listens: an exception could be lost or disguised inside an import."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.PREEMPTED
        if os.getpid() != process:  # a worker that was forked from it
            os._exit(code)
        if rank() == 0:
            what = "interrupted" if number == signal.SIGINT else "stopped"
            line = f"{what} before the first step: nothing is lost, the same command starts it again\n"
            os.write(2, line.encode())
        os._exit(exit_status(int(code), on_every_rank=True))

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(recipe: Recipe, run: RunDirectory, options: argparse.Namespace) -> int:
    """The straight line from recipe to weights; every rank walks it."""
    from recipes_lib.training.session import open_session

    with open_session(recipe, run, options) as session:
        if session.already_finished:
            return session.report_finished()
        session.prepare_data()
        session.check_resume()
        session.load_model()
        session.build_trainer()
        session.announce()
        session.run_trainer()
        return session.close_as_stopped() if session.stopped else session.close_as_finished()


def exit_status(code: int, on_every_rank: bool) -> int:
    """Hand the exit code to `recipes train`, which the launcher cannot do: it turns every code into 1 and adds a traceback.

    Where every rank ends for the same reason the launcher is told 0, so that it stays silent; `recipes train` returns `code`.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file is None:
        return code
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several machines each has a `recipes train` of its own
        try:
            Path(file).write_text(str(code), encoding="utf-8")
        except OSError:  # a full disk: the launcher's 1 is better than the 0 of a rank that was told to be silent
            return code
    return 0 if on_every_rank else code


if __name__ == "__main__":
    end_process(main())
