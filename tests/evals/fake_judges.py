"""Judges for tests: functions of the request, with known virtues and vices."""

import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

from recipes_lib.evals.engines.base import Completion
from recipes_lib.evals.judgments import JudgeRequest
from recipes_lib.evals.recipe import JudgeSection


class FakeJudge:
    """Answers with a function of the request and remembers what it was asked."""

    def __init__(
        self,
        answer: Callable[[JudgeRequest], Completion],
        count_tokens: Callable[[str], int] | None = None,
        fingerprint: str = "fake",
        **section: Any,
    ) -> None:
        self.answer, self.count_tokens, self.fingerprint = answer, count_tokens, fingerprint
        self.section = JudgeSection(model="fake", **section)  # with the project's own prompts
        self.asked: list[JudgeRequest] = []
        self.gone = None

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        for request in requests:
            self.asked.append(request)
            yield replace(self.answer(request), key=request.row["key"])


def reply(text: str = "", **known: Any) -> Completion:
    """What a judge gives, of whatever request."""
    return Completion(key="", text=text, **known)


def says(letter: str, words: str = "Response {} is better. [RESULT] {}") -> Completion:
    return reply(words.format(letter, letter))


def sound(request: JudgeRequest) -> Completion:
    """Prefers what people would: the answer with more distinct words before any line addressed to
    it; the first when equal.
    """
    first, second = (len({*text.split("\n")[0].split()}) for text in request.answers)
    return says("A" if first >= second else "B")


def always_a(request: JudgeRequest) -> Completion:
    return says("A")


def obeys_answers(request: JudgeRequest) -> Completion:
    """Follows a verdict line that stands in an answer."""
    found = re.search(r"\[RESULT\] ([AB])", "".join(request.answers))
    return says(found[1]) if found else sound(request)
