"""Prompt formats: how a row becomes the text that the model reads and the text that it must
learn to write, in training and generation alike.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.recipe import TRL, DataSection, is_inline, trl_templates
from recipes_lib.core.errors import one_line
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import Message, with_system_prompt
from recipes_lib.data.errors import BadRow, SettingError

# The prompt of a task without and with a context.
HEADINGS = {
    # Source: the training script of the original study (Llama-2-Finetuning-DDP-and-FSDP).
    "dolly": (
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Context:\n{context}\n\n### Response:\n",
    ),
    # Source: PROMPT_DICT of Stanford Alpaca's train.py (tatsu-lab/stanford_alpaca).
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:",
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n###"
        " Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:",
    ),
}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template calls for the date of the day (gpt-oss, Llama 3.2, SmolLM3).
TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>[^'"]*)(?P=quote)\s*\)""")
Span = tuple[int, int]


def task_prompt(prompt_format: str, instruction: str, context: str = "") -> str:
    """Return the prompt of a `dolly` or `alpaca` example; an empty context has no block."""
    heading = HEADINGS[prompt_format][1 if context.strip() else 0]
    return heading.format(instruction=instruction, context=context)


def generation_prompt(section: DataSection, tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return the prompt alone, up to where the model must start to write, exactly as in training;
    plain formats repeat their headings for each turn.
    """
    if section.prompt_format == "chat":
        messages = with_system_prompt(messages, section.system_prompt)
        template = chat_template(section, tokenizer)
        values = section.chat_template_kwargs
        text, _ = render_chat(messages, tokenizer, template, values, prompt=True)
        return text
    parts: list[str] = []
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant":
            parts[-1] += text
        elif section.prompt_format == "raw" or message["role"] == "system":
            parts.append(text)
        else:
            parts.append(task_prompt(section.prompt_format, text))
    return "\n\n".join(parts)


def render_chat(
    messages: Sequence[Message],
    tokenizer: Any,
    template: str,
    values: Mapping[str, Any] | None = None,
    *,
    prompt: bool = False,
) -> tuple[str, list[Span]]:
    """Return a conversation as text, and the spans of characters that `{% generation %}` marks.
    Beside the messages, the template gets `values`; a `prompt` ends where the assistant must write.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = bool(GENERATION.search(template))
    texts, spans = render_jinja_template(
        [list(messages)],
        chat_template=template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marked,
        **(tokenizer.special_tokens_map | dict(values or {})),
    )
    return texts[0], spans[0] if marked else []


def check_tool_calls(
    chat: list[Message], learned: Sequence[int], text: str, render: Callable[..., Any]
) -> None:
    """Refuse a conversation in which the template leaves out a tool call of a turn that is learned:
    without it, the text is the same. The name of the function may well stand elsewhere in the text.
    """
    for index in learned:
        message = chat[index]
        calls = message.get("tool_calls", [])
        for number, call in enumerate(calls):
            others = calls[:number] + calls[number + 1 :]
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            if others:
                without["tool_calls"] = others
            try:
                other_text, _ = render(chat[:index] + [without] + chat[index + 1 :])
            except Exception:  # a template that refuses a missing call reads calls
                continue
            if other_text == text:
                name = call["function"]["name"]
                what = f"message {index}: the chat template leaves out the call of '{name}'"
                hint = "choose one that supports tools, such as trl:qwen2_5 (data.chat_template)"
                raise BadRow(what, hint)


def default_system_message(
    messages: Sequence[Message], tokenizer: Any, template: str, values: Mapping[str, Any]
) -> str:
    """Return the system message that a template adds to a conversation without one, else "".
    With a mark as the system message, the template shows where such a message stands; what stands
    there without the mark is the template's own.
    """
    mark = "[the system message]"
    try:
        marked = [{"role": "system", "content": mark}, *messages]
        given, _ = render_chat(marked, tokenizer, template, values)
        plain, _ = render_chat(messages, tokenizer, template, values)
    except Exception:  # a template that refuses system messages adds none
        return ""
    before, found, after = given.partition(mark)
    stands_there = found and plain.startswith(before) and plain.endswith(after)
    if not stands_there or len(plain) < len(before) + len(after):
        return ""
    return plain[len(before) : len(plain) - len(after)].strip()


def chat_template(section: DataSection, tokenizer: Any) -> str:
    """Return the template of the `chat` format: the given one (inline, a file, or one of TRL's),
    else the tokenizer's own; with the run's date in it, if it prints one.
    """
    return _with_date(_undated_template(section, tokenizer), section.template_date)


def _undated_template(section: DataSection, tokenizer: Any) -> str:
    given = section.chat_template
    if given is None:
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not template:
            what = "prompt_format chat needs a chat template, and the tokenizer has none"
            hint = "set data.chat_template to a .jinja file or to one of TRL's, such as trl:llama3"
            raise SettingError("data.prompt_format", what, hint)
        return str(template)
    if is_inline(given):
        return given
    shipped = trl_templates()
    if given.startswith(TRL) and not shipped:
        raise ModuleNotFoundError(f"{given} is a file of TRL's", name="trl")
    path = shipped.get(given) or Path(given).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{shown_path(path)} cannot be read: {one_line(error)}"
        hint = f"give a .jinja file, the template itself, or one of TRL's: {', '.join(shipped)}"
        hints = did_you_mean(given, shipped) or [hint]
        raise SettingError("data.chat_template", what, *hints) from None


def template_date(section: DataSection, tokenizer: Any, recorded: str | None) -> str | None:
    """Return the date that a run's template prints: the recipe's, the recorded one, or today."""
    if section.prompt_format != "chat" or not TODAY.search(_undated_template(section, tokenizer)):
        return section.template_date
    return section.template_date or recorded or datetime.date.today().isoformat()


def _with_date(template: str, date: str | None) -> str:
    """Return the template with a fixed date in place of the day it is rendered on."""
    if date is None:
        return template
    day = datetime.datetime.fromisoformat(date)
    return TODAY.sub(lambda match: repr(day.strftime(match["form"])), template)


def unread_argument(names: Iterable[str], template: str) -> BadRow | None:
    """Return the error about a template argument that the chat template does not name."""
    words = set(re.findall(r"[A-Za-z_]\w*", template))
    for name in names:
        if name not in words:
            what = f"chat_template_kwargs: the chat template does not read '{name}'"
            return BadRow(what, *did_you_mean(name, sorted(words)))
    return None


def training_template(section: DataSection, tokenizer: Any) -> tuple[str, str] | None:
    """Return the file's name and the text of TRL's training version of a chat template: it marks
    what the assistant wrote, and renders a turn in the same way whatever follows it. None where the
    template has marks itself, TRL has none, or the recipe brings a template of its own.
    Source: `trl.chat_template_utils.get_training_chat_template`, which takes seconds to import.
    """
    given = section.chat_template
    if section.prompt_format != "chat" or (given is not None and not given.startswith(TRL)):
        return None
    template = _undated_template(section, tokenizer)
    if GENERATION.search(template):
        return None
    for plain in trl_templates().values():
        marked = plain.with_stem(f"{plain.stem}_training")
        if not marked.is_file():
            continue
        text = plain.read_text("utf-8")
        # a run saves its template with the date in it
        if template in (text, _with_date(text, section.template_date)):
            return marked.name, _with_date(marked.read_text("utf-8"), section.template_date)
    return None


def format_hash(section: DataSection, tokenizer: Any, eos_token: str | None = None) -> str:
    """Return what identifies the prompt format: two runs with the same hash turn the same example
    into the same prompt text. `eos_token` is `train.eos_token` where the tokenizer is the base's.
    """
    form: Any = HEADINGS.get(section.prompt_format, "")
    if section.prompt_format == "chat":
        form = [chat_template(section, tokenizer), section.system_prompt]
        if section.chat_template_kwargs:
            form.append(section.chat_template_kwargs)
    identity = [section.prompt_format, form, tokenizer.bos_token, eos_token or tokenizer.eos_token]
    return hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()
