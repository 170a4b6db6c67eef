"""The engine in this process: an answer is its request's own, whatever its batch, and a batch that
does not fit is halved.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from recipes_lib.evals.engines.base import Request, Sampling
from recipes_lib.evals.engines.transformers import TransformersEngine

REQUESTS = [Request(key=str(n), ids=tuple(range(5, 8 + n)), seed=n) for n in range(7)]


@pytest.fixture
def model_and_tokenizer(tiny_model_dir) -> tuple[Any, Any]:
    """The tiny model in float64, where rounding chooses no token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float64").eval()
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


def answers(model: Any, tokenizer: Any, batch_tokens: int, **sampling: Any) -> dict[str, str]:
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, batch_tokens=batch_tokens)
    settings = Sampling(max_new_tokens=12, **sampling)
    return {done.key: done.text for done in engine.complete(REQUESTS, settings)}


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch(model_and_tokenizer) -> None:
    for settings in ({"temperature": 1.0}, {}):
        alone = answers(*model_and_tokenizer, 1, **settings)
        assert answers(*model_and_tokenizer, 10_000, **settings) == alone
    assert answers(*model_and_tokenizer, 1, temperature=1.0) != alone


def test_an_answer_has_the_room_that_it_has_alone(model_and_tokenizer) -> None:
    """Beside a prompt that nearly fills the context too."""
    model, tokenizer = model_and_tokenizer
    ids = (5,) * (model.config.max_position_embeddings - 2)
    requests = [*REQUESTS, Request(key="long", ids=ids)]
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, batch_tokens=100_000)
    done = {done.key: done.text for done in engine.complete(requests, Sampling(max_new_tokens=12))}
    assert done.pop("long") and done == answers(model, tokenizer, 1)


def test_batches_are_halved_from_one_out_of_memory_on(model_and_tokenizer, monkeypatch, capsys):
    import torch

    model, tokenizer = model_and_tokenizer
    wanted, sizes, generate = answers(model, tokenizer, 1), [], model.generate

    def limited(input_ids: Any, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", limited)
    most = 2
    assert answers(model, tokenizer, 10_000) == wanted
    assert sizes[:3] == [7, 4, 2] and max(sizes[2:]) <= 2
    assert "out of memory" in capsys.readouterr().err
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        answers(model, tokenizer, 10_000)


def test_a_prompt_longer_than_the_context_is_no_answer_and_stops_nothing(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    long = Request(key="long", ids=(5,) * model.config.max_position_embeddings)
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer)
    first, second = engine.complete([REQUESTS[0], long], Sampling())
    assert first.finish_reason == "prompt_too_long" and second.text
