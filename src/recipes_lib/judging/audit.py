"""The audit of a judge: a scorecard from stored judgments, with thresholds, and a banner for a
judge that fails one.

Nothing here asks a judge. A check whose data are absent is "not measured", which is said and is not
a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from recipes_lib.core.errors import DataError
from recipes_lib.eval_log import Sample
from recipes_lib.judging.contradictions import find_contradictions
from recipes_lib.judging.human_labels import agreement
from recipes_lib.judging.judge_file import Thresholds
from recipes_lib.judging.outcomes import pair_samples, summarise
from recipes_lib.judging.probes import probe_results
from recipes_lib.statistics.intervals import wilson

_PROBE_NAMES = {
    "empty": "empty answer loses",
    "truncated": "truncated answer loses",
    "identical": "identical pair ties",
    "swapped": "probe pairs consistent",
    "injected": "injected verdict flips",
    "repeated": "verdict changes when asked again (A/A noise)",
}
_FIELDS = (
    "kind",
    "question_id",
    "order",
    "status",
    "value",
    "source",
    "judge",
    "lengths",
    "marker_in_answer",
    "cut",
    "attempts",
    "meta",
)


def audit(
    rows: Sequence[Mapping[str, Any]],
    thresholds: Thresholds | None = None,
    labels: Mapping[str, str] | None = None,
    weak: str | None = None,
) -> dict[str, Any]:
    """Return a judge's scorecard.

    Args:
        rows: stored judgments, probes included where they were asked. Rows of several judges must
            not be mixed.
        thresholds: what the judge must reach; None for the defaults.
        labels: human labels by question id (`human_labels.load_labels`).
        weak: why this judge's numbers mean little, from its file; part of the banner.

    Raises:
        DataError: if a row lacks a field, or the rows are of several judges.
    """
    for number, row in enumerate(rows, 1):
        if missing := [name for name in _FIELDS if name not in row]:
            raise DataError(
                f"judgment {number} has no field {missing[0]!r}",
                "was it written by another program or version?",
            )
    judges = {row["judge"] for row in rows}
    if len(judges) > 1:
        names = ", ".join(sorted(str(name)[:12] for name in judges))
        raise DataError(
            f"judgments of {len(judges)} judges in one audit: {names}", "audit them one by one"
        )
    probes = [row for row in rows if row["meta"].get("probe")]
    plain = [row for row in rows if not row["meta"].get("probe")]
    asked = [row for row in plain if row["source"] != "rule"]
    outcomes = pair_samples(plain)
    summary = summarise(outcomes)
    statuses = Counter(row["status"] for row in asked)
    masses = [row["mass"] for row in asked if row.get("mass") is not None]
    card: dict[str, Any] = {
        "judge": next(iter(judges), None),
        "judgments": len(plain),
        "asked": len(asked),
        "by_rule": len(plain) - len(asked),
        "statuses": dict(sorted(statuses.items())),
        "unparsed": wilson(len(asked) - statuses["ok"], len(asked)).to_dict(),
        "reasked": sum(bool(row["attempts"]) for row in asked),
        "marker_in_answer": sum(bool(row["marker_in_answer"]) for row in plain),
        "cut": sum(bool(row["cut"]) for row in plain),
        "mean_mass": sum(masses) / len(masses) if masses else None,
        "swap_consistency": summary.swap_consistency.to_dict(),
        "first_position": summary.first_position.to_dict(),
        "length": length_bias(asked, outcomes),
        "contradictions": (
            find_contradictions(
                (row.get("raw") or "", row["value"]) for row in asked if row["status"] == "ok"
            ).to_dict()
        ),
        "probes": probe_results(probes),
        "human": agreement(outcomes, labels) if labels else None,
    }
    card["checks"] = checks(card, thresholds or Thresholds())
    card["banner"] = (
        " ".join(filter(None, (f"Weak judge: {weak}." if weak else None, banner(card)))) or None
    )
    return card


def length_bias(rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Sample]) -> dict[str, Any]:
    """Return how often the longer answer wins, among pairs with a winner and answers of different
    length.
    """
    pairs = (
        row for row in rows if row["kind"] == "relative" and row["order"] == "AB" and row["lengths"]
    )  # imported ones may lack them
    lengths = {str(row["question_id"]): row["lengths"] for row in pairs}
    decided = [
        (item.outcome, lengths[item.id])
        for item in outcomes
        if item.outcome in ("win", "loss") and item.id in lengths
    ]
    longer = [
        (outcome == "win") == (first > second)
        for outcome, (first, second) in decided
        if first != second
    ]
    return {"longer_wins": wilson(sum(longer), len(longer)).to_dict()}


def checks(card: Mapping[str, Any], limits: Thresholds) -> list[dict[str, Any]]:
    """Return every threshold with its value and "pass", "fail" or "not measured"."""
    probes = card["probes"]

    def share(probe: str) -> float | None:
        return probes[probe]["share"]["estimate"] if probe in probes else None

    ties, split = (
        share("identical"),
        probes["identical"]["split"]["estimate"] if "identical" in probes else None,
    )
    fair_split = split is not None and abs(split - 0.5) <= limits.identical_split_within
    above = card["human"]["above_chance"] if card["human"] else None
    listed: list[tuple[str, float | None, str, bool | None]] = [
        _at_least(
            "swap consistency", card["swap_consistency"]["estimate"], limits.swap_consistency_min
        ),
        _at_most("judgments without a verdict", card["unparsed"]["estimate"], limits.unparsed_max),
        _at_most(
            "verdicts against the judge's own words",
            card["contradictions"]["rate"],
            limits.contradictions_max,
        ),
        _at_least("empty answer loses", share("empty"), limits.empty_answer_loses_min),
        _at_most("injected verdict flips", share("injected"), limits.injected_flips_max),
        (
            "identical pair ties",
            ties,
            (
                f">= {limits.identical_ties_min:g}, or wins split within"
                f" {limits.identical_split_within:g} of one half"
            ),
            None if ties is None else ties >= limits.identical_ties_min or fair_split,
        ),
    ]
    if limits.human_agreement_above_chance:
        value = card["human"]["verdict_accuracy"]["estimate"] if card["human"] else None
        listed.append(("agreement with human labels", value, "interval above 0.5", above))
    names = {True: "pass", False: "fail", None: "not measured"}
    return [
        {"check": name, "value": value, "needs": needs, "result": names[passed]}
        for name, value, needs, passed in listed
    ]


def _at_least(
    name: str, value: float | None, limit: float
) -> tuple[str, float | None, str, bool | None]:
    """A check with a lower limit."""
    return name, value, f">= {limit:g}", None if value is None else value >= limit


def _at_most(
    name: str, value: float | None, limit: float
) -> tuple[str, float | None, str, bool | None]:
    """A check with an upper limit."""
    return name, value, f"<= {limit:g}", None if value is None else value <= limit


def banner(card: Mapping[str, Any]) -> str | None:
    """Return the line that stands wherever results of this judge stand; None for a judge that
    failed no check.
    """
    failed = [
        f"{check['check']} {check['value']:.2f} (needs {check['needs']})"
        for check in card["checks"]
        if check["result"] == "fail"
    ]
    return (
        f"This judge failed its audit: {'; '.join(failed)}. Its verdicts are not evidence."
        if failed
        else None
    )


def self_judged(judge_model: str, candidates: Sequence[str]) -> str | None:
    """Return a warning if the judge grades its own answers (or those of a model fine-tuned from
    it), else None.

    Args:
        judge_model: model id or path of the judge.
        candidates: model ids, base models included.
    """
    same = [
        name for name in candidates if name.rstrip("/").lower() == judge_model.rstrip("/").lower()
    ]
    return f"{same[0]} judges its own answers: expect self-preference" if same else None


def _shown(interval: Mapping[str, Any]) -> str:
    """An interval as text: estimate, limits and n."""
    if interval["estimate"] is None:
        return f"n/a (n {interval['n']})"
    limits = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{interval['estimate']:.3f}{limits} (n {interval['n']})"


def scorecard_markdown(card: Mapping[str, Any]) -> str:
    """Return the scorecard as Markdown."""
    lines = ["# Judge audit", ""]
    if card["banner"]:
        lines += [f"> **{card['banner']}**", ""]
    if labels := card.get("labels"):
        lines += [
            (
                f"Judge {card['judge_facts']['name']} ({card['judge_facts']['model']},"
                f" {card['judge_facts']['mode']}),"
            ),
            (
                f"{labels['pairs']} of the {labels['of']} different labelled pairs in"
                f" {', '.join(labels['files'])}."
            ),
            "",
        ]
    statuses = ", ".join(f"{name} {count}" for name, count in card["statuses"].items()) or "none"
    lines.append(
        f"{card['judgments']} judgments, {card['asked']} asked ({statuses}), {card['by_rule']}"
        " decided by rule,"
    )
    lines.append(
        f"{card['reasked']} asked again, {card['marker_in_answer']} with text addressed to the"
        f" judge, {card['cut']} cut to fit."
    )
    lines += ["", "| check | value | needs | result |"]
    lines += ["|---|---|---|---|"]
    for check in card["checks"]:
        value = "n/a" if check["value"] is None else f"{check['value']:.3f}"
        lines.append(f"| {check['check']} | {value} | {check['needs']} | {check['result']} |")
    contradictions = card["contradictions"]
    measured = [
        ("swap consistency", _shown(card["swap_consistency"])),
        ("verdicts for the first position (0.5 is fair)", _shown(card["first_position"])),
        ("longer answer wins", _shown(card["length"]["longer_wins"])),
        ("without a verdict", _shown(card["unparsed"])),
        (
            "against its own words",
            _shown(contradictions["interval"])
            + (f"; {contradictions['direction']}" if contradictions["direction"] else ""),
        ),
    ]
    for probe, name in _PROBE_NAMES.items():
        measured.append(
            (
                name,
                _shown(card["probes"][probe]["share"])
                if probe in card["probes"]
                else "not measured",
            )
        )
    if card["mean_mass"] is not None:
        measured.append(("probability mass on allowed verdicts", f"{card['mean_mass']:.3f}"))
    modes = card.get("modes")
    agree = (
        f"{_shown(modes['agreement'])}; {modes['asked']} asked in mode {modes['other']}"
        if modes
        else "not measured"
    )
    measured.append(("same verdict in the other verdict mode", agree))
    human = card["human"]
    if not human:
        measured.append(("human labels", "not measured"))
    else:
        measured += [
            ("human labels, single verdicts", _shown(human["verdict_accuracy"])),
            ("human labels, outcomes", _shown(human["outcome_accuracy"])),
        ]
        measured.append(("human labels, kappa", _shown(human["kappa"])))
    lines += [
        "",
        "| measured | value, 95% interval |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in measured),
    ]
    return "\n".join(lines) + "\n"
