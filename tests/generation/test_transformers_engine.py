"""The in-process engine: batches, padding, stopping, seeds, adapters."""

from __future__ import annotations

import pytest

from recipes_lib.engine import Decoding, Request
from recipes_lib.generation.kv_cache import RoomyLayer, roomy_cache
from recipes_lib.generation.transformers_engine import TransformersEngine, batches, left_padded

TEXTS = [
    "a",
    "the licence is granted",
    "one two three four five six seven eight nine ten",
    "software",
    "you may not use this file except in compliance",
]


@pytest.fixture(scope="module")
def tiny(tiny_model_dir, tiny_tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32
    ).eval(), tiny_tokenizer


def requests_of(tokenizer, texts, seed=0):
    return [
        Request(key=str(n), ids=tuple(tokenizer(text).input_ids), seed=seed + n)
        for n, text in enumerate(texts)
    ]


def answers(engine, requests, decoding):
    return {done.key: done for done in engine.complete(requests, decoding)}


def test_batches_go_from_long_to_short_within_the_token_budget():
    made = list(batches([50, 20, 7, 3, 1], lambda size: size + 10, 120))
    assert made == [[50, 20], [7, 3, 1]]
    assert all(len(batch) * (batch[0] + 10) <= 120 for batch in made)


def test_a_prompt_larger_than_the_budget_is_still_a_batch_of_one():
    assert list(batches([500], lambda size: size + 10, 100)) == [[500]]


def test_padding_is_on_the_left_and_masked():
    ids, mask = left_padded([[5, 6], [7, 8, 9]], pad=0)
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_batch_gives_the_same_greedy_answers_as_one_at_a_time(tiny):
    model, tokenizer = tiny
    requests, decoding = requests_of(tokenizer, TEXTS), Decoding(max_new_tokens=12)
    together = answers(
        TransformersEngine(model, tokenizer, "f", batch_tokens=10_000), requests, decoding
    )
    alone = answers(TransformersEngine(model, tokenizer, "f", batch_tokens=1), requests, decoding)
    assert {key: one.text for key, one in together.items()} == {
        key: one.text for key, one in alone.items()
    }
    assert len({one.text for one in together.values()}) > 1


def test_a_sampled_answer_depends_on_its_own_seed_and_not_on_its_batch(tiny):
    model, tokenizer = tiny
    requests, decoding = requests_of(tokenizer, TEXTS), Decoding(max_new_tokens=12, temperature=1.0)
    engine = TransformersEngine(model, tokenizer, "f")
    together, alone = answers(engine, requests, decoding), answers(engine, requests[2:3], decoding)
    assert together["2"].text == alone["2"].text
    other = answers(engine, requests_of(tokenizer, TEXTS, seed=100), decoding)
    assert other["2"].text != together["2"].text


def test_sampling_follows_the_distribution(tiny):
    import torch

    model, tokenizer = tiny
    ids = tuple(tokenizer("the licence").input_ids)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1].float() / 0.25, -1)
    engine = TransformersEngine(model, tokenizer, "f", batch_tokens=100_000)
    requests = [Request(key=str(n), ids=ids, seed=n) for n in range(1500)]
    counts = torch.zeros_like(expected)
    engine.tokenizer = Recorder(tokenizer, counts)
    list(engine.complete(requests, Decoding(max_new_tokens=1, temperature=0.25)))
    top = expected.topk(5).indices
    assert torch.allclose(counts[top] / 1500, expected[top], atol=0.04)


class Recorder:
    """A tokenizer that counts the first token of what it decodes."""

    def __init__(self, tokenizer, counts):
        self.tokenizer, self.counts = tokenizer, counts

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, tokens, **kwargs):
        if tokens:
            self.counts[tokens[0]] += 1
        return self.tokenizer.decode(tokens, **kwargs)


def test_an_answer_at_the_limit_is_cut_and_a_stopped_one_is_not(tiny):
    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, "f")
    request = requests_of(tokenizer, TEXTS[:1])
    assert answers(engine, request, Decoding(max_new_tokens=3))["0"].finish_reason == "length"
    first = answers(engine, request, Decoding(max_new_tokens=1))["0"]
    engine.stop_ids = [int(token) for token in range(len(tokenizer))]
    stopped = answers(engine, request, Decoding(max_new_tokens=5))["0"]
    assert (stopped.finish_reason, stopped.text, stopped.num_tokens) == ("stop", "", 1)
    assert first.num_tokens == 1


def test_a_prompt_longer_than_the_context_is_reported_not_crashed(tiny):
    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, "f")
    done = answers(engine, [Request(key="x", ids=tuple([5] * 600))], Decoding(max_new_tokens=3))[
        "x"
    ]
    assert (done.finish_reason, done.text) == ("prompt_too_long", "")


def test_top_p_keeps_only_the_likeliest_tokens(tiny):
    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, "f")
    requests = requests_of(tokenizer, TEXTS[:2])
    nucleus = answers(engine, requests, Decoding(max_new_tokens=6, temperature=1.0, top_p=1e-6))
    greedy = answers(engine, requests, Decoding(max_new_tokens=6))
    assert {key: one.text for key, one in nucleus.items()} == {
        key: one.text for key, one in greedy.items()
    }


def test_a_batch_that_memory_does_not_hold_is_halved_with_those_after_it_and_said_once(
    tiny, monkeypatch, capsys
):
    import torch

    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, "f", batch_tokens=100_000)
    requests, decoding = requests_of(tokenizer, TEXTS), Decoding(max_new_tokens=12)
    roomy = answers(engine, requests, decoding)
    whole, sizes = engine._generate, []

    def few_fit(batch, decoding):
        sizes.append(len(batch))
        if len(batch) * (len(batch[0].ids) + decoding.max_new_tokens) > 50:
            raise torch.OutOfMemoryError("made up")
        return whole(batch, decoding)

    monkeypatch.setattr(engine, "_generate", few_fit)
    assert answers(engine, requests, decoding) == roomy
    assert sizes == [5, 2, 1, 1, 1, 1, 1] and capsys.readouterr().err.count("did not fit") == 1
    assert len(answers(engine, requests, decoding)) == 5
    assert sizes[7:] == [1] * 5 and not capsys.readouterr().err

    def nothing_fits(batch, decoding):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(engine, "_generate", nothing_fits)
    with pytest.raises(torch.OutOfMemoryError):
        answers(engine, requests, decoding)


def test_a_batch_chosen_from_free_memory_is_said_once_and_one_that_was_named_is_not(tiny, capsys):
    model, tokenizer = tiny
    for batch_tokens, said in ((None, 1), (64, 0)):
        engine = TransformersEngine(model, tokenizer, "f", batch_tokens)
        for _ in range(2):
            answers(engine, requests_of(tokenizer, TEXTS[:1]), Decoding(max_new_tokens=1))
        told = capsys.readouterr().err
        assert told.count("padded tokens, from the memory that is free on cpu") == said
        assert f"{engine.batch_tokens:,}" in told or not said


def test_no_step_copies_the_cache_and_the_answers_are_those_of_transformers_own(tiny, monkeypatch):
    import torch
    from transformers.cache_utils import DynamicLayer

    model, tokenizer = tiny
    requests, decoding = requests_of(tokenizer, TEXTS), Decoding(max_new_tokens=12)
    joined, cat = [], torch.cat

    def counted(tensors, *args, **kwargs):
        if tensors[0].ndim == 4 and kwargs.get("dim") == -2:
            joined.append(tensors[0].shape)
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", counted)
    engine = TransformersEngine(model, tokenizer, "f")
    roomy = answers(engine, requests, decoding)
    assert not joined
    monkeypatch.setattr(RoomyLayer, "update", DynamicLayer.update)
    assert answers(engine, requests, decoding) == roomy and joined


@pytest.mark.parametrize("window", [None, 4])
def test_a_model_with_windows_answers_alike_from_both_caches(window):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_window_layers": 1}
    windows = {"use_sliding_window": window is not None, "sliding_window": window}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **windows)).eval()
    ids = torch.randint(1, 60, (3, 9))
    said = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, **said)
    cache = roomy_cache(model, 17)
    assert [type(layer) is RoomyLayer for layer in next(iter(cache.values())).layers] == [
        True,
        window is None,
    ]
    assert torch.equal(model.generate(ids, **said, **cache), theirs)
