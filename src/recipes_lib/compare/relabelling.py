"""How often this report would be wrong, and how often it would find a difference: its claim code on
copies of the study's own data, where the truth is known.

In a copy both arms of every comparison exchange labels in half of the questions, the same questions
in all comparisons and metrics. No arm is better than another then, while the spread of each
comparison, its ties, its open items and what comparisons have in common stay as they are. All
trainings of an arm exchange labels together; then each training is moved by as much as trainings
differ in this study, by exchanges of its own. That move is drawn from a normal curve: whole
trainings cannot be relabelled, because two of each arm have two orders and one of them is the study
itself, effect and all.

A difference is planted the same way: the questions that favour one arm become more frequent until
the effect has the wanted size, so every value stays on its scale.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from recipes_lib.compare.row import ALPHA, ItemValues, PairedItems, TableRow
from recipes_lib.compare.table import corrected
from recipes_lib.compare.wording import difference_text, metric_text, sentence_list
from recipes_lib.statistics.seeds import question_means, seed_deviation
from recipes_lib.statistics.unresolved import compare_ps

FIRST_COPIES = 1_000
# Where so many hold too many claims, chance is told from a test that does not hold by these.
MORE_COPIES = 10_000
_STATED = 25  # copies from which the stated size is averaged
_CHUNK = 4_000_000  # values held in memory at once
VerdictOf = Callable[[TableRow], TableRow]
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Planted:
    """A difference that was put into copies, and in how many of them the report found it."""

    metric: str
    where: str
    first: str
    second: str
    size: float
    unit: str
    found: int
    copies: int = FIRST_COPIES


@dataclass(frozen=True)
class Relabelling:
    """What the claim code said of copies in which no arm is better, and of copies with a planted
    difference.

    Args:
        claims: copies with a "better" or "worse".
        planted: None where no difference could be planted that a comparison is said to find.
        moved: whether trainings were moved as far as seeds differ.
        left_out: comparisons that are not of items, and stay as they are.
    """

    copies: int
    claims: int
    planted: Planted | None
    moved: bool
    left_out: tuple[str, ...]

    @property
    def too_often(self) -> bool:
        """Whether false claims are more frequent than 5% and chance explain."""
        error = math.sqrt(ALPHA * (1 - ALPHA) / self.copies)
        return self.claims / self.copies > ALPHA + 2 * error

    @property
    def sentence(self) -> str:
        """The line of the report."""
        if one := self.planted:
            size = difference_text(one.size, one.unit).lstrip("+")
            found = (
                f"a planted difference of {size} between {one.first} and {one.second} on"
                f" {one.where} was found in {_share(one.found, one.copies)}"
            )
        else:
            found = (
                "no difference of the size that would be found could be planted, because the arms'"
                " scores differ too little"
            )
        moved = ", and each training was moved as far as seeds differ" if self.moved else ""
        left_out = f" Left out: {sentence_list(self.left_out)}." if self.left_out else ""
        return (
            'On this study\'s own data with arms relabelled, "better" or "worse" appeared in'
            f" {_share(self.claims, self.copies)} copies; {found}. In a copy both arms of every"
            " comparison exchange labels in half of the questions, drawn"
            f" anew{moved}.{left_out}"
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Relabelling:
        """Return what `dataclasses.asdict` made a dictionary of."""
        planted = Planted(**value["planted"]) if value["planted"] else None
        return cls(**{**value, "planted": planted, "left_out": tuple(value["left_out"])})


def relabelled(rows: Sequence[TableRow], verdict_of: VerdictOf) -> Relabelling | None:
    """Return what becomes of copies of a table; None where no comparison may end in a claim.

    Args:
        verdict_of: gives a corrected row its verdict, with the findings of this study.
    """
    family = [row for row in rows if row.p_holm is not None]
    claimable = [row for row in family if row.paired and _may_claim(row, verdict_of)]
    if not claimable:
        return None
    copies = _Copies(family, int(table_hash(rows)[:16], 16))
    left_out = tuple(dict.fromkeys(row.where for row in family if not row.paired))
    for count in (FIRST_COPIES, MORE_COPIES):
        claims = sum(any(map(_claimed, judged)) for judged in copies.judged(verdict_of, count))
        own = Relabelling(count, claims, None, any(copies.deviations), left_out)
        if not own.too_often:
            break
    for row in sorted(claimable, key=lambda row: not row.primary):
        place = family.index(row)
        size = copies.stated(place)
        if size is not None and (bias := copies.bias(place, size)) <= 0.5:
            found = sum(
                any((one.difference or 0.0) > 0 and _claimed(one) for one in judged)
                for judged in copies.judged(verdict_of, FIRST_COPIES, place, bias)
            )
            planted = Planted(row.metric, row.where, *row.arms, size, row.unit, found)
            return replace(own, planted=planted)
    return own


def table_hash(rows: Sequence[TableRow]) -> str:
    """Return a hash of everything that decides what becomes of copies, the findings aside."""
    total = hashlib.sha256()
    for row in rows:
        asked = (row.metric, row.opponent, row.arms, row.unit, row.primary)
        known = (*asked, row.p_holm, row.mde, row.stopped)
        total.update(repr(known).encode())
        if row.paired:
            total.update(repr((row.paired.items, row.paired.scale)).encode())
            for values in (row.paired.first, row.paired.second, *row.paired.human):
                total.update(values.tobytes())
    return total.hexdigest()


def _share(hits: int, copies: int) -> str:
    return f"{metric_text(hits / copies, 'share')} of {copies:,}"


def _claimed(row: TableRow) -> bool:
    return row.verdict in ("better", "worse") and row.claimed


def _may_claim(row: TableRow, verdict_of: VerdictOf) -> bool:
    """Whether a difference would be claimed if it were shown."""
    assert row.tested is not None
    shown = replace(row.tested, effect=0.5, low=0.5, high=0.5)
    return _claimed(verdict_of(replace(row, p_holm=0.0, tested=shown)))


class _Copies:
    """Copies of a table, drawn from its data alone: the same table has the same copies."""

    def __init__(self, rows: Sequence[TableRow], seed: int) -> None:
        self.rows, self.seed = rows, seed
        places: dict[tuple[str, ...], int] = {}
        # Of each row and item, which question of the study it belongs to.
        self.questions = [
            np.array([places.setdefault((*_asked(row), key[0]), len(places)) for key in items])
            for row in rows
            for items in [row.paired.items if row.paired else ()]
        ]
        self.count = len(places)
        self.deviations = [_deviation(row.paired) for row in rows]
        arms = dict.fromkeys(name for row in rows for name in row.arms)
        self.arms = {name: number for number, name in enumerate(arms)}
        self.seeds = max((row.tested.seeds for row in rows if row.tested), default=1)
        values = sum(_shape(row.paired)[0] * _shape(row.paired)[1] for row in rows)
        self.step = max(1, min(FIRST_COPIES, _CHUNK // max(1, values)))

    def judged(
        self, verdict_of: VerdictOf, count: int, target: int | None = None, bias: float = 0.0
    ) -> Iterator[list[TableRow]]:
        """Yield the rows of each copy that may hold a claim, judged.

        Args:
            target: the only row that is asked for, in which a difference is planted.
            bias: how much more often than half a question favours its first arm.
        """
        for start in range(0, count, self.step):
            drawn = self.draw(start, min(self.step, count - start), target, bias)
            tests = [_tests(one) if one else None for one in drawn]
            for copy in range(min(self.step, count - start)):
                yield [
                    verdict_of(replace(row, tested=row.paired.tested()))
                    for row in self._corrected(drawn, tests, copy, target)
                    if row.paired
                ]

    def _corrected(
        self,
        drawn: Sequence[PairedItems | None],
        tests: Sequence[tuple[Any, Any] | None],
        copy: int,
        target: int | None,
    ) -> list[TableRow]:
        """The rows of one copy whose adjusted p is small enough. A row without items counts in the
        correction, and shows nothing.
        """
        ps = [test[1][copy] if test else 1.0 for test in tests]
        asked = range(len(ps)) if target is None else (target,)
        if not any(ps[place] <= ALPHA for place in asked):
            return []
        made = []
        for row, test, p in zip(self.rows, tests, ps, strict=True):
            assert row.tested is not None
            effect = float(test[0][copy]) if test else 0.0
            # Without limits no margin is shown, and none makes room for another claim.
            p = None if math.isnan(p) else float(p)
            tested = replace(row.tested, effect=effect, p=p, low=None, high=None)
            made.append(replace(row, tested=tested))
        adjusted = corrected(made, power=False)
        return [
            replace(row, paired=_one(copies, copy))
            for place in asked
            for row, copies in [(adjusted[place], drawn[place])]
            if copies and row.p_holm is not None and row.p_holm <= ALPHA
        ]

    def draw(
        self, start: int, count: int, target: int | None = None, bias: float = 0.0
    ) -> list[PairedItems | None]:
        """Return copies of each row, by copy, seed and item; nothing for a row without items."""
        rng = np.random.default_rng([self.seed, start, target is not None])
        drawn = rng.random((count, self.count), dtype=np.float32)
        exchanged = drawn < 0.5
        if target is not None:
            favours = self.favours(target)
            wanted = drawn < 0.5 + bias  # questions that favour the first arm
            exchanged = np.where(favours > 0, ~wanted, np.where(favours < 0, wanted, exchanged))
        moves = rng.normal(size=(count, len(self.arms), self.seeds))
        made: list[PairedItems | None] = []
        for row, questions, deviation in zip(
            self.rows, self.questions, self.deviations, strict=True
        ):
            if row.paired is None:
                made.append(None)
                continue
            copies = _exchanged(row.paired, exchanged[:, None, questions])
            if deviation:
                seeds = copies.first.shape[1]
                first, second = (moves[:, self.arms[name], :seeds] for name in row.arms)
                move = (first - second) / math.sqrt(2)
                if not row.paired.versus and 1 in (len(row.paired.first), len(row.paired.second)):
                    move = first if len(row.paired.first) > 1 else -second  # a base has no seeds
                copies = _moved(copies, deviation * move, rng)
            made.append(copies)
        return made

    def stated(self, place: int) -> float | None:
        """What difference copies of the row are said to find with 80% probability, on average: a
        few seeds show much or little of how they differ.
        """
        rows = [
            replace(row, tested=replace(row.tested, spread=None)) if row.tested else row
            for row in self.rows
        ]
        row, sizes = self.rows[place], []
        copies = self.draw(0, _STATED)[place]
        assert copies is not None
        for copy in range(_STATED):
            rows[place] = replace(row, tested=_one(copies, copy).tested())
            sizes.append(corrected(rows)[place].mde)
        known = [size for size in sizes if size is not None]
        return sum(known) / len(known) if known else None

    def bias(self, place: int, size: float) -> float:
        """How much more often than half a question must favour the first arm for an effect of this
        size; above a half where the answers do not differ enough for it.
        """
        paired = self.rows[place].paired
        assert paired is not None
        against = self.favours(place)[self.questions[place]] < 0
        total = float(_tests(_exchanged(paired, against[None, None]))[0][0])
        return size / (2 * total) if total > 0 else math.inf

    def favours(self, place: int) -> NDArray[np.float64]:
        """Return which arm of a row each question favours, and how far."""
        sums = np.zeros(self.count)
        np.add.at(sums, self.questions[place], _differences(self.rows[place].paired))
        return sums


def _asked(row: TableRow) -> tuple[str, str]:
    """What questions with one id belong to."""
    one = row.measures[0] if row.measures else None
    return (one.eval, one.task) if one else (row.metric, "")


def _shape(paired: PairedItems | None) -> tuple[int, int]:
    return (max(len(paired.first), len(paired.second)), len(paired.items)) if paired else (1, 0)


def _differences(paired: PairedItems | None) -> NDArray[np.float64]:
    """The difference of each item, summed over seeds; 0 where it is open in any."""
    assert paired is not None
    return np.nan_to_num(np.sum(paired.first - paired.second, axis=0))


def _deviation(paired: PairedItems | None) -> float:
    """By how much the trainings behind a row differ, beyond what questions explain."""
    if paired is None or _shape(paired)[0] < 2:
        return 0.0
    table = paired.first - paired.second
    known = ~np.isnan(table).any(axis=0)
    return seed_deviation(question_means(table[:, known], paired.questions[known]))


def _exchanged(paired: PairedItems, mask: Mask) -> PairedItems:
    """The items with the labels of both arms exchanged where the mask says it."""
    if paired.versus:
        first, *human = (np.where(mask, 1 - one, one) for one in (paired.first, *paired.human))
        second = np.broadcast_to(paired.second, first.shape)
        return replace(paired, first=first, second=second, human=tuple(human))
    first, second = _swapped(mask, paired.first, paired.second)
    told = _swapped(mask, *paired.human) if paired.human else ()
    return replace(paired, first=first, second=second, human=told)


def _swapped(mask: Mask, mine: ItemValues, theirs: ItemValues) -> tuple[ItemValues, ItemValues]:
    mine, theirs = np.broadcast_arrays(mine, theirs)
    return np.where(mask, theirs, mine), np.where(mask, mine, theirs)


def _moved(
    copies: PairedItems, wanted: NDArray[np.float64], rng: np.random.Generator
) -> PairedItems:
    """The copies with the effect of each training moved as far as is wanted: a plain number by
    that; what has a scale by further exchanges, and where these do not suffice by the ends of the
    scale, in items drawn at random.
    """
    first, second = copies.first, copies.second
    if math.isinf(copies.largest):
        return replace(copies, first=first + wanted[:, :, None])
    up = wanted[:, :, None] > 0

    def chosen(gain: NDArray[np.float64], size: NDArray[np.float64]) -> tuple[Mask, Any]:
        """Items that together gain so much, and what is still wanted."""
        most = gain.mean(axis=-1)
        share = np.divide(size, most, out=np.zeros_like(most), where=most > 1e-12)
        chosen = rng.random(gain.shape) < share[:, :, None]
        return chosen & (gain > 0), np.maximum(size - most, 0.0)

    towards = np.where(up, 1.0, -1.0) * np.nan_to_num(first - second)
    mask, rest = chosen(2 * np.maximum(-towards, 0.0), np.abs(wanted))
    copies = _exchanged(copies, mask)
    if not rest.any():
        return copies
    first, second = copies.first, copies.second
    open_items = np.isnan(first) | np.isnan(second)
    mask, _ = chosen(np.where(open_items, 0.0, copies.largest - np.abs(towards)), rest)
    low, high = copies.scale
    ends = np.where(up, high, low), np.where(up, low, high)
    first = np.where(mask, ends[0], first)
    human = (
        np.where(mask & ~np.isnan(told), end, told)
        for told, end in zip(copies.human, ends, strict=False)
    )
    second = second if copies.versus else np.where(mask, ends[1], second)
    return replace(copies, first=first, second=second, human=tuple(human))


def _one(copies: PairedItems, copy: int) -> PairedItems:
    human = tuple(told[copy] for told in copies.human)
    return replace(copies, first=copies.first[copy], second=copies.second[copy], human=human)


def _tests(copies: PairedItems) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Effect and p of every copy."""
    return compare_ps(*copies.tested_values, copies.questions, scale=copies.scale)
