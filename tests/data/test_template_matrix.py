"""Every text template that TRL ships, in every shape of conversation: what carries loss is what the
plain template lets the model write behind the prompt that it is asked with, turn by turn.
"""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conversation_samples import TURNS

from recipes_lib.config.sections import DataSection
from recipes_lib.data.examples import BadRow, Example
from recipes_lib.data.prompts import twin_of
from recipes_lib.data.supervision import Supervision, encode

FOLDER = Path(str(find_spec("trl").origin)).parent / "chat_templates"
OF_PICTURES = {"idefics3", "smolvlm", "llava_next"}  # a content must be a list of parts
PLAIN = sorted(
    {file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training")}
    - OF_PICTURES
)
SYSTEM = {"role": "system", "content": "Be brief."}


def thinking(message, thought):
    return {**message, "reasoning_content": thought, "thinking": thought}


CASES = {
    "single": TURNS[:2],
    "system": [SYSTEM, *TURNS[:2]],
    "multi-turn": [*TURNS, *TURNS],
    "thought": [TURNS[0], thinking(TURNS[1], "Hmm one.")],
    "thoughts": [
        *(TURNS[0], thinking(TURNS[1], "Hmm one.")),
        *(TURNS[2], thinking(TURNS[3], "Hmm two.")),
    ],
}
# What does not simply carry loss as it would be written; case -> what happens.
#   refused     the row cannot be used
#   earlier     a turn that another follows is rendered without its thought, or with another end
#   unlike      the answer does not go on from the prompt, which begins a thought (or ends it)
#   end added   TRL's twin ends turns that the plain template leaves open
ENDS_EARLIER_TURNS_OTHERWISE = {"multi-turn": "earlier", "thoughts": "earlier"}
DROPS_EARLIER_THOUGHTS = {"thoughts": "earlier"}
THINKS_FIRST = {
    **dict.fromkeys(("single", "system", "multi-turn"), "unlike"),
    "thoughts": "earlier, unlike",
}
EXPECTED = {
    "deepseek_r1_distill": dict.fromkeys(CASES, "unlike"),  # its thoughts stand in the content
    "deepseekv3": dict.fromkeys(CASES, "unlike"),
    "diffusion_gemma": DROPS_EARLIER_THOUGHTS,
    "gemma": {"system": "refused"},
    "gemma4_v5": {"thoughts": "refused"},
    "glm4moe": {**dict.fromkeys(CASES, "end added"), "thoughts": "earlier, end added"},
    "gptoss": ENDS_EARLIER_TURNS_OTHERWISE,
    **dict.fromkeys(("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), DROPS_EARLIER_THOUGHTS),
    **dict.fromkeys((name for name in PLAIN if name.startswith("nemotron_3")), THINKS_FIRST),
    **dict.fromkeys(("phi3", "phi3_5"), ENDS_EARLIER_TURNS_OTHERWISE),
    "qwen3_5_nothink": {"thought": "unlike", "thoughts": "unlike"},
}


def tokenizer_with(name: str, tokenizer):
    """The tokenizer with one of TRL's templates, and what looks like a special token in it."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(tokenizer)
    names = re.findall(r"<[|｜][^<>\s'\"{}]+?[|｜]>|<end_of_\w+>|<turn\|>", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(names))})
    tokenizer.chat_template = template
    return tokenizer


def written(messages, index, tokenizer) -> str:
    """What the model must write of a turn, as the plain template has it at the end; empty where
    that does not go on from the prompt.
    """
    prompt = tokenizer.apply_chat_template(
        messages[:index], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
    return whole[len(prompt) :].rstrip() if whole.startswith(prompt) else ""


def happens(messages, tokenizer) -> str:
    """In the words of `EXPECTED`; empty where each turn carries loss as it would be written."""
    section = DataSection(source="x", prompt_format="chat")
    settings = Supervision.of(section, {"max_length": 4096}, tokenizer)
    row, twin = Example("rows.jsonl", 1, 1, {"messages": messages}), twin_of(section, tokenizer)
    [item] = encode([row], settings, tokenizer, tokenizer.chat_template, twin)
    if isinstance(item, BadRow):
        return "refused"
    assert item.ends
    learned = [
        tokenizer.decode(item.ids[slice(*span)].tolist(), clean_up_tokenization_spaces=False)
        for span in item.spans
    ]
    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    for text, index in zip(learned, answers, strict=True):
        assert messages[index]["content"] in text and not text[-1].isspace()
        assert not any(one["content"] in text for one in messages if one["role"] != "assistant")
    words = {"unlike"} if item.unlike_prompt else set()
    for text, index in zip(learned, answers, strict=True):
        wanted = written(messages, index, tokenizer)
        if not wanted:
            assert item.unlike_prompt
        elif text != wanted:
            added = "end added" if text == f"{wanted}<|user|>" else "other text"
            words.add(added if added == "end added" or index == answers[-1] else "earlier")
    return ", ".join(sorted(words))


@pytest.mark.parametrize("name", PLAIN)
def test_every_turn_carries_loss_as_the_plain_template_has_it_written(name, tiny_tokenizer):
    tokenizer = tokenizer_with(name, tiny_tokenizer)
    found = {case: happens(messages, tokenizer) for case, messages in CASES.items()}
    assert {case: words for case, words in found.items() if words} == EXPECTED.get(name, {})
