"""One row becomes tokens and labels. Loss is found in 3 ways, as in TRL:

1. Text pairs: the completion begins where the tokens of both texts together differ from those of
   the prompt alone.
2. Conversations under a template with `{% generation %}` markers, or TRL's training template: the
   markers say what the assistant wrote.
3. Conversations under any other template: the text between the prompt that asks for a turn and the
   conversation up to its end, where both begin the whole text.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, takewhile
from operator import eq, itemgetter
from typing import Any

import numpy as np

from recipes_lib.config.recipe import MAX_LENGTH, DataSection
from recipes_lib.core.errors import one_line
from recipes_lib.data.conversations import THOUGHTS
from recipes_lib.data.errors import BadRow, SettingError
from recipes_lib.data.prompts import (
    GENERATION,
    HEADINGS,
    Span,
    check_tool_calls,
    render_chat,
    task_prompt,
    unread_argument,
)
from recipes_lib.data.rows import DataRow, conversation_of, template_values

IGNORED = -100  # labels with this value carry no loss
_REWRITTEN = (
    "the chat template renders earlier messages differently when more follow: no loss mask is"
    " possible",
    "use TRL's training template for it (data.chat_template: trl:NAME), mark the assistant's text"
    " with {% generation %} ... {% endgeneration %}, or set data.chat_loss: last",
)


@dataclass(slots=True, eq=False)  # arrays have no one answer to ==
class Encoded:
    """The tokens of one row."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # the same where there is loss, -100 elsewhere
    end_token: int  # the special token that ends the last answer, -1 for none or if it was cut
    tokens_before: int  # before truncation
    prompt_tokens: int  # before truncation, those that are not learnt
    changed: bool = False  # the chat template left out or changed the text of a message
    other_prompt: bool = False  # does not begin with the tokens that the model is asked with

    @property
    def supervised(self) -> int:
        """Number of tokens with loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def sides(self) -> list["Encoded"]:
        """The row itself; a pair has two."""
        return [self]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What a trainer reads of the row."""
        return {"input_ids": self.ids, "labels": self.labels}

    @property
    def lengths(self) -> dict[str, int]:
        """How many tokens the audit counts, by title."""
        return {
            "prompt": self.prompt_tokens,
            "row, as trained": len(self.ids),
            "with loss": self.supervised,
        }


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The settings that decide about loss, taken from `data` and `train`."""

    section: DataSection
    whole: bool  # loss on every token, the prompt included
    max_length: int | None  # longest row in tokens
    keep_end: bool  # cut the start of rows that are too long instead of their end
    eos_token: str | None
    ends: frozenset[int]  # tokens that may end an answer: EOS, in `chat` all special ones
    tails: dict[str, list[int]] = field(default_factory=dict, repr=False)  # ends of prompts, as ids

    @classmethod
    def of(cls, section: DataSection, train: dict[str, Any], tokenizer: Any) -> "Supervision":
        """Read the settings, and refuse those that cannot act."""
        is_chat = section.prompt_format == "chat"
        answers_only = train.get("assistant_only_loss")
        eos_token = train.get("eos_token") or getattr(tokenizer, "eos_token", None)
        if answers_only and not is_chat:
            key = "train.assistant_only_loss"
            what = f"{key}: true needs prompt_format chat, not {section.prompt_format}"
            raise SettingError(key, what, "loss on the completion alone is already the default")
        if not getattr(tokenizer, "is_fast", False) or not (is_chat or eos_token):
            what = "training needs a fast tokenizer (tokenizer.json), and an EOS token to end rows"
            raise SettingError("model.name_or_path", what, "set train.eos_token")
        ends = special_ids(tokenizer) if is_chat else {tokenizer.convert_tokens_to_ids(eos_token)}
        # TRL's other strategies of packing cut long rows into several, and lose no token
        splits_itself = train.get("packing") and train.get("packing_strategy", "bfd") != "bfd"
        return cls(
            section=section,
            whole=train.get("completion_only_loss") is False and not answers_only,
            max_length=None if splits_itself else train.get("max_length", MAX_LENGTH),
            keep_end=train.get("truncation_mode", "keep_start") == "keep_end",
            eos_token=eos_token,
            ends=frozenset(ends),
        )


def _tokenised(section: DataSection, tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Return the ids of a text, and the offsets of a conversation. A template brings its own BOS,
    plain formats get it here; an EOS that the tokenizer appends by itself is taken off, as it would
    tell the model to stop before it started.
    """
    is_chat = section.prompt_format == "chat"
    batch = tokenizer(
        text,
        add_special_tokens=not is_chat,
        split_special_tokens=not is_chat,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = batch["input_ids"]
    if not is_chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids, batch["offset_mapping"]


def prompt_ids(section: DataSection, tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of what `generation_prompt` returned, tokenised as in training."""
    return _tokenised(section, tokenizer, prompt)[0]


def encode(
    row: DataRow, settings: Supervision, tokenizer: Any, template: str | None = None
) -> Encoded:
    """Tokenise a row, and cut it if it is too long; a `BadRow` says why it cannot be used.
    Conversations are rendered with `template`; plain formats have none.
    """
    if template is not None:
        return _encode_chat(row, settings, tokenizer, template)
    section = settings.section
    fields = row.fields
    prompt: str | None = None  # a text has none
    if section.prompt_format in HEADINGS:
        context = fields.get("context", "")
        prompt = task_prompt(section.prompt_format, fields["instruction"], context)
        completion = fields["response"]
    elif "text" in fields:
        completion = fields["text"]
    else:
        prompt = fields["prompt"]
        completion = fields["completion"]
    ids, _ = _tokenised(section, tokenizer, (prompt or "") + completion)
    ids.append(tokenizer.convert_tokens_to_ids(settings.eos_token))
    ids_of_prompt = [] if prompt is None else prompt_ids(section, tokenizer, prompt)
    num_common = _num_common(ids_of_prompt, ids)
    start = min(num_common, len(ids) - 1)  # the end token always has loss
    encoded = _labelled(ids, [(start, len(ids))], settings)
    encoded.other_prompt = num_common < len(ids_of_prompt)
    return encoded


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items both begin with."""
    return sum(1 for _ in takewhile(lambda is_same: is_same, map(eq, first, second)))


def _labelled(ids: Sequence[int], spans: Sequence[Span], settings: Supervision) -> Encoded:
    """Label the tokens in `spans`, and cut a row that is too long."""
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
    has_end = first < answer_end <= first + limit and ids[answer_end - 1] in settings.ends
    return Encoded(
        ids=tokens[first : first + limit],
        labels=labels[first : first + limit],
        end_token=ids[answer_end - 1] if has_end else -1,
        tokens_before=len(tokens),
        prompt_tokens=prompt_tokens,
    )


def _encode_chat(row: DataRow, settings: Supervision, tokenizer: Any, template: str) -> Encoded:
    section = settings.section
    messages = conversation_of(row, section.system_prompt)
    values = template_values(row, section.chat_template_kwargs)
    if "chat_template_kwargs" in row.fields:
        unread = unread_argument(values.keys() - {"tools"}, template)
        if unread:
            raise unread
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if section.chat_loss == "last":
        answers = answers[-1:]
    learned = [index for index in answers if "weight" not in messages[index]]
    if not learned:
        raise BadRow("nothing to train on: every assistant turn that may be learned has weight 0")
    if settings.whole and row.has_weights:
        raise BadRow("weight 0: with train.completion_only_loss: false, all of the text has loss")

    # messages -> text, and of each turn what is to be learned
    chat = [dict(message) for message in messages]
    for message in chat:  # templates know no weight
        message.pop("weight", None)
    render = partial(render_chat, tokenizer=tokenizer, template=template, values=values)
    try:
        text, marks = render(chat)
        check_tool_calls(chat, learned, text, render)
        prompts = {index: render(chat[:index], prompt=True)[0] for index in answers}
        if GENERATION.search(template):
            marked = _marked_turns(text, marks, list(prompts.values()))
            turns = dict(zip(answers, marked, strict=True))
        else:
            turns = {}
            for index in learned:
                until = text if index + 1 == len(chat) else render(chat[: index + 1])[0]
                if not text.startswith(until) or not until.startswith(prompts[index]):
                    raise BadRow(*_REWRITTEN)
                turns[index] = [(len(prompts[index]), len(until))]
    except BadRow:
        raise
    except Exception as error:  # Jinja's own errors, and whatever `raise_exception` is given
        hint = "change the rows, or choose another template (data.chat_template)"
        what = f"the chat template refuses the conversation: {one_line(error)}"
        raise BadRow(what, hint) from None

    # text -> tokens
    ids, offsets = _tokenised(section, tokenizer, text)
    parts: list[Span] = []
    for index in learned:
        parts += turns[index]
    spans = _token_spans(text, parts, ids, offsets, settings.ends)
    is_silent = not spans
    for first, last in spans:
        is_silent |= not tokenizer.decode(ids[first:last], skip_special_tokens=True).strip()
    if is_silent and not row.is_empty:
        what = "the chat template renders none of the assistant's text, which teaches silence"
        hint = "choose one for plain text, or one that supports tools, such as trl:qwen2_5"
        raise BadRow(what, f"{hint} (data.chat_template)")
    encoded = _labelled(ids, spans, settings)
    last_prompt = prompts[answers[-1]]
    comparable = offsets if text.startswith(last_prompt) else []
    begins = _begins_with(last_prompt, ids, comparable, settings, tokenizer)
    follows = all(text.startswith(prompts[index]) for index in learned)
    encoded.other_prompt = not begins or not follows
    said = []
    for message in messages:
        said += [message["content"], message.get(THOUGHTS[0], "")]
        said += [call["function"]["name"] for call in message.get("tool_calls", ())]
    encoded.changed = any(part.strip() not in text for part in said)
    return encoded


def _begins_with(
    prompt: str, ids: list[int], offsets: Sequence[Span], settings: Supervision, tokenizer: Any
) -> bool:
    """Return whether a row begins with the tokens of its prompt alone. A tokenizer cuts at special
    tokens first: only what stands behind the prompt's last one can differ, in most rows a role.
    """
    inside = bisect_right(offsets, len(prompt), key=itemgetter(1))
    most = 8  # tokens behind it: a role, or the beginning of a thought; more may be a text
    for first in range(inside - 1, max(inside - 1 - most, -1), -1):
        if ids[first] not in settings.ends:  # the cheap test first
            continue
        start, end = offsets[first]
        # a token that is normalised or strips may stand for another text
        if prompt[start:end] == tokenizer.convert_ids_to_tokens(ids[first]):
            tail = prompt[start:]
            if tail not in settings.tails:
                settings.tails[tail] = prompt_ids(settings.section, tokenizer, tail)
            tail_ids = settings.tails[tail]
            return ids[first : first + len(tail_ids)] == tail_ids
    ids_of_prompt = prompt_ids(settings.section, tokenizer, prompt)
    return ids[: len(ids_of_prompt)] == ids_of_prompt


def _token_spans(
    text: str, parts: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span], special: Any
) -> list[Span]:
    """Return the tokens of each part up to its end-of-turn token, without white space behind it."""
    end_of = itemgetter(1)
    spans = []
    for start, end in parts:
        first = bisect_right(offsets, start, key=end_of)
        last = bisect_right(offsets, end, key=end_of)
        # white space behind the end token stands between turns, and nobody writes it
        kept = last
        while kept > first and not text[slice(*offsets[kept - 1])].strip():
            kept -= 1
        if kept > first and ids[kept - 1] in special:
            last = kept
        if first < last:
            spans.append((first, last))
    return spans


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
        mark_of_each = marks[-1:] if len(prompts) == 1 else marks
        if len(mark_of_each) != len(prompts):
            raise BadRow(*_REWRITTEN)
        starts = []
        for prompt, (first, last) in zip(prompts, mark_of_each, strict=True):
            starts.append(min(max(_num_common(text, prompt), first), last))
    turns: list[list[Span]] = [[] for _ in prompts]
    for first, last in marks:
        number = bisect_left(starts, last) - 1
        if number >= 0:
            turns[number].append((max(first, starts[number]), last))
    return turns


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens: bos, eos, unk, pad, and those that a model adds."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {index for index, token in added if token.special}


def decoded_spans(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Any]:
    """Return the text of a row cut where loss begins and ends, as pairs of text and `has_loss`."""
    spans = []
    pairs = zip(ids, labels, strict=True)
    for has_loss, span in groupby(pairs, key=lambda pair: bool(pair[1] != IGNORED)):
        tokens = [int(token) for token, _ in span]
        spans.append((tokenizer.decode(tokens, clean_up_tokenization_spaces=False), has_loss))
    return spans
