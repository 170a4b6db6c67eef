"""What `recipes study plan`, `status` and `diff` print: steps with their state, reason and cost
(counted, or measured last time); arms side by side. Reads files only.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice

from recipes_lib.compare.design import TUNE, TUNED, Study
from recipes_lib.compare.wording import count, question_text
from recipes_lib.config.yaml_text import value_text
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import rows_from_the_end
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.run_lock import describe_holder, is_held
from recipes_lib.core.terminal import aligned, first_of
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.study.arms import launch_words, study_folder, train_words
from recipes_lib.study.foresight import Foresight, foresee
from recipes_lib.study.graph import TRAININGS, DoneRecord, Freshness, Graph, Step
from recipes_lib.study.ledger_file import read_ledger
from recipes_lib.suites.questions import local_questions

STATES = ("fresh", "running", "stale", "missing", "waiting", "failed")
_REASON_WIDTH = 72


@dataclass(frozen=True)
class StepRow:
    """One step as the tables show it; `seconds` is what it took last time."""

    step: Step
    state: str
    detail: str
    seconds: float | None

    def to_dict(self) -> dict[str, object]:
        """Return the row for --json."""
        facts = {"state": self.state, "detail": self.detail, "seconds": self.seconds}
        return {"step": self.step.name, **facts}


def step_rows(study: Study, graph: Graph) -> list[StepRow]:
    """Return every step with its state: fresh, stale, missing, waiting, failed, running."""
    known = graph.survey()
    training = {
        step.run
        for step in graph.of_kind(*TRAININGS)
        if not known[step.name].fresh and is_held(RunDirectory(step.run).path)
    }
    evaluating = not training and is_held(study_folder(study))
    rows = []
    for step in graph:
        record = graph.record(step.name)
        if step.kind in TRAININGS and step.run in training:
            state, detail = "running", _reached(step.run)
            detail += describe_holder(RunDirectory(step.run).path / "lock.json")
        else:
            state, detail = _state(step, known, record, evaluating)
        rows.append(StepRow(step, state, detail, record.seconds if record else None))
    return rows


def _state(
    step: Step, known: Mapping[str, Freshness], record: DoneRecord | None, evaluating: bool
) -> tuple[str, str]:
    """Return the state of a step that is not being trained, and the reason."""
    state = known[step.name]
    if state.fresh:
        return "fresh", f"done {record.finished.removesuffix('+00:00')}" if record else ""
    if state.failure:
        return "failed", state.failure.error.splitlines()[0]
    if state.state == "stale":
        return "stale", state.why
    waits = [name for name in step.upstream if not known[name].fresh]
    if failed := [name for name in waits if known[name].failure]:
        return "waiting", f"{failed[0]} failed"
    if waits:
        return "waiting", f"after {first_of(waits, 1)}"
    if step.kind not in TRAININGS:
        return "running" if evaluating else "missing", ""
    run = RunDirectory(step.run)
    if run.exists() and run.metrics.is_file():
        return "missing", f"stopped ({_reached(step.run)}): the same command continues it"
    return "missing", ""


def _reached(run_name: str) -> str:
    """The last step and loss that a training wrote."""
    step, loss = "starting", ""
    with suppress(OSError):
        # the last line may be a validation
        lines = [row for _, row in islice(rows_from_the_end(RunDirectory(run_name).metrics), 2)]
        step = f"step {lines[0]['step']}" if lines else step
        losses = [row["loss"] for row in lines if isinstance(row.get("loss"), float)]
        loss = f", loss {losses[0]:.3f}" if losses else ""
    return f"{step}{loss}"


def standstill(study: Study, graph: Graph) -> str | None:
    """Return why nothing more will be done by itself; None while something can be, or where all is
    done: steps that are not done failed or need one that did, and no process works on them.
    """
    known = graph.survey()
    todo = [step for step in graph if not known[step.name].fresh]
    failed = [step for step in todo if known[step.name].failure]
    stuck = {step.name for step in failed}
    for step in todo:
        if stuck.intersection(step.upstream):
            stuck.add(step.name)
    busy = [study_folder(study), *(graph.folder / step.name for step in failed)]
    busy += [RunDirectory(step.run).path for step in failed if step.kind in TRAININGS]
    if not failed or len(stuck) < len(todo) or any(map(is_held, busy)):
        return None
    names = first_of([step.name for step in failed])
    waiting = len(todo) - len(failed)
    need = f", what else is to do ({waiting}) needs that" if waiting else ""
    return f"{names} failed{need}, and no process works on it"


def status_lines(rows: Sequence[StepRow], width: int) -> list[str]:
    """Return the status table, each line cut to the terminal's width."""
    cells = [(row.step.name, row.state, seconds_text(row.seconds), row.detail) for row in rows]
    return [_cut(line, width) for line in aligned([("step", "state", "took", ""), *cells])]


def summary_line(rows: Sequence[StepRow], looks: int | None) -> str:
    """Return how many steps are in which state, and how often results were looked at."""
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    if looks is None:
        return f"{states}; the ledger was changed, so how often results were looked at is not known"
    return f"{states}; {count(looks, 'look')} at results" if looks else states


def number_of_looks(study: Study) -> int | None:
    """Return how many looks at a study's results its ledger holds; 0 where there is none, None
    where it was changed.
    """
    ledger = read_ledger(study_folder(study))
    return None if ledger.damage else ledger.looks


def seconds_text(seconds: float | None) -> str:
    """Return a duration as people say it.

    Example:
        >>> seconds_text(75), seconds_text(5400.0), seconds_text(None)
        ('1 min 15 s', '1 h 30 min', '-')
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def diff_rows(study: Study) -> Iterator[tuple[str, list[str], str]]:
    """Yield (key, value per arm, declared factor or empty) where the arms' resolved
    values differ.
    """
    arms = [arm.name for arm in study.arms if arm.recipe is not None]
    for key, values in study.differing().items():
        shown = ["-" if values[name] is None else value_text(values[name]) for name in arms]
        grids = [study.arm(name).resolved().get(f"{TUNE}{key}") for name in arms]
        alike = grids[0] is not None and all(grid == grids[0] for grid in grids)
        yield key, shown, study.factor_of(key) or (TUNED if alike else "")


def tuning_lines(study: Study) -> Iterator[str]:
    """Yield for each tuned arm its grid, and the value that was chosen."""
    for arm in study.arms:
        if tuning := arm.tuning:
            seed = tuning.candidates[0].seeds[0]
            chosen = "not yet chosen" if tuning.chosen is None else f"chosen: {tuning.chosen}"
            trainings = f"{len(tuning.values)} trainings with seed {seed}"
            yield f"{arm.name}: {tuning.key} is tuned over {tuning.grid}, {trainings}; {chosen}"


# ---- The plan ----


def study_plan_object(
    study: Study, graph: Graph, steps: Sequence[Step], estimates: Mapping[str, str]
) -> dict[str, object]:
    """Return the plan for --json; `estimates` says per arm what one training takes."""
    rows, power = _planned(study, graph, steps, estimates)
    todo = [row for row, _ in rows if row.state != "fresh"]
    return {
        "study": study.name,
        "question": study.question,
        "steps": [
            {**row.to_dict(), "arm": row.step.arm, "run": row.step.run, "cost": cost}
            for row, cost in rows
        ],
        "power": asdict(power) if power else None,
        "todo": [row.step.name for row in todo],
        "seconds_measured": sum(row.seconds or 0.0 for row in todo),
    }


def study_plan_lines(
    study: Study, graph: Graph, steps: Sequence[Step], estimates: Mapping[str, str]
) -> Iterator[str]:
    """Yield the plan as text: the arms, then every step that would be done with its reason and
    cost.

    Args:
        estimates: per arm, what one training takes.
    """
    rows, power = _planned(study, graph, steps, estimates)
    todo = [(row, cost) for row, cost in rows if row.state != "fresh"]
    arms = f"{len(study.arms)} arms{' and their base' if study.include_base else ''}"
    yield question_text(study.question)
    yield f"{arms}; {len(study.evals)} evals; seeds {', '.join(map(str, study.seeds))}"
    yield from tuning_lines(study)
    if power:
        yield from power.lines()
    yield ""
    if not todo:
        yield f"nothing to do: all {len(steps)} steps are fresh"
        return
    table = [("step", "because", "cost", "took before")]
    for row, cost in todo:
        because = "never done"
        if row.state not in ("waiting", "missing"):
            told = f"{row.state}: " if row.state in ("failed", "running") else ""
            # the whole reason stands in `status` and in --json
            because = _cut(f"{told}{row.detail}", _REASON_WIDTH)
        table.append((row.step.name, because, cost, seconds_text(row.seconds)))
    yield from aligned(table)
    yield ""
    yield f"{len(todo)} of {len(steps)} steps to do"
    for step in (row.step for row, _ in todo if row.step.kind in TRAININGS):
        arm = study.arm(step.arm)
        if arm.tuning and arm.tuning.chosen is None:  # its command is known once it is chosen
            continue
        words = [*train_words(study, arm, step.seed or 0), *launch_words(arm)]
        yield f"$ {shlex.join(['recipes', 'train', *words])}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _planned(
    study: Study, graph: Graph, steps: Sequence[Step], estimates: Mapping[str, str]
) -> tuple[list[tuple[StepRow, str]], Foresight | None]:
    """Return the rows of steps with what each step takes, counted from its inputs, and what the
    study can find.
    """
    turns = {recipe.name: _count_turns(recipe) for recipe in study.evals}
    evals = {recipe.name: (recipe, turns[recipe.name]) for recipe in study.evals}
    found = []
    for row in step_rows(study, graph):
        step, cost = row.step, "seconds"
        if step not in steps:
            continue
        if step.kind in TRAININGS:
            estimate = estimates.get(step.arm)
            cost = _training_cost(study, step) + (f": {estimate}" if estimate else "")
        elif step.eval in evals:
            cost = _eval_cost(step.kind, *evals[step.eval])
        elif step.kind == "check":
            cost = "loads the adapter"
        found.append((row, cost))
    return found, foresee(study, turns)


def _eval_cost(kind: str, recipe: EvalRecipe, turns: int | None) -> str:
    """Return what a step of an eval takes.

    Args:
        turns: how many turns its questions have; None where that is not known here.
    """
    if kind == "lm_eval":
        limit = f", {recipe.suite.limit} items each" if recipe.suite.limit else ""
        return f"{', '.join(recipe.suite.tasks or [])}{limit}"
    if kind == "heldout_loss":
        return "one forward pass over the rows"
    if turns is None:
        unknown = "answers, as many as there are questions (not on this machine yet)"
        return unknown if kind == "answers" else "judgments"
    turns *= recipe.generation.samples
    if kind in ("answers", "checks"):
        return f"{turns:,} answers of at most {recipe.generation.max_new_tokens:,} tokens"
    if kind == "judgments" and recipe.suite.name == "mt_bench":
        return f"{turns:,} judgments"
    absolute = turns if recipe.metrics.absolute and kind == "judgments" else 0
    probes = 12 * recipe.metrics.probe_pairs if kind == "judgments" else 0
    more = f" and at most {probes:,} probes" if probes else ""
    return f"{2 * turns + absolute:,} judgments{more}"


def _count_turns(recipe: EvalRecipe) -> int | None:
    """Return how many turns an eval's questions have, or None where they are not on this
    machine.
    """
    with suppress(RecipesError):  # files that cannot be used are the evaluation's error
        if chosen := local_questions(recipe):
            return sum(len(question.turns) for question in chosen.questions)
    return None


def _training_cost(study: Study, step: Step) -> str:
    """Return the processes of a training and its length."""
    arm = study.arm(step.arm)
    assert arm.recipe is not None
    steps = arm.recipe.train.get("max_steps", -1)
    epochs = arm.recipe.train.get("num_train_epochs", 3)
    length = f"{steps:,} steps" if steps > 0 else f"{epochs:g} epoch{'s' * (epochs != 1)}"
    processes, config = arm.launch.world_size, arm.launch.config.path.stem
    return f"{length} on {processes} process{'es' * (processes > 1)} ({config})"
