"""Rows that hold several examples end to end: each is as if it stood alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.families import build_family
from tests.tiers import in_ci
from transformers import AutoModelForCausalLM, BioGptConfig, MiniMaxConfig, OPTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.models import families
from recipes_lib.train import main
from recipes_lib.training import attention
from recipes_lib.training.build import choose_attention

EXAMPLES = [
    {"input_ids": ids, "labels": ids}
    for ids in ([5, 6, 7, 8, 9], [10], [*range(20, 43)], [*range(50, 57)])
]


# Classes of text alone whose attention goes by positions; GPT-OSS takes them and does not use them.
JOINED = [
    *("llama", "qwen2", "qwen3", "gemma3_text", "gemma4_text", "smollm3", "ministral3", "olmo3"),
    *("phi3", "granite", "glm4", "cohere2", "gpt2", "llama4_text", "granitemoe", "qwen3_moe"),
    *("mixtral", "phimoe", "glm4_moe", "deepseek_v3"),
]


def joined_and_alone(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of one row of all examples, and of each in a row of its own."""
    batch = DataCollatorForLanguageModeling(0, padding_free=True)(EXAMPLES)
    batch.pop("labels")
    with torch.no_grad():
        joined = model(**batch, use_cache=False).logits[0]
        alone = [
            model(input_ids=torch.tensor([one["input_ids"]]), use_cache=False).logits[0]
            for one in EXAMPLES
        ]
    return joined, torch.cat(alone)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("by_document", [True, False], ids=["by document", "sdpa"])
def test_examples_in_one_row_are_kept_apart(family, by_document, tiny_model_dir, tmp_path) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if by_document:
        assert attention.use_document_attention(model)
    joined, alone = joined_and_alone(model)
    assert torch.allclose(joined, alone, atol=2e-5), (joined - alone).abs().max()


def random_model(kind: str) -> torch.nn.Module:
    """A random tiny model of a class without a place in tests/families.py."""
    torch.manual_seed(0)
    if kind == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
        config = OPTConfig(vocab_size=128, num_hidden_layers=2, num_attention_heads=4, **sizes)
    elif kind == "minimax":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_local_experts": 2}
        layers = ["linear_attention", "full_attention"]
        config = MiniMaxConfig(vocab_size=128, head_dim=8, layer_types=layers, **sizes)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
        config = BioGptConfig(vocab_size=128, num_hidden_layers=2, num_attention_heads=4, **sizes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["opt", "biogpt", "gpt_oss"])
def test_examples_that_read_each_other_are_found_by_an_experiment(
    kind, dtype, tiny_model_dir, tmp_path
) -> None:
    """These take positions, and do not hand them to their mask."""
    if kind == "gpt_oss":
        folder = build_family(kind, tmp_path / kind, tiny_model_dir)
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = random_model(kind)
    model = model.to(dtype).train()
    assert families.why_rows_apart(model) is None
    assert attention.examples_are_read_by_others(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", in_ci(JOINED, "llama", "gemma3_text", "mixtral"))
def test_the_experiment_lets_families_share_rows_whose_examples_stay_apart(
    family, dtype, tiny_model_dir, tmp_path
) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert not attention.examples_are_read_by_others(model)


def test_packing_is_refused_where_examples_would_read_each_other(
    tiny_recipe, tiny_model_dir, tmp_path, capsys
) -> None:
    folder = build_family("gpt_oss", tmp_path / "model", tiny_model_dir)
    words = [f"model.name_or_path={folder}", "lora.target_modules=[q_proj]", "train.packing=true"]
    assert main([str(tiny_recipe), *words]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "train.packing: GptOssForCausalLM lets an example read those before it" in said
    assert "set train.packing: false" in said


# ---- kernels of a GPU ----


@pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2", "someone/flash-attn"])
def test_the_experiment_asks_what_a_model_on_the_cpu_hands_to_a_kernel_of_a_gpu(
    kernel, tiny_model_dir
) -> None:
    """BioGPT hands bounds to kernels and not to its mask; MiniMax carries a state past them."""
    llama = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    biogpt = random_model("biogpt")
    assert attention.examples_are_read_by_others(biogpt)
    for model, is_apart in ((llama, True), (biogpt, True), (random_model("minimax"), False)):
        model.config._attn_implementation = kernel
        assert attention.examples_are_read_by_others(model) is not is_apart, type(model)
        assert kernel not in attention.ALL_ATTENTION_FUNCTIONS or kernel == "flash_attention_2"


def test_a_model_that_hands_no_bounds_to_varlen_keeps_no_examples_apart(
    tiny_model_dir, monkeypatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    collator = attention.DataCollatorForLanguageModeling

    def without_bounds(*args: Any, **kwargs: Any) -> Any:
        def collate(examples: Any) -> Any:
            batch = collator(*args, **kwargs)(examples)
            return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}

        return collate

    monkeypatch.setattr(attention, "DataCollatorForLanguageModeling", without_bounds)
    model.config._attn_implementation = "flash_attention_2"
    assert not attention.examples_are_read_by_others(model)  # it looks at the positions
    model.config._attn_implementation = "varlen"
    assert attention.examples_are_read_by_others(model)


class Gpu:
    """A card that is not there: what the choice of a kernel asks of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "_varlen_fault", lambda *shape: None)

    def arguments(self, bf16: bool, **more: Any) -> Any:
        values = {"packing": False, "per_device_train_batch_size": 4, "fp16": False}
        return SimpleNamespace(device=torch.device("cuda"), bf16=bf16, **(values | more))


@pytest.mark.parametrize(
    ("bf16", "capability", "head_size", "kernel"),
    [
        (True, (9, 0), 16, "varlen"),
        (False, (9, 0), 16, "sdpa"),
        (True, (7, 5), 16, "sdpa"),
        (True, (9, 0), 512, "sdpa"),
    ],
)
def test_on_a_gpu_rows_are_joined_for_varlen_and_padded_elsewhere(
    bf16, capability, head_size, kernel, tiny_recipe, tiny_model_dir, monkeypatch
) -> None:
    gpu = Gpu(monkeypatch, capability)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.config.head_dim = head_size
    joins = choose_attention(load_recipe(tiny_recipe), gpu.arguments(bf16), model)
    assert (joins, model.config._attn_implementation) == (kernel == "varlen", kernel)


def test_on_a_gpu_sdpa_masks_a_joined_row_only_where_the_recipe_joins_it(
    tiny_recipe, tiny_model_dir, monkeypatch, capsys
) -> None:
    gpu = Gpu(monkeypatch, (7, 5))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    chosen = load_recipe(tiny_recipe, ["model.attn_implementation=sdpa"])
    assert not choose_attention(chosen, gpu.arguments(bf16=True), model)
    assert capsys.readouterr().out == ""
    packed = load_recipe(tiny_recipe, ["train.packing=true"])
    arguments = gpu.arguments(bf16=True, packing=True, packing_strategy="bfd")
    assert not choose_attention(packed, arguments, model)
    assert model.config._attn_implementation == "sdpa"
    assert "varlen needs a GPU of compute capability 8.0" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_a_kernel_that_cannot_compute_the_model_is_refused_before_the_first_step(
    kernel, tiny_recipe, tiny_model_dir, monkeypatch
) -> None:
    recipe = load_recipe(tiny_recipe, [f"model.attn_implementation={kernel}"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    gpu = Gpu(monkeypatch, (8, 6))
    with pytest.raises(RecipeError, match=f"{kernel} computes in bfloat16 .* in float32"):
        choose_attention(recipe, gpu.arguments(bf16=False), model)
    if kernel == "flash_attention_3":
        with pytest.raises(RecipeError, match=r"capability 9\.0, and this one has 8\.6"):
            choose_attention(recipe, gpu.arguments(bf16=True), model)
    model.config.head_dim = 512
    with pytest.raises(RecipeError, match="heads of at most 256, and LlamaForCausalLM has 512"):
        choose_attention(recipe, gpu.arguments(bf16=True), model)


def test_varlen_that_fails_on_the_card_is_a_reason_and_no_crash(monkeypatch) -> None:
    def kernel(*tensors: Any, **options: Any) -> Any:
        raise RuntimeError("FlashAttention only supports what this is not\nmore")

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    why = attention._varlen_fault(4, 2, 16, torch.bfloat16, torch.device("cpu"))
    assert why is not None
    assert why.startswith("does not run on this GPU: FlashAttention only supports")


def test_varlen_hands_bounds_window_and_scale_to_torchs_kernel(monkeypatch) -> None:
    """No GPU here: the kernel's arguments, checked against a stand-in."""
    seen = {}

    def kernel(query, key, value, first, second, longest, also, **options):
        seen.update(options, longest=longest, shapes=(query.shape, key.shape), dtype=query.dtype)
        return torch.zeros_like(query)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, key = torch.zeros(1, 4, 12, 8), torch.zeros(1, 2, 12, 8)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        options = {"scaling": 0.5, "sliding_window": 4, "cu_seq_lens_q": bounds, "max_length_q": 7}
        output, _ = attention.varlen_attention(torch.nn.Module(), query, key, key, None, **options)
    assert output.shape == (1, 12, 4, 8)
    expected = {"scale": 0.5, "window_size": (3, 0), "enable_gqa": True, "longest": 7}
    assert seen == {**expected, "shapes": ((12, 4, 8), (12, 2, 8)), "dtype": torch.bfloat16}
