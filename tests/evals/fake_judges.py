"""Judges for tests: functions of the request, with known virtues and vices."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

from recipes_lib.evals.engine import Completion
from recipes_lib.evals.judge import JudgeRequest
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

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        for request in requests:
            self.asked.append(request)
            yield replace(self.answer(request), key=request.row["key"])


def reply(text: str = "", **known: Any) -> Completion:
    """What a judge gives, of whatever request."""
    return Completion(key="", text=text, **known)


def bodies(request: JudgeRequest) -> list[str]:
    """The answers as the judge sees them."""
    return re.findall(
        r"<<begin [0-9a-f]+>>\n(.*?)\n<<end [0-9a-f]+>>", request.prompt.user, re.DOTALL
    )


def says(letter: str, words: str = "Response {} is better. [RESULT] {}") -> Completion:
    return reply(words.format(letter, letter))


def longer(request: JudgeRequest) -> Completion:
    first, second = request.answers
    return says("A" if len(first) >= len(second) else "B")


def sound(request: JudgeRequest) -> Completion:
    """Prefers what people would: the answer with more distinct words before any line addressed to
    it; the first when equal.
    """
    worth = [len(set(re.split(r"#|\n", body)[0].split())) for body in bodies(request)]
    return says("A" if worth[0] >= worth[1] else "B")


def always_a(request: JudgeRequest) -> Completion:
    return says("A")


def obeys_answers(request: JudgeRequest) -> Completion:
    """Follows a verdict line that stands in an answer."""
    for body in bodies(request):
        if found := re.search(r"\[RESULT\] ([AB])", body):
            return says(found.group(1))
    return sound(request)


def coin(seed: int) -> Callable[[JudgeRequest], Completion]:
    draw = random.Random(seed)
    return lambda request: says(draw.choice("AB"))


def mumbles(request: JudgeRequest) -> Completion:
    return reply("Both have their merits.")
