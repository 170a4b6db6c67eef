"""`import_run`: foreign files become one run with state `imported`, written beside the runs and
renamed into place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.atomic_files import publish, write_text
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.json_files import Row
from recipes_lib.core.manifest import command_line
from recipes_lib.core.project import recipe_path, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, RunState, all_runs, read_resolved
from recipes_lib.foreign.evaluations import write_evaluation
from recipes_lib.foreign.files import Foreign, read_files
from recipes_lib.foreign.judgments import WITHOUT_ANSWERS
from recipes_lib.foreign.logs import read_logs
from recipes_lib.foreign.parts import Part, answers_part, harness_part, judged_part

ANSWERS = ("fastchat-answers", "alpaca-eval-outputs")
ADAPTER_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules")


@dataclass
class Imported:
    """What an import made: the run, what became of each file, and what the files do not hold."""

    name: str
    files: list[Row] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    there_already: bool = False


@dataclass
class _Content:
    """Everything read, before anything is written. `becomes` says by hash what a file becomes."""

    evals: dict[str, list[Part]] = field(default_factory=dict)
    logs: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    adapter: Row | None = None
    becomes: dict[str, str] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)


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
    target, other = RunDirectory(run), "choose another name: --as OTHER"
    if run.startswith(("base--", "answers--", "judge--")):
        what = f"'{run}': names that start so are given by recipes eval and recipes judge"
        raise RecipeError(what, other)
    files = read_files(names)
    asked = {"recipe": recipe, "model": model, "against": against}
    if target.exists():
        state = target.read_state()
        imported = state["state"] == "imported"
        if not replace and imported and _same_import(target, state, files, asked):
            return Imported(run, there_already=True)
        if not replace:
            hint = "write it anew with --replace, all its files named"
            hint = hint if imported else "it was trained here"
            raise RecipeError(f"run '{run}' exists ({state['state']})", hint, f"or {other}")
        if not imported:
            what = f"run '{run}' was trained here and is not replaced by an import"
            raise RecipeError(what, other)
    elif target.path.exists():
        what = f"{shown_path(target.path)} is there and is no run"
        raise RecipeError(what, "choose another name, or move it away")
    content = _read(files, model, against)
    loaded = None if recipe is None else load_recipe(recipe_path(recipe))
    if loaded is not None and content.adapter is not None:
        _check_adapter(loaded, content.adapter)
    rows_of = {p.file.sha256: p.rows_of for parts in content.evals.values() for p in parts}
    done = Imported(
        run,
        [
            # its name alone, because its folder says nothing elsewhere
            {"file": file.path.name, "sha256": file.sha256, "bytes": file.size}
            | {"format": file.format, "rows": len(file.rows)}
            | ({"rows_of": rows_of[file.sha256]} if rows_of.get(file.sha256) else {})
            | {"becomes": content.becomes.get(file.sha256, "")}
            for file in files
        ],
        content.lacks,
    )
    done.warnings = list(_twins(run, done.files))
    if loaded is None and content.logs:
        done.lacks.append(
            "what was trained: no recipe was named (--recipe R), so its differences cannot be"
            " listed"
        )
    _write(target, content, loaded, asked, done)
    return done


def _read(files: Sequence[Foreign], model: str | None, against: str | None) -> _Content:
    content = _Content()
    samples = [file for file in files if file.format == "lm-eval-samples"]
    for file in files:
        part: Part | None = None
        becomes = ""
        match file.format:
            case "fastchat-answers" | "alpaca-eval-outputs":
                part = answers_part(file, model)
                becomes = f"{len(part.answers)} answers"
            case "lm-eval-results":
                part = harness_part(file, samples)
                becomes = f"{len(part.tasks)} results"
            case "lm-eval-samples":
                becomes = f"evals/lm_eval: {len(file.rows)} samples of {file.task}"
            case "trainer-state" | "trainer-log":
                if content.logs:
                    hint = "one run has one: import it under another name"
                    raise file.error("a second training log", hint)
                content.logs, content.summary, lacks = read_logs(file)
                becomes = f"metrics.jsonl: {len(content.logs)} lines"
                content.lacks += [f"training: {lack}" for lack in lacks]
            case "adapter-config":
                content.adapter = file.rows[0][1]
                becomes = "compared with --recipe, where one is named"
            case "original-summary":
                pass
            case _:
                part = judged_part(file, model, against)
                becomes = f"{len(part.judgments)} judgments"
        if part is not None:
            content.evals.setdefault(part.eval, []).append(part)
            becomes = f"evals/{part.eval}: {becomes}"
        content.becomes[file.sha256] = becomes
    if samples and "lm_eval" not in content.evals:
        hint = "name results_*.json beside them"
        raise samples[0].error("samples without lm_eval's results JSON", hint)
    if not content.evals and not content.logs:
        hint = "name judgments, answers, results or a training log beside it"
        raise files[0].error("holds nothing to make a run of", hint)
    for file in files:
        if file.format == "original-summary":
            _check_summary(file, content.evals.get("alpaca_eval", []))
            content.becomes[file.sha256] = "agrees with the judgments"
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
    content.lacks += dict.fromkeys(lacks)
    return content


def _check_summary(file: Foreign, parts: Sequence[Part]) -> None:
    """Check the original study's summary against the judgments it sums up; it is no evaluation of
    its own.
    """
    row = file.rows[0][1]
    judged = [part for part in parts if part.file.format == "original-alpaca-eval-csv"]
    if not judged or judged[0].report is None:
        hint = "name detailed_results.csv beside it"
        raise file.error("a summary without the judgments it sums up", hint)
    recorded = judged[0].report["recorded"]
    win, n = row["win_rate_vs_baseline"], row["total_comparisons"]
    if abs(recorded["win"] - win) > 0.01 or recorded["n"] != n:
        ours = f"{recorded['win']:.3f} % of {recorded['n']}"
        what = f"it says {win} % wins of {n}, the judgments {ours}"
        raise file.error(what, "are they of the same model?")
    judged[0].models = judged[0].models or tuple(filter(None, [row.get("model_name")]))


def _check_adapter(recipe: Recipe, adapter: Row) -> None:
    if recipe.lora is None:
        what = "lora is null, and there is an adapter's config among the files"
        raise recipe.error("lora", what, "name its own recipe")
    for key in ADAPTER_KEYS:
        theirs, ours = adapter.get(key), recipe.lora.get(key)
        if theirs is None or ours is None:
            continue
        if (sorted(theirs) if isinstance(theirs, list) else theirs) != (
            sorted(ours) if isinstance(ours, list) else ours
        ):
            what = f"lora.{key} is {ours}, and the adapter was trained with {theirs}"
            raise recipe.error(f"lora.{key}", what, "name its own recipe")


def _twins(run: str, files: Sequence[Row]) -> Iterator[str]:
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
    """Return what two sources of the same rows share: the file's hash, and the rows' model."""
    return str(source.get("sha256")), str(source.get("rows_of") or "")


def imported_files(state: Mapping[str, Any]) -> list[Row]:
    """Return the files that an imported run came from, as its run.json has them."""
    sources = state.get("sources") or [state.get("source")]
    return [source for source in sources if isinstance(source, dict)]


def _same_import(
    target: RunDirectory, state: RunState, files: Sequence[Foreign], asked: Mapping[str, str | None]
) -> bool:
    """Whether a run was imported from exactly these files and words, and the recipe as it is."""
    sources = {source.get("sha256") for source in imported_files(state)}
    if sources != {file.sha256 for file in files} or any(
        state.get(key) != value for key, value in asked.items()
    ):
        return False
    name = asked["recipe"]
    return name is None or read_resolved(target.path) == load_recipe(recipe_path(name)).to_dict()


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
    asked: Mapping[str, str | None],
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
            write_text(run.path / "recipe.yaml", recipe.path.read_text(encoding="utf-8-sig"))
            write_text(run.path / "resolved.yaml", recipe.resolved_yaml())
        write_text(run.path / "command.txt", command_line() + "\n")
        facts: Row = {"sources": done.files, "lacks": done.lacks, **asked}
        facts["summary"] = content.summary or None
        facts = {key: value for key, value in facts.items() if value is not None}
        run.write_state("imported", kind="imported", exit_code=0, **facts)
        publish(run.path, target.path)
    except OSError as fault:
        what = f"the run cannot be written: {fault.strerror or fault}"
        raise EnvironmentFault(what, file=shown_path(root)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
