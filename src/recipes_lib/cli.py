"""`recipes VERB ...`: imports the verb's module, and turns errors into a line and an exit code.

A verb is a module in `commands/` with a function `run`, or several in `ACTIONS`, and one line in
`VERBS`. The function's parameters are its command line (`commands.declare`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from recipes_lib import __version__
from recipes_lib.commands import GIVEN, declare, parameters
from recipes_lib.core.errors import (
    ExitCode,
    RecipeError,
    RecipesError,
    explain_fault,
    one_line,
    print_error,
)

START_HERE = {
    "new": "start a recipe of your own from an existing one",
    "check": "check recipes and configs, files or folders",
    "data": "what the model reads, and which tokens carry loss",
    "plan": "what a training needs: memory, steps, time, and what to change",
    "train": "train a recipe, or continue it",
    "chat": "chat with runs and their base model",
    "eval": "answer, judge and benchmark runs and models",
    "study": "compare variants of a recipe: plan, run, status, report",
    "export": "write a folder to share: weights, tokenizer, model card",
    "launch": "submit a recipe or a study as Slurm jobs; status, cancel, logs",
}
MORE = {
    "ls": "list the recipes",
    "show": "a resolved recipe, with the file and line of every value; --diff OTHER",
    "explain": "what a key means, its type and default",
    "migrate": "turn a flat TRL config into a recipe",
    "status": "the state of runs",
    "merge": "fold an adapter into its base model",
    "judge": "audit a judge: its scorecard",
    "compare": "compare any runs, or results of lm-eval and alpaca_eval",
    "prefetch": "fetch models, data and judges for nodes without a network",
    "doctor": "check versions, device, disk and token, and say what to do",
}
VERBS = {**START_HERE, **MORE}
_OVERRIDES = (
    "section.key=value words override values of the recipe, for example train.learning_rate=1e-4."
)
_DEBUG = "--debug shows tracebacks."


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise the usage error instead of printing and exiting; say what a missing word is."""
        missing = message.removeprefix("the following arguments are required: ").split(", ")
        hints = [
            f"{name}: {action.help}"
            for action in self._actions
            for name in action.option_strings or [str(action.metavar)]
            if name in missing and action.help
        ]
        usage = self.format_usage().strip()
        raise RecipeError(f"{self.prog}: {message}", *hints, usage, f"more: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code (`errors.ExitCode`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - closed with `>&-`: Python has no stream
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", "", FutureWarning, r"(transformers|trl|peft|torch)\.")
    debug = "--debug" in words
    try:
        code = _run([word for word in words if word != "--debug"], debug)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `| head` went away: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = error if isinstance(error, RecipesError) else explain_fault(error)
        if message is None:
            what = f"internal error: {type(error).__name__}: {one_line(error)}"
            message = RecipesError(what, "this is a bug; --debug shows where")
        print_error(message)
        return int(message.exit_code)


def _run(words: Sequence[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print("recipes VERB ...    fine-tune language models from YAML recipes")
        for group, verbs in (("start here", START_HERE), ("more", MORE)):
            print(f"\n{group}")
            print("\n".join(f"  {name:<9} {text}" for name, text in verbs.items()))
        print("\none verb in full: recipes VERB --help\nnext: recipes ls")
        return int(ExitCode.DONE)
    if words[0] == "--version":
        print(__version__)
        return int(ExitCode.DONE)
    verb, *rest = words
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hints = [f"did you mean recipes {near[0]}?"] if near else []
        raise RecipeError(f"recipes: there is no verb '{verb}'", *hints, "all verbs: recipes")
    function, arguments = parse_words(verb, rest)
    given = {"debug": debug, "typed": list(words)}
    arguments |= {name: given[name] for name in given.keys() & parameters(function)}
    return int(function(**arguments))


def parse_words(verb: str, words: Sequence[str]) -> tuple[Callable[..., int], dict[str, Any]]:
    """Return the function of a verb, and its arguments as the words say them."""
    module = importlib.import_module(f"recipes_lib.commands.{verb}")
    description = f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}."
    parser = _Parser(prog=f"recipes {verb}", description=description, allow_abbrev=False)
    actions: dict[str, Callable[..., int]] = getattr(module, "ACTIONS", {})
    if actions:
        choice = parser.add_subparsers(dest="action", required=True, metavar="|".join(actions))
        for name, function in actions.items():
            text = (function.__doc__ or "").partition(".")[0]
            declare(choice.add_parser(name, help=text, allow_abbrev=False), function)
    else:
        declare(parser, module.run)
    takes_overrides = not actions and "overrides" in parameters(module.run)
    notes = (_OVERRIDES if takes_overrides else "", getattr(module, "EPILOG", ""), _DEBUG)
    parser.epilog = " ".join(filter(None, notes))
    known, unknown = parser.parse_known_args(words)
    arguments = vars(known)
    function = actions[arguments.pop("action")] if actions else module.run
    if "overrides" in parameters(function):
        arguments["overrides"] = unknown
    flags = parameters(function).keys() - {*GIVEN}
    options = [f"--{name.replace('_', '-')}" for name in flags]
    for word in unknown:
        name = word.partition("=")[0]
        is_option = name.startswith("-") and "." not in name
        near = difflib.get_close_matches(name, options, n=1) if is_option else []
        if near or "overrides" not in arguments:
            kind = "option" if word.startswith("-") else "argument"
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"unknown {kind} '{name}'{hint}")
    return function, arguments


if __name__ == "__main__":
    sys.exit(main())
