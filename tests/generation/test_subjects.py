"""Targets: runs, bases and models, loaded once per base, asked in the format they were trained
with.
"""

from __future__ import annotations

import pytest

from recipes_lib.core.errors import RecipeError
from recipes_lib.engine import Decoding, Request
from recipes_lib.generation.subjects import grouped, loaded
from recipes_lib.generation.targets import Asking, base_target, find_targets
from recipes_lib.generation.transformers_engine import TransformersEngine
from recipes_lib.weights.base import base_fingerprint


def test_two_runs_and_their_base_share_one_loaded_model_and_answer_differently(
    make_run, tiny_model_dir
):
    make_run("one", 1), make_run("two", 2)
    targets = find_targets(["one", "two", str(tiny_model_dir)])
    groups = grouped(targets)
    assert [len(group) for group in groups] == [3]
    texts = {}
    with loaded(groups[0]) as subjects:
        assert len({id(subject.model) for subject in subjects}) == 1
        assert len({subject.fingerprint for subject in subjects}) == 3
        for subject in subjects:
            text, ids = subject.prompts.render([{"role": "user", "content": "Name a licence."}])
            assert text.startswith("### Instruction:")
            engine = TransformersEngine(
                subject.model, subject.prompts.tokenizer, subject.fingerprint, using=subject.using
            )
            texts[subject.name] = next(
                iter(engine.complete([Request(key="q", ids=ids)], Decoding(max_new_tokens=8)))
            ).text
    assert len(set(texts.values())) == 3
    assert any(name.startswith("base--tiny-llama--") for name in texts)


def test_an_unmerged_adapter_on_the_shared_base_answers_like_the_adapter_loaded_alone(
    make_run, tiny_model_dir, tiny_tokenizer
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make_run("one", 1), make_run("two", 2)
    request = [Request(key="q", ids=tuple(tiny_tokenizer("Name a licence.").input_ids))]
    with loaded(find_targets(["one", "two"])) as subjects:
        shared = [
            TransformersEngine(s.model, s.prompts.tokenizer, "", using=s.using) for s in subjects
        ]
        texts = [
            next(iter(engine.complete(request, Decoding(max_new_tokens=10)))).text
            for engine in shared
        ]
    for name, text in zip(("one", "two"), texts, strict=True):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        from recipes_lib.core.run_directory import open_run

        alone = PeftModel.from_pretrained(base, open_run(name).path / "adapter").eval()
        engine = TransformersEngine(alone, tiny_tokenizer, "")
        assert next(iter(engine.complete(request, Decoding(max_new_tokens=10)))).text == text


def test_a_bare_model_is_asked_through_its_chat_template(runs_folder, tiny_model_dir):
    with loaded(find_targets([str(tiny_model_dir)])) as (subject,):
        text, _ = subject.prompts.render([{"role": "user", "content": "Hi"}])
        assert "<|user|>" in text


def test_a_model_that_only_a_server_has_is_rendered_there(runs_folder):
    with loaded(find_targets(["some-served-name"], Asking(any_model=True)), weights=False) as (
        subject,
    ):
        assert (
            subject.prompts.render([{"role": "user", "content": "Hi"}]) == (None, ())
            and subject.model is None
        )


def test_a_format_the_run_was_not_trained_with_is_refused(make_run):
    make_run("one", 1)
    with pytest.raises(RecipeError, match="trained with prompt format dolly"):
        find_targets(["one"], Asking(prompt_format="chat"))


def test_a_chat_template_that_changed_since_training_is_refused(make_run):
    make_run("one", 1, recorded_hash="0" * 64)
    with (
        pytest.raises(RecipeError, match="another prompt format"),
        loaded(find_targets(["one"]), weights=False),
    ):
        pass


def test_the_same_base_in_another_format_gets_another_folder(make_run, tiny_model_dir):
    run = find_targets([str(make_run("one", 1))])[0]
    with (
        loaded([base_target(run.recipe)]) as (as_run,),
        loaded(find_targets([str(tiny_model_dir)])) as (bare,),
    ):
        assert as_run.name != bare.name and as_run.name.startswith("base--tiny-llama--")
        as_run.record()
        (again,) = find_targets([as_run.name])
        assert again.is_base and again.recipe.data.prompt_format == "dolly"
        recorded = as_run.run.read_state()["base_fingerprint"]
        assert recorded == base_fingerprint(run.recipe), "as the adapters of this base record it"
    with loaded([again]) as (subject,):
        assert subject.name == as_run.name, "the directory's name leads to the same directory"


def test_a_word_that_is_neither_run_nor_model_lists_similar_runs(make_run):
    make_run("lora-r8", 1)
    with pytest.raises(RecipeError) as caught:
        find_targets(["lora-r9"])
    assert "lora-r8" in str(caught.value)


def test_fingerprints_do_not_depend_on_the_folder_but_on_every_weight(make_run, tmp_path):
    import shutil

    from recipes_lib.core.fingerprints import folder_fingerprint

    adapter = make_run("one", 1) / "adapter"
    copy = tmp_path / "elsewhere"
    shutil.copytree(adapter, copy)
    assert folder_fingerprint(adapter) == folder_fingerprint(copy)
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert folder_fingerprint(adapter) != folder_fingerprint(copy)
