"""`recipes status [RUN]`: every run with its state, or one run in detail. Reads files only."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import rows_from_the_end
from recipes_lib.core.lock import LOCK_NOTE, describe_holder, is_held
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_NEWEST = 1000  # lines of metrics.jsonl to look for the newest value of each metric in
_METRICS = ("step", "loss", "eval_loss", "tokens_per_second")
_TITLES = ("run", "state", "step", "loss", "validation", "tokens/s", "updated (UTC)")


def run(
    run: Annotated[str | None, "a run's name; default: all runs"] = None,
    *,
    json: Annotated[bool, "print one JSON object (a list without RUN)"] = False,
) -> int:
    """Print the table, or one run."""
    if run:
        return _show(open_run(run), json)
    rows = [_row(known) for known in all_runs()]
    if json:
        return print_json(rows)
    if not rows:
        say(f"no runs in {runs_root()}")
        return next_step("recipes train quickstart/lora-r8")
    cells = [[_cell(value) for value in row.values()] for row in rows]
    say("\n".join(aligned([_TITLES, *cells])))
    return next_step("recipes", "status", max(rows, key=lambda row: str(row["updated"]))["run"])


def _row(run: RunDirectory) -> dict[str, Any]:
    """The line of one run; a run.json that cannot be read costs only its own line."""
    try:
        state, newest = _state(run), _newest_values(run)
        updated = str(run.read_state().get("updated") or "").removesuffix("+00:00")
    except RecipesError:
        state, newest, updated = "unreadable", {}, ""
    metrics = {key: newest.get(key) for key in _METRICS}
    return {"run": run.name, "state": state, **metrics, "updated": updated}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _state(run: RunDirectory) -> str:
    """Return the state, or `died` for a run that says `running` while no process holds its lock."""
    state = run.read_state()["state"]
    return "died" if state == "running" and not is_held(run.path) else state


def _newest_values(run: RunDirectory) -> dict[str, Any]:
    """Return the newest value of each metric."""
    newest: dict[str, Any] = {}
    for row in islice(rows_from_the_end(run.metrics), _NEWEST):
        newest = {**row, **newest}
    return newest


def _show(run: RunDirectory, as_json: bool) -> int:
    recorded, state, newest = run.read_state(), _state(run), _newest_values(run)
    if as_json:
        return print_json({**recorded, "last": newest, "state": state})
    say(f"{run.name}: {state}{describe_holder(run.path / LOCK_NOTE)}")
    known = {key: recorded.get(key) for key in ("exit_code", "error", "launch", "attempts")}
    for key, value in known.items():
        if value is not None:
            say(f"  {key}: {value}")
    for key, value in (recorded.get("summary") or newest).items():
        say(f"  {key}: {value if value is not None else 'not measured'}")
    if state == "running":
        say("to save a checkpoint and stop:")
        return next_step("touch", run.stop_file)
    return next_step(f"recipes chat {run.name}" if state == "finished" else run.train_command())
