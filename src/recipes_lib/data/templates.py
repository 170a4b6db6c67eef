"""Chat templates: rendering conversations and finding the tokens that the assistant wrote, the
end-of-turn token included.

A template with `{% generation %}` markers says it itself. For any other, the conversation is
rendered up to each assistant turn and compared with the whole: where a rendering is a prefix of the
next one, the text between is the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from recipes_lib.data.conversations import Message
from recipes_lib.data.examples import BadRow, SettingError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
Rendered = tuple[str, list[Span]]


def encode_conversations(
    conversations: Sequence[list[Message]], tokenizer: Any, template: str, *, last_only: bool
) -> Iterator[tuple[list[int], tuple[Span, ...], bool, bool] | BadRow]:
    """Token ids, the spans of the assistant's turns, whether the last one ends with a special
    token, whether a message is not whole.

    A turn of weight 0 has no span. Where a conversation cannot be used, the reason stands in its
    place.

    Args:
        last_only: only the last assistant turn counts.
    """
    special = special_ids(tokenizer)
    rendered = render_conversations(conversations, tokenizer, template)
    texts = [item[0] for item in rendered if not isinstance(item, BadRow)]
    encodings = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    for messages, item in zip(conversations, rendered, strict=True):
        if isinstance(item, BadRow):
            yield item
            continue
        text, turns = item
        encoding = next(encodings)
        ids = encoding.ids
        turn_spans = _turn_spans(encoding, ids, text, turns, special)
        weights = [
            message.get("weight", 1) for message in messages if message["role"] == "assistant"
        ]
        spans = [span for spans in turn_spans for span in spans]
        answers = any(
            message["content"].strip() for message in messages if message["role"] == "assistant"
        )
        if (
            spans
            and answers
            and not any(_says_something(encoding, ids, text, span, special) for span in spans)
        ):
            yield BadRow(
                "the chat template renders nothing of what the assistant says",
                "choose a template for plain text messages",
            )
            continue
        if 0 in weights and len(weights) != len(turn_spans):
            yield BadRow(
                "weight 0: the chat template does not render every assistant turn, so the turns"
                " cannot be told apart"
            )
            continue
        if last_only:
            turn_spans, weights = turn_spans[-1:], weights[-1:]
        ends = bool(turn_spans) and ids[turn_spans[-1][-1][1] - 1] in special
        if 0 in weights:
            turn_spans = [
                spans for spans, weight in zip(turn_spans, weights, strict=True) if weight
            ]
        changed = not all(message["content"].strip() in text for message in messages)
        yield ids, tuple(span for spans in turn_spans for span in spans), ends, changed


def render_conversations(
    conversations: Sequence[list[Message]], tokenizer: Any, template: str
) -> list[Rendered | BadRow]:
    """Each conversation as text with the character spans of the assistant's turns, or why it cannot
    be rendered.

    Raises:
        SettingError: the template is not Jinja.
    """
    marked = bool(GENERATION.search(template))

    def render(some: list[list[Message]], prompt: bool = False) -> list[Rendered]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            some,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **tokenizer.special_tokens_map,
        )
        return list(zip(texts, spans if marked else ([] for _ in texts), strict=True))

    plain = [
        [{"role": message["role"], "content": message["content"]} for message in messages]
        for messages in conversations
    ]
    try:
        return [*render(plain)] if marked else _by_prefixes(plain, render)
    except jinja2.TemplateSyntaxError as error:
        what = f"line {error.lineno} of the chat template is not Jinja: {error.message}"
        raise SettingError("data.chat_template", what) from None
    except (
        Exception
    ) as error:  # a template may raise anything: jinja2 errors, or its own raise_exception
        if len(plain) == 1:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return [BadRow(f"the chat template refuses the conversation: {reason}")]
    return [
        item
        for messages in conversations
        for item in render_conversations([messages], tokenizer, template)
    ]


def _by_prefixes(conversations: Sequence[list[Message]], render: Any) -> list[Rendered | BadRow]:
    """Find the assistant's turns by rendering the conversations up to them and through them."""
    turns = [
        [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for messages in conversations
    ]
    before = [
        messages[:index]
        for messages, indices in zip(conversations, turns, strict=True)
        for index in indices
    ]
    through = [
        messages[: index + 1]
        for messages, indices in zip(conversations, turns, strict=True)
        for index in indices[:-1]
    ]
    befores, throughs = iter(render(before, True)), iter(render(through))
    results: list[Rendered | BadRow] = []
    for (whole, _), indices in zip(render(list(conversations)), turns, strict=True):
        spans, rewritten = [], None
        for index in indices:
            (start, _), (end, _) = (
                next(befores),
                next(throughs) if index != indices[-1] else (whole, []),
            )
            if rewritten is None and not (
                whole.startswith(start) and whole.startswith(end) and len(start) <= len(end)
            ):
                rewritten = index
            spans.append((len(start), len(end)))
        if rewritten is None:
            results.append((whole, spans))
        else:
            results.append(
                BadRow(
                    "the chat template renders the first messages differently when message"
                    f" {rewritten} follows: no loss mask possible",
                    "mark the assistant's text in the template with {% generation %} ... {%"
                    " endgeneration %}",
                )
            )
    return results


def _turn_spans(
    encoding: Any, ids: Sequence[int], text: str, turns: Sequence[Span], special: frozenset[int]
) -> list[list[Span]]:
    """The token spans of each turn: some templates mark the text and the end token of one turn
    apart.
    """
    found: list[list[Span]] = []
    behind = 0
    for turn in turns:
        if span := _token_span(encoding, ids, text, turn, special):
            if found and not text[behind : turn[0]].strip():
                found[-1].append(span)
            else:
                found.append([span])
            behind = turn[1]
    return found


def _says_something(
    encoding: Any, ids: Sequence[int], text: str, span: Span, special: frozenset[int]
) -> bool:
    """Whether a span has more than special tokens and white space."""
    for index in range(*span):
        left, right = encoding.token_to_chars(index) or (0, 0)
        if ids[index] not in special and text[left:right].strip():
            return True
    return False


def _token_span(
    encoding: Any, ids: Sequence[int], text: str, turn: Span, special: frozenset[int]
) -> Span | None:
    """The tokens of a turn up to its end-of-turn token; None for a turn without text.

    White space that the template puts after that token carries no loss, inside the generation block
    or not: at generation, nothing is written after the end of the turn.
    """
    start, end = turn
    first = _token_at(encoding, text, start, len(ids))
    last = _token_at(encoding, text, end, len(ids))
    if first >= last:
        return None
    kept = last
    while kept > first:
        if ids[kept - 1] in special:
            return first, kept
        left, right = encoding.token_to_chars(kept - 1) or (0, 0)
        if text[left:right].strip():
            break
        kept -= 1
    return first, last


def _token_at(encoding: Any, text: str, position: int, behind: int) -> int:
    """Index of the first token at or after a character position."""
    for place in range(position, len(text)):
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return behind


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens, those a model adds beside bos, eos, unk and pad included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {
        index for index, token in added.items() if getattr(token, "special", False)
    }
