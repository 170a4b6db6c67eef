"""The loss on rows that no training saw: one forward pass per model, paired row by row.

`data.questions` is `test` or `validation`, a split of the targets' own recipe, or a file of rows in
the recipe's format. The validation rows may have chosen a checkpoint or a learning rate: the test
rows did not.

Samples are rows. A row's value is its negative log-likelihood over the mean number of supervised
tokens of a row, so that the mean over rows is the loss per token, whatever the rows' lengths, and
the difference of two models on the same rows is tested as every other metric is.

A row whose tokens stand there before is no new evidence: it keeps its value, and shares the
observation of the first one in intervals and tests.

Losses per token of two tokenizers cannot be compared: their models have bits per byte of the same
text instead (the loss in bits over the bytes of UTF-8 that a row's supervised tokens stand for,
without special tokens and the space around them).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict, cast

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.schema import NUMBER
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.run_lock import waiting_lock
from recipes_lib.core.terminal import aligned
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.splits import TEST, TRAIN, VALIDATION
from recipes_lib.eval_files import log_file
from recipes_lib.eval_log import AnswerFacts, EvalLog, Measure, Sample
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.subjects import Subject
from recipes_lib.generation.targets import Target
from recipes_lib.generation.transformers_engine import batches
from recipes_lib.statistics.intervals import StoredInterval, mean_interval
from recipes_lib.suites.suite import Suite, interval, number

LOSS = "loss"
# Padded tokens of a forward pass, on a CPU and on a GPU. Their float32 logits take four bytes for
# each token and entry of the vocabulary.
FORWARD_TOKENS = {False: 1024, True: 16384}


class _Rows(TypedDict):
    """What was read."""

    n: int
    tokens: int
    hash: str
    repeated: int


class _Numbers(TypedDict):
    """The suite's numbers in a result."""

    loss: StoredInterval
    perplexity: float
    bits_per_byte: float | None
    rows: _Rows


class HeldoutLoss(Suite):
    """The held-out loss of the targets of one eval recipe."""

    TITLE = "held-out loss"
    HELP = "the loss per token on rows that no training saw."
    NUMBERS: ClassVar[dict[str, JsonSchema]] = {
        "loss": {"$ref": "#/$defs/interval"},
        "perplexity": {"type": "number"},
        "bits_per_byte": NUMBER,
        "rows": {"type": "object", "required": ["n", "tokens", "hash"]},
    }

    def __init__(self, recipe: EvalRecipe, words: Sequence[str], remote_code: bool = False) -> None:
        super().__init__(recipe, words, remote_code)
        if recipe.generation.engine == "openai":
            raise recipe.error(
                "generation.engine", "heldout_loss needs the weights in this process"
            )
        for target in self.targets:
            if self._split is not None and self._recipe_of(target) is None:
                raise recipe.error(
                    "data.questions",
                    f"'{target.word}' has no recipe, so no {self._split} split",
                    "name a file of rows, or `base` beside its runs",
                )

    @property
    def _split(self) -> str | None:
        """The split that is asked for; None for a file."""
        name = self.recipe.data.questions
        return name if name in (TEST, VALIDATION) else None

    def _recipe_of(self, target: Target) -> Recipe | None:
        """Return the recipe whose rows a target reads: a base that is no run reads those of a run
        on it; None without one.
        """
        if not target.is_stand_in:
            return target.recipe
        name = target.recipe.model.name_or_path
        runs = (one.recipe for one in self.targets if one.trained)
        return next((recipe for recipe in runs if recipe.model.name_or_path == name), None)

    def visit(self, subject: Subject) -> list[EvalLog]:
        """Return the log of one of `targets`.

        Raises:
            RecipeError: its recipe holds no rows of the split out.
            DataError: rows that cannot be used.
        """
        recipe, target = self.recipe, subject.target
        assert subject.model is not None
        subject.record()
        rows = self._rows(subject)
        using = subject.using() if subject.using else contextlib.nullcontext()
        with waiting_lock(subject.run.path / "evals" / recipe.name), using:
            sums = row_losses(subject.model, rows["input_ids"], rows["labels"])
        tokens = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
        texts = _supervised_texts(subject.prompts.tokenizer, rows["labels"])
        sizes = [len(text.encode(errors="replace")) for text in texts]
        same = hash_of([list(ids) for ids in rows["input_ids"]])
        first: dict[str, str] = {}  # of rows that repeat
        same_as = [
            first.setdefault(hash_of([list(ids), list(labels)]), str(name))
            for name, ids, labels in zip(
                rows["example_id"], rows["input_ids"], rows["labels"], strict=True
            )
        ]
        file = log_file(subject.run.path, recipe.name, None)
        where = f"on {self._split or 'held-out'} rows"

        def measure(metric: str, label: str, task: str, per_row: Sequence[int]) -> Measure:
            per = "tokens" if metric == LOSS else "bytes"
            total = sum(per_row) * (1 if metric == LOSS else math.log(2))
            samples = tuple(
                Sample(
                    id=str(name),
                    value=loss * len(sums) / total,
                    outcome="graded",
                    verdicts=(f"{count} {per}",),
                    same_as="" if earlier == str(name) else earlier,
                )
                for name, loss, count, earlier in zip(
                    rows["example_id"], sums, per_row, same_as, strict=True
                )
            )
            return Measure(
                eval=recipe.name,
                suite=recipe.suite.name,
                metric=metric,
                label=label,
                samples=samples,
                file=file,
                task=task,
                higher_is_better=False,
                unit="number",
                instead_of="" if metric == LOSS else LOSS,
            )

        measures = [measure(LOSS, f"loss per token {where}", f"tokens-{same[:8]}", tokens)]
        if sum(sizes):
            text = f"text-{hash_of(texts)[:8]}"
            measures.append(measure("bits_per_byte", f"bits per byte {where}", text, sizes))
        values = [one.value for one in measures[0].samples if one.value is not None]
        repeated = len(same_as) - len(first)
        clusters = same_as if repeated else None
        loss = sum(sums) / sum(tokens)
        bits = sum(sums) / sum(sizes) / math.log(2) if sum(sizes) else None
        return [
            EvalLog(
                suite=recipe.suite.name,
                eval=recipe.name,
                target=subject.name,
                banners=_banners(self._split, subject),
                answers=AnswerFacts(
                    name=subject.name,
                    models=[target.recipe.model.name_or_path],
                    fingerprint=subject.fingerprint,
                    prompt_format=subject.prompts.name,
                    prompt_format_hash=subject.prompts.hash,
                    dtype=target.recipe.model.dtype,
                    quantized=target.recipe.base_format is not None,
                ),
                numbers={
                    "loss": {**mean_interval(values, clusters).to_dict(), "estimate": loss},
                    "perplexity": math.exp(min(loss, 700.0)),
                    "bits_per_byte": bits,
                    "rows": {
                        "n": len(values),
                        "tokens": sum(tokens),
                        "hash": same,
                        "repeated": repeated,
                    },
                },
                measures=tuple(measures),
                file=file,
            )
        ]

    def _rows(self, subject: Subject) -> dict[str, list[Any]]:
        """Return the columns of the rows, tokenised as the target's recipe trains on them."""
        recipe = self._recipe_of(subject.target) or subject.target.recipe
        name = str(self.recipe.data.questions)
        if self._split is None:
            recipe = recipe.reading(str(self.recipe.resolve("data.questions", name)))
        prepared = prepare_data(recipe, subject.prompts.tokenizer)
        found = getattr(prepared, self._split or TRAIN)
        if found is None or not len(found):
            raise RecipeError(
                f"the recipe of {subject.name} holds no {self._split} rows out",
                f"data.split.{self._split} is their share of the rows; or name a file of rows",
            )
        limit = self.recipe.data.max_questions
        return dict((found.select(range(min(limit, len(found)))) if limit else found)[:])

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        found = [cast(_Numbers, log.numbers) for log in logs]
        head = ["model", "rows", "tokens", "loss per token [95%]", "perplexity", "bits per byte"]
        rows = [
            [
                log.target,
                f"{one['rows']['n']:,}",
                f"{one['rows']['tokens']:,}",
                interval(one["loss"], digits=4),
                number(one["perplexity"]),
                number(one["bits_per_byte"], digits=4),
            ]
            for log, one in zip(logs, found, strict=True)
        ]
        lines = aligned([head, *rows])
        if repeated := max(one["rows"]["repeated"] for one in found):
            what = "every text is one observation in the intervals and tests"
            rows_repeat = "1 row repeats" if repeated == 1 else f"{repeated:,} rows repeat"
            lines += ["", f"{rows_repeat} the text of another: {what}"]
        if len({one["rows"]["hash"] for one in found}) > 1:
            what = "their losses per token are not comparable, bits per byte of the same text are"
            lines += ["", f"these models read other rows or other tokens: {what}"]
        return lines


def _banners(split: str | None, subject: Subject) -> list[str]:
    """Return the line about rows that chose something of the training."""
    trained = subject.target.trained
    chosen = trained is not None and trained.recipe.train.get("load_best_model_at_end")
    if split == VALIDATION and chosen:
        return ["the validation rows chose the checkpoint: the loss on them is too good"]
    return []


def _supervised_texts(tokenizer: Any, labels: Sequence[Sequence[int]]) -> list[str]:
    """Return what each row's supervised tokens after the first stand for."""
    asked = [[label for label in row[1:] if label != -100] for row in labels]
    return [text.strip() for text in tokenizer.batch_decode(asked, skip_special_tokens=True)]


def row_losses(
    model: Any, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[float]:
    """Return the sum of the negative log-likelihoods of each row's supervised tokens, in nats.

    Rows go through the model longest first, padded on the right; softmax in float32.
    """
    import torch

    device = model.device
    order = sorted(range(len(input_ids)), key=lambda row: -len(input_ids[row]))
    losses = [0.0] * len(order)
    with torch.inference_mode():
        limit = FORWARD_TOKENS[device.type != "cpu"]
        for batch in batches(order, lambda row: len(input_ids[row]), limit, most=len(order)):
            width = len(input_ids[batch[0]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask, wanted = torch.zeros_like(ids), torch.full_like(ids, -100)
            for place, row in enumerate(batch):
                length = len(input_ids[row])
                ids[place, :length] = torch.tensor(input_ids[row])
                wanted[place, :length] = torch.tensor(labels[row])
                mask[place, :length] = 1
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
