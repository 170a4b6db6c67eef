"""One rank, two ranks, DDP, FSDP2: the same mathematics, proven on real processes (gloo on CPU)."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from tests.conftest import NF4
from tests.families import build_family
from tests.tiers import in_ci
from transformers import AutoTokenizer

PROJECT = Path(__file__).resolve().parents[2]
STORED = NF4.replace("}", ", bnb_4bit_quant_storage: bfloat16}")
pytestmark = pytest.mark.slow
# Each config trains through accelerate's own code path; loss per step differs only by the order of
# float32 sums.
SUM_ORDER = 2e-5


@pytest.fixture(scope="module")
def compared(launcher) -> dict[str, str]:
    """What each launch said: one rank with 2 accumulation steps, and two ranks under DDP
    and FSDP2.
    """
    return {
        name: launcher.train(f"run.name={name}", config=name)
        for name in ("cpu", "ddp_cpu", "fsdp_cpu")
    }


def test_accumulating_on_one_rank_equals_two_ranks(launcher, compared) -> None:
    for key in ("loss", "eval_loss", "grad_norm"):
        one, two = launcher.series("cpu", key), launcher.series("ddp_cpu", key)
        assert len(one) == len(two) > 0
        assert one == pytest.approx(two, rel=SUM_ORDER)
    assert launcher.series("cpu", "tokens") == launcher.series("ddp_cpu", "tokens")
    one, two = (load(launcher.adapter(config)) for config in ("cpu", "ddp_cpu"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_ddp_and_fsdp2_write_the_same_adapter_bit_for_bit(launcher, compared) -> None:
    assert launcher.adapter("ddp_cpu") == launcher.adapter("fsdp_cpu")
    for config, kind in (("ddp_cpu", "DDP"), ("fsdp_cpu", "FSDP")):
        assert f"{kind}, world size 2" in compared[config]
        shape = "4 per device x 1 accumulation x 2 ranks = 8 examples per step"
        assert shape in compared[config]


@pytest.mark.parametrize("config", in_ci(["ddp_cpu", "fsdp_cpu"], "fsdp_cpu"))
def test_compiled_blocks_train_as_plain_ones(launcher, compared, config) -> None:
    name = f"compiled-{config}"
    launcher.train(f"run.name={name}", "train.torch_compile_backend=aot_eager", config=config)
    for key in ("loss", "eval_loss", "grad_norm", "tokens"):
        plain, compiled = launcher.series(config, key), launcher.series(name, key)
        assert plain == pytest.approx(compiled, rel=SUM_ORDER)


@pytest.mark.parametrize("way", in_ci(["random", "group_by_length", "packed"], "group_by_length"))
def test_rows_that_fill_no_step_are_left_out_alike_on_any_number_of_ranks(launcher, way) -> None:
    """30 of 32 training rows fill steps of 12; 11 validation rows fill no batch of two ranks."""
    words = ["data.max_examples=43", "data.split.validation=0.25", "run.global_batch_size=12"]
    words += ["train.per_device_train_batch_size=3", "train.per_device_eval_batch_size=4"]
    words += ["train.max_steps=-1", "train.num_train_epochs=2", "lora.lora_dropout=0"]
    packed = ["train.packing=true", "run.global_batch_size=6"]
    words += packed if way == "packed" else [f"train.train_sampling_strategy={way}"]
    said = launcher.train(f"run.name=one-{way}", *words, config="cpu")
    assert way == "packed" or "left out" in said
    for config in ("ddp_cpu", "fsdp_cpu"):
        launcher.train(f"run.name={config}-{way}", *words, config=config)
        for key in ("loss", "grad_norm", "eval_loss"):
            alone, ranks = (launcher.series(f"{n}-{way}", key) for n in ("one", config))
            assert len(alone) >= 1 and alone == pytest.approx(ranks, rel=SUM_ORDER)
        tokens = (launcher.series(f"{n}-{way}", "tokens") for n in ("one", config))
        assert next(tokens) == next(tokens)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("method", in_ci(["lora", "full"], "lora"))
def test_a_resumed_ddp_training_on_four_ranks_ends_in_the_same_bytes(launcher, tmp_path, method):
    """DDP rebuilds its buckets after the first backward pass of a process; the probe makes it."""
    four = tmp_path / "four.yaml"
    config = (PROJECT / "accelerate_configs/ddp_cpu.yaml").read_text()
    four.write_text(config.replace("num_processes: 2", "num_processes: 4"))
    words = ["train.per_device_train_batch_size=2", "train.eval_strategy='no'"]
    full, lora = ["lora=null", "train.learning_rate=1e-3"], ["lora.lora_dropout=0.2", "lora.r=8"]
    words += full if method == "full" else lora
    launcher.train(f"run.name=whole-{method}", *words, config=four)
    launcher.break_and_resume(f"broken-{method}", *words, config=four, step=5)
    assert launcher.weights(f"broken-{method}") == launcher.weights(f"whole-{method}")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("config", ["ddp_cpu", "fsdp_cpu"])
def test_rows_for_new_tokens_are_the_same_after_a_resume(
    config, launcher, tiny_model_dir, tmp_path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "more-tokens"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)
    words = [f"model.name_or_path={folder}", "model.resize_embeddings=true", "train.max_steps=4"]
    words += ["lora.modules_to_save=[embed_tokens, lm_head]", "train.eval_strategy='no'"]
    launcher.train(f"run.name=rows-{config}", *words, config=config)
    launcher.break_and_resume(f"parts-{config}", *words, config=config, step=3)
    assert launcher.weights(f"parts-{config}") == launcher.weights(f"rows-{config}")


def test_fsdp2_sums_gradients_in_float32(launcher) -> None:
    """With beta1 = 0 Adam's first moment is the gradient. Summed in bf16, every one of its numbers
    would be a bf16 number.
    """
    words = ["train.bf16=true", "train.adam_beta1=0.0", "train.max_grad_norm=0"]
    words += ["train.max_steps=1", "train.warmup_steps=0", "run.name=summed"]
    launcher.train(*words, config="fsdp_cpu")
    file = launcher.run("summed") / "checkpoints/checkpoint-1/optimizer.bin"
    states = torch.load(file, weights_only=True)["state"]
    gradients = torch.cat([state["exp_avg"].flatten() for state in states.values()])
    assert gradients.count_nonzero() > 100
    assert not torch.equal(gradients, gradients.bfloat16().float())


@pytest.mark.parametrize("family", in_ci(["gemma4_text", "gemma3"], "gemma3"))
def test_a_model_whose_class_lists_blocks_it_lacks_is_sharded(
    launcher, tiny_model_dir, tmp_path, family
) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    words = [f"model.name_or_path={folder}", "train.max_steps=2", f"run.name={family}"]
    assert "FSDP, world size 2" in launcher.train(*words, config="fsdp_cpu")
    assert launcher.state(family)["weights_check"]["tensors"] > 0


def test_in_bf16_the_head_that_a_gpu_gets_multiplies_in_bf16_under_fsdp2_too(launcher) -> None:
    """In float32 it would use no tensor cores: FSDP2 must not cast what the layers hand to it. By
    accelerate's default it rounds its outputs, the loss too, to 8 bits: steps of 0.03 at 6.
    """
    for config in ("ddp_cpu", "fsdp_cpu"):
        overrides = ["train.bf16=true", "model.dtype=bfloat16", "train.max_steps=4"]
        overrides.append(f"run.name=fused-bf16-{config}")
        code, said = launcher.start(*overrides, config=config, patch="fused_head").wait()
        assert code == 0 and "fused head: torch.bfloat16" in said, said[-3000:]
        assert "fused head: torch.float32" not in said
    ddp, fsdp = (launcher.series(f"fused-bf16-{kind}_cpu", "loss") for kind in ("ddp", "fsdp"))
    assert ddp == pytest.approx(fsdp, rel=SUM_ORDER)
    assert not all((loss * 2**8).is_integer() for loss in fsdp)


@pytest.mark.parametrize("method", in_ci(["lora", "qlora"], "qlora"))
@pytest.mark.parametrize("config", in_ci(["ddp_cpu", "fsdp_cpu"], "fsdp_cpu"))
def test_a_signal_to_one_rank_stops_both_and_the_adapter_is_the_same(
    launcher, config, method, request
) -> None:
    name = request.node.callspec.id
    overrides = [STORED, "train.bf16=true"] if method == "qlora" else []
    overrides += ["lora.lora_dropout=0.3", "train.max_steps=30", "train.save_steps=10"]
    overrides += ["train.eval_steps=10", "train.logging_steps=3"]
    launcher.train("run.name=whole-" + name, *overrides, config=config)
    quantized = launcher.state(f"whole-{name}")["summary"]["quantized_layers"]
    assert quantized == (14 if method == "qlora" else 0)
    child = launcher.start(f"run.name=broken-{name}", *overrides, config=config)
    launcher.wait_for_step(child, f"broken-{name}")
    os.kill(child.ranks()[1], signal.SIGTERM)
    _, said = child.wait()
    state = launcher.state(f"broken-{name}")
    assert (state["state"], state["exit_code"]) == ("stopped", 75), said[-3000:]
    saved = launcher.run(f"broken-{name}") / f"checkpoints/checkpoint-{state['step']}"
    assert (saved / "COMPLETE.json").is_file()
    launcher.train(f"run.name=broken-{name}", *overrides, config=config)
    assert launcher.adapter(f"broken-{name}") == launcher.adapter(f"whole-{name}")
    validated = (launcher.series(f"{run}-{name}", "eval_loss") for run in ("broken", "whole"))
    assert next(validated) == next(validated)


def test_a_resume_on_more_ranks_is_refused_and_cannot_be_insisted_on(launcher) -> None:
    words = ["train.logging_steps=5", "train.save_steps=3", "run.name=grows"]
    launcher.start(*words, patch="kill", KILL_MOMENT="in a step", KILL_STEP="4").wait()
    assert (launcher.run("grows") / "checkpoints/checkpoint-3").is_dir()
    for more in ([], ["--resume-anyway"]):
        code, said = launcher.start(*words, *more, config="ddp_cpu").wait()
        assert code != 0 and said.count("launch.world_size") == 1, said[-2000:]


def test_fsdp2_shares_adapters_gradients_once_per_step_and_others_after_each_pass(launcher) -> None:
    """Whole gradients of a whole model would wait on each rank for the last pass."""
    exchanges = {}
    for method, words in (("lora", []), ("full", ["lora=null", "train.learning_rate=1e-3"])):
        for size in (4, 2):  # one micro-batch per step and rank, and two
            more = [f"train.per_device_train_batch_size={size}", f"run.name=shared-{method}-{size}"]
            more += ["train.max_steps=6", "train.eval_strategy='no'", *words]
            code, said = launcher.start(*more, config="fsdp_cpu", patch="watched").wait()
            assert code == 0, said[-3000:]
            [first, second] = map(int, re.findall(r"rank \d: (\d+) exchanges", said))
            assert first == second > 0
            exchanges[method, size] = first
    assert exchanges["lora", 2] == exchanges["lora", 4]
    assert exchanges["full", 2] == 2 * exchanges["full", 4]
