"""The loss on rows that no training saw: one forward pass per row, paired row by row.

A row's value is its negative log-likelihood over the mean number of supervised tokens of a row, so
that the mean over rows is the loss per token. A row that repeats the tokens of another shares its
observation in intervals and tests. Models of two tokenizers have bits per byte of the same text.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from recipes_lib.config.recipe import DPO, SFT, Recipe, Stage
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of
from recipes_lib.core.terminal import aligned
from recipes_lib.data.encoding import IGNORED
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.sources import source_hashes
from recipes_lib.data.splits import TRAIN
from recipes_lib.evals.log import EvalLog, Metric, Sample
from recipes_lib.evals.models import Model
from recipes_lib.evals.questions import chosen_places
from recipes_lib.evals.recipe import HELD_OUT, ROW_SUITES
from recipes_lib.evals.suites import Suite, metric_of, shown_rate

_POSITIONS = 512  # of a row, whose logits are in float32 at the same time


class HeldOutRows(Suite):
    """A suite that reads rows as training does, of a split of the models' recipes or of a file."""

    stage: ClassVar[Stage] = SFT  # of the recipes that have such rows
    bias: ClassVar[str]  # of its numbers on rows that chose a checkpoint

    def prepare(self, models: Sequence[Model]) -> None:
        """Find the rows of each model: a base reads the rows of a run trained on it, preferably one
        with the same prompt format.
        """
        questions = str(self.recipe.data.questions)
        self.split = questions if questions in HELD_OUT else None
        # whose rows a model reads, by its name
        self.recipes = {model.name: self._recipe_of(model, models) for model in models}

    def _recipe_of(self, model: Model, models: Sequence[Model]) -> Recipe:
        """The recipe whose rows a model reads."""
        if model.trained:
            return model.recipe
        base = model.recipe.model.name_or_path
        runs = [run for run in models if run.trained and run.recipe.model.name_or_path == base]
        if runs:
            in_its_format = [run for run in runs if run.prompt_hash == model.prompt_hash]
            return (in_its_format or runs)[0].recipe
        if self.split:
            what = f"'{model.word}' has no recipe, so no {self.split} split"
            hint = "name a file of rows, or `base` beside its runs"
            raise self.recipe.document.error("data.questions", what, hint)
        return model.recipe

    def reads(self, model: Any) -> Any:
        """Return where the rows come from, and their files: a base reads those of a run."""
        source = self.recipes[model.name]
        files = source_hashes(source.data) if self.split else None
        return [source.data.model_dump(), source.train.get("max_length"), files]

    def rows_of(self, model: Model) -> dict[str, list[Any]]:
        """Return the rows that a model reads, tokenized for it, by column."""
        source = self.recipes[model.name]
        if self.split and source.stage != self.stage:
            held_out = f"the {self.split} rows of {model.name}"
            if self.stage == DPO:
                what = f"{held_out} have one answer each, so none is preferred"
                raise RecipeError(what, "name a file of pairs (data.questions)")
            what = f"{held_out} are pairs, whose loss is not that of rows"
            raise RecipeError(what, "name a file of rows with one answer (data.questions)")
        if self.split is None:
            source = source.reading(str(self.recipe.path_of("data.questions")), self.stage)
        rows = getattr(prepare_data(source, model.tokenizer), self.split or TRAIN)
        if not rows:
            raise RecipeError(
                f"the recipe of {model.name} holds out no {self.split} rows",
                f"set data.split.{self.split} to a share of the rows, or name a file of rows",
            )
        most = self.recipe.data.max_questions
        columns: dict[str, list[Any]] = rows[:]
        if most:
            places = chosen_places([hash_of(name) for name in columns["example_id"]], most)
            columns = {key: [values[place] for place in places] for key, values in columns.items()}
        return columns

    def log_of(self, metrics: Sequence[Metric], model: Model, n: int, **facts: Any) -> EvalLog:
        """Return the log of one model, which says what its rows are not."""
        limit = self.recipe.data.max_questions
        banners: tuple[str, ...] = ()
        has_chosen = model.trained and model.recipe.train.get("load_best_model_at_end")
        if self.split == "validation" and has_chosen:
            noun = ROW_SUITES[self.recipe.suite.name]
            rows = f"the validation {noun}s chose the checkpoint"
            banners = (f"{rows}: {self.bias}",)
        return self.new_log(
            metrics,
            n=n,
            subset=f"subset, {limit} rows in the order of a hash" if limit else None,
            banners=banners,
            **facts,
        )


class HeldoutLoss(HeldOutRows):
    """The held-out loss of the models of one eval recipe."""

    title = "held-out loss"
    bias = "the loss on them is biased low"

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model."""
        rows = self.rows_of(model)
        supervised = []
        for labels in rows["labels"]:
            # nothing predicts the first token
            supervised.append([label for label in labels[1:] if label != IGNORED])
        if not any(supervised):
            raise RecipeError(
                f"none of the {len(supervised):,} rows that {model.name} reads has a token with"
                " loss",
                "look at them: recipes data RECIPE --show 1; raise train.max_length if rows are cut"
                " before the answer begins",
            )
        keys = [hash_of(*row) for row in zip(rows["input_ids"], rows["labels"], strict=True)]
        nats = row_losses(network, rows["input_ids"], rows["labels"])
        first_row: dict[str, str] = {}  # with these tokens and labels
        losses = []
        for key, name, value in zip(keys, map(str, rows["example_id"]), nats, strict=True):
            earlier = first_row.setdefault(key, name)
            same_as = earlier if earlier != name else ""
            losses.append(Sample(id=name, value=value, outcome="graded", same_as=same_as))
        loss = self._metric(
            "loss",
            "loss per token",
            losses,
            unit="tokens",
            sizes=[len(row) for row in supervised],
            nats_of_a_unit=1.0,
            paired_by=keys,
        )
        metrics = [loss]
        # the supervised tokens as text, which another tokenizer has too
        texts = model.tokenizer.batch_decode(supervised, skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        if any(texts):  # else the supervised tokens are all special, and have no bytes
            bits = self._metric(
                "bits_per_byte",
                "bits per byte",
                losses,
                unit="bytes",
                sizes=[len(text.encode(errors="replace")) for text in texts],
                nats_of_a_unit=math.log(2),
                paired_by=texts,
                instead_of="loss",
            )
            metrics.append(bits)
        return self.log_of(metrics, model, n=len(losses))

    def _metric(
        self,
        name: str,
        label: str,
        losses: Sequence[Sample],
        *,
        unit: str,
        sizes: Sequence[int],
        nats_of_a_unit: float,
        paired_by: Sequence[str],
        instead_of: str = "",
    ) -> Metric:
        """A metric of the losses: each row's over the mean size of a row.

        Args:
            losses: of the rows, in nats.
            unit: of the sizes.
            sizes: tokens or bytes of each row.
            paired_by: what two models must share to be compared; its hash is in the task.
            instead_of: the metric that is compared in its place where two models share that.
        """
        mean_size = nats_of_a_unit * sum(sizes) / len(sizes)
        samples = []
        for loss, size in zip(losses, sizes, strict=True):
            value = (loss.value or 0.0) / mean_size
            samples.append(replace(loss, value=value, verdicts=(f"{size} {unit}",)))
        return metric_of(
            name,
            f"{label} on {self.split or 'held-out'} rows",
            samples,
            instead_of=instead_of,
            task=f"{unit}-{hash_of(paired_by)[:8]}",
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
        tasks = {log.metrics[0].task for log in logs}
        if len(tasks) == 1:
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
                token_losses = torch.nn.functional.cross_entropy(
                    logits[part].float(), wanted[part], reduction="none"
                )
                parts.append(token_losses.double())
        losses.append(float(torch.cat(parts).sum()) if parts else 0.0)
    return losses
