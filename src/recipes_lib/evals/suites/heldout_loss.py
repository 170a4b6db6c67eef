"""The loss on rows that no training saw: one forward pass per model, paired row by row.

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
from dataclasses import replace
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of
from recipes_lib.core.terminal import aligned
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.splits import TRAIN
from recipes_lib.evals.log import EvalLog, Metric, Sample
from recipes_lib.evals.models import Model
from recipes_lib.evals.recipe import HELD_OUT
from recipes_lib.evals.suites import Suite
from recipes_lib.evals.verdicts import metric_of, number, shown_rate

LOSS = "loss"
_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # logits of a vocabulary are much larger than a cache


class HeldoutLoss(Suite):
    """The held-out loss of the models of one eval recipe."""

    title = "held-out loss"

    def prepare(self, models: Sequence[Model]) -> None:
        """Find the rows of each model: a base that is no run reads those of a run on it."""
        name = str(self.recipe.data.questions)
        self.split = name if name in HELD_OUT else None
        self.recipes: dict[str, Recipe] = {}  # whose rows a model reads, by its name
        runs: dict[object, Recipe] = {}  # by base, and by base and prompt format
        for model in sorted(models, key=lambda model: not model.trained):
            base, own = model.recipe.model.name_or_path, model.recipe if model.trained else None
            asked = (base, model.prompts.hash)
            runs |= {base: own, asked: own} if own else {}
            own = own or runs.get(asked) or runs.get(base)
            if own is None and self.split:
                what = f"'{model.word}' has no recipe, so no {self.split} split"
                hint = "name a file of rows, or `base` beside its runs"
                raise self.recipe.error("data.questions", what, hint)
            self.recipes[model.name] = own or model.recipe

    def reads(self, model: Any) -> Any:
        """Return where the rows come from: a base reads those of a run."""
        source = self.recipes[model.name]
        return [source.data.model_dump(), source.train.get("max_length")]

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        limit, source = self.recipe.data.max_questions, self.recipes[model.name]
        if self.split is None:
            source = source.reading(str(self.recipe.path_of("data.questions")))
        rows = getattr(prepare_data(source, model.prompts.tokenizer), self.split or TRAIN)
        if not rows:
            raise RecipeError(
                f"the recipe of {model.name} holds no {self.split} rows out",
                f"data.split.{self.split} is their share of the rows; or name a file of rows",
            )
        rows = rows[:limit]
        tokens, labels = rows["input_ids"], rows["labels"]
        supervised = [[label for label in row[1:] if label != -100] for row in labels]
        texts = model.prompts.tokenizer.batch_decode(supervised, skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        names = [str(name) for name in rows["example_id"]]
        first: dict[str, str] = {}  # the first row with these tokens
        same = [
            first.setdefault(hash_of(*row), name)
            for name, *row in zip(names, tokens, labels, strict=True)
        ]
        nats = row_losses(network, tokens, labels)
        bits = [loss / math.log(2) for loss in nats]
        num_bytes = [len(text.encode(errors="replace")) for text in texts]
        where = f"on {self.split or 'held-out'} rows"

        def metric(losses: list[float], sizes: list[int], unit: str, **known: Any) -> Metric:
            mean, samples = sum(sizes) / len(sizes), []
            for name, loss, size, earlier in zip(names, losses, sizes, same, strict=True):
                sample = Sample(name, value=loss / mean, same_as="" if earlier == name else earlier)
                verdicts = (f"{size} {unit}",)
                samples.append(replace(sample, outcome="graded", verdicts=verdicts))
            return metric_of(samples=samples, unit="number", higher_is_better=False, **known)

        label, task = f"loss per token {where}", f"tokens-{hash_of(tokens)[:8]}"
        lengths = list(map(len, supervised))
        metrics = [metric(nats, lengths, "tokens", metric=LOSS, label=label, task=task)]
        if any(num_bytes):
            label, task = f"bits per byte {where}", f"text-{hash_of(texts)[:8]}"
            known = {"metric": "bits_per_byte", "label": label, "task": task, "instead_of": LOSS}
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
        rows = [["model", "rows", "tokens", "loss per token [95%]", "perplexity", "bits per byte"]]
        repeated = 0
        for log in logs:
            loss, *others = log.metrics
            tokens = sum(int(sample.verdicts[0].split()[0]) for sample in loss.samples)
            repeated = max(repeated, sum(bool(sample.same_as) for sample in loss.samples))
            cells = [log.target, f"{len(loss.samples):,}", f"{tokens:,}"]
            perplexity = math.exp(min(loss.value or 0.0, 700.0))
            cells += [shown_rate(loss, 4, loss.unit), number(perplexity)]
            rows.append([*cells, number(others[0].value if others else None, 4)])
        lines = aligned(rows)
        if repeated:
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
    from torch.nn.utils.rnn import pad_sequence

    device = model.device
    limit = _BATCH_TOKENS.get(device.type, 8192)
    waiting = sorted(range(len(input_ids)), key=lambda row: -len(input_ids[row]))
    losses = [0.0] * len(waiting)

    def padded(rows: list[Sequence[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value).to(device)

    while waiting:
        size = max(1, limit // len(input_ids[waiting[0]]))
        batch, waiting = waiting[:size], waiting[size:]
        tokens = [input_ids[row] for row in batch]
        mask = padded([[1] * len(row) for row in tokens], 0)
        targets = padded([labels[row] for row in batch], -100)[:, 1:]
        with torch.inference_mode():
            logits = model(input_ids=padded(tokens, 0), attention_mask=mask, use_cache=False).logits
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
            )
        for row, loss in zip(batch, each.view_as(targets).double().sum(-1), strict=True):
            losses[row] = float(loss)
    return losses
