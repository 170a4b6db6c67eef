"""The engine in this process: a model of transformers, asked in left-padded batches.

Sampling is seeded per request: the noise of a row comes from the request's own generator, and the
largest noisy probability is taken, which is exact sampling. So an answer does not depend on the
rest of its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from recipes_lib.core.errors import one_line
from recipes_lib.evals.engines import base
from recipes_lib.evals.engines.base import TOO_LONG, Completion, Request, Sampling, Target
from recipes_lib.models.families import has_plain_head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from recipes_lib.config.recipe import Recipe

NAME = "transformers"
MAX_ROWS = 256
# Padded tokens per batch to begin with: larger ones are no faster on a CPU; a GPU halves the number
# until a batch fits.
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
# What libraries say for want of memory: torch on a GPU and on a CPU, cuBLAS, cuDNN, bitsandbytes.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|ALLOC_FAILED|CUDNN_STATUS_NOT_SUPPORTED", re.IGNORECASE
)
# Padded tokens that fitted after a batch did not, by the network: a base with all its adapters.
_FITTING: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

Work = Callable[[Any, Sequence[Request]], list[Completion]]


class TransformersEngine(base.Engine):
    """Answers with a model in this process, in batches of similar length. A batch that does not fit
    the memory is halved, and so are those after it on the same base.

    Args:
        using: gives a context with the model in eval mode, the wanted adapter active.
        facts: what the log of an evaluation says of the engine.
        batch_tokens: padded tokens, prompt and answer, per batch to begin with.
    """

    def __init__(
        self,
        using: Callable[[], AbstractContextManager[Any]],
        tokenizer: PreTrainedTokenizerBase,
        facts: base.EngineFacts | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.using = using
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self._facts = facts or base.EngineFacts(engine=NAME)
        self._head: torch.Tensor | None = None  # in float32, while requests are weighed

    def facts(self) -> base.EngineFacts:
        """Return what the log of an evaluation says of the engine."""
        return self._facts

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Generator[Completion]:
        """Yield texts, batch by batch, longest prompts first."""

        def write(model: Any, batch: Sequence[Request]) -> list[Completion]:
            return self._write(model, batch, sampling)

        yield from self._in_batches(requests, sampling.max_new_tokens, write)

    def weigh(
        self, requests: Iterable[Request], verdicts: Mapping[str, int]
    ) -> Generator[Completion]:
        """Yield the probabilities of the tokens `verdicts` as the next one, batch by batch."""

        def weigh(model: Any, batch: Sequence[Request]) -> list[Completion]:
            return self._weigh(model, batch, verdicts)

        try:
            yield from self._in_batches(requests, 0, weigh)
        finally:
            self._head = None

    def _in_batches(
        self, requests: Iterable[Request], new_tokens: int, work: Work
    ) -> Generator[Completion]:
        """Yield what `work` makes of requests, of `new_tokens` a row, in batches that fit."""
        import torch

        waiting = sorted(requests, key=lambda request: -len(request.ids))
        while waiting:
            longest = waiting[0]
            width = len(longest.ids) + new_tokens
            batch = [longest]
            done: list[Completion] | None = None
            network: Any = None
            try:
                with self.using() as network:
                    if len(longest.ids) >= _context(network):
                        done = [Completion(key=longest.key, finish_reason=TOO_LONG)]
                    else:
                        tokens = self.batch_tokens or _BATCH_TOKENS.get(network.device.type, 8192)
                        tokens = min(tokens, _FITTING.get(network, tokens))
                        num_rows = min(MAX_ROWS, tokens // max(width, 1))
                        batch = waiting[: max(num_rows, 1)]
                        done = work(network, batch)
            except RuntimeError as error:
                # without a network it was the loading that failed
                if network is None or not _OUT_OF_MEMORY.search(str(error)):
                    raise
                if len(batch) == 1:
                    what = f"one request of {width:,} tokens does not fit: {one_line(error)}"
                    raise torch.OutOfMemoryError(what) from error
            # outside `except`: the traceback would keep the batch's tensors alive
            if done is None:
                torch.cuda.empty_cache()
                tokens = (len(batch) + 1) // 2 * width
                _FITTING[network] = tokens  # no later batch on this base has more
                text = f"out of memory: batches of {tokens:,} padded tokens from now on"
                print(text, file=sys.stderr, flush=True)
                continue
            answered = {completion.key for completion in done}
            waiting = [request for request in waiting if request.key not in answered]
            yield from done

    def _weigh(
        self, model: Any, batch: Sequence[Request], verdicts: Mapping[str, int]
    ) -> list[Completion]:
        ids, mask = self._padded(model, batch)
        shares = self._next_logits(model, ids, mask).softmax(-1).cpu()
        completions = []
        for request, row in zip(batch, shares, strict=True):
            probabilities = {verdict: float(row[token]) for verdict, token in verdicts.items()}
            completions.append(Completion(key=request.key, probabilities=probabilities))
        return completions

    def _write(self, model: Any, batch: Sequence[Request], sampling: Sampling) -> list[Completion]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

        ids, mask = self._padded(model, batch)
        context = _context(model)
        limit = sampling.max_new_tokens
        room = min(limit, context - ids.shape[1])
        processors = LogitsProcessorList()
        if sampling.temperature:
            seeds = [request.seed for request in batch]
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            processors.append(_SeededSampling(seeds, model.device))
        # the tokens that end an answer: the tokenizer's, and those of the model's files
        recommended = model.generation_config
        configured = getattr(recommended, "eos_token_id", None)
        if not isinstance(configured, list):
            configured = [configured]
        ends = sorted({self.tokenizer.eos_token_id, *configured} - {None})
        # what is not asked for is not taken from the model's folder, as a repetition penalty
        model.generation_config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        try:
            with torch.inference_mode():
                written = model.generate(
                    input_ids=ids, attention_mask=mask, logits_processor=processors
                )
        finally:
            model.generation_config = recommended
        completions = []
        for request, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            if end is None and room < min(limit, context - len(request.ids)):
                continue  # alone it has more room than beside a longer prompt: asked again
            completion = Completion(
                key=request.key,
                text=self.tokenizer.decode(row[:end], skip_special_tokens=True).strip(),
                finish_reason="length" if end is None else "stop",
            )
            completions.append(completion)
        return completions

    def _padded(self, model: Any, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both (rows, longest row), padded on the left."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(request.ids, dtype=torch.long) for request in batch]
        ids = pad_sequence(rows, True, self.tokenizer.pad_token_id or 0, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        return ids.to(model.device), mask.to(model.device)

    def _next_logits(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits after each row's last token, shape (rows, vocabulary). The head is applied in
        float32: in half precision the logits of two verdicts are often exactly equal.
        """
        import torch

        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            if not has_plain_head(model):
                return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            head = model.get_output_embeddings()
            hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, -1]
            if self._head is None:  # 2 GB for 128,000 words of 4,096: not for each batch anew
                self._head = head.weight.float()
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden.float(), self._head, bias)


def facts_of(recipe: Recipe) -> base.EngineFacts:
    """Return what a log says of a model that is loaded in this process."""
    quantized = recipe.quantization is not None
    return base.EngineFacts(engine=NAME, dtype=recipe.model.dtype, quantized=quantized)


def _context(model: Any) -> int:
    """How many tokens a model can read."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


class _SeededSampling:
    """A logits processor after which the largest entry is a sample, of each row's own generator."""

    def __init__(self, seeds: Sequence[int], device: Any) -> None:
        import torch

        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Return log(p / noise) per entry."""
        probabilities = scores.float().softmax(-1)
        noise = probabilities.new_empty(probabilities.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return (probabilities / noise).log()


@contextmanager
def _opened(targets: Sequence[Target]) -> Iterator[base.EngineOf]:
    """Give what makes an engine; the weights are loaded, and freed, by who gave the targets."""
    yield lambda section, target: TransformersEngine(
        target.using, target.load_tokenizer(), facts_of(target.recipe)
    )


ENGINE = base.EngineType(
    name=NAME,
    opened=_opened,
    answered_by=lambda section, name, weights: str(weights),
    in_process=True,
    gives_probabilities=True,
)
