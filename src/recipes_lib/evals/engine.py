"""Engines: requests in, completions out as they are finished, and what is missing in a store asked
of them. The engine in this process is here; the one behind an address is in `engine_openai`.

Sampling is seeded per request and not per batch: noise is drawn row by row from the request's own
generator and the largest noisy probability is taken, which is exact sampling. An answer therefore
does not depend on what else was in its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import Row
from recipes_lib.core.terminal import count
from recipes_lib.data.rows import Message
from recipes_lib.evals.log import Store
from recipes_lib.models.families import has_plain_head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_ROWS = 256
# padded tokens per batch to begin with: larger ones are no faster on a CPU; a GPU halves the number
# until a batch fits
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}

Asked = TypeVar("Asked")


class EvaluationIncomplete(RecipesError):
    """Answers or judgments are missing; the same command continues."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: at temperature 0 greedily; None leaves that to the server."""

    max_new_tokens: int = 512
    temperature: float | None = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the settings that count: what greedy decoding ignores changes no key."""
        ignored = () if self.temperature != 0 else ("top_p", "seed")
        return {name: value for name, value in asdict(self).items() if name not in ignored}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt."""

    key: str  # what the completion is filed under
    prompt: str | None = None  # the rendered text; None where only the server knows the format
    ids: tuple[int, ...] = ()  # its token ids
    messages: tuple[Message, ...] = ()  # the conversation, for a server that renders it itself
    schema: Mapping[str, Any] | None = None  # of the JSON to answer, where a server can
    seed: int = 0  # of this request alone


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: a text, or probabilities, or an error."""

    key: str
    text: str = ""
    finish_reason: str = "stop"  # or "length" (cut at max_new_tokens) or "prompt_too_long"
    error: str | None = None  # why there is no answer
    refused: bool = False  # the server will not take the request as it is, however often asked
    probabilities: Mapping[str, float] | None = None  # of the next token, in place of a text


def ask_missing(
    store: Store,
    requests: Mapping[str, Asked],
    complete: Callable[[list[Asked]], Generator[Completion]],
    read: Callable[[Asked, Completion], Row | Asked],
    noun: str,
    name: str = "",
    most_failures: int = 20,
) -> None:
    """Ask for what a store lacks, and append each row as its reply arrives.

    Args:
        requests: by the key of their row.
        complete: an engine; errors are completions.
        read: makes a reply the row, or a request that is asked in the next round.
        noun: what a row is: answer, judgment.
        name: of what is asked about.
        most_failures: requests in a row without a reply after which no more are asked.
    """
    waiting = {key: request for key, request in requests.items() if key not in store}
    reasons: Counter[str] = Counter()
    refused = in_a_row = 0
    with tqdm(total=len(waiting), desc=f"{noun}s {name}", unit="", disable=not waiting) as bar:
        while waiting and in_a_row < most_failures:
            again: dict[str, Asked] = {}
            with closing(complete([*waiting.values()])) as replies:
                for reply in replies:
                    if reply.error is not None:
                        reasons[reply.error] += 1
                        refused += reply.refused
                        in_a_row += 1
                        if in_a_row >= most_failures:
                            break
                        continue
                    in_a_row = 0
                    row = read(waiting[reply.key], reply)
                    if isinstance(row, dict):
                        store.append([row])
                        bar.update()
                    else:
                        again[reply.key] = row
            waiting = again
    missing = sum(key not in store for key in requests)
    if not missing:
        return
    shown = [
        reason if times == 1 else f"{reason} ({times} times)"
        for reason, times in reasons.most_common(3)
    ]
    if more := len(reasons) - len(shown):
        shown.append(count(more, "other reason"))
    remedy = "run the same command to continue"
    if refused == reasons.total():
        remedy = (
            "the server refuses them as they are: change the recipe or the server, then continue"
        )
    what = f"{count(missing, noun)}{f' of {name}' if name else ''}"
    raise EvaluationIncomplete(
        f"{what} {'is' if missing == 1 else 'are'} missing: {'; '.join(shown)}",
        f"{count(len(store), noun)} stored; {remedy}",
        file=store.path,
    )


class HFEngine:
    """Answers with a model in this process, in left-padded batches of similar length. A batch that
    does not fit the memory is halved, and so are those after it.

    Args:
        using: gives a context with the model in eval mode, the wanted adapter active.
        fingerprint: hash that changes whenever a prompt could get another greedy answer.
        batch_tokens: padded tokens, prompt and answer, per batch to begin with.
    """

    version = None

    def __init__(
        self,
        using: Callable[[], AbstractContextManager[Any]],
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
        batch_tokens: int | None = None,
    ) -> None:
        self.using, self.tokenizer, self.fingerprint = using, tokenizer, fingerprint
        self.batch_tokens = batch_tokens

    def complete(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        verdicts: Mapping[str, int] | None = None,
    ) -> Generator[Completion]:
        """Yield completions batch by batch, longest prompts first.

        Args:
            verdicts: tokens whose probabilities, as the next one, are wanted instead of a text.
        """
        import torch

        waiting = sorted(requests, key=lambda request: -len(request.ids))
        while waiting:
            batch, done = waiting[:1], None
            width = len(batch[0].ids) + (0 if verdicts else sampling.max_new_tokens)
            try:
                with self.using() as model:
                    if len(batch[0].ids) >= _context(model):
                        done = [Completion(key=batch[0].key, finish_reason="prompt_too_long")]
                    else:
                        limit = self.batch_tokens or _BATCH_TOKENS.get(model.device.type, 8192)
                        batch = waiting[: max(1, min(MAX_ROWS, limit // max(width, 1)))]
                        if verdicts:
                            done = self._weigh(model, batch, verdicts)
                        else:
                            done = self._write(model, batch, sampling)
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

    def _weigh(
        self, model: Any, batch: Sequence[Request], verdicts: Mapping[str, int]
    ) -> list[Completion]:
        shares = _next_logits(model, *self._padded(model, batch)).softmax(-1).cpu()
        return [
            Completion(
                key=request.key,
                probabilities={verdict: float(row[token]) for verdict, token in verdicts.items()},
            )
            for request, row in zip(batch, shares, strict=True)
        ]

    def _write(self, model: Any, batch: Sequence[Request], sampling: Sampling) -> list[Completion]:
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
                )
            )
        return completions

    def _padded(self, model: Any, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both (rows, longest row), padded on the left."""
        import torch

        pad, width = self.tokenizer.pad_token_id or 0, max(len(request.ids) for request in batch)
        gaps = [width - len(request.ids) for request in batch]
        rows = [[pad] * gap + [*request.ids] for gap, request in zip(gaps, batch, strict=True)]
        masks = [[0] * gap + [1] * (width - gap) for gap in gaps]
        return torch.tensor(rows, device=model.device), torch.tensor(masks, device=model.device)


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
    """A logits processor after which the largest entry is a sample, of each row's own generator."""

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
