"""An eval recipe: its rules, and its sections as values. `load_eval` is the only way in. Needs no
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, dotted, load
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.judging.judge_file import (
    JudgeFile,
    JudgeSection,
    Thresholds,
    is_address,
    load_judge_file,
)
from recipes_lib.suites.sections import (
    EvalDataSection,
    GenerationSection,
    MetricsSection,
    SuiteSection,
)
from recipes_lib.suites.task_code import code_in
from recipes_lib.suites.task_names import unknown_tasks

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
            if not (judge.get("file") or judge.get("model")):
                yield document.error(
                    ("judge",),
                    "judge.file is missing",
                    "name a file in evals/judges, for example judges/prometheus-7b-v2.yaml",
                )
        for path in (
            ("data", "questions"),
            ("data", "references"),
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
        for section in ("generation", "judge"):
            if (url := values.get(section, {}).get("base_url")) and not is_address(url):
                what = (
                    f"{section}.base_url: an address such as http://127.0.0.1:8000/v1, not {url!r}"
                )
                yield document.error((section, "base_url"), what)
        if suite["name"] == "lm_eval" and not generation.get("trust_remote_code"):
            name = data.get("include_path")
            yield from code_in(
                document, document.folder(("data", "include_path")) / name if name else None
            )
        if generation.get("engine") == "openai" and not generation.get("base_url"):
            yield document.error(
                ("generation", "engine"), "generation.engine openai needs base_url"
            )


class TaskRules(KindRules):
    """Rules of lm-eval's task files: lm-eval reads them, we only see that the file names its task
    and its data.
    """

    has_schema = False

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield which of the two is missing."""
        for key in ("task", "dataset_path"):
            if key not in document.values:
                yield document.error((key,), f"{key} is missing", "a task of lm-eval needs it")


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

    def resolve(self, key: str, name: str) -> Path:
        """Return the path that a file name under a dotted key means."""
        return self.document.folder(tuple(key.split("."))) / name

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written."""
        return self.document.error(tuple(key.split(".")), what, *hints)

    def to_dict(self) -> dict[str, Any]:
        """Return all sections as plain values."""
        parts: dict[str, Any] = {
            name: dataclasses.asdict(getattr(self, name))
            for name in ("suite", "data", "generation", "metrics")
        }
        if self.judge:
            parts["judge"] = {"name": self.judge.path.stem, **dataclasses.asdict(self.judge.judge)}
            parts["thresholds"] = dataclasses.asdict(self.judge.thresholds)
        return {"name": self.name, **parts}


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
