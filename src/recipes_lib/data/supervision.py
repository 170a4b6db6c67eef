"""What the loss sees: token ids of each row and the spans of tokens that carry loss, in 3 cases.

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

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2
import numpy as np

from recipes_lib.config.sections import MAX_LENGTH, DataSection
from recipes_lib.core.errors import one_line
from recipes_lib.data.conversations import Message, conversation_of, template_values, without_key
from recipes_lib.data.prompts import (
    GENERATION,
    Span,
    check_template_kwargs,
    prompt_and_completion,
    render_chat,
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


@dataclass(slots=True)
class Encoded:
    """The tokens of one row.

    Args:
        ids: token ids, int32.
        spans: [start, end) token ranges that carry loss, in order.
        ends: whether the last token with loss ends the turn.
        changed: whether the chat template left out or changed the text of a message.
        other_prompt: whether the row does not begin with the tokens that the model is asked with.
        tokens_before: before truncation, as `prompt_tokens`, those that are not learnt.
        end_token: the token that ends the answer of a row that was not cut, else -1.
    """

    ids: np.ndarray
    spans: tuple[Span, ...]
    ends: bool
    changed: bool = False
    other_prompt: bool = False
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
        """Read the settings; some packing strategies split long rows themselves."""
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
    section: DataSection, train: dict[str, Any], tokenizer: Any, has_texts: bool = False
) -> None:
    """Refuse settings that would be ignored silently.

    Args:
        has_texts: whether some rows are one text each.

    Raises:
        SettingError: a loss that these rows cannot have, or a tokenizer without end or offsets.
    """
    is_chat = section.prompt_format == "chat"
    if train.get("completion_only_loss") is True and has_texts:
        key = "train.completion_only_loss"
        what = f"{key}: true needs prompt and completion, but these rows are one text each"
        raise SettingError(key, what, "remove the key (loss on the whole text)")
    if train.get("assistant_only_loss") and not is_chat:
        key = "train.assistant_only_loss"
        what = f"{key}: true needs prompt_format chat, not {section.prompt_format}"
        raise SettingError(key, what, "loss on the completion alone is the default already")
    if not getattr(tokenizer, "is_fast", False):
        what = "the tokenizer has no fast version (tokenizer.json): the loss mask has no place"
        raise SettingError("model.name_or_path", what)
    if not is_chat and not (train.get("eos_token") or tokenizer.eos_token):
        what = "the tokenizer has no EOS token: the model would never learn to stop"
        raise SettingError("model.name_or_path", what, "set train.eos_token")


def encode(
    rows: Sequence[DataRow],
    settings: Supervision,
    tokenizer: Any,
    template: str | None = None,
) -> Iterator[Encoded | BadRow]:
    """Tokenise rows in order and truncate them; in place of a conversation of which nobody can say
    what the assistant wrote stands the reason.

    Args:
        rows: as many as may be tokenised together, see `BATCH_ROWS`.
        template: what conversations are rendered with; None for the plain formats.
    """
    encoded: Iterator[Encoded | BadRow] = (
        _encode_pairs(rows, settings, tokenizer)
        if template is None
        else _encode_chats(rows, settings, tokenizer, template)
    )
    for item in encoded:
        if isinstance(item, Encoded):
            _truncate(item, settings)
        yield item


def _truncate(item: Encoded, settings: Supervision) -> None:
    length = item.tokens_before = len(item.ids)
    item.prompt_tokens = length - item.supervised
    # A template may put white space behind the answer: it carries loss only where all does.
    answer_end = item.spans[-1][1] if item.spans else 0
    if settings.whole:
        item.spans = ((0, length),)
    limit = settings.max_length
    if limit is None or length <= limit:
        item.end_token = int(item.ids[answer_end - 1]) if item.ends else -1
        return
    first = length - limit if settings.keep_end else 0
    last = item.spans[-1][1] if item.spans else 0
    item.ids = item.ids[first : first + limit]
    item.ends = item.ends and last <= first + limit
    moved = ((max(start - first, 0), min(end - first, limit)) for start, end in item.spans)
    item.spans = tuple((start, end) for start, end in moved if start < end)


@contextmanager
def plain_backend(tokenizer: Any, split_special: bool) -> Iterator[Any]:
    """Yield the tokenizer's backend, for a moment without truncation and padding, and with special
    tokens in text as text if asked.
    """
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
        yield Encoded(
            np.array(ids, dtype=np.int32),
            ((min(start, len(ids) - 1), len(ids)),),
            ends=ids[-1] == eos,
            other_prompt=prompt is not None and start < len(asked_ids),
        )


# ---- conversations ----


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Args:
        turns: of each turn that is to be learned, the spans of characters that the assistant wrote.
        prompt: what the model is asked with for the last turn.
        follows: whether each of them goes on from the prompt that asks for it.
    """

    messages: Sequence[Message]
    text: str
    turns: list[list[Span]]
    prompt: str
    follows: bool


def render_turns(
    row: DataRow, section: DataSection, tokenizer: Any, template: str
) -> Rendered | BadRow:
    """Render a conversation and say what of it the assistant wrote; or why it cannot be used.

    Raises:
        SettingError: the template is not Jinja.
    """
    messages = conversation_of(row, section.system_prompt)
    values = template_values(row, section.chat_template_kwargs)
    render = partial(render_chat, tokenizer=tokenizer, template=template, values=values)
    try:
        if row.fields.get("chat_template_kwargs"):
            check_template_kwargs(values.keys() - {"tools"}, template)
        return _rendered(messages, render, template, only_last=section.chat_loss == "last")
    except BadRow as reason:
        return reason
    except jinja2.TemplateSyntaxError as error:
        what = f"line {error.lineno} of the chat template is not Jinja: {error.message}"
        raise SettingError("data.chat_template", what) from None
    except Exception as error:  # Jinja's own errors, and whatever `raise_exception` is given
        return BadRow(
            f"the chat template refuses the conversation: {one_line(error)}",
            "change the rows, or choose another template (data.chat_template)",
        )


def _rendered(
    messages: Sequence[Message],
    render: Callable[..., tuple[str, list[Span]]],
    template: str,
    only_last: bool,
) -> Rendered:
    chat = without_key(messages, "weight")
    text, marked = render(chat)
    if any("tool_calls" in message for message in chat) and _ignores_calls(chat, render, text):
        raise BadRow(
            "tool calls: not rendered by the chat template, so the row would teach to say nothing"
            " in their place",
            "set data.chat_template to one that knows tools, as trl:qwen2_5 does",
            drop=["messages.tool_calls"],
        )
    answers = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    answers = answers[-1:] if only_last else answers
    learned = [number for number, i in enumerate(answers) if messages[i].get("weight") != 0]
    prompts = [render(chat[:index], prompt=True)[0] for index in answers]
    if GENERATION.search(template):
        marks = _marks_of_turns(text, marked, prompts)
        turns = [marks[number] for number in learned]
    else:
        turns = []
        for number in learned:
            until, _ = render(chat[: answers[number] + 1])
            start, end = len(prompts[number]), len(until)
            is_prefix = text.startswith(prompts[number]) and text.startswith(until)
            if not is_prefix or start > end:
                raise BadRow(*_REWRITTEN)
            turns.append([(start, end)])
    follows = all(text.startswith(prompts[number]) for number in learned)
    return Rendered(messages, text, turns, prompts[-1], follows)


def _ignores_calls(
    chat: Sequence[Message], render: Callable[..., tuple[str, list[Span]]], text: str
) -> bool:
    """Return whether the template renders a conversation with tool calls as if it had none."""
    try:
        return render(without_key(chat, "tool_calls"))[0] == text
    except Exception:  # a template that insists on them has read them
        return False


def _marks_of_turns(text: str, marked: Sequence[Span], prompts: Sequence[str]) -> list[list[Span]]:
    """Return the marks of each turn behind its prompt: some templates mark the role's tag, too."""
    marks: list[Span] = []
    for start, end in marked:
        if marks and marks[-1][1] == start:  # the text and the end token, marked apart
            start = marks.pop()[0]
        marks.append((start, end))
    starts = []
    for number, prompt in enumerate(prompts):
        start = len(prompt)
        if not text.startswith(prompt):
            own = marks[-1:] if len(prompts) == 1 else marks
            if len(own) != len(prompts):
                raise BadRow(*_REWRITTEN)
            first, last = own[number]
            # The model is asked behind the role's tag and, say, a begun thought.
            start = min(max(_num_common(text, prompt), first), last)
        starts.append(start)
    turns: list[list[Span]] = [[] for _ in prompts]
    for first, last in marks:
        number = bisect_left(starts, last) - 1
        if number >= 0:
            turns[number].append((max(first, starts[number]), last))
    return turns


def _encode_chats(
    rows: Sequence[DataRow], settings: Supervision, tokenizer: Any, template: str
) -> Iterator[Encoded | BadRow]:
    section = settings.section
    rendered = [render_turns(row, section, tokenizer, template) for row in rows]
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
        spans = tuple(
            span
            for turn in chat.turns
            for part in turn
            if (span := _token_span(encoding, chat.text, part, special))
        )
        learned = [token for start, end in spans for token in encoding.ids[start:end]]
        said = tokenizer.decode(learned, skip_special_tokens=True)
        answers = [message for message in chat.messages if message["role"] == "assistant"]
        if settings.whole and any(answer.get("weight") == 0 for answer in answers):
            what = "weight 0: with train.completion_only_loss: false, all of the text has loss"
            yield BadRow(what)
        elif learned and not said.strip() and any(answer["content"].strip() for answer in answers):
            what = "the chat template renders nothing of what the assistant says"
            yield BadRow(what, "choose a template for plain text messages")
        else:
            yield Encoded(
                np.array(encoding.ids, dtype=np.int32),
                spans,
                ends=bool(spans) and encoding.ids[spans[-1][1] - 1] in special,
                changed=_leaves_something_out(chat),
                other_prompt=not chat.follows or asked_ids != encoding.ids[: len(asked_ids)],
            )


def _leaves_something_out(chat: Rendered) -> bool:
    """Return whether something that a message says is not in the text. The name of a called tool
    has to be in what the assistant wrote: it may stand among the tools, too.
    """
    said = "".join(chat.text[slice(*part)] for turn in chat.turns for part in turn)
    for message in chat.messages:
        words = (message["content"], message.get("reasoning_content", ""))
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(text.strip() not in chat.text for text in words):
            return True
        if message.get("weight") != 0 and any(name not in said for name in names):
            return True
    return False


def _token_span(encoding: Any, text: str, part: Span, special: frozenset[int]) -> Span | None:
    """Return the tokens of a part of a turn up to its end-of-turn token, behind which nothing will
    be written, not even white space; None for a part without text.
    """
    ids = encoding.ids
    first, last = (_token_at(encoding, text, place) for place in part)
    for kept in range(last, first, -1):
        if ids[kept - 1] in special:
            return first, kept
        start, end = encoding.token_to_chars(kept - 1) or (0, 0)
        if text[start:end].strip():
            break
    return (first, last) if first < last else None


def _token_at(encoding: Any, text: str, position: int) -> int:
    """Return the index of the first token with a character at or after a position."""
    tokens = (encoding.char_to_token(place) for place in range(position, len(text)))
    return next((token for token in tokens if token is not None), len(encoding.ids))


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
