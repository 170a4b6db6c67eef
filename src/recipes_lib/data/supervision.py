"""What the loss sees: token ids of every example and the spans of tokens that carry loss.

Prompt and completion are tokenised once and together, as TRL does, and the tokenizer's own
character offsets tell where the completion starts. A token that holds characters of both belongs to
the completion (TRL masks the same way). Padding, batching and packing are TRL's business.

In conversations, a chat template with `{% generation %}` markers says itself what the assistant
wrote. For any other, the conversation is rendered up to each assistant turn and compared with the
whole: where a rendering is a prefix of the next one, the text between is the turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import jinja2
import numpy as np

from recipes_lib.config.sections import MAX_LENGTH, DataSection
from recipes_lib.core.errors import first_line
from recipes_lib.data.conversations import Message, conversation_of, template_values
from recipes_lib.data.examples import BadRow, Example, SettingError
from recipes_lib.data.prompts import GENERATION, Span, prompt_and_completion, render_chat

BATCH_ROWS = 1000
IGNORED = -100  # labels with this value carry no loss


@dataclass(slots=True)
class Encoded:
    """The tokens of one example.

    Args:
        ids: token ids, int32.
        spans: [start, end) token ranges that carry loss, in order.
        ends: whether the last token with loss ends the turn (EOS, or the template's end-of-turn
            token).
        boundary_merge: whether one token holds the end of the prompt and the start of the
            completion.
        changed: whether the chat template left out or changed the text of a message.
        tokens_before: number of tokens before truncation.
        prompt_tokens: number of tokens outside the completion (or the assistant's turns) before
            truncation.
        end_token: the token that ends the answer of an example that was not cut, else -1.
    """

    ids: np.ndarray
    spans: tuple[Span, ...]
    ends: bool
    boundary_merge: bool = False
    changed: bool = False
    tokens_before: int = 0
    prompt_tokens: int = 0
    end_token: int = -1

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Number of tokens with loss."""
        return sum(end - start for start, end in self.spans)

    @property
    def labels(self) -> np.ndarray:
        """Token ids where there is loss, -100 elsewhere."""
        labels = np.full(len(self.ids), IGNORED, dtype=np.int32)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The settings that decide about loss, taken from `data` and `train`.

    Args:
        whole: loss on every token, the prompt included.
        max_length: longest row in tokens; None for no limit.
        keep_end: cut the start of rows that are too long instead of their end.
    """

    section: DataSection
    whole: bool
    max_length: int | None
    keep_end: bool
    eos_token: str | None

    @classmethod
    def of(cls, section: DataSection, train: dict[str, Any], tokenizer: Any) -> Supervision:
        """Read the settings; a packing strategy that splits long rows itself needs no truncation
        here.
        """
        splits_itself = train.get("packing") and train.get("packing_strategy", "bfd") != "bfd"
        whole = train.get("completion_only_loss") is False
        return cls(
            section=section,
            whole=whole and not train.get("assistant_only_loss"),
            max_length=None if splits_itself else train.get("max_length", MAX_LENGTH),
            keep_end=train.get("truncation_mode", "keep_start") == "keep_end",
            eos_token=train.get("eos_token") or tokenizer.eos_token,
        )


def check_settings(
    num_texts: int, section: DataSection, train: dict[str, Any], tokenizer: Any
) -> None:
    """Refuse settings that would otherwise be ignored silently.

    Args:
        num_texts: rows that are one text each.

    Raises:
        SettingError: a loss setting that these rows cannot honour, or a tokenizer without an end
            token or without offsets.
    """
    chat = section.prompt_format == "chat"
    if train.get("completion_only_loss") is True and num_texts:
        what = (
            f"train.completion_only_loss: true needs prompt and completion, but {num_texts} rows"
            " have a text column only"
        )
        hint = "remove the key (loss on the whole text), or name a prompt and a completion column"
        raise SettingError("train.completion_only_loss", what, hint)
    if train.get("assistant_only_loss") and not chat:
        what = f"needs prompt_format chat, not {section.prompt_format}"
        hint = "loss on the completion alone is the default already"
        key = "train.assistant_only_loss"
        raise SettingError(key, f"{key}: true {what}", hint)
    if not getattr(tokenizer, "is_fast", False):
        what = (
            "the tokenizer has no fast version (tokenizer.json), so the loss mask cannot be placed"
        )
        raise SettingError("model.name_or_path", what)
    if not chat and not (train.get("eos_token") or tokenizer.eos_token):
        what = "the tokenizer has no EOS token: the model would never learn to stop"
        raise SettingError("model.name_or_path", what, "set train.eos_token")


def encode(
    examples: Sequence[Example], settings: Supervision, tokenizer: Any, template: str | None = None
) -> Iterator[Encoded | BadRow]:
    """Tokenise the examples in order and truncate them.

    A conversation whose template makes it impossible to say what the assistant wrote has the reason
    in its place.

    Args:
        examples: as many as may be tokenised together; long data is given in batches of
            `BATCH_ROWS`.
        template: of the `chat` format.
    """
    encoded: Iterator[Encoded | BadRow] = (
        _encode_plain(examples, settings, tokenizer)
        if template is None
        else _encode_chat(examples, settings, tokenizer, template)
    )
    for item in encoded:
        if isinstance(item, BadRow):
            yield item
            continue
        length = item.tokens_before = len(item.ids)
        item.prompt_tokens = length - item.supervised
        # a template may put white space behind the answer, which carries loss only where the whole
        # text does
        answer_end = item.spans[-1][1] if item.spans else 0
        if settings.whole:
            item.spans = ((0, length),)
        limit = settings.max_length
        if limit is not None and length > limit:
            first = length - limit if settings.keep_end else 0
            last = item.spans[-1][1] if item.spans else 0
            item.ids = item.ids[first : first + limit]
            item.ends = item.ends and last <= first + limit
            moved = ((max(start - first, 0), min(end - first, limit)) for start, end in item.spans)
            item.spans = tuple((start, end) for start, end in moved if start < end)
        elif item.ends:
            item.end_token = int(item.ids[answer_end - 1])
        yield item


def _encode_plain(
    examples: Sequence[Example], settings: Supervision, tokenizer: Any
) -> Iterator[Encoded]:
    backend = tokenizer.backend_tokenizer
    eos = tokenizer.convert_tokens_to_ids(settings.eos_token)
    prompt_format = settings.section.prompt_format
    with plain_backend(tokenizer, split_special=settings.section.special_tokens == "text"):
        pairs = [prompt_and_completion(example, prompt_format) for example in examples]
        texts = [(prompt or "") + completion for prompt, completion in pairs]
        prompts: list[Any] = [None] * len(pairs)
        if not _offsets_are_exact(backend):
            prompts = backend.encode_batch([prompt or "" for prompt, _ in pairs])
        encodings = backend.encode_batch(texts)
    for (prompt, _), text, alone, encoding in zip(pairs, texts, prompts, encodings, strict=True):
        ids = encoding.ids
        if not ids or ids[-1] != eos:
            ids.append(eos)
        first, merged = 0, False
        if prompt is not None and alone is None:
            token = _token_at(encoding, text, len(prompt))
            first = len(ids) - 1 if token is None else token  # an empty completion has EOS alone
            merged = token is not None and encoding.token_to_chars(token)[0] < len(prompt)
        elif prompt is not None:  # offsets leave characters out: see where the ids part
            pairs_of_ids = zip(alone.ids, ids, strict=False)
            common = sum(1 for _ in takewhile(lambda two: two[0] == two[1], pairs_of_ids))
            first, merged = min(common, len(ids) - 1), common < len(alone.ids)
        span = (first, len(ids))
        yield Encoded(np.array(ids, dtype=np.int32), (span,), ids[-1] == eos, merged)


def _token_at(encoding: Any, text: str, position: int) -> int | None:
    """Index of the first token with a character at or after a position."""
    tokens = (encoding.char_to_token(place) for place in range(position, len(text)))
    return next((token for token in tokens if token is not None), None)


def _offsets_are_exact(backend: Any) -> bool:
    """Whether offsets cover white space (post-processors with `trim_offsets` leave it out)."""
    text = "a:\n\nb  c"
    offsets = backend.encode(text, add_special_tokens=False).offsets
    return {place for span in offsets for place in range(*span)} == set(range(len(text)))


@contextmanager
def plain_backend(tokenizer: Any, split_special: bool) -> Iterator[None]:
    """The Rust tokenizer without truncation and padding, reading special tokens in text as text if
    asked; restored afterwards.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = split_special
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.encode_special_tokens = before[0]
        if before[1]:
            backend.enable_truncation(**before[1])
        if before[2]:
            backend.enable_padding(**before[2])


def prompt_ids(section: DataSection, tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt for generation, tokenised as in training: a template brings its own
    BOS, plain formats get the tokenizer's.

    Args:
        prompt: what `prompts.generation_prompt` returned.
    """
    chat = section.prompt_format == "chat"
    with plain_backend(tokenizer, split_special=not chat and section.special_tokens == "text"):
        ids: list[int] = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=not chat).ids
    if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        # a tokenizer that appends EOS by itself would tell the model to stop before it started
        ids.pop()
    return ids


def _encode_chat(
    examples: Sequence[Example], settings: Supervision, tokenizer: Any, template: str
) -> Iterator[Encoded | BadRow]:
    special = special_ids(tokenizer)
    found = [render_turns(example, settings.section, tokenizer, template) for example in examples]
    texts = [item[0] for item in found if not isinstance(item, BadRow)]
    with plain_backend(tokenizer, split_special=False):
        encodings = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    for example, item in zip(examples, found, strict=True):
        if isinstance(item, BadRow):
            yield item
            continue
        messages = conversation_of(example, settings.section.system_prompt)
        try:
            yield _supervise_turns(next(encodings), *item, messages, settings, special)
        except BadRow as reason:
            yield reason


def render_turns(
    example: Example, section: DataSection, tokenizer: Any, template: str
) -> tuple[str, list[Span]] | BadRow:
    """A conversation as text with the character spans of the assistant's turns, or why it cannot be
    rendered.

    Raises:
        SettingError: the template is not Jinja.
    """
    messages = [
        {key: value for key, value in message.items() if key != "weight"}
        for message in conversation_of(example, section.system_prompt)
    ]
    values = template_values(example, section.chat_template_kwargs)
    try:
        whole, spans = render_chat(messages, tokenizer, template, values)
        answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
        for index in () if GENERATION.search(template) else answers:
            start, _ = render_chat(messages[:index], tokenizer, template, values, prompt=True)
            end, _ = render_chat(messages[: index + 1], tokenizer, template, values)
            if not (whole.startswith(start) and whole.startswith(end) and len(start) <= len(end)):
                return BadRow(
                    "the chat template renders the first messages differently when message"
                    f" {index} follows: no loss mask possible",
                    "mark the assistant's text in the template with {% generation %} ... {%"
                    " endgeneration %}",
                )
            spans.append((len(start), len(end)))
    except jinja2.TemplateSyntaxError as error:
        what = f"line {error.lineno} of the chat template is not Jinja: {error.message}"
        raise SettingError("data.chat_template", what) from None
    except Exception as error:  # Jinja's own errors, and whatever `raise_exception` is given
        return BadRow(f"the chat template refuses the conversation: {first_line(error)}")
    return whole, spans


def _supervise_turns(
    encoding: Any,
    text: str,
    turns: Sequence[Span],
    messages: Sequence[Message],
    settings: Supervision,
    special: frozenset[int],
) -> Encoded:
    """Put loss on the assistant's turns; a turn of weight 0 has none.

    Raises:
        BadRow: the template does not show what the assistant says, or which turn is which.
    """
    ids = encoding.ids
    found: list[list[Span]] = []  # some templates mark the text and the end token of a turn apart
    behind = 0
    for turn in turns:
        if span := _token_span(encoding, text, turn, special):
            if found and not text[behind : turn[0]].strip():
                found[-1].append(span)
            else:
                found.append([span])
            behind = turn[1]
    answers = [message for message in messages if message["role"] == "assistant"]
    weights = [message.get("weight", 1) for message in answers]
    if (
        found
        and any(answer["content"].strip() for answer in answers)
        and not any(
            ids[index] not in special and _chars_of(encoding, text, index).strip()
            for spans in found
            for span in spans
            for index in range(*span)
        )
    ):
        raise BadRow(
            "the chat template renders nothing of what the assistant says",
            "choose a template for plain text messages",
        )
    if 0 in weights and len(weights) != len(found):
        raise BadRow(
            "weight 0: the chat template does not render every assistant turn, so the turns"
            " cannot be told apart"
        )
    if settings.whole and 0 in weights:
        raise BadRow(
            "weight 0: with train.completion_only_loss: false, the loss is on the whole text"
        )
    if settings.section.chat_loss == "last":
        found, weights = found[-1:], weights[-1:]
    ends = bool(found) and ids[found[-1][-1][1] - 1] in special
    if 0 in weights:
        found = [spans for spans, weight in zip(found, weights, strict=True) if weight]
    return Encoded(
        np.array(ids, dtype=np.int32),
        tuple(span for spans in found for span in spans),
        ends,
        changed=not all(message["content"].strip() in text for message in messages),
    )


def _token_span(encoding: Any, text: str, turn: Span, special: frozenset[int]) -> Span | None:
    """The tokens of a turn up to its end-of-turn token; None for a turn without text.

    White space that the template puts after that token carries no loss, inside the generation block
    or not: at generation, nothing is written after the end of the turn.
    """
    ids = encoding.ids
    first, last = (_token_at(encoding, text, place) for place in turn)
    first, last = (len(ids) if token is None else token for token in (first, last))
    for kept in range(last, first, -1):
        if ids[kept - 1] in special:
            return first, kept
        if _chars_of(encoding, text, kept - 1).strip():
            break
    return (first, last) if first < last else None


def _chars_of(encoding: Any, text: str, index: int) -> str:
    """The characters of a token."""
    start, end = encoding.token_to_chars(index) or (0, 0)
    return text[start:end]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens: bos, eos, unk, pad, and those that a model adds."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {
        index for index, token in added.items() if getattr(token, "special", False)
    }


def decoded_spans(
    tokenizer: Any, ids: Sequence[int], labels: Sequence[int]
) -> list[dict[str, Any]]:
    """The text of an example cut where loss begins and ends.

    Returns:
        One `{text, supervised}` per span; where a supervised span ends with a special token, that
        is repeated as `end_token`.
    """
    mask = np.asarray(labels) != IGNORED
    special = special_ids(tokenizer)
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    spans = []
    for start, end in pairwise(cuts):
        piece = list(ids[start:end])
        span = {
            "text": tokenizer.decode(piece, clean_up_tokenization_spaces=False),
            "supervised": bool(mask[start]),
        }
        if span["supervised"] and piece[-1] in special:
            span["end_token"] = tokenizer.decode(piece[-1:], clean_up_tokenization_spaces=False)
        spans.append(span)
    return spans
