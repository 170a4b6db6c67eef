"""The sample browser's material: questions, both answers, both raw verdicts. All of it is text of
models, and stays text.

A report holds at most `MAX_SAMPLES` samples, and cuts a text above `MAX_CHARACTERS`; what is left
out is counted, and all of it is in the runs' own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from recipes_lib.compare.measurements import Measurements
from recipes_lib.core.terminal import printable
from recipes_lib.eval_log import ORDERS, EvalLog, Sample

MAX_SAMPLES = 6_000
MAX_CHARACTERS = 8_000
MAX_TOTAL_CHARACTERS = 12_000_000


class Shown(NamedTuple):
    """One judged question: texts as numbers into `SampleSet.texts`. `verdicts` are (order, what was
    said, raw text), `flip` is 1 where the verdict turns with the order.
    """

    group: int
    question: str
    category: str
    outcome: str
    flip: int
    instruction: int
    answer: int
    opponent: int | None
    verdicts: tuple[tuple[str, str, int | None], ...]


@dataclass
class SampleSet:
    """Samples of all comparisons with a table of their texts, and what did not fit."""

    groups: list[dict[str, str]] = field(default_factory=list)
    samples: list[Shown] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    total: int = 0
    cut_texts: int = 0
    _places: dict[str, int] = field(default_factory=dict, repr=False)
    _characters: int = 0

    def is_full(self) -> bool:
        """Whether no further sample fits."""
        return len(self.samples) >= MAX_SAMPLES or self._characters >= MAX_TOTAL_CHARACTERS

    def text(self, value: str) -> int:
        """Return the place of a text in the table, adding it; a long one is cut and says so."""
        cut = len(value) > MAX_CHARACTERS
        kept = (
            f"{value[:MAX_CHARACTERS]}\n[cut here: {len(value):,} characters in all]"
            if cut
            else value
        )
        if kept not in self._places:
            self.cut_texts += cut
            self._places[kept] = len(self.texts)
            self.texts.append(kept)
            self._characters += len(kept)
        return self._places[kept]


def collect_samples(measurements: Measurements) -> SampleSet:
    """Return the samples of every judged evaluation, comparisons between arms first."""
    found = SampleSet()
    pages = [
        (name, run, log, samples)
        for name, arm in measurements.arms.items()
        for run in arm.runs
        for log in run.evals
        if (samples := _shown(log))
    ]
    pages.sort(
        key=lambda page: measurements.opponent_name(page[2].against) not in measurements.arms
    )
    step = max(1, -(-sum(len(page[3]) for page in pages) // MAX_SAMPLES))
    for name, run, log, samples in pages:
        several = len(measurements.arms[name].runs) > 1
        title = f"{log.eval}: {name}{f', seed {run.seed}' if several else ''}"
        opponent = measurements.opponent_name(log.against) or ""
        _add(found, log, samples, name, title, opponent, step)
    return found


def _add(
    found: SampleSet,
    log: EvalLog,
    samples: Sequence[Sample],
    arm: str,
    title: str,
    opponent: str,
    step: int,
) -> None:
    """Add every `step`-th of one evaluation's samples."""
    found.total += len(samples)
    if found.is_full():
        return
    group = len(found.groups)
    how = "graded" if log.judge else "checked by rules"
    title += f" against {opponent}" if opponent else f", {how}"
    folder = "/".join(log.file.parent.parts[-3:])
    found.groups.append({"title": title, "arm": arm, "opponent": opponent, "folder": folder})
    turns = log.suite == "mt_bench"
    draws = any(one.draw > 1 for one in samples)
    for one in samples[::step]:
        if found.is_full():
            return
        place = f"{one.id}, turn {one.turn}" if turns else one.id
        place += f", answer {one.draw}" if draws else ""
        orders = ORDERS if one.opponent is not None else ("grade",)
        verdicts = tuple(
            (order, word, None if raw is None else found.text(raw))
            for order, word, raw in zip(orders, one.verdicts, one.raws, strict=False)
        )
        theirs = None if one.opponent is None else found.text(one.opponent)
        unknown = f"question {place}"
        asked = unknown if one.input is None else one.input
        found.samples.append(
            Shown(
                group,
                printable(place),
                printable(one.category),
                f"grade {one.value:g}" if one.outcome == "graded" else one.outcome,
                int(one.flip),
                found.text(asked),
                found.text(one.answer or ""),
                theirs,
                verdicts,
            )
        )


def _shown(log: EvalLog) -> list[Sample]:
    """The samples to read, those that hold a text: the comparisons, or the grades."""
    measures = sorted(log.measures, key=lambda measure: measure.opponent is None)
    return [one for measure in measures[:1] for one in measure.samples if one.answer or one.raws]
