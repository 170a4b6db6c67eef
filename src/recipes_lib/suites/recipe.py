"""An eval recipe that passed its check: sections as values. `load_eval` is the only way in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.errors import RecipeError, RecipeErrors
from recipes_lib.judging.judge_file import JudgeFile, JudgeSection, Thresholds, load_judge_file
from recipes_lib.recipe.loader import Document, load_document
from recipes_lib.recipe.project import project_root
from recipes_lib.recipe.suggestions import did_you_mean
from recipes_lib.suites.sections import EvalDataSection, GenerationSection, MetricsSection, SuiteSection
from recipes_lib.suites.validation import check_eval, folder_of


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
        return folder_of(self.document, tuple(key.split("."))) / name

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written."""
        return self.document.error(tuple(key.split(".")), what, *hints)

    def to_dict(self) -> dict[str, Any]:
        """Return all sections as plain values."""
        parts: dict[str, Any] = {name: dataclasses.asdict(getattr(self, name)) for name in ("suite", "data", "generation", "metrics")}
        if self.judge:
            parts["judge"] = {"name": self.judge.path.stem, **dataclasses.asdict(self.judge.judge)}
            parts["thresholds"] = dataclasses.asdict(self.judge.thresholds)
        return {"name": self.name, **parts}


def find_eval(word: str) -> Path:
    """Return the file of an eval recipe: the path itself, or one of the project's by its name (`quickstart/mt_bench`).

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
        if "suite:" in file.read_text(encoding="utf-8", errors="replace") and file.parent.name != "lm_eval"
    }
    if word.removeprefix("evals/") in known:
        return known[word.removeprefix("evals/")]
    raise RecipeError(f"'{word}' is no eval recipe", *did_you_mean(word, list(known), "evals/"), f"eval recipes: {', '.join(known)}")


def load_eval(path: str | Path, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Load and check an eval recipe.

    Args:
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    document = load_document(path, overrides)
    if document.kind.name != "eval":
        raise RecipeError(f"is {document.kind.title}, not an eval recipe", document.kind.use, file=document.file)
    errors = check_eval(document)
    if errors:
        raise RecipeErrors(errors)
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
        return JudgeFile(document.path.parent / "judges" / document.path.name, JudgeSection(**own), Thresholds())
    file = load_judge_file(folder_of(document, ("judge", "file")) / values["file"])
    return dataclasses.replace(file, judge=dataclasses.replace(file.judge, **own))


def eval_name(path: Path) -> str:
    """Return the folder name of an eval's results: the file's stem, with its folder's name unless that is `evals`.

    Example:
        >>> eval_name(Path("evals/quickstart/mt_bench.yaml"))
        'quickstart--mt_bench'
    """
    folder = path.resolve().parent.name
    return path.stem if folder == "evals" else f"{folder}--{path.stem}"
