from __future__ import annotations

import pytest

from recipes_lib.config.loader import load_document
from recipes_lib.config.recipe import load_recipe
from recipes_lib.config.validation import validate


def errors_of(path, *overrides: str) -> list[str]:
    return [str(error) for error in validate(load_document(path, overrides))]


@pytest.mark.parametrize(
    ("section", "line", "words"),
    [
        (
            "train",
            "lora_alpha: 16",
            ["unknown key 'train.lora_alpha'", "belongs to lora: write lora.lora_alpha"],
        ),
        (
            "train",
            "load_in_4bit: true",
            ["belongs to quantization: write quantization.load_in_4bit"],
        ),
        ("train", "model_name_or_path: a/b", ["did you mean model.name_or_path"]),
        ("train", "lora_dropot: 0.1", ["did you mean lora.lora_dropout"]),
        ("train", "output_dir: out", ["cannot be set in a recipe", "run.name"]),
        ("train", "resume_from_checkpoint: true", ["cannot be set", "resumes"]),
        ("train", "chat_template_path: t.jinja", ["use data.chat_template"]),
        ("train", "trust_remote_code: true", ["use model.trust_remote_code"]),
        ("train", "dataset_text_field: text", ["data.columns"]),
        ("train", "deepspeed: ds.json", ["DeepSpeed is not supported"]),
        ("train", "logging_nan_inf_filter: true", ["must be false"]),
        ("train", "zzzqqq: 1", ["unknown key 'train.zzzqqq'", "recipes explain train"]),
        (
            "train",
            "activation_checkpointing_kwargs: {selective: true}",
            ["train.activation_checkpointing is off"],
        ),
        (
            "train",
            "activation_checkpointing_kwargs: {selective: true, use_reentrant: true}"
            "\n  activation_checkpointing: true",
            ["cannot work with use_reentrant"],
        ),
        ("data", "columns: {answer: output}", ["unknown key 'data.columns.answer'"]),
        ("data", "split: {validatoin: 0.1}", ["did you mean data.split.validation?"]),
        (
            "data",
            "split: {validation: 1.0}",
            ["data.split.validation must be a number >= 0 and < 1"],
        ),
        ("data", "split: {validation: 0.6, test: 0.5}", ["no training rows", "1.1"]),
        ("lora", "bias: some", ["none, all, lora_only"]),
        ("lora", "lora_dropout: 1.0", ["< 1"]),
        ("lora", "init_lora_weights: pisa", ["did you mean pissa?"]),
        ("lora", "target_modules: [q_proj, lm_head]", ["lm_head", "remove"]),
        ("model", "attn_implementation: 3", ["one of sdpa", "or null", "got 3"]),
        ("model", "revision: 3", ["text or null"]),
        (
            "launch",
            "accelerate: dpp",
            ["is not a file in accelerate_configs/", "did you mean ddp?"],
        ),
        ("quantization", "bnb_4bit_quant_type: nf4", ["switches nothing on"]),
        ("train", "max_steps: 0", ["-1", "whole number >= 1"]),
        (
            "train",
            "accelerator_config: {split_batch: true}",
            ["did you mean train.accelerator_config.split_batches?"],
        ),
        (
            "train",
            "accelerator_config: {gradient_accumulation_kwargs: {num_steps: 4}}",
            ["would replace train.gradient_accumulation_steps"],
        ),
    ],
)
def test_a_mistake_is_named_with_what_to_write_instead(section, line, words, write_with):
    said = "\n".join(errors_of(write_with(section, line)))
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("train", "lr_scheduler_kwargs: {num_cycles: 2}"),
        ("train", "report_to: [tensorboard, wandb]"),
        ("train", "warmup_steps: 0.03"),
        ("train", "max_length: null"),
        ("train", "max_steps: -1"),
        (
            "train",
            (
                "accelerator_config: {split_batches: false, gradient_accumulation_kwargs:"
                " {sync_each_batch: false}}"
            ),
        ),
        ("train", "num_train_epochs: 1"),
        ("lora", "target_modules: all-linear"),
        ("lora", "target_modules: .*_proj"),
        ("lora", "init_lora_weights: pissa_niter_16"),
        ("lora", "init_lora_weights: false"),
        ("lora", "task_type: CAUSAL_LM"),
        ("model", "kwargs: {use_kernels: true}"),
        ("data", "columns: {response: output}"),
        ("quantization", "load_in_4bit: true"),
        ("launch", "gpus: 1"),
    ],
)
def test_what_upstream_takes_is_taken(section, line, write_with):
    assert not errors_of(write_with(section, line))


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ("learning_rate: 1e-4\n", ["unknown section 'learning_rate'", "write train.learning_rate"]),
        ("trian: {seed: 1}\n", ["unknown section 'trian'", "did you mean train?"]),
        ("max_seq_length: 5\n", ["renamed to 'train.max_length'"]),
        ("wibble: 5\n", ["sections: model, quantization, lora, data, train, run, launch"]),
    ],
)
def test_a_top_level_key_that_is_no_section_is_sent_home(top, words, write):
    said = "\n".join(errors_of(write(f"model: {{name_or_path: a}}\ndata: {{source: b}}\n{top}")))
    assert "r.yaml:3: " in said
    assert not [word for word in words if word not in said], said


def test_missing_sections_and_keys_are_named(write):
    assert "model.name_or_path is missing" in "\n".join(
        errors_of(write("model: {dtype: auto}\ndata: {source: b}\n"))
    )
    said = "\n".join(errors_of(write("train: {seed: 1}\n")))
    assert "section 'model' is missing; it needs model.name_or_path" in said
    assert "section 'data' is missing; it needs data.source" in said


def test_a_base_is_a_fragment_and_needs_nothing(write):
    assert not errors_of(write("train: {seed: 1}\n", "_b.yaml"))
    assert "unknown key" in "\n".join(errors_of(write("train: {sed: 1}\n", "_b.yaml")))


def test_a_mistake_in_a_parent_is_reported_in_the_parent(write):
    write("model: {name_or_path: a}\ndata: {source: b}\ntrain:\n  sed: 1\n", "_b.yaml")
    [error] = errors_of(write("extends: _b.yaml\n"))
    assert error.startswith("_b.yaml:4: ")


def test_a_mistake_on_the_command_line_is_placed_there(write):
    [error] = errors_of(write(), "train.sed=1")
    assert error.startswith("command line: unknown key 'train.sed'")


def test_mixture_parts_are_checked_one_by_one(write):
    parts = (
        "    - {source: a.jsonl}\n    - {sorce: b.jsonl}\n    - {source: c.jsonl, max_examples:"
        " 0}\n"
    )
    text = f"model: {{name_or_path: a}}\ndata:\n  source:\n{parts}"
    said = errors_of(write(text))
    assert any(error.startswith("r.yaml:5: unknown key 'data.source.1.sorce'") for error in said)
    assert any("data.source.1.source is missing" in error for error in said)
    assert any("data.source.2.max_examples must be a whole number >= 1" in error for error in said)


@pytest.mark.parametrize(
    ("key", "value"),
    [("split_batches", "true"), ("dispatch_batches", "true"), ("use_seedable_sampler", "false")],
)
def test_accelerate_is_not_let_to_share_out_the_rows_in_another_way(write, key, value):
    text = (
        "data: {source: b}\nmodel: {name_or_path: a}\ntrain:\n  accelerator_config:\n   "
        f" {key}: {value}\n"
    )
    [error] = errors_of(write(text))
    assert error.startswith(
        f"r.yaml:5: train.accelerator_config.{key}: {value} gives the steps other examples"
    )


def test_flash_attention_needs_half_precision_weights(write):
    text = (
        "data: {source: b}\nmodel:\n  name_or_path: a\n  dtype: float32\n  attn_implementation:"
        " flash_attention_2\n"
    )
    [error] = errors_of(write(text))
    assert error.startswith(
        "r.yaml:5: model.attn_implementation flash_attention_2 cannot compute in float32"
    )


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("padding_free: false", "varlen is for rows without padding"),
        (
            "packing: true, packing_strategy: wrapped",
            "varlen: wrapped rows do not say where an example ends",
        ),
    ],
)
def test_varlen_attention_needs_rows_that_say_where_an_example_ends(write, train, words):
    text = (
        "data: {source: b}\nmodel:\n  name_or_path: a\n  attn_implementation: varlen\n"
        f"train: {{{train}}}\n"
    )
    [error] = errors_of(write(text))
    assert error.startswith("r.yaml:4: model.attn_implementation ") and words in error


def test_quantized_weights_need_an_adapter(write):
    text = "model: {name_or_path: a}\ndata: {source: b}\nquantization: {load_in_4bit: true}\n"
    assert "cannot be trained without an adapter" in "\n".join(errors_of(write(text)))


def test_evaluating_without_validation_rows_is_refused(write):
    text = (
        "model: {name_or_path: a}\ndata:\n  source: b\n  split: {validation: 0}\ntrain:\n "
        " eval_strategy: steps\n"
    )
    [error] = errors_of(write(text))
    assert error.startswith(
        "r.yaml:6: train.eval_strategy is steps, but data.split holds no validation rows out"
    )


def test_two_sources_of_the_accumulation_steps_are_a_warning(write):
    text = (
        "model: {name_or_path: a}\ndata: {source: b}\ntrain: {gradient_accumulation_steps: 2}\nrun:"
        " {global_batch_size: 8}\n"
    )
    document = load_document(write(text))
    assert not validate(document)
    assert "gradient_accumulation_steps is ignored" in document.warnings[0].what


def test_a_rank_that_changes_the_scaling_is_a_warning_with_the_way_to_keep_it(write):
    write(
        "model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\nlora: {r: 8, lora_alpha: 16}\n",
        "_b.yaml",
    )

    def warnings(text: str, *overrides: str) -> str:
        return " ".join(map(str, load_recipe(write(text), overrides).warnings))

    assert "r.yaml:2: warning: lora.r 8 -> 16" in (
        said := warnings("extends: _b.yaml\nlora: {r: 16}\n")
    )
    assert (
        "lora.lora_alpha still 16 scales the adapter by 1 instead of 2" in said
        and "lora.lora_alpha=32" in said
    )
    assert "command line: warning: lora.r 8 -> 32" in warnings("extends: _b.yaml\n", "lora.r=32")
    assert "lora.lora_alpha=32" in warnings(
        "extends: _b.yaml\nlora: {use_rslora: true}\n", "lora.r=32"
    )
    for quiet in (
        "extends: _b.yaml\nlora: {r: 16, lora_alpha: 32}\n",
        "extends: _b.yaml\nlora: {r: 8}\n",
        "extends: _b.yaml\nlora: null\n",
    ):
        assert not warnings(quiet)
    assert not warnings("extends: _b.yaml\n", "lora.r=16", "lora.lora_alpha=32")
