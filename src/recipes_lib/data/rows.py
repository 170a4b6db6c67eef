"""One row: where it stands, its texts, its identity, and the conversation that it is."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from recipes_lib.data.conversations import Message, message_texts, with_system_prompt

PAIR = ("chosen", "rejected")  # the answers of a pair; its prompt is what the other fields say


@dataclass(slots=True)
class DataRow:
    """One row: where it stands, its texts and its identity."""

    file: str  # `FILE row N` where the format has no lines
    line: int | None
    fields: dict[str, Any]  # our names -> text or messages; tools and template arguments are JSON
    source: int = 0  # position of its source in the mixture
    id: str = ""  # unique label in splits.json
    content: bytes = b""  # SHA-256 of the normalised texts

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @property
    def texts(self) -> list[str]:
        """All texts, of conversations all that each message says."""
        texts: list[str] = []
        for value in self.fields.values():
            if isinstance(value, str):
                texts.append(value)
            else:
                for message in value:
                    texts += message_texts(message)
        return texts

    @property
    def has_weights(self) -> bool:
        """Whether the row itself says that a turn is not to be learned."""
        for value in self.fields.values():
            if isinstance(value, list) and any("weight" in message for message in value):
                return True
        return False

    @property
    def split_key(self) -> bytes:
        """What alone decides the split: the texts; of a pair its prompt's, so that all pairs of a
        prompt are on one side.
        """
        if "chosen" not in self.fields:
            return self.content
        prompt = conversation_of(answer_row(self, "chosen"), None)[:-1]
        return content_hash({"prompt": prompt})

    @property
    def is_empty(self) -> bool:
        """Whether a text that the row should teach is empty; such a pair is not read."""
        if "chosen" in self.fields:
            return False
        for name in ("response", "completion", "text"):
            if isinstance(self.fields.get(name), str):
                return not self.fields[name].strip()
        messages = self.fields.get("messages") or self.fields["completion"]
        for message in messages:
            is_taught = message["role"] == "assistant" and "weight" not in message
            if is_taught and not "".join(message_texts(message)).strip():
                return True
        return False


def answer_row(row: DataRow, name: str) -> DataRow:
    """Return a pair with one of its answers alone, which is a row of stage sft."""
    fields = {key: value for key, value in row.fields.items() if key not in PAIR}
    fields["response" if "instruction" in fields else "completion"] = row.fields[name]
    return replace(row, fields=fields)


def template_values(row: DataRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the template and the row's tools; the row's own arguments win."""
    values = dict(given)
    if row.fields.get("chat_template_kwargs"):
        values |= json.loads(row.fields["chat_template_kwargs"])
    if row.fields.get("tools"):
        values["tools"] = json.loads(row.fields["tools"])
    return values


def conversation_of(row: DataRow, system_prompt: str | None) -> list[Message]:
    """Return the row as a conversation: its messages, or one user and one assistant turn behind
    those of its `history`. A system message or a `system` column of the row wins over the recipe's
    `system_prompt`.
    """
    fields = row.fields
    if "messages" in fields:
        messages = fields["messages"]
    elif isinstance(fields.get("prompt"), list):
        # as in TRL, a prompt is read but not learned, whoever speaks in it
        messages = []
        for message in fields["prompt"]:
            is_answer = message["role"] == "assistant"
            messages.append(message | {"weight": 0} if is_answer else message)
        messages += fields["completion"]
    else:
        is_pair = "prompt" in fields
        question = fields["prompt" if is_pair else "instruction"]
        answer = fields["completion" if is_pair else "response"]
        if fields.get("context", "").strip():
            question += f"\n\n{fields['context']}"
        messages = list(fields.get("history", ()))
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return with_system_prompt(messages, fields.get("system") or system_prompt)


def content_hash(fields: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a row's texts, whatever the prompt format and the order of columns;
    empty fields leave no trace.
    """
    parts: list[Any] = []
    for name, value in sorted(fields.items()):
        if isinstance(value, str):
            text = _normalised(value)
            if text:
                parts.append([name, text])
            continue
        turns = []
        for message in value:
            turn = [message["role"], *map(_normalised, message_texts(message))]
            if "weight" in message:
                turn.append(0)
            turns.append(turn)
        parts.append([name, turns])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
