"""Commands that a report prints: they run as they stand, and show no path of another machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from recipes_lib.analysis.aims import Design, Margin
from recipes_lib.analysis.runs import Arms, Run, run_place
from recipes_lib.config.documents import read
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.recipe import eval_name

# `python -m recipes_lib.cli` of a checkout, `python .../bin/recipes` of an installed package.
_RECIPES = re.compile(r"(?<!\S)\S*python[\d.]* (?:-m recipes_lib\.cli|\S*/recipes)(?!\S)")
_MODULE = re.compile(r"(?<!\S)\S*python[\d.]* -m (recipes_lib\.\w+)")
_PATH = re.compile(r"(?<![\w./:~-])(?:/|(?:\.\./)+)(?:[^\s/'\",;)]+/)+([^\s/'\",;)]+)")
_HIDDEN = ".../"
_EVAL = "recipes eval "
_YAML = (".yaml", ".yml")
# A judge is audited on pairs that people judged; nobody else has such a file.
_LABELS = "put pairs that people judged into labels.jsonl (see docs/evaluation.md), then"


def portable_command(command: str) -> str:
    """Return a command without the paths of the machine it ran on: relative to the project or as
    `runs/...`, else the last name alone.

    Example:
        >>> portable_command("/opt/bin/python -m recipes_lib.cli eval /somewhere/else/my.yaml r8")
        'recipes eval .../my.yaml r8'
        >>> portable_command("/opt/bin/python3.12 /opt/bin/recipes study run mine.yaml")
        'recipes study run mine.yaml'
    """
    shown = _RECIPES.sub("recipes", command)
    shown = _MODULE.sub(r"python -m \1", shown)
    for folder, name in ((runs_root(), "runs/"), (project_root(), "")):
        shown = re.sub(rf"(?<![\w./~-]){re.escape(str(folder.resolve()))}/", name, shown)
    return _PATH.sub(rf"{_HIDDEN}\1", shown)


def evaluate_again(log: EvalLog, design: Design | None, setting: str = "") -> str:
    """Return how to make a result again: the command that made it, else that of its study.

    Args:
        setting: a `section.key=value` of the eval recipe that shall be another.
    """
    command = portable_command(log.command)
    if command.startswith(_EVAL) and _HIDDEN not in command:
        return _with_setting(command, log, setting)
    if design is not None and design.command:
        change = f"set {setting.replace('=', ': ')} in the recipe of {log.eval}, then "
        return f"{change if setting else ''}{design.command}"
    added = f", with {setting}" if setting else ""
    if log.command:
        return f"run the command in {run_place(log.file)} again{added}"
    return f"evaluate it again{added}"


def _with_setting(command: str, log: EvalLog, setting: str) -> str:
    """A `recipes eval` command for one of its evals, with one of its values replaced."""
    words = shlex.split(command)
    evals = [word for word in words if word.endswith(_YAML)]
    others = [word for word in evals if eval_name(Path(word)) != log.eval]
    if len(others) < len(evals):
        words = [word for word in words if word not in others]
    key, is_set, _ = setting.partition("=")
    if is_set:
        words = [word for word in words if not word.startswith(f"{key}=")]
        words.append(setting)
    return shlex.join(words)


def audit_again(log: EvalLog, design: Design | None) -> str:
    """Return how to audit the judge of a result on labelled pairs."""
    file = _judge_file(log, design)
    if file is None:
        return f"{_LABELS} audit the judge on them with `recipes judge audit`"
    command = shlex.join(["recipes", "judge", "audit", "--judge", file, "--labels", "labels.jsonl"])
    return f"{_LABELS}: {command}"


def _judge_file(log: EvalLog, design: Design | None) -> str | None:
    """The judge file that a result's eval recipe extends, where it lies on this machine."""
    command = portable_command(log.command)
    recipes = [Path(word) for word in shlex.split(command) if word.endswith(_YAML)]
    if design is not None:
        recipes += map(Path, design.evals)
    shipped = project_root() / "evals" / f"{log.eval.replace('--', '/')}.yaml"
    for recipe in (*recipes, shipped):
        if eval_name(recipe) != log.eval or not recipe.is_file():
            continue
        with suppress(RecipesError):  # changed since
            judge = Path(read(recipe).origin(("judge", "model")).file)
            shown = portable_command(shown_path(judge))
            is_alone = judge.is_file() and judge.resolve() != recipe.resolve()
            if is_alone and _HIDDEN not in shown:
                return shown
    return None


def _typed(run: Run) -> str:
    """Return what a user types to have a run compared."""
    if run.foreign:
        return str(run.given or run.folder)
    return run.name


def commands(
    arms: Arms, design: Design | None, margins: Mapping[str, Margin]
) -> list[tuple[str, list[str]]]:
    """Return the commands that make this report again, whole and step by step."""
    runs = [run for arm in arms for run in arm.runs]
    if design is None:
        words = ["recipes", "compare"]
        # one folder may hold several runs, and one file one of several in its folder
        words += dict.fromkeys(_typed(run) for run in runs)
        if margins:
            words.append("--margin")
        words += [f"{metric}={margin.text}" for metric, margin in margins.items()]
        return [("This table", [portable_command(shlex.join(words))])]
    trainings = []
    for run in runs:
        typed = run.folder / "command.txt"
        if typed.is_file():
            lines = typed.read_text(encoding="utf-8", errors="replace").splitlines()
            trainings += lines[-1:]
    logs = [log for run in runs for log in run.evals]
    sources = {
        "Everything": [design.command],
        "Trainings": trainings,
        "Evaluations": [log.command for log in logs],
        "lm-eval alone": [log.lm_eval_command or "" for log in logs],
    }
    sections = []
    for title, some in sources.items():
        shown = dict.fromkeys(portable_command(command) for command in some if command)
        if shown:
            sections.append((title, list(shown)))
    return sections
