"""Preference tuning has the numbers of a plain loop and of TRL, and the reference of the base."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from tests.conftest import build_tiny_model
from tests.families import ALL_LINEAR, FAMILIES, METHODS, asked_to_stop, build_family
from tests.pairs import write_pair_recipe
from tests.tiers import in_ci
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main
from recipes_lib.training.trainer import RunCallback

STEPS = 4
RATE = 1e-3
CONSTANT = ["train.lr_scheduler_type=constant", f"train.learning_rate={RATE}"]
NOT_SAVED = ["train.eval_strategy='no'", "train.save_strategy='no'", f"train.max_steps={STEPS}"]


@pytest.fixture
def recipe(tiny_recipe: Path, tiny_model_dir, tiny_recipe_text) -> Path:
    """A recipe that trains the tiny model on pairs; its runs go to <tmp_path>/runs."""
    return write_pair_recipe(tiny_recipe.with_name("pairs.yaml"), tiny_recipe_text(tiny_model_dir))


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers of this test's trainings, one for each step."""
    found: list[Any] = []
    monkeypatch.setattr(
        RunCallback, "on_step_begin", lambda self, *_, **__: found.append(self.trainer)
    )
    return found


def series(recipe: Path, key: str, name: str = "tiny") -> list[float]:
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def weights(recipe: Path, name: str) -> dict[str, bytes]:
    run = recipe.parent / "runs" / name
    return {file.name: file.read_bytes() for file in run.glob("[am]*/*.safetensors")}


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-probability of an answer, alone, from the whole logits."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).sum()


def plain_steps(
    policy: Any, base: Any, steps: list[list[dict[str, Any]]], beta: float
) -> tuple[list[float], list[float]]:
    """Train one pair at a time with nothing of the libraries but the models; return the losses and
    the gradient norms.
    """
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses, norms = [], []
    for pairs in steps:
        total = 0.0
        for pair in pairs:
            ratios = []
            for name in ("chosen_ids", "rejected_ids"):
                with torch.no_grad():
                    reference = log_prob(base, pair["prompt_ids"], pair[name])
                ratios.append(log_prob(policy, pair["prompt_ids"], pair[name]) - reference)
            loss = -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])) / len(pairs)
            loss.backward()
            total += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "lora"),
        ("phi", "full"),
        pytest.param("llama", "full", marks=pytest.mark.slow),
        pytest.param("gemma2", "lora", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_a_plain_loop(
    family, method, recipe, trainers, tiny_model_dir, tmp_path
) -> None:
    """Phi's head has a bias, Gemma 2's caps its logits."""
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    words = ["train.beta=0.3", "lora=null"] if method == "full" else ["train.beta=0.3"]
    assert main([str(recipe), f"model.name_or_path={folder}", *words, *CONSTANT, *NOT_SAVED]) == 0
    trainer = trainers[0]
    steps = [
        [trainer.train_dataset[row] for row in trainer.batches.rows_of_step(step)]
        for step in range(STEPS)
    ]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "lora":
        torch.manual_seed(42)
        policy = get_peft_model(policy, LoraConfig(**lora))
    losses, norms = plain_steps(policy, base, steps, beta=0.3)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and losses[-1] < losses[0]
    assert series(recipe, "loss") == pytest.approx(losses, rel=2e-5)
    assert series(recipe, "grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        "sigmoid",
        *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "[sigmoid, hinge]")),
    ],
)
def test_losses_are_those_of_trl_where_its_reference_is_the_base(
    loss, recipe, trainers, tiny_model_dir, tmp_path
) -> None:
    from trl import DPOConfig, DPOTrainer

    words = [f"train.loss_type={loss}", *CONSTANT, *NOT_SAVED]
    assert main([str(recipe), *words]) == 0
    ours = trainers[0]
    order = [row for step in range(STEPS) for row in ours.batches.rows_of_step(step)]
    rows = ours.train_dataset.select(order).select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids"]
    )

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        loss_type=ours.args.loss_type,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        optim="adamw_torch",
        report_to=[],
    )
    trl = Prepared(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir, pad_token="</s>"),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    trl.train()
    logs = [row for row in trl.state.log_history if "loss" in row]
    assert series(recipe, "loss") == pytest.approx([row["loss"] for row in logs], rel=2e-5)
    norms = [row["grad_norm"] for row in logs]
    assert series(recipe, "grad_norm") == pytest.approx(norms, rel=1e-4)


WAYS = {
    "pissa": ["lora.init_lora_weights=pissa"],
    "olora": ["lora.init_lora_weights=olora"],
    "dora": ["lora.use_dora=true"],
    "modules_to_save": ["lora.modules_to_save=[lm_head]"],
    "full": ["lora=null"],
    "bf16": ["train.bf16=true"],
}


@pytest.mark.parametrize(
    "way",
    [
        way if way in ("pissa", "full") else pytest.param(way, marks=pytest.mark.slow)
        for way in WAYS
    ],
)
def test_the_reference_is_the_base_whatever_is_trained_on_it(
    way, recipe, trainers, tiny_model_dir
) -> None:
    """TRL 1.16 takes the policy without its adapter: 0.5 nats from the base with pissa."""
    assert main([str(recipe), *WAYS[way], "train.max_steps=2"]) == 0
    stored = load_file(recipe.parent / "runs/tiny/reference.safetensors")
    data = {"train": trainers[0].train_dataset, "validation": trainers[0].eval_dataset}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    exact = 2e-2 if way == "bf16" else 1e-4
    for split, rows in data.items():
        assert stored[split].shape == (len(rows), 2) and stored[split].dtype == "float32"
        for number, row in enumerate(rows.select(range(5))):
            with torch.no_grad():
                chosen = log_prob(base, row["prompt_ids"], row["chosen_ids"])
                rejected = log_prob(base, row["prompt_ids"], row["rejected_ids"])
            found = stored[split][number].tolist()
            assert found == pytest.approx([float(chosen), float(rejected)], rel=exact)
            assert row["ref_chosen_logps"] == pytest.approx(found[0])
    first = series(recipe, "loss")[0]
    assert first == pytest.approx(math.log(2), abs={"bf16": 1e-3, "pissa": 1e-5}.get(way, 1e-5))


@pytest.mark.parametrize(
    "step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 7))]
)
def test_stopped_and_resumed_ends_in_the_same_bytes(step, recipe, monkeypatch) -> None:
    words = [str(recipe), "train.disable_dropout=false", "lora.lora_dropout=0.3"]
    assert main([*words, "run.name=whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", asked_to_stop(step, RunCallback.on_step_end))
        assert main([*words, "run.name=stopped"]) == ExitCode.PREEMPTED
    reference = recipe.parent / "runs/stopped/reference.safetensors"
    before = reference.read_bytes()
    if step == 3:
        reference.unlink()  # it is computed again
    if step == 5:
        reference.write_bytes(before[:-8] + b"damaged.")
    assert main([*words, "run.name=stopped"]) == 0
    assert reference.read_bytes() == before
    assert weights(recipe, "whole") and weights(recipe, "whole") == weights(recipe, "stopped")
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert series(recipe, key, "whole") == series(recipe, key, "stopped")


@pytest.mark.slow
def test_another_reference_or_another_stage_is_not_resumed(recipe, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", asked_to_stop(3, RunCallback.on_step_end))
        assert main([str(recipe)]) == ExitCode.PREEMPTED
    run = recipe.parent / "runs" / "tiny"
    state = json.loads((run / "run.json").read_text())
    recorded = state["guard"]["reference_hash"]
    assert len(recorded) == 64
    marker = json.loads((run / "checkpoints/checkpoint-3/COMPLETE.json").read_text())
    assert marker["guard"]["reference_hash"] == recorded
    state["guard"]["reference_hash"] = "0" * 64
    (run / "run.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert main([str(recipe)]) == ExitCode.USAGE
    assert "no longer gives the reference" in capsys.readouterr().err
    assert main([str(recipe), "train.beta=0.2"]) == ExitCode.USAGE
    assert "train.beta" in capsys.readouterr().err
    state["guard"]["reference_hash"] = recorded
    (run / "run.json").write_text(json.dumps(state))
    assert main([str(recipe)]) == 0
    assert main([str(recipe), "--resume-anyway"]) == 0  # it is finished


@pytest.mark.parametrize("step", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_from_another_base_has_the_reference_of_that_one(
    step, recipe, monkeypatch, tmp_path
) -> None:
    """Before the first checkpoint, and behind one with --resume-anyway."""
    folder = tmp_path / "other"
    build_tiny_model(folder, seed=1)
    words = [str(recipe), "train.max_steps=4", "train.eval_strategy='no'"]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise AssertionError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_pre_optimizer_step", on_pre_optimizer_step)
        assert main([*words, "run.name=moved"]) == ExitCode.FAILED
    words.append(f"model.name_or_path={folder}")
    moved = [*words, "run.name=moved"]
    assert main([*moved, "--resume-anyway"] if step else moved) == 0
    assert main([*words, "run.name=fresh"]) == 0
    runs = recipe.parent / "runs"
    references = [load_file(runs / name / "reference.safetensors") for name in ("moved", "fresh")]
    assert (references[0]["train"] == references[1]["train"]).all()
    guards = [json.loads((runs / name / "run.json").read_text()) for name in ("moved", "fresh")]
    assert guards[0]["guard"] == guards[1]["guard"]


def test_a_validation_counts_every_pair_once_and_a_tie_as_a_half(recipe, trainers) -> None:
    """15 pairs in batches of 4 and of 15; before the first step both rewards are 0."""
    words = ["data.split={validation: 0.15}", "train.eval_on_start=true", "train.max_steps=4"]
    for size in (4, 15):
        batch = f"train.per_device_eval_batch_size={size}"
        assert main([str(recipe), *words, batch, f"run.name=by-{size}"]) == 0
    assert len(trainers[0].eval_dataset) % 4 != 0
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        by_4, by_15 = (series(recipe, key, f"by-{size}") for size in (4, 15))
        assert len(by_4) == 2 and by_4 == pytest.approx(by_15, rel=1e-5, abs=1e-5)
    assert series(recipe, "eval_loss", "by-4")[0] == pytest.approx(math.log(2), rel=1e-6)
    assert series(recipe, "eval_rewards/accuracies", "by-4")[0] == 0.5
    assert abs(series(recipe, "eval_rewards/margins", "by-4")[0]) < 1e-5
    trainer = trainers[-1]
    trainer.model.eval()
    margins = []
    for row in trainer.eval_dataset:
        with torch.no_grad():
            chosen = log_prob(trainer.model, row["prompt_ids"], row["chosen_ids"])
            rejected = log_prob(trainer.model, row["prompt_ids"], row["rejected_ids"])
        ratio = (chosen - row["ref_chosen_logps"]) - (rejected - row["ref_rejected_logps"])
        margins.append(0.1 * float(ratio))
    found = series(recipe, "eval_rewards/margins", "by-15")[-1]
    assert found == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    right = sum(margin > 0 for margin in margins) / len(margins)
    assert series(recipe, "eval_rewards/accuracies", "by-15")[-1] == pytest.approx(right)


def test_numbers_that_are_not_finite_stop_with_the_pairs_named(recipe, monkeypatch, capsys) -> None:
    from recipes_lib.training.dpo import PreferenceTrainer

    honest = PreferenceTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        factor = math.nan if self.state.global_step == 2 else 1.0
        return honest(self, *args, **kwargs) * factor

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", compute_loss)
    assert main([str(recipe)]) == ExitCode.NUMERICS
    said = capsys.readouterr().err
    assert "at step 3" in said and len(re.findall(r"[0-9a-f]{16}", said)) == 8


def test_dropout_is_off_and_said_and_the_adapters_file_says_so(recipe, capsys) -> None:
    assert main([str(recipe), "lora.lora_dropout=0.5", "train.max_steps=2"]) == 0
    assert "dropout is off" in capsys.readouterr().out
    config = recipe.parent / "runs/tiny/adapter/adapter_config.json"
    assert json.loads(config.read_text())["lora_dropout"] == 0.0


GRID = [(family, method) for family in FAMILIES for method in METHODS]
GRID_IN_CI = [("qwen3_moe", "full"), ("gemma3_text", "lora"), ("gpt_oss", "lora")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), in_ci(GRID, *GRID_IN_CI))
def test_each_family_prefers_after_an_interruption_what_it_would_have(
    family, method, tiny_model_dir, tiny_recipe_text, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    changes = {**METHODS[method], "run": {"name": "whole"}}
    changes["train"] = {**METHODS[method].get("train", {}), "max_steps": 4, "save_steps": 2}
    text = tiny_recipe_text(folder)
    recipe = write_pair_recipe(tmp_path / "pairs.yaml", text, **{"lora": ALL_LINEAR, **changes})
    assert main([str(recipe)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", asked_to_stop(2, RunCallback.on_step_end))
        assert main([str(recipe), "run.name=stopped"]) == ExitCode.PREEMPTED
    assert main([str(recipe), "run.name=stopped"]) == 0
    assert weights(recipe, "whole") and weights(recipe, "whole") == weights(recipe, "stopped")
    close = 0.02 if method == "qlora" else 2e-3
    router = series(recipe, "aux_loss", "whole") or [0.0]
    first = series(recipe, "loss", "whole")[0]
    assert first == pytest.approx(math.log(2), abs=close + 0.1 * router[0])
