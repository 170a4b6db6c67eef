"""The door for a second objective: what `ExactTrainer` promises holds for one that has no labels,
on the plain Trainer of transformers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from recipes_lib.core.errors import NumericsError
from recipes_lib.training import resume_guard
from recipes_lib.training.stopping import PREEMPT, StopRequest
from recipes_lib.training.trainer import ExactTrainer

PAIRS = [{"better": [3 + n % 50, 7, 9 + n % 11, 4], "worse": [5 + n % 40, 8, 6]} for n in range(26)]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Return both answers of each pair below each other, and which pairs are real."""
    answers = [row[name] for name in ("better", "worse") for row in rows]
    length = max(map(len, answers))
    padded = [answer + [0] * (length - len(answer)) for answer in answers]
    return {"tokens": torch.tensor(padded), "is_pair": torch.tensor([r["better"][0] for r in rows])}


class PreferenceTrainer(ExactTrainer, Trainer):
    """An objective of pairs: the better answer gets larger logits than the worse one."""

    filler = {"better": [0, 0], "worse": [0, 0]}

    def row_lengths(self, rows: Dataset) -> list[int]:
        return [len(row["better"]) + len(row["worse"]) for row in rows]

    def num_items(self, batch: Any) -> int:
        return int((batch["is_pair"] != 0).sum())

    def margins(self, model: Any, batch: Any) -> torch.Tensor:
        scores = model(input_ids=batch["tokens"]).logits.float().mean(dim=(1, 2))
        better, worse = scores.chunk(2)
        return (better - worse)[batch["is_pair"] != 0]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(self.margins(model, inputs)).mean()

    def validation_means(self, batch: Any) -> dict[str, float]:
        margins = self.margins(self.model, batch)
        accuracy = float((margins > 0).float().mean())
        return {**super().validation_means(batch), "accuracy": accuracy}


def preference_trainer(folder: Path, model_dir: Path, **more: Any) -> PreferenceTrainer:
    """Return a trainer of eight steps with dropout, which saves every second one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        use_cpu=True,
        max_steps=8,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        eval_steps=4,
        eval_strategy="steps",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    return PreferenceTrainer(
        model=get_peft_model(model, lora),
        args=args,
        data_collator=collate,
        train_dataset=Dataset.from_list(PAIRS[:20]),
        eval_dataset=Dataset.from_list(PAIRS[20:]),
        stop=StopRequest(),
        row_ids=[f"pair-{number}" for number in range(20)],
        keep=2,
        guard={"train.learning_rate": 1e-2},
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer: Trainer) -> list[list[float]]:
    keys = ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy")
    return [[row.get(key, -1.0) for key in keys] for row in trainer.state.log_history]


@pytest.mark.parametrize("stopped_at", [3, 5, 7])
def test_another_objective_stops_and_resumes_to_the_same_bytes(
    stopped_at, tiny_model_dir, tmp_path, capsys
) -> None:
    whole = preference_trainer(tmp_path / "whole", tiny_model_dir)
    whole.train()
    assert "probe: the longest micro-batch (2 rows, 16 tokens)" in capsys.readouterr().out
    assert whole.state.global_step == 8

    stopped = preference_trainer(tmp_path / "stopped", tiny_model_dir)
    step = stopped.training_step

    def training_step(*args: Any) -> Any:
        if stopped.state.global_step == stopped_at - 1 and stopped.optimizer.state:
            stopped.stop.requested = PREEMPT
        return step(*args)

    stopped.training_step = training_step  # type: ignore[method-assign]
    stopped.train()
    assert stopped.stop.agreed == PREEMPT and stopped.state.global_step == stopped_at
    folder = tmp_path / "stopped" / "checkpoints"
    newest, broken = resume_guard.find_newest(folder)
    assert newest == folder / f"checkpoint-{stopped_at}" and not broken
    assert len(resume_guard.list_checkpoints(folder)) == 2

    resumed = preference_trainer(tmp_path / "stopped", tiny_model_dir)
    resumed.train(resume_from_checkpoint=newest)
    assert logged(resumed)[:-1] == logged(whole)[:-1]  # the last line is of times
    after, expected = weights(resumed), weights(whole)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    resumed.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "training_args.bin").exists()


def test_each_step_of_another_objective_has_whole_batches_and_its_validation_all_pairs(
    tiny_model_dir, tmp_path
) -> None:
    trainer = preference_trainer(tmp_path, tiny_model_dir)
    assert (trainer.batches.global_batch, trainer.batches.steps) == (4, 5)
    rows = [row for batch in trainer.get_train_dataloader() for row in batch["is_pair"].tolist()]
    assert len(rows) == 20
    metrics = trainer.evaluate()
    with torch.no_grad():
        trainer.model.eval()
        margins = trainer.margins(trainer.model, collate(PAIRS[20:]))
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(float((margins > 0).float().mean()))


def test_numbers_of_another_objective_that_are_not_finite_stop_it_with_its_examples(
    tiny_model_dir, tmp_path, monkeypatch
) -> None:
    trainer = preference_trainer(tmp_path, tiny_model_dir)
    honest = trainer.margins

    def margins(model: Any, batch: Any) -> torch.Tensor:
        infinite = float("inf") if trainer.state.global_step == 2 else 1.0
        return honest(model, batch) * infinite

    monkeypatch.setattr(trainer, "margins", margins)
    with pytest.raises(NumericsError, match=r"at step 3, .*examples pair-\d+, pair-\d+") as caught:
        trainer.train()
    rows = trainer.batches.rows_of_step(2)
    assert ", ".join(f"pair-{row}" for row in rows) in str(caught.value)
    marker = json.loads((tmp_path / "checkpoints/checkpoint-2/COMPLETE.json").read_text())
    assert marker["guard"] == {"train.learning_rate": 1e-2}
