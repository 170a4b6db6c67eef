"""What a check of a comparison can say: the kinds of findings, with their texts.

`compare/validity/` finds them, `compare/claims.py` stops sentences by them, the report and
`recipes compare` print them. An error stops the causal sentence of the rows it touches, never the
table; a warning stands beside them; a note informs. docs/studies.md says when each is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
NOT_AUDITED = "judge-not-audited"
INSIDE_NOISE = "inside-noise-floor"
LONGER_ANSWERS = "longer-answers"  # its title follows the sentences that it touches
CONFOUNDED = "confound"  # codes that start so leave no cause, errors among them an association
FALSE_CLAIMS = "false-claims"
ONE_MODEL = "identical"  # codes that start so leave nothing to compare

_ANEW = (
    "they cannot be ranked as different: find out which arm it belongs to, and make the other's"
    " anew"
)
_STRONGER_JUDGE = "use a stronger judge, or show with human labels that it can be believed"
_READ_ANSWERS = "look at the answers; raise generation.max_new_tokens where they are cut"
_BOTH_ORDERS = (
    "judge both orders (recipes eval does): a judge's preference for a position is part of this"
    " rate"
)
_ALL_SEEDS = "recipes study run {study}: which of its seeds are left may have been a choice"
# Kind: severity, title, remedy. What follows a / in a kind is no part of its code.
FINDING_TEXTS: dict[str, tuple[Severity, str, str]] = {
    # What the recipes and the runs say
    "confound": (
        "error",
        "{first} and {second} also differ in {keys}, which no factor declares",
        "give both arms the same values, or declare them under factors and add the missing cells",
    ),
    "confound-tuning": (
        "error",
        "{first} and {second} were not tuned over the same values",
        "one grid for both: tune under the study's own keys, not under an arm's",
    ),
    "differences": (
        "note",
        "{first} and {second} differ in {keys}: no factor is declared, so no difference has a named"
        " cause",
        "declare what is meant to differ: write a study",
    ),
    "differences/twins": (
        "note",
        "{first} and {second} differ in nothing but the seed: an A/A pair",
        "their difference is the noise floor of every other one",
    ),
    "differences/seed": (
        "note",
        "{first} and {second} were trained with other seeds, which is chance and no cause",
        "the same seeds: both then see the rows in one order",
    ),
    "differences/idle": (
        "note",
        "{first} and {second} differ in {keys}, which changes no result",
        "nothing to do",
    ),
    "confound-factors": (
        "error",
        "{one} is confounded with {other}: they change together in every arm",
        "add arms that change {one} alone and {other} alone",
    ),
    "missing-cell": (
        "warning",
        "{cells} of the factorial {have} no arm",
        "add an arm for each: an effect there cannot be told from the others",
    ),
    "confound-data": (
        "error",
        "Training data differs between {first} and {second}",
        "train both arms on the same rows: the same source, revision and split",
    ),
    "confound-base": (
        "error",
        "Base model's weights differ between {first} and {second}",
        "train both arms from the same files: pin model.revision, or keep the model's folder as it"
        " is",
    ),
    "confound-base/evaluated": (
        "error",
        "{first} was trained on other weights than those evaluated as {second}",
        "evaluate the revision that was trained on (model.revision), or train on the one that was"
        " evaluated",
    ),
    "confound-split": (
        "error",
        "Splits differ between {first} and {second}",
        "use split.method: hash, which holds the same rows out everywhere",
    ),
    "confound-prompt-format": (
        "error",
        "Prompt format in training differs between {first} and {second}",
        "train both arms with one prompt format",
    ),
    "confound-world-size": (
        "warning",
        "Number of processes differ between {first} and {second}",
        "train both arms on the same number of processes: dropout and the order of rows depend on"
        " it",
    ),
    "confound-steps": (
        "error",
        "Number of optimizer steps differ between {first} and {second}",
        "train both arms for as many steps: declare run.global_batch_size, and give both the same"
        " epochs or train.max_steps",
    ),
    "confound-hardware": (
        "warning",
        "Hardware differs between {first} and {second}",
        "train both arms on the same hardware",
    ),
    "confound-versions": (
        "warning",
        "Library versions differ between {first} and {second}",
        "train both arms in one environment",
    ),
    "confound-versions/evaluations": (
        "warning",
        "Library versions differ between the evaluations of {first} and {second}",
        "evaluate both arms in one environment",
    ),
    "code-differs": (
        "note",
        "Version of this code differs between {first} and {second}",
        "train both arms from one commit",
    ),
    "code-differs/evaluations": (
        "note",
        "Version of this code differs between the evaluations of {first} and {second}",
        "evaluate both arms from one commit",
    ),
    "confound-published": (
        "warning",
        "As published, {what} {differ} between {first} and {second}",
        "train both arms here, alike",
    ),
    "loss-of-other-tokens": (
        "error",
        "The validation losses of {first} and {second} are over different tokens",
        "compare answers, or evaluate both on the same tokens",
    ),
    "loss-in-other-precision": (
        "error",
        "The validation losses of {first} and {second} are in different precisions",
        "evaluate both in one precision first",
    ),
    # One thing under two names
    "identical-runs": ("error", "{first} and {second} are one run under two names", _ANEW),
    "identical-adapters": (
        "error",
        "{first} and {second} have the same {folder} under two names",
        _ANEW,
    ),
    "identical-answers": ("error", "{first} and {second} gave the same answers in {eval}", _ANEW),
    "identical-judgments": (
        "error",
        "{first} and {second} have the same judgments in {eval}",
        _ANEW,
    ),
    "identical-models": ("error", "{first} and {second} are the same model", _ANEW),
    "identical-seeds": (
        "error",
        "{n} trainings of {first} ended with the same weights: one training is counted {n} times",
        "did the seed reach the training? train the other seeds anew",
    ),
    "answers-of-another-arm": (
        "error",
        "The same weights answered for {first} and for {second}",
        _ANEW,
    ),
    "answers-of-another-arm/stored": (
        "error",
        "The answers of {first} in {eval} were given by {other}'s weights",
        "delete the file and evaluate the run again",
    ),
    "answers-of-another-arm/opponent": (
        "error",
        "{first} was judged in {eval} against answers that {second} does not give any more",
        "judge it again: recipes eval EVAL {run} --against {against}",
    ),
    # The judge, and how it was asked
    "order-flips": (
        "error",
        "The judge's verdict often changes with the order of the answers in {eval}",
        "use a stronger judge",
    ),
    "unparsed-share": (
        "error",
        "Too many of the judge's texts hold no verdict in {eval}",
        "read some of them (recipes judge audit), or use mode: logits",
    ),
    "contradictory-verdicts": (
        "error",
        "Many verdicts are the opposite of what the judge's own text says in {eval}",
        "read some of them, and judge again with a prompt and a parser of its own format (recipes"
        " eval)",
    ),
    "judge-failed-audit": (
        "error",
        "The judge failed its audit in {eval}",
        _STRONGER_JUDGE,
    ),
    "judge-failed-audit/labels": (
        "error",
        "The judge failed its audit on {labels}",
        _STRONGER_JUDGE,
    ),
    NOT_AUDITED: (
        "error",
        "The audit of the judge of {eval} did not measure {missing}",
        "recipes judge audit --judge JUDGE.yaml --labels FILE... measures every check; then write"
        " the report again",
    ),
    "self-judged": (
        "error",
        "The judge is a model that it judges, or its base, in {eval}",
        "judge with a model of another family",
    ),
    "degenerate-answers": (
        "error",
        "More than a fifth of the answers are one and the same, empty, cut or loop in {eval}",
        _READ_ANSWERS,
    ),
    "degenerate-answers/tenth": (
        "warning",
        "More than a tenth of the answers are one and the same, empty, cut or loop in {eval}",
        _READ_ANSWERS,
    ),
    "longer-answers": (
        "warning",
        "In {eval} {first}'s answers are {times:.1f} times as long as {second}'s{equal}",
        "judges prefer long answers: read the rates at equal length beside the raw ones",
    ),
    "weak-judge": (
        "warning",
        "The judge of {eval} is a weak one",
        "use a judge that can judge (evals/judges/)",
    ),
    "judges-differ": (
        "error",
        "Different judges judged the arms in {eval}",
        "evaluate all arms with one judge",
    ),
    "one-order-judging": (
        "error",
        "Answers were judged in one order only in {eval}, the model's always first",
        _BOTH_ORDERS,
    ),
    "one-order-judging/mixed": (
        "warning",
        "Answers were judged in one order only in {eval}",
        _BOTH_ORDERS,
    ),
    "missing-turn": (
        "warning",
        "{turns} of {first} in {eval} {have} no judgment: {missing}",
        "judge it: a turn that is left out leaves the mean too high or too low",
    ),
    # Questions and settings
    "protocol-differs": (
        "error",
        "{first} and {second} were not asked in the same way: {keys}",
        "evaluate both with one eval recipe (recipes eval)",
    ),
    "protocol-differs/texts": (
        "error",
        "{first} and {second} were asked other questions under the same ids, or judged against"
        " other answers",
        "evaluate both with one eval recipe (recipes eval), after the last change of its files",
    ),
    "precision-of-answers": (
        "warning",
        "{first} and {second} answered in different precisions",
        "part of the difference may be the precision: answer with both in the same one",
    ),
    "questions-differ": (
        "warning",
        "{first} and {second} were asked different questions in {metric}: {n} are the same",
        "only the shared ones are compared; evaluate both on one question set",
    ),
    "leaked-questions": (
        "error",
        "{first} was trained on what it was asked: {what}",
        "take those rows out of the data and train again, or those questions out of the eval",
    ),
    "leaked-questions/few": (
        "warning",
        "{first} was trained on a little of what it was asked: {what}, all of them short",
        "read the rows: two people may ask one short question, and it moves the result by no more"
        " than its share",
    ),
    "leaks-not-measured": (
        "warning",
        "Whether training rows hold questions of {eval} was not measured",
        "recipes data RECIPE --against EVAL where the data is, or recipes eval EVAL RUN again: it"
        " asks nothing twice",
    ),
    "repeated-questions": (
        "warning",
        "{eval} asks questions again under other ids: {n} of {total} are different",
        "ask each once; what stands here counts questions of one text as one",
    ),
    "subset": (
        "warning",
        "{eval} is a subset of its questions",
        "evaluate all of them: no limit, no max_questions",
    ),
    "unfinished-evaluation": (
        "warning",
        "{first} has evaluations without a result: {evals}",
        "run the same command again",
    ),
    "missing-evaluation": (
        "note",
        "{first} was not evaluated with {evals}",
        "recipes eval EVAL RUN",
    ),
    # Chance, and what was chosen
    FALSE_CLAIMS: (
        "error",
        "Copies of this study in which no arm is better hold a claim more often than 5%",
        "its tests do not hold on these data, so nothing is claimed: report it, with the study's"
        " folder",
    ),
    "best-of-many": (
        "warning",
        "The best of {n} arms is flattered by having been chosen",
        "name the winner, and measure it again on other questions or with other seeds before its"
        " lead is quoted",
    ),
    "best-checkpoint": (
        "note",
        "{first} kept the best of {n} checkpoints by its validation loss",
        "its lowest validation loss is flattered too: compare on data that chose nothing",
    ),
    "tuned-at-edge": (
        "warning",
        "{first} is best at the {edge} {key} that was tried, so its best may lie beyond",
        "add a value beyond it to the grid of every arm: only what is new is trained",
    ),
    "tuned-on-validation": (
        "warning",
        "The validation rows chose the {key} of {first}: a loss on them is too good",
        "compare on rows that chose nothing: data.questions: test",
    ),
    "noise-floor-missing": (
        "warning",
        "No noise floor: every arm was trained once, so a difference may be that of two trainings"
        " of one recipe",
        "an A/A run: {how}",
    ),
    INSIDE_NOISE: (
        "warning",
        "{first} and {second} differ on {metric} by no more than two trainings of one recipe do",
        "more seeds per arm make the floor lower; until then this is no effect of the factor",
    ),
    # Arms that were not made here
    "published-only": (
        "error",
        "{first} stands for published numbers alone, and cannot be tested",
        "train it: remove published_only",
    ),
    "confound-missing-runs": (
        "error",
        "{first} has {there} of {wanted} trainings",
        _ALL_SEEDS,
    ),
    "confound-missing-runs/evaluations": (
        "error",
        "{first} has results of {there} of {wanted} trainings in {eval}",
        _ALL_SEEDS,
    ),
    "lost-weights": (
        "warning",
        "{first} recorded a training and has no weights",
        "find its weights, or train it again: what it would have answered is not known",
    ),
}


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


def found(
    kind: str,
    evidence: Iterable[str],
    arms: tuple[str, ...] = (),
    metrics: Iterable[str] = (),
    **words: object,
) -> Finding:
    """Return a finding of a kind.

    Args:
        evidence: what was seen, a line each.
        arms: the arms it touches; its texts call them `first` and `second`.
        metrics: the metrics it touches.
        words: what else its texts name.
    """
    severity, title, remedy = FINDING_TEXTS[kind]
    words |= dict(zip(("first", "second"), arms, strict=False))
    return Finding(
        kind.partition("/")[0],
        severity,
        title.format(**words),
        tuple(evidence),
        remedy.format(**words),
        arms,
        tuple(metrics),
    )


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings without repetition, errors first, in a stable order."""
    return sorted(
        dict.fromkeys(findings),
        key=lambda one: (SEVERITIES.index(one.severity), one.code, one.arms, one.title),
    )
