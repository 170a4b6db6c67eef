"""Whether a model prefers the chosen one of two answers, on pairs that no training saw: 1 where its
log-probability is above that of the rejected one, 0.5 where they are equal. No judge is asked.

A pair's value is about the model alone, without its base: the accuracy of the implicit reward that
a validation of preference tuning shows is about their ratio. Pairs of one prompt are one
observation in intervals and tests.
"""

import math
from collections.abc import Sequence
from typing import Any

from recipes_lib.config.recipe import DPO
from recipes_lib.core.files import hash_of
from recipes_lib.core.terminal import aligned
from recipes_lib.data.encoding import IGNORED
from recipes_lib.data.rows import PAIR
from recipes_lib.evals.log import UNRESOLVED, EvalLog, Sample
from recipes_lib.evals.models import Model
from recipes_lib.evals.suites import metric_of, shown_rate
from recipes_lib.evals.suites.heldout_loss import HeldOutRows, row_losses


class Preference(HeldOutRows):
    """The preferences of the models of one eval recipe."""

    title = "preference"
    stage = DPO
    bias = "the accuracy on them is biased high"

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        pairs = self.rows_of(model)
        is_mean = self.recipe.suite.log_probability != "sum"
        values: dict[str, list[float]] = {}
        lengths: dict[str, list[int]] = {}
        texts = []  # which a model of another tokenizer reads too
        for name in PAIR:
            answers = pairs[f"{name}_ids"]
            lengths[name] = list(map(len, answers))
            values[name] = _log_probabilities(network, pairs["prompt_ids"], answers)
            if is_mean:
                sums = zip(values[name], lengths[name], strict=True)
                values[name] = [value / length for value, length in sums]
            decoded = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
            texts.append([text.strip() for text in decoded])
        samples = []
        first_pair: dict[str, str] = {}  # of a prompt
        for number, name in enumerate(map(str, pairs["example_id"])):
            chosen = values["chosen"][number]
            rejected = values["rejected"][number]
            first = first_pair.setdefault(hash_of(pairs["prompt_ids"][number]), name)
            value = None
            if math.isfinite(chosen) and math.isfinite(rejected):
                value = 0.5 if chosen == rejected else float(chosen > rejected)
            sample = Sample(
                id=name,
                value=value,
                outcome=UNRESOLVED if value is None else "graded",
                verdicts=(f"chosen {chosen:.4f}, rejected {rejected:.4f}",),
                same_as=first if first != name else "",
            )
            samples.append(sample)
        unit = "per token" if is_mean else "sum"
        accuracy = metric_of(
            "accuracy",
            f"preference for the chosen answer ({unit}) on {self.split or 'held-out'} pairs",
            samples,
            task=f"pairs-{hash_of(texts)[:8]}",
        )
        both = zip(lengths["chosen"], lengths["rejected"], strict=True)
        num_shorter = sum(chosen < rejected for chosen, rejected in both)
        share = num_shorter / len(samples)
        note = f"the chosen answer is the shorter one, in tokens, of {share:.1%} of the pairs"
        return self.log_of([accuracy], model, n=len(samples), notes=(note,))

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        lines = [["model", "pairs", "prefers the chosen answer [95%]"]]
        for log in logs:
            lines.append([log.target, f"{log.n:,}", shown_rate(log.metrics[0])])
        tasks = {log.metrics[0].task for log in logs}
        if len(tasks) == 1:
            return aligned(lines)
        return [*aligned(lines), "", "these models read different pairs: not comparable"]


def _log_probabilities(
    network: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[float]:
    """Return the sums over the tokens of each answer behind its prompt, in nats."""
    rows = []
    labels = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    return [-loss for loss in row_losses(network, rows, labels)]
