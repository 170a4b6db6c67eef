"""`recipes VERB ...`: finds the verb, imports its module alone, and turns errors into one message
and an exit code.

A verb is a module in `commands/` with `configure(parser)` and `run(args) -> int`, and one line in
`VERBS`.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
    overrides: bool = False

    @property
    def module(self) -> str:
        """Its module in `commands/`: the name, with an underscore after a word of Python's own
        (`import_`).
        """
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


VERBS = (
    Verb("ls", "recipes", "list recipes: method, model, launch, planned memory and time, tags"),
    Verb("new", "recipes", "start a recipe of your own from an existing one"),
    Verb(
        "show",
        "recipes",
        "a resolved recipe, with the file and line of every value",
        overrides=True,
    ),
    Verb("diff", "recipes", "what differs between two recipes"),
    Verb("check", "recipes", "check recipes and configs, files or folders"),
    Verb("explain", "recipes", "what a key means, its type and default"),
    Verb("migrate", "recipes", "turn a flat TRL config into a recipe"),
    Verb("doctor", "machine", "versions, devices, disk, token: what is missing and what to do"),
    Verb("data", "training", "what the model reads and what the loss sees", overrides=True),
    Verb(
        "plan",
        "training",
        "what a training or a study needs: memory, steps, time, cost, and what to change",
        overrides=True,
    ),
    Verb("train", "training", "train a recipe, or continue it", overrides=True),
    Verb("status", "training", "the state of runs"),
    Verb("chat", "training", "talk to runs beside their base model"),
    Verb("merge", "weights", "fold an adapter into its base model"),
    Verb(
        "verify",
        "weights",
        "compare the weights on disk with what was trained, and a merged model with its adapter",
    ),
    Verb("export", "weights", "a folder to give away: weights, tokenizer, model card"),
    Verb("eval", "evaluation", "answer, judge and benchmark runs and models", overrides=True),
    Verb("judge", "evaluation", "replay foreign judgments, or audit a judge"),
    Verb(
        "import",
        "evaluation",
        "make a run from another program's answers, judgments, benchmarks and logs",
    ),
    Verb("study", "studies", "compare variants: plan, run, status, report, diff", overrides=True),
    Verb("compare", "studies", "the tested table for any runs, outside a study"),
    Verb(
        "prefetch",
        "clusters",
        "fetch and verify models, data and judges for nodes without a network",
        overrides=True,
    ),
    Verb(
        "launch",
        "clusters",
        "submit a recipe or a study as Slurm jobs; status, cancel, logs",
        overrides=True,
    ),
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise the usage error instead of printing and exiting."""
        raise RecipeError(
            f"{self.prog}: {message}", f"{self.format_usage().strip()}", f"more: {self.prog} --help"
        )


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
    except (
        BrokenPipeError
    ):  # the reader went away (`| head`): nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except Exception as error:
        if debug:
            raise
        plain = (
            PermissionError,
            FileExistsError,
            IsADirectoryError,
            NotADirectoryError,
        )  # nothing here that a training could resume
        fault = None if isinstance(error, plain) else explain_fault(error)
        if fault:
            print_error(fault)
            return int(fault.exit_code)
        if isinstance(error, OSError) and error.strerror:  # a folder in the way, no permission
            place = error.filename2 or error.filename
            what = f"cannot read or write {place}" if place else "cannot write the output"
            print_error(
                EnvironmentFault(f"{what}: {error.strerror.lower()}", "--debug shows where")
            )
            return int(ExitCode.ENVIRONMENT)
        summary = str(error).strip().splitlines() or [""]
        print_error(
            RecipesError(
                f"internal error: {type(error).__name__}: {summary[0]}",
                "this is a bug; --debug shows where",
            )
        )
        return int(ExitCode.FAILED)


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
    parser = _Parser(
        prog=f"recipes {verb.name}",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        allow_abbrev=False,
    )
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
    verb = next((verb for verb in VERBS if verb.name == word), None)
    if verb is None:
        raise RecipeError(
            f"recipes: there is no verb '{word}'",
            *did_you_mean(word, [verb.name for verb in VERBS], "recipes "),
            "all verbs: recipes",
        )
    if not _exists(verb):
        raise RecipeError(f"recipes {word} is not part of this version", "all verbs: recipes")
    return verb


def _exists(verb: Verb) -> bool:
    return (Path(__file__).parent / "commands" / f"{verb.module}.py").is_file()


def _overrides(verb: Verb, parser: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """Return the words that override recipe values; any other word left over is an error."""
    for word in rest:
        name = word.partition("=")[0]
        near = (
            near_names(name, _options(parser)) if name.startswith("-") and "." not in name else []
        )
        if near or not verb.overrides:
            kind = "option" if word.startswith("-") else "argument"
            parser.error(
                f"unknown {kind} '{name}'" + (f"; did you mean {near[0]}?" if near else "")
            )
    return rest


def _options(parser: Any) -> Iterator[str]:
    """Yield the long options of a parser."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))


def overview() -> str:
    """Return the grouped table of verbs."""
    lines = ["recipes VERB ...    fine-tune language models from YAML recipes"]
    group = ""
    for verb in VERBS:
        if not _exists(verb):
            continue
        if verb.group != group:
            group = verb.group
            lines += ["", group]
        lines.append(f"  {verb.name:<9} {verb.help}")
    return "\n".join([*lines, "", "one verb in full: recipes VERB --help", "next: recipes ls"])


if __name__ == "__main__":
    sys.exit(main())
