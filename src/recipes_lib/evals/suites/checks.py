"""Answers checked by rules over rows of your own: no judge, one answer per row.

An answer passes if it passes every check of its row (docs/evaluation.md has examples).
"""

from collections.abc import Sequence

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.faults import FORM_ONLY
from recipes_lib.evals.log import UNRESOLVED, EvalLog, Sample
from recipes_lib.evals.rules import see_form_alone
from recipes_lib.evals.suites import Suite, metric_of, shown_rate


class Checks(Suite):
    """The checks of one eval recipe's rows."""

    title = "checks"

    def log(self, answers: Answers) -> EvalLog:
        """Return the log of one model's answers."""
        questions = self.chosen.questions
        samples = []
        for question in questions:
            place = question.id, 1
            text = answers.text(place)
            value = None
            outcome = UNRESOLVED
            # a question that will never be answered neither passes nor fails
            verdict = f"no answer: {answers.unanswered.get(place)}"
            if text is not None:
                failed = [rule.check for rule in question.checks if not rule.passes(text)]
                verdict = f"fails {', '.join(failed)}" if failed else "passes"
                value = float(not failed)
                outcome = "graded"
            sample = Sample(
                id=question.id,
                category=question.category,
                value=value,
                outcome=outcome,
                verdicts=(verdict,),
                by_rule=True,
                cut=place in answers.cut,
                input=question.turns[0],
                answer=text,
            )
            samples.append(sample)
        rate = metric_of("pass_rate", f"pass rate on {self.recipe.name}", samples)
        passing = [str(sample.answer) for sample in samples if sample.value]
        form_only = see_form_alone([question.checks for question in questions], passing)
        return self.new_log([rate], n=len(questions), notes=(FORM_ONLY,) if form_only else ())

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        head = ["model", "n", "pass rate [95%]"]
        rows = [[log.target, str(log.n), shown_rate(log.metrics[0])] for log in logs]
        return aligned([head, *rows])
