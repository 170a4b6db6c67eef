"""The published judge's own wording: taken from its authors' wheel, to the character, and never
from this repository.
"""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import pytest

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.project import cache_root
from recipes_lib.evals.prompts import (
    PROMETHEUS_PACKAGE,
    Rubric,
    Template,
    build_prompt,
    prometheus_is_here,
    published_template,
    template_of,
)
from recipes_lib.evals.recipe import load_judge_file

JUDGE = Path(__file__).resolve().parents[2] / "evals/judges/prometheus-7b-v2.yaml"
RUBRIC = Rubric("made-up", "Is it right?", tuple(f"Score {score}: ..." for score in range(1, 6)))
# The package's shape with other words.
POINTS = "1. One.\n2. Two.\n3. Three [RESULT] four\n4. Four.\n\n"
PAIR = "{instruction}\n\n###Response A:\n{response_A}\n\n###Response B:\n{response_B}\n\n"
CONSTANTS = {
    "REL_SYSTEM_PROMPT": "Compare.",
    "ABS_SYSTEM_PROMPT": "Grade.",
    "RELATIVE_PROMPT": (
        f"A task, a thing to evaluate, a reference answer, and more.\n{POINTS}{PAIR}###Reference"
        " Answer:\n{reference_answer}\n\n###Score Rubric:\n{rubric}\n\n###Feedback: "
    ),
    "RELATIVE_PROMPT_WO_REF": (
        f"A task, a thing to evaluate, and more.\n{POINTS}{PAIR}###Score"
        " Rubric:\n{rubric}\n\n###Feedback: "
    ),
    "ABSOLUTE_PROMPT": (
        "A task, a thing to evaluate, a reference answer worth a 5, and"
        f" more.\n{POINTS}{{response}}\n\n###Reference Answer (Score"
        " 5):\n{reference_answer}\n\n{rubric}\n\n###Feedback: "
    ),
    "ABSOLUTE_PROMPT_WO_REF": (
        "A task, a thing to evaluate, and"
        f" more.\n{POINTS}{{response}}\n\n{{rubric}}\n\n###Feedback: "
    ),
}


def assert_only_the_fence_is_added(
    template: Template, constants: dict[str, str], kind: str, reference: str | None
) -> None:
    answers = ["blue", "red"] if kind == "relative" else ["blue"]
    prompt = build_prompt(template, RUBRIC, "What is it?", answers, reference, code="c0de")
    theirs = constants[f"{kind.upper()}_PROMPT" + ("_WO_REF" if reference is None else "")]
    rubric = (
        RUBRIC.criterion
        if kind == "relative"
        else "\n".join([f"[{RUBRIC.criterion}]", *RUBRIC.scores])
    )
    fields = {
        "instruction": "What is it?",
        "response": "blue",
        "response_A": "blue",
        "response_B": "red",
        "rubric": rubric,
    }
    bare = "\n".join(line for line in prompt.user.split("\n") if "c0de" not in line)
    assert bare == theirs.format(**fields, reference_answer=reference)
    assert (
        prompt.system
        == constants["REL_SYSTEM_PROMPT" if kind == "relative" else "ABS_SYSTEM_PROMPT"]
    )
    assert "<<begin c0de>>\nblue\n<<end c0de>>" in prompt.user and "\n5. " in prompt.user


@pytest.mark.parametrize("reference", [None, "It is blue."])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_all_but_the_fence_is_the_packages_text(kind: str, reference: str | None) -> None:
    assert_only_the_fence_is_added(template_of(CONSTANTS, kind), CONSTANTS, kind, reference)


@pytest.mark.parametrize("reference", [None, "It is blue."])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_all_but_the_fence_is_the_real_packages_text(kind: str, reference: str | None) -> None:
    file = cache_root() / "packages" / "prometheus-eval-0.1.20" / "prompts.py"
    if not file.is_file():
        pytest.skip(
            "prometheus-eval's prompts are not on this machine (recipes prefetch"
            " evals/mt_bench.yaml fetches them)"
        )
    real = runpy.run_path(str(file))
    assert_only_the_fence_is_added(load_judge_file(JUDGE).template(kind), real, kind, reference)


def test_a_package_of_another_form_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="unknown form"):
        template_of({**CONSTANTS, "RELATIVE_PROMPT_WO_REF": "quite another text"}, "relative")


def test_without_the_package_and_a_network_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path))
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network\n")
    )
    judge = load_judge_file(JUDGE)
    assert judge.judge.relative_prompt == PROMETHEUS_PACKAGE
    with pytest.raises(
        EnvironmentFault, match=r"cannot fetch prometheus-eval==0\.1\.20: no network"
    ) as caught:
        judge.template("relative")
    assert (
        "recipes prefetch" in caught.value.hints[0]
        and "judge.relative_prompt" in caught.value.hints[0]
    )


def test_a_changed_file_of_the_package_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path))
    file = cache_root() / "packages" / "prometheus-eval-0.1.20" / "prompts.py"
    file.parent.mkdir(parents=True)
    file.write_text("RELATIVE_PROMPT = 'anything'\n")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network\n")
    )
    assert not prometheus_is_here()
    with pytest.raises(
        EnvironmentFault, match=r"cannot fetch prometheus-eval==0\.1\.20: no network"
    ):
        published_template("relative")
