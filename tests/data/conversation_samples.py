"""A conversation of two turns, chat templates for it, and what of a row is learned."""

import copy
import re
from importlib.util import find_spec
from pathlib import Path

from recipes_lib.config.recipe import DataSection
from recipes_lib.data.encoding import Supervision, decoded_spans, encode
from recipes_lib.data.errors import BadRow
from recipes_lib.data.rows import DataRow

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


def encode_row(fields, tokenizer, template=None, train=None, **data):
    """One row encoded, or the reason why it cannot be used."""
    section = DataSection(source="x", **data)
    settings = Supervision.of(section, {"max_length": 4096} | (train or {}), tokenizer)
    if section.prompt_format == "chat":
        template = template or tokenizer.chat_template
    try:
        return encode(DataRow("rows.jsonl", 7, fields), settings, tokenizer, template)
    except BadRow as reason:
        return reason


def learned(item, tokenizer) -> list[str]:
    spans = decoded_spans(tokenizer, item.ids, item.labels)
    return [text for text, has_loss in spans if has_loss]
