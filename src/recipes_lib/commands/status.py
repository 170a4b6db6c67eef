"""`recipes status [RUN]`: every run with its state, or one run in detail. Reads files only."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any, TypedDict

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.json_files import rows_from_the_end
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run
from recipes_lib.core.run_lock import describe_holder, is_held
from recipes_lib.core.terminal import aligned, next_step, say, say_json

NEWEST = 10_000  # lines of metrics.jsonl to look for the newest value of each metric in
_COLUMNS = ("run", "state", "step", "loss", "validation", "tokens/s", "updated (UTC)")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="a run's name; default: all runs")
    add("--json", action="store_true", help="print one JSON object (a list without RUN)")


def run(args: argparse.Namespace) -> int:
    """Print the table, or one run."""
    if args.run:
        return _show_one(open_run(args.run), args.json)
    runs = all_runs()
    if args.json:
        return say_json([_row(one) for one in runs])
    if not runs:
        say(f"no runs in {runs_root()}")
        next_step("recipes train recipes/quickstart/lora-r8.yaml")
        return ExitCode.DONE
    rows = [[str(value) for value in _row(one).values()] for one in runs]
    for line in aligned([_COLUMNS, *rows]):
        say(line)
    next_step(f"recipes status {max(rows, key=lambda row: row[-1])[0]}")
    return ExitCode.DONE


def true_state(one: RunDirectory, state: str) -> str:
    """Return the state, or `died` for a run that says `running` while no process holds its lock."""
    return "died" if state == "running" and not is_held(one.path) else state


class _Row(TypedDict):
    """The line of one run; what was not measured is `-`."""

    run: str
    state: str
    step: int | str
    loss: str
    validation: str
    tokens_per_second: str
    updated: str


def _row(one: RunDirectory) -> _Row:
    """The line of one run; a run.json that cannot be read costs only its own line."""
    try:
        found, last = one.read_state(), _last_values(one)
        state, updated = true_state(one, found["state"]), found.get("updated", "")
    except RecipesError:
        state, updated, last = "unreadable", "", {}
    return {
        "run": one.name,
        "state": state,
        "step": last.get("step", "-"),
        "loss": _rounded(last.get("loss")),
        "validation": _rounded(last.get("eval_loss")),
        "tokens_per_second": _rounded(last.get("tokens_per_second"), 0),
        "updated": updated.removesuffix("+00:00"),
    }


def _last_values(one: RunDirectory) -> dict[str, Any]:
    """The newest value of each metric; times of single steps are none."""
    newest: dict[str, Any] = {}
    for _, row in islice(rows_from_the_end(one.metrics), NEWEST):
        newest = {key: value for key, value in row.items() if not isinstance(value, list)} | newest
    return newest


def _rounded(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _show_one(one: RunDirectory, as_json: bool) -> int:
    state, last = one.read_state(), _last_values(one)
    now = true_state(one, state["state"])
    if as_json:
        return say_json({**state, "last": last, "state": now})
    holder = describe_holder(one.path / "lock.json") if now == "running" else ""
    say(f"{one.name}: {now}{holder}")
    for key in ("exit_code", "error", "launch", "attempts"):
        if (recorded := state.get(key)) is not None:
            say(f"  {key}: {recorded}")
    for key, value in (state.get("summary") or last).items():
        say(f"  {key}: {value if value is not None else 'not measured'}")
    steps = {
        "finished": f"recipes chat {one.name}",
        "running": f"touch {one.stop_file}   (checkpoint and stop)",
    }
    next_step(steps.get(now, f"the command in {one.path / 'command.txt'} resumes it"))
    return ExitCode.DONE
