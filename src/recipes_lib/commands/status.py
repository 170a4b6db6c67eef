"""`recipes status [RUN]`: every run with its state, or one run in detail. Reads files only."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import rows_from_the_end
from recipes_lib.core.lock import LOCK_NOTE, describe_holder, is_held
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run
from recipes_lib.core.terminal import aligned, next_step, print_json, say

NEWEST = 1000  # lines of metrics.jsonl to look for the newest value of each metric in
STATUS_KEYS = ("run", "state", "step", "loss", "validation", "tokens_per_second", "updated")
STATUS_TITLES = ("run", "state", "step", "loss", "validation", "tokens/s", "updated (UTC)")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="a run's name; default: all runs")
    add("--json", action="store_true", help="print one JSON object (a list without RUN)")


def run(args: argparse.Namespace) -> int:
    """Print the table, or one run."""
    if args.run:
        return _show(open_run(args.run), args.json)
    rows = [_row(run) for run in all_runs()]
    if args.json:
        return print_json([dict(zip(STATUS_KEYS, row, strict=True)) for row in rows])
    if not rows:
        say(f"no runs in {runs_root()}")
        next_step("recipes train quickstart/lora-r8")
        return ExitCode.DONE
    for line in aligned([STATUS_TITLES, *rows]):
        say(line)
    next_step(f"recipes status {max(rows, key=lambda row: row[-1])[0]}")
    return ExitCode.DONE


def _row(run: RunDirectory) -> tuple[str, ...]:
    """The line of one run; a run.json that cannot be read costs only its own line."""
    try:
        recorded, last = run.read_state(), _last_values(run)
        state = _true_state(run, recorded["state"])
    except RecipesError:
        return (run.name, "unreadable", *("-" * 4), "")
    return (
        run.name,
        state,
        str(last.get("step", "-")),
        _rounded(last.get("loss")),
        _rounded(last.get("eval_loss")),
        _rounded(last.get("tokens_per_second"), 0),
        recorded.get("updated", "").removesuffix("+00:00"),
    )


def _true_state(run: RunDirectory, state: str) -> str:
    """Return the state, or `died` for a run that says `running` while no process holds its lock."""
    return "died" if state == "running" and not is_held(run.path) else state


def _last_values(run: RunDirectory) -> dict[str, Any]:
    """The newest value of each metric."""
    newest: dict[str, Any] = {}
    for row in islice(rows_from_the_end(run.metrics), NEWEST):
        newest = {**row, **newest}
    return newest


def _rounded(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _show(run: RunDirectory, as_json: bool) -> int:
    recorded, last = run.read_state(), _last_values(run)
    state = _true_state(run, recorded["state"])
    if as_json:
        return print_json({**recorded, "last": last, "state": state})
    say(f"{run.name}: {state}{describe_holder(run.path / LOCK_NOTE)}")
    for key in ("exit_code", "error", "launch", "attempts"):
        if (value := recorded.get(key)) is not None:
            say(f"  {key}: {value}")
    for key, value in (recorded.get("summary") or last).items():
        say(f"  {key}: {value if value is not None else 'not measured'}")
    next_steps = {
        "finished": f"recipes chat {run.name}",
        "running": f"touch {run.stop_file}   (checkpoint and stop)",
    }
    next_step(next_steps.get(state, f"the command in {run.path / 'command.txt'} resumes it"))
    return ExitCode.DONE
