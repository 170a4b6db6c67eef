"""lm_eval's own flags on our command lines: each becomes a `suite.key=value` override. Needs
neither torch nor lm_eval.
"""

from __future__ import annotations

import argparse
import json
import re

_FLAGS = (
    "tasks",
    "limit",
    "num_fewshot",
    "batch_size",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
)
_TOP_LEVEL_COMMA = re.compile(r""",(?=(?:[^\[\]{}"']|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})*$)""")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare lm_eval's flags."""
    group = parser.add_argument_group("lm_eval", "options under lm_eval's own names")
    for name in _FLAGS:
        if name == "apply_chat_template":
            group.add_argument(f"--{name}", action="store_true", default=None)
        else:
            group.add_argument(
                f"--{name}", metavar="true|false" if name == "fewshot_as_multiturn" else "X"
            )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return `section.key=value` words for the flags that were given.

    Example:
        >>> overrides_of(argparse.Namespace(tasks="arc_easy,gsm8k", limit="20", apply_chat_template=True, gen_kwargs=None))
        ['suite.tasks=[arc_easy, gsm8k]', 'suite.limit=20', 'suite.apply_chat_template=true']
    """  # noqa: E501
    words = []
    for name in _FLAGS:
        value = getattr(args, name, None)
        if value is None or value is False:
            continue
        if name == "tasks":
            value = f"[{', '.join(part.strip() for part in value.split(','))}]"
        elif name == "gen_kwargs" and not value.startswith("{"):
            pairs = (part.strip().partition("=") for part in _TOP_LEVEL_COMMA.split(value))
            value = "{" + ", ".join(f"{key}: {text}" for key, _, text in pairs) + "}"
        elif name == "system_instruction":
            value = json.dumps(
                value
            )  # a text stays that text, whatever YAML makes of `:`, `#` or `yes`
        words.append(f"suite.{name}={'true' if value is True else value}")
    return words
