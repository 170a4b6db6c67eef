"""One way of training, one optimizer step at a time on command: the other half of `train_cpu.py`,
which starts it; not run by hand.

After each optimizer step a JSON line (`cpu_s`, `tokens`, `loss`) goes to the original standard
output and the process waits for a line on standard input. CPU seconds are those between that line
and the end of the step: data loading, forward, backward, optimizer, logging. Tokens are those of
the examples; padding does not count. It also runs in a peer's environment, so it imports nothing of
this project at the top.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECT = Path(__file__).resolve().parents[1]


class Turns:
    """Reports a step, then waits for its turn."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.tokens = 0
        self.began = time.process_time()

    def count(self, inputs: dict[str, Any]) -> None:
        """Add a micro-batch: by its mask (also the 4D one of packed rows), or by its length where
        it has no padding.
        """
        mask = inputs.get("attention_mask")
        if mask is None:
            self.tokens += inputs["input_ids"].numel()
        elif mask.dim() == 4:
            itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            self.tokens += int((itself == 0).sum() if itself.is_floating_point() else itself.sum())
        else:
            self.tokens += int((mask > 0).sum())

    def end_of_step(self, loss: float | None = None) -> None:
        """Report, wait, start the clock."""
        seconds = time.process_time() - self.began
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(
                    0
                )  # while others have their turn, free memory goes back to the machine
        self.out.write(json.dumps({"cpu_s": seconds, "tokens": self.tokens, "loss": loss}) + "\n")
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.tokens = 0
        self.began = time.process_time()


def listen_to_trainer(turns: Turns) -> None:
    """Let every transformers Trainer of this process report its steps."""
    import transformers.trainer
    from transformers import Trainer, TrainerCallback

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.end_of_step()

    original = Trainer.training_step

    def counted(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        turns.count(inputs)
        return original(self, model, inputs, *rest, **kwargs)

    Trainer.training_step = counted  # type: ignore[method-assign]
    transformers.trainer.DEFAULT_CALLBACKS.append(Report)


def ours(job: dict[str, Any], turns: Turns, *overrides: str) -> None:
    """The quickstart's recipe with the user's own rows: what `recipes new --data` gives."""
    listen_to_trainer(turns)
    os.environ["RECIPES_RUNS_ROOT"] = job["scratch"]
    from recipes_lib.train import main

    own = [
        "data.prompt_format=dolly",
        "data.split={method: none}",
        "train.eval_strategy='no'",
        "train.save_strategy='no'",
    ]
    own += [
        f"data.source={job['rows']}",
        "run.name=benchmark",
        f"run.global_batch_size={job['examples_per_step']}",
    ]
    own += [
        "train.max_length=1024",
        "train.train_sampling_strategy=sequential",
        f"model.name_or_path={job['model']}",
    ]
    raise SystemExit(main([str(PROJECT / "recipes/quickstart/lora-r8.yaml"), *own, *overrides]))


def apply_patch(name: str | None) -> None:
    """Take one of this project's levers back, or try one that is no setting."""
    if name == "no-gc":
        import gc

        gc.disable()
    elif name in {"trl-loss", "trl-head"}:
        from trl.trainer.utils import add_fused_lm_head

        from recipes_lib.training.trainer import RecipeTrainer

        def set_up_loss(self: Any) -> None:
            self.scored_here, self.scores_itself = name == "trl-head", False
            if self.scored_here:
                add_fused_lm_head(self.model.get_base_model(), outputs=("log_probs", "is_top1"))

        RecipeTrainer._set_up_loss = set_up_loss  # type: ignore[method-assign]
    elif name == "masked-attention":
        from recipes_lib.training.cpu import attention

        attention.use_document_attention = lambda model: False
    elif name == "bf16-adapters":
        import torch
        import trl.trainer.sft_trainer as owner

        original = owner.get_peft_model

        def in_bf16(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs, autocast_adapter_dtype=False).to(torch.bfloat16)

        owner.get_peft_model = in_bf16


def with_trl(job: dict[str, Any], turns: Turns, dtype: str, **settings: Any) -> None:
    """Plain TRL."""
    listen_to_trainer(turns)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([prompt_and_completion(row) for row in rows])
    values: dict[str, Any] = {
        "output_dir": job["scratch"],
        "use_cpu": True,
        "max_length": 1024,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    values |= {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
    } | settings
    SFTTrainer(
        model=job["model"],
        args=SFTConfig(model_init_kwargs={"dtype": dtype}, **values),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
    ).train()


def original_study(job: dict[str, Any], turns: Turns) -> None:
    """Padded batches of like length, activation checkpointing, float32, loss over the
    whole text.
    """
    settings = {
        "bf16": False,
        "gradient_checkpointing": True,
        "train_sampling_strategy": "group_by_length",
    }
    settings |= {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": job["examples_per_step"] // 4,
    }
    with_trl(job, turns, "float32", completion_only_loss=False, **settings)


def trl_packed(job: dict[str, Any], turns: Turns) -> None:
    """TRL's packing, bf16, no checkpointing."""
    settings = {
        "bf16": True,
        "gradient_checkpointing": False,
        "packing": True,
        "completion_only_loss": True,
    }
    with_trl(
        job,
        turns,
        "bfloat16",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job["packs_per_step"],
        **settings,
    )


def prompt_and_completion(row: dict[str, str]) -> dict[str, str]:
    """A Dolly row in the words of the `dolly` prompt format."""
    context = f"### Context:\n{row['context']}\n\n" if row.get("context") else ""
    return {
        "prompt": f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n",
        "completion": row["response"],
    }


def bare_loop(job: dict[str, Any], turns: Turns, our_loss: bool) -> None:
    """transformers + PEFT + AdamW in a hand-written loop over the same padding-free micro-batches
    as ours: no trainer, no logging.

    Args:
        job: what to train on.
        turns: reports the steps.
        our_loss: use this project's token loss and attention by document instead of the model's
            own.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [
        prompt_and_completion(json.loads(line))
        for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    ]
    examples = []
    for row in rows:
        prompt, completion = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "completion")
        )
        ids = [*prompt, *completion, tokenizer.eos_token_id][:1024]
        examples.append(
            {"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:1024]}
        )
    collate = DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.pad_token_id or 0, padding_free=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    if our_loss:
        from recipes_lib.training.cpu.attention import use_document_attention
        from recipes_lib.training.loss import add_token_loss, supervised_places

        use_document_attention(model)
        add_token_loss(model)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    size, micro = job["examples_per_step"], 8
    for start in range(0, len(examples) - size + 1, size):
        batches = [collate(examples[at : at + micro]) for at in range(start, start + size, micro)]
        count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            turns.count(batch)
            with torch.autocast("cpu", torch.bfloat16):
                extra = {"num_items_in_batch": count}
                if our_loss:
                    places = supervised_places(batch["labels"])
                    extra = {"loss_scale": 1 / count, "supervised": places}
                loss = model(**batch, **extra, use_cache=False)[0]
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end_of_step(total)


def llama_factory(job: dict[str, Any], turns: Turns, **settings: Any) -> None:
    """LLaMA-Factory through the function behind its command line."""
    listen_to_trainer(turns)
    folder = Path(job["scratch"]) / f"{job['way']}-data"
    folder.mkdir(exist_ok=True)
    columns = {"prompt": "instruction", "query": "context", "response": "response"}
    info = {"rows": {"file_name": str(job["rows"]), "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    # It imports torchaudio, which is built against another torch than the CPU's and is used for
    # audio alone.
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp

    arguments: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
    }
    arguments |= {
        "lora_target": "all",
        "template": "alpaca",
        "cutoff_len": 1024,
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
    }
    arguments |= {
        "model_name_or_path": job["model"],
        "dataset": "rows",
        "dataset_dir": str(folder),
        "output_dir": job["scratch"] + "/lf",
    }
    arguments |= {
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_train_epochs": 3,
        "overwrite_cache": True,
    }
    run_exp(arguments | settings)


WAYS = {
    "ours": ours,
    "original": original_study,
    "trl-packed": trl_packed,
    "bare": lambda job, turns: bare_loop(job, turns, our_loss=False),
    "bare-our-loss": lambda job, turns: bare_loop(job, turns, our_loss=True),
    "llamafactory-default": lambda job, turns: llama_factory(
        job,
        turns,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=job["examples_per_step"] // 8,
    ),
    "llamafactory-packed": lambda job, turns: llama_factory(
        job,
        turns,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job["packs_per_step"],
        packing=True,
        neat_packing=True,
        disable_gradient_checkpointing=True,
        optim="adamw_torch_fused",
    ),
    "llamafactory-grouped": lambda job, turns: llama_factory(
        job,
        turns,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=job["examples_per_step"] // 4,
        train_sampling_strategy="group_by_length",
        disable_gradient_checkpointing=True,
        optim="adamw_torch_fused",
    ),
}


def main() -> None:
    """Train in the way of the job on the command line."""
    job = json.loads(sys.argv[1])
    turns = Turns()
    import torch

    torch.set_num_threads(1)
    apply_patch(job.get("patch"))
    if job.get("overrides") is not None:
        ours(job, turns, *job["overrides"])
    WAYS[job["way"]](job, turns)


if __name__ == "__main__":
    main()
