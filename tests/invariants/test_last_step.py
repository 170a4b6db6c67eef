"""A last step that its examples do not fill: 25 rows in steps of 12, on one, two and three
processes, twice over.

The last step of an epoch has one example: on three processes two of them have none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.tiers import in_ci

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[2]
SUM_ORDER = 2e-5  # losses differ by the order of float32 sums, as in test_distributed.py
SHAPE = (
    "data.max_examples=25",
    "data.split.method=none",
    "train.max_steps=-1",
    "train.num_train_epochs=2",
    "train.per_device_train_batch_size=2",
    "run.global_batch_size=12",
    "train.eval_strategy='no'",
)
WAYS = {
    "random": [],
    "padded": ["train.padding_free=false"],
    "dropped": ["train.dataloader_drop_last=true", "data.max_examples=31"],
    "length-groups": ["train.train_sampling_strategy=group_by_length"],
    "rebalanced": ["train.train_sampling_strategy=batch_rebalance"],
    "packed": ["train.packing=true", "data.max_examples=96"],
    "token-cap": ["run.max_tokens_per_micro_batch=200"],
}


def config_for(processes: int, folder: Path, kind: str = "ddp_cpu") -> Path | None:
    if processes == 1:
        return None
    values = yaml.safe_load((PROJECT / "accelerate_configs" / f"{kind}.yaml").read_text())
    path = folder / f"{kind}-{processes}.yaml"
    path.write_text(yaml.safe_dump(values | {"num_processes": processes}))
    return path


SAID = {
    "random": (
        "epoch: the last step has 1 example; none is repeated to fill it, on any number of"
        " processes"
    ),
    "dropped": (
        "epoch: 7 examples that would not fill a last step left out (train.dataloader_drop_last),"
        " on any number of processes"
    ),
}


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory: pytest.TempPathFactory):
    """A function that trains a way on some processes, once, and returns the run's name."""

    def train(way: str, processes: int, kind: str = "ddp_cpu") -> str:
        name = f"{way}-{kind}-{processes}"
        if not launcher.run(name).exists():
            config = config_for(processes, tmp_path_factory.mktemp(name), kind)
            said = launcher.train(f"run.name={name}", *SHAPE, *WAYS[way], config=config)
            assert SAID.get(way, "") in said
        return name

    return train


@pytest.mark.parametrize(
    ("way", "processes"), in_ci([("random", 2), *((way, 3) for way in WAYS)], ("random", 3))
)
def test_the_number_of_processes_changes_nothing(
    launcher, trained, way: str, processes: int
) -> None:
    from safetensors.torch import load

    one, several = trained(way, 1), trained(way, processes)
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        assert launcher.series(several, key) == pytest.approx(
            launcher.series(one, key), rel=SUM_ORDER
        )
    assert launcher.series(several, "tokens") == launcher.series(one, "tokens")
    before, after = load(launcher.adapter(one)), load(launcher.adapter(several))
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-4


def test_ddp_and_fsdp2_fill_the_last_step_alike(launcher, trained) -> None:
    """To the bit, as two processes do (three add up in another order)."""
    assert launcher.adapter(trained("random", 2)) == launcher.adapter(
        trained("random", 2, "fsdp_cpu")
    )


def test_a_step_that_the_examples_never_fill_is_refused_where_it_would_be_left_out(
    launcher,
) -> None:
    words = [*SHAPE, *WAYS["dropped"], "data.max_examples=8", "run.name=too-few"]
    code, said = launcher.start(*words).wait()
    assert code == 2 and "train.dataloader_drop_last leaves nothing to train" in said, said[-3000:]


def losses_of_a_plain_loop(recipe_path: Path, *words: str) -> list[float]:
    """The loss of each step: one row after the other through the model, no trainer, no
    processes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.data.prepare import prepare_data
    from recipes_lib.weights.base import load_tokenizer

    recipe = load_recipe(recipe_path, words)
    rows = prepare_data(recipe, load_tokenizer(recipe)).train
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.name_or_path, dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for epoch in range(2):
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(42 + epoch)
        ).tolist()
        for start in range(0, len(rows), 12):
            step = [rows[row] for row in order[start : start + 12]]
            tokens = sum(label != -100 for row in step for label in row["labels"][1:])
            losses.append(0.0)
            for row in step:
                logits, targets = (
                    model(torch.tensor([row["input_ids"]])).logits[0, :-1],
                    torch.tensor(row["labels"][1:]),
                )
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / tokens
                loss.backward()
                losses[-1] += float(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("processes", "kind"), in_ci([(1, "ddp_cpu"), (3, "ddp_cpu"), (3, "fsdp_cpu")], (3, "fsdp_cpu"))
)
def test_losses_are_those_of_a_plain_loop_over_the_rows(
    launcher, tmp_path: Path, processes: int, kind: str
) -> None:
    words = [*SHAPE, "lora=null", "train.learning_rate=1e-3", "train.lr_scheduler_type=constant"]
    name = f"full-{kind}-{processes}"
    launcher.train(f"run.name={name}", *words, config=config_for(processes, tmp_path, kind))
    assert launcher.series(name, "loss") == pytest.approx(
        losses_of_a_plain_loop(launcher.recipe, *words), rel=1e-6
    )
