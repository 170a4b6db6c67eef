"""The loss on rows that no training saw: one forward pass per row, paired row by row.

A row's value is its negative log-likelihood over the mean number of supervised tokens of a row, so
that the mean over rows is the loss per token. A row that repeats the tokens of another shares its
observation in intervals and tests. Models of two tokenizers have bits per byte of the same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of
from recipes_lib.core.terminal import aligned
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.sources import source_hashes
from recipes_lib.data.splits import TRAIN
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.models import Model
from recipes_lib.evals.recipe import HELD_OUT
from recipes_lib.evals.suites import Suite, metric_of, shown_rate

_POSITIONS = 512  # of a row, whose logits are in float32 at the same time


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
        """Return where the rows come from, and their files: a base reads those of a run."""
        source = self.recipes[model.name]
        files = source_hashes(source.data) if self.split else None
        return [source.data.model_dump(), source.train.get("max_length"), files]

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        limit, source = self.recipe.data.max_questions, self.recipes[model.name]
        if self.split is None:
            source = source.reading(str(self.recipe.path_of("data.questions")))
        rows = getattr(prepare_data(source, model.tokenizer), self.split or TRAIN)
        if not rows:
            raise RecipeError(
                f"the recipe of {model.name} holds out no {self.split} rows",
                f"set data.split.{self.split} to a share of the rows, or name a file of rows",
            )
        rows = rows[:limit]
        names, tokens, labels = (rows[key] for key in ("example_id", "input_ids", "labels"))
        supervised = [[label for label in row[1:] if label != -100] for row in labels]
        if not any(supervised):
            raise RecipeError(
                f"none of the {len(rows):,} rows that {model.name} reads has a token with loss",
                "look at them: recipes data RECIPE --show 1; raise train.max_length if rows are cut"
                " before the answer begins",
            )
        texts = model.tokenizer.batch_decode(supervised, skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        first: dict[str, str] = {}  # the first row with these tokens
        keys = [hash_of(*row) for row in zip(tokens, labels, strict=True)]
        same = [first.setdefault(key, str(name)) for key, name in zip(keys, names, strict=True)]
        nats = row_losses(network, tokens, labels)
        lengths, metrics = list(map(len, supervised)), []
        num_bytes = [len(text.encode(errors="replace")) for text in texts]
        for metric, label, instead_of, unit, scale, sizes, read in (
            ("loss", "loss per token", "", "tokens", 1.0, lengths, keys),
            ("bits_per_byte", "bits per byte", "loss", "bytes", math.log(2), num_bytes, texts),
        ):
            if not any(sizes):
                continue  # the supervised tokens are all special: no text, so no bytes
            mean = scale * sum(sizes) / len(sizes)
            samples = [
                Sample(
                    str(name),
                    value=loss / mean,
                    outcome="graded",
                    verdicts=(f"{size} {unit}",),
                    same_as="" if earlier == str(name) else earlier,
                )
                for name, loss, size, earlier in zip(names, nats, sizes, same, strict=True)
            ]
            known = {"higher_is_better": False, "instead_of": instead_of}
            known["task"] = f"{unit}-{hash_of(read)[:8]}"
            label = f"{label} on {self.split or 'held-out'} rows"
            metrics.append(metric_of(metric, label, samples, "number", **known))
        chosen = model.trained and model.recipe.train.get("load_best_model_at_end")
        note = "the validation rows chose the checkpoint: the loss on them is biased low"
        return self.new_log(
            metrics,
            n=len(names),
            subset=f"subset, the first {limit} rows" if limit else None,
            banners=(note,) if self.split == "validation" and chosen else (),
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        lines = [["model", "rows", "loss per token [95%]", "bits per byte"]]
        for log in logs:
            rates = [shown_rate(metric, 4, metric.unit) for metric in log.metrics]
            if len(rates) == 1:
                rates.append("-")  # no text, so no bytes
            lines.append([log.target, f"{log.n:,}", *rates])
        if len({log.metrics[0].task for log in logs}) == 1:
            return aligned(lines)
        what = "their losses per token are not comparable, bits per byte of the same text are"
        return [*aligned(lines), "", f"these models read different rows or tokens: {what}"]


def row_losses(
    model: Any, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[float]:
    """Return the sum of the negative log-likelihoods of each row's supervised tokens, in nats."""
    import torch

    losses = []
    for row, targets in zip(input_ids, labels, strict=True):
        ids = torch.tensor(row, device=model.device)
        wanted = torch.tensor(targets[1:], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            # float32 for some positions at a time: for all of 8,192 and 152,000 words it is 5 GB,
            # and as much again for the softmax
            parts = []
            for start in range(0, len(wanted), _POSITIONS):
                part = slice(start, start + _POSITIONS)
                each = torch.nn.functional.cross_entropy(
                    logits[part].float(), wanted[part], reduction="none"
                )
                parts.append(each.double())
        losses.append(float(torch.cat(parts).sum()) if parts else 0.0)
    return losses
