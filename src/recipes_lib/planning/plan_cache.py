"""What `recipes ls` planned before, so that it is planned once: a list must be there at once, and a
plan counts rows and tokens.

A plan is remembered under a hash of all it was made from: the resolved recipe, its local rows, an
earlier run's audit, the models that are here, this machine's cores, and the planning code. This
module imports none of that code.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import Document
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import read_object
from recipes_lib.core.project import cache_root, runs_root

UNKNOWN = ("-", "-")


def quick_plans(documents: list[Document]) -> list[tuple[str, str]]:
    """Return memory per process and time of each recipe, `UNKNOWN` where only `recipes plan` can
    say; what is new is written down once.
    """
    file = cache_root() / "glances.json"
    before: dict[str, Any] = {}
    with suppress(RecipesError):
        before = read_object(file)
    keys = [_made_from(document) for document in documents]
    known = {
        key: before[key]
        for key in keys
        if isinstance(before.get(key), list) and len(before[key]) == 2
    }
    for key, document in zip(keys, documents, strict=True):
        if key not in known:
            known[key] = list(_planned(document))
    if known.keys() - before.keys():
        with suppress(OSError):  # a list that cannot be remembered is made again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
    return [(known[key][0], known[key][1]) for key in keys]


def _planned(document: Document) -> tuple[str, str]:
    from recipes_lib.planning.quick_plan import quick_plan
    from recipes_lib.planning.text import clock

    seen = quick_plan(document)
    return UNKNOWN if seen is None else (f"{seen[0]:.1f} GiB", clock(seen[1]))


def _made_from(document: Document) -> str:
    """Return a hash of everything that a plan of this recipe is made from."""
    data = document.values.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    names = [
        part.get("source") if isinstance(part, dict) else part
        for part in (source if isinstance(source, list) else [source])
    ]
    folders = (Path(document.origin(("data", "source")).file).parent, document.path.parent, Path())
    rows = [_stamp(folder / name) for name in names if isinstance(name, str) for folder in folders]
    run = document.values.get("run")
    named = run.get("name") if isinstance(run, dict) else None
    earlier = f"{named or f'{document.path.parent.name}--{document.path.stem}'}/supervision.json"
    code = [
        _stamp(file)
        for package in ("planning", "recipe")
        for file in sorted((Path(__file__).parents[1] / package).glob("*.py"))
    ]
    models = sorted(path.name for path in (cache_root() / "models").glob("*"))
    machine = [
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        os.environ.get("OMP_NUM_THREADS"),
    ]
    parts = [
        document.values,
        str(document.path.resolve()),
        rows,
        _stamp(runs_root() / earlier),
        models,
        machine,
        code,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:20]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
