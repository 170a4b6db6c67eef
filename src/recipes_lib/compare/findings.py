"""What a check of a comparison can say: one finding, with its severity, its evidence and its
remedy.

Findings are made by `compare/validity/`, stop sentences in `compare/claims.py`, and are printed by
the report and by `recipes compare`. An error stops the causal sentence of the rows it touches,
never the table; a warning stands beside them; a note informs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing found about a comparison.

    `code` names the kind of finding (the table in docs/studies.md), `title` says it in one
    sentence, `evidence` holds what was seen, a line each, and `remedy` what to do. `arms` and
    `metrics` say which rows it touches; empty means all of them.
    """

    code: str
    severity: Severity
    title: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""
    arms: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def touches(self, arms: Iterable[str], metric: str) -> bool:
        """Whether a row that compares these arms on this metric is concerned.

        A finding that names two arms or more concerns the rows between them; one that names a
        single arm every row with that arm.
        """
        if self.metrics and metric not in self.metrics:
            return False
        compared = set(arms)
        return not self.arms or len(compared & set(self.arms)) >= min(2, len(set(self.arms)))


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings without repetition, errors first, in a stable order."""
    return sorted(
        dict.fromkeys(findings),
        key=lambda finding: (
            SEVERITIES.index(finding.severity),
            finding.code,
            finding.arms,
            finding.title,
        ),
    )
