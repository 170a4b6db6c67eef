"""The loss on rows that no training saw: one forward pass per row, paired row by row.

`data.questions` is `test` or `validation`, a split of the run's own recipe, or a file of rows in
the recipe's format. The validation rows may have chosen a checkpoint or a learning rate: the test
rows did not.

A row's value is its negative log-likelihood over the mean number of supervised tokens of a row, so
that the mean over rows is the loss per token. A row that repeats the tokens of another shares its
observation in intervals and tests. Models of two tokenizers have bits per byte of the same text
instead, without special tokens and the space around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of
from recipes_lib.core.terminal import aligned
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.splits import TRAIN
from recipes_lib.evals.log import EvalLog, Metric, Sample
from recipes_lib.evals.models import Model
from recipes_lib.evals.recipe import HELD_OUT
from recipes_lib.evals.suites import Suite, metric_of, number, shown_rate


class HeldoutLoss(Suite):
    """The held-out loss of the models of one eval recipe."""

    title = "held-out loss"

    def prepare(self, models: Sequence[Model]) -> None:
        """Find the rows of each model: a base that is no run reads those of a run on it, of one
        that is asked as it is where there are several.
        """
        name = str(self.recipe.data.questions)
        self.split = name if name in HELD_OUT else None
        self.recipes = {}  # whose rows a model reads, by its name
        for model in models:
            base, asked = model.recipe.model.name_or_path, model.prompt_hash
            runs = [run for run in models if run.trained and run.recipe.model.name_or_path == base]
            runs = (
                [model] if model.trained else sorted(runs, key=lambda run: run.prompt_hash != asked)
            )
            if self.split and not runs:
                what = f"'{model.word}' has no recipe, so no {self.split} split"
                hint = "name a file of rows, or `base` beside its runs"
                raise self.recipe.document.error("data.questions", what, hint)
            self.recipes[model.name] = (*runs, model)[0].recipe

    def reads(self, model: Any) -> Any:
        """Return where the rows come from: a base reads those of a run."""
        source = self.recipes[model.name]
        return [source.data.model_dump(), source.train.get("max_length")]

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        limit, source = self.recipe.data.max_questions, self.recipes[model.name]
        if self.split is None:
            source = source.reading(str(self.recipe.path_of("data.questions")))
        rows = getattr(prepare_data(source, model.tokenizer), self.split or TRAIN)
        if not rows:
            raise RecipeError(
                f"the recipe of {model.name} holds no {self.split} rows out",
                f"data.split.{self.split} is their share of the rows; or name a file of rows",
            )
        rows = rows[:limit]
        names, tokens, labels = (rows[key] for key in ("example_id", "input_ids", "labels"))
        supervised = [[label for label in row[1:] if label != -100] for row in labels]
        texts = model.tokenizer.batch_decode(supervised, skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        first: dict[str, str] = {}  # the first row with these tokens
        keys = [hash_of(*row) for row in zip(tokens, labels, strict=True)]
        same = [first.setdefault(key, str(name)) for key, name in zip(keys, names, strict=True)]

        def metric(losses: list[float], sizes: list[int], unit: str, **known: Any) -> Metric:
            mean, samples = sum(sizes) / len(sizes), []
            for name, loss, size, earlier in zip(names, losses, sizes, same, strict=True):
                sample = Sample(
                    str(name),
                    value=loss / mean,
                    outcome="graded",
                    verdicts=(f"{size} {unit}",),
                    same_as="" if earlier == str(name) else earlier,
                )
                samples.append(sample)
            return metric_of(samples=samples, unit="number", higher_is_better=False, **known)

        where, nats = f"on {self.split or 'held-out'} rows", row_losses(network, tokens, labels)
        label, task = f"loss per token {where}", f"tokens-{hash_of(tokens)[:8]}"
        lengths = list(map(len, supervised))
        metrics = [metric(nats, lengths, "tokens", metric="loss", label=label, task=task)]
        num_bytes = [len(text.encode(errors="replace")) for text in texts]
        if any(num_bytes):
            label, task = f"bits per byte {where}", f"text-{hash_of(texts)[:8]}"
            known = {"metric": "bits_per_byte", "label": label, "task": task, "instead_of": "loss"}
            bits = [loss / math.log(2) for loss in nats]
            metrics.append(metric(bits, num_bytes, "bytes", **known))
        chosen = model.trained and model.recipe.train.get("load_best_model_at_end")
        note = "the validation rows chose the checkpoint: the loss on them is too good"
        return EvalLog(
            suite=self.recipe.suite.name,
            eval=self.recipe.name,
            n=len(names),
            subset=f"subset, the first {limit} rows" if limit else None,
            banners=(note,) if self.split == "validation" and chosen else (),
            metrics=tuple(metrics),
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [["model", "rows", "tokens", "loss per token [95%]", "bits per byte"]]
        for log in logs:
            loss, *others = log.metrics
            tokens = sum(int(sample.verdicts[0].split()[0]) for sample in loss.samples)
            per_byte = number(others[0].value if others else None, 4)
            cells = [log.target, f"{log.n:,}", f"{tokens:,}", shown_rate(loss, 4, loss.unit)]
            rows.append([*cells, per_byte])
        lines, samples = aligned(rows), logs[0].metrics[0].samples
        if repeated := sum(bool(sample.same_as) for sample in samples):
            what = "every text is one observation in the intervals and tests"
            lines += ["", f"{repeated:,} of the rows repeat the text of another: {what}"]
        if len({log.metrics[0].task for log in logs}) > 1:
            what = "their losses per token are not comparable, bits per byte of the same text are"
            lines += ["", f"these models read other rows or other tokens: {what}"]
        return lines


def row_losses(
    model: Any, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[float]:
    """Return the sum of the negative log-likelihoods of each row's supervised tokens, in nats."""
    import torch

    losses = []
    for row, targets in zip(input_ids, labels, strict=True):
        ids, wanted = (torch.tensor(values, device=model.device) for values in (row, targets[1:]))
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        losses.append(float(each.double().sum()))
    return losses
