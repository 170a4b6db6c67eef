"""Study files: accepted, resolved, and refused with file, line and what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.study.arms import arm_recipe, launch_words
from recipes_lib.study.config import load_study
from recipes_lib.study.runs import evaluations, run_names, study_trainings

PROJECT = Path(__file__).resolve().parents[2]
STUDIES = sorted((PROJECT / "recipes" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_loads_and_has_trainings_and_evaluations(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    study = load_study(path)
    assert study.question.endswith("?")
    assert study_trainings(study)
    assert {one.recipe.name for one in evaluations(study)} == {one.name for one in study.evals}


@pytest.mark.parametrize(
    "name", ["lora-rank", "learning-rate", "distributed-strategy", "quickstart"]
)
def test_in_a_controlled_study_nothing_differs_but_the_declared_factors(name: str) -> None:
    study = load_study(name)
    differing = study.differing()
    assert differing
    assert [key for key in differing if study.factor_of(key) is None] == []
    assert not study.warnings


def test_the_two_by_two_has_one_world_size() -> None:
    study = load_study("distributed-strategy")
    assert {arm.launch.world_size for arm in study.arms} == {2}
    assert {arm.resolved()["launch.distributed_type"] for arm in study.arms} == {
        "MULTI_GPU",
        "FSDP",
    }


# (what is put in place of what in the tiny study, line of the answer, words of the answer)
BAD = [
    ("question: Does rank 8 beat rank 4?", "question: ''", 2, ["question is empty"]),
    (
        "question: Does rank 8 beat rank 4?",
        "questoin: x?",
        2,
        ["'questoin'", "did you mean question?", "question is missing"],
    ),
    ("question: Does rank 8 beat rank 4?\n", "", None, ["question is missing"]),
    ("question: Does rank 8 beat rank 4?", "question: 7", 2, ["question must be"]),
    ("  r4: r4.yaml", "  r4: r5.yaml", 6, ["arm 'r4': no such recipe"]),
    ("  r4: r4.yaml", "  r4: alpaca_eval.yaml", None, ["alpaca_eval.yaml: is an eval recipe"]),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, sedes: [1]}",
        6,
        ["unknown key 'arms.r4.sedes'", "did you mean arms.r4.seeds?"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, gpus: 0}",
        6,
        ["arms.r4.gpus must be"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, gpus: 2}",
        6,
        ["arm 'r4'", "cpu starts one process, but 2 were asked for"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, accelerate: ddp_cpuu}",
        6,
        ["arm 'r4'", "did you mean ddp_cpu?"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, accelerate: ddp_cpu, gpus: 8}",
        None,
        ["arm 'r4'", "cannot be made of micro-batches"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, overrides: [train.learning_rte=1]}",
        6,
        ["arm 'r4'", "did you mean train.learning_rate?"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, overrides: [learning_rate=1]}",
        6,
        ["arm 'r4'", "write train.learning_rate"],
    ),
    ("  r4: r4.yaml", "  r4: {recipe: r4.yaml, seeds: [1, 1]}", 6, ["seed 1 stands there twice"]),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, seeds: [-1]}",
        6,
        ["seed -1 must be a whole number >= 0"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, seeds: [yes]}",
        6,
        ["arms.r4.seeds.0 must be"],
    ),
    ("  r4: r4.yaml", "  r4: {}", 6, ["arms.r4.recipe is missing"]),
    ("  r4: r4.yaml", "  base: r4.yaml", 6, ["'base' is the name of the base model's own arm"]),
    ("  r4: r4.yaml", "  ../r4: r4.yaml", 6, ["arm name '../r4'"]),
    ("  r4: r4.yaml", "  r8: r4.yaml", 7, ["duplicate key 'arms.r8'"]),
    (
        "  rank: [lora.r, lora.lora_alpha]",
        "  rank: [lora.rr]",
        4,
        ["factor 'rank': there is no key 'lora.rr'"],
    ),
    (
        "  rank: [lora.r, lora.lora_alpha]",
        "  rank: lora.r",
        4,
        ["factors.rank must be"],
    ),
    ("  rank: [lora.r, lora.lora_alpha]", "  rank: []", 4, ["factor 'rank' names no key"]),
    ("seeds: [42]", "reference: {r5: {win_rate: 0.5}}", 8, ["no arm 'r5'"]),
    ("seeds: [42]", "seeds: []", 8, ["seeds is empty"]),
    ("seeds: [42]", "seeds: 42", 8, ["seeds must be"]),
    ("seeds: [42]", "overrides: [train.max_steps=many]", 8, ["train.max_steps", "whole number"]),
    ("mt_bench.yaml", "mt_bnch.yaml", 9, ["no such eval recipe"]),
    ("mt_bench.yaml", "r4.yaml", None, ["r4.yaml: is a recipe, not an eval recipe"]),
    (
        "seeds: [42]",
        "overrides: [train.seed=7]",
        8,
        ["train.seed cannot be overridden in a study", "seeds: [1, 2]"],
    ),
    ("seeds: [42]", "overrides: [run.name=mine]", 8, ["run.name cannot be overridden in a study"]),
    ("lm_eval.yaml]", "lm_eval.yaml, mt_bench.yaml]", 9, ["mt_bench' stands there twice"]),
    ("mt_bench.yaml", "mt_bnch.yaml", 9, ["did you mean mt_bench.yaml?"]),
    ("seeds: [42]", "include_base: maybe", 8, ["include_base", "include_base must be"]),
    (
        "seeds: [42]",
        "margins: {win_rate: 2}",
        8,
        ["margins: win_rate: ", "is a share: write points ('2 points') or a number below 1"],
    ),
    (
        "seeds: [42]",
        "margins: {mt_bench/grade: 2 points}",
        8,
        ["grade is no share and has no points: write a number in its unit"],
    ),
    (
        "seeds: [42]",
        "margins: {win_rate: -1 points}",
        8,
        ["margins: win_rate: must be a number above 0, or one like '2 points', got '-1 points'"],
    ),
    (
        "seeds: [42]",
        "margins: {heldout_loss: 0.005}",
        8,
        ["margins: heldout_loss: no eval of this study measures it", "mt_bench/grade"],
    ),
    (
        "seeds: [42]",
        "primary: win_rat",
        8,
        [
            "primary: no eval of this study measures 'win_rat'",
            "metrics: study--alpaca_eval/win_rate,",
        ],
    ),
    (
        "seeds: [42]",
        "primary: win_rate",
        8,
        [
            "several evals measure 'win_rate'",
            "metrics: study--alpaca_eval/win_rate, study--mt_bench/win_rate",
        ],
    ),
    ("seeds: [42]", "tune: {train.learning_rte: [1, 2]}", 8, ["did you mean train.learning_rate"]),
    ("seeds: [42]", "tune: {train.learning_rate: [1]}", 8, ["two different values or more"]),
    (
        "seeds: [42]",
        "tune: {train.learning_rate: 1}",
        8,
        ["tune.train.learning_rate must be"],
    ),
    ("seeds: [42]", "tune: {train.learning_rate: [-1, 1]}", 8, ["arm 'r8'", "train.learning_rate"]),
    ("seeds: [42]", "tune: {train.seed: [1, 2]}", 8, ["tune: train.seed cannot be tuned"]),
    ("seeds: [42]", "tune: {data.prompt_format: [chat, raw]}", 8, ["cannot be tuned", "train"]),
    (
        "seeds: [42]",
        "tune: {train.max_length: [9, 99]}",
        8,
        ["changes what the validation loss is"],
    ),
    ("seeds: [42]", "tune: {lora.r: [4, 8]}", 8, ["is what the factor 'rank' varies"]),
    (
        "seeds: [42]",
        "tune: {train.learning_rate: [1, 2], train.max_steps: [1, 2]}",
        8,
        ["tune names 2 keys; tune one"],
    ),
    (
        "  r4: r4.yaml",
        "  r4: {recipe: r4.yaml, seeds: [1042], tune: {train.learning_rate: [1, 2]}}",
        6,
        ["seed 1042 is that of its tuning"],
    ),
    (
        "seeds: [42]",
        "overrides: [train.learning_rate=1]\ntune: {train.learning_rate: [1, 2]}",
        9,
        ["train.learning_rate is tuned, and set by an override"],
    ),
    (
        "seeds: [42]",
        "overrides: [train.eval_strategy='no']\ntune: {train.learning_rate: [1, 2]}",
        9,
        ["no validation loss to choose by", "set data.split.validation"],
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_study_is_answered_with_its_line(
    old: str,
    new: str,
    line: int | None,
    words: list[str],
    study_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = study_folder / "tiny.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert main(["check", str(file)]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    if line is not None:
        assert f"tiny.yaml:{line}: " in said


def test_all_errors_of_a_study_and_its_recipes_come_at_once(
    study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = study_folder / "r4.yaml"
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("seed: 42", "sede: 42"), encoding="utf-8"
    )
    study = study_folder / "tiny.yaml"
    study.write_text(
        study.read_text(encoding="utf-8")
        .replace("lm_eval.yaml", "no.yaml")
        .replace("r8.yaml", "r9.yaml"),
        encoding="utf-8",
    )
    assert main(["check", str(study)]) == 2
    said = capsys.readouterr().err
    assert "r4.yaml:16: unknown key 'train.sede'" in said
    assert "no such eval recipe" in said and "no such recipe" in said


def test_two_base_models_have_no_one_base(study_folder: Path) -> None:
    recipe = study_folder / "r8.yaml"
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("no-model", "another"), encoding="utf-8"
    )
    with pytest.raises(RecipeError, match="different base models"):
        raise_all(study_folder / "tiny.yaml")
    assert load_study(study_folder / "tiny.yaml", ["include_base=false"]).include_base is False


def raise_all(path: Path) -> None:
    try:
        load_study(path)
    except RecipeError as error:
        raise RecipeError(str(error)) from None


def test_a_factor_without_effect_is_warned_about(
    study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_folder / "tiny.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("arms:", "  size: [data.max_examples]\narms:"), encoding="utf-8")
    assert main(["check", str(file)]) == 0
    said = capsys.readouterr().err
    assert "factor 'size' changes nothing" in said


def test_words_of_the_command_line_change_the_study_or_every_arm(study_folder: Path) -> None:
    study = load_study(study_folder / "tiny.yaml", ["seeds=[1, 2]", "train.max_steps=3"])
    assert [arm.seeds for arm in study.arms] == [(1, 2), (1, 2)]
    assert all(arm.recipe is not None and arm.recipe.train["max_steps"] == 3 for arm in study.arms)
    assert run_names(study) == {
        "r4": ["tiny--r4--seed1", "tiny--r4--seed2"],
        "r8": ["tiny--r8--seed1", "tiny--r8--seed2"],
    }
    assert launch_words(study.arm("r4")) == ["--accelerate", "cpu"]
    resolved = arm_recipe(study, study.arm("r4"), 2)
    words = ["train.max_steps=3", "run.name=tiny--r4--seed2", "train.seed=2"]
    assert study.arm("r4").recipe is not None
    loaded = load_recipe(study.arm("r4").recipe.path, words)
    assert resolved == dataclasses.replace(loaded, path=resolved.path)


@pytest.mark.parametrize(
    ("word", "own"),
    [
        ("accelerate=ddp_cpu", "accelerate: cpu"),
        ("gpus=2", "gpus: 1"),
        ("seeds=[1, 2]", "seeds: [7]"),
    ],
)
def test_a_word_that_an_arms_own_value_would_swallow_is_refused(
    study_folder: Path, word: str, own: str
) -> None:
    file = study_folder / "tiny.yaml"
    file.write_text(
        file.read_text(encoding="utf-8").replace("r4: r4.yaml", f"r4: {{recipe: r4.yaml, {own}}}"),
        encoding="utf-8",
    )
    with pytest.raises(RecipeErrors) as caught:
        load_study(file, [word])
    key = word.partition("=")[0]
    assert f"tiny.yaml:6: arm 'r4' has its own {own}, so {key}=" in str(caught.value)
    load_study(file, [own.replace(": ", "=")])  # what it says already
    load_study(file)


@pytest.mark.parametrize("word", ["train.seed=7", "--train.seed=7", "run.name=mine"])
def test_a_word_that_would_change_nothing_is_refused_once(study_folder: Path, word: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_study(study_folder / "tiny.yaml", [word])
    assert [error.file for error in caught.value.errors] == ["command line"]
    assert f"{word.removeprefix('--').partition('=')[0]} cannot be overridden in a study" in str(
        caught.value
    )


def test_a_seed_that_is_added_later_leaves_the_first_ones_run_where_it_is(
    study_folder: Path,
) -> None:
    assert run_names(load_study(study_folder / "tiny.yaml"))["r4"] == ["tiny--r4"]
    more = load_study(study_folder / "tiny.yaml", ["seeds=[42, 43]"])
    assert run_names(more)["r4"] == ["tiny--r4", "tiny--r4--seed43"]


def test_an_override_of_an_arm_wins_over_the_studys_and_loses_to_the_command_lines(
    study_folder: Path,
) -> None:
    file = study_folder / "tiny.yaml"
    text = file.read_text(encoding="utf-8").replace(
        "seeds: [42]", "overrides: [train.max_steps=1, lora.r=1]"
    )
    file.write_text(
        text.replace("r4: r4.yaml", "r4: {recipe: r4.yaml, overrides: [train.max_steps=2]}"),
        encoding="utf-8",
    )
    steps = {arm.name: arm.recipe.train["max_steps"] for arm in load_study(file).arms if arm.recipe}
    assert steps == {"r4": 2, "r8": 1}
    steps = {
        arm.name: arm.recipe.train["max_steps"]
        for arm in load_study(file, ["train.max_steps=9"]).arms
        if arm.recipe
    }
    assert steps == {"r4": 9, "r8": 9}


def test_an_unknown_arm_is_answered_with_the_arms_there_are(study_folder: Path) -> None:
    with pytest.raises(RecipeError, match="has no arm 'r5'") as caught:
        load_study(study_folder / "tiny.yaml").arm("r5")
    assert "arms: r4, r8" in str(caught.value)


def test_a_recipe_given_as_a_study_is_told_what_it_is(study_folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a recipe, not a study"):
        load_study(study_folder / "r4.yaml")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("seeds: [42]", "study--alpaca_eval/win_rate"),
        ("primary: mt_bench", "study--mt_bench/grade"),
        ("primary: alpaca_eval/win_rate", "study--alpaca_eval/win_rate"),
        ("primary: lm_eval", "study--lm_eval/quickstart_multiple_choice"),
        (
            "primary: quickstart_multiple_choice/acc",
            "study--lm_eval/quickstart_multiple_choice/acc",
        ),
    ],
)
def test_the_primary_metric_is_named_by_a_part_of_its_name_or_is_the_first(
    study_folder: Path, written: str, meant: str
) -> None:
    file = study_folder / "tiny.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("seeds: [42]", written))
    assert load_study(file).aims.primary == meant
