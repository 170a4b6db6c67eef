"""The fields of pairs of answers, of which the chosen one is to be preferred: one prompt, which is
what both begin with, and the two answers.
"""

import re
from typing import Any

from recipes_lib.data.conversations import Message, message_texts
from recipes_lib.data.errors import BadRow, listed
from recipes_lib.data.rows import PAIR

# A turn of a conversation as one text, in the spelling of Anthropic's HH-RLHF.
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \n]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def settle_pair(fields: dict[str, Any], is_chat: bool) -> None:
    """Leave one prompt and two answers in the fields of a row: all texts, or all messages; a
    `BadRow` says why nothing can be preferred.
    """
    chosen = fields["chosen"]
    rejected = fields["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRow("chosen and rejected: one is text, the other a list of messages")
    question = fields.get("prompt", fields.get("instruction"))
    if question is None and not is_chat:
        raise BadRow("the prompt is missing")
    if question is None and isinstance(chosen, str):
        chosen = _read_transcript(chosen, "chosen")
        rejected = _read_transcript(rejected, "rejected")
    if isinstance(question, list) and isinstance(chosen, str):
        chosen = [{"role": "assistant", "content": chosen}]
        rejected = [{"role": "assistant", "content": rejected}]
    if isinstance(chosen, list):
        prompt, chosen, rejected = _share_prompt(question, chosen, rejected)
        fields.pop("instruction", None)
        fields["prompt"] = prompt
    fields["chosen"] = chosen
    fields["rejected"] = rejected
    for name in PAIR:
        if not _text_of(fields[name]).strip():
            raise BadRow(f"{name}: the answer is empty")
    if _text_of(chosen).strip() == _text_of(rejected).strip():
        raise BadRow("chosen and rejected are the same: nothing is preferred")


def _text_of(answer: str | list[Message]) -> str:
    """Return all that an answer says."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message_texts(answer[-1]))


def _read_transcript(text: str, name: str) -> list[Message]:
    """Return the messages of a conversation that is one text."""
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        what = f"{name}: a text without a prompt, and not a conversation as Human: and Assistant:"
        raise BadRow(what, "name the column of the prompt: data.columns: {prompt: NAME}")
    messages = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": _ROLES[speaker], "content": content.strip()})
    return messages


def _share_prompt(
    question: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the messages that both conversations begin with, and the one answer of each.

    Args:
        question: a column beside them: a text that is asked in them too, or messages that they
            repeat or go on from.
    """
    given: list[Message] = question if isinstance(question, list) else []
    size = len(given)
    if chosen[:size] == given and rejected[:size] == given:
        chosen = chosen[size:]
        rejected = rejected[size:]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = given + chosen[:shared]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in messages[shared:]]
        if roles != ["assistant"]:
            found = listed(roles, 4) or "nothing"
            raise BadRow(f"{name}: expected one answer behind what both share, found {found}")
    asked = [message["content"].strip() for message in prompt if message["role"] == "user"]
    if isinstance(question, str) and not asked:
        prompt.append({"role": "user", "content": question})
    elif isinstance(question, str) and question.strip() not in (asked[0], asked[-1]):
        raise BadRow("the prompt's column is not what the conversations ask")
    if not prompt:
        raise BadRow("chosen and rejected share no prompt")
    return prompt, chosen[shared:], rejected[shared:]
