"""`recipes VERB ...`: imports the verb's module, and turns errors into a line and an exit code.

A verb is a function `run_VERB` of a module in `commands/`, or several `run_VERB_ACTION`, and one
line in `VERBS`. The function's parameters are its command line (`commands.declare`).
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from recipes_lib import __version__
from recipes_lib.commands import declare, described, parameters
from recipes_lib.core.errors import (
    ExitCode,
    RecipeError,
    RecipesError,
    explain_fault,
    one_line,
    print_error,
)
from recipes_lib.core.terminal import next_step, print_json, say

if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# verb: its module in commands/, and what it does
START_HERE = {
    "new": ("recipes", "create your own recipe from an existing one"),
    "check": ("check", "check recipes and configs, files or folders"),
    "data": ("data", "show what the model reads and which tokens carry loss"),
    "plan": ("plan", "estimate memory, steps and time; say what to change"),
    "train": ("train", "train a recipe, or resume its run"),
    "chat": ("chat", "chat with runs and their base model"),
    "eval": ("evaluate", "evaluate runs and models: judges, benchmarks, checks"),
    "study": ("study", "compare variants of a recipe: plan, run, status, report"),
    "export": ("weights", "write a folder to share: weights, tokenizer, model card"),
    "launch": ("cluster", "submit a recipe or a study as Slurm jobs; status, cancel"),
}
MORE = {
    "ls": ("overview", "list the recipes"),
    "show": ("recipes", "show a resolved recipe and where each value comes from; --diff OTHER"),
    "explain": ("recipes", "explain a key: meaning, type, default"),
    "migrate": ("recipes", "turn a flat TRL config into a recipe"),
    "status": ("overview", "show the state of runs"),
    "merge": ("weights", "merge an adapter into its base model"),
    "judge": ("evaluate", "audit a judge on labelled pairs; print a scorecard"),
    "compare": ("evaluate", "compare runs, or results of other programs and tables"),
    "prefetch": ("cluster", "download models, data and judges for offline nodes"),
    "doctor": ("overview", "check versions, device, disk and token, and say what to fix"),
}
VERBS = {**START_HERE, **MORE}
_HELP = ("help", "-h", "--help")
ACTIONS = {"study": ("plan", "run", "status", "report"), "judge": ("audit",)}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, epilog="--debug shows tracebacks.", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, with the usage."""
        usage = (self.format_usage().strip(), f"more: {self.prog} --help")
        raise RecipeError(f"{self.prog}: {message}", *usage)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code (`errors.ExitCode`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - closed with `>&-`: Python has no stream
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    announce_slurm_job()
    debug = "--debug" in words
    try:
        code = _run([word for word in words if word != "--debug"] or ["--help"], debug)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        verb = words[0] if words else ""
        message = error if isinstance(error, RecipesError) else explain_fault(error, verb)
        if message is None:
            what = f"internal error: {type(error).__name__}: {one_line(error)}"
            message = RecipesError(what, "this is a bug; --debug shows where")
        print_error(message)
        return int(message.exit_code)


def announce_slurm_job() -> None:
    """Tell this process and those it starts their Slurm job. The scripts of `recipes launch` do so
    too; this is for verbs in scripts that a user wrote.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id:
        # filelock, which would double the time of `recipes --help`
        from recipes_lib.core.run_directory import JOB_VARIABLE, RESTARTS_VARIABLE

        os.environ[JOB_VARIABLE] = f"Slurm job {job_id}"
        os.environ[RESTARTS_VARIABLE] = os.environ.get("SLURM_RESTART_COUNT") or "0"


def _run(words: Sequence[str], debug: bool) -> int:
    words = _with_help(words)
    if sorted(words) == ["--help", "--json"]:
        exit_codes = {code.name.lower(): code for code in ExitCode}
        return print_json({"verbs": _described_verbs(), "exit_codes": exit_codes})
    if words[0] == "--help":
        lines = ["recipes VERB ...    fine-tune language models from YAML recipes"]
        for group, verbs in (("start here", START_HERE), ("more", MORE)):
            lines += ["", group]
            lines += [f"  {verb:<9} {text}" for verb, (_, text) in verbs.items()]
        say(*lines, "", "help for one verb: recipes VERB --help")
        return next_step("ls")
    if words[0] == "--version":
        say(__version__)
        return int(ExitCode.DONE)
    verb, *rest = words
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1)
        hints = [f"did you mean recipes {near}?" for near in nearest]
        raise RecipeError(f"recipes: unknown verb '{verb}'", *hints, "all verbs: recipes")
    function, arguments = parse_words(verb, rest)
    if "debug" in parameters(function):
        arguments["debug"] = debug
    if "typed" in parameters(function):
        arguments["typed"] = list(words)
    return int(function(**arguments))


def _with_help(words: Sequence[str]) -> Sequence[str]:
    """Return the words, a call for help as `--help` at their end: `help VERB`, `VERB help`."""
    num_names = 2 if words[0] in ACTIONS else 1
    is_named = words[0] in _HELP or "help" in words[:num_names]
    # behind other words, help may be the name of a run
    if is_named or words[num_names:] == ["help"]:
        return [word for word in words if word not in _HELP] + ["--help"]
    return words


def _functions(verb: str) -> dict[str, Callable[..., int]]:
    """Return the functions of a verb by action; of one without actions by an empty name."""
    module = importlib.import_module(f"recipes_lib.commands.{VERBS[verb][0]}")
    if verb not in ACTIONS:
        return {"": getattr(module, f"run_{verb}")}
    return {action: getattr(module, f"run_{verb}_{action}") for action in ACTIONS[verb]}


def _described_verbs() -> list[dict[str, object]]:
    """Return what every verb does and takes, for tools."""
    rows: list[dict[str, object]] = []
    for verb, (_, text) in VERBS.items():
        for action, function in _functions(verb).items():
            row: dict[str, object] = {"verb": f"{verb} {action}".strip(), "help": text}
            if action:
                row["help"] = (function.__doc__ or "").partition(".")[0]
            row["takes_overrides"] = "overrides" in parameters(function)
            row["arguments"] = described(function)
            rows.append(row)
    return rows


def parse_words(verb: str, words: Sequence[str]) -> tuple[Callable[..., int], dict[str, object]]:
    """Return the function of a verb, and its arguments as the words say them."""
    _, text = VERBS[verb]
    parser = _Parser(f"recipes {verb}", description=f"{text[0].upper()}{text[1:]}.")
    functions = _functions(verb)
    if verb in ACTIONS:
        choice = parser.add_subparsers(required=True, metavar=f"{{{','.join(ACTIONS[verb])}}}")
        for action, function in functions.items():
            summary = (function.__doc__ or "").partition(".")[0]
            declare(choice.add_parser(action, help=summary), function)
    else:
        declare(parser, functions[""])
    namespace, unknown = parser.parse_known_args(words)
    arguments = vars(namespace)
    function = arguments.pop("function")
    if "overrides" in parameters(function):
        arguments["overrides"] = unknown
    elif unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return function, arguments


if __name__ == "__main__":
    sys.exit(main())
