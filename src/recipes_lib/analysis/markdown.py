"""A conclusion as Markdown: report.md, and a comment for a pull request."""

import re

from recipes_lib.analysis.claims import Conclusion
from recipes_lib.analysis.lines import pair_rows, score_rows, table_of_tests
from recipes_lib.core.terminal import printable


def report_markdown(conclusion: Conclusion) -> str:
    """Return the question, the answer, what cannot be said, the tables and the findings."""
    blocks = [f"# {_escaped(conclusion.question)}"]
    blocks += [_escaped(sentence) for sentence in conclusion.answer]
    if conclusion.cannot_say:
        lines = [f"- {_escaped(line)}" for line in conclusion.cannot_say]
        blocks += ["**What cannot be said**", "\n".join(lines)]
    for (first, second), claims in conclusion.pairs.items():
        blocks += [f"**{_escaped(first)} against {_escaped(second)}**", _table(pair_rows(claims))]
    if not conclusion.claims:
        blocks.append(_table(score_rows(conclusion)))
    elif not conclusion.descriptive:
        blocks.append(table_of_tests(conclusion.table))
    lines = []
    for finding in conclusion.findings:
        line = f"- {finding.severity}: {_escaped(finding.title)}"
        if finding.severity != "note" and finding.remedy:
            line += f" ({_escaped(finding.remedy)})"
        lines.append(line)
    if lines:
        blocks += ["**Findings**", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [_line(head), "|" + " --- |" * len(head)]
    lines += [_line(row) for row in body]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """One line of plain text: names of arms and metrics are no markup."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*|<>])", r"\\\1", line)
