"""`recipes ls` and `recipes status`: what recipes and what runs there are. They only read files."""

from __future__ import annotations

from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, NamedTuple

from recipes_lib.commands import Json
from recipes_lib.config.documents import read
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import Row, rows_from_the_end
from recipes_lib.core.lock import LOCK_NOTE, describe_holder, is_held
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_START = "start-here"
_NEWEST = 1000  # lines of metrics.jsonl to look for the newest value of each metric in
_VALUES = {
    "step": "step",
    "loss": "loss",
    "eval_loss": "validation",
    "tokens_per_second": "tokens/s",
}


class ListedRecipe(NamedTuple):
    """What is listed of a recipe."""

    name: str
    model: str
    method: str = "-"
    launch: str = "-"
    tags: tuple[str, ...] = ()


def run_ls(*, json: Json = False) -> int:
    """Print one line per recipe under its model; nothing is checked or planned."""
    folders = {folder.resolve(): folder for folder in (project_root() / "recipes", Path("recipes"))}
    entries = [
        entry
        for folder in folders.values()
        for file in sorted(folder.rglob("[!_]*.yaml"))
        if (entry := _entry(file, folder)) is not None
    ]
    starts = {entry.model for entry in entries if _START in entry.tags}
    entries.sort(key=lambda e: (e.model not in starts, e.model, _START not in e.tags, e.name))
    if json:
        return print_json([entry._asdict() for entry in entries])
    rows = [[name, method, launch, ", ".join(tags)] for name, _, method, launch, tags in entries]
    head, *lines = aligned([("recipe", "method", "launch", "tags"), *rows])
    say(f"  {head}")
    for model, group in groupby(zip(entries, lines, strict=True), key=lambda pair: pair[0].model):
        say("\n".join([model, *(f"  {line}" for _, line in group)]))
    return next_step("recipes", "new", "my-first", "--from", entries[0].name)


def _entry(file: Path, folder: Path) -> ListedRecipe | None:
    """Return what is listed of a file; None for a file of another kind."""
    name = file.relative_to(folder).with_suffix("").as_posix()
    try:
        document = read(file)
        if document.kind != "recipe":
            return None
    except RecipesError:
        return ListedRecipe(name, f"cannot be read: recipes check {shown_path(file)}")
    values = document.values
    sections = {key: value if isinstance(value, dict) else {} for key, value in values.items()}
    method, lora, tags = "full", sections.get("lora"), sections.get("run", {}).get("tags")
    if lora:
        kind = "DoRA" if lora.get("use_dora") else "LoRA"
        method = f"{'Q' if sections.get('quantization') else ''}{kind} r={lora.get('r', 8)}"
    model = str(sections.get("model", {}).get("name_or_path", "?"))
    launch = str(sections.get("launch", {}).get("accelerate", "single_gpu"))
    shown = tuple(map(str, tags)) if isinstance(tags, list) else ()
    return ListedRecipe(name, model, method, launch, shown)


def run_status(
    run: Annotated[str | None, "a run's name; default: all runs"] = None,
    *,
    json: Annotated[bool, "print one JSON object (a list without RUN)"] = False,
) -> int:
    """Print the table of all runs, or one run."""
    if run:
        return _show_run(open_run(run), json)
    rows = [_run_line(known) for known in all_runs()]
    if json:
        return print_json(rows)
    if not rows:
        say(f"no runs in {runs_root()}")
        return next_step("recipes train quickstart/lora-r8")
    titles = ("run", "state", "step", "loss", "validation", "tokens/s", "updated (UTC)")
    say("\n".join(aligned([titles, *([_cell(value) for value in row.values()] for row in rows)])))
    return next_step("recipes", "status", max(rows, key=lambda row: row["updated"])["run"])


def _run_line(run: RunDirectory) -> Row:
    """The line of one run; a run.json that cannot be read costs only its own line."""
    try:
        state, newest = _facts(run), _newest_values(run)
    except RecipesError:
        state, newest = {"state": "unreadable"}, {}
    updated = str(state.get("updated") or "").removesuffix("+00:00")
    values = {key: newest.get(key) for key in _VALUES}
    return {"run": run.name, "state": state["state"], **values, "updated": updated}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _facts(run: RunDirectory) -> Row:
    """Return run.json; a run that says `running` while no process holds its lock has died."""
    facts: Row = {**run.read_state()}
    if facts["state"] == "running" and not is_held(run.path):
        facts["state"] = "died"
    return facts


def _newest_values(run: RunDirectory) -> Row:
    """Return the newest value of each metric."""
    newest: Row = {}
    for row in islice(rows_from_the_end(run.metrics), _NEWEST):
        newest = {**row, **newest}
    return newest


def _show_run(run: RunDirectory, as_json: bool) -> int:
    facts = {**_facts(run), "last": _newest_values(run)}
    if as_json:
        return print_json(facts)
    state = facts["state"]
    say(f"{run.name}: {state}{describe_holder(run.path / LOCK_NOTE) if state == 'running' else ''}")
    for key in ("exit_code", "error", "launch", "attempts"):
        if facts.get(key) is not None:
            say(f"  {key}: {facts[key]}")
    for key, value in (facts.get("summary") or facts["last"]).items():
        say(f"  {key}: {value if value is not None else 'not measured'}")
    if state == "running":
        say("to save a checkpoint and stop:")
        return next_step("touch", run.stop_file)
    return next_step(f"recipes chat {run.name}" if state == "finished" else run.train_command())
