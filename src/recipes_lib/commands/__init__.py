"""The verbs of the command line: one module per verb, whose function's parameters are its words."""

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
        kind = next(part for part in (*get_args(annotated), annotated) if part is not NoneType)
        kind = annotated if get_origin(annotated) in (list, Literal) else kind
        is_flag = parameter.kind is parameter.KEYWORD_ONLY
        optional = parameter.default is not parameter.empty
        options: dict[str, Any] = {"help": text, "default": parameter.default if optional else None}
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            word = name.rstrip("_").upper()
            options["metavar"] = word.rpartition("_")[2] if is_flag else word
            if kind is int:
                options |= {"type": at_least(*least or [1]), "metavar": "N"}
            elif get_origin(kind) is list:
                options["metavar"] = options["metavar"].removesuffix("S")
                options["nargs"] = "*" if optional and not is_flag else "+"
                options |= {"action": "extend"} if is_flag else {}
            elif kind is not str:
                options["type"] = kind
        if is_flag:
            flag = f"--{name.rstrip('_').replace('_', '-')}"
            parser.add_argument(flag, dest=name, required=not optional, **options)
        elif optional and "nargs" not in options:
            parser.add_argument(name, nargs="?", **options)
        else:
            parser.add_argument(name, **options)


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
