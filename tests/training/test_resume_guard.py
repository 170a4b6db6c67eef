"""What a resumed run must share with its beginning: every key of SFTConfig but those that decide
what is written, shown or sent.
"""

from __future__ import annotations

from recipes_lib.config.vocabulary import section_keys
from recipes_lib.training.resume_guard import FREE_KEYS, differences

FREE = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataset_num_proc",
    "disable_tqdm",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    "project",
    "push_to_hub",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "run_name",
    "save_on_each_node",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "skip_memory_metrics",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
}


def test_exactly_the_keys_that_change_no_result_may_change_between_attempts() -> None:
    """A key that a new version of TRL brings is guarded until somebody decides otherwise here."""
    keys = section_keys("train")
    assert "weight_decay" in keys
    free = {key for key in keys if FREE_KEYS.match(key)}
    assert free <= FREE, free - FREE


def test_a_run_of_a_release_without_a_key_resumes_with_its_default_and_with_nothing_else() -> None:
    """`data.encoding` came later; a run begun before it read its files as utf-8."""
    assert (
        differences({"data.format": "dolly"}, {"data.format": "dolly", "data.encoding": "utf-8"})
        == {}
    )
    changed = differences({}, {"data.encoding": "latin-1", "train.seed": 1})
    assert changed == {"data.encoding": ("utf-8", "latin-1"), "train.seed": (None, 1)}
