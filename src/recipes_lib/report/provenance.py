"""How to get these numbers again, and where they come from: commands and the footer. Only what the
runs recorded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from recipes_lib.compare.design import Study
from recipes_lib.compare.measurements import Measurements, RunMeasurements
from recipes_lib.compare.published import Published
from recipes_lib.core.project import project_root, runs_root

_PYTHON = re.compile(r"(?<!\S)\S*python[\d.]* -m (recipes_lib\.\w+)")
_PATH = re.compile(
    r"(?<![\w./:~-])(?:/|(?:\.\./)+)(?:[^\s/'\",;)]+/)+([^\s/'\",;)]+)"
)  # absolute, or above the project


def commands(measurements: Measurements, study: Study | None) -> list[tuple[str, tuple[str, ...]]]:
    """Return the commands that make this report again, whole and step by step."""
    runs = [run for arm in measurements.arms.values() for run in arm.runs]
    if study is None:
        return [("This table", (f"recipes compare {shlex.join(run.name for run in runs)}",))]
    path = study.path.resolve()
    inside = path.is_relative_to(project_root())
    place = str(path.relative_to(project_root())) if inside else path.name

    def recorded(key: str) -> list[str]:
        found = [getattr(log, key) for run in runs for log in run.evals]
        lines = [line for line in found if line]
        return list(dict.fromkeys(map(portable_command, lines)))

    found = {
        "Everything": [f"recipes study run {shlex.join([place, *study.words])}"],
        "Trainings, as they were started": [line for run in runs if (line := _training(run))],
        "Evaluations, as they were started": recorded("command"),
        "lm-eval alone, the same numbers": recorded("lm_eval_command"),
    }
    return [(title, tuple(lines)) for title, lines in found.items() if lines]


def _training(run: RunMeasurements) -> str:
    path = run.folder / "command.txt"
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return portable_command(text.splitlines()[-1]) if text else ""


def portable_command(command: str) -> str:
    """Return a command without the paths of the machine it ran on: relative to the project or as
    `runs/...`, else the last name alone.

    Example:
        >>> portable_command("/opt/bin/python -m recipes_lib.cli eval /somewhere/else/my.yaml r8")
        'recipes eval .../my.yaml r8'
    """
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

    def add_code(name: str, git: Mapping[str, Any] | None) -> None:
        if git and git.get("commit"):
            add(name, f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}")

    for arm, measured in measurements.arms.items():
        for run in measured.runs:
            add_code("code at training", run.environment.get("git"))
            libraries = (run.environment.get("libraries") or {}).items()
            add(
                "libraries",
                ", ".join(f"{name} {version}" for name, version in libraries if version),
            )
            add("devices", ", ".join(dict.fromkeys(run.environment.get("devices") or [])))
            add("python", run.environment.get("python"))
            guard = run.state.get("guard") or {}
            add("data, sha256", str(guard.get("data_fingerprint") or "")[:16])
            add("runs", f"{arm}: {run.name} ({run.state.get('state', 'no run.json')})")
            for log in run.evals:
                add_code("code at evaluation", log.git)
                if judge := log.judge:
                    model = portable_command(str(judge.model))
                    weights = str(judge.fingerprint)[:12]
                    add("judges", f"{judge.name} ({model}, {judge.mode}, {weights})")
                if prompt := log.answers.prompt_format_hash:
                    add("prompt formats", f"{log.answers.prompt_format} {prompt[:12]}")
    if study is not None:
        add("study", study.path.name)
        factors = [f"{name}: {', '.join(keys)}" for name, keys in study.factors.items()]
        add("declared factors", "; ".join(factors))
    if published is not None:
        add("published numbers", f"{published.publication}, {published.source}")
    return [(name, "; ".join(values)) for name, values in lines.items()]
