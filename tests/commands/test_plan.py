"""`recipes plan`: shipped recipes, as text and as JSON, and what it answers to bad input."""

import json
import re
from collections.abc import Callable

import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.project import project_root

ROOT = project_root()
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if not path.name.startswith("_") and "studies" not in path.parts
]
LORA = "llama3.2-1b-tulu3/lora-r64"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(recipes: Run) -> Run:
    """A function that runs the verb and returns exit code, stdout and stderr."""
    return lambda *words: recipes("plan", *words)


def planned(plan: Run, *words: object) -> dict:
    code, out, err = plan(*words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_shipped_recipe_has_a_sensible_plan(plan: Run) -> None:
    for path in RECIPES:
        made = planned(plan, path)
        on_cpu = load_recipe(path).launch.accelerate == "cpu"
        assert (made["card"] == "cpu") == on_cpu and made["fits"], path
        assert made["peak_gib"] < made["needed_gib"] < (8 if on_cpu else 80), path
        if not on_cpu:  # of a CPU nobody knows the speed before a first run
            assert 0.1 < made["seconds_per_1000_rows"] < 3600, path
        assert made["steps"] is None or made["steps"] >= 12, path


def test_a_plan_has_at_most_fifteen_lines_and_the_numbers_of_its_json(plan: Run) -> None:
    made = planned(plan, LORA, "--gpu", "h100")
    code, out, _ = plan(LORA, "--gpu", "h100")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 17  # 15, the command and what to type next
    assert f"{made['parameters']:,} parameters" in out
    needed = float(re.search(r"^memory +([\d.]+) GiB", out, re.M)[1])
    assert needed == pytest.approx(made["needed_gib"], abs=0.06) and "MFU" in out
    assert lines[-1].startswith("next: recipes train ") and lines[-2].startswith("$ ")
    table = plan(LORA, "--gpu", "h100", "--table")[1]
    assert "fsdp" in table and "QLoRA" in table


def test_the_advice_typed_as_it_stands_keeps_its_word(plan: Run) -> None:
    words = [LORA, "--gpu", "a10", "train.activation_checkpointing=false", "train.max_length=4096"]
    made = planned(plan, *words)
    assert not made["fits"] and made["advice"]
    followed = planned(plan, *words, *made["advice"].split())
    assert followed["fits"]
    wasteful = planned(plan, LORA, "--gpu", "h200", "train.activation_checkpointing=true")
    assert wasteful["advice"] == "train.activation_checkpointing=false"


def test_what_nothing_makes_fit_says_so(plan: Run) -> None:
    words = ("lora=null", "model.name_or_path=meta-llama/Llama-3.1-8B", "train.max_length=512")
    code, out, _ = plan(LORA, "--gpu", "h100-mig-1g.10gb", *words)
    assert code == 0 and "DOES NOT FIT" in out and "use more memory" in out
    assert out.splitlines()[-1] == "next: recipes ls"


def test_an_earlier_training_on_such_a_card_gives_the_speed(plan, tiny_recipe, tmp_path):
    run = tmp_path / "runs" / "earlier"
    run.mkdir(parents=True)
    from recipes_lib.config.recipe import load_recipe

    load_recipe(tiny_recipe).write(run / "resolved.yaml")
    summary = {"tokens_per_second": 123.0, "device": "cpu", "world_size": 1}
    guard = {"launch.distribution": "NO"}
    state = {"state": "finished", "summary": summary, "guard": guard}
    (run / "run.json").write_text(json.dumps(state))
    made = planned(plan, tiny_recipe)
    assert made["tokens_per_second"] == 123 and "earlier" in made["speed"]
    other = planned(plan, tiny_recipe, "lora.r=64")
    assert other["tokens_per_second"] != 123


def test_bad_input_is_one_message(plan: Run, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "another"}')
    for words, code, said in (
        (["--gpu", "h100-80"], 0, ""),
        (["--gpu", "tpu"], 2, "there is no card 'tpu'"),
        (["--gpus", "0"], 2, "a whole number >= 1"),
        (["--gpus", "2"], 2, "ddp or fsdp"),
        (["--accelerate", "ddp", "--gpus", "3"], 2, "run.global_batch_size"),
        (["lora.target_modules=[c_attn]"], 2, "lora.target_modules"),
        (["model.name_or_path=nobody/nothing"], 5, "'nobody/nothing'"),
        ([f"model.name_or_path={tmp_path}"], 2, "model type `another`"),
        (["train.sed=1"], 2, "did you mean train.seed"),
    ):
        found, _, err = plan(LORA, *words)
        assert found == code and said in err and "Traceback" not in err, (words, err)
    code, _, err = plan(ROOT / "recipes/studies/lora-rank.yaml")
    assert code == 2 and "of kind recipe, found study" in err
