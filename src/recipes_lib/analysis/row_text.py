"""The parts of a sentence that a row of the table gives: names, values, evidence, remarks."""

from recipes_lib.analysis.pairs import BY_SEED, EXCHANGEABLE
from recipes_lib.analysis.table_row import TableRow
from recipes_lib.analysis.text import difference_text, interval_text, metric_text, p_text
from recipes_lib.core.terminal import count
from recipes_lib.evals.recipe import ROW_SUITES
from recipes_lib.stats import ALPHA

FAR_LONGER = 1.5  # times as long, by the median
NEAR_END = 0.02  # from 0% or 100%


def where_text(row: TableRow) -> str:
    """Return the metric of a row inside a sentence."""
    if row.head_to_head:
        return f"{row.label}, head to head"
    opponent = "the reference answers" if row.opponent == "reference" else row.opponent
    return f"{row.label} against {opponent}" if opponent else row.label


def effect_text(row: TableRow) -> str:
    """Return the effect of a row: a difference, head to head the win rate."""
    if row.head_to_head:
        return metric_text(row.first_value, row.unit)
    return difference_text(row.difference, row.unit)


def limits_text(row: TableRow) -> str:
    """Return the interval of `effect_text`, with its level where that is not 95%; nothing where
    there is none.
    """
    interval = row.interval
    if interval is None:
        return ""
    if row.head_to_head:
        limits = interval_text((interval[0] + 0.5, interval[1] + 0.5), row.unit, signed=False)
    else:
        limits = interval_text(interval, row.unit)
    if row.alpha == ALPHA:
        return limits
    return f"[{confidence_text(row.alpha)}: {limits[1:]}"


def confidence_text(alpha: float) -> str:
    """Return the level of an interval.

    Example:
        >>> confidence_text(0.05), confidence_text(0.005)
        ('95%', '99.5%')
    """
    return f"{100 * (1 - alpha):g}%"


def values_text(row: TableRow) -> str:
    """Return the values of both arms, and their difference where it was tested."""
    if row.head_to_head:
        return f"win rate {effect_text(row)} {limits_text(row)}".strip()
    first = metric_text(row.first_value, row.unit)
    second = metric_text(row.second_value, row.unit)
    values = f"{first} against {second}"
    if row.test is None:
        return values
    return f"{values}, difference {effect_text(row)} {limits_text(row)}".strip()


def evidence_text(row: TableRow) -> str:
    """Return p, the number of questions and of trainings."""
    assert row.test is not None
    evidence = p_text(row.p)
    corrections = []
    if row.tests > 1:
        corrections.append("Holm")
    if row.alpha != ALPHA:
        corrections.append("looks")
    if corrections:
        evidence += f" ({', '.join(corrections)})"
    unit = ROW_SUITES.get(row.suite, "question")
    evidence += f", n = {count(row.test.resolved.questions, unit)}"
    if row.test.unresolved:
        evidence += f", {row.test.unresolved} without a verdict"
    if min(row.trainings) > 0 and max(row.trainings) > 1:
        evidence += f", {count(max(row.trainings), 'training')} each"
        for flag in row.flags:
            if flag in (BY_SEED, EXCHANGEABLE):
                evidence += f" ({flag})"
    return evidence


def power_text(row: TableRow) -> str:
    """Return what 80% of studies like this one would find: a range where the seeds tell no more;
    nothing where that is beyond the scale.
    """
    if row.test is None or row.mde is None:
        return ""
    low, high = (difference_text(effect, row.unit, signed=False) for effect in row.mde)
    size = high
    certainty = ""
    if low != high:
        size = f"{low.removesuffix(' points')} to {high}"
        certainty = f", as far as {count(row.test.resolved.seeds, 'seed')} tell"
    effect = f"win rate {size} from 50%" if row.head_to_head else f"true difference of {size}"
    return f" 80% of such studies would find a {effect}{certainty}."


def training_text(row: TableRow) -> str:
    """Return what a sentence about arms that were trained once adds; nothing of several."""
    if row.has_several_trainings:
        return ""
    if row.trainings in ((1, 1), (0, 0)):
        return " One training each: this is about these two models; another seed may differ."
    return " One training: another seed may differ."


def near_end_text(row: TableRow) -> str:
    """Return what a margin's sentence adds where both shares lie at one end of their scale."""
    values = [value for value in (row.first_value, row.second_value) if value is not None]
    if row.unit != "share" or row.head_to_head or not values:
        return ""
    if max(values) < NEAR_END:
        return f" Both are below {NEAR_END:.0%}, so the questions hardly tell them apart."
    if min(values) > 1 - NEAR_END:
        return f" Both are above {1 - NEAR_END:.0%}, so the questions hardly tell them apart."
    return ""


def lengths_text(row: TableRow) -> str:
    """Return what a sentence adds where the answers of one arm are far longer."""
    if row.first_length is None or row.second_length is None:
        return ""
    sides = [(row.first_length, row.first), (row.second_length, row.second)]
    (least, shorter), (most, longer) = sorted(sides)
    factor = most / max(least, 1.0)
    if factor <= FAR_LONGER:
        return ""
    medians = f"medians of {most:,.0f} and {least:,.0f} characters"
    return f" Answers of {longer} are {factor:.1f} times as long as those of {shorter} ({medians})."
