"""The loss on rows that no training saw: one forward pass per model, paired row by row.

`data.questions` is `test` or `validation`, a split of the run's own recipe, or a file of rows in
the recipe's format. The validation rows may have chosen a checkpoint or a learning rate: the test
rows did not.

Samples are rows. A row's value is its negative log-likelihood over the mean number of supervised
tokens of a row, so that the mean over rows is the loss per token, whatever the rows' lengths. A row
whose tokens stand there before is no new evidence: it keeps its value, and shares the observation
of the first one in intervals and tests.

Losses per token of two tokenizers cannot be compared: their models have bits per byte of the same
text instead (the loss in bits over the bytes of UTF-8 that a row's supervised tokens stand for,
without special tokens and the space around them).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import hash_of
from recipes_lib.core.lock import waiting_lock
from recipes_lib.core.terminal import aligned
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.splits import TRAIN
from recipes_lib.evals.log import AnswerFacts, EvalLog, Metric, Sample, log_file
from recipes_lib.evals.models import Loaded, Model
from recipes_lib.evals.recipe import HELD_OUT, EvalRecipe
from recipes_lib.evals.verdicts import metric_of, number, shown_rate

LOSS = "loss"
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # logits of a vocabulary are much larger than a cache


class HeldoutLoss:
    """The held-out loss of the models of one eval recipe."""

    title = "held-out loss"

    def __init__(self, recipe: EvalRecipe) -> None:
        self.recipe = recipe
        if recipe.generation.engine == "openai":
            what = "heldout_loss needs the weights in this process"
            raise recipe.error("generation.engine", what)
        name = str(recipe.data.questions)
        self.split = name if name in HELD_OUT else None
        self.recipes: dict[str, Recipe] = {}  # whose rows a model reads, by its name

    def prepare(self, models: Sequence[Model]) -> None:
        """Find the rows of each model: a base that is no run reads those of a run on it.

        Raises:
            RecipeError: a model has no recipe, so no split.
        """
        runs = [model.recipe for model in models if model.trained]
        for model in models:
            same = (
                one for one in runs if one.model.name_or_path == model.recipe.model.name_or_path
            )
            own = model.recipe if model.trained else next(same, None)
            if own is None and self.split is not None:
                raise self.recipe.error(
                    "data.questions",
                    f"'{model.word}' has no recipe, so no {self.split} split",
                    "name a file of rows, or `base` beside its runs",
                )
            self.recipes[model.name] = own or model.recipe

    def run(self, loaded: Loaded, key: str) -> EvalLog:
        """Return the log of one model.

        Raises:
            RecipeError: its recipe holds no rows of the split out.
            DataError: rows that cannot be used.
        """
        recipe, model = self.recipe, loaded.model
        model.record()
        rows = self._rows(model)
        using = loaded.using() if loaded.using else contextlib.nullcontext()
        with waiting_lock(model.run.path / "evals" / recipe.name), using:
            sums = row_losses(loaded.network, rows["input_ids"], rows["labels"])
        metrics = self._metrics(model, rows, sums)
        trained = model.trained
        chosen = trained is not None and trained.recipe.train.get("load_best_model_at_end")
        note = "the validation rows chose the checkpoint: the loss on them is too good"
        limit = recipe.data.max_questions
        subset = f"subset, the first {limit} rows" if limit else None
        banners = [note if self.split == "validation" and chosen else None, subset]
        return EvalLog(
            suite=recipe.suite.name,
            eval=recipe.name,
            target=model.name,
            key=key,
            n=len(sums),
            subset=subset,
            banners=tuple(line for line in banners if line),
            metrics=tuple(metrics),
            answers=AnswerFacts(
                name=model.name,
                models=(model.recipe.model.name_or_path,),
                fingerprint=model.fingerprint,
                prompt_format=model.prompts.name,
                prompt_format_hash=model.prompts.hash,
                dtype=model.recipe.model.dtype,
                quantized=model.quantized,
            ),
            file=log_file(model.run.path, recipe.name, None),
        )

    def _rows(self, model: Model) -> dict[str, list[Any]]:
        """Return the columns of the rows, tokenised as the model's recipe trains on them."""
        recipe = self.recipes[model.name]
        if self.split is None:
            recipe = recipe.reading(str(self.recipe.path_of("data.questions")))
        prepared = prepare_data(recipe, model.prompts.tokenizer)
        found = getattr(prepared, self.split or TRAIN)
        if found is None or not len(found):
            raise RecipeError(
                f"the recipe of {model.name} holds no {self.split} rows out",
                f"data.split.{self.split} is their share of the rows; or name a file of rows",
            )
        limit = self.recipe.data.max_questions
        return dict((found.select(range(min(limit, len(found)))) if limit else found)[:])

    def _metrics(
        self, model: Model, rows: dict[str, list[Any]], sums: Sequence[float]
    ) -> list[Metric]:
        """Return the loss per token, and bits per byte of the same text."""
        ids = [str(name) for name in rows["example_id"]]
        both = list(zip(rows["input_ids"], rows["labels"], strict=True))
        first: dict[str, str] = {}
        same_as = [
            first.setdefault(hash_of([list(tokens), list(labels)]), name)
            for name, (tokens, labels) in zip(ids, both, strict=True)
        ]
        tokens = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
        asked = [[label for label in labels[1:] if label != -100] for labels in rows["labels"]]
        texts = model.prompts.tokenizer.batch_decode(asked, skip_special_tokens=True)
        sizes = [len(text.strip().encode(errors="replace")) for text in texts]
        where = f"on {self.split or 'held-out'} rows"

        def metric(
            name: str, label: str, task: str, counts: Sequence[int], total: float, per: str
        ) -> Metric:
            samples = [
                Sample(
                    id=row,
                    value=loss * len(sums) / total,
                    outcome="graded",
                    verdicts=(f"{count} {per}",),
                    same_as="" if earlier == row else earlier,
                )
                for row, loss, count, earlier in zip(ids, sums, counts, same_as, strict=True)
            ]
            instead = "" if name == LOSS else LOSS
            known: dict[str, Any] = {"task": task, "higher_is_better": False, "instead_of": instead}
            return metric_of(name, f"{label} {where}", samples, "number", **known)

        rows_hash = hash_of([list(one) for one in rows["input_ids"]])
        found = [
            metric(LOSS, "loss per token", f"tokens-{rows_hash[:8]}", tokens, sum(tokens), "tokens")
        ]
        if sum(sizes):
            task = f"text-{hash_of([text.strip() for text in texts])[:8]}"
            total = sum(sizes) * math.log(2)
            found.append(metric("bits_per_byte", "bits per byte", task, sizes, total, "bytes"))
        return found

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        head = ["model", "rows", "tokens", "loss per token [95%]", "perplexity", "bits per byte"]
        rows, repeated = [head], 0
        for log in logs:
            loss, *others = log.metrics
            tokens = sum(int(one.verdicts[0].split()[0]) for one in loss.samples)
            repeated = max(repeated, sum(bool(one.same_as) for one in loss.samples))
            cells = [log.target, f"{len(loss.samples):,}", f"{tokens:,}"]
            cells += [
                shown_rate(loss, 4, loss.unit),
                number(math.exp(min(loss.value or 0.0, 700.0))),
            ]
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
    """Return the sum of the negative log-likelihoods of each row's supervised tokens, in nats.

    Rows go through the model longest first, padded on the right; softmax in float32.
    """
    import torch

    device, limit = model.device, BATCH_TOKENS.get(model.device.type, 8192)
    waiting = sorted(range(len(input_ids)), key=lambda row: -len(input_ids[row]))
    losses = [0.0] * len(waiting)
    while waiting:
        width = len(input_ids[waiting[0]])
        batch, waiting = waiting[: max(1, limit // width)], waiting[max(1, limit // width) :]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask, wanted = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, row in enumerate(batch):
            length = len(input_ids[row])
            ids[place, :length] = torch.tensor(input_ids[row])
            wanted[place, :length] = torch.tensor(labels[row])
            mask[place, :length] = 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).logits
            targets = wanted[:, 1:].to(device)
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
            )
        for row, loss in zip(batch, each.view_as(targets).double().sum(-1), strict=True):
            losses[row] = float(loss)
    return losses
