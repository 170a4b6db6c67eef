"""What a resumed run must share with its beginning: every key of SFTConfig but those that decide
what is written, shown or sent.
"""

from __future__ import annotations

from recipes_lib.config.recipe import load_recipe
from recipes_lib.config.upstream import TrainSection
from recipes_lib.training.resume_guard import FREE_KEYS, differences, guarded_values

FREE = """
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor dataset_num_proc disable_tqdm include_for_metrics
    include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy project report_to
    restore_callback_states_from_checkpoint skip_memory_metrics trackio_bucket_id
    trackio_space_id trackio_static_space_id
"""


def test_exactly_the_keys_that_change_no_result_may_change_between_attempts() -> None:
    """A key that a new version of TRL brings is guarded until somebody decides otherwise here."""
    keys = list(TrainSection.model_fields)
    assert "weight_decay" in keys
    free = {key for key in keys if FREE_KEYS.match(key)}
    assert free <= {*FREE.split()}, free - {*FREE.split()}


def test_what_a_validation_decides_by_is_guarded_where_it_chooses_the_weights_or_the_rate(
    tiny_recipe,
) -> None:
    for words, guarded in (
        ([], False),
        (["train.load_best_model_at_end=true", "train.save_steps=4"], True),
        (["train.lr_scheduler_type=reduce_lr_on_plateau"], True),
    ):
        values = guarded_values(load_recipe(tiny_recipe, words), "rows", 1, "one process", {})
        assert ("train.eval_steps" in values) is ("train.save_steps" in values) is guarded


def test_only_what_differs_is_told_and_a_key_of_one_side_counts_as_none() -> None:
    changed = differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4})
    assert changed == {"b": (2, 3), "c": (None, 4)}
