"""Every text template that TRL ships, in every shape of conversation: what carries loss is what the
plain template lets the model write behind the prompt that it is asked with, turn by turn.
"""

import json

import pytest
from conversation_samples import FOLDER, TURNS, encode_row, learned, tokenizer_with

from recipes_lib.config.recipe import DataSection
from recipes_lib.data.errors import BadRow
from recipes_lib.data.prompts import training_template

OF_PICTURES = {"idefics3", "smolvlm", "llava_next"}  # a content must be a list of parts
FILES = {file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training")}
PLAIN = sorted(FILES - OF_PICTURES)
SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {
    "name": "add",
    "description": "The sum.",
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "description": "one"} for name in "ab"},
        "required": ["a", "b"],
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = [
    {"role": "user", "content": "Sum?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "seven"},
    {"role": "assistant", "content": "It is 7."},
]


def thinking(message, thought):
    return {**message, "reasoning_content": thought}


THOUGHT = [TURNS[0], thinking(TURNS[1], "Hmm one.")]
TOOLS = {"tools": [{"type": "function", "function": ADD}]}
CASES = {
    "single": {"messages": TURNS[:2]},
    "system": {"messages": [SYSTEM, *TURNS[:2]]},
    "multi-turn": {"messages": [*TURNS, *TURNS]},
    "thought": {"messages": THOUGHT},
    "thoughts": {"messages": [*THOUGHT, TURNS[2], thinking(TURNS[3], "Hmm two.")]},
    "asked to think": {"messages": THOUGHT, "kwargs": {"enable_thinking": True}},
    "asked not to": {"messages": TURNS, "kwargs": {"enable_thinking": False}},
    "tools": {"messages": CALLS, **TOOLS},
    "tools, long": {"messages": [SYSTEM, *CALLS, *TURNS], **TOOLS},
}
# What does not simply carry loss as it would be written: template -> case -> what happens.
#   refused     the row cannot be used
#   changed     counted: the template leaves out a thought
#   unlike      counted: the answer does not go on from the prompt, which begins a thought (or none)
#   earlier     a turn that another follows is rendered without its thought, or with another end
#   end added   TRL's twin ends turns that the plain template leaves open
#   other text  of the last turn, behind the results of tools
ENDS = ("<|user|>", "<|observation|>")
NO_THOUGHTS = dict.fromkeys(("thought", "thoughts", "asked to think"), "changed")
CALLS_REFUSED = dict.fromkeys(("tools", "tools, long"), "refused")
LAST_THOUGHT_ONLY = {"thoughts": "changed, earlier"}
ENDS_OTHERWISE = dict.fromkeys(("multi-turn", "asked not to"), "earlier")
THINKS_FIRST = {
    **dict.fromkeys(("single", "system", "multi-turn", "tools", "tools, long"), "unlike"),
    "thoughts": "changed, earlier, unlike",
}
PROMPT_THINKS = {
    **dict.fromkeys(CASES, "unlike"),
    **dict.fromkeys(NO_THOUGHTS, "changed, unlike"),  # they stand in the content
}
PHI = {**NO_THOUGHTS, **ENDS_OTHERWISE, **CALLS_REFUSED, "thoughts": "changed, earlier"}
EXPECTED = {
    **dict.fromkeys(("cohere", "cohere2", "gemma3"), NO_THOUGHTS | CALLS_REFUSED),
    "deepseek_r1_distill": PROMPT_THINKS | CALLS_REFUSED,
    "deepseekv3": PROMPT_THINKS,
    "diffusion_gemma": {
        **LAST_THOUGHT_ONLY,
        "tools": "earlier, other text",
        "tools, long": "earlier",
    },
    "gemma": {**NO_THOUGHTS, **CALLS_REFUSED, "system": "refused"},
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"), NO_THOUGHTS),
    "gemma4_v5": {"thoughts": "refused"},
    "glm4moe": {**dict.fromkeys(CASES, "end added"), "thoughts": "changed, earlier, end added"},
    "gptoss": {**LAST_THOUGHT_ONLY, **ENDS_OTHERWISE, "tools, long": "earlier"},
    **dict.fromkeys(("lfm2", "llama3", "qwen2_5_vl"), NO_THOUGHTS | CALLS_REFUSED),
    **dict.fromkeys(("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), LAST_THOUGHT_ONLY),
    **dict.fromkeys(("lfm2_v2", "llama3_1", "llama3_2"), NO_THOUGHTS),
    **dict.fromkeys((name for name in PLAIN if name.startswith("nemotron_3")), THINKS_FIRST),
    **dict.fromkeys(("phi3", "phi3_5"), PHI),
    **dict.fromkeys(("qwen2_5", "qwen3_instruct_2507", "qwen3_vl"), NO_THOUGHTS),
    "qwen3_5_nothink": {"thought": "unlike", "thoughts": "unlike"},
}


def written(case, index, tokenizer) -> str:
    """What the model must write of a turn, as the plain template has it at the end; empty where
    that does not go on from the prompt.
    """

    def text(messages, prompt):
        values = {"tools": case.get("tools"), **case.get("kwargs", {})}
        values |= {"tokenize": False, "add_generation_prompt": prompt}
        return tokenizer.apply_chat_template(messages, **values)

    try:
        prompt = text(case["messages"][:index], True)
        whole = text(case["messages"][: index + 1], False)
    except TypeError:  # DeepSeek's reads arguments as text, TRL's training template an object
        return ""
    return whole[len(prompt) :].rstrip() if whole.startswith(prompt) else ""


def happens(case, tokenizer) -> str:
    """In the words of `EXPECTED`; empty where each turn carries loss as it would be written."""
    messages = case["messages"]
    data = {"prompt_format": "chat", "chat_template_kwargs": case.get("kwargs", {})}
    tools = {"tools": json.dumps(case["tools"])} if "tools" in case else {}
    training = training_template(DataSection(source="x", **data), tokenizer)
    template = training[1] if training else tokenizer.chat_template
    item = encode_row({"messages": messages, **tools}, tokenizer, template, **data)
    if isinstance(item, BadRow):
        return "refused"
    assert item.end_token >= 0
    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    words = {"unlike"} if item.other_prompt else set()
    words |= {"changed"} if item.changed else set()
    for text, index in zip(learned(item, tokenizer), answers, strict=True):
        assert not text.startswith(("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"))  # no role tags
        assert messages[index]["content"] in text or item.changed
        assert not text[-1].isspace()
        assert not any(one["content"] in text for one in messages if one["role"] != "assistant")
        wanted = written(case, index, tokenizer)
        if not wanted:
            assert item.other_prompt
        elif text != wanted:
            added = "end added" if text in (f"{wanted}{tag}" for tag in ENDS) else "other text"
            words.add(added if added == "end added" or index == answers[-1] else "earlier")
    return ", ".join(sorted(words))


@pytest.mark.slow
def test_every_turn_carries_loss_as_the_plain_template_has_it_written(tiny_tokenizer):
    failures = {}
    for name in PLAIN:
        template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = tokenizer_with(template, tiny_tokenizer)
        words = {name: happens(case, tokenizer) for name, case in CASES.items()}
        words = {case: what for case, what in words.items() if what}
        if words != EXPECTED.get(name, {}):
            failures[name] = words, EXPECTED.get(name, {})
    assert not failures
