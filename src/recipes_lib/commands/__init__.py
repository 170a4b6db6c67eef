"""The verbs of the command line. A verb is a function; its parameters are its words and flags."""

import argparse
import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# what several verbs take
RecipeWord = Annotated[str, "path or name of a recipe"]
Json = Annotated[bool, "print one JSON object"]
Accelerate = Annotated[str | None, "a file in accelerate_configs/ or a path; default: the recipe's"]
Gpu = Annotated[str | None, "h100, l40s, 4090, ... or cpu; default: this machine's"]
Gpus = Annotated[int | None, "processes on each machine; default: the recipe's launch.gpus"]
Nodes = Annotated[int | None, "machines; default: the recipe's launch.nodes"]

GIVEN = ("overrides", "debug", "typed")  # what the command line hands over beside the words


def declare(parser: argparse.ArgumentParser, function: Callable[..., int]) -> list[argparse.Action]:
    """Declare a function's parameters: arguments, and flags after the `*`; each is
    `Annotated[type, help]`, a whole number `Annotated[int, help, least]` (1 by default).
    """
    parser.set_defaults(function=function)
    if "overrides" in parameters(function):
        parser.epilog = f"section.key=value arguments override the YAML. {parser.epilog}"
    hints = get_type_hints(function, include_extras=True)
    actions = []
    for name, parameter in parameters(function).items():
        if name in GIVEN:
            continue
        kind, text, *least = get_args(hints[name])
        if get_origin(kind) in (Union, UnionType):  # `T | None`
            kind = next(part for part in get_args(kind) if part is not NoneType)
        is_flag = parameter.kind is parameter.KEYWORD_ONLY
        is_required = parameter.default is parameter.empty
        options: dict[str, Any] = {"help": text}
        options["default"] = None if is_required else parameter.default
        metavar = name.rstrip("_").upper()
        if is_flag:  # --max-new-tokens TOKENS
            metavar = metavar.rpartition("_")[2]
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif kind is int:
            options |= {"metavar": "N", "type": at_least(least[0] if least else 1)}
        elif get_origin(kind) is list:
            options |= {"metavar": metavar.removesuffix("S"), "nargs": "+"}
            if is_flag:
                options["action"] = "extend"  # the flag may be given again
            elif not is_required:
                options["nargs"] = "*"
        else:
            options |= {"metavar": metavar, "type": kind}
        if is_flag:
            flag = f"--{name.rstrip('_').replace('_', '-')}"
            action = parser.add_argument(flag, dest=name, required=is_required, **options)
        else:
            if not is_required:
                options.setdefault("nargs", "?")
            action = parser.add_argument(name, **options)
        actions.append(action)
    return actions


def described(function: Callable[..., int]) -> list[dict[str, object]]:
    """Return the arguments and flags of a verb's function, for `recipes --help --json`."""
    rows = []
    for action in declare(argparse.ArgumentParser(), function):
        row: dict[str, object] = {"name": (action.option_strings or [action.dest])[0]}
        row["help"] = action.help
        row["required"] = action.required
        row["takes_value"] = action.nargs != 0
        row["repeatable"] = action.nargs in ("+", "*")
        if action.choices:
            row["choices"] = list(action.choices)
        rows.append(row)
    return rows


def parameters(function: Callable[..., int]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a verb's function."""
    return inspect.signature(function).parameters


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers that says what it expected."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return number


def flag_words(**given: bool) -> list[str]:
    """Return the flags that are given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
