"""What the loss sees: token ids of each row and the spans of tokens that carry loss, in 3 cases.

1. Text pairs: prompt and completion are tokenised once and together, and the tokenizer's character
   offsets tell where the completion starts; a token with characters of both belongs to it.
2. Conversations under a template with `{% generation %}` markers, or TRL's training template: the
   markers say what the assistant wrote.
3. Conversations under any other template: rendered up to each assistant turn and compared with the
   whole; where a rendering is a prefix of the next one, the text between is the turn.

The loss begins where a prompt ends and the model must start to write. TRL masks the same way;
padding, batching and packing are its business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NotRequired, TypedDict

import jinja2
import numpy as np

from recipes_lib.config.sections import MAX_LENGTH, DataSection
from recipes_lib.core.errors import one_line
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import Message, conversation_of, template_values, without_key
from recipes_lib.data.prompts import (
    GENERATION,
    Span,
    Twin,
    check_template_kwargs,
    prompt_and_completion,
    render_chat,
    trl_twins,
)
from recipes_lib.data.rows import BadRow, DataRow, SettingError

BATCH_ROWS = 1000
IGNORED = -100  # labels with this value carry no loss


@dataclass(slots=True)
class Encoded:
    """The tokens of one row.

    Args:
        ids: token ids, int32.
        spans: [start, end) token ranges that carry loss, in order.
        ends: whether the last token with loss ends the turn.
        changed: whether the chat template left out or changed the text of a message.
        unlike_prompt: whether a turn with loss does not go on from the text that ends a prompt.
        other_prompt_ids: whether the prompt alone has other token ids than it has in the row.
        tokens_before: before truncation, as `prompt_tokens`, those that are not learnt.
        end_token: the token that ends the answer of a row that was not cut, else -1.
    """

    ids: np.ndarray
    spans: tuple[Span, ...]
    ends: bool
    changed: bool = False
    unlike_prompt: bool = False
    other_prompt_ids: bool = False
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
    num_texts: int, section: DataSection, train: dict[str, Any], tokenizer: Any
) -> None:
    """Refuse settings that would be ignored silently.

    Args:
        num_texts: rows that are one text each.

    Raises:
        SettingError: a loss that these rows cannot have, or a tokenizer without end or offsets.
    """
    is_chat = section.prompt_format == "chat"
    if train.get("completion_only_loss") is True and num_texts:
        what = (
            f"train.completion_only_loss: true needs prompt and completion, but {num_texts} rows"
            " have a text column only"
        )
        hint = "remove the key (loss on the whole text), or name a prompt and a completion column"
        raise SettingError("train.completion_only_loss", what, hint)
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
    twin: Twin | None = None,
) -> Iterator[Encoded | BadRow]:
    """Tokenise rows in order and truncate them; in place of a conversation of which nobody can say
    what the assistant wrote stands the reason.

    Args:
        rows: as many as may be tokenised together, see `BATCH_ROWS`.
        template: of the `chat` format.
        twin: what conversations are rendered with in its place.
    """
    encoded: Iterator[Encoded | BadRow] = (
        _encode_pairs(rows, settings, tokenizer)
        if template is None
        else _encode_chats(rows, settings, tokenizer, template, twin)
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


# ---- text pairs ----


def _encode_pairs(
    rows: Sequence[DataRow], settings: Supervision, tokenizer: Any
) -> Iterator[Encoded | BadRow]:
    backend = tokenizer.backend_tokenizer
    eos = tokenizer.convert_tokens_to_ids(settings.eos_token)
    pairs = [prompt_and_completion(row, settings.section.prompt_format) for row in rows]
    texts = [(prompt or "") + completion for prompt, completion in pairs]
    with plain_backend(tokenizer, split_special=settings.section.special_tokens == "text"):
        exact = _offsets_are_exact(backend)
        encodings = backend.encode_batch(texts)
        prompts = backend.encode_batch([prompt or "" for prompt, _ in pairs])
    for (prompt, _), text, alone, encoding in zip(pairs, texts, prompts, encodings, strict=True):
        ids, first, is_other = encoding.ids, 0, False
        if not ids or ids[-1] != eos:
            ids.append(eos)
        if prompt is not None:
            asked = alone.ids[:-1] if alone.ids[-1:] == [eos] else alone.ids
            common = _num_common(asked, ids)
            is_other = common < len(asked)
            token = _token_at(encoding, text, len(prompt)) if exact else common
            first = len(ids) - 1 if token is None else min(token, len(ids) - 1)
        yield Encoded(
            np.array(ids, dtype=np.int32),
            ((first, len(ids)),),
            ends=ids[-1] == eos,
            other_prompt_ids=is_other,
        )


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _token_at(encoding: Any, text: str, position: int) -> int | None:
    """Return the index of the first token with a character at or after a position."""
    tokens = (encoding.char_to_token(place) for place in range(position, len(text)))
    return next((token for token in tokens if token is not None), None)


def _offsets_are_exact(backend: Any) -> bool:
    """Return whether offsets cover white space: post-processors with `trim_offsets` leave it out,
    and where ids part must be looked for instead.
    """
    text = "a:\n\nb  c"
    offsets = backend.encode(text, add_special_tokens=False).offsets
    return {place for span in offsets for place in range(*span)} == set(range(len(text)))


@contextmanager
def plain_backend(tokenizer: Any, split_special: bool) -> Iterator[None]:
    """For a moment no truncation, no padding, and special tokens in text as text if asked."""
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
    """Return the token ids of what `generation_prompt` returned, tokenised as in training: a
    template brings its own BOS, plain formats get the tokenizer's.
    """
    is_chat = section.prompt_format == "chat"
    with plain_backend(tokenizer, split_special=not is_chat and section.special_tokens == "text"):
        backend = tokenizer.backend_tokenizer
        ids: list[int] = backend.encode(prompt, add_special_tokens=not is_chat).ids
    if not is_chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        # A tokenizer that appends EOS by itself would tell the model to stop before it started.
        ids.pop()
    return ids


# ---- conversations ----


def _encode_chats(
    rows: Sequence[DataRow],
    settings: Supervision,
    tokenizer: Any,
    template: str,
    twin: Twin | None,
) -> Iterator[Encoded | BadRow]:
    section = settings.section
    found = [render_turns(row, section, tokenizer, template, twin) for row in rows]
    texts = [item[0] for item in found if not isinstance(item, BadRow)]
    backend = tokenizer.backend_tokenizer
    with plain_backend(tokenizer, split_special=False):
        encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
    special = special_ids(tokenizer)
    for row, item in zip(rows, found, strict=True):
        if isinstance(item, BadRow):
            yield item
            continue
        messages = conversation_of(row, section.system_prompt)
        encoding = next(encodings)
        try:
            encoded = _supervise_turns(encoding, *item, messages, settings, special)
        except BadRow as reason:
            yield reason
            continue
        if encoded.spans and (first := encoded.spans[-1][0]):
            start = encoding.token_to_chars(first)[0]
            with plain_backend(tokenizer, split_special=False):
                alone = backend.encode(item[0][:start], add_special_tokens=False).ids
            encoded.other_prompt_ids = alone != encoding.ids[: len(alone)]
        yield encoded


@dataclass(frozen=True)
class Turn:
    """Where a turn of the assistant stands in the text, and whether it begins behind what a prompt
    ends with.
    """

    span: Span
    follows_prompt: bool = True


def render_turns(
    row: DataRow,
    section: DataSection,
    tokenizer: Any,
    template: str,
    twin: Twin | None = None,
) -> tuple[str, list[Turn]] | BadRow:
    """Return a conversation as text, by the twin where there is one, with the character spans of
    the assistant's turns; or why it cannot be rendered.

    Raises:
        SettingError: the template is not Jinja, or the twin renders another text.
    """
    messages = without_key(conversation_of(row, section.system_prompt), "weight")
    values = template_values(row, section.chat_template_kwargs)
    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    try:
        if row.fields.get("chat_template_kwargs"):
            check_template_kwargs(values.keys() - {"tools"}, twin.text if twin else template)
        rendering = twin.text if twin else template
        whole, marked = render_chat(messages, tokenizer, rendering, values)
        if _ignores_calls(messages, tokenizer, rendering, values, whole):
            raise BadRow(
                "tool calls: not rendered by the chat template, so the row would teach to say"
                " nothing in their place",
                "set data.chat_template to one that knows tools, as trl:qwen2_5 does",
                drop=["messages.tool_calls"],
            )
        if twin is not None:
            exchange = messages[: answers[0] + 1]
            _check_twin(exchange, values, row.place, tokenizer, template, twin)
        if twin is not None or GENERATION.search(template):
            return whole, _marked_turns(whole, marked, messages, tokenizer, template, values)
        learned = answers[-1:] if section.chat_loss == "last" else answers
        return whole, _prefix_turns(whole, messages, learned, tokenizer, template, values)
    except BadRow as reason:
        return reason
    except SettingError:
        raise
    except jinja2.TemplateSyntaxError as error:
        what = f"line {error.lineno} of the chat template is not Jinja: {error.message}"
        raise SettingError("data.chat_template", what) from None
    except Exception as error:  # Jinja's own errors, and whatever `raise_exception` is given
        return BadRow(
            f"the chat template refuses the conversation: {one_line(error)}",
            "change the rows, or choose another template (data.chat_template)",
        )


def _prefix_turns(
    whole: str,
    messages: Sequence[Message],
    learned: Sequence[int],
    tokenizer: Any,
    template: str,
    values: Mapping[str, Any],
) -> list[Turn]:
    turns = []
    for index in learned:
        start, _ = render_chat(messages[:index], tokenizer, template, values, prompt=True)
        end, _ = render_chat(messages[: index + 1], tokenizer, template, values)
        if not (whole.startswith(start) and whole.startswith(end) and len(start) <= len(end)):
            known = trl_twins().get(template)
            raise BadRow(
                "the chat template renders the first messages differently when message"
                f" {index} follows: no loss mask possible",
                f"this is TRL's template, which has a twin for training: {known.setting}"
                if known
                else "mark the assistant's text in the template with {% generation %} ... {%"
                " endgeneration %}, or learn the last turn alone: data.chat_loss: last",
            )
        turns.append(Turn((len(start), len(end))))
    return turns


def _marked_turns(
    whole: str,
    marked: Sequence[Span],
    messages: Sequence[Message],
    tokenizer: Any,
    template: str,
    values: Mapping[str, Any],
) -> list[Turn]:
    """Return the marked turns without what a prompt ends with, such as a role's tag, which some
    templates mark, too.
    """
    begin = turn_beginning(tokenizer, template, values)
    turns = []
    for start, end in _joined(marked):
        at = whole.find(begin, max(0, start - len(begin)), end)
        if 0 <= at <= start:
            turns.append(Turn((max(start, at + len(begin)), end)))
            continue
        # The model is asked behind the role's tag and, say, a begun thought; the tag is no answer.
        tag = _num_common(whole[start:end], begin)
        turns.append(Turn((start + tag, end), follows_prompt=False))
    if not any("tool_calls" in message for message in messages):
        return turns
    for index in (i for i, one in enumerate(messages) if one["role"] == "tool"):
        asked, _ = render_chat(messages[: index + 1], tokenizer, template, values, prompt=True)
        for place, turn in enumerate(turns):
            start, end = turn.span
            if start < len(asked) < end and whole.startswith(asked):
                turns[place] = Turn((len(asked), end))
    return turns


def turn_beginning(tokenizer: Any, template: str, values: Mapping[str, Any] | None = None) -> str:
    """Return what a template ends a prompt with, for the model to go on from; '' where unknown."""
    asked = [Message(role="user", content="?")]
    try:
        without, _ = render_chat(asked, tokenizer, template, values)
        prompt, _ = render_chat(asked, tokenizer, template, values, prompt=True)
    except Exception:  # the rows themselves show what the template refuses
        return ""
    return prompt[len(without) :] if prompt.startswith(without) else ""


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return the spans without those borders that have nothing between them."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _ignores_calls(
    messages: Sequence[Message],
    tokenizer: Any,
    template: str,
    values: Mapping[str, Any],
    whole: str,
) -> bool:
    """Return whether a conversation has tool calls, and the template renders it as if it had
    none.
    """
    if not any("tool_calls" in message for message in messages):
        return False
    try:
        chat = without_key(messages, "tool_calls")
        return render_chat(chat, tokenizer, template, values)[0] == whole
    except Exception:  # a template that insists on them has read them
        return False


def _check_twin(
    exchange: Sequence[Message],
    values: Mapping[str, Any],
    place: str,
    tokenizer: Any,
    template: str,
    twin: Twin,
) -> None:
    """Raise a SettingError where a twin renders the first exchange of a row in another way than the
    template that answers. Behind the same prompt it may keep what the template leaves out of an
    answer, such as a thought, and end it with a token.
    """
    plain, _ = render_chat(exchange, tokenizer, template, values)
    trained, _ = render_chat(exchange, tokenizer, twin.text, values)
    is_token = tokenizer.backend_tokenizer.token_to_id
    if trained == plain:
        return
    if trained.startswith(plain) and is_token(trained[len(plain) :]) is not None:
        return
    answer = exchange[-1]["content"].strip()
    prompt, _ = render_chat(exchange[:-1], tokenizer, template, values, prompt=True)
    if trained.startswith(prompt) and answer not in plain and answer in trained:
        return
    same = _num_common(plain, trained)
    part = slice(max(0, same - 30), same + 50)
    raise SettingError(
        "data.chat_template",
        f"{place}: TRL's training template renders another text than the plain template",
        f"plain:    {plain[part]!r}",
        f"training: {trained[part]!r}",
        "set data.chat_template to the one to train, save and answer with:"
        f" {shown_path(twin.file)}, or a file with the plain one",
    )


def _supervise_turns(
    encoding: Any,
    text: str,
    turns: Sequence[Turn],
    messages: Sequence[Message],
    settings: Supervision,
    special: frozenset[int],
) -> Encoded:
    """Put loss on the assistant's turns; a turn of weight 0 has none.

    Raises:
        BadRow: the text does not show what the assistant says, or which turn is which.
    """
    ids = encoding.ids
    found: list[list[Span]] = []  # some templates mark the text and the end token of a turn apart
    follows: list[bool] = []
    behind = 0
    for turn in turns:
        if span := _token_span(encoding, text, turn.span, special):
            if found and not text[behind : turn.span[0]].strip():
                found[-1].append(span)
            else:
                found.append([span])
                follows.append(turn.follows_prompt)
            behind = turn.span[1]
    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    if settings.whole and any(messages[index].get("weight") == 0 for index in answers):
        raise BadRow(
            "weight 0: with train.completion_only_loss: false, the loss is on the whole text"
        )
    if settings.section.chat_loss == "last":
        found, follows, answers = found[-1:], follows[-1:], answers[-1:]
    learned = [
        _chars_of(encoding, text, index)
        for spans in found
        for span in spans
        for index in range(*span)
        if ids[index] not in special
    ]
    says_something = any(messages[index]["content"].strip() for index in answers)
    if found and says_something and not any(map(str.strip, learned)):
        raise BadRow(
            "the chat template renders nothing of what the assistant says",
            "choose a template for plain text messages",
        )
    weights = [messages[index].get("weight", 1) for index in answers]
    if 0 in weights and len(weights) != len(found):
        raise BadRow(
            "weight 0: the chat template does not render every assistant turn, so the turns"
            " cannot be told apart"
        )
    ends = bool(found) and ids[found[-1][-1][1] - 1] in special
    is_unlike = len(answers) == len(found) and any(
        not known and weight and index and messages[index - 1]["role"] != "tool"
        for index, weight, known in zip(answers, weights, follows, strict=True)
    )
    if 0 in weights:
        found = [spans for spans, weight in zip(found, weights, strict=True) if weight]
    said = "".join(text[slice(*turn.span)] for turn in turns)
    return Encoded(
        np.array(ids, dtype=np.int32),
        tuple(span for spans in found for span in spans),
        ends,
        changed=_leaves_something_out(text, said, messages),
        unlike_prompt=is_unlike,
    )


def _leaves_something_out(text: str, said: str, messages: Sequence[Message]) -> bool:
    """Return whether something that a message says is not in the text. The name of a called tool
    has to be in what the assistant `said`: it may stand among the tools, too.
    """
    words = [one[key] for one in messages for key in ("content", "reasoning_content") if key in one]
    calls = [call["function"]["name"] for one in messages for call in one.get("tool_calls", ())]
    return any(one.strip() not in text for one in words) or any(name not in said for name in calls)


def _token_span(encoding: Any, text: str, turn: Span, special: frozenset[int]) -> Span | None:
    """Return the tokens of a turn up to its end-of-turn token, behind which nothing will be
    written, not even white space; None for a turn without text.
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
    """Return the characters of a token."""
    start, end = encoding.token_to_chars(index) or (0, 0)
    return text[start:end]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all special tokens: bos, eos, unk, pad, and those that a model adds."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {
        index for index, token in added.items() if getattr(token, "special", False)
    }


class DecodedSpan(TypedDict):
    """A piece of a row with or without loss, and the special token that ends a supervised one."""

    text: str
    supervised: bool
    end_token: NotRequired[str]


def decoded_spans(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[DecodedSpan]:
    """Return the text of a row cut where loss begins and ends."""
    mask = np.asarray(labels) != IGNORED
    special = special_ids(tokenizer)
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    spans = []
    for start, end in pairwise(cuts):
        piece = list(ids[start:end])
        span: DecodedSpan = {
            "text": tokenizer.decode(piece, clean_up_tokenization_spaces=False),
            "supervised": bool(mask[start]),
        }
        if span["supervised"] and piece[-1] in special:
            span["end_token"] = tokenizer.decode(piece[-1:], clean_up_tokenization_spaces=False)
        spans.append(span)
    return spans
