"""A client for the chaos test, killed and started again: URL STORE NUMBER_OF_PAIRS. Exit code as of
`recipes eval`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from recipes_lib.core.errors import RecipesError
from recipes_lib.evals.judge import Item, ask
from recipes_lib.evals.judges import opened
from recipes_lib.evals.recipe import load_judge_file
from recipes_lib.evals.store import Store

url, path, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
file = load_judge_file(Path(__file__).resolve().parents[2] / "evals/judges/openai-compatible.yaml")
section = dataclasses.replace(
    file.judge,
    model="test-model",
    base_url=url,
    api_key_variable=None,
    concurrency=8,
    timeout_s=1,
    max_retries=4,
)
items = [
    Item(str(n), f"Question {n}?", f"First answer {n}.", f"Second, longer answer {n}.")
    for n in range(number)
]
try:
    with opened(dataclasses.replace(file, judge=section)) as judge:
        ask(items, judge, Store(path), judge.plan("relative")).check_complete()
except RecipesError as error:
    print(error, file=sys.stderr)
    sys.exit(int(error.exit_code))
