"""What the loss sees: token ids of every example and the spans of tokens that carry loss.

Prompt and completion are tokenised once and together, as TRL does, and the tokenizer's own
character offsets tell where the completion starts. A token that holds characters of both belongs to
the completion (TRL masks the same way). Padding, batching and packing are TRL's business.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from recipes_lib.config.sections import DataSection
from recipes_lib.data.conversations import conversation_of
from recipes_lib.data.examples import BadRow, Example, SettingError
from recipes_lib.data.prompts import prompt_and_completion
from recipes_lib.data.templates import encode_conversations, special_ids

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
        answer_end: index behind the last token of the last answer before truncation, its end token
            included; a template may put white space behind that, which carries loss only where the
            whole text does.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    ends: bool
    boundary_merge: bool = False
    changed: bool = False
    tokens_before: int = 0
    prompt_tokens: int = 0
    answer_end: int = 0

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


class Tokens:
    """The tokens of many examples as columns: ids and labels per batch, and numbers per example."""

    NUMBERS = (
        "lengths",
        "supervised",
        "tokens_before",
        "prompt_tokens",
        "ends",
        "boundary_merges",
        "changed",
        "end_tokens",
    )

    def __init__(self) -> None:
        self._starts = [0]  # of each batch, in examples
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # offsets, ids, labels
        self._numbers: list[np.ndarray] = []

    def add(self, encoded: Sequence[Encoded]) -> None:
        """Append a batch of examples."""
        if not encoded:
            return
        offsets = np.cumsum([0, *(len(item.ids) for item in encoded)], dtype=np.int32)
        self._batches.append(
            (
                offsets,
                np.concatenate([item.ids for item in encoded]),
                np.concatenate([item.labels for item in encoded]),
            )
        )
        self._starts.append(self._starts[-1] + len(encoded))
        end_tokens = [
            (
                int(item.ids[item.answer_end - 1])
                if item.ends and len(item.ids) == item.tokens_before
                else -1
            )
            for item in encoded
        ]
        columns = [
            [getattr(item, name) for item in encoded]
            for name in ("supervised", "tokens_before", "prompt_tokens", "ends")
        ]
        columns += [[item.boundary_merge for item in encoded], [item.changed for item in encoded]]
        self._numbers.append(np.array([np.diff(offsets), *columns, end_tokens], dtype=np.int32))

    def numbers(self) -> dict[str, np.ndarray]:
        """The columns `NUMBERS`; `end_tokens` has the token that ends the answer of an example that
        was not cut, else -1.
        """
        whole = (
            np.concatenate(self._numbers, axis=1)
            if self._numbers
            else np.zeros((len(self.NUMBERS), 0), dtype=np.int32)
        )
        return dict(zip(self.NUMBERS, whole, strict=True))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of one example."""
        batch = bisect_right(self._starts, index) - 1
        offsets, ids, labels = self._batches[batch]
        start, end = offsets[index - self._starts[batch]], offsets[index - self._starts[batch] + 1]
        return ids[start:end], labels[start:end]

    def batches(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        """First and last example (exclusive), offsets, ids and labels of each batch."""
        for (first, last), columns in zip(pairwise(self._starts), self._batches, strict=True):
            yield first, last, *columns


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
        return cls(
            section=section,
            whole=train.get("completion_only_loss") is False
            and not train.get("assistant_only_loss"),
            max_length=None if splits_itself else train.get("max_length", 1024),
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
    if train.get("completion_only_loss") is True and num_texts:
        what = (
            f"train.completion_only_loss: true needs prompt and completion, but {num_texts} rows"
            " have a text column only"
        )
        hint = "remove the key (loss on the whole text), or name a prompt and a completion column"
        raise SettingError("train.completion_only_loss", what, hint)
    if train.get("assistant_only_loss") and section.prompt_format != "chat":
        what = (
            f"train.assistant_only_loss: true needs prompt_format chat, not {section.prompt_format}"
        )
        raise SettingError(
            "train.assistant_only_loss", what, "loss on the completion alone is the default already"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise SettingError(
            "model.name_or_path",
            "the tokenizer has no fast version (tokenizer.json), so the loss mask cannot be placed",
        )
    if section.prompt_format != "chat" and not (train.get("eos_token") or tokenizer.eos_token):
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
    """
    encoded = (
        _encode_plain(examples, settings, tokenizer)
        if template is None
        else _encode_chat(examples, settings, tokenizer, template)
    )
    for item in encoded:
        if isinstance(item, BadRow):
            yield item
            continue
        item.tokens_before = len(item.ids)
        item.prompt_tokens = item.tokens_before - item.supervised
        item.answer_end = item.spans[-1][1] if item.spans else 0
        if settings.whole:
            item.spans = ((0, item.tokens_before),)
        yield _truncated(item, settings)


def _encode_plain(
    examples: Sequence[Example], settings: Supervision, tokenizer: Any
) -> Iterator[Encoded]:
    backend = tokenizer.backend_tokenizer
    eos = tokenizer.convert_tokens_to_ids(settings.eos_token)
    prompt_format = settings.section.prompt_format
    with plain_backend(tokenizer, split_special=settings.section.special_tokens == "text"):
        exact = _offsets_are_exact(backend)
        pairs = [prompt_and_completion(example, prompt_format) for example in examples]
        texts = [(prompt or "") + completion for prompt, completion in pairs]
        alone = None if exact else backend.encode_batch([prompt or "" for prompt, _ in pairs])
        for index, encoding in enumerate(backend.encode_batch(texts)):
            prompt, ids = pairs[index][0], encoding.ids
            if not ids or ids[-1] != eos:
                ids.append(eos)
            if prompt is None:
                first, merged = 0, False
            elif alone is None:
                first, merged = _completion_start(encoding, texts[index], len(prompt), len(ids))
            else:
                first, merged = _divergence(alone[index].ids, ids)
            yield Encoded(
                np.array(ids, dtype=np.int32), ((first, len(ids)),), ids[-1] == eos, merged
            )


def _completion_start(encoding: Any, text: str, boundary: int, length: int) -> tuple[int, bool]:
    """Index of the first token that holds a character at or after `boundary`, and whether it also
    holds one before.
    """
    for position in range(boundary, len(text)):
        token = encoding.char_to_token(position)
        if token is not None:
            return token, encoding.token_to_chars(token)[0] < boundary
    return length - 1, False  # an empty completion: only EOS is left


def _divergence(prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[int, bool]:
    """The same by comparing with the prompt tokenised alone, for tokenizers whose offsets leave
    characters out.
    """
    first = next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
        min(len(prompt_ids), len(ids)),
    )
    return min(first, len(ids) - 1), first < len(prompt_ids)


def _offsets_are_exact(backend: Any) -> bool:
    """Whether offsets cover white space (post-processors with `trim_offsets` leave it out)."""
    text = "a:\n\nb  c"
    covered = {
        position
        for start, end in backend.encode(text, add_special_tokens=False).offsets
        for position in range(start, end)
    }
    return covered == set(range(len(text)))


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
    section = settings.section
    conversations = [conversation_of(example, section.system_prompt) for example in examples]
    weighted = "weight 0: with train.completion_only_loss: false, the loss is on the whole text"
    with plain_backend(tokenizer, split_special=False):
        rows = encode_conversations(
            conversations, tokenizer, template, last_only=section.chat_loss == "last"
        )
        for messages, row in zip(conversations, rows, strict=True):
            if isinstance(row, BadRow):
                yield row
            elif settings.whole and any("weight" in message for message in messages):
                yield BadRow(weighted)
            else:
                ids, spans, ends, changed = row
                yield Encoded(np.array(ids, dtype=np.int32), spans, ends, changed=changed)


def _truncated(item: Encoded, settings: Supervision) -> Encoded:
    length, limit = len(item.ids), settings.max_length
    if limit is None or length <= limit:
        return item
    first = length - limit if settings.keep_end else 0
    moved = ((max(start - first, 0), min(end - first, limit)) for start, end in item.spans)
    last = item.spans[-1][1] if item.spans else 0
    item.ids = item.ids[first : first + limit]
    item.ends = item.ends and last <= first + limit
    item.spans = tuple((start, end) for start, end in moved if start < end)
    return item


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
        piece = [int(token) for token in ids[start:end]]
        span = {
            "text": tokenizer.decode(piece, clean_up_tokenization_spaces=False),
            "supervised": bool(mask[start]),
        }
        if span["supervised"] and piece[-1] in special:
            span["end_token"] = tokenizer.decode(piece[-1:], clean_up_tokenization_spaces=False)
        spans.append(span)
    return spans
