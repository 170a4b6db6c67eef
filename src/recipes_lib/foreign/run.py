"""`import_run`: foreign files become one run with state `imported`, written beside the runs and
renamed into place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.atomic_files import publish, write_text
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.json_files import Row
from recipes_lib.core.manifest import command_line
from recipes_lib.core.project import recipe_path, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, all_runs, read_resolved
from recipes_lib.foreign.answers import read_answers
from recipes_lib.foreign.evaluations import write_evaluation
from recipes_lib.foreign.files import Foreign, read_files
from recipes_lib.foreign.harness import read_results, samples_alone
from recipes_lib.foreign.judged import WITHOUT_ANSWERS, read_judgments
from recipes_lib.foreign.logs import read_logs
from recipes_lib.foreign.parts import Part

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

ANSWERS = ("fastchat-answers", "alpaca-eval-outputs")
LOGS = ("trainer-state", "trainer-log")


@dataclass
class Imported:
    """What an import made: the run, what became of each file, what the files do not hold, and
    warnings.
    """

    name: str
    path: Path
    files: list[Row] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    evals: list[str] = field(default_factory=list)
    there_already: bool = False


@dataclass
class _Content:
    """Everything read, before anything is written."""

    files: list[Foreign]
    evals: dict[str, list[Part]] = field(default_factory=dict)
    logs: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    adapter: Row | None = None
    becomes: dict[str, str] = field(default_factory=dict)
    rows_of: dict[str, str] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)

    def add(self, part: Part, what: str) -> None:
        """Take one file's share of an evaluation."""
        self.evals.setdefault(part.eval, []).append(part)
        self.becomes[part.file.sha256] = f"evals/{part.eval}: {what}"
        if part.rows_of:
            self.rows_of[part.file.sha256] = part.rows_of


def import_run(
    names: Sequence[str | Path],
    run: str,
    recipe: str | None = None,
    *,
    model: str | None = None,
    against: str | None = None,
    replace: bool = False,
) -> Imported:
    """Make a run from foreign files.

    Args:
        names: the files.
        run: the run's name.
        recipe: the recipe that says what was trained; it is recorded as the run's own.
        model: whose rows are meant where a file holds several models.
        against: the opponent where a file compares with several.
        replace: write an imported run anew.

    Raises:
        RecipeError: an illegal or taken name, a recipe that the adapter's config contradicts, a
            model that is not there.
        DataError: a file is damaged or unknown, or files do not belong together.
    """
    target = RunDirectory(run)
    if run.startswith(("base--", "answers--", "judge--")):
        raise RecipeError(
            f"'{run}': names that start so are given by recipes eval and recipes judge",
            "choose another name: --as OTHER",
        )
    files = read_files(names)
    asked = {"recipe": recipe, "model": model, "against": against}
    if target.exists() and not replace:
        if _same_import(target, files, asked):
            return Imported(run, target.path, there_already=True)
        state = target.read_state()["state"]
        hint = (
            "write it anew with --replace, all its files named"
            if state == "imported"
            else "it was trained here"
        )
        raise RecipeError(
            f"run '{run}' exists ({state})", hint, "or choose another name: --as OTHER"
        )
    if target.exists() and target.read_state()["state"] != "imported":
        raise RecipeError(
            f"run '{run}' was trained here and is not replaced by an import",
            "choose another name: --as OTHER",
        )
    if not target.exists() and target.path.exists():
        raise RecipeError(
            f"{shown_path(target.path)} is there and is no run",
            "choose another name, or move it away",
        )
    content = _read(files, model, against)
    loaded = _recipe(recipe, content)
    done = Imported(
        run,
        target.path,
        [_provenance(file, content) for file in files],
        content.lacks,
        evals=list(content.evals),
    )
    done.warnings = list(_twins(run, done.files))
    if loaded is None and content.logs:
        done.lacks.append(
            "what was trained: no recipe was named (--recipe R), so its differences cannot be"
            " listed"
        )
    _write(target, content, loaded, asked, done)
    return done


def _read(files: list[Foreign], model: str | None, against: str | None) -> _Content:
    """Read every file into its place."""
    content = _Content(files)
    samples = [file for file in files if file.format == "lm-eval-samples"]
    for file in files:
        if file.judgments is not None:
            part = read_judgments(file, model, against)
            content.add(part, f"{len(part.judgments)} judgments")
        elif file.format in ANSWERS:
            part = read_answers(file, model)
            content.add(part, f"{len(part.answers)} answers")
        elif file.format == "lm-eval-results":
            part = read_results(file, samples)
            content.add(part, f"{len(part.facts['tasks'])} results")
        elif file.format in LOGS:
            _add_logs(content, file)
        elif file.format == "adapter-config":
            content.adapter = file.rows[0][1]
            content.becomes[file.sha256] = "compared with --recipe, where one is named"
    if samples and "lm_eval" not in content.evals:
        raise samples_alone(samples)
    for file in samples:
        content.becomes[file.sha256] = f"evals/lm_eval: {len(file.rows)} samples of {file.task}"
    if not content.evals and not content.logs:
        raise files[0].error(
            "holds nothing to make a run of",
            "name judgments, answers, results or a training log beside it",
        )
    _add_summaries(content)
    for parts in content.evals.values():
        if any(part.file.format in ANSWERS for part in parts):
            for part in parts:
                part.lacks = tuple(lack for lack in part.lacks if lack not in WITHOUT_ANSWERS)
    lacks = [
        f"{name}: {lack}"
        for name, parts in content.evals.items()
        for part in parts
        for lack in part.lacks
    ]
    content.lacks += list(dict.fromkeys(lacks))
    return content


def _add_logs(content: _Content, file: Foreign) -> None:
    """Take a training log; there is one per run."""
    if content.logs:
        raise file.error("a second training log", "one run has one: import it under another name")
    content.logs, content.summary, lacks = read_logs(file)
    content.becomes[file.sha256] = f"metrics.jsonl: {len(content.logs)} lines"
    content.lacks += [f"training: {lack}" for lack in lacks]


def _add_summaries(content: _Content) -> None:
    """Check the original study's summary against the judgments it sums up; it is no evaluation of
    its own.

    Raises:
        DataError: it says other numbers, or stands alone.
    """
    for file in (file for file in content.files if file.format == "original-summary"):
        row = file.rows[0][1]
        judged = [
            part
            for part in content.evals.get("alpaca_eval", [])
            if part.file.format == "original-alpaca-eval-csv"
        ]
        if not judged:
            raise file.error(
                "a summary without the judgments it sums up", "name detailed_results.csv beside it"
            )
        recorded = judged[0].facts["report"]["recorded"]
        told = (row["win_rate_vs_baseline"], row["total_comparisons"])
        if abs(recorded["win"] - told[0]) > 0.01 or recorded["n"] != told[1]:
            what = (
                f"it says {told[0]} % wins of {told[1]}, the judgments {recorded['win']:.3f} % of"
                f" {recorded['n']}"
            )
            raise file.error(what, "are they of the same model?")
        judged[0].models = judged[0].models or tuple(filter(None, [row.get("model_name")]))
        content.becomes[file.sha256] = "agrees with the judgments"


def _recipe(name: str | None, content: _Content) -> Recipe | None:
    """Return the recipe that was named, once the adapter's config agrees with it.

    Raises:
        RecipeError: they differ.
    """
    if name is None:
        return None

    recipe = load_recipe(recipe_path(name))
    adapter, lora = content.adapter, recipe.lora or {}
    if adapter is not None and recipe.lora is None:
        raise recipe.error(
            "lora",
            "lora is null, and there is an adapter's config among the files",
            "name its own recipe",
        )
    if adapter is not None:
        pairs = [
            (key, adapter.get(key), lora.get(key))
            for key in ("r", "lora_alpha", "lora_dropout", "target_modules")
        ]
        for key, theirs, ours in (
            row for row in pairs if row[1] is not None and row[2] is not None
        ):
            if (sorted(theirs) if isinstance(theirs, list) else theirs) != (
                sorted(ours) if isinstance(ours, list) else ours
            ):
                raise recipe.error(
                    f"lora.{key}",
                    f"lora.{key} is {ours}, and the adapter was trained with {theirs}",
                    "name its own recipe",
                )
    return recipe


def _provenance(file: Foreign, content: _Content) -> Row:
    """What run.json records about a file: its name alone, because its folder says nothing
    elsewhere.
    """
    facts = {
        "file": file.path.name,
        "sha256": file.sha256,
        "bytes": file.size,
        "format": file.format,
        "rows": file.count,
    }
    rows_of = content.rows_of.get(file.sha256)
    return {
        **facts,
        **({"rows_of": rows_of} if rows_of else {}),
        "becomes": content.becomes.get(file.sha256, ""),
    }


def _twins(run: str, files: list[Row]) -> Iterator[str]:
    """A warning for every file that another run was imported from."""
    mine = {same_rows(file): str(file["file"]) for file in files}
    for other in all_runs():
        if other.name == run:
            continue
        try:
            state = other.read_state()
        except RecipesError:
            continue
        for source in imported_files(state):
            if same_rows(source) in mine and source.get("format") != "adapter-config":
                yield (
                    f"{mine[same_rows(source)]} is in run '{other.name}' too: the two cannot be"
                    " ranked as different"
                )


def same_rows(source: Row) -> tuple[str, str]:
    """Return what two sources share that are the same rows of the same file: its hash, and the
    model they are of.
    """
    return str(source.get("sha256")), str(source.get("rows_of") or "")


def imported_files(state: Any) -> list[Row]:
    """Return the files that an imported run came from, as its run.json has them."""
    sources = state.get("sources") or (
        [state["source"]] if isinstance(state.get("source"), dict) else []
    )
    return [source for source in sources if isinstance(source, dict)]


def _same_import(target: RunDirectory, files: list[Foreign], asked: dict[str, str | None]) -> bool:
    """Whether a run was imported from exactly these files, asked for in the same words, with the
    recipe as it is now.
    """
    state = target.read_state()
    if state["state"] != "imported" or any(state.get(key) != value for key, value in asked.items()):
        return False
    if {source.get("sha256") for source in imported_files(state)} != {
        file.sha256 for file in files
    }:
        return False
    if asked["recipe"] is None:
        return True

    return read_resolved(target.path) == load_recipe(recipe_path(asked["recipe"])).to_dict()


def _runs(pid: str) -> bool:
    """Whether a process of this machine runs; one that may not be asked does."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _write(
    target: RunDirectory,
    content: _Content,
    recipe: Recipe | None,
    asked: dict[str, str | None],
    done: Imported,
) -> None:
    """Write the run beside its place and rename it, so that a run is there whole or not at all."""
    root = runs_root()
    scratch = root / f".import-{os.getpid()}"
    try:
        for left in root.glob(".import-*"):  # of imports that were killed
            if left == scratch or not _runs(left.name.partition("-")[2]):
                shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir(parents=True)
        run = RunDirectory(target.name, scratch)
        for name, parts in content.evals.items():
            write_evaluation(run.path / "evals" / name, name, target.name, parts)
        if content.logs:
            write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in content.logs))
        if recipe is not None:
            import yaml

            write_text(run.path / "recipe.yaml", recipe.path.read_text(encoding="utf-8-sig"))
            write_text(
                run.path / "resolved.yaml",
                yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True),
            )

        write_text(run.path / "command.txt", command_line() + "\n")
        facts = {
            "sources": done.files,
            "lacks": done.lacks,
            **asked,
            "summary": content.summary or None,
        }
        run.write_state(
            "imported",
            kind="imported",
            exit_code=0,
            **{key: value for key, value in facts.items() if value is not None},
        )
        publish(run.path, target.path)
    except OSError as fault:
        raise EnvironmentFault(
            f"the run cannot be written: {fault.strerror or fault}", file=shown_path(root)
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
