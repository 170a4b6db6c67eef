"""Engines: requests in, completions out as they are finished. The one in this process is here; the
one behind an address is in `engine_openai`.

Sampling is seeded per request and not per batch: noise is drawn row by row from the request's own
generator and the largest noisy probability is taken, which is exact sampling. An answer therefore
does not depend on what else was in its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.data.conversations import Message
from recipes_lib.models.families import has_plain_head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_FAILURES_IN_A_ROW = 20
MAX_ROWS = 256
# padded tokens per batch to begin with: larger ones are no faster on a CPU; a GPU halves the number
# until a batch fits
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}


class EvaluationIncomplete(RecipesError):
    """Answers or judgments are missing; the same command continues."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; above 0 each request draws with its own seed.
    None leaves the temperature to the server.
    """

    max_new_tokens: int = 512
    temperature: float | None = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the settings as recorded; those that greedy decoding ignores are left out, so that
        they change no key.
        """
        ignored = () if self.temperature != 0 else ("top_p", "seed")
        return {name: value for name, value in asdict(self).items() if name not in ignored}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Args:
        key: what the completion is filed under.
        prompt: the rendered text; None where only the server knows the format.
        ids: its token ids.
        messages: the conversation, for a server that renders it itself.
        schema: of the JSON that is to be answered, where a server can.
        seed: of this request alone.
    """

    key: str
    prompt: str | None = None
    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    schema: Mapping[str, Any] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: a text, or probabilities, or an error.

    Args:
        finish_reason: "stop", "length" (cut at max_new_tokens) or "prompt_too_long".
        num_tokens: tokens written.
        error: why nothing was answered.
        refused: the server will not take this request as it is; asking again is pointless.
        probabilities: of the next token, where they were asked for; there is no text then.
    """

    key: str
    text: str = ""
    finish_reason: str = "stop"
    num_tokens: int = 0
    error: str | None = None
    refused: bool = False
    probabilities: Mapping[str, float] | None = None


class Engine(Protocol):
    """Something that answers."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes whenever the same prompt could get another greedy answer."""

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion per request, in any order, as they are finished. Errors of transport
        are completions, not exceptions.
        """


@dataclass
class Failures:
    """Requests without a reply: by reason, refused by the server as they are, and in a row."""

    reasons: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    in_a_row: int = 0

    def add(self, done: Completion) -> None:
        """Count one completion."""
        self.in_a_row = 0 if done.error is None else self.in_a_row + 1
        if done.error is not None:
            self.reasons[done.error] += 1
            self.refused += done.refused

    def __str__(self) -> str:
        shown = [f"{reason} ({count} times)" for reason, count in self.reasons.most_common(3)]
        more = len(self.reasons) - len(shown)
        return "; ".join([*shown, *([f"{more} other reasons"] if more else [])])

    def remedy(self) -> str:
        """Return what to do about them."""
        if self.refused < self.reasons.total():
            return "run the same command to continue"
        return "the server refuses them as they are: change the recipe or the server, then continue"


class HFEngine:
    """Answers with a model in this process, in left-padded batches of similar length. A batch that
    does not fit the memory is halved, and so are those after it.

    Args:
        using: gives a context with the model in eval mode, the wanted adapter active.
        tokenizer: its tokenizer.
        fingerprint: hash of the weights.
        batch_tokens: padded tokens, prompt and answer, per batch to begin with.
    """

    def __init__(
        self,
        using: Callable[[], AbstractContextManager[Any]],
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
        batch_tokens: int | None = None,
    ) -> None:
        self.using, self.tokenizer, self.fingerprint = using, tokenizer, fingerprint
        self.batch_tokens = batch_tokens

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions batch by batch, longest prompts first."""
        generate = partial(self._generate, sampling)
        yield from self._in_batches(requests, sampling.max_new_tokens, generate)

    def verdicts(
        self, requests: Iterable[Request], tokens: Mapping[str, set[int]]
    ) -> Iterator[Completion]:
        """Yield the probabilities of verdicts as the next token after each prompt.

        Args:
            tokens: the token ids that mean each verdict.
        """

        def read(model: Any, batch: Sequence[Request]) -> list[Completion]:
            shares = _next_logits(model, *self._padded(model, batch)).softmax(-1).cpu()
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
        requests: Iterable[Request],
        max_new_tokens: int,
        answer: Callable[[Any, Sequence[Request]], list[Completion]],
    ) -> Iterator[Completion]:
        import torch

        waiting = sorted(requests, key=lambda request: -len(request.ids))
        while waiting:
            batch, done = waiting[:1], None
            width = len(batch[0].ids) + max_new_tokens
            try:
                with self.using() as model:
                    if len(batch[0].ids) < _context(model):
                        limit = self.batch_tokens or _BATCH_TOKENS.get(model.device.type, 8192)
                        batch = waiting[: max(1, min(MAX_ROWS, limit // max(width, 1)))]
                        done = answer(model, batch)
                    else:
                        done = [Completion(key=batch[0].key, finish_reason="prompt_too_long")]
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if done is None:  # outside the except, where what failed holds no memory any more
                torch.cuda.empty_cache()
                self.batch_tokens = len(batch) // 2 * width
                text = f"out of memory: batches of {self.batch_tokens:,} padded tokens from now on"
                print(text, file=sys.stderr, flush=True)
                continue
            waiting = waiting[len(batch) :]
            yield from done

    def _generate(
        self, sampling: Sampling, model: Any, batch: Sequence[Request]
    ) -> list[Completion]:
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        ids, mask = self._padded(model, batch)
        processors = LogitsProcessorList()
        if sampling.temperature:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(_SeededSampling([request.seed for request in batch], model.device))
        configured = getattr(model.generation_config, "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        ends = sorted({self.tokenizer.eos_token_id, *listed} - {None})
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(sampling.max_new_tokens, _context(model) - ids.shape[1]),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=sampling.repetition_penalty,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                logits_processor=processors,
            )
        completions = []
        for request, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            completions.append(
                Completion(
                    key=request.key,
                    text=self.tokenizer.decode(row[:end], skip_special_tokens=True).strip(),
                    finish_reason="length" if end is None else "stop",
                    num_tokens=len(row) if end is None else end + 1,
                )
            )
        return completions

    def _padded(self, model: Any, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both (rows, longest row), padded on the left."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return pad_sequence(rows, True, value, padding_side="left").to(model.device)

        rows = [torch.tensor(request.ids) for request in batch]
        return padded(rows, self.tokenizer.pad_token_id or 0), padded(
            [torch.ones_like(row) for row in rows], 0
        )


def _context(model: Any) -> int:
    """How many tokens a model can read."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _next_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
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
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)


class _SeededSampling:
    """A logits processor after which the largest entry is a sample of the distribution, drawn from
    each row's own generator.
    """

    def __init__(self, seeds: Sequence[int], device: Any) -> None:
        import torch

        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Return log(p / noise) per entry; entries outside the nucleus stay at minus infinity."""
        probabilities = scores.float().softmax(-1)
        noise = probabilities.new_empty(probabilities.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return (probabilities / noise).log()
