"""`recipes plan`: every shipped recipe and study, as text and as JSON, and what it answers to bad
input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from recipes_lib.cli import main
from recipes_lib.core.project import project_root
from recipes_lib.planning.text import clock

ROOT = project_root()
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if not path.name.startswith("_") and "studies" not in path.parts
]
STUDIES = [
    path
    for path in sorted((ROOT / "recipes/studies").glob("*.yaml"))
    if not path.name.startswith("_")
]
LORA = "llama2-7b-dolly/lora-bf16-r32"
PADDED = "model.attn_implementation=sdpa"
Plan = Callable[..., tuple[int, str, str]]
SCHEMA = Draft202012Validator(
    json.loads((ROOT / "schema/plan.schema.json").read_text(encoding="utf-8"))
)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """A function that runs the verb and returns exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["plan", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_the_schema_is_a_schema_and_its_plan_has_the_five_parts() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)
    parts = ["model", "memory", "time", "steps", "advice"]
    assert list(SCHEMA.schema["oneOf"][0]["properties"]) == parts


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_has_a_sensible_plan(path: Path, plan: Plan) -> None:
    code, out, err = plan(path, "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    SCHEMA.validate(made)
    memory, time, steps = made["memory"], made["time"], made["steps"]
    on_cpu = path.parent.name in ("quickstart", "smollm2-135m-dolly")
    assert (memory["card"] == "cpu") == on_cpu
    assert memory["weights_gib"] < memory["peak_gib"] < memory["needed_gib"]
    assert memory["needed_gib"] < (8 if on_cpu else 80)
    # a machine may have less memory free at this moment than the smallest recipe needs
    assert memory["fits"] or on_cpu or memory["uncounted"]
    assert memory["max_tokens_with_checkpointing"] >= memory["max_tokens_per_micro_batch"]
    assert 30 < time["train_total_s"] < (7200 if on_cpu else 4 * 3600)
    assert time["walltime_s"] >= 1.5 * time["train_total_s"] and time["walltime_s"] % 900 == 0
    assert time["total_s"] == pytest.approx(time["train_total_s"] + time["evaluation_s"], abs=0.1)
    assert 0 < time["mfu"] < 1.05
    assert steps["steps"] > 30 and 1 <= steps["padding_factor"] < 5
    assert len(memory["methods"]) == (3 if on_cpu else 21)


def test_every_shipped_study_is_planned_in_fifteen_lines(plan: Plan) -> None:
    wrong = []
    for path in STUDIES:
        code, out, err = plan(path, "--gpu", "h100")
        if code or len(out.splitlines()) > 15 or "judge requests: " not in out:
            wrong.append((path.stem, out, err))
    assert not wrong


def test_the_json_has_the_published_figures_of_llama_2_7b(plan: Plan) -> None:
    memory = json.loads(plan(LORA, "--gpu", "h100-80gb", "--json")[1])["memory"]
    assert memory["activation_mb_per_token"] == pytest.approx(8.87, rel=0.01)
    assert memory["activation_mb_per_token_checkpointed"] == pytest.approx(0.25, rel=0.1)
    plain = json.loads(plan(LORA, "lora.lora_dropout=0", "--json", "--gpu", "h100")[1])["memory"]
    assert plain["activation_mb_per_token"] == pytest.approx(5.95, rel=0.01)


def test_the_text_says_what_fits_how_long_and_what_to_type(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ("train.max_length=2048", PADDED)
    code, out, _ = plan(LORA, "--gpus", 2, "--gpu", "h100-80gb", "--price", 2.5, *words)
    assert code == 0
    lines = out.splitlines()
    assert (
        lines[0]
        == "llama2-7b-dolly--lora-bf16-r32 on 2 x H100 80GB SXM (speed counted, nobody has measured"
        " it here)"
    )
    for words in (
        "fits: 79.1 GiB on the card",
        "ask a scheduler for",
        "at 2.5 an hour",
        "<- this recipe",
        "train.padding_free=true",
    ):
        assert words in out, words
    assert (
        lines[-2]
        == "$ accelerate launch --config_file accelerate_configs/ddp.yaml -m recipes_lib.train "
        "recipes/llama2-7b-dolly/lora-bf16-r32.yaml train.max_length=2048 " + PADDED
    )
    assert lines[-1].startswith(
        "next: recipes train recipes/llama2-7b-dolly/lora-bf16-r32.yaml --accelerate ddp --gpus 2"
    )


def test_a_card_that_nobody_named_on_a_machine_without_one_is_told(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes_lib.planning import cards

    monkeypatch.setattr(cards, "_found_here", list)
    cards.cards_here.cache_clear()
    assumed = "no GPU on this machine, so H100 80GB SXM is assumed; your card: --gpu CARD"
    assert plan(LORA)[1].splitlines()[1].startswith(assumed)
    assert json.loads(plan(LORA, "--json")[1])["memory"]["card_stands_in"] is True
    assert json.loads(plan(LORA, "--json", "--gpu", "h100")[1])["memory"]["card_stands_in"] is False
    for words in (
        (LORA, "--gpu", "h100"),
        (LORA, "--gpu", "cpu"),
        ("quickstart/lora-r8",),
    ):
        assert "assumed; your card" not in plan(*words)[1]


def test_a_warm_up_longer_than_the_training_is_told(plan: Plan) -> None:
    assert (
        "train.learning_rate is never reached"
        in plan("quickstart/lora-r8", "train.warmup_steps=5000")[1]
    )
    assert "never reached" not in plan("quickstart/lora-r8", "train.warmup_steps=5")[1]


def test_what_does_not_fit_says_so_and_what_would(plan: Plan) -> None:
    code, out, _ = plan(LORA, "--gpu", "4090", PADDED)
    assert code == 0
    assert "DOES NOT FIT: 23.5 GiB on the card" in out
    assert "what makes it fit, best first" in out
    assert "another experiment" in out  # QLoRA
    assert "longer than the 4,096 that" in plan(LORA, "--gpu", "h100", "train.max_length=8192")[1]
    hopeless = plan(
        LORA, "--gpu", "h100-mig-1g.10gb", "model.name_or_path=meta-llama/Llama-3.1-70B"
    )[1]
    assert "nothing that the planner knows makes it fit" in hopeless


@pytest.mark.parametrize(
    "words",
    [
        ["train.packing=true"],
        ["train.max_length=8192"],
        ["train.max_length=null"],
        ["lora.target_modules=all-linear"],
        ["lora.target_modules=[q_proj,v_proj]"],
        ["lora=null"],
        ["model.name_or_path=meta-llama/Llama-3.1-70B"],
        ["model.name_or_path=Qwen/Qwen2.5-0.5B"],
        ["model.attn_implementation=flash_attention_2"],
        ["train.optim=adamw_8bit"],
        ["train.optim=lion_8bit"],
        ["train.max_steps=1"],
        ["train.num_train_epochs=0.01"],
        ["run.global_batch_size=4"],
        ["data.max_examples=3", "run.global_batch_size=4"],
        ["data.filters.max_tokens=64"],
        ["lora.modules_to_save=[lm_head]"],
        ["lora.layers_to_transform=[0,1]"],
        ["--gpus", "8"],
        ["--nodes", "2", "--gpus", "8"],
        ["--gpu", "cpu"],
    ],
    ids=" ".join,
)
def test_unusual_settings_are_planned(words: list[str], plan: Plan) -> None:
    overrides, flags = (
        [word for word in words if "=" in word],
        [word for word in words if "=" not in word],
    )
    if "data.max_examples=3" in overrides:
        overrides.append("train.per_device_train_batch_size=4")
    code, out, err = plan(LORA, *overrides, *flags, "--json")
    assert code == 0, err
    SCHEMA.validate(json.loads(out))
    assert plan(LORA, *overrides, *flags)[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["--gpu", "h100-80"],
            2,
            ["there is no card 'h100-80'", "did you mean h100-80gb", "cards: h100-80gb"],
        ),
        (["--gpu", "tpu"], 2, ["there is no card 'tpu'"]),
        (["--gpus", "0"], 2, ["--gpus", "a whole number >= 1"]),
        (["--price", "cheap"], 2, ["--price", "a number >= 0"]),
        (["--price", "nan"], 2, ["--price"]),
        (["--gpus", "3"], 2, ["cannot be made of micro-batches", "run.global_batch_size"]),
        (
            ["--accelerate", "ddpp"],
            2,
            ["launch.accelerate 'ddpp' is not a file", "did you mean ddp"],
        ),
        (
            ["model.name_or_path=nobody/nothing"],
            5,
            [
                "no plan: 'nobody/nothing' is not on this machine",
                "hf download nobody/nothing config.json",
            ],
        ),
        (["model.name_or_path=./nowhere"], 2, ["no such folder"]),
        (["data.source=missing.jsonl"], 2, ["command line: no such file or folder: missing.jsonl"]),
        (
            ["lora.target_modules=[c_attn]"],
            2,
            [
                "lora.target_modules names no linear layer of meta-llama/Llama-2-7b-hf",
                "q_proj, k_proj",
            ],
        ),
        (["train.sed=1"], 2, ["did you mean train.seed"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_bad_input_is_one_message(words: list[str], code: int, said: list[str], plan: Plan) -> None:
    got, out, err = plan(LORA, *words)
    assert got == code, err
    assert out == ""
    assert not [part for part in said if part not in err], err
    assert "Traceback" not in err


def test_the_next_command_names_a_config_as_it_was_given(plan: Plan, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(
        (ROOT / "accelerate_configs/ddp_cpu.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    words = ("--accelerate", own, "--gpus", "2", "train.per_device_train_batch_size=4")
    assert f" --accelerate {own} --gpus 2" in plan("quickstart/lora-r8", *words)[1].splitlines()[-1]


def test_the_next_command_after_a_plan_that_does_not_fit_plans_its_first_remedy(plan: Plan) -> None:
    line = plan("llama2-7b-dolly/lora-bf16-r32", "--gpu", "4090", PADDED)[1].splitlines()[-1]
    assert line.startswith("next: recipes plan ") and line.endswith(
        f" --gpu 4090 {PADDED} train.per_device_train_batch_size=1"
    )
    out = plan(*line.split()[3:])[1]
    assert "fits: 23.5 GiB" in out and out.splitlines()[-1].startswith("next: recipes train ")
    hopeless = plan(LORA, "--gpu", "4090", "lora=null", "train.max_length=4096", PADDED)[1]
    assert hopeless.splitlines()[-1] == "next: recipes ls"


def test_a_study_is_found_by_its_short_name_as_everywhere(plan: Plan) -> None:
    assert plan("lora-rank", "--gpu", "h100") == plan(
        "recipes/studies/lora-rank.yaml", "--gpu", "h100"
    )
    assert plan("recipes/quickstart")[0] == 2  # a folder is no study of that name


def test_times_on_a_processor_are_ranges_because_another_one_may_be_slower_or_busy(
    plan: Plan,
) -> None:
    made = json.loads(plan("quickstart/lora-r8", "--json")[1])["time"]
    out = plan("quickstart/lora-r8")[1]
    total = made["train_total_s"]
    (line,) = (line for line in out.splitlines() if line.endswith(" in all"))
    assert line.endswith(f": {clock(total)} to {clock(4 * total)} in all")
    assert "older processor, or one that has other work" in out
    assert " to " not in plan(LORA, "--gpu", "h100-80gb")[1].split("time    ")[1].split("method")[0]


def test_a_study_refuses_the_flags_of_a_recipe(plan: Plan) -> None:
    code, _, err = plan(STUDIES[0], "--gpus", 2)
    assert code == 2
    assert "--gpus is for a recipe" in err


def test_a_plan_imports_no_torch() -> None:
    words = [[LORA, "--json"], ["quickstart/lora-r8"]]
    import subprocess
    import sys

    program = (
        f"import sys\nfrom recipes_lib.cli import main\nfor words in {words!r}:\n   "
        " assert main(['plan', *words]) == 0\nprint('HEAVY', [name for name in"
        " ('torch', 'transformers', 'datasets', 'numpy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
