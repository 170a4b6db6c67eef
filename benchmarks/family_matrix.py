"""What goes through for which family: the verbs of a run, one after the other, on a tiny random
model of each architecture of docs/models.md, with LoRA, QLoRA and full fine-tuning.

    python -m benchmarks.family_matrix [--families llama qwen3] [--methods lora] [--csv FILE]

One process. A row of the table is a family and a method, written when it is done; rows that the
file has already are left as they are. A cell is pass, or the exit code and the first line of what
was said. That a resumed run has the bytes of one in one piece, and that what is given away answers
in transformers alone, is tested by tests/training/test_families.py, which shares these models.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

from tests.conftest import PROJECT, TINY_RECIPE, build_tiny_model
from tests.families import (
    FAMILIES,
    METHODS,
    asked_to_stop,
    build_family,
    write_family_recipe,
    write_own_evals,
)

from recipes_lib.cli import main as recipes
from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main as train
from recipes_lib.training.stopping import StopCallback

JUDGED = {
    "alpaca_eval": "questions: {evals}/quickstart/alpaca_eval/questions.json",
    "mt_bench": "questions: {evals}/quickstart/mt_bench/question.jsonl, references:"
    " {evals}/quickstart/mt_bench/reference_answer.jsonl",
}
JUDGE = """\
judge:
  model: {judge}
  dtype: float32
  mode: logits
  max_context_tokens: 4096
  max_new_tokens: 8
  relative_prompt: {evals}/prompts/prometheus-relative.txt
  absolute_prompt: {evals}/prompts/prometheus-absolute.txt
  rubric: {evals}/rubrics/helpfulness.txt
  reference_rubric: {evals}/rubrics/correctness.txt
"""


def write_judged_evals(folder: Path, model: Path) -> list[Path]:
    """Write AlpacaEval and MT-Bench of two questions each, judged by a model of a longer context
    than it was made with.
    """
    judge = Path(shutil.copytree(model, folder / "judge"))
    config = json.loads((judge / "config.json").read_text(encoding="utf-8"))
    (judge / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    evals = PROJECT / "evals"
    (folder / "judge.yaml").write_text(JUDGE.format(judge=judge, evals=evals))
    for name, questions in JUDGED.items():
        (folder / f"{name}.yaml").write_text(
            f"suite: {{name: {name}}}\ndata: {{{questions.format(evals=evals)}, max_questions: 2}}"
            "\ngeneration: {max_new_tokens: 6}\njudge: {file: judge.yaml}\n"
        )
    return [folder / f"{name}.yaml" for name in JUDGED]


def said(words: list[object], folder: Path, expected: int = ExitCode.DONE) -> str:
    """Run a verb; return pass, or its exit code and the first line that it said."""
    texts, out, err = [str(word) for word in words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train(texts[1:]) if texts[0] == "train" else recipes(texts)
    if code == expected:
        return "pass"
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    print(f"recipes {' '.join(texts)}: exit {code}", *lines[-12:], sep="\n  ", flush=True)
    line = next((line for line in lines if line.startswith("error") or folder.name in line), "")
    return f"exit {int(code)}: {(line or ' '.join(lines[:1])).replace(f'{folder}/', '')}"


def row_of(family: str, method: str, model: Path, evals: list[Path]) -> dict[str, str]:
    """Take a family's tiny model the whole way; return what each verb said."""
    folder = Path(tempfile.mkdtemp(dir=model.parent))
    os.environ["RECIPES_RUNS_ROOT"] = str(folder / "runs")
    tiny = TINY_RECIPE.format(
        model=build_family(family, folder / family, model),
        rows=PROJECT / "recipes/quickstart/data/instructions.jsonl",
    )
    recipe = write_family_recipe(folder / f"{family}.yaml", tiny, METHODS[method])
    stop, merged = asked_to_stop(StopCallback.on_step_end), ["--merged"] * (method != "full")
    row = {"family": family, "method": method}
    row["check"] = said(["check", "--full", recipe], folder)
    row["plan"] = said(["plan", recipe], folder)
    with mock.patch.object(StopCallback, "on_step_end", stop):
        row["train"] = said(["train", recipe, "run.name=run"], folder, ExitCode.PREEMPTED)
    row["resume"] = said(["train", recipe, "run.name=run"], folder)
    row["verify"] = said(["verify", "run"], folder)
    row["merge"] = said(["merge", "run"], folder) if merged else "nothing to merge"
    row["chat"] = said(["chat", "run", "--prompt", "What is gold?", "--max-new-tokens", 5], folder)
    for file in evals:
        row[f"eval {file.stem}"] = said(["eval", file, "run"], folder)
    row["export"] = said(["export", "run", *merged, "--to", folder / "given"], folder)
    shutil.rmtree(folder)
    return row


def main(words: list[str] | None = None) -> None:
    """Run what the table does not have yet, and count its cells."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--csv", type=Path, default=PROJECT / "benchmarks/results/family_matrix.csv"
    )
    options = parser.parse_args(words)
    rows = []
    if options.csv.exists():
        with options.csv.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    done = {(row["family"], row["method"]) for row in rows}
    with (
        tempfile.TemporaryDirectory() as place,
        # half of the time, and the same for every architecture
        mock.patch("recipes_lib.training.finish.draw_figures"),
        mock.patch.dict(os.environ, RECIPES_CACHE=f"{place}/cache", HF_HUB_OFFLINE="1"),
    ):
        model = Path(place) / "tiny"
        build_tiny_model(model)
        evals = [*write_own_evals(Path(place)), *write_judged_evals(Path(place), model)]
        for method in options.methods:
            for family in options.families:
                if (family, method) in done:
                    continue
                rows.append(row_of(family, method, model, evals))
                print(family, method, Counter(list(rows[-1].values())[2:]), flush=True)
                rows.sort(key=lambda row: list(FAMILIES).index(row["family"]))
                with options.csv.open("w", encoding="utf-8", newline="") as file:
                    table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    table.writeheader()
                    table.writerows(rows)
    cells = Counter(value.partition(":")[0] for row in rows for value in list(row.values())[2:])
    print(f"{len(rows)} rows:", ", ".join(f"{count} {what}" for what, count in cells.items()))


if __name__ == "__main__":
    main()
