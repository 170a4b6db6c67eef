"""`recipes VERB ...`: finds the verb, imports its module alone, and turns errors into one message
and an exit code.

A verb is a module in `commands/` with `configure(parser)` and `run(args) -> int`, and one line in
`_GROUPS`.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from recipes_lib import __version__
from recipes_lib.config.suggestions import did_you_mean, near_names
from recipes_lib.core.errors import (
    EnvironmentFault,
    ExitCode,
    RecipeError,
    RecipesError,
    print_error,
)
from recipes_lib.core.faults import explain_fault


@dataclass(frozen=True)
class Verb:
    """One verb: what it does in a line, its group in the overview, and whether `section.key=value`
    words may follow.
    """

    name: str
    group: str
    help: str
    overrides: bool

    @property
    def module(self) -> str:
        """Its module in `commands/`: the name, with an underscore after a word of Python's own
        (`import_`).
        """
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


_GROUPS = {
    "recipes": {
        "ls": "list recipes: method, model, launch, planned memory and time, tags",
        "new": "start a recipe of your own from an existing one",
        "show": "a resolved recipe, with the file and line of every value; --diff OTHER",
        "check": "check recipes and configs, files or folders",
        "explain": "what a key means, its type and default",
        "migrate": "turn a flat TRL config into a recipe",
    },
    "machine": {"doctor": "versions, devices, disk, token: what is missing and what to do"},
    "training": {
        "data": "what the model reads and what the loss sees",
        "plan": "what a training, study or evaluation needs: memory, steps, time, what to change",
        "train": "train a recipe, or continue it",
        "status": "the state of runs",
        "chat": "talk to runs and their base model",
    },
    "weights": {
        "merge": "fold an adapter into its base model",
        "verify": (
            "compare the weights on disk with what was trained, and a merged model with its adapter"
        ),
        "export": "a folder to give away: weights, tokenizer, model card",
    },
    "evaluation": {
        "eval": "answer, judge and benchmark runs and models",
        "judge": "audit a judge: its scorecard",
    },
    "studies": {
        "study": "compare variants: plan, run, status, report, diff",
        "compare": "the tested table for any runs, outside a study",
    },
    "clusters": {
        "prefetch": "fetch and verify models, data and judges for nodes without a network",
        "launch": "submit a recipe or a study as Slurm jobs; status, cancel, logs",
    },
}
_TAKE_OVERRIDES = ("show", "data", "plan", "train", "eval", "study", "prefetch", "launch")
VERBS = tuple(
    Verb(name, group, text, name in _TAKE_OVERRIDES)
    for group, verbs in _GROUPS.items()
    for name, text in verbs.items()
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise the usage error instead of printing and exiting."""
        usage = self.format_usage().strip()
        raise RecipeError(f"{self.prog}: {message}", usage, f"more: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code (`errors.ExitCode`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - closed with `>&-`: Python has no stream
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in words
    try:
        code = _dispatch([word for word in words if word != "--debug"], debug)
        sys.stdout.flush()
        return code
    except RecipesError as error:
        if debug:
            traceback.print_exc()
        print_error(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `| head` went away: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except Exception as error:
        if debug:
            raise
        told = _in_our_words(error)
        print_error(told)
        return int(told.exit_code)


def _in_our_words(error: Exception) -> RecipesError:
    """Return what went wrong as one of our errors: a fault of the machine, or a bug."""
    # nothing here that a training could resume
    plain = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
    fault = None if isinstance(error, plain) else explain_fault(error)
    if fault:
        return fault
    if isinstance(error, OSError) and error.strerror:  # a folder in the way, no permission
        place = error.filename2 or error.filename
        what = f"cannot read or write {place}" if place else "cannot write the output"
        return EnvironmentFault(f"{what}: {error.strerror.lower()}", "--debug shows where")
    summary = str(error).strip().splitlines() or [""]
    what = f"internal error: {type(error).__name__}: {summary[0]}"
    return RecipesError(what, "this is a bug; --debug shows where")


def _dispatch(words: list[str], debug: bool) -> int:
    """Find the verb and run it."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return int(ExitCode.DONE)
    if words[0] == "--version":
        print(__version__)
        return int(ExitCode.DONE)
    verb = _find_verb(words[0])
    module = importlib.import_module(f"recipes_lib.commands.{verb.module}")
    description = f"{verb.help[0].upper()}{verb.help[1:]}."
    parser = _Parser(prog=f"recipes {verb.name}", description=description, allow_abbrev=False)
    if verb.overrides:
        parser.epilog = (
            "section.key=value words after it override values of the recipe, for example"
            " train.learning_rate=1e-4"
        )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    module.configure(parser)
    try:
        args, rest = parser.parse_known_args(words[1:])
    except SystemExit as end:  # --help
        return int(end.code or 0)
    args.debug, args.overrides = debug, _overrides(verb, parser, rest)
    return int(module.run(args))


def _find_verb(word: str) -> Verb:
    """Return the verb of that name."""
    for verb in VERBS:
        if verb.name == word:
            return verb
    near = did_you_mean(word, [verb.name for verb in VERBS], "recipes ")
    raise RecipeError(f"recipes: there is no verb '{word}'", *near, "all verbs: recipes")


def _overrides(verb: Verb, parser: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """Return the words that override recipe values; any other word left over is an error."""
    options = [
        option
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    for word in rest:
        name = word.partition("=")[0]
        near = near_names(name, options) if name.startswith("-") and "." not in name else []
        if near or not verb.overrides:
            kind = "option" if word.startswith("-") else "argument"
            meant = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"unknown {kind} '{name}'{meant}")
    return rest


def overview() -> str:
    """Return the grouped table of verbs."""
    lines = ["recipes VERB ...    fine-tune language models from YAML recipes"]
    for group, verbs in _GROUPS.items():
        lines += ["", group, *(f"  {name:<9} {text}" for name, text in verbs.items())]
    return "\n".join([*lines, "", "one verb in full: recipes VERB --help", "next: recipes ls"])


if __name__ == "__main__":
    sys.exit(main())
