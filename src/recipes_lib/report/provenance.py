"""How to get these numbers again, and where they come from: commands and the footer. Only what the
runs recorded.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from recipes_lib.compare.measurements import Measurements, RunMeasurements
from recipes_lib.core.project import project_root, runs_root

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.published import Published

_PYTHON = re.compile(r"(?<!\S)\S*python[\d.]* -m (recipes_lib\.\w+)")
_PATH = re.compile(
    r"(?<![\w./:~-])(?:/|(?:\.\./)+)(?:[^\s/'\",;)]+/)+([^\s/'\",;)]+)"
)  # absolute, or above the project


def commands(
    name: str, measurements: Measurements, study: Study | None
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the commands that make this report again, whole and step by step."""
    runs = [run for arm in measurements.arms.values() for run in arm.runs]
    if study is None:
        return [("This table", (f"recipes compare {shlex.join(run.name for run in runs)}",))]
    words = shlex.join(study.words)
    found: list[tuple[str, tuple[str, ...]]] = [
        (
            "Everything",
            (f"recipes study run {_study_file(study)}" + (f" {words}" if words else ""),),
        )
    ]
    training = [line for run in runs if (line := _training_command(run))]
    if training:
        found.append(("Trainings, as they were started", tuple(training)))
    evaluating = dict.fromkeys(
        portable_command(str(result.result["command"]))
        for run in runs
        for result in run.evals
        if result.result.get("command")
    )
    plain = dict.fromkeys(
        portable_command(str(result.result["lm_eval_command"]))
        for run in runs
        for result in run.evals
        if result.result.get("lm_eval_command")
    )
    if evaluating:
        found.append(("Evaluations, as they were started", tuple(evaluating)))
    if plain:
        found.append(("lm-eval alone, the same numbers", tuple(plain)))
    return found


def _study_file(study: Study) -> str:
    path = study.path.resolve()
    return shlex.quote(
        str(path.relative_to(project_root())) if path.is_relative_to(project_root()) else path.name
    )


def _training_command(run: RunMeasurements) -> str:
    path = run.folder / "command.txt"
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return portable_command(text.splitlines()[-1]) if text else ""


def portable_command(command: str) -> str:
    """Return a command without the paths of the machine it ran on: relative to the project or as
    `runs/...`, else the last name alone.

    Example:
        >>> portable_command("/opt/venv/bin/python -m recipes_lib.cli eval /somewhere/else/my.yaml r8")
        'recipes eval .../my.yaml r8'
    """  # noqa: E501
    text = _PYTHON.sub(
        lambda found: "recipes" if found[1].endswith("cli") else f"python -m {found[1]}", command
    )
    for folder, name in ((runs_root(), "runs/"), (project_root(), "")):
        text = re.sub(rf"(?<![\w./~-]){re.escape(str(folder.resolve()))}/", name, text)
    return _PATH.sub(r".../\1", text)


def provenance(
    measurements: Measurements, study: Study | None, published: Published | None
) -> list[tuple[str, str]]:
    """Return the footer's lines: code, versions, devices, data, prompt formats, judges."""
    lines: dict[str, dict[str, None]] = {}

    def add(name: str, value: object) -> None:
        if value not in (None, "", {}):
            lines.setdefault(name, {})[str(value)] = None

    for arm, measured in measurements.arms.items():
        for run in measured.runs:
            git = run.environment.get("git") or {}
            if git.get("commit"):
                add(
                    "code at training",
                    f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}",
                )
            libraries = run.environment.get("libraries") or {}
            add(
                "libraries",
                ", ".join(f"{name} {version}" for name, version in libraries.items() if version),
            )
            add("devices", ", ".join(dict.fromkeys(run.environment.get("devices") or [])))
            add("python", run.environment.get("python"))
            guard = run.state.get("guard") or {}
            if guard.get("data_fingerprint"):
                add("data, sha256", str(guard["data_fingerprint"])[:16])
            add("runs", f"{arm}: {run.name} ({run.state.get('state', 'no run.json')})")
            for result in run.evals:
                _evaluation(result.result, add)
    if study is not None:
        add("study", study.path.name)
        add(
            "declared factors",
            "; ".join(f"{name}: {', '.join(keys)}" for name, keys in study.factors.items()),
        )
    if published is not None:
        add("published numbers", f"{published.publication}, {published.source}")
    return [(name, "; ".join(values)) for name, values in lines.items()]


def _evaluation(result: object, add: object) -> None:
    """The lines of one evaluation."""
    assert isinstance(result, dict) and callable(add)
    git = result.get("git") or {}
    if git.get("commit"):
        add(
            "code at evaluation",
            f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}",
        )
    judge = result.get("judge")
    if judge:
        add(
            "judges",
            f"{judge.get('name')} ({portable_command(str(judge.get('model')))},"
            f" {judge.get('mode')}, {str(judge.get('fingerprint'))[:12]})",
        )
    answers = result.get("answers") or {}
    if answers.get("prompt_format_hash"):
        add(
            "prompt formats", f"{answers.get('prompt_format')} {answers['prompt_format_hash'][:12]}"
        )
    if result.get("source"):
        add("imported from", result["source"])
