"""Batch, steps and warm-up, counted as the Trainer counts them."""

from hypothesis import given
from hypothesis import strategies as st

from recipes_lib.config.launch import planned_steps, solve_batch
from recipes_lib.core.errors import RecipeError

SIZES = st.integers(min_value=1, max_value=64)


@given(batch=st.integers(min_value=1, max_value=512), per_device=SIZES, world_size=SIZES)
def test_the_solution_is_exact_or_refused(batch, per_device, world_size):
    try:
        assert solve_batch(batch, per_device, world_size) * per_device * world_size == batch
    except RecipeError:
        assert batch % (per_device * world_size)


def test_steps_are_what_the_trainer_plans(tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    options = {"use_cpu": True, "report_to": "none", "dataloader_drop_last": True}
    for rows, accumulation, epochs in ((305, 1, 1), (305, 4, 1.5), (64, 8, 1)):
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            **options,
        )
        trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=[{"x": 0}] * rows)
        loader = trainer.get_train_dataloader()
        _, planned, *_, max_steps = trainer.set_initial_training_values(args, loader)
        assert planned_steps(rows, 4 * accumulation, epochs) == (planned, max_steps)
