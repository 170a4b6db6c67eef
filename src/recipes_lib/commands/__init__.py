"""The verbs of the command line. A verb is a function; its parameters are its words and flags."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

# what several verbs take
RecipeWord = Annotated[str, "path or name of a recipe"]
Json = Annotated[bool, "print one JSON object"]
Accelerate = Annotated[str | None, "a file in accelerate_configs/ or a path; default: the recipe's"]
Gpu = Annotated[str | None, "h100, l40s, 4090, ... or cpu; default: this machine's"]
Gpus = Annotated[int | None, "processes on each machine; default: the recipe's launch.gpus"]
Nodes = Annotated[int | None, "machines; default: the recipe's launch.nodes"]

GIVEN = ("overrides", "debug", "typed")  # what the command line hands over beside the words


def declare(parser: argparse.ArgumentParser, function: Callable[..., int]) -> None:
    """Declare a function's parameters: arguments, and flags after the `*`; each is
    `Annotated[type, help]`, a whole number `Annotated[int, help, least]` (1 by default).
    """
    parser.set_defaults(function=function)
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in parameters(function).items():
        if name in GIVEN:
            continue
        annotated, text, *least = get_args(hints[name])
        is_flag = parameter.kind is parameter.KEYWORD_ONLY
        optional = parameter.default is not parameter.empty
        options = _options_of(name, _without_none(annotated), is_flag, optional)
        options["help"] = text
        options["default"] = parameter.default if optional else None
        if options.get("metavar") == "N":
            options["type"] = at_least(least[0] if least else 1)
        if is_flag:
            flag = f"--{name.rstrip('_').replace('_', '-')}"
            parser.add_argument(flag, dest=name, required=not optional, **options)
            continue
        if optional and "nargs" not in options:
            options["nargs"] = "?"
        parser.add_argument(name, **options)


def _without_none(annotated: Any) -> Any:
    """Return `T` of `T | None`; lists and literals as they are."""
    if get_origin(annotated) in (list, Literal):
        return annotated
    parts = [part for part in get_args(annotated) if part is not NoneType]
    return parts[0] if parts else annotated


def _options_of(name: str, kind: Any, is_flag: bool, optional: bool) -> dict[str, Any]:
    """Return what argparse is told of a parameter of this type, but its help and default."""
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is int:
        return {"metavar": "N"}
    metavar = name.rstrip("_").upper()
    if is_flag:  # --max-new-tokens TOKENS
        metavar = metavar.rpartition("_")[2]
    if get_origin(kind) is list:
        options: dict[str, Any] = {"metavar": metavar.removesuffix("S"), "nargs": "+"}
        if is_flag:
            options["action"] = "extend"  # the flag may be given again
        elif optional:
            options["nargs"] = "*"
        return options
    if kind is str:
        return {"metavar": metavar}
    return {"metavar": metavar, "type": kind}


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
