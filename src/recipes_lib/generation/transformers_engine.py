"""The engine in this process: left-padded batches of similar length, as many rows as a token budget
holds.

Sampling is seeded per request and not per batch: noise is drawn row by row from the request's own
generator and the largest noisy probability is taken, which is exact sampling. An answer therefore
does not depend on what else was in its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from recipes_lib.generation.batch_memory import tokens_for
from recipes_lib.generation.engine import Completion, Decoding, Request

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ROWS = 256


class TransformersEngine:
    """Answers with a loaded model.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        fingerprint: hash of the weights (`fingerprints`).
        batch_tokens: padded tokens, prompt and answer, per batch; None for what fits the memory
            that is free now.
        using: gives a context in which the wanted adapter is active; None for the model as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
        batch_tokens: int | None = None,
        using: Any = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens = batch_tokens or tokens_for(model)
        self.fingerprint = fingerprint
        self._using = using
        self.stop_ids = stop_ids(model, tokenizer)
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)

    def complete(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        """Yield completions batch by batch, longest prompts first."""
        fitting = [request for request in requests if len(request.ids) < self.context]
        for request in requests:
            if len(request.ids) >= self.context:
                yield Completion(key=request.key, finish_reason="prompt_too_long")
        for batch in batches(fitting, decoding.max_new_tokens, self.batch_tokens):
            with self._active():
                yield from self._answer(batch, decoding)

    def _active(self) -> AbstractContextManager[Any]:
        return self._using() if self._using else nullcontext()

    def _answer(self, batch: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Answer one batch; halve it when the device's memory is full."""
        import torch

        try:
            return self._generate(batch, decoding)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return self._answer(batch[:middle], decoding) + self._answer(batch[middle:], decoding)

    def _generate(self, batch: Sequence[Request], decoding: Decoding) -> list[Completion]:
        import torch
        from transformers import LogitsProcessorList

        ids, mask = left_padded([request.ids for request in batch], self._pad_id())
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        room = min(decoding.max_new_tokens, self.context - ids.shape[1])
        processors = LogitsProcessorList()
        if decoding.temperature > 0:
            processors.append(
                _SeededSampling([request.seed for request in batch], decoding, self.model.device)
            )
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=decoding.repetition_penalty,
                eos_token_id=self.stop_ids,
                pad_token_id=self._pad_id(),
                logits_processor=processors,
            )
        return [
            self._completion(request, row)
            for request, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True)
        ]

    def _completion(self, request: Request, tokens: list[int]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        reason = "length" if end is None else "stop"
        return Completion(
            key=request.key,
            text=text.strip(),
            finish_reason=reason,
            num_tokens=len(tokens) if end is None else end + 1,
        )

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0])


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids that end an answer: the tokenizer's end token and those of the model's
    generation config.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None})


def batches(
    requests: Sequence[Request], max_new_tokens: int, batch_tokens: int
) -> Iterator[list[Request]]:
    """Yield batches of requests of similar length, longest first; each holds at most `batch_tokens`
    padded tokens, or one request.
    """
    ordered = sorted(requests, key=lambda request: -len(request.ids))
    while ordered:
        rows = max(1, min(MAX_ROWS, batch_tokens // (len(ordered[0].ids) + max_new_tokens)))
        yield ordered[:rows]
        ordered = ordered[rows:]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both (rows, longest row), padded on the left."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[place, width - len(row) :] = 1
    return ids, mask


class _SeededSampling:
    """A logits processor after which the largest entry is a sample of the distribution, drawn from
    each row's own generator.
    """

    def __init__(self, seeds: Sequence[int], decoding: Decoding, device: Any) -> None:
        import torch

        self.decoding = decoding
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Return log(p / noise) per entry; entries outside the nucleus stay at minus infinity."""
        import torch

        probabilities = torch.softmax(scores.float() / self.decoding.temperature, dim=-1)
        if self.decoding.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.decoding.top_p
            probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
        noise = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=g)
                for row, g in zip(probabilities, self.generators, strict=True)
            ]
        )
        return (probabilities / noise).log()
