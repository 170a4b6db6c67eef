"""Chat templates: rendering conversations and finding the tokens that the assistant wrote, the end-of-turn token included.

A template with `{% generation %}` markers says it itself. For any other, the conversation is rendered up to each assistant
turn and compared with the whole: where a rendering is a prefix of the next one, the text between is the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np

from recipes_lib.data.conversations import Message
from recipes_lib.data.examples import Example, SettingError, row_errors

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BATCH_ROWS = 500
Span = tuple[int, int]


def encode_conversations(
    examples: Sequence[Example], conversations: Sequence[list[Message]], tokenizer: Any, template: str, *, last_only: bool
) -> Iterator[tuple[list[int], tuple[Span, ...], bool]]:
    """Token ids, the token spans of the assistant's turns, and whether the last span ends with a special token.

    Args:
        last_only: only the last assistant turn counts.

    Raises:
        DataError: rows whose renderings are not prefixes of each other, or that the template refuses; all are named.
    """
    marked = bool(GENERATION.search(template))
    special = special_ids(tokenizer)
    for start in range(0, len(conversations), BATCH_ROWS):
        turns = conversations[start : start + BATCH_ROWS]
        rows = examples[start : start + BATCH_ROWS]
        encode = _by_markers if marked else _by_prefixes
        for ids, spans in encode(rows, turns, tokenizer, template, special):
            if last_only:
                spans = spans[-1:]
            yield ids, tuple(spans), bool(spans) and ids[spans[-1][1] - 1] in special


def _by_markers(
    examples: Sequence[Example], conversations: Sequence[list[Message]], tokenizer: Any, template: str, special: frozenset[int]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Spans from the template's own `{% generation %}` blocks."""
    problems = []
    results = []
    for example, messages in zip(examples, conversations, strict=True):
        try:
            encoded = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except jinja2.TemplateSyntaxError as error:
            raise _not_jinja(error) from None
        except Exception as error:  # a template may raise anything: jinja2 errors, or its own raise_exception
            problems.append((example, _first_line("the chat template refuses the conversation", error)))
            continue
        mask = np.array([0, *encoded["assistant_masks"], 0])
        edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2).tolist()
        results.append((encoded["input_ids"], [(start, end) for start, end in edges]))
    if problems:
        raise row_errors(problems)
    yield from results


def _by_prefixes(
    examples: Sequence[Example], conversations: Sequence[list[Message]], tokenizer: Any, template: str, special: frozenset[int]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Spans from renderings of growing prefixes of the conversation."""
    texts, turns, problems = [], [], []
    for example, messages in zip(examples, conversations, strict=True):
        try:
            text, spans = _text_spans(messages, tokenizer, template)
        except _NotAPrefix as error:
            problems.append((example, str(error)))
            continue
        except jinja2.TemplateSyntaxError as error:
            raise _not_jinja(error) from None
        except Exception as error:  # a template may raise anything: jinja2 errors, or its own raise_exception
            problems.append((example, _first_line("the chat template refuses the conversation", error)))
            continue
        texts.append(text)
        turns.append(spans)
    if problems:
        raise row_errors(problems, "mark the assistant's text in the template with {% generation %} ... {% endgeneration %}")
    for encoding, text, spans in zip(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False), texts, turns, strict=True):
        ids = encoding.ids
        tokens = []
        for start, end in spans:
            first, last = _token_at(encoding, text, start), _token_at(encoding, text, end)
            tokens.append((first, _end_of_turn(encoding, text, first, last, special)))
        yield ids, tokens


class _NotAPrefix(Exception):
    """A rendering of the first messages is not how the whole rendering starts."""


def _text_spans(messages: list[Message], tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    """The rendered conversation and the character spans of the assistant's turns in it."""

    def render(some: list[Message], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(some, chat_template=template, tokenize=False, add_generation_prompt=prompt))

    whole = render(messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], True)
        through = whole if index == len(messages) - 1 else render(messages[: index + 1], False)
        if not (whole.startswith(before) and whole.startswith(through) and len(before) <= len(through)):
            raise _NotAPrefix(
                f"the chat template renders the first messages differently when message {index} follows: no loss mask possible"
            )
        spans.append((len(before), len(through)))
    return whole, spans


def _token_at(encoding: Any, text: str, position: int) -> int:
    """Index of the first token at or after a character position."""
    for place in range(position, len(text)):
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _end_of_turn(encoding: Any, text: str, first: int, last: int, special: frozenset[int]) -> int:
    """End of a turn: white space that the template puts after the end-of-turn token carries no loss."""
    end = last
    while end > first:
        if encoding.ids[end - 1] in special:
            return end
        start, stop = encoding.token_to_chars(end - 1) or (0, 0)
        if text[start:stop].strip():
            return last
        end -= 1
    return last


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens, those a model adds beside bos, eos, unk and pad included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if getattr(token, "special", False)}


def _not_jinja(error: jinja2.TemplateSyntaxError) -> SettingError:
    return SettingError("data.chat_template", f"line {error.lineno} of the chat template is not Jinja: {error.message}")


def _first_line(what: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{what}: {reason}"
