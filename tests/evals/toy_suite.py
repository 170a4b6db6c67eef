"""A suite as somebody would add it: how many letters the answers have."""

from collections.abc import Sequence

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.suites import Suite, metric_of, shown_rate


class Toy(Suite):
    """Letters per answer."""

    title = "letters"

    def log(self, answers: Answers) -> EvalLog:
        """Return the log of one model's answers."""
        samples = [
            Sample(question.id, value=float(len(answers.texts[question.id, 1])), outcome="graded")
            for question in self.chosen.questions
        ]
        letters = metric_of("letters", f"letters on {self.recipe.name}", samples, "number")
        return EvalLog(suite="toy", eval=self.recipe.name, n=len(samples), metrics=(letters,))

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [[log.target, shown_rate(log.metrics[0], unit="number")] for log in logs]
        return aligned([["model", "letters"], *rows])
