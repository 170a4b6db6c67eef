"""Commands that a report prints: they run as they stand, and show no path of another machine."""

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from recipes_lib.analysis.aims import Design, Margin
from recipes_lib.analysis.runs import Arms, run_place
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
    text = _RECIPES.sub("recipes", command)
    text = _MODULE.sub(r"python -m \1", text)
    for folder, name in ((runs_root(), "runs/"), (project_root(), "")):
        text = re.sub(rf"(?<![\w./~-]){re.escape(str(folder.resolve()))}/", name, text)
    return _PATH.sub(rf"{_HIDDEN}\1", text)


def evaluate_again(log: EvalLog, design: Design | None, setting: str = "") -> str:
    """Return how to make a result again: the command that made it, else that of its study.

    Args:
        setting: a `section.key=value` of the eval recipe that shall be another.
    """
    command = portable_command(log.command)
    if command.startswith(_EVAL) and _HIDDEN not in command:
        words = shlex.split(command)
        evals = [word for word in words if word.endswith(_YAML)]
        others = [word for word in evals if eval_name(Path(word)) != log.eval]
        if len(others) < len(evals):  # a command for several evals
            words = [word for word in words if word not in others]
        if setting:
            key = setting.partition("=")[0]
            words = [word for word in words if not word.startswith(f"{key}=")]
            words.append(setting)
        return shlex.join(words)
    if design is not None and design.command:
        if not setting:
            return design.command
        value = setting.replace("=", ": ")
        return f"set {value} in the recipe of {log.eval}, then {design.command}"
    added = f", with {setting}" if setting else ""
    if log.command:
        return f"run the command in {run_place(log.file)} again{added}"
    return f"evaluate it again{added}"


def audit_again(log: EvalLog, design: Design | None) -> str:
    """Return how to audit the judge of a result on labelled pairs."""
    words = shlex.split(portable_command(log.command))
    recipes = [Path(word) for word in words if word.endswith(_YAML)]
    if design is not None:
        recipes += map(Path, design.evals)
    recipes.append(project_root() / "evals" / f"{log.eval.replace('--', '/')}.yaml")
    for recipe in recipes:
        if eval_name(recipe) != log.eval or not recipe.is_file():
            continue
        with suppress(RecipesError):  # changed since
            judge = Path(read(recipe).origin(("judge", "model")).file)
            path = portable_command(shown_path(judge))
            # It is a file of its own, which the recipe extends, on this machine.
            is_alone = judge.is_file() and judge.resolve() != recipe.resolve()
            if is_alone and _HIDDEN not in path:
                words = ["recipes", "judge", "audit", "--judge", path, "--labels", "labels.jsonl"]
                return f"{_LABELS}: {shlex.join(words)}"
    return f"{_LABELS} audit the judge on them with `recipes judge audit`"


def commands(
    arms: Arms, design: Design | None, margins: Mapping[str, Margin]
) -> list[tuple[str, list[str]]]:
    """Return the commands that make this report again, whole and step by step."""
    runs = [run for _, run in arms.runs]
    if design is None:
        names = []
        for run in runs:
            is_named = run.foreign or run.arm
            names.append(run.given or str(run.folder) if is_named else run.name)
        # one folder may hold several runs, and one file one of several in its folder
        words = ["recipes", "compare", *dict.fromkeys(names)]
        if margins:
            words.append("--margin")
        words += [f"{metric}={margin.text}" for metric, margin in margins.items()]
        return [("This table", [portable_command(shlex.join(words))])]
    trainings = []
    for run in runs:
        file = run.folder / "command.txt"
        if file.is_file():
            trainings += file.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
    logs = [log for _, log in arms.logs]
    sources = {
        "Everything": [design.command],
        "Trainings": trainings,
        "Evaluations": [log.command for log in logs],
        "lm-eval alone": [log.lm_eval_command or "" for log in logs],
    }
    sections = []
    for title, recorded in sources.items():
        lines = dict.fromkeys(portable_command(command) for command in recorded if command)
        if lines:
            sections.append((title, list(lines)))
    return sections
