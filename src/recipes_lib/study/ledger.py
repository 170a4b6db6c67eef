"""The ledger of a study: every look at its results, and what was added or removed after it.

`runs/<study>/ledger.jsonl` has a line for each look at results that nobody had seen: what they are
of, and every tested comparison with a hash of its results. Each line names the SHA-256 of the one
before it, and `steps/statistics/ledger.json` the last one, so a line that was changed, cut or left
out is noticed. The same results are one look, however often they are printed.

A line is written before its look is shown. So one that a crash cut was seen by nobody: it is left
out, and the next look takes its place.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock

from recipes_lib.compare.claims import Comparison, Weigh
from recipes_lib.compare.design import BASE_ARM, Study
from recipes_lib.compare.findings import LEDGER_DAMAGED, LEVEL_USED, Finding, found
from recipes_lib.compare.looks import Looks
from recipes_lib.compare.measurements import ArmMeasurements, Measurements
from recipes_lib.compare.row import TableRow, json_value
from recipes_lib.compare.table import is_tested
from recipes_lib.compare.validity.case import SEED, changes_result
from recipes_lib.compare.wording import count, sentence_list
from recipes_lib.core.atomic_files import sync, write_json
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.core.json_files import utc_now
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.statistics.looks import Look, last_planned, level_share
from recipes_lib.study.arms import LEDGER_HEAD, run_names, study_folder
from recipes_lib.study.graph import ONLY_SPEED, Freshness, Graph
from recipes_lib.study.ledger_file import LEDGER_FORMAT, LedgerLine, ledger_place, read_ledger
from recipes_lib.training.resume_guard import flatten

_LOCK_TIMEOUT_S = 60.0
_NO_SETTINGS = {"limit", "tasks", "samples", "batch_size", *ONLY_SPEED}  # how much, how fast
_SEED = re.compile(r"--seed-?\d+\Z")  # ends the name of a run
_AGAIN = "other results of the same seeds and questions"
_RESULTS = ("comparison", "results")
Parts = tuple[object, ...]


@dataclass(frozen=True)
class Viewed:
    """What is looked at, and what its study planned.

    Args:
        by: the command that shows it.
        names: the study's arms by those of the measurements, where they are called otherwise.
        study: None where whoever looks knows no plan.
    """

    by: str
    measurements: Measurements
    names: Mapping[str, str] = field(default_factory=dict)
    study: Study | None = None
    graph: Graph | None = None
    _hashes: dict[object, str] = field(default_factory=dict, repr=False)

    def named(self, arm: str) -> str:
        """Return the study's name of an arm."""
        return self.names.get(arm, arm)

    def content(self) -> dict[str, object]:
        """Return the arms with their seeds, and the evals with their questions."""
        arms, evals = {}, {}
        for name, arm in self.measurements.arms.items():
            if arm.logs:
                seeds = [run.seed for run in arm.runs if run.evals and run.seed is not None]
                arms[self.named(name)] = {"seeds": seeds, "recipe": self._recipe(name)}
        logs = [log for arm in self.measurements.arms.values() for log in arm.logs]
        for eval in dict.fromkeys(log.eval for log in logs):
            measures = [one for log in logs if log.eval == eval for one in log.measures]
            questions = sorted({item.id for one in measures for item in one.samples})
            evals[eval] = {
                "questions": len(questions),
                "set": digest_of(questions),
                "settings": self._settings(eval, self.measurements.arms),
            }
        return {"arms": arms, "evals": evals}

    def _settings(self, eval: str, arms: Iterable[str]) -> str:
        """A hash of how an eval asks and judges, whatever its questions."""
        arms = tuple(arms)
        if (eval, arms) in self._hashes:
            return self._hashes[eval, arms]
        known = set()
        for log in (log for name in arms for log in self.measurements.arms[name].logs):
            if log.eval == eval:
                parts = {part: log.recipe.get(part) or {} for part in ("suite", "generation")}
                kept = {
                    f"{part}.{key}": value
                    for part, values in parts.items()
                    for key, value in values.items()
                    if key not in _NO_SETTINGS
                }
                known.add(digest_of([kept, log.judge.fingerprint if log.judge else None]))
        return self._hashes.setdefault((eval, arms), digest_of(sorted(known)))

    def comparison(self, row: TableRow) -> str:
        """Return a hash of what a row compares, whichever seeds and questions it has."""
        eval = row.measures[0].eval if row.measures else ""
        return digest_of(
            [
                sorted([self.named(name), self._recipe(name)] for name in row.arms),
                [row.metric, row.head_to_head, self.named(row.opponent or "")],
                self._settings(eval, row.arms),
            ]
        )

    def _recipe(self, arm: str) -> str:
        if arm not in self._hashes:
            self._hashes[arm] = _recipe_of(self.measurements.arms[arm])
        return self._hashes[arm]

    def look(self, row: TableRow) -> Look:
        """Return a row as it is looked at now."""
        results = _results_of(row, self.named)
        if self.study is None:
            return Look(results)
        seeds = {arm.name: list(arm.seeds) for arm in self.study.arms}
        planned = [[name, seeds.get(name)] for name in sorted(row.arms)]
        asked = sorted(set(row.paired.items)) if row.paired else []
        return Look(results, digest_of([planned, asked]), self._complete(row))

    @cached_property
    def _known(self) -> Mapping[str, Freshness]:
        return self.graph.survey() if self.graph else {}

    def _complete(self, row: TableRow) -> bool:
        """Whether a row has the results of every seed that the study planned."""
        if self.study is None or self.graph is None:
            return False
        arm_of = {run: arm for arm, runs in run_names(self.study).items() for run in runs}
        eval = row.measures[0].eval if row.measures else ""
        return all(
            self._known[step.name].fresh
            for step in self.graph
            if step.arm in row.arms
            and step.eval in ("", eval)
            and (not step.against or arm_of.get(step.against, step.against) in row.arms)
        )


def _recipe_of(arm: ArmMeasurements) -> str:
    """A hash of what an arm's trainings were made of; of a base, which
    run it is.
    """
    run = arm.runs[0]
    if run.is_base:
        return run.name
    values = flatten(dict(run.resolved))
    left_out = (SEED, "run.name", "run.notes", "run.tags")
    kept = {
        key: value
        for key, value in values.items()
        if key not in left_out and changes_result(key, values, values)
    }
    return digest_of([kept, (run.state.get("guard") or {}).get("data_fingerprint")])


def _results_of(row: TableRow, named: Callable[[str], str]) -> str:
    """A hash of the items of both arms, whatever the order of arms, seeds and items."""
    if row.paired is None:
        one = row.tested
        known = [one.p, one.n, one.seeds] if one else [None, None, None]
        return digest_of([abs(row.difference or 0.0), *known])
    paired, items = row.paired, row.paired.items
    order = sorted(range(len(items)), key=lambda number: items[number])
    judged = [table[:, order] for table in (paired.first, paired.second)]
    told = [table[:, order] for table in paired.human]
    sides = [np.hstack([table, *told[place : place + 1]]) for place, table in enumerate(judged)]
    turned = named(row.first) > named(row.second)
    if paired.versus:  # outcomes of the first arm; the other side is a half
        sides = [1 - sides[0] if turned else sides[0]]
    total = hashlib.sha256(repr([items[number] for number in order]).encode())
    for values in reversed(sides) if turned else sides:
        rounded = np.nan_to_num(np.round(values, 12) + 0.0, nan=math.inf)
        total.update(b"".join(sorted(seed.tobytes() for seed in rounded)) + b"|")
    return total.hexdigest()


class Ledger:
    """The ledger of one study, as one command uses it: `weigh` for the claims, then `record`.

    Args:
        folder: runs/<study>.
    """

    def __init__(self, folder: Path, viewed: Viewed) -> None:
        self.folder = folder
        self.file = ledger_place(folder)
        self.head = folder / LEDGER_HEAD
        self.viewed = viewed
        self.read()

    def read(self) -> None:
        """Read what stands there; `damage` says what is wrong with it, and nothing is used then."""
        there = read_ledger(self.folder)
        self.entries, self.hashes = list(there.entries), list(there.hashes)
        self.size, self.damage = there.size, there.damage

    def weigh(self, rows: Sequence[TableRow]) -> tuple[list[TableRow], list[Finding]]:
        """Return the rows with their parts of the level, and why some have none."""
        findings = []
        if self.damage:
            place = shown_path(self.file)
            findings.append(found(LEDGER_DAMAGED, [f"{place}: {self.damage}"], how=self.damage))
        weighed, before = [], self._seen()
        for row in rows:
            share = 1.0
            if is_tested(row):
                seen = before.get(self.viewed.comparison(row), [])
                looks = [Look(one["results"], one["plan"], one["complete"]) for _, one in seen]
                planned = self._planned()
                share = level_share(looks, self.viewed.look(row), planned)
                last = last_planned(looks, planned)
                if not share and last is not None:
                    findings.append(_level_used(row, *seen[last]))
            flag = f"p divided by {share:.2g}, the part of 5% that this look has"
            flags = (*row.flags, flag) if 0 < share < 1 else row.flags
            weighed.append(replace(row, level_share=share, flags=flags))
        return weighed, findings

    def _planned(self) -> int:
        """Looks that the study planned when it was looked at for the first time."""
        study = self.viewed.study
        now = study.looks if study else 1
        return next((one["planned"] for one in self.entries if one["planned"]), now)

    def _numbered(self) -> Iterator[tuple[int, LedgerLine]]:
        """Every entry with the number of its look: results that were all seen before are none."""
        number, known = 0, set[Parts]()
        for entry in self.entries:
            number += not _parts(entry, *_RESULTS) <= known
            known |= _parts(entry, *_RESULTS)
            yield number, entry

    def _number(self) -> int:
        """How many looks there were."""
        return max((number for number, _ in self._numbered()), default=0)

    def _seen(self) -> dict[str, list[tuple[int, LedgerLine]]]:
        """The earlier looks at each comparison."""
        found: dict[str, list[tuple[int, LedgerLine]]] = {}
        for number, entry in self._numbered():
            for one in entry["comparisons"]:
                found.setdefault(one["comparison"], []).append((number, one))
        return found

    def record(self, comparison: Comparison) -> Comparison | None:
        """Return a comparison with its looks, this one among them, which is written down unless it
        was before; None where another process wrote since `weigh` read, so it must be made again.
        """
        entry = self._entry(comparison)
        if not entry["comparisons"]:
            return comparison
        unrecorded = f"the ledger was changed, {self.damage}" if self.damage else ""
        if not self.damage and not self._stands_there(entry):
            try:
                if not self._append(entry):
                    self.read()
                    return None
            except OSError as error:  # the lock's own among them: a folder that is read-only, full
                unrecorded = error.strerror or str(error)
                self.entries.append(entry)
        looks = Looks(
            self._number(),
            tuple(self._changes()),
            sum(0 < row.level_share < 1 for row in comparison.rows),
            unrecorded,
        )
        return replace(comparison, looks=looks)

    def _entry(self, comparison: Comparison) -> dict[str, object]:
        seen = [
            {
                "metric": row.metric,
                "arms": list(map(self.viewed.named, row.arms)),
                "comparison": self.viewed.comparison(row),
                **asdict(self._look(row)),
                "seeds": row.tested.seeds,
                "questions": row.tested.questions,
                "p": json_value(row.tested.p),
                "primary": row.primary,
                "verdict": row.verdict,
            }
            for row in comparison.rows
            if row.tested and is_tested(row)
        ]
        study = self.viewed.study
        return {
            "format_version": LEDGER_FORMAT,
            "previous": self.hashes[-1] if self.hashes else "",
            "at": utc_now(),
            "by": self.viewed.by,
            "planned": study.looks if study else None,
            "results": digest_of(sorted([one["comparison"], one["results"]] for one in seen)),
            **self.viewed.content(),
            "comparisons": seen,
        }

    def _look(self, row: TableRow) -> Look:
        """A row as it was looked at. One whose claim an error stopped was not the last planned
        look, or what the error asks for could not be done.
        """
        look, stopped = self.viewed.look(row), row.sentence.startswith("No claim about")
        return replace(look, complete=look.complete and not stopped)

    def _stands_there(self, entry: LedgerLine) -> bool:
        """Whether nothing of an entry is new."""
        keys = (*_RESULTS, "plan", "complete") if entry["planned"] else _RESULTS
        known = set().union(*(_parts(one, *keys) for one in self.entries))
        last = next((one for one in reversed(self.entries) if one["planned"]), entry)
        same = all(last[kind] == entry[kind] for kind in ("arms", "evals"))
        return _parts(entry, *keys) <= known and (same or not entry["planned"])

    def _append(self, entry: LedgerLine) -> bool:
        """Write an entry; return False where there is another one since the file was read."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_name(".ledger.lock"), timeout=_LOCK_TIMEOUT_S):
            known = self.hashes
            self.read()
            if self.hashes != known:
                return False
            line = json.dumps(entry, ensure_ascii=False).encode()
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(handle, self.size)  # what a crash cut
                if os.pwrite(handle, line + b"\n", self.size) <= len(line):
                    os.ftruncate(handle, self.size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
            sync(self.file.parent)
            self.read()
            head = {"lines": len(self.hashes), "last": self.hashes[-1], "looks": self._number()}
            write_json(self.head, head)
        return True

    def _changes(self) -> Iterator[str]:
        """Yield what was added and removed after each look of the study at its results."""
        looks = [(n, one) for n, one in self._numbered() if one["planned"]]
        for (number, before), (later, now) in itertools.pairwise(looks):
            what = "; ".join(_differences(before, now))
            if what or later != number:
                yield f"After look {number}: {what or _AGAIN}"


def _parts(entry: LedgerLine, *keys: str) -> set[Parts]:
    """These values of each comparison of an entry."""
    return {tuple(row[key] for key in keys) for row in entry["comparisons"]}


def _level_used(row: TableRow, look: int, then: LedgerLine) -> Finding:
    """That nothing is left of a row's level, and which look had it."""
    assert row.tested is not None
    was, now = (
        f"{count(seeds, 'seed')}, {count(questions, row.item)}"
        for seeds, questions in (
            (then["seeds"], then["questions"]),
            (row.tested.seeds, row.tested.questions),
        )
    )
    evidence = [f"{row.where}: {was} at look {look}, and {now} now"]
    return found(LEVEL_USED, evidence, row.arms, [row.metric], look=look, was=was, now=now)


def _differences(before: LedgerLine, now: LedgerLine) -> Iterator[str]:
    """Yield what stands in one of two entries alone."""
    for word, one, other in (("added", before, now), ("removed", now, before)):
        news = [
            f"{kind.removesuffix('s')} {name}"
            for kind in ("arms", "evals")
            for name in other[kind]
            if name not in one[kind]
        ]
        seeds: dict[int, list[str]] = {}
        for name in _both(one, other, "arms"):
            for seed in other["arms"][name]["seeds"]:
                if seed not in one["arms"][name]["seeds"]:
                    seeds.setdefault(seed, []).append(name)
        news += [f"seed {seed} of {sentence_list(names)}" for seed, names in sorted(seeds.items())]
        if news:
            yield f"{word} {sentence_list(news)}"
    for name in _both(before, now, "evals"):
        was, is_now = before["evals"][name], now["evals"][name]
        if was["set"] != is_now["set"]:
            yield (
                f"{name} has {count(is_now['questions'], 'question')} instead of"
                f" {was['questions']:,}"
            )
        if was["settings"] != is_now["settings"]:
            yield f"{name} asks or judges otherwise"
    for name in _both(before, now, "arms"):
        if before["arms"][name]["recipe"] != now["arms"][name]["recipe"]:
            yield f"arm {name} has another recipe"


def _both(one: LedgerLine, other: LedgerLine, kind: str) -> list[str]:
    """The arms or evals of both entries."""
    return [name for name in one[kind] if name in other[kind]]


def looked(ledger: Ledger, compare: Callable[[Weigh], Comparison]) -> Comparison:
    """Return a comparison that is weighed and recorded, made again where another process looked
    meanwhile.
    """
    while (comparison := ledger.record(compare(ledger.weigh))) is None:
        pass
    return comparison


def ledger_of(study: Study, graph: Graph, measurements: Measurements, by: str) -> Ledger:
    """Return a study's ledger for a look at its own results."""
    return Ledger(study_folder(study), Viewed(by, measurements, study=study, graph=graph))


def ledger_of_runs(measurements: Measurements) -> Ledger | None:
    """Return the ledger of the study that runs belong to; None where there is none, or more than
    one.
    """
    studies: dict[Path, dict[str, str]] = {}
    base = {name: BASE_ARM for name, arm in measurements.arms.items() if arm.is_base}
    for name, arm in measurements.arms.items():
        study, _, own = arm.runs[0].name.partition("--") if arm.runs else ("", "", "")
        folder = runs_root() / study
        if own and name not in base and (folder / "steps").is_dir():
            studies.setdefault(folder, {})[name] = _SEED.sub("", own)
    if len(studies) != 1:
        return None
    ((folder, names),) = studies.items()
    return Ledger(folder, Viewed("compare", measurements, base | names))
