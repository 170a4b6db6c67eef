"""The engine in this process: left-padded batches of similar length, as many rows as a token budget
holds.

The budget comes from the memory that is free: a token keeps its keys and values in every layer, and
while the prompt is read one layer's activations stand beside them. Half of what is free is used:
attention and sampling need room of their own. A batch that is too
large all the same is halved, and so are those after it.

Sampling is seeded per request and not per batch: noise is drawn row by row from the request's own
generator and the largest noisy probability is taken, which is exact sampling. An answer therefore
does not depend on what else was in its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from recipes_lib.engine import Completion, Decoding, Request
from recipes_lib.models.architectures import layer_configs
from recipes_lib.plan.cards import available_gib

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Row = TypeVar("_Row")
MAX_ROWS = 256
# where nothing is known of a model, and the most on a processor, which larger batches make no
# faster
USUAL_TOKENS = 8192
LEAST_TOKENS = 1024
MOST_TOKENS = 1 << 20
USED_SHARE = 0.5


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
        self._unsaid, self._halved = batch_tokens is None, False
        self.fingerprint = fingerprint
        self._using = using
        self.stop_ids = stop_ids(model, tokenizer)
        config = model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def complete(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Yield completions batch by batch, longest prompts first."""
        requests = list(requests)
        fitting = [request for request in requests if len(request.ids) < self.context]
        for request in requests:
            if len(request.ids) >= self.context:
                yield Completion(key=request.key, finish_reason="prompt_too_long")
        yield from self.in_batches(
            fitting, decoding.max_new_tokens, lambda batch: self._generate(batch, decoding)
        )

    def in_batches(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        answer: Callable[[Sequence[Request]], list[Completion]],
    ) -> Iterator[Completion]:
        """Yield what `answer` makes of batch after batch. Where the device's memory does not hold
        one, it and those after it are halved: a request is asked until it is answered.
        """
        import torch

        waiting = sorted(requests, key=lambda request: -len(request.ids))
        if waiting and self._unsaid:
            self._unsaid = False
            self._tell(f"from the memory that is free on {self.model.device}")
        while waiting:
            rows = batch_rows(len(waiting[0].ids) + max_new_tokens, self.batch_tokens)
            batch, done = waiting[:rows], None
            try:
                with self._active():
                    done = answer(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if done is None:  # here what failed holds no memory any more
                torch.cuda.empty_cache()
                half = len(batch) // 2
                self.batch_tokens = half * (len(batch[0].ids) + max_new_tokens)
                if not self._halved:
                    self._tell("from now on, because a larger one did not fit; nothing was lost")
                self._halved = True
                continue
            waiting = waiting[len(batch) :]
            yield from done

    def _tell(self, why: str) -> None:
        """Say the batch on stderr, beside the progress."""
        text = f"batches of up to {self.batch_tokens:,} padded tokens, {why}"
        print(f"{text} (batch_tokens sets the number)", file=sys.stderr, flush=True)

    def _active(self) -> AbstractContextManager[Any]:
        return self._using() if self._using else nullcontext()

    def _generate(self, batch: Sequence[Request], decoding: Decoding) -> list[Completion]:
        import torch
        from transformers import LogitsProcessorList

        from recipes_lib.generation.kv_cache import roomy_cache

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
                **roomy_cache(self.model, ids.shape[1] + room),
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
    ordered: Sequence[_Row], width: Callable[[_Row], int], batch_tokens: int, most: int = MAX_ROWS
) -> Iterator[Sequence[_Row]]:
    """Yield rows that go through the model together: at most `batch_tokens` padded tokens, or one.

    Args:
        ordered: the widest first.
        width: tokens of a row, with what it will write.
    """
    while ordered:
        rows = batch_rows(width(ordered[0]), batch_tokens, most)
        yield ordered[:rows]
        ordered = ordered[rows:]


def batch_rows(width: int, batch_tokens: int, most: int = MAX_ROWS) -> int:
    """Return the rows of a batch: as many as the tokens hold, and one at least.

    Args:
        width: of the longest row, with what it will write.

    Example:
        >>> batch_rows(1084, 113_975), batch_rows(20, 113_975), batch_rows(9000, 8192)
        (105, 256, 1)
    """
    return max(1, min(most, batch_tokens // max(width, 1)))


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


def token_bytes(kept: int, hidden: int, intermediate: int, element_bytes: int) -> int:
    """Return the memory of one token: its keys and values in all layers, and one layer's
    activations.

    Args:
        kept: width of the keys and values of all layers together.

    Example:
        >>> token_bytes(2 * 32 * 1024, hidden=4096, intermediate=14336, element_bytes=2)
        282624
    """
    return element_bytes * (kept + 8 * hidden + 3 * intermediate)


def tokens_per_batch(free_bytes: float, bytes_per_token: int, on_gpu: bool) -> int:
    """Return the padded tokens of a batch.

    Args:
        free_bytes: memory that can be had beside the weights.
        bytes_per_token: see `token_bytes`.
        on_gpu: a processor gets no more than `USUAL_TOKENS`.

    Example:
        >>> tokens_per_batch(60 * 2**30, 282_624, on_gpu=True), tokens_per_batch(60 * 2**30, 282_624, on_gpu=False)
        (113975, 8192)
    """  # noqa: E501
    fitting = int(free_bytes * USED_SHARE / max(bytes_per_token, 1))
    return max(LEAST_TOKENS, min(fitting, MOST_TOKENS if on_gpu else USUAL_TOKENS))


def tokens_for(model: Any) -> int:
    """Return the padded tokens of a batch for a loaded model, from what is free on its
    device now.
    """
    per_token = _token_bytes_of_config(model.config, model.dtype.itemsize)
    return tokens_with(per_token, free_bytes(model.device), on_gpu=model.device.type == "cuda")


def tokens_with(per_token: int | None, free: float, on_gpu: bool) -> int:
    """Return the padded tokens of a batch of a model whose token takes so many bytes; those of a
    model of which nothing is known where that is None.
    """
    return USUAL_TOKENS if per_token is None else tokens_per_batch(free, per_token, on_gpu)


def _token_bytes_of_config(config: Any, element_bytes: int) -> int | None:
    """Return `token_bytes` of a model by the usual names in its config; None where it has none."""
    text = config.get_text_config()
    try:
        layers = int(text.num_hidden_layers)
        return max(_usual_token_bytes(one, layers, element_bytes) for one in layer_configs(text))
    except (AttributeError, TypeError):
        return None


def _usual_token_bytes(config: Any, layers: int, element_bytes: int) -> int:
    """Return `token_bytes` of a model whose layers are all as this config has them."""
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    kv_width = int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return token_bytes(2 * layers * kv_width, hidden, intermediate, element_bytes)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device; what torch holds of it unused counts as free."""
    import torch

    if device.type != "cuda":
        return int(available_gib() * 2**30)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
