"""Steps and warm-up, counted as the Trainer counts them."""

from __future__ import annotations

import pytest

from recipes_lib.config.batch import describe_schedule, planned_steps, warmup_steps


@pytest.mark.parametrize("value", [0, 0.03, 0.1, 0.5, 1, 7])
@pytest.mark.parametrize("steps", [1, 2, 33, 1128])
def test_warmup_is_what_transformers_makes_of_it(value, steps):
    from transformers import TrainingArguments

    assert warmup_steps(value, steps) == TrainingArguments(
        "unused", use_cpu=True, warmup_steps=value
    ).get_warmup_steps(steps)


@pytest.mark.parametrize(
    ("rows", "accumulation", "epochs"), [(305, 1, 1), (305, 4, 1.5), (64, 8, 1)]
)
def test_steps_are_what_the_trainer_plans(rows, accumulation, epochs, tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        report_to="none",
    )
    args.dataloader_drop_last = True
    rows -= rows % (4 * accumulation)
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=[{"x": 0}] * rows)
    _, planned, *_, max_steps = trainer.set_initial_training_values(
        args, trainer.get_train_dataloader()
    )
    shape = {"per_device": 4, "accumulation": accumulation, "world_size": 1}
    assert planned_steps(rows, **shape, epochs=epochs) == (planned, max_steps)


def test_a_first_step_that_trains_nothing_is_said_to_do_so():
    assert (
        "step 1 has learning rate 0 and trains nothing; none: train.warmup_steps=0"
        in describe_schedule("cosine", 1e-3, 0.03, 2)
    )
    assert describe_schedule("constant", 1e-3, 0.03, 2).endswith("no warmup")
