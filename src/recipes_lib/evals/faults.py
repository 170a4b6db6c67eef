"""What may be wrong with answers whichever the right ones are: empty, cut, repeating themselves, or
the same to many questions.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping

CUT = "hit the token limit"
SAME = "are the same text"
# A note of a log of checks: what its rules see cannot tell a good answer from a fixed one.
FORM_ONLY = "one and the same answer would pass nearly all of these checks: they see its form alone"
_MOST_REPETITION = 4.0  # bytes of a text for each of its compressed form
_FEWEST_LETTERS = 20  # by a rule, fewer are the answer to many questions
_FEWEST_JUDGED_LETTERS = 5  # as in "Answer 17", which answers no open question
_FEW = 8  # texts, each the answer to three questions at least
_SMALL_CHANGE = 0.25  # of a text's letters: those of the words that no other answer has
_WORD = re.compile(r"[^\W\d_]+")


def answer_faults(
    texts: Mapping[tuple[str, int], str], num_cut: int, judged: bool, form_only: bool
) -> dict[str, tuple[int, int]]:
    """Return the faults in answers, by what is said after their number, as (faulty, all).

    Args:
        texts: by question and turn, without white space at their ends.
        num_cut: how many reached the token limit.
        judged: whether a judge reads them, and no rule.
        form_only: whether rules read them that see their form alone.
    """
    if not texts:
        return {}
    questions: dict[str, list[str]] = defaultdict(list)  # by their answer
    num_loops = 0
    for (question, _), text in texts.items():
        letters = "".join(filter(str.isalpha, text)).casefold()
        is_long = len(letters) >= _FEWEST_LETTERS  # then a running number makes no other answer
        if judged or is_long:
            questions[letters if is_long else text].append(question)
        # prose is compressed less (Radford et al. 2022, Whisper: 2.4)
        plain = text.encode("utf-8", "replace")
        num_loops += len(plain) > _MOST_REPETITION * len(zlib.compress(plain))
    num_same = max((len(ids) for ids in questions.values() if len(set(ids)) > 1), default=0)
    num_variants = _variants(texts, judged or form_only)
    if num_variants <= num_same:
        num_variants = 0  # it is said already
    counts = {
        "are empty": sum(not text for text in texts.values()),
        CUT: num_cut,
        "repeat themselves": num_loops,
        SAME: num_same,
        "are variants of a few texts": num_variants,
    }
    return {fault: (count, len(texts)) for fault, count in counts.items()}


def _variants(texts: Mapping[tuple[str, int], str], is_open: bool) -> int:
    """Return how many answers are one of a few texts, but for numbers and single words.

    Short answers to rules are no such thing, unless the rules see the form alone (`is_open`): four
    letters answer all questions with choices, and the right ones do too.
    """
    words_of = {key: _WORD.findall(text.casefold()) for key, text in texts.items()}
    num_answers_with = Counter[str]()
    for words in words_of.values():
        num_answers_with.update(set(words))
    fewest = _FEWEST_JUDGED_LETTERS if is_open else _FEWEST_LETTERS
    questions: dict[str, set[str]] = defaultdict(set)  # by what their answers share
    for (question, _), words in words_of.items():
        shared = [word for word in words if num_answers_with[word] > 1]
        num_shared = sum(map(len, shared))
        num_letters = sum(map(len, words))
        if num_shared >= max(fewest, (1 - _SMALL_CHANGE) * num_letters):
            questions[" ".join(shared)].add(question)
    largest = sorted(map(len, questions.values()), reverse=True)[:_FEW]
    return sum(num_questions for num_questions in largest if num_questions > 2)
