"""`recipes status [RUN]`: every run with its state, or one run in detail. Reads files only."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, NamedTuple

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import Row, rows_from_the_end
from recipes_lib.core.lock import LOCK_NOTE, describe_holder, is_held
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_NEWEST = 1000  # lines of metrics.jsonl to look for the newest value of each metric in
_TITLES = ("run", "state", "step", "loss", "validation", "tokens/s", "updated (UTC)")


class RunLine(NamedTuple):
    """What the table says of a run."""

    run: str
    state: str
    step: object = None
    loss: object = None
    eval_loss: object = None
    tokens_per_second: object = None
    updated: str = ""


def run(
    run: Annotated[str | None, "a run's name; default: all runs"] = None,
    *,
    json: Annotated[bool, "print one JSON object (a list without RUN)"] = False,
) -> int:
    """Print the table, or one run."""
    if run:
        return _show(open_run(run), json)
    rows = [_line(known) for known in all_runs()]
    if json:
        return print_json([row._asdict() for row in rows])
    if not rows:
        say(f"no runs in {runs_root()}")
        return next_step("recipes train quickstart/lora-r8")
    say("\n".join(aligned([_TITLES, *([_cell(value) for value in row] for row in rows)])))
    return next_step("recipes", "status", max(rows, key=lambda row: row.updated).run)


def _line(run: RunDirectory) -> RunLine:
    """The line of one run; a run.json that cannot be read costs only its own line."""
    try:
        updated = str(run.read_state().get("updated") or "").removesuffix("+00:00")
        newest = _newest_values(run)
        loss, validation = newest.get("loss"), newest.get("eval_loss")
        step, speed = newest.get("step"), newest.get("tokens_per_second")
        return RunLine(run.name, _state(run), step, loss, validation, speed, updated)
    except RecipesError:
        return RunLine(run.name, "unreadable")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _state(run: RunDirectory) -> str:
    """Return the state, or `died` for a run that says `running` while no process holds its lock."""
    state = run.read_state()["state"]
    return "died" if state == "running" and not is_held(run.path) else state


def _newest_values(run: RunDirectory) -> Row:
    """Return the newest value of each metric."""
    newest: Row = {}
    for row in islice(rows_from_the_end(run.metrics), _NEWEST):
        newest = {**row, **newest}
    return newest


def _show(run: RunDirectory, as_json: bool) -> int:
    facts: Row = {**run.read_state(), "last": _newest_values(run), "state": (state := _state(run))}
    if as_json:
        return print_json(facts)
    holder = describe_holder(run.path / LOCK_NOTE) if state == "running" else ""
    say(f"{run.name}: {state}{holder}")
    for key in ("exit_code", "error", "launch", "attempts"):
        if facts.get(key) is not None:
            say(f"  {key}: {facts[key]}")
    for key, value in (facts.get("summary") or facts["last"]).items():
        say(f"  {key}: {value if value is not None else 'not measured'}")
    if state == "running":
        say("to save a checkpoint and stop:")
        return next_step("touch", run.stop_file)
    return next_step(f"recipes chat {run.name}" if state == "finished" else run.train_command())
