"""What the loss sees: token ids of each row and their labels, in 3 cases.

1. Text pairs: the completion begins where the tokens of prompt and completion together part from
   those of the prompt alone.
2. Conversations under a template with `{% generation %}` markers, or TRL's training template: the
   markers say what the assistant wrote.
3. Conversations under any other template: the text between the prompt that asks for a turn and the
   conversation up to its end, where both begin the whole text.

The loss begins where a prompt ends and the model must start to write. TRL masks the same way;
padding, batching and packing are its business.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2
import numpy as np

from recipes_lib.config.sections import MAX_LENGTH, DataSection
from recipes_lib.core.errors import one_line
from recipes_lib.data.conversations import conversation_of, template_values
from recipes_lib.data.prompts import (
    GENERATION,
    Span,
    prompt_and_completion,
    render_chat,
    unread_argument,
)
from recipes_lib.data.rows import BadRow, DataRow, SettingError

BATCH_ROWS = 1000
IGNORED = -100  # labels with this value carry no loss
_REWRITTEN = (
    "the chat template renders the first messages differently when others follow: no loss mask"
    " possible",
    "name the one of TRL's that trains it (data.chat_template: trl:NAME), mark the assistant's text"
    " with {% generation %} ... {% endgeneration %}, or set data.chat_loss: last",
)
_CALLS_LEFT_OUT = (
    "tool calls: not rendered by the chat template, so the row would teach to say nothing in their"
    " place",
    "set data.chat_template to one that knows tools, as trl:qwen2_5 does",
    "to train without them: data.drop_columns: [messages.tool_calls]",
)


@dataclass(slots=True)
class Encoded:
    """The tokens of one row."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # the same where there is loss, -100 elsewhere
    end_token: int  # the special token that ends the last answer, -1 for none or if it was cut
    changed: bool = False  # the chat template left out or changed the text of a message
    other_prompt: bool = False  # does not begin with the tokens that the model is asked with
    tokens_before: int = 0  # before truncation
    prompt_tokens: int = 0  # before truncation, those that are not learnt

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        spans: Sequence[Span],
        settings: Supervision,
        ends: frozenset[int],
        **facts: bool,
    ) -> Encoded:
        """Label the tokens in `spans`, and cut a row that is too long; `ends` may end an answer."""
        tokens = np.array(ids, dtype=np.int32)
        labels = np.full_like(tokens, IGNORED)
        for start, end in spans:
            labels[start:end] = tokens[start:end]
        answer_end = spans[-1][1] if spans else 0
        prompt_tokens = int((labels == IGNORED).sum())
        if settings.whole:
            labels = tokens
        limit = settings.max_length or len(tokens)
        first = max(len(tokens) - limit, 0) if settings.keep_end else 0
        is_kept = first < answer_end <= first + limit and ids[answer_end - 1] in ends
        return cls(
            tokens[first : first + limit],
            labels[first : first + limit],
            ids[answer_end - 1] if is_kept else -1,
            tokens_before=len(tokens),
            prompt_tokens=prompt_tokens,
            **facts,
        )

    @property
    def supervised(self) -> int:
        """Number of tokens with loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The settings that decide about loss, taken from `data` and `train`."""

    section: DataSection
    whole: bool  # loss on every token, the prompt included
    max_length: int | None  # longest row in tokens
    keep_end: bool  # cut the start of rows that are too long instead of their end
    eos_token: str | None

    @classmethod
    def of(cls, section: DataSection, train: dict[str, Any], tokenizer: Any) -> Supervision:
        """Read the settings, and refuse those that cannot act."""
        is_chat = section.prompt_format == "chat"
        eos_token = train.get("eos_token") or getattr(tokenizer, "eos_token", None)
        if train.get("assistant_only_loss") and not is_chat:
            key = "train.assistant_only_loss"
            what = f"{key}: true needs prompt_format chat, not {section.prompt_format}"
            raise SettingError(key, what, "loss on the completion alone is the default already")
        if not getattr(tokenizer, "is_fast", False):
            what = "the tokenizer has no fast version (tokenizer.json), which the loss mask needs"
            raise SettingError("model.name_or_path", what)
        if not is_chat and not eos_token:
            what = "the tokenizer has no EOS token: the model would never learn to stop"
            raise SettingError("model.name_or_path", what, "set train.eos_token")
        splits_itself = train.get("packing") and train.get("packing_strategy", "bfd") != "bfd"
        whole = train.get("completion_only_loss") is False
        return cls(
            section=section,
            whole=whole and not train.get("assistant_only_loss"),
            max_length=None if splits_itself else train.get("max_length", MAX_LENGTH),
            keep_end=train.get("truncation_mode", "keep_start") == "keep_end",
            eos_token=eos_token,
        )


def encode(
    rows: Sequence[DataRow], settings: Supervision, tokenizer: Any, template: str | None = None
) -> Iterator[Encoded | BadRow]:
    """Tokenise rows, at most `BATCH_ROWS` together, and cut them, or say why one cannot be used.
    Conversations are rendered with `template`; plain formats have none.
    """
    if template is None:
        return _encode_pairs(rows, settings, tokenizer)
    return _encode_chats(rows, settings, tokenizer, template)


@contextmanager
def plain_backend(tokenizer: Any, split_special: bool) -> Iterator[Any]:
    """Yield the tokenizer's backend without truncation and padding; special tokens may be text."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = split_special
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before[0]
        if before[1]:
            backend.enable_truncation(**before[1])
        if before[2]:
            backend.enable_padding(**before[2])


def prompt_ids(section: DataSection, tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of what `generation_prompt` returned, tokenised as in training: a
    template brings its own BOS, plain formats get the tokenizer's.
    """
    is_chat = section.prompt_format == "chat"
    split_special = not is_chat and section.special_tokens == "text"
    with plain_backend(tokenizer, split_special) as backend:
        ids: list[int] = backend.encode(prompt, add_special_tokens=not is_chat).ids
    if not is_chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        # A tokenizer that appends EOS by itself would tell the model to stop before it started.
        ids.pop()
    return ids


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _encode_pairs(
    rows: Sequence[DataRow], settings: Supervision, tokenizer: Any
) -> Iterator[Encoded | BadRow]:
    eos = tokenizer.convert_tokens_to_ids(settings.eos_token)
    pairs = [prompt_and_completion(row, settings.section.prompt_format) for row in rows]
    with plain_backend(tokenizer, settings.section.special_tokens == "text") as backend:
        encodings = backend.encode_batch([(prompt or "") + text for prompt, text in pairs])
        prompts = backend.encode_batch([prompt or "" for prompt, _ in pairs])
    for (prompt, _), asked, encoding in zip(pairs, prompts, encodings, strict=True):
        ids, asked_ids = encoding.ids, asked.ids
        if not ids or ids[-1] != eos:
            ids.append(eos)
        if asked_ids[-1:] == [eos]:
            asked_ids.pop()
        start = 0 if prompt is None else _num_common(asked_ids, ids)
        span = (min(start, len(ids) - 1), len(ids))
        is_other = prompt is not None and start < len(asked_ids)
        yield Encoded.of(ids, [span], settings, frozenset({eos}), other_prompt=is_other)


# ---- conversations ----


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    parts: list[Span]  # of characters, that are to be learned
    prompt: str  # what the model is asked with for the last turn
    speaks: bool  # whether a turn that is to be learned has a text
    changed: bool  # whether something that a message says is not in the text
    follows: bool  # whether each turn goes on from the prompt that asks for it


def _render(
    row: DataRow, settings: Supervision, tokenizer: Any, template: str
) -> Rendered | BadRow:
    """Render a conversation and say what of it the assistant wrote; or why it cannot be used."""
    section = settings.section
    messages = conversation_of(row, section.system_prompt)
    values = template_values(row, section.chat_template_kwargs)
    own = values.keys() - {"tools"} if "chat_template_kwargs" in row.fields else ()
    if reason := unread_argument(own, template):
        return reason
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[-1:] if section.chat_loss == "last" else answers
    learned = [index for index in answers if messages[index].get("weight") != 0]
    if not learned:
        return BadRow("nothing to train on: data.chat_loss is last, and that turn has weight 0")
    if settings.whole and any(message.get("weight") == 0 for message in messages):
        return BadRow("weight 0: with train.completion_only_loss: false, all of the text has loss")
    chat: list[Any] = [{**message} for message in messages]
    for message in chat:
        message.pop("weight", None)
    render = partial(render_chat, tokenizer=tokenizer, template=template, values=values)
    try:
        text, marks = render(chat)
        prompts = {index: render(chat[:index], prompt=True)[0] for index in answers}
        if GENERATION.search(template):
            marked = _marked_turns(text, marks, [*prompts.values()])
            turns = [turn for index, turn in zip(answers, marked, strict=True) if index in learned]
        else:
            turns = []
            for index in learned:
                prompt, until = prompts[index], render(chat[: index + 1])[0]
                is_prefix = text.startswith(prompt) and text.startswith(until)
                if not is_prefix or len(prompt) > len(until):
                    raise BadRow(*_REWRITTEN)
                turns.append([(len(prompt), len(until))])
        # a call is in its turn where that is learned, else anywhere in the text
        turn_of = dict(zip(learned, turns, strict=True))
        for index, message in enumerate(messages):
            said = "".join(text[slice(*part)] for part in turn_of.get(index, [(0, len(text))]))
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            if any(name not in said for name in names):
                raise BadRow(*_CALLS_LEFT_OUT)
    except BadRow as reason:
        return reason
    except jinja2.TemplateSyntaxError as error:
        what = f"line {error.lineno} of the chat template is not Jinja: {error.message}"
        raise SettingError("data.chat_template", what) from None
    except Exception as error:  # Jinja's own errors, and whatever `raise_exception` is given
        hint = "change the rows, or choose another template (data.chat_template)"
        return BadRow(f"the chat template refuses the conversation: {one_line(error)}", hint)
    contents = [message["content"] for message in messages]
    thoughts = [message.get("reasoning_content", "") for message in messages]
    return Rendered(
        text,
        [part for turn in turns for part in turn],
        prompts[answers[-1]],
        speaks=any(contents[index].strip() for index in learned),
        changed=any(words.strip() not in text for words in (*contents, *thoughts)),
        follows=all(text.startswith(prompts[index]) for index in learned),
    )


def _marked_turns(text: str, marked: Sequence[Span], prompts: Sequence[str]) -> list[list[Span]]:
    """Return the marks of each turn behind its prompt: some templates mark the role's tag, too."""
    marks: list[Span] = []
    for start, end in marked:
        if marks and marks[-1][1] == start:  # the text and the end token, marked apart
            start = marks.pop()[0]
        marks.append((start, end))
    starts = [len(prompt) for prompt in prompts]
    if not all(map(text.startswith, prompts)):
        # The model is asked behind the role's tag and, say, a thought that the prompt begins.
        own = marks[-1:] if len(prompts) == 1 else marks
        if len(own) != len(prompts):
            raise BadRow(*_REWRITTEN)
        pairs = zip(prompts, own, strict=True)
        starts = [
            min(max(_num_common(text, prompt), first), last) for prompt, (first, last) in pairs
        ]
    turns: list[list[Span]] = [[] for _ in prompts]
    for first, last in marks:
        number = bisect_left(starts, last) - 1
        if number >= 0:
            turns[number].append((max(first, starts[number]), last))
    return turns


def _encode_chats(
    rows: Sequence[DataRow], settings: Supervision, tokenizer: Any, template: str
) -> Iterator[Encoded | BadRow]:
    rendered = [_render(row, settings, tokenizer, template) for row in rows]
    chats = [chat for chat in rendered if isinstance(chat, Rendered)]
    with plain_backend(tokenizer, split_special=False) as backend:
        texts, prompts = [chat.text for chat in chats], [chat.prompt for chat in chats]
        encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
        prompt_encodings = iter(backend.encode_batch(prompts, add_special_tokens=False))
    special = special_ids(tokenizer)
    for chat in rendered:
        if isinstance(chat, BadRow):
            yield chat
            continue
        encoding, asked_ids = next(encodings), next(prompt_encodings).ids
        ids = encoding.ids
        spans = _token_spans(chat, ids, encoding.offsets, special)
        learned = [token for start, end in spans for token in ids[start:end]]
        if chat.speaks and not tokenizer.decode(learned, skip_special_tokens=True).strip():
            what = "the chat template renders nothing of what the assistant says"
            yield BadRow(what, "choose a template for plain text messages")
            continue
        is_other = not chat.follows or asked_ids != ids[: len(asked_ids)]
        yield Encoded.of(ids, spans, settings, special, changed=chat.changed, other_prompt=is_other)


def _token_spans(
    chat: Rendered, ids: Sequence[int], offsets: Sequence[Span], special: frozenset[int]
) -> list[Span]:
    """Return the tokens of each part up to its end-of-turn token, without white space behind it."""
    ends = [end for _, end in offsets]
    spans = []
    for part in chat.parts:
        first, last = (bisect_right(ends, place) for place in part)
        kept = last
        while kept > first and ids[kept - 1] not in special:
            if chat.text[slice(*offsets[kept - 1])].strip():
                kept = last
                break
            kept -= 1
        last = kept if kept > first else last
        if first < last:
            spans.append((first, last))
    return spans


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all special tokens: bos, eos, unk, pad, and those that a model adds."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {
        index for index, token in added.items() if getattr(token, "special", False)
    }


class DecodedSpan(NamedTuple):
    """A piece of a row with or without loss, and the special token that ends a supervised one."""

    text: str
    supervised: bool
    end_token: str = ""


def decoded_spans(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[DecodedSpan]:
    """Return the text of a row cut where loss begins and ends."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    mask = np.asarray(labels) != IGNORED
    special = special_ids(tokenizer)
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    spans = []
    for start, end in pairwise(cuts):
        piece, supervised = list(ids[start:end]), bool(mask[start])
        end_token = decode(piece[-1:]) if supervised and piece[-1] in special else ""
        spans.append(DecodedSpan(decode(piece), supervised, end_token))
    return spans
