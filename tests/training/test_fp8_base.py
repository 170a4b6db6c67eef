"""Adapters over a base in FP8, through the real training script: what is trained, saved, resumed,
asked and merged, and what is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes_lib.config.check import check_upstream
from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.project import project_root
from recipes_lib.models.fp8 import Fp8Linear
from recipes_lib.train import main

BF16 = ["model.dtype=bfloat16", "train.bf16=true"]
FP8 = [*BF16, "model.base_precision=fp8"]
STEPS = [
    "train.max_steps=6",
    "train.eval_steps=6",
    "train.save_steps=6",
    "train.learning_rate=3e-2",
]
ADAPTER = "adapter/adapter_model.safetensors"
Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(
    tiny_model_dir: Path,
    tiny_recipe_text: Callable[[Path], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The recipe of three finished runs of the tiny model: bf16, fp8 and fused (over FP8)."""
    recipe = tmp_path_factory.mktemp("fp8") / "tiny.yaml"
    recipe.write_text(tiny_recipe_text(tiny_model_dir), encoding="utf-8")
    kinds = {"bf16": BF16, "fp8": FP8, "fused": [*FP8, "model.lora_implementation=fused"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_RUNS_ROOT", str(recipe.parent / "runs"))
        for name, overrides in kinds.items():
            assert main([str(recipe), *STEPS, *overrides, f"run.name={name}"]) == 0
    yield recipe


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of those runs."""
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    leave = shutil.ignore_patterns("checkpoints", "figures")
    shutil.copytree(trained.parent / "runs", tmp_path / "runs", ignore=leave)
    return tmp_path / "runs"


def run_json(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def series(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("name", ["fp8", "fused"])
def test_adapters_are_trained_in_bf16_over_a_base_in_fp8_and_reload_exactly(
    trained: Path, name: str
) -> None:
    run = trained.parent / "runs" / name
    state = run_json(run)
    assert state["base_precision"].startswith("FP8 in 14 layers, products in ")
    assert state["weights_check"]["reload"]["largest"] == 0.0
    plain = trained.parent / "runs" / "bf16"
    # measured: 0.1% with PEFT and fused (n=6 losses), as an untrained model hardly has preferences
    assert series(run, "loss") == pytest.approx(series(plain, "loss"), rel=0.01)
    assert series(run, "loss") != series(plain, "loss")
    if name == "fused":
        assert state["lora_implementation"] == "lora: 4 layers fused in 2 groups"


def test_the_saved_adapter_is_pefts_and_loads_over_a_base_in_bf16(trained: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    runs = trained.parent / "runs"
    ours, plain = (load_file(runs / name / ADAPTER) for name in ("fp8", "bf16"))
    assert {key: one.shape for key, one in ours.items()} == {
        key: one.shape for key, one in plain.items()
    }
    assert {one.dtype for one in ours.values()} == {torch.bfloat16}
    settings = [
        json.loads((runs / name / "adapter/adapter_config.json").read_text())
        for name in ("fp8", "bf16")
    ]
    for one in settings:
        one["target_modules"] = sorted(one["target_modules"])
    assert settings[0] == settings[1]
    base = AutoModelForCausalLM.from_pretrained(
        settings[0]["base_model_name_or_path"], dtype=torch.bfloat16
    )
    model = PeftModel.from_pretrained(base, runs / "fp8/adapter").eval()
    ids = torch.arange(20, 80)[None]
    with torch.no_grad():
        adapted = model(ids).logits.float()
        with model.disable_adapter():
            bare = model(ids).logits.float()
    assert (adapted - bare).abs().mean() > 0.1 * bare.abs().mean()


def test_a_run_is_not_resumed_with_a_base_in_another_precision(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes_lib.training.stopping import StopRequest

    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "_asked_by_file", lambda _: int(next(calls) >= 2))
        assert main([str(tiny_recipe), *FP8]) == ExitCode.PREEMPTED
    capsys.readouterr()
    assert main([str(tiny_recipe), *BF16]) == ExitCode.USAGE
    assert "model.base_precision  fp8 -> absent" in capsys.readouterr().err
    assert main([str(tiny_recipe), *FP8]) == 0


def test_a_run_and_its_base_answer_over_the_base_in_fp8(runs: Path) -> None:
    from recipes_lib.generation.subjects import grouped, loaded
    from recipes_lib.generation.targets import find_targets

    prints = set()
    for name in ("fp8", "bf16"):
        (target,) = find_targets([name])
        (group,) = grouped([target])
        with loaded(group) as (subject,):
            layers = [one for one in subject.model.modules() if isinstance(one, Fp8Linear)]
            assert len(layers) == (14 if name == "fp8" else 0)
            prints.add(subject.fingerprint)
    assert len(prints) == 2
    assert len(grouped(find_targets(["fp8", "fused", "bf16"]))) == 3  # no shared base


def test_an_adapter_over_fp8_is_merged_into_the_base_as_published(
    runs: Path, recipes: Verb
) -> None:
    from transformers import AutoModelForCausalLM

    code, out, err = recipes("merge", "fp8")
    assert code == 0 and "it is merged into the published one" in out, err
    assert "over the base in FP8 its logits are" in out
    record = json.loads((runs / "fp8/merged/merge.json").read_text())
    assert record["dtype"] == "bfloat16" and not record["dequantised"]
    merged = AutoModelForCausalLM.from_pretrained(runs / "fp8/merged")
    published = AutoModelForCausalLM.from_pretrained(record["base"], dtype=torch.bfloat16)
    before, after = published.state_dict(), merged.state_dict()
    assert after.keys() == before.keys()
    other = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(other) == 4 and all("q_proj" in name or "v_proj" in name for name in other)
    card = (runs / "fp8/merged/README.md").read_text()
    assert "as published, not the one in FP8" in card
    code, out, err = recipes("verify", "fp8")
    assert code == 0 and "LoRA over a base in FP8" in out, err
    assert "trained on the base in FP8" in (runs / "fp8/adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("launch={accelerate: fsdp_cpu}", "FSDP would part the weights from their scales"),
        ("lora.modules_to_save=[o_proj]", "'o_proj' would be trained, and its weights are in FP8"),
    ],
)
def test_what_cannot_be_in_fp8_is_one_line_before_anything_is_loaded(
    tiny_recipe: Path, override: str, words: str
) -> None:
    (error,) = check_upstream(load_recipe(tiny_recipe, [*FP8, override]))
    assert words in str(error)
    assert not check_upstream(load_recipe(tiny_recipe, FP8))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_trains_over_fp8_with_losses_close_to_those_over_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if local_folder(load_recipe("smollm2-135m-dolly/lora-r8")) is None:
        pytest.skip("SmolLM2-135M is not materialised on this machine")
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    recipe = project_root() / "recipes/smollm2-135m-dolly/lora-r8.yaml"
    rows = project_root() / "recipes/quickstart/data/instructions.jsonl"
    small = [f"data.source={rows}", "data.split={method: none}", "train.eval_strategy='no'"]
    small += ["train.max_steps=4", "train.logging_steps=1", "train.warmup_steps=0"]
    small += ["train.per_device_train_batch_size=4", "run.global_batch_size=4"]
    for name, base in (("bf16", BF16), ("fp8", FP8)):
        assert main([str(recipe), *small, *base, f"run.name={name}"]) == 0
    plain, found = (series(tmp_path / "runs" / name, "loss") for name in ("bf16", "fp8"))
    # measured: 3.3% at the second step, less than 2% at the others (four short rows each)
    assert found == pytest.approx(plain, rel=0.05)
    assert sum(found) == pytest.approx(sum(plain), rel=0.025)
    assert found[-1] != plain[-1]
    assert run_json(tmp_path / "runs/fp8")["base_precision"].startswith("FP8 in 210 layers")
