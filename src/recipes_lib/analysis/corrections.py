"""What the tests of a table ask of each other: Holm over its rows, and the level of a look."""

from collections.abc import Sequence

from recipes_lib.analysis.aims import Aims
from recipes_lib.analysis.futility import Target, chance
from recipes_lib.analysis.looks import LAST_SHARE
from recipes_lib.analysis.table_row import TableRow
from recipes_lib.stats import ALPHA, OTHER_SHARE, PRIMARY_SHARE, adjust

MANY_TESTS = 20
FEWEST_OF_MANY = 30  # questions of a row, where many tests are corrected together


def refuse_few_of_many(rows: Sequence[TableRow]) -> None:
    """Refuse a verdict to rows of few questions where many tests are corrected together."""
    counted = [row for row in rows if row.is_counted]
    primaries = sum(row.primary for row in counted)
    for row in counted:
        assert row.test is not None
        together = primaries if row.primary else len(counted)
        if together >= MANY_TESTS and row.test.resolved.questions < FEWEST_OF_MANY:
            row.why_not = f"fewer than {FEWEST_OF_MANY} questions are too few for {together} tests"


def alpha_of(aims: Aims) -> float:
    """Return the level that all tests of a table have together."""
    return ALPHA * aims.look.share if aims.look else ALPHA


def correct(rows: Sequence[TableRow], aims: Aims) -> None:
    """Correct p over the table and over looks, and set what each row would find."""
    counted = [row for row in rows if row.is_counted]
    for row in rows:
        row.tests = len(counted)
        row.alpha = alpha_of(aims)
    # A stopped row keeps the p that it would have as one of the tests: the gate of a study reads
    # it. The others are corrected as if it were not there.
    _correct_together([row for row in rows if row.is_tested], aims)
    _correct_together(counted, aims)


def _correct_together(rows: Sequence[TableRow], aims: Aims) -> None:
    """Correct the p of these rows: of primary ones at 4% and others at 1%, or all at 5%."""
    primaries = sum(row.primary for row in rows)
    has_both = 0 < primaries < len(rows)
    adjusted = adjust([row.test.p for row in rows if row.test], [row.primary for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        assert row.test is not None
        size = len(rows)
        share = 1.0  # of alpha
        if has_both and row.primary:
            size = primaries
            share = PRIMARY_SHARE
        elif has_both:
            size = len(rows) - primaries
            share = OTHER_SHARE
        over_looks = ALPHA / row.alpha
        row.p = min(1.0, p * over_looks)
        # at the strictest level that Holm may ask of the row
        low, high = row.test.mde_range(row.alpha * share / size)
        reach = row.test.resolved.reach
        row.mde = (low, min(high, reach)) if low < reach else None
        if row.margin is not None:
            # Bonferroni: tests of margins take no part in the steps of Holm.
            below, above = row.test.p_within(row.margin)
            below = min(1.0, size / share * over_looks * below)
            above = min(1.0, size / share * over_looks * above)
            row.p_margin = (below, above) if row.higher_is_better else (above, below)
        if aims.look and not aims.look.is_last:
            target = Target(
                seeds=aims.look.declared,
                alpha=ALPHA * LAST_SHARE * share / size,
                margin=row.margin,
                favour=_favour(row, aims.baseline),
            )
            row.chance = chance(row.test, target)
            row.seeds_left = aims.look.declared - aims.look.seeds


def _favour(row: TableRow, baseline: str | None) -> int:
    """Return the sign of differences in favour of the arm that is compared with the baseline."""
    if baseline not in row.arms:
        return 0
    sign = 1 if row.higher_is_better else -1
    return sign if row.second == baseline else -sign
