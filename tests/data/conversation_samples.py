"""A conversation of two turns, and chat templates for it."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(str(find_spec("trl").origin)).parent / "chat_templates"
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First\n  answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role']"
    " == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{%"
    " else %}{{ message['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer_with(template: str, tokenizer):
    """The tokenizer with a template, and with what looks like a special token in it, as the model's
    own tokenizer has it.
    """
    tokenizer = copy.deepcopy(tokenizer)
    names = re.findall(r"<[|｜][^<>\s'\"{}]+?[|｜]>|<end_of_\w+>|<turn\|>", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(names))})
    tokenizer.chat_template = template
    return tokenizer
