"""Keys that were renamed or removed upstream: `recipes check` names the new key, `recipes migrate`
writes it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rename:
    """What became of a key.

    `new` is the dotted key to write instead, or None when the key is gone; `note` says what to know
    about the value.
    """

    new: str | None
    since: str
    note: str = ""

    def message(self, old: str) -> str:
        """Return one line about what became of `old`."""
        fate = (
            f"was renamed to '{self.new}' in {self.since}"
            if self.new
            else f"was removed in {self.since}"
        )
        return f"'{old}' {fate}"


_T5 = "transformers 5"
_TRL = "TRL 1"

# Old name, as flat TRL files write it -> what became of it.
RENAMES = {
    "max_seq_length": Rename("train.max_length", _TRL),
    "torch_dtype": Rename("model.dtype", _T5),
    "warmup_ratio": Rename(
        "train.warmup_steps", _T5, "a number below 1 is a fraction of all steps"
    ),
    "group_by_length": Rename("train.train_sampling_strategy", _T5, "true -> group_by_length"),
    "evaluation_strategy": Rename("train.eval_strategy", _T5),
    "gradient_checkpointing": Rename("train.activation_checkpointing", _T5),
    "gradient_checkpointing_kwargs": Rename("train.activation_checkpointing_kwargs", _T5),
    "tokenizer": Rename(
        None,
        _TRL,
        "the trainer's argument is processing_class; the tokenizer comes with model.name_or_path",
    ),
    "overwrite_output_dir": Rename(
        None, _T5, "a run directory is never overwritten; choose another run.name"
    ),
    "logging_dir": Rename(None, _T5, "logs lie in the run directory"),
    "save_safetensors": Rename(None, _T5, "safetensors are always written"),
    "per_gpu_train_batch_size": Rename("train.per_device_train_batch_size", _T5),
    "per_gpu_eval_batch_size": Rename("train.per_device_eval_batch_size", _T5),
    "no_cuda": Rename("train.use_cpu", _T5),
    "dataset_batch_size": Rename(None, _TRL),
    "num_of_sequences": Rename(None, _TRL),
    "chars_per_token": Rename(None, _TRL),
    "neftune_alpha": Rename("train.neftune_noise_alpha", _TRL),
    "push_to_hub_model_id": Rename("train.hub_model_id", _T5),
    "push_to_hub_organization": Rename("train.hub_model_id", _T5, "write organisation/name"),
    "push_to_hub_token": Rename(None, _T5, "log in with 'hf auth login'"),
    "include_tokens_per_second": Rename(None, _T5, "tokens per second are always logged"),
    "use_mps_device": Rename(None, _T5, "the device is found by itself"),
    "use_flash_attention_2": Rename("model.attn_implementation", _T5, "true -> flash_attention_2"),
}
