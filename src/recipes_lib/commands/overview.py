"""`recipes ls`, `status` and `doctor`: the recipes, the runs and the machine."""

from pathlib import Path
from typing import Annotated

from recipes_lib.commands import Json
from recipes_lib.config.documents import Document, read
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import Row, read_rows
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import (
    RunDirectory,
    all_runs,
    describe_holder,
    is_held,
    open_run,
)
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.doctor import FAIL, diagnose

_START = "start-here"


def run_ls(*, json: Json = False) -> int:
    """Print one line per recipe; nothing is checked or planned."""
    # the working directory may be the checkout: each folder once
    folders = {folder.resolve(): folder for folder in (project_root() / "recipes", Path("recipes"))}
    recipes = []
    for folder in folders.values():
        for file in folder.rglob("[!_]*.yaml"):
            row = _recipe_line(file, folder)
            if row is not None:
                recipes.append(row)
    recipes.sort(key=lambda row: (_START not in row["tags"], row["name"]))
    if json:
        return print_json(recipes)
    table = [["name", "method", "launch", "model"]]
    table += [[row["name"], row["method"], row["launch"], row["model"]] for row in recipes]
    say(*aligned(table))
    return next_step("new", "my-first", "--from", recipes[0]["name"])


def _recipe_line(file: Path, folder: Path) -> Row | None:
    """Return what is listed of a file; None for a file of another kind."""
    name = file.relative_to(folder).with_suffix("").as_posix()
    try:
        document = read(file)
    except RecipesError:
        error = f"cannot be read: recipes check {shown_path(file)}"
        return {"name": name, "model": error, "method": "-", "launch": "-", "tags": []}
    if document.kind != "recipe" or document.is_base:
        return None
    tags = _section(document, "run").get("tags")
    lora = _section(document, "lora")
    method = "full"
    if lora:  # LoRA r=8, QDoRA r=16
        adapter = "DoRA" if lora.get("use_dora") else "LoRA"
        if _section(document, "quantization"):
            adapter = f"Q{adapter}"
        method = f"{adapter} r={lora.get('r', 8)}"
    return {
        "name": name,
        "model": str(_section(document, "model").get("name_or_path", "?")),
        "method": method,
        "launch": str(_section(document, "launch").get("accelerate", "single_gpu")),
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
    }


def _section(document: Document, name: str) -> Row:
    """A section of a recipe that was not checked: empty where it is absent or no mapping."""
    values = document.values.get(name)
    return values if isinstance(values, dict) else {}


def run_status(
    run: Annotated[str | None, "a run's name; default: all runs"] = None,
    *,
    json: Annotated[bool, "print one JSON object (a list without RUN)"] = False,
) -> int:
    """Print the table of all runs, or one run."""
    if run:
        return _show_run(open_run(run), json)
    rows: list[Row] = []
    for directory in all_runs():
        try:
            facts = _facts(directory)
        except (RecipesError, OSError):  # it costs only its own line
            facts = {"state": "unreadable", "last": {}}
        row = {"run": directory.name, "state": facts["state"]}
        for key in ("step", "loss", "eval_loss", "tokens_per_second"):
            row[key] = facts["last"].get(key)
        row["updated"] = str(facts.get("updated") or "").removesuffix("+00:00")
        rows.append(row)
    if json:
        return print_json(rows)
    if not rows:
        say(f"no runs in {runs_root()}")
        return next_step("train", "quickstart/lora-r8")
    table = [["run", "state", "step", "loss", "validation", "tokens/s", "updated (UTC)"]]
    table += [list(map(_cell, row.values())) for row in rows]
    say(*aligned(table))
    newest = max(rows, key=lambda row: row["updated"])
    return next_step("status", newest["run"])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value < 10:  # a loss
        return f"{value:,.4f}"
    return f"{value:,.0f}"


def _facts(run: RunDirectory) -> Row:
    """Return run.json, with the newest value of each metric."""
    facts: Row = run.read_state() | {"last": {}}
    for row in read_rows(run.metrics):
        facts["last"] |= row
    if facts["state"] == "running" and not is_held(run.path):  # no process holds its lock
        facts["state"] = "died"
    return facts


def _show_run(run: RunDirectory, as_json: bool) -> int:
    facts = _facts(run)
    state = facts["state"]
    if as_json:
        return print_json(facts)
    holder = describe_holder(run.path) if state == "running" else ""
    say(f"{run.name}: {state}{holder}")
    for key in ("exit_code", "error", "launch", "attempts"):
        if facts.get(key) is not None:
            say(f"  {key}: {facts[key]}")
    for key, value in (facts.get("summary") or facts["last"]).items():
        if value is None:
            value = "not measured"
        say(f"  {key}: {value}")
    if state == "running":
        say("to save a checkpoint and stop:")
        return next_step(run.stop_file, program="touch")
    if state == "finished":
        return next_step("chat", run.name)
    return next_step("train", shown_path(run.path / "resolved.yaml"))


def run_doctor() -> int:
    """Print the findings; exit 5 when something cannot work."""
    failed = False
    for topic, (level, text, remedy) in diagnose():
        line = f"{level:<5} {topic:<13} {text}"
        if remedy:
            line += f" -> {remedy}"
        say(line)
        if level == FAIL:
            failed = True
    if failed:
        return ExitCode.ENVIRONMENT
    return next_step("ls")
