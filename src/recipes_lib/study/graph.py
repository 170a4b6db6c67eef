"""Steps that are done once: each has declared inputs, and is fresh as long as they, its upstream
results and its files are what they were.

Nothing here knows what a step does. `done.json` in runs/<study>/steps/<step>/ is written last and
whole, so a step that was killed is a step that was never done. Times of files mean nothing:
contents are compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from recipes_lib.config.handed import handed_text
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.atomic_files import file_hash, write_json
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.core.json_files import object_or_none, utc_now
from recipes_lib.core.terminal import first_of

_FORMAT_VERSION = 1
# inputs of this name are hashes; None means that the content cannot be known here, and is not
# compared
CONTENT = "content."
# kinds of steps that are a training
TRAININGS = ("tune", "train")
FOLLOWS = ("is stale", "is not done")  # how a reason ends that is another step's
_State = Literal["fresh", "stale", "missing"]
# What a result depends on: dotted key -> plain value.
Inputs = Mapping[str, object]
# Keys of a recipe that change how fast a step is, and no result.
ONLY_SPEED = {
    *("batch_tokens", "concurrency", "timeout_s", "max_retries", "max_consecutive_failures"),
    *("base_url", "api_key_variable"),
}
# What differs between two writings of one result.
_VOLATILE = {
    *("written", "command", "git", "libraries", "file", "generated_now", "lm_eval_command"),
    *ONLY_SPEED,
}
# What a result says of its judge because of the runs that were evaluated beside it: whose pairs the
# judge was probed with, where else it failed its audit. A base that several studies share is
# written again by each; a plain `recipes eval --against` asks for probes, a study asks for them
# once.
_OF_COMPANY = {"banners", "banner", "checks", "probes", "probe_pairs"}


@dataclass(frozen=True)
class Step:
    """One step.

    `upstream` names steps whose results are inputs too. `version` is raised when a change of the
    code changes results.
    """

    name: str
    kind: str
    inputs: Inputs = field(repr=False)
    upstream: tuple[str, ...] = ()
    version: int | str = 1
    arm: str = ""
    seed: int | None = None
    run: str = ""
    eval: str = ""
    against: str = ""


@dataclass(frozen=True)
class FileRecord:
    """A file that a step made."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class DoneRecord:
    """What a step was made of and what it gave: done.json, without the facts that nobody reads."""

    version: int | str
    inputs: Inputs
    upstream: Mapping[str, str | None]
    output: str
    files: Mapping[str, FileRecord]
    finished: str
    seconds: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why a step failed the last time: failed.json."""

    error: str
    exit_code: int
    at: str = ""


@dataclass(frozen=True)
class Freshness:
    """Whether a step is done, and if not why."""

    state: _State
    reasons: tuple[str, ...] = ()
    failure: Failure | None = None

    @property
    def fresh(self) -> bool:
        """Whether nothing is to be done."""
        return self.state == "fresh"

    @property
    def why(self) -> str:
        """The reasons in one line."""
        return first_of(self.reasons)


class Graph:
    """The steps of a study, upstream first, and what is known of each in `folder`
    (runs/<study>/steps).
    """

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder = folder
        self.steps = {step.name: step for step in steps}

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps.values())

    def of_kind(self, *kinds: str) -> list[Step]:
        """Return the steps of these kinds, in order."""
        return [step for step in self if step.kind in kinds]

    def wanted(self, only: Sequence[str] = ()) -> list[Step]:
        """Return the steps whose names are or begin with one of these words; without words all.

        Raises:
            RecipeError: a word fits no step.
        """
        found: dict[str, Step] = {}
        for word in only:
            beginning = f"{word}."
            fitting = {
                name: one for name, one in self.steps.items() if f"{name}.".startswith(beginning)
            }
            if not fitting:
                raise RecipeError(
                    f"--only {word}: no such step",
                    *did_you_mean(word, list(self.steps)),
                    "all steps: recipes study plan",
                )
            found |= fitting
        return [step for step in self if not only or step.name in found]

    def todo(self, only: Sequence[str] = ()) -> list[Step]:
        """Return the wanted steps that are not fresh."""
        state = self.survey()
        return [step for step in self.wanted(only) if not state[step.name].fresh]

    def read(self, name: str, file: str) -> dict[str, Any] | None:
        """Return a JSON file in a step's folder, or None where there is none."""
        return object_or_none(self.folder / name / file) or None

    def record(self, name: str) -> DoneRecord | None:
        """Return what is recorded of a step; None where it was never done by this version of the
        format.
        """
        found = self.read(name, "done.json")
        if found is None or found.get("format_version") != _FORMAT_VERSION:
            return None
        known: dict[str, Any] = {one.name: found.get(one.name) for one in fields(DoneRecord)}
        known["files"] = {name: FileRecord(**file) for name, file in found["files"].items()}
        return DoneRecord(**known)

    def output(self, name: str) -> str | None:
        """Return the hash of a step's result, or None where it was never done."""
        record = self.record(name)
        return record.output if record else None

    def survey(self) -> dict[str, Freshness]:
        """Return whether each step is done, with reasons that name what changed."""
        found: dict[str, Freshness] = {}
        for step in self:
            failed = self.read(step.name, "failed.json")
            failure = Failure(**failed) if failed else None
            found[step.name] = self._judge(step, found, failure)
        return found

    def _judge(
        self, step: Step, known: Mapping[str, Freshness], failure: Failure | None
    ) -> Freshness:
        record = self.record(step.name)
        if record is None:
            waiting = [name for name in step.upstream if not known[name].fresh]
            return Freshness("missing", tuple(f"{name} is not done" for name in waiting), failure)
        reasons = changed_inputs(record.inputs, step.inputs)
        if record.version != step.version:
            of_source = isinstance(step.version, str)
            change = f"code {record.version} -> {step.version}"
            reasons.append("the code of this step changed" if of_source else change)
        for name in step.upstream:
            if not known[name].fresh:
                reasons.append(f"{name} {FOLLOWS[known[name].state == 'missing']}")
            elif record.upstream.get(name) != self.output(name):
                reasons.append(f"{name} gave another result")
        reasons += changed_outputs(record.files, self.folder.parent.parent)
        return Freshness("stale", tuple(reasons), failure) if reasons else Freshness("fresh")

    def finish(self, step: Step, output: str, files: Sequence[Path], **facts: Any) -> None:
        """Record that a step is done; only now it counts.

        Args:
            output: hash of the result, which is an input of the steps below.
            files: what it made; the step is stale once one of them changes.
            facts: anything worth keeping (seconds, numbers).
        """
        root = self.folder.parent.parent.resolve()
        names = {path.resolve().relative_to(root).as_posix(): path for path in files}
        record = DoneRecord(
            version=step.version,
            inputs=dict(step.inputs),
            upstream={name: self.output(name) for name in step.upstream},
            output=output,
            files={name: file_record(path) for name, path in names.items()},
            finished=utc_now(),
        )
        values = {"format_version": _FORMAT_VERSION, "step": step.name, **asdict(record)}
        del values["seconds"]  # one of the facts, where it is known
        write_json(self.folder / step.name / "done.json", values | facts)
        (self.folder / step.name / "failed.json").unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Take back that a step is done."""
        (self.folder / name / "done.json").unlink(missing_ok=True)

    def fail(self, step: Step, error: RecipesError | str, exit_code: int | None = None) -> Failure:
        """Note that a step failed; an earlier result stays what it is.

        Args:
            exit_code: None for the error's own.
        """
        code = error.exit_code if isinstance(error, RecipesError) else ExitCode.FAILED
        failure = Failure(str(error), int(code if exit_code is None else exit_code), utc_now())
        write_json(self.folder / step.name / "failed.json", asdict(failure))
        return failure


def changed_inputs(before: Inputs, now: Inputs) -> list[str]:
    """Return one phrase per input that differs.

    Example:
        >>> changed_inputs({"train.learning_rate": 1e-4}, {"train.learning_rate": 2e-4})
        ['train.learning_rate 0.0001 -> 0.0002']
    """
    plain = json.loads(json.dumps(dict(now), default=str))
    phrases = []
    for key in sorted(before.keys() | plain.keys()):
        old, new = before.get(key), plain.get(key)
        if old == new or (key.startswith(CONTENT) and None in (old, new)):
            continue
        if key.startswith(CONTENT):
            phrases.append(f"{key.removeprefix(CONTENT)} changed")
        else:
            phrases.append(f"{key} {_shown(old)} -> {_shown(new)}")
    return phrases


def changed_outputs(records: Mapping[str, FileRecord], root: Path) -> list[str]:
    """Return one phrase per recorded file that is gone or holds something else; a file that only
    grew by lines is the same.
    """
    phrases = []
    for name, record in records.items():
        path = root / name
        if not path.is_file():
            phrases.append(f"{name} is gone")
        elif (
            path.stat().st_mtime_ns != record.mtime_ns
            and file_record(path, record.size).sha256 != record.sha256
        ):
            phrases.append(f"{name} changed")
    return phrases


def file_record(path: Path, first: int | None = None) -> FileRecord:
    """Return size, time and hash of a file.

    No change are lines that were appended to a .jsonl store later, and in a result file the time
    stamps and what other runs that were evaluated beside this one add to it.

    Args:
        first: for a .jsonl store, how many bytes count; None for all.
    """
    stat = path.stat()
    is_result = path.suffix == ".json" and path.name.startswith("result")
    if is_result and (result := object_or_none(path)):
        digest = result_digest(result, _VOLATILE | _OF_COMPANY)
    elif path.suffix == ".jsonl":
        with path.open("rb") as stream:
            digest = hashlib.sha256(
                stream.read(stat.st_size if first is None else first)
            ).hexdigest()
    else:
        digest = content_of(path) or ""
    return FileRecord(stat.st_size, stat.st_mtime_ns, digest)


def result_digest(result: Mapping[str, Any], without: Set[str] = _VOLATILE) -> str:
    """Return a hash of a result file's content, by default without times, versions and
    the command.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: kept(inner) for key, inner in value.items() if key not in without}
        return [kept(inner) for inner in value] if isinstance(value, list | tuple) else value

    return digest_of(kept(result))


def content_of(path: Path) -> str | None:
    """Return the SHA-256 of a file, of all files of a folder with their names, or None where there
    is nothing. A text that was handed to this process counts as it was then.
    """
    if (text := handed_text(path)) is not None:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        hidden = (".", "__")
        return digest_of_files(
            path,
            [file for file in files if not any(p.startswith(hidden) for p in file.parts[-2:])],
        )
    if not path.is_file():
        return None
    return file_hash(path)


def digest_of_files(folder: Path, files: Sequence[Path]) -> str:
    """Return the SHA-256 of files with their names below a folder."""
    pairs = [[file.relative_to(folder).as_posix(), content_of(file)] for file in sorted(files)]
    return digest_of(pairs)


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
