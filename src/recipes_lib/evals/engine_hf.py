"""The engine in this process: left-padded batches of similar length, as many rows as a token budget
holds.

The budget comes from the memory that is free, half of which is used; a batch that is too large all
the same is halved, and so are those after it.

Sampling is seeded per request and not per batch: noise is drawn row by row from the request's own
generator and the largest noisy probability is taken, which is exact sampling. An answer therefore
does not depend on what else was in its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from recipes_lib.evals.engine import Completion, Request, Sampling
from recipes_lib.models.families import has_plain_head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ROWS = 256
USUAL_TOKENS = 8192  # the most on a processor, which larger batches make no faster
LEAST_TOKENS, MOST_TOKENS = 1024, 1 << 20


class HFEngine:
    """Answers with a loaded model.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        fingerprint: hash of the weights.
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
        using: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.fingerprint = model, tokenizer, fingerprint
        self.batch_tokens = batch_tokens or tokens_for(model)
        self._using = using or nullcontext
        configured = getattr(model.generation_config, "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        ends = (tokenizer.eos_token_id, *listed)
        self.stop_ids = sorted({int(token) for token in ends if token is not None})
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else self.stop_ids[0])
        config = model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions batch by batch, longest prompts first."""
        fitting = []
        for request in requests:
            if len(request.ids) < self.context:
                fitting.append(request)
            else:
                yield Completion(key=request.key, finish_reason="prompt_too_long")
        yield from self._in_batches(
            fitting, sampling.max_new_tokens, lambda batch: self._generate(batch, sampling)
        )

    def verdicts(
        self, requests: Sequence[Request], tokens: Mapping[str, set[int]]
    ) -> Iterator[Completion]:
        """Yield the probabilities of verdicts as the next token after each prompt.

        Args:
            tokens: the token ids that mean each verdict.
        """
        import torch

        def read(batch: Sequence[Request]) -> list[Completion]:
            shares = torch.softmax(self._next_logits([one.ids for one in batch]), dim=-1).cpu()
            return [
                Completion(
                    key=request.key,
                    probabilities={
                        verdict: float(row[list(ids)].sum()) for verdict, ids in tokens.items()
                    },
                )
                for request, row in zip(batch, shares, strict=True)
            ]

        yield from self._in_batches(requests, 0, read)

    def _in_batches(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        answer: Callable[[Sequence[Request]], list[Completion]],
    ) -> Iterator[Completion]:
        """Yield what `answer` makes of batch after batch, halved where the memory does not hold
        one.
        """
        import torch

        waiting = sorted(requests, key=lambda request: -len(request.ids))
        while waiting:
            width = len(waiting[0].ids) + max_new_tokens
            rows = max(1, min(MAX_ROWS, self.batch_tokens // max(width, 1)))
            batch, done = waiting[:rows], None
            try:
                with self._using():
                    done = answer(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if done is None:  # here what failed holds no memory any more
                torch.cuda.empty_cache()
                self.batch_tokens = len(batch) // 2 * width
                why = "because a larger one did not fit; nothing was lost"
                text = f"batches of up to {self.batch_tokens:,} padded tokens from now on, {why}"
                print(f"{text} (batch_tokens sets the number)", file=sys.stderr, flush=True)
                continue
            waiting = waiting[len(batch) :]
            yield from done

    def _generate(self, batch: Sequence[Request], sampling: Sampling) -> list[Completion]:
        import torch
        from transformers import LogitsProcessorList

        ids, mask = self._padded([request.ids for request in batch])
        processors = LogitsProcessorList()
        if sampling.temperature:
            seeds = [request.seed for request in batch]
            processors.append(_SeededSampling(seeds, sampling, self.model.device))
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(sampling.max_new_tokens, self.context - ids.shape[1]),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=sampling.repetition_penalty,
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                logits_processor=processors,
            )
        return [
            self._completion(request, row)
            for request, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True)
        ]

    def _completion(self, request: Request, tokens: list[int]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), None)
        return Completion(
            key=request.key,
            text=self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(),
            finish_reason="length" if end is None else "stop",
            num_tokens=len(tokens) if end is None else end + 1,
        )

    def _next_logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits after each row's last token, shape (rows, vocabulary), in float32.

        The head is applied in float32: in half precision the logits of two verdicts are often
        exactly equal.
        """
        import torch

        ids, mask = self._padded(rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            if not has_plain_head(self.model):
                found = self.model(**inputs, use_cache=False, logits_to_keep=1)
                return found.logits[:, -1].float()
            head = self.model.get_output_embeddings()
            hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, -1]
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, both (rows, longest row), padded on the left."""
        import torch

        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[place, width - len(row) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


class _SeededSampling:
    """A logits processor after which the largest entry is a sample of the distribution, drawn from
    each row's own generator.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: Any) -> None:
        import torch

        self.sampling = sampling
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Return log(p / noise) per entry; entries outside the nucleus stay at minus infinity."""
        import torch

        probabilities = torch.softmax(scores.float() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
        noise = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=generator)
                for row, generator in zip(probabilities, self.generators, strict=True)
            ]
        )
        return (probabilities / noise).log()


def tokens_for(model: Any) -> int:
    """Return the padded tokens of a batch for a loaded model: what half of the memory holds that is
    free on its GPU now.

    A token keeps its keys and values in every layer; while the prompt is read, one layer's
    activations stand beside them.
    """
    import torch

    if model.device.type != "cuda":
        return USUAL_TOKENS
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1))
    hidden = int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    kept = 2 * int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    token = model.dtype.itemsize * (kept * config.num_hidden_layers + 8 * hidden + 3 * inner)
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return int(max(LEAST_TOKENS, min((free + unused) // 2 // token, MOST_TOKENS)))
