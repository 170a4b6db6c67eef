"""The engine in this process: an answer is its request's own, whatever its batch, and a batch that
does not fit is halved.
"""

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


def test_no_sampling_is_taken_from_the_settings_in_the_models_folder(model_and_tokenizer) -> None:
    model, tokenizer = model_and_tokenizer
    plain = answers(model, tokenizer, 1)
    model.generation_config.repetition_penalty = 5.0
    assert answers(model, tokenizer, 1) == plain
    assert model.generation_config.repetition_penalty == 5.0  # for lm-eval, as in its own command


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


def test_a_batch_that_fits_is_remembered_for_every_model_on_the_base(
    model_and_tokenizer, monkeypatch
):
    """Each adapter would decode a batch to its end, to find again that it does not fit."""
    model, tokenizer = model_and_tokenizer
    sizes, generate = [], model.generate

    def limited(input_ids: Any, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 4:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", limited)
    for _ in range(3):
        assert len(answers(model, tokenizer, 10_000)) == len(REQUESTS)
    assert sizes.count(7) == 1 and max(sizes[1:]) == 4


def test_an_error_that_is_not_about_memory_is_raised_at_once(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    calls = []

    def broken(**options: Any) -> Any:
        calls.append(options)
        raise RuntimeError("probability tensor contains inf")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="contains inf"):
        answers(model, tokenizer, 10_000)
    assert len(calls) == 1


def test_one_request_that_does_not_fit_says_how_long_it_is(model_and_tokenizer, monkeypatch):
    import torch

    model, tokenizer = model_and_tokenizer

    def full(**options: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(torch.OutOfMemoryError, match="one request of 21 tokens does not fit"):
        answers(model, tokenizer, 10_000)


def test_the_head_of_a_judge_is_made_float32_once_for_all_batches(model_and_tokenizer, monkeypatch):
    import torch

    model, tokenizer = model_and_tokenizer
    model = model.bfloat16()
    copies, to_float = [], torch.Tensor.float

    def counted(tensor: Any) -> Any:
        if tensor is model.get_output_embeddings().weight:
            copies.append(tensor)
        return to_float(tensor)

    monkeypatch.setattr(torch.Tensor, "float", counted)
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, batch_tokens=20)
    shares = list(engine.weigh(REQUESTS, {"A": 7, "B": 8}))
    assert len(shares) == len(REQUESTS) and len(copies) == 1
    assert engine._head is None
