"""Reads a log of Inspect AI: an .eval file, or a .json file of the same content.

Their JSON is read, not `inspect_ai.log.read_eval_log`: that import alone takes two CPU seconds
(0.3.285), and results are often compared where Inspect is not installed.
"""

import importlib
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_lib.analysis.readers.files import foreign_run, parsed_json
from recipes_lib.analysis.readers.inspect_scores import metrics_of, not_read
from recipes_lib.analysis.runs import Run
from recipes_lib.core.errors import DataError
from recipes_lib.core.terminal import count

FORM = "Inspect AI: an .eval or .json log"
SOURCE = "inspect"
_ZSTANDARD = 93  # a zip's method of compression, which Python knows from 3.14 on
_JSON_LOG = re.compile(rb'\s*\{\s*"version":\s*\d+,\s*"status":')
_ASKING = re.compile(r"epochs|epochs_reducer|sample_shuffle|\w+_limit(_type)?")
# Settings of a model that ask for no other answers; a seed is chance.
_TRANSPORT = re.compile(r"max_retries|\w*timeout|\w+_connections|cache\w*|batch|seed|\w*logprobs")
_WEIGHTS = ("model_path", "tokenizer_path")  # what is compared, so no difference of asking


def matches(path: Path) -> bool:
    """Whether a file is a log."""
    if path.suffix not in (".eval", ".json") or not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix == ".eval" or bool(_JSON_LOG.match(stream.read(200)))


def read(path: Path) -> list[Run]:
    """Return the run of a log; a DataError for one that is damaged or has no samples."""
    return [_run(path, content_of(path))]


def content_of(file: Path) -> dict[str, Any]:
    """Return a log as its .json form has it."""
    if file.suffix == ".json":
        return dict(parsed_json(file))
    with zipfile.ZipFile(file) as archive:
        methods = {info.compress_type for info in archive.infolist()}
        if sys.version_info < (3, 14) and _ZSTANDARD in methods:
            importlib.import_module("zipfile_zstd")  # teaches it to zipfile, as in Inspect itself
        names = dict.fromkeys(archive.namelist())
        # a log that was not finished has no header
        header = "header.json" if "header.json" in names else "_journal/start.json"
        content = dict(json.loads(archive.read(header)))
        samples = [name for name in names if name.startswith("samples/")]
        content["samples"] = [json.loads(archive.read(name)) for name in samples]
    return content


def _run(file: Path, content: Mapping[str, Any]) -> Run:
    spec = content["eval"]
    config = spec.get("config") or {}
    dataset = spec.get("dataset") or {}
    rows = {(str(row["id"]), row.get("epoch", 1)): row for row in content.get("samples") or ()}
    if not rows:
        raise DataError("holds no samples", "run it again without --no-log-samples", file=file)
    ids = [str(id) for id in dataset.get("sample_ids") or ()]
    epochs = range(1, (config.get("epochs") or 1) + 1)
    asked = [(id, epoch) for id in ids for epoch in epochs]
    missing: dict[tuple[str, int], Any] = {key: {} for key in asked if key not in rows}
    counts = {
        f"are missing, its status is {content.get('status')}": len(missing),
        "ended with an error": sum(bool(row.get("error")) for row in rows.values()),
        "were invalidated": sum(bool(row.get("invalidation")) for row in rows.values()),
        "were ended by a limit": sum(bool(row.get("limit")) for row in rows.values()),
    }
    named = [f"{count(n, 'sample')} {what}" for what, n in counts.items() if n]
    arguments = dict(spec.get("model_args") or {})
    weights = [str(arguments.pop(key)) for key in _WEIGHTS if key in arguments]
    plan = content.get("plan") or {}
    generation = (plan.get("config") or {}) | (spec.get("model_generate_config") or {})
    asking = {
        "dataset": dataset.get("name"),
        "task arguments": spec.get("task_args"),
        "solvers": plan.get("steps"),
        "scorers": spec.get("scorers"),
        "limits": {key: config[key] for key in config if _ASKING.fullmatch(key)},
        "gen_kwargs": {key: generation[key] for key in generation if not _TRANSPORT.fullmatch(key)},
    }
    if "model_graded" in str(spec.get("scorers")):  # by the model itself where no other is named
        asking["grader"] = (spec.get("model_roles") or {}).get("grader") or spec["model"]
    # a text for each: Inspect leaves out what has its default, and that may be the difference
    settings = {name: json.dumps(value, sort_keys=True) for name, value in asking.items()}
    chosen = {"limit": config.get("limit"), "samples": config.get("sample_id")}
    chosen = {name: value for name, value in chosen.items() if value}
    return foreign_run(
        SOURCE,
        file,
        "-".join([spec["model"], *weights]),
        list(metrics_of(content, rows | missing)),
        unread=[f"{file.name}: {line}" for line in [*named, *not_read(content)]],
        subset=f"{len(ids)} of {dataset.get('samples')} samples" if chosen else None,
        recipe=settings | {"suite": chosen},
        libraries={
            **(spec.get("packages") or {}),
            "backend": spec["model"].partition("/")[0],
            "model arguments": json.dumps(arguments, sort_keys=True),
        },
        git=spec.get("revision") or {},
    )
