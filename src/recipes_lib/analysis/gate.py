"""Whether arms may take the place of a baseline: for `study report --gate`, `compare --gate`."""

from collections.abc import Iterable, Sequence

from recipes_lib.analysis.aims import is_named
from recipes_lib.analysis.claims import Claim, Conclusion
from recipes_lib.core.errors import ExitCode


def gate(
    conclusion: Conclusion, arms: Sequence[str], baseline: str, metrics: Iterable[str]
) -> tuple[ExitCode, list[str]]:
    """Return 0; or 1 and each arm that is worse than the baseline, also where a finding stops the
    sentence, or not shown to hold its margin; or 6 and each arm that cannot be tested. `metrics`
    are those whose margins have to hold.

    An observed difference within the margin is not enough: the interval has to lie within it.
    """
    failed: list[str] = []
    untested: list[str] = []
    for arm in arms:
        if arm == baseline:
            continue
        claims = []
        for claim in conclusion.claims:
            if {*claim.row.arms} == {arm, baseline} and not claim.row.aside:
                claims.append(claim)
        if not any(claim.row.is_tested for claim in claims):
            what = f"no comparison of {arm} with {baseline} can be tested"
            untested.append(f"{what}: see the report")
        failed += [claim.sentence for claim in claims if claim.worse_than(baseline)]
        for word in metrics:
            failed += _margins_not_shown(word, claims, arm, baseline)
    if untested:
        return ExitCode.EVALUATION_INCOMPLETE, untested + failed
    if failed:
        return ExitCode.FAILED, failed
    return ExitCode.DONE, [f"passed: no arm is shown to be worse than {baseline}"]


def _margins_not_shown(word: str, claims: Sequence[Claim], arm: str, baseline: str) -> list[str]:
    """A line for each comparison that has the margin of a metric and does not show that it holds;
    one that is worse has a line already.
    """
    with_margin = []
    for claim in claims:
        if claim.row.margin is not None and is_named(word, claim.row.metric):
            with_margin.append(claim)
    if not with_margin:
        return [f"not shown: no comparison of {arm} on {word}"]
    lines = []
    for claim in with_margin:
        if not claim.worse_than(baseline) and not claim.not_worse_than(baseline):
            lines.append(f"not shown: {claim.sentence}")
    return lines
