from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.compare import validity
from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.design import Study, load_study
from recipes_lib.compare.findings import Finding, errors_first
from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.eval_log import EvalLog, Measure, Sample

PROJECT = Path(__file__).resolve().parents[2]
RESOLVED = {
    "model": {"name_or_path": "m", "dtype": "bfloat16"},
    "quantization": None,
    "lora": {"r": 8, "lora_alpha": 16},
    "data": {
        "source": "d.jsonl",
        "prompt_format": "dolly",
        "split": {"method": "hash", "validation": 0.1},
    },
    "train": {"learning_rate": 1e-4, "seed": 42, "bf16": True},
    "run": {"name": "x", "global_batch_size": 8},
}
ENVIRONMENT = {
    "devices": ["NVIDIA H100, 80 GiB"],
    "libraries": {"torch": "2.13.0"},
    "python": "3.11.7",
    "git": {"commit": "abc", "dirty": False},
}
GUARD = {
    "data_fingerprint": "d1",
    "prompt_format_hash": "p1",
    "launch.world_size": 1,
    "launch.distribution": "one process",
}
SPLITS = {"train": {"count": 2, "ids": ["a", "b"]}, "validation": {"count": 1, "ids": ["c"]}}
PASSED = {
    "checks": [{"check": "swap consistency", "value": 0.9, "needs": ">= 0.6", "result": "pass"}],
    "contradictions": {},
}


def check_validity(study: Study | None, measurements: Measurements) -> list[Finding]:
    """What was found; whatever a test is about, a finding has evidence and says what to do."""
    findings = validity.check_validity(study, measurements)
    assert all(
        finding.title and all(finding.evidence) and finding.evidence and finding.remedy
        for finding in findings
    ), findings
    return findings


def items(
    values: Sequence[float | None], verdicts: tuple[str, ...] = ("A", "B")
) -> tuple[Sample, ...]:
    outcome = {1.0: "win", 0.5: "tie", 0.0: "loss", None: "unresolved"}
    return tuple(
        Sample(str(n), 1, "all", value, outcome.get(value, "graded"), verdicts, lengths=(n + 1, 5))
        for n, value in enumerate(values)
    )


def evaluated(
    folder: Path,
    values: Sequence[float | None] = (1.0, 0.0),
    suite: str = "alpaca_eval",
    **facts: Any,
) -> EvalLog:
    """One result whose win rate has these items; `facts` go into result.json."""
    file = folder / "evals" / suite / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    made = facts.pop("items", None) or items(values, facts.pop("verdicts", ("A", "B")))
    metric = "win_rate" if suite == "alpaca_eval" else "grade"
    measure = Measure(
        suite, suite, metric, metric, made, file, "reference" if metric == "win_rate" else None
    )
    told = {"judge": {"fingerprint": "j", "name": "judge", "weak": None}, "audit": PASSED}
    told |= {"leaks": {"rows": 9, "questions": len(made)}, **facts}
    told |= {"suite": suite, "against": measure.opponent}
    return EvalLog.from_dict(told, suite, file, (measure,))


def run(
    root: Path, name: str, *results: EvalLog, resolved: Mapping[str, Any] = RESOLVED, **parts: Any
) -> RunMeasurements:
    (root / name).mkdir(parents=True, exist_ok=True)
    state = {
        "state": "finished",
        "guard": {**GUARD, **parts.pop("guard", {})},
        **parts.pop("state", {}),
    }
    known: dict[str, Any] = {
        "environment": ENVIRONMENT,
        "splits": SPLITS,
        "curves": (),
        **parts,
    }
    seed = resolved.get("train", {}).get("seed")
    return RunMeasurements(
        name=name,
        folder=root / name,
        state=state,
        resolved=resolved,
        evals=results,
        seed=seed,
        **known,
    )


def arms(**runs: RunMeasurements | tuple[RunMeasurements, ...]) -> Measurements:
    return Measurements(
        {
            name: ArmMeasurements(name, one if isinstance(one, tuple) else (one,))
            for name, one in runs.items()
        }
    )


def changed(**sections: Mapping[str, Any] | None) -> dict[str, Any]:
    """The resolved recipe with values of a section changed."""
    whole = {
        key: dict(value) if isinstance(value, dict) else value for key, value in RESOLVED.items()
    }
    for section, values in sections.items():
        whole[section] = None if values is None else {**(whole[section] or {}), **values}
    return whole


def codes(findings: Sequence[Finding], severity: str = "") -> set[str]:
    return {finding.code for finding in findings if severity in ("", finding.severity)}


def found(findings: Sequence[Finding], code: str) -> Finding:
    matching = [finding for finding in findings if finding.code == code]
    assert len(matching) == 1, (code, [finding.code for finding in findings])
    return matching[0]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def rank_study() -> Study:
    """The shipped study of one factor, its arms called r8 and r32."""
    return load_study("lora-rank")


def with_arms(study: Study, *arms: Any, **values: Any) -> Study:
    return dataclasses.replace(study, arms=arms or study.arms, **values)


def changing(study: Study, name: str, *words: str) -> Study:
    """The study with words added to one arm's recipe."""
    from recipes_lib.config.recipe import load_recipe

    arm = study.arm(name)
    assert arm.recipe is not None
    other = dataclasses.replace(arm, recipe=load_recipe(arm.recipe.path, words))
    return dataclasses.replace(
        study, arms=tuple(other if one.name == name else one for one in study.arms)
    )


# ---- what a finding concerns ----


def test_a_finding_of_two_arms_concerns_the_rows_between_them_and_of_one_arm_all_its_rows():
    pair = Finding("c", "error", "t", arms=("a", "b"))
    assert (
        pair.touches(("a", "b"), "m")
        and pair.touches(("b", "a"), "m")
        and not pair.touches(("a", "c"), "m")
    )
    assert Finding("c", "error", "t", arms=("a",)).touches(("a", "c"), "m")
    assert Finding("c", "error", "t").touches(("x", "y"), "m")
    assert not Finding("c", "error", "t", metrics=("m",)).touches(("x", "y"), "other")


def test_findings_come_errors_first_and_once():
    note, error = Finding("a", "note", "n"), Finding("z", "error", "e")
    assert errors_first([note, error, note]) == [error, note]


# ---- confounds ----


def test_a_controlled_study_with_seeds_has_no_finding(root, rank_study):
    seeds = [
        tuple(
            run(
                root,
                f"{arm}-{seed}",
                evaluated(root / f"{arm}-{seed}", (1.0, value)),
                resolved=changed(train={"seed": seed}),
            )
            for seed, value in ((42, 0.0), (43, 1.0), (44, 0.5))
        )
        for arm in ("a", "b")
    ]
    findings = check_validity(
        with_arms(rank_study, published=None), arms(r8=seeds[0], r32=seeds[1])
    )
    assert codes(findings) == {"inside-noise-floor"}


def test_every_undeclared_key_is_listed_and_those_without_effect_are_marked(root, rank_study):
    study = changing(
        rank_study,
        "r32",
        "train.learning_rate=3e-4",
        "train.logging_steps=7",
        "data.split.validation=0.2",
    )
    finding = found(check_validity(study, arms()), "confound")
    assert finding.severity == "error" and finding.arms == ("r8", "r32")
    lines = [line.partition(":")[0] for line in finding.evidence]
    assert sorted(lines) == ["data.split.validation", "train.learning_rate", "train.logging_steps"]
    assert [line for line in finding.evidence if "changes no result" in line] == [
        finding.evidence[-1]
    ]
    assert "train.learning_rate: r8 0.0001, r32 0.0003" in finding.evidence


def test_how_often_is_saved_matters_only_where_the_best_checkpoint_is_kept(root, rank_study):
    note = found(
        check_validity(changing(rank_study, "r32", "train.save_steps=50"), arms()), "differences"
    )
    assert note.severity == "note"
    both = [
        changing(rank_study, name, "train.load_best_model_at_end=true", f"train.save_steps={steps}")
        for name, steps in (("r8", 100), ("r32", 200))
    ]
    study = with_arms(rank_study, both[0].arm("r8"), both[1].arm("r32"))
    assert found(check_validity(study, arms()), "confound").severity == "error"


def test_a_value_that_is_the_default_is_no_difference(root, rank_study):
    findings = check_validity(
        changing(rank_study, "r32", "train.fp16=false", "train.weight_decay=0.0"), arms()
    )
    assert codes(findings) == {"confound-missing-runs"}


def test_the_batch_cut_otherwise_is_a_note(root, rank_study):
    finding = found(
        check_validity(changing(rank_study, "r32", "train.per_device_train_batch_size=8"), arms()),
        "differences",
    )
    assert finding.severity == "note" and "changes no result" in finding.title


def test_another_number_of_examples_per_step_is_a_confound_whichever_key_makes_it(root, rank_study):
    def without_global_batch(study: Study, *words: str) -> Study:
        for name in ("r8", "r32"):
            study = changing(
                study, name, "run.global_batch_size=null", *(words if name == "r32" else ())
            )
        return study

    for word in ("train.per_device_train_batch_size=16", "train.gradient_accumulation_steps=4"):
        finding = found(check_validity(without_global_batch(rank_study, word), arms()), "confound")
        assert any(line.startswith("launch.examples_per_step: r8 ") for line in finding.evidence)
        assert f"{word.partition('=')[0]}: r8 " in "".join(finding.evidence)
    assert "confound" not in codes(check_validity(without_global_batch(rank_study), arms()))
    same = check_validity(
        changing(rank_study, "r32", "train.per_device_train_batch_size=8"), arms()
    )
    assert "confound" not in codes(same)  # run.global_batch_size keeps the examples per step


def test_a_factor_declares_the_examples_per_step_where_it_declares_every_key_behind_them(
    root, rank_study
):
    key, words = (
        "train.per_device_train_batch_size",
        ("run.global_batch_size=null", "train.per_device_train_batch_size=16"),
    )
    study = changing(changing(rank_study, "r8", "run.global_batch_size=null"), "r32", *words)
    declared = dataclasses.replace(study, factors={**study.factors, "batch": (key,)})
    assert "confound" not in codes(check_validity(declared, arms()))
    more = changing(
        changing(rank_study, "r8", "run.global_batch_size=null"),
        "r32",
        *words,
        "train.gradient_accumulation_steps=2",
    )
    more = dataclasses.replace(more, factors=declared.factors)
    assert "launch.examples_per_step" in found(check_validity(more, arms()), "confound").title


def test_rows_that_are_dropped_at_the_end_of_an_epoch_change_a_result(root, rank_study):
    finding = found(
        check_validity(changing(rank_study, "r32", "train.dataloader_drop_last=true"), arms()),
        "confound",
    )
    assert "train.dataloader_drop_last" in finding.title


def test_runs_that_took_another_number_of_steps_are_confounded(root, rank_study):
    def steps(first: int, second: int, study: Study) -> list[Finding]:
        made = {
            name: run(root, name, state={"summary": {"steps": n}})
            for name, n in (("r8", first), ("r32", second))
        }
        return check_validity(study, arms(**made))

    finding = found(steps(188, 187, rank_study), "confound-steps")
    assert finding.severity == "error" and finding.evidence == ("optimizer steps: r8 188, r32 187",)
    assert "confound-steps" not in codes(steps(188, 188, rank_study))
    longer = dataclasses.replace(rank_study, factors={"epochs": ("train.num_train_epochs",)})
    assert "confound-steps" not in codes(steps(188, 376, longer))


def test_without_a_study_differences_are_a_note(root):
    findings = check_validity(
        None, arms(a=run(root, "a"), b=run(root, "b", resolved=changed(lora={"r": 32})))
    )
    assert found(findings, "differences").evidence == ("lora.r: a 8, b 32",)
    assert not codes(findings, "error")


def test_two_arms_that_differ_in_the_seed_alone_are_an_a_a_pair(root):
    findings = check_validity(
        None, arms(a=run(root, "a"), b=run(root, "b", resolved=changed(train={"seed": 43})))
    )
    assert "noise-floor-missing" not in codes(findings)


def test_an_a_a_pair_gives_a_noise_floor_whatever_is_logged(root):
    def one(name: str, seed: int, rank: int, mean: float, steps: int = 10) -> RunMeasurements:
        resolved = changed(train={"seed": seed, "logging_steps": steps}, lora={"r": rank})
        return run(root, name, evaluated(root / name, (mean, mean)), resolved=resolved)

    made = arms(r8=one("a", 42, 8, 0.5), again=one("b", 43, 8, 0.6, 5), r32=one("c", 42, 32, 0.55))
    inside = [
        finding for finding in check_validity(None, made) if finding.code == "inside-noise-floor"
    ]
    # One pair 0.1 apart: 12.706 x 0.0707 x sqrt(2).
    assert {finding.arms for finding in inside} == {("r8", "r32"), ("again", "r32")}
    assert all(
        "noise floor 1.271 (2 trainings of 1 recipe, 95%)" in finding.evidence[0]
        for finding in inside
    )


def test_arms_of_other_seeds_are_no_a_a_pair_where_a_factor_differs_too(root, rank_study):
    seeds = {"r8": (42,), "r32": (42, 43)}
    study = with_arms(
        rank_study, *(dataclasses.replace(arm, seeds=seeds[arm.name]) for arm in rank_study.arms)
    )
    finding = found(check_validity(study, arms()), "differences")
    assert (finding.severity, "other seeds" in finding.title, finding.evidence) == (
        "note",
        True,
        ("train.seed: r8 42, r32 [42, 43]",),
    )
    assert "confound" not in codes(check_validity(study, arms()))


@pytest.mark.parametrize(
    ("code", "severity", "parts"),
    [
        ("confound-data", "error", {"guard": {"data_fingerprint": "d2"}}),
        ("confound-prompt-format", "error", {"guard": {"prompt_format_hash": "p2"}}),
        (
            "confound-split",
            "error",
            {"splits": {**SPLITS, "validation": {"count": 1, "ids": ["z"]}}},
        ),
        ("confound-world-size", "warning", {"guard": {"launch.world_size": 2}}),
        (
            "confound-hardware",
            "warning",
            {"environment": {**ENVIRONMENT, "devices": ["NVIDIA A100, 40 GiB"]}},
        ),
        (
            "confound-versions",
            "warning",
            {"environment": {**ENVIRONMENT, "libraries": {"torch": "2.9.0"}}},
        ),
        (
            "code-differs",
            "note",
            {"environment": {**ENVIRONMENT, "git": {"commit": "def", "dirty": False}}},
        ),
    ],
)
def test_what_runs_recorded_differently_is_a_confound(root, rank_study, code, severity, parts):
    same = check_validity(rank_study, arms(r8=run(root, "a"), r32=run(root, "b")))
    finding = found(
        check_validity(rank_study, arms(r8=run(root, "a"), r32=run(root, "b", **parts))), code
    )
    assert code not in codes(same)
    assert (
        (finding.severity, finding.arms) == (severity, ("r8", "r32"))
        and finding.evidence
        and finding.remedy
    )


def test_one_name_of_a_base_may_stand_for_two_models(root, rank_study):
    made = arms(r8=run(root, "a"), r32=run(root, "b"))
    for name, weights in (("a", "1" * 64), ("b", "1" * 64)):
        (root / name / "adapter").mkdir(parents=True)
        (root / name / "adapter" / "weights_check.json").write_text(
            json.dumps({"base_fingerprint": weights})
        )
    assert "confound-base" not in codes(check_validity(rank_study, made))
    (root / "b" / "adapter" / "weights_check.json").write_text(
        json.dumps({"base_fingerprint": "2" * 64})
    )
    finding = found(check_validity(rank_study, made), "confound-base")
    assert finding.severity == "error" and finding.evidence == (
        "weights: r8 111111111111, r32 222222222222",
    )
    (root / "b" / "adapter" / "weights_check.json").write_text("{torn")
    assert "confound-base" not in codes(check_validity(rank_study, made))


@pytest.mark.parametrize("evaluated_base", ["1" * 64, "2" * 64, None])
def test_an_adapter_of_another_revision_than_the_evaluated_base_is_found(
    root, rank_study, evaluated_base
):
    state = {"kind": "base", "base_fingerprint": evaluated_base}
    made = arms(r8=run(root, "a"), base=run(root, "base--m--1", resolved={}, state=state))
    (root / "a" / "adapter").mkdir(parents=True)
    (root / "a" / "adapter" / "weights_check.json").write_text(
        json.dumps({"base_fingerprint": "1" * 64})
    )
    if evaluated_base != "2" * 64:  # the same, or of an earlier release
        assert "confound-base" not in codes(check_validity(rank_study, made))
        return
    finding = found(check_validity(rank_study, made), "confound-base")
    assert (finding.severity, finding.arms) == ("error", ("r8", "base"))
    assert finding.evidence == ("weights: base 222222222222, r8 was trained on 111111111111",)
    assert found(check_validity(None, made), "confound-base").severity == "warning"


def test_the_number_of_free_threads_is_no_hardware(root):
    devices = [
        {**ENVIRONMENT, "devices": [f"CPU, 2 cores, {threads} threads"]} for threads in (1, 2)
    ]
    made = arms(a=run(root, "a", environment=devices[0]), b=run(root, "b", environment=devices[1]))
    assert "confound-hardware" not in codes(check_validity(None, made))


def test_a_declared_factor_is_no_confound(root, rank_study):
    study = dataclasses.replace(
        rank_study,
        factors={"data": ("data.source", "data.split"), "strategy": ("launch.accelerate",)},
    )
    runs = arms(
        r8=run(root, "a"),
        r32=run(root, "b", guard={"data_fingerprint": "d2", "launch.world_size": 2}, splits={}),
    )
    assert not {
        code
        for code in codes(check_validity(study, runs))
        if code in ("confound-data", "confound-split", "confound-world-size")
    }


def test_full_fine_tuning_under_fsdp_and_ddp_differs_in_the_precision_of_the_trained_weights(
    tmp_path,
):
    def findings_of(recipe: str) -> list[Finding]:
        path = PROJECT / "recipes/llama2-7b-dolly" / f"{recipe}.yaml"
        launches = "\n".join(
            f"  {name}: {{recipe: {path}, accelerate: {name}, gpus: 2}}" for name in ("ddp", "fsdp")
        )
        file = tmp_path / f"{recipe}.yaml"
        file.write_text(
            "question: Which?\nfactors: {strategy:"
            f" [launch.accelerate]}}\narms:\n{launches}\nevals: [{PROJECT}/evals/lm_eval.yaml]\n"
        )
        return check_validity(load_study(file), arms())

    confound = found(findings_of("full-bf16"), "confound")
    assert confound.severity == "error" and confound.evidence == (
        "launch.trained_dtype: ddp bfloat16, fsdp float32",
    )
    assert "confound" not in codes(findings_of("lora-bf16-r32"))


# ---- the design ----


def test_a_missing_cell_is_named_and_factors_that_change_together_are_confounded():
    study = load_study("distributed-strategy")
    assert "missing-cell" not in codes(check_validity(study, arms()))
    half = with_arms(study, study.arm("ddp-qlora"), study.arm("fsdp-bf16"))
    findings = check_validity(half, arms())
    assert found(findings, "missing-cell").evidence == (
        "no arm has strategy: ddp, precision: bf16",
        "no arm has strategy: fsdp, precision: qlora",
    )
    confounded = found(findings, "confound-factors")
    assert (
        confounded.title.startswith("strategy is confounded with precision")
        and confounded.severity == "error"
    )
    assert any(
        "launch.distributed_type: ddp-qlora MULTI_GPU, fsdp-bf16 FSDP" in line
        for line in confounded.evidence
    )


def test_three_of_four_cells_leave_the_factors_apart():
    study = load_study("distributed-strategy")
    findings = check_validity(with_arms(study, *study.arms[:3]), arms())
    assert "missing-cell" in codes(findings) and "confound-factors" not in codes(findings)


# ---- the same thing under two names ----


def written(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    path = folder / "evals" / "alpaca_eval" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answers(model: str, *texts: str) -> list[dict[str, Any]]:
    return [
        {"key": f"{model}{n}", "question_id": str(n), "turn": 1, "answer": text, "model": model}
        for n, text in enumerate(texts)
    ]


def said(*texts: str, raw: str | None = None) -> tuple[Sample, ...]:
    """Comparisons with these answers, or with what a judge wrote of answers that are not there."""
    return tuple(
        dataclasses.replace(one, answer=None if raw else text, raws=(raw,) if raw else ())
        for one, text in zip(items((1.0, 0.0)), texts, strict=True)
    )


def test_identical_answers_under_two_names_are_an_error(root):
    made = {
        name: run(root, name, evaluated(root / name, items=said("x", text)))
        for name, text in (("a", "same"), ("b", "same"), ("c", "else"))
    }
    finding = found(check_validity(None, arms(**made)), "identical-answers")
    assert (
        finding.severity == "error"
        and finding.arms == ("a", "b")
        and finding.metrics == ("alpaca_eval/win_rate",)
    )


SAID = tuple(
    f"{name} was born in the year {1900 + n} and has written {n} books about the {thing} so far."
    for n, (name, thing) in enumerate(
        zip(
            ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jo"],
            ["sea", "moon", "rain", "wind", "sun", "snow", "fog", "dew", "ice", "hail"],
            strict=True,
        )
    )
)
EDITS: dict[str, Callable[[int, str], str]] = {
    "white space": lambda n, text: text.replace(" ", "  ", 2) + "\n",
    "a word": lambda n, text: text.replace("books", "essays"),
    "case and marks": lambda n, text: text.upper().replace(".", "!"),
    "a fifth of the rows anew": lambda n, text: text if n > 1 else f"I do not know the {n} of it.",
    "two of five rows anew": lambda n, text: text if n > 3 else f"I do not know the {n} of it.",
    "answers of its own": lambda n, text: f"{n} {n} of a kind is all that I can say of it: {-n}",
}


def test_answers_of_one_template_are_no_copies(root):
    made = {}
    for name in ("a", "b"):
        texts = [
            f"The answer to the question that you have asked is this one: {name}{n}."
            for n in range(10)
        ]
        samples = tuple(
            dataclasses.replace(one, answer=text, lengths=(len(text), 90))
            for one, text in zip(items((1.0, 0.0) * 5), texts, strict=True)
        )
        made[name] = run(root, name, evaluated(root / name, items=samples))
    assert "identical-answers" not in codes(check_validity(None, arms(**made)))


def test_answers_of_earlier_weights_in_the_store_do_not_count(root):
    written(root / "a", "generations.jsonl", [*answers("old", "x", "y"), *answers("wa", "x", "z")])
    written(root / "b", "generations.jsonl", answers("wb", "x", "y"))
    made = {
        name: run(
            root,
            name,
            evaluated(root / name, answers={"fingerprint": f"w{name}"}, items=said("x", text)),
        )
        for name, text in (("a", "z"), ("b", "y"))
    }
    assert "identical-answers" not in codes(check_validity(None, arms(**made)))


def test_identical_judgments_are_an_error_where_the_answers_are_not_there(root):
    samples = said("", "", raw="Good. [RESULT] A")
    made = {name: run(root, name, evaluated(root / name, items=samples)) for name in "ab"}
    assert found(check_validity(None, arms(**made)), "identical-judgments").arms == ("a", "b")
    judge = {"fingerprint": "j", "mode": "logits"}
    made = {
        name: run(root, name, evaluated(root / name, items=samples, judge=judge)) for name in "ab"
    }
    assert "identical-judgments" not in codes(check_validity(None, arms(**made))), (
        "probabilities that are shown alike are not one judgment"
    )


def test_identical_adapters_under_two_names_are_an_error(root):
    made = {}
    for name, data in (("a", b"same"), ("b", b"same"), ("c", b"diff")):
        made[name] = run(root, name)
        (root / name / "adapter").mkdir()
        (root / name / "adapter" / "adapter_model.safetensors").write_bytes(data)
    assert found(check_validity(None, arms(**made)), "identical-adapters").arms == ("a", "b")


def test_seeds_that_ended_with_the_same_weights_are_one_training(root):
    def seeds(arm: str, *weights: bytes) -> tuple[RunMeasurements, ...]:
        for n, data in enumerate(weights):
            (root / f"{arm}{n}" / "adapter").mkdir(parents=True)
            (root / f"{arm}{n}" / "adapter" / "adapter_model.safetensors").write_bytes(data)
        return tuple(run(root, f"{arm}{n}") for n in range(len(weights)))

    finding = found(
        check_validity(None, arms(a=seeds("a", b"11", b"11", b"22"), b=seeds("b", b"33", b"44"))),
        "identical-seeds",
    )
    assert finding.arms == ("a",) and "counted 2 times" in finding.title


def test_a_training_that_is_not_there_is_missed(root, rank_study):
    runs = tuple(run(root, f"r{seed}") for seed in (42, 43))
    findings = [
        one
        for one in check_validity(rank_study, arms(r8=runs))
        if one.code == "confound-missing-runs"
    ]
    assert [one.title for one in findings] == [
        "r32 has 0 of 3 trainings",
        "r8 has 2 of 3 trainings",
    ]
    assert {one.severity for one in findings} == {"error"}


def test_a_training_whose_results_are_gone_is_missed_as_the_training_is(root, rank_study):
    def seeds(name, evaluated_ones):
        return tuple(
            run(
                root,
                f"{name}-{seed}",
                *([evaluated(root / f"{name}-{seed}")] if seed in evaluated_ones else []),
                resolved=changed(train={"seed": seed}),
            )
            for seed in (42, 43, 44)
        )

    whole, chosen = seeds("r8", (42, 43, 44)), seeds("r32", (42, 44))
    findings = check_validity(rank_study, arms(r8=whole, r32=chosen))
    finding = found(findings, "confound-missing-runs")
    assert finding.title == "r32 has results of 2 of 3 trainings in alpaca_eval"
    assert finding.severity == "error" and finding.metrics == ("alpaca_eval/win_rate",)


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_recorded_training_without_weights_is_named_unless_its_answers_are_there(root, state):
    curves = ({"step": 10, "loss": 2.0}, {"step": 450, "loss": 1.0})
    parts = {"curves": curves, "state": {"state": state}}
    lost = arms(a=run(root, "a", **parts), b=run(root, "b", evaluated(root / "b"), **parts))
    finding = found(check_validity(None, lost), "lost-weights")
    assert finding.arms == ("a",) and "450 steps" in finding.evidence[1]
    (root / "a" / "adapter").mkdir()
    assert "lost-weights" not in codes(check_validity(None, lost))


def test_what_evaluations_ran_with_is_compared_between_the_arms(root, rank_study):
    new = {"libraries": {"torch": "2.13.0", "trl": None}, "git": {"commit": "a" * 40}}
    old = {"libraries": {"torch": "2.12.0", "trl": None}, "git": {"commit": "b" * 40}}
    for mine, theirs, seen in (
        (new, new, set()),
        (new, old, {"confound-versions", "code-differs"}),
    ):
        findings = check_validity(
            rank_study,
            arms(
                r8=run(root, "r8", evaluated(root / "r8", **mine)),
                r32=run(root, "r32", evaluated(root / "r32", **theirs)),
            ),
        )
        assert codes(findings) & {"confound-versions", "code-differs"} == seen
    finding = found(findings, "confound-versions")
    assert finding.severity == "warning" and finding.metrics == ("alpaca_eval/win_rate",)
    assert finding.evidence == ("torch: r8 2.13.0, r32 2.12.0",)
    assert "between the evaluations of r8 and r32" in finding.title


def test_one_run_for_two_arms_is_an_error(root):
    one = run(root, "a")
    assert found(check_validity(None, arms(x=one, y=one)), "identical-runs").severity == "error"


def test_answers_of_another_arms_adapter_are_an_error(root):
    made = {}
    for name, weights in (("a", b"11"), ("b", b"2222")):
        written(root / name, "generations.jsonl", answers("wa", name, "y"))
        made[name] = run(root, name, evaluated(root / name, answers={"fingerprint": f"w{name}"}))
        (root / name / "adapter").mkdir()
        (root / name / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    finding = found(check_validity(None, arms(**made)), "answers-of-another-arm")
    assert finding.arms == ("b",) and "by a's weights" in finding.title


def test_one_result_fingerprint_for_two_adapters_is_an_error(root):
    made = {}
    for name, weights in (("a", b"11"), ("b", b"2222")):
        made[name] = run(root, name, evaluated(root / name, answers={"fingerprint": "w"}))
        (root / name / "adapter").mkdir()
        (root / name / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    assert found(check_validity(None, arms(**made)), "answers-of-another-arm").arms == ("a", "b")


def test_one_model_under_two_names_is_an_error(root):
    made = {
        name: run(
            root, name, evaluated(root / name, values, answers={"fingerprint": "w"}), resolved={}
        )
        for name, values in (("a", (1.0, 0.0)), ("b", (0.0, 1.0)))
    }
    assert found(check_validity(None, arms(**made)), "identical-models").arms == ("a", "b")


# ---- the judge ----


def failed(check: str, value: float) -> dict[str, Any]:
    told = {"count": 6, "decidable": 10, "direction": "6 of 6 favour Response A"}
    return {
        "checks": [{"check": check, "value": value, "needs": "limit", "result": "fail"}],
        "contradictions": told,
    }


@pytest.mark.parametrize(
    ("check", "code"),
    [
        ("swap consistency", "order-flips"),
        ("judgments without a verdict", "unparsed-share"),
        ("verdicts against the judge's own words", "contradictory-verdicts"),
        ("empty answer loses", "judge-failed-audit"),
        ("agreement with human labels", "judge-failed-audit"),
    ],
)
def test_a_judge_that_failed_a_check_is_not_believed_for_any_arm(root, check, code):
    made = arms(
        a=run(root, "a", evaluated(root / "a", audit=failed(check, 0.3))),
        b=run(root, "b", evaluated(root / "b", (0.0, 1.0))),
    )
    finding = found(check_validity(None, made), code)
    assert (
        finding.severity == "error"
        and finding.touches(("a", "b"), "alpaca_eval/win_rate")
        and not finding.arms
    )
    assert (
        check in finding.evidence[0]
        and "runs/a/evals/alpaca_eval/result.json" in finding.evidence[0]
    )


def test_a_judge_that_failed_in_one_evaluation_is_not_believed_in_another(root):
    folder = root / "a"
    results = (
        evaluated(folder, audit=failed("swap consistency", 0.1)),
        evaluated(folder, (3.0, 4.0), "mt_bench"),
    )
    finding = found(check_validity(None, arms(a=run(root, "a", *results))), "order-flips")
    assert set(finding.metrics) == {"alpaca_eval/win_rate", "mt_bench/grade"}


def test_an_audit_on_human_labels_that_the_judge_failed_counts_and_another_judges_does_not(root):
    made = arms(a=run(root, "a", evaluated(root / "a")))
    card = {**failed("agreement with human labels", 0.5), "judge": "j"}
    for judge, name in (("j", "pandalm"), ("other", "llmbar")):
        folder = root / f"judge--{judge}" / name
        folder.mkdir(parents=True)
        (folder / "judge_audit.json").write_text(
            json.dumps({**card, "judge": judge}), encoding="utf-8"
        )
    finding = found(check_validity(None, made), "judge-failed-audit")
    assert finding.title.endswith("on pandalm") and finding.metrics == ("alpaca_eval/win_rate",)


def test_different_judges_are_an_error(root):
    other = {"fingerprint": "k", "name": "judge", "weak": None}
    made = arms(
        a=run(root, "a", evaluated(root / "a")),
        b=run(root, "b", evaluated(root / "b", (0.0, 1.0), judge=other)),
    )
    assert found(check_validity(None, made), "judges-differ").severity == "error"


def test_a_weak_judge_is_a_warning_with_its_reason(root):
    judge = {"fingerprint": "j", "name": "judge", "weak": "it is tiny"}
    finding = found(
        check_validity(None, arms(a=run(root, "a", evaluated(root / "a", judge=judge)))),
        "weak-judge",
    )
    assert finding.evidence == ("it is tiny",)


@pytest.mark.parametrize(
    ("flags", "severity"), [(["one order, the model always first"], "error"), ([], "warning")]
)
def test_one_order_judging_is_worse_where_the_order_was_always_the_same(root, flags, severity):
    made = arms(
        a=run(root, "a", evaluated(root / "a", verdicts=("A",), flags=flags)),
        b=run(root, "b", evaluated(root / "b", (0.0, 1.0))),
    )
    finding = found(check_validity(None, made), "one-order-judging")
    assert (finding.severity, finding.arms) == (severity, ("a",))


def test_a_missing_turn_is_named(root):
    turns = [
        Sample(question, turn, "math", 3.0, "graded", ("3",))
        for question in ("81", "82")
        for turn in (1, 2)
    ]
    made = arms(
        a=run(root, "a", evaluated(root / "a", suite="mt_bench", items=tuple(turns[:-1]))),
        b=run(root, "b", evaluated(root / "b", suite="mt_bench", items=tuple(turns))),
    )
    finding = found(check_validity(None, made), "missing-turn")
    assert finding.arms == ("a",) and "question 82 turn 2" in finding.title


def unmeasured(*checks: str, measured: Sequence[str] = ()) -> dict[str, Any]:
    states = {**dict.fromkeys(checks, "not measured"), **dict.fromkeys(measured, "pass")}
    return {
        "checks": [
            {"check": name, "value": 0.9, "needs": "limit", "result": state}
            for name, state in states.items()
        ]
    }


def test_a_check_that_nothing_measured_is_no_pass_until_an_audit_measured_it(root):
    labels = "agreement with human labels"
    made = arms(
        a=run(root, "a", evaluated(root / "a", audit=unmeasured(labels, "injected verdict flips"))),
        b=run(
            root,
            "b",
            evaluated(
                root / "b",
                (0.0, 1.0),
                audit=unmeasured(labels, measured=["injected verdict flips"]),
            ),
        ),
    )
    finding = found(check_validity(None, made), "judge-not-audited")
    assert finding.severity == "error" and finding.title.endswith(f"did not measure {labels}")
    assert finding.metrics == ("alpaca_eval/win_rate",) and "recipes judge audit" in finding.remedy
    folder = root / "judge--j" / "pandalm"
    folder.mkdir(parents=True)
    (folder / "judge_audit.json").write_text(
        json.dumps({**unmeasured(measured=[labels]), "judge": "another"}), encoding="utf-8"
    )
    assert "judge-not-audited" in codes(check_validity(None, made))
    (folder / "judge_audit.json").write_text(
        json.dumps({**unmeasured(measured=[labels]), "judge": "j"}), encoding="utf-8"
    )
    assert "judge-not-audited" not in codes(check_validity(None, made))


def test_the_shipped_study_of_ranks_names_a_cause_once_its_judge_was_audited_on_labelled_pairs(
    root, rank_study
):
    own, labels = ["swap consistency", "empty answer loses"], "agreement with human labels"
    runs: dict[str, tuple[RunMeasurements, ...]] = {}
    for name, share in (("r8", 0.3), ("r32", 0.7)):
        made = []
        for seed in (42, 43, 44):
            values = [float((n * 7 + seed) % 100 < 100 * share) for n in range(100)]
            folder = root / f"{name}-{seed}"
            result = evaluated(
                folder,
                values,
                audit=unmeasured(labels, measured=own),
                answers={"fingerprint": f"w{name}{seed}"},
            )
            made.append(run(root, folder.name, result, resolved=changed(train={"seed": seed})))
        runs[name] = tuple(made)
    measured = arms(**runs)

    def sentence() -> str:
        findings = check_validity(rank_study, measured)
        (row,) = (
            row
            for row in compare_arms(measured, findings, rank_study).rows
            if row.tested is not None
        )
        return row.sentence

    assert (
        sentence().startswith("The judge preferred r32 more than r8")
        and "No claim about the answers follows" in sentence()
    )
    folder = root / "judge--j" / "pandalm"
    folder.mkdir(parents=True)
    (folder / "judge_audit.json").write_text(
        json.dumps({**unmeasured(measured=[*own, labels]), "judge": "j"}), encoding="utf-8"
    )
    assert sentence().startswith("r32 is better than r8")
    assert sentence().endswith(
        " Only lora.r (32 against 8) and lora.lora_alpha (64 against 16) differ between them, "
        "so this is their joint effect over 3 training seeds."
    )


def test_a_judge_without_any_audit_was_not_audited_and_one_that_writes_nothing_has_no_words_to_contradict(  # noqa: E501
    root,
):
    bare = arms(a=run(root, "a", evaluated(root / "a", audit=None)))
    assert found(check_validity(None, bare), "judge-not-audited").title.endswith(
        "did not measure anything"
    )
    judge = {"fingerprint": "j", "name": "judge", "weak": None, "mode": "logits"}
    audit = unmeasured("verdicts against the judge's own words", measured=["swap consistency"])
    made = arms(a=run(root, "a", evaluated(root / "a", audit=audit, judge=judge)))
    assert "judge-not-audited" not in codes(check_validity(None, made))


@pytest.mark.parametrize(
    ("judge", "whose"),
    [
        ({"model": "M/"}, "its base"),
        ({"model": "{run}/merged"}, "its own weights"),
        ({"model": "a"}, "itself"),
        ({"model": "/elsewhere/judge", "run": "a"}, "itself, merged"),
        ({"model": "/elsewhere/copy", "weights": "merged"}, "its own weights"),
        ({"model": "/elsewhere/base", "weights": "b1"}, "its base"),
        ({"model": "somebody/else", "weights": "b2"}, ""),
    ],
)
def test_a_judge_that_is_an_arm_or_its_base_stops_the_sentence(root, judge, whose):
    from recipes_lib.core.fingerprints import folder_fingerprint, hash_of

    for name in ("adapter", "merged"):
        (root / "a" / name).mkdir(parents=True)
        (root / "a" / name / "x.safetensors").write_bytes(name.encode())
    trained = hash_of("b1", ["bfloat16", None], folder_fingerprint(root / "a" / "adapter"))
    told = {"fingerprint": "j", "name": "judge", "weak": None, **judge}
    told["model"] = told["model"].format(run=root / "a")
    if told.get("weights") == "merged":
        told["weights"] = folder_fingerprint(root / "a" / "merged")
    made = arms(
        a=run(root, "a", evaluated(root / "a", judge=told, answers={"fingerprint": trained})),
        b=run(
            root,
            "b",
            evaluated(root / "b", (0.0, 1.0), judge=told),
            resolved=changed(model={"name_or_path": "other"}),
        ),
    )
    findings = [finding for finding in check_validity(None, made) if finding.code == "self-judged"]
    assert [finding.arms for finding in findings] == ([("a",)] if whose else [])
    assert all(
        finding.severity == "error" and f"judged by {whose}, " in finding.evidence[0]
        for finding in findings
    )


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"identical": {"count": 100}}, "100 of 100 answers are one and the same"),
        ({"empty": 21}, "21 of 100 answers are empty"),
        ({"cut": 21}, "21 of 100 answers are cut"),
        ({"cut": 20, "empty": 10, "identical": {"count": 10}}, "20 of 100 answers are cut"),
        ({"cut": 10, "empty": 10, "identical": {"count": 10}}, ""),
        ({"cut": None, "empty": 0, "identical": {}}, ""),
    ],
)
def test_answers_that_are_constant_empty_or_mostly_cut_stop_the_sentence_and_a_tenth_is_a_warning(
    root, faults, said
):
    made = arms(
        a=run(
            root, "a", evaluated(root / "a", answers={"name": "a", "answers": {"n": 100, **faults}})
        ),
        b=run(root, "b", evaluated(root / "b", (0.0, 1.0))),
    )
    findings = [
        finding for finding in check_validity(None, made) if finding.code == "degenerate-answers"
    ]
    assert [finding.arms for finding in findings] == ([("a",)] if said else [])
    severity = "warning" if said.startswith("20 of") else "error"
    assert all(finding.severity == severity and said in finding.evidence[0] for finding in findings)
    facts = {"against": None, "opponent": {"name": "reference", "answers": {"n": 100, **faults}}}
    against = evaluated(root / "a", **facts)
    against = dataclasses.replace(against, against="reference")
    findings = check_validity(
        None, arms(a=run(root, "a", against), b=run(root, "b", evaluated(root / "b", (0.0, 1.0))))
    )
    assert ("degenerate-answers" in codes(findings)) == bool(said)


# ---- how the arms were asked ----


def test_decoding_and_prompts_that_differ_are_one_error_over_all_evaluations(root):
    def asked(name: str, temperature: float) -> RunMeasurements:
        told = {
            "answers": {
                "decoding": {"temperature": temperature},
                "prompt_format_hash": f"h{temperature}",
            }
        }
        return run(
            root,
            name,
            evaluated(root / name, **told),
            evaluated(root / name, (3.0, 4.0), "mt_bench", **told),
        )

    finding = found(
        check_validity(None, arms(a=asked("a", 0.0), b=asked("b", 0.7))), "protocol-differs"
    )
    assert finding.severity == "error" and set(finding.metrics) == {
        "alpaca_eval/win_rate",
        "mt_bench/grade",
    }
    assert "answers.decoding.temperature: a 0.0, b 0.7" in finding.evidence


def test_few_shot_that_differs_is_an_error_and_unknown_values_are_not(root):
    def asked(name: str, shots: int | None) -> RunMeasurements:
        told = {
            "tasks": [{"task": "gsm8k", "metric": "acc", "num_fewshot": shots, "version": 3}],
            "imported": [] if shots is None else None,
        }
        return run(root, name, evaluated(root / name, **told))

    finding = found(
        check_validity(None, arms(a=asked("a", 0), b=asked("b", 5))), "protocol-differs"
    )
    assert "gsm8k, acc: few-shot: a 0, b 5" in finding.evidence
    assert "gsm8k, acc: few-shot (0 and 5)" in finding.title
    assert "protocol-differs" not in codes(
        check_validity(None, arms(a=asked("a", 0), b=asked("b", None)))
    )


def test_examples_that_were_asked_for_are_those_that_a_task_has_itself(root):
    def asked(name: str, recipe: int | None, shots: int = 5) -> RunMeasurements:
        task = {"task": "gsm8k", "metric": "acc", "num_fewshot": shots, "version": 3}
        suite = {"suite": {"name": "lm_eval", "num_fewshot": recipe}}
        return run(root, name, evaluated(root / name, tasks=[task], recipe=suite))

    def differs(**runs: RunMeasurements) -> bool:
        return "protocol-differs" in codes(check_validity(None, arms(**runs)))

    assert not differs(a=asked("a", 5), b=asked("b", None))
    assert differs(c=asked("c", 5), d=asked("d", None, shots=0))


def test_human_labels_are_no_other_way_to_ask(root):
    def labelled(name: str, labels: str | None) -> RunMeasurements:
        return run(root, name, evaluated(root / name, recipe={"data": {"labels": labels}}))

    both = arms(a=labelled("a", "labels.jsonl"), b=labelled("b", None))
    assert "protocol-differs" not in codes(check_validity(None, both))


def test_other_precision_of_the_answers_is_a_warning(root):
    made = {
        name: run(root, name, evaluated(root / name, answers={"quantized": name == "a"}))
        for name in "ab"
    }
    assert found(check_validity(None, arms(**made)), "precision-of-answers").severity == "warning"


def test_a_subset_is_stamped_and_other_questions_are_counted(root):
    made = arms(
        a=run(root, "a", evaluated(root / "a", (1.0, 0.0, 1.0), subset="subset, n=3 of 805")),
        b=run(root, "b", evaluated(root / "b", (1.0, 0.0))),
    )
    findings = check_validity(None, made)
    assert found(findings, "subset").evidence == ("a: subset, n=3 of 805",)
    assert found(findings, "questions-differ").title.endswith("2 are the same")


def test_an_evaluation_that_an_arm_lacks_is_named(root):
    made = arms(
        a=run(root, "a", evaluated(root / "a"), evaluated(root / "a", (3.0,), "mt_bench")),
        b=run(root, "b", evaluated(root / "b", (0.0, 1.0)), unfinished=("lm_eval",)),
    )
    findings = check_validity(None, made)
    assert "mt_bench" in found(findings, "missing-evaluation").title
    assert "lm_eval" in found(findings, "unfinished-evaluation").title


def test_answers_that_stood_against_another_arm_are_not_an_evaluation_that_was_begun(root):
    log = dataclasses.replace(evaluated(root / "a"), against="base--x")
    made = arms(a=run(root, "a", log), b=run(root, "base--x", unfinished=("alpaca_eval",)))
    assert "unfinished-evaluation" not in codes(check_validity(None, made))
    judgments = root / "base--x" / "evals" / "alpaca_eval" / "judgments.jsonl"
    judgments.parent.mkdir(parents=True)
    judgments.touch()
    assert "base--x" in found(check_validity(None, made), "unfinished-evaluation").evidence[0]


# ---- chosen and noisy numbers ----


def test_the_best_of_many_arms_is_flattered_but_two_arms_and_a_base_are_not_many(root):
    made = {
        name: run(root, name, resolved=changed(train={"learning_rate": rate}))
        for name, rate in (("a", 1e-4), ("b", 2e-4), ("c", 4e-4))
    }
    base = run(root, "base--m--1", resolved={})
    assert (
        "a, b, c"
        in found(check_validity(None, arms(**made, base=base)), "best-of-many").evidence[0]
    )
    assert "best-of-many" not in codes(
        check_validity(None, arms(a=made["a"], b=made["b"], base=base))
    )


def test_a_checkpoint_chosen_by_its_validation_loss_is_noted(root):
    curves = tuple({"step": step, "eval_loss": 2.0} for step in range(5))
    one = run(root, "a", resolved=changed(train={"load_best_model_at_end": True}), curves=curves)
    assert (
        "best of 5 checkpoints" in found(check_validity(None, arms(a=one)), "best-checkpoint").title
    )


def test_a_missing_noise_floor_offers_the_a_a_run(root, rank_study):
    finding = found(
        check_validity(
            with_arms(rank_study, seeds=(42,)), arms(r8=run(root, "a"), r32=run(root, "b"))
        ),
        "noise-floor-missing",
    )
    assert "recipes study run" in finding.remedy and "seeds=[" in finding.remedy


def test_an_effect_inside_the_noise_floor_is_a_warning_and_one_outside_is_not(root):
    def seeds(name: str, *means: float) -> tuple[RunMeasurements, ...]:
        return tuple(
            run(
                root,
                f"{name}{n}",
                evaluated(root / f"{name}{n}", (mean, mean)),
                resolved=changed(train={"seed": n}),
            )
            for n, mean in enumerate(means)
        )

    near = check_validity(
        None, arms(a=seeds("a", 0.50, 0.60, 0.55), b=seeds("b", 0.54, 0.64, 0.59))
    )
    far = check_validity(None, arms(a=seeds("c", 0.50, 0.52, 0.51), b=seeds("d", 0.90, 0.92, 0.91)))
    finding = found(near, "inside-noise-floor")
    # Both arms have a standard deviation of 0.05, so 2.776 x 0.05 x sqrt(2/3) = 0.1133.
    assert finding.evidence == (
        "difference 0.04, noise floor 0.1133 (6 trainings of 2 recipes, 95%)",
    )
    assert "inside-noise-floor" not in codes(far)


# ---- losses and sources ----


def test_validation_losses_over_other_tokens_or_in_other_precision_are_not_compared(root):
    curves = ({"step": 1, "eval_loss": 2.0},)
    other = changed(
        data={"prompt_format": "alpaca"},
        quantization={"load_in_4bit": True},
        train={"bf16": False, "fp16": True},
    )
    findings = check_validity(
        None, arms(a=run(root, "a", curves=curves), b=run(root, "b", resolved=other, curves=curves))
    )
    tokens, precision = (
        found(findings, "loss-of-other-tokens"),
        found(findings, "loss-in-other-precision"),
    )
    assert tokens.metrics == ("validation_loss",) and tokens.severity == "error"
    assert "quantization: a none, b 4 bit" in precision.evidence and any(
        "train.fp16" in line for line in precision.evidence
    )
    same = check_validity(
        None, arms(a=run(root, "a", curves=curves), b=run(root, "b", curves=curves))
    )
    assert not codes(same) & {"loss-of-other-tokens", "loss-in-other-precision"}
    thinking = changed(data={"chat_template_kwargs": {"enable_thinking": False}})
    asked = check_validity(
        None,
        arms(a=run(root, "a", curves=curves), c=run(root, "c", resolved=thinking, curves=curves)),
    )
    assert "enable_thinking" in str(found(asked, "loss-of-other-tokens").evidence)


def test_findings_that_sort_alike_keep_the_order_in_which_they_were_found() -> None:
    found = [
        Finding("subset", "warning", "a subset", (f"run {n}",), "evaluate all") for n in range(12)
    ]
    assert errors_first([*found, *found]) == found


def judged(root: Path, arm: str, lengths: Sequence[int], values: Sequence[bool]) -> Any:
    """A run whose answers have these lengths, and their opponent's 500 characters."""
    told = tuple(
        dataclasses.replace(one, lengths=(length, 500))
        for one, length in zip(items(list(map(float, values))), lengths, strict=True)
    )
    return run(root, arm, evaluated(root / arm, items=told))


def test_answers_half_as_long_again_qualify_the_sentence_with_the_rates_at_equal_length(root):
    numbers = range(40)
    # the long one wins where it is much longer, the short one whatever its length
    long = judged(root, "long", [600 + 40 * n for n in numbers], [n > 6 for n in numbers])
    short = judged(root, "short", [480 + n for n in numbers], [n % 5 > 1 for n in numbers])
    finding = found(check_validity(None, arms(long=long, short=short)), "longer-answers")
    assert finding.severity == "warning" and finding.arms == ("long", "short")
    assert "long's answers are 2.8 times as long as short's; at equal length" in finding.title
    assert finding.title.endswith("against reference, which is the other way round")
    (row,) = compare_arms(arms(long=long, short=short), [finding]).rows
    assert row.sentence.endswith(f" {finding.title}.")
    best = judged(root, "best", [480 + n for n in numbers], [n > 1 for n in numbers])
    finding = found(check_validity(None, arms(long=long, best=best)), "longer-answers")
    assert "at equal length" in finding.title and "other way round" not in finding.title
    alike = judged(root, "alike", [700 + n for n in numbers], [n % 2 > 0 for n in numbers])
    assert "longer-answers" not in codes(check_validity(None, arms(alike=alike, short=short)))


def test_answers_that_end_in_loops_stop_the_sentence_as_cut_ones_do(root):
    def looping(share: float) -> Any:
        log = evaluated(
            root / "loops", answers={"name": "loops", "answers": {"n": 40, "loops": 40}}
        )
        faults = dataclasses.replace(log.answers.answers, loops=int(40 * share))
        log = dataclasses.replace(log, answers=dataclasses.replace(log.answers, answers=faults))
        return arms(loops=run(root, "loops", log), other=run(root, "other"))

    finding = found(check_validity(None, looping(0.3)), "degenerate-answers")
    assert finding.severity == "error" and "12 of 40 answers end in a phrase" in finding.evidence[0]
    assert found(check_validity(None, looping(0.15)), "degenerate-answers").severity == "warning"
    assert "degenerate-answers" not in codes(check_validity(None, looping(0.05)))
