"""Study files: accepted, resolved, and refused with file, line and what to do."""

import re
from itertools import combinations

import pytest

from recipes_lib.analysis.differences import arm_differences
from recipes_lib.analysis.runs import ArmRuns
from recipes_lib.cli import main
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.study.config import load_study
from recipes_lib.study.trainings import study_trainings


def test_in_a_controlled_study_nothing_differs_but_the_declared_factors() -> None:
    for name in ("lora-rank", "learning-rate", "distributed-strategy", "quickstart"):
        study = load_study(name)
        pairs = combinations([ArmRuns(arm.name, ()) for arm in study.arms], 2)
        found = [each for pair in pairs for each in arm_differences(*pair, study.design)]
        assert {each.level for each in found} <= {"cause", "note"}, name
    arms = load_study("distributed-strategy").arms
    assert {arm.launch.world_size for arm in arms} == {2}
    kinds = {arm.resolved()["launch.distributed_type"] for arm in arms}
    assert kinds == {"MULTI_GPU", "FSDP"}


# What is put in place of what in the tiny study: what the answer says. Its line is that of the
# place, where the words do not begin with another file.
BAD = {
    "question: Does rank 8 beat rank 4?": {"questoin: x?": "did you mean question?"},
    "r4: r4.yaml": {
        "r4: r5.yaml": "no such file",
        "r4: alpaca_eval.yaml": "alpaca_eval.yaml: expected a YAML of kind",
        "r4: {recipe: r4.yaml, sedes: [1]}": "did you mean arms.r4.seeds?",
        "r4: {recipe: r4.yaml, gpus: 2}": "arm 'r4': cpu starts one process",
        "r4: {recipe: r4.yaml, accelerate: ddp_cpuu}": "did you mean ddp_cpu?",
        "r4: {recipe: r4.yaml, accelerate: ddp_cpu, gpus: 8}": "r4.yaml:9: arm 'r4': ",
        "r4: {recipe: r4.yaml, accelerate: ./fp16.yaml}": "arm 'r4': fp16.yaml asks for mixed_prec",
        "r4: {recipe: r4.yaml, overrides: [train.learning_rte=1]}": "mean train.learning_rate?",
        "r4: {recipe: r4.yaml, seeds: [1042], tune: {lora.lora_dropout: [0, 1]}}": "seed 1042 is",
        "r4: {recipe: r4.yaml, overrides: [model.name_or_path=/x]}": "tiny.yaml: include_base: ",
        "base: r4.yaml": "'base' means the base model",
        "../r4: r4.yaml": "should match pattern",
    },
    "rank: [lora.r, lora.lora_alpha]": {
        "rank: [lora.rr]": "factor 'rank': there is no key 'lora.rr'",
    },
    "seeds: [42]": {
        "reference: {r5: {win_rate: 0.5}}": "no arm 'r5'",
        "baseline: r5": "arms: r4, r8, base",
        "overrides: [train.max_steps=many]": "train.max_steps",
        "overrides: [train.seed=7]": "seeds: [1, 2]",
        "margins: {win_rate: 2}": "for a share write '2 points'",
        "margins: {win_rate: -1 points}": "must be a number above 0",
        "margins: {heldout_loss: 0.005}": "no eval of this study measures it",
        "primary: win_rat": "no eval of this study measures 'win_rat'",
        "primary: quickstart_multiple_choice/acc_normed": "metrics: quickstart_multiple_",
        "margins: {lm_eval/quickstart_multiple_choice/ac: 2 points}": "reports no such metric",
        "primary: study": "several evals measure 'study'",
        "tune: {train.learning_rte: [1, 2]}": "did you mean train.learning_rate",
        "tune: {train.learning_rate: [-1, 1]}": "learning_rate",
        "tune: {data.prompt_format: [chat, raw]}": "cannot be tuned",
        "tune: {lora.lora_dropout: [0, 1]}\noverrides: [train.eval_strategy=no]": "validation loss",
        "tune: {train.max_length: [9, 99]}": "cannot be tuned",
        "tune: {lora.r: [4, 8]}": "is what the factor 'rank' varies",
    },
    "mt_bench.yaml": {
        "mt_bnch.yaml": "mt_bench.yaml?",
        "r4.yaml": "r4.yaml: expected a YAML of kind eval, found recipe",
    },
    "evals: [alpaca_eval.yaml, mt_bench.yaml, lm_eval.yaml]": {"evals: []": "at least 1 item"},
    "lm_eval.yaml]": {"lm_eval.yaml, mt_bench.yaml]": "mt_bench' is listed twice"},
}


def test_a_bad_study_is_answered_with_its_line(study_folder, capsys):
    file = study_folder / "tiny.yaml"
    text = file.read_text()
    foreign = "distributed_type: 'NO'\nuse_cpu: true\nmixed_precision: fp16\n"
    (study_folder / "fp16.yaml").write_text(foreign)
    wrong = []
    for old, answers in BAD.items():
        line = text[: text.index(old)].count("\n") + 1
        for new, words in answers.items():
            file.write_text(text.replace(old, new))
            code, said = main(["check", str(file)]), capsys.readouterr().err
            place = "" if ".yaml:" in words else f"tiny.yaml:{line}: "
            if code != 2 or words not in said or place not in said:
                wrong.append((new, code, said))
    recipe = study_folder / "r4.yaml"  # all that is wrong comes at once
    recipe.write_text(recipe.read_text().replace("seed: 42", "sede: 42"))
    file.write_text(text.replace("lm_eval.yaml", "no.yaml").replace("r8.yaml", "r9.yaml"))
    with pytest.raises(RecipeErrors, match=r"(?s)train.sede.*r9\.yaml.*no\.yaml"):
        load_study(file)
    assert not wrong


@pytest.mark.parametrize("verb", [["check"], ["study", "plan"]])
def test_one_arm_without_a_base_is_said_to_be_compared_with_nothing(verb, study_folder, capsys):
    file = study_folder / "tiny.yaml"
    text = file.read_text()
    for alone in ("include_base: true", "include_base: false"):
        without_r8 = re.sub(r"(?m)^  r8: .*\n", "", text)
        file.write_text(re.sub(r"(?m)^include_base: .*\n", "", without_r8) + f"{alone}\n")
        code = main([*verb, str(file)])
        said = capsys.readouterr()
        assert code == 0, said.err
        warned = "one arm without a base: the report will compare nothing" in said.out + said.err
        assert warned == (alone == "include_base: false")


def test_a_warning_of_two_arms_names_the_file_of_each(study_folder, recipes):
    for name in ("r4.yaml", "r8.yaml"):
        text = (study_folder / name).read_text().replace("seed: 42", "truncation_mode: keep_end")
        (study_folder / name).write_text(text)
    _, _, said = recipes("check", study_folder / "tiny.yaml")
    assert re.findall(r"(r\d)\.yaml:\d+: warning: TRL 2", said) == ["r4", "r8"]


def test_words_of_the_command_line_change_the_study_and_win_over_every_arm(study_folder):
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
    added = load_study(file, ["seeds=[42, 43]"])  # the first one's run stays where it is
    runs = [training.run for training in study_trainings(added)]
    assert runs[:2] == ["tiny--r4", "tiny--r4--seed43"]
    with pytest.raises(RecipeErrors):
        load_study(file, ["--train.seed=7"])


def test_the_primary_metric_is_named_by_a_part_of_its_name_or_is_the_first(study_folder):
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
