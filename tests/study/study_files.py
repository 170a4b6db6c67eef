"""A study small enough for a test: the tiny Llama at two ranks, judged by itself."""

import json
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
model: {{name_or_path: {model}, dtype: float32}}
data: {{source: {rows}, prompt_format: chat, split: {{validation: 0.1}}, max_examples: 60}}
lora: {{r: {rank}, lora_alpha: {alpha}, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}}
train:
  {{bf16: false, learning_rate: 1.0e-2, max_length: 192, max_steps: {steps}, seed: 42,
  per_device_train_batch_size: 4, per_device_eval_batch_size: 8, optim: adamw_torch,
  logging_steps: 1, eval_strategy: steps, eval_steps: {steps}, save_steps: 2}}
run: {{global_batch_size: 4}}
launch: {{accelerate: cpu}}
"""

STUDY = """\
# yaml-language-server: $schema=study.schema.json
question: Does rank 8 beat rank 4?
factors:
  rank: [lora.r, lora.lora_alpha]
arms:
  r4: r4.yaml
  r8: r8.yaml
seeds: [42]
evals: [alpaca_eval.yaml, mt_bench.yaml, lm_eval.yaml]
"""

JUDGE = """\
judge:
  {{model: {model}, mode: logits, dtype: float32, max_context_tokens: 1024, weak: random weights,
  relative_prompt: {project}/evals/prompts/prometheus-relative.txt,
  absolute_prompt: {project}/evals/prompts/prometheus-absolute.txt,
  rubric: {project}/evals/rubrics/helpfulness.txt,
  reference_rubric: {project}/evals/rubrics/correctness.txt}}
"""

EVALS = {
    "alpaca_eval": """\
extends: judge.yaml
suite: {{name: alpaca_eval}}
data: {{questions: questions.json}}
generation: {{max_new_tokens: 12}}
metrics: {{probe_pairs: 1}}
""",
    "mt_bench": """\
extends: judge.yaml
suite: {{name: mt_bench}}
data: {{questions: question.jsonl}}
generation: {{max_new_tokens: 12}}
""",
    "lm_eval": """\
suite: {{name: lm_eval, tasks: [quickstart_multiple_choice], batch_size: 16, limit: 12}}
data: {{include_path: {project}/evals/quickstart/lm_eval, folder: {project}}}
""",
}


def _lines(file: str, most: int) -> str:
    return "".join((PROJECT / file).read_text().splitlines(keepends=True)[:most])


def write_tiny_study(folder: Path, model: Path, steps: int = 4, questions: int = 8) -> Path:
    """Write the study and everything it names; return the study file, `tiny.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text(_lines("recipes/quickstart/data/instructions.jsonl", 80))
    for rank in (4, 8):
        text = RECIPE.format(model=model, rows=rows.name, rank=rank, alpha=2 * rank, steps=steps)
        (folder / f"r{rank}.yaml").write_text(text)
    (folder / "judge.yaml").write_text(JUDGE.format(model=model, project=PROJECT))
    for name, text in EVALS.items():
        schema = "# yaml-language-server: $schema=eval.schema.json\n"
        (folder / f"{name}.yaml").write_text(schema + text.format(project=PROJECT))
    asked = json.loads((PROJECT / "evals/quickstart/alpaca_eval/questions.json").read_text())
    (folder / "questions.json").write_text(json.dumps(asked[:questions]))
    turns = _lines("evals/quickstart/mt_bench/question.jsonl", 4)
    (folder / "question.jsonl").write_text(turns)
    study = folder / "tiny.yaml"
    study.write_text(STUDY)
    return study


TOO_LONG = (
    "My neighbour's apple tree hangs over our fence and drops its fruit on the path every autumn;"
    " may I pick what hangs on my side, and what should I say to him first?"
)


def leak_questions(folder: Path) -> None:
    """Put five questions of the study's AlpacaEval into lines 3 to 7 of its rows; all train."""
    questions = json.loads((folder / "questions.json").read_text())
    questions[0]["instruction"] = TOO_LONG
    (folder / "questions.json").write_text(json.dumps(questions))
    rows = (folder / "rows.jsonl").read_text().splitlines()
    for line, question in enumerate(questions[:5], 2):
        row = {"instruction": question["instruction"], "context": "", "response": "So."}
        rows[line] = json.dumps(row | {"category": "leaked"})
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    every = "data.split.method=none, data.max_examples=null, train.eval_strategy='no'"
    with (folder / "tiny.yaml").open("a") as study:
        study.write(f"overrides: [{every}]\n")
