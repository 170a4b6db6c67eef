"""Study files: accepted, resolved, and refused with file, line and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.study.config import load_study
from recipes_lib.study.runs import evaluations, study_trainings

PROJECT = Path(__file__).resolve().parents[2]


def test_every_shipped_study_loads_and_has_trainings_and_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    wrong = []
    for path in (PROJECT / "recipes" / "studies").glob("*.yaml"):
        study = load_study(path)
        evals = {result.recipe.name for result in evaluations(study)}
        if not study_trainings(study) or evals != {recipe.name for recipe in study.evals}:
            wrong.append(path.name)
    assert not wrong


def test_in_a_controlled_study_nothing_differs_but_the_declared_factors() -> None:
    for name in ("lora-rank", "learning-rate", "distributed-strategy", "quickstart"):
        study = load_study(name)
        assert study.differing(declared=True) and not study.differing(declared=False), name
    arms = load_study("distributed-strategy").arms
    assert {arm.launch.world_size for arm in arms} == {2}
    kinds = {arm.resolved()["launch.distributed_type"] for arm in arms}
    assert kinds == {"MULTI_GPU", "FSDP"}


QUESTION, R4, RANK, SEEDS = (
    "question: Does rank 8 beat rank 4?",
    "  r4: r4.yaml",
    "  rank: [lora.r, lora.lora_alpha]",
    "seeds: [42]",
)
# (what is put in place of what in the tiny study, line of the answer, words of the answer)
BAD: list[tuple[str, str, int | None, list[str]]] = [
    (QUESTION, "question: ''", 2, ["question"]),
    (QUESTION, "questoin: x?", 2, ["'questoin'", "did you mean question?", "question is missing"]),
    (R4, "  r4: r5.yaml", 6, ["no such file", "r5.yaml"]),
    (R4, "  r4: alpaca_eval.yaml", None, ["alpaca_eval.yaml: is an eval recipe"]),
    (R4, "  r4: tiny.yaml", None, ["tiny.yaml: is a study", "recipes study run STUDY"]),
    (R4, "  r4: {recipe: r4.yaml, sedes: [1]}", 6, ["did you mean arms.r4.seeds?"]),
    (R4, "  r4: {recipe: r4.yaml, gpus: 0}", 6, ["arms.r4.gpus"]),
    (R4, "  r4: {recipe: r4.yaml, gpus: 2}", 6, ["arm 'r4'", "cpu starts one process"]),
    (R4, "  r4: {recipe: r4.yaml, accelerate: ddp_cpuu}", 6, ["arm 'r4'", "mean ddp_cpu?"]),
    (
        R4,
        "  r4: {recipe: r4.yaml, accelerate: ddp_cpu, gpus: 8}",
        None,
        ["arm 'r4'", "cannot be made of micro-batches"],
    ),
    (
        R4,
        "  r4: {recipe: r4.yaml, overrides: [train.learning_rte=1]}",
        6,
        ["r4", "did you mean train.learning_rate?"],
    ),
    (
        R4,
        "  r4: {recipe: r4.yaml, overrides: [learning_rate=1]}",
        6,
        ["r4", "write train.learning_rate"],
    ),
    (R4, "  r4: {recipe: r4.yaml, seeds: [-1]}", 6, ["arms.r4.seeds.0"]),
    (R4, "  r4: {}", 6, ["arms.r4.recipe is missing"]),
    (R4, "  base: r4.yaml", 6, ["'base' is the base model's"]),
    (R4, "  ../r4: r4.yaml", 6, ["arm name '../r4'"]),
    (R4, "  r8: r4.yaml", 7, ["duplicate key 'arms.r8'"]),
    (RANK, "  rank: [lora.rr]", 4, ["factor 'rank': there is no key 'lora.rr'"]),
    (RANK, "  rank: []", 4, ["factors.rank"]),
    (SEEDS, "reference: {r5: {win_rate: 0.5}}", 8, ["no arm 'r5'"]),
    (SEEDS, "baseline: r5", 8, ["no arm 'r5'", "arms: r4, r8, base"]),
    (SEEDS, "seeds: []", 8, ["seeds"]),
    (SEEDS, f"seeds: [{2**32}]", 8, ["seeds.0", "less than 4294967296"]),
    (SEEDS, "overrides: [train.max_steps=many]", 8, ["train.max_steps", "integer"]),
    (SEEDS, "overrides: [train.seed=7]", 8, ["train.seed cannot be overridden", "seeds: [1, 2]"]),
    ("mt_bench.yaml", "mt_bnch.yaml", 9, ["no such file", "did you mean", "mt_bench.yaml?"]),
    ("mt_bench.yaml", "r4.yaml", None, ["r4.yaml: is a recipe, not an eval recipe"]),
    ("lm_eval.yaml]", "lm_eval.yaml, mt_bench.yaml]", 9, ["mt_bench' stands there twice"]),
    (SEEDS, "margins: {win_rate: 2}", 8, ["margins: win_rate: ", "is a share: write points"]),
    (SEEDS, "margins: {mt_bench/grade: 2 points}", 8, ["grade is no share"]),
    (SEEDS, "margins: {win_rate: -1 points}", 8, ["must be a number above 0"]),
    (SEEDS, "margins: {heldout_loss: 0.005}", 8, ["no eval of this study measures it"]),
    (SEEDS, "primary: win_rat", 8, ["no eval of this study measures 'win_rat'", "metrics: study"]),
    (SEEDS, "primary: win_rate", 8, ["several evals measure 'win_rate'"]),
    (SEEDS, "tune: {train.learning_rte: [1, 2]}", 8, ["did you mean train.learning_rate"]),
    (
        SEEDS,
        "tune: {train.learning_rate: [1]}",
        8,
        ["at least 2 items"],
    ),
    (SEEDS, "tune: {train.learning_rate: [-1, 1]}", 8, ["arm 'r8'", "train.learning_rate"]),
    (SEEDS, "tune: {data.prompt_format: [chat, raw]}", 8, ["cannot be tuned", "train"]),
    (SEEDS, "tune: {train.max_length: [9, 99]}", 8, ["changes what the validation loss is"]),
    (SEEDS, "tune: {lora.r: [4, 8]}", 8, ["is what the factor 'rank' varies"]),
    (
        SEEDS,
        "tune: {train.learning_rate: [1, 2], train.max_steps: [1, 2]}",
        8,
        ["tune: ", "at most 1 item"],
    ),
    (
        R4,
        "  r4: {recipe: r4.yaml, seeds: [1042], tune: {train.learning_rate: [1, 2]}}",
        6,
        ["seed 1042 is that of its tuning"],
    ),
    (
        SEEDS,
        "overrides: [train.eval_strategy='no']\ntune: {train.learning_rate: [1, 2]}",
        9,
        ["no validation loss to choose by", "set data.split.validation"],
    ),
]


def test_a_bad_study_is_answered_with_its_line(
    study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_folder / "tiny.yaml"
    text = file.read_text()
    wrong = []
    for old, new, line, words in BAD:
        assert old in text
        file.write_text(text.replace(old, new))
        code, said = main(["check", str(file)]), capsys.readouterr().err
        place = f"tiny.yaml:{line}: " if line else ""
        if code != 2 or not all(word in said for word in (place, *words)):
            wrong.append((new, code, said))
    assert not wrong


def test_all_errors_of_a_study_and_its_recipes_come_at_once(
    study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, study = study_folder / "r4.yaml", study_folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 42", "sede: 42"))
    text = study.read_text().replace("lm_eval.yaml", "no.yaml").replace("r8.yaml", "r9.yaml")
    study.write_text(text)
    assert main(["check", str(study)]) == 2
    said = capsys.readouterr().err
    assert "r4.yaml:16: unknown key 'train.sede'" in said
    assert "no.yaml" in said and "r9.yaml" in said


def test_two_base_models_have_no_one_base(study_folder: Path) -> None:
    recipe, study = study_folder / "r8.yaml", study_folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("no-model", "another"))
    with pytest.raises(RecipeErrors) as caught:
        load_study(study)
    assert "different base models" in str(caught.value)
    assert load_study(study, ["include_base=false"]).file.include_base is False


def test_words_of_the_command_line_change_the_study_and_win_over_every_arm(
    study_folder: Path,
) -> None:
    file = study_folder / "tiny.yaml"
    own = "r4: {recipe: r4.yaml, overrides: [train.max_steps=2], seeds: [7]}"
    text = file.read_text().replace("r4: r4.yaml", own)
    file.write_text(text.replace("seeds: [42]", "overrides: [train.max_steps=1, lora.r=1]"))
    plain = load_study(file)
    assert [arm.recipe.train["max_steps"] for arm in plain.arms] == [2, 1]
    assert [arm.seeds for arm in plain.arms] == [(7,), (42,)]
    study = load_study(file, ["seeds=[1, 2]", "train.max_steps=3"])
    assert [arm.recipe.train["max_steps"] for arm in study.arms] == [3, 3]
    names = ["tiny--r4--seed1", "tiny--r4--seed2", "tiny--r8--seed1", "tiny--r8--seed2"]
    assert [training.run for training in study_trainings(study)] == names
    with pytest.raises(RecipeErrors):
        load_study(file, ["--train.seed=7"])


def test_a_recipe_that_is_handed_to_a_training_is_the_arms_with_its_name_seed_and_launch(
    study_folder: Path,
) -> None:
    file = study_folder / "tiny.yaml"
    words = ["accelerate=ddp_cpu", "gpus=2", "train.per_device_train_batch_size=2"]
    (training, *_) = study_trainings(load_study(file, words))
    training.recipe.write(study_folder / "handed.yaml")
    handed = load_recipe(study_folder / "handed.yaml")
    assert handed.to_dict() == training.recipe.to_dict()
    written = load_recipe(study_folder / "r4.yaml", [words[-1], "run.name=tiny--r4"]).to_dict()
    launch = {"accelerate": "ddp_cpu", "gpus": 2, "nodes": 1}
    assert handed.to_dict() == {**written, "launch": launch}


def test_a_seed_that_is_added_later_leaves_the_first_ones_run_where_it_is(
    study_folder: Path,
) -> None:
    more = load_study(study_folder / "tiny.yaml", ["seeds=[42, 43]"])
    names = [training.run for training in study_trainings(more)]
    assert names[:2] == ["tiny--r4", "tiny--r4--seed43"]


def test_a_recipe_given_as_a_study_is_told_what_it_is(study_folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a recipe, not a study"):
        load_study(study_folder / "r4.yaml")


def test_the_primary_metric_is_named_by_a_part_of_its_name_or_is_the_first(
    study_folder: Path,
) -> None:
    file = study_folder / "tiny.yaml"
    text = file.read_text()
    task = "study--lm_eval/quickstart_multiple_choice"
    meant = {
        "seeds: [42]": "study--alpaca_eval/win_rate",
        "primary: mt_bench": "study--mt_bench/grade",
        "primary: alpaca_eval/win_rate": "study--alpaca_eval/win_rate",
        "primary: lm_eval": task,
        "primary: quickstart_multiple_choice/acc": f"{task}/acc",
    }
    found = {}
    for written in meant:
        file.write_text(text.replace("seeds: [42]", written))
        found[written] = load_study(file).aims.primary
    assert found == meant
