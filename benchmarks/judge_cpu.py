"""Speed of judging: what everything but the model costs, how fast stored judgments are read, and
logits against generate.

    python benchmarks/judge_cpu.py [--repeats 5] [--threads 1] [--no-model] [--record]

1. Overhead: 1,000 judgments (500 pairs, both orders) by a judge that answers at once, stored with
   one synced line each. Promised: < 5 ms per judgment. Once without a tokenizer, and with part 3
   once with the quickstart judge's tokenizer and chat template.
2. Store: 100,000 stored judgments loaded and summarised. Promised: < 5 s.
3. Modes: SmolLM2-135M on 8 pairs in both orders, verdicts by next-token probabilities against 128
   written tokens. Promised: logits >= 2.5 x generate.

Everything is CPU seconds, except that a synced line also waits for the disk: part 1 gives that wait
beside them. `--record` writes results/judge_cpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import spread, write_result

from recipes_lib.engine import Completion
from recipes_lib.judging.judge import Item, JudgePlan, JudgeRequest, judge_items
from recipes_lib.judging.judge_file import load_judge_file
from recipes_lib.judging.outcomes import pair_samples, summarise
from recipes_lib.judging.store import JudgmentStore

PROJECT = Path(__file__).resolve().parents[1]
PAIRS, STORED, WRITTEN_TOKENS = 500, 100_000, 128


class InstantJudge:
    """Answers at once."""

    fingerprint = "instant"

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Yield a verdict for each request."""
        text = "Response A is fuller and clearer than Response B. [RESULT] A"
        for request in requests:
            yield Completion(key=request.key, text=text)


def items(number: int) -> list[Item]:
    """Pairs of answers of usual length."""
    answer = (
        "The river rises in the hills, turns east at the old mill and reaches the sea after some"
        " forty miles. "
    )
    return [
        Item(str(n), f"Describe river number {n}.", answer * 5 + str(n), answer * 3 + f"({n})")
        for n in range(number)
    ]


def overhead(scratch: Path) -> tuple[float, float]:
    """CPU seconds and seconds on the clock per judgment without a model."""
    file = load_judge_file(PROJECT / "evals/judges/quickstart.yaml")
    plan = JudgePlan(
        template=file.template("relative"),
        rubric=file.rubric(),
        count_tokens=lambda text: len(text) // 4,
        max_prompt_tokens=4000,
    )
    started, clock = time.process_time(), time.perf_counter()
    run = judge_items(
        items(PAIRS), InstantJudge(), JudgmentStore(scratch / f"{time.time_ns()}.jsonl"), plan
    )
    assert run.asked == 2 * PAIRS
    return (time.process_time() - started) / run.asked, (time.perf_counter() - clock) / run.asked


def overhead_with_tokenizer(scratch: Path) -> float:
    """CPU seconds per judgment with prompts counted, rendered and encoded as for the quickstart's
    judge, which is not asked.
    """
    from recipes_lib.generation.judges import judge_ids, opened

    with opened(load_judge_file(PROJECT / "evals/judges/quickstart.yaml")) as judge:
        tokenizer = judge.tokenizer  # type: ignore[attr-defined]

        class EncodingJudge(InstantJudge):
            def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
                for request in requests:
                    judge_ids(request.prompt, "chat", tokenizer)
                    yield from super().complete([request])

        started = time.process_time()
        run = judge_items(
            items(PAIRS),
            EncodingJudge(),
            JudgmentStore(scratch / f"{time.time_ns()}.jsonl"),
            judge.plan("relative"),
        )
        return (time.process_time() - started) / run.asked


def write_store(path: Path) -> None:
    """Write many judgments as the store would."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(STORED):
            row: dict[str, Any] = {
                "key": f"{number:064x}",
                "kind": "relative",
                "question_id": str(number // 2),
                "order": ("AB", "BA")[number % 2],
            }
            row |= {
                "status": "ok",
                "value": "AB"[(number * 7 // 3) % 2],
                "source": "judge",
                "judge": "x",
                "raw": "Feedback of some length. " * 12,
            }
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")


def read_store(path: Path) -> float:
    """CPU seconds to load and summarise them."""
    started = time.process_time()
    summary = summarise(pair_samples(JudgmentStore(path)))
    assert summary.n == STORED // 2
    return time.process_time() - started


def judge_with(mode: str) -> Callable[[Path], float]:
    """A function that returns CPU seconds per judgment of SmolLM2-135M in a mode, the loading of
    its weights left out.
    """
    from recipes_lib.generation.judges import opened

    file = load_judge_file(PROJECT / "evals/judges/quickstart.yaml")
    file = dataclasses.replace(
        file,
        judge=dataclasses.replace(
            file.judge, mode=mode, max_new_tokens=WRITTEN_TOKENS, max_reasks=0
        ),
    )

    def measure(scratch: Path) -> float:
        with opened(file) as judge:
            plan = judge.plan("relative")
            judge_items(
                items(1), judge, JudgmentStore(scratch / f"warm-{time.time_ns()}.jsonl"), plan
            )
            engine = judge._engine  # type: ignore[attr-defined]
            engine.stop_ids = [
                len(engine.tokenizer) - 1
            ]  # a token that greedy decoding does not choose: all texts have the full length
            pairs = items(9)[1:]
            started = time.process_time()
            run = judge_items(
                pairs, judge, JudgmentStore(scratch / f"{time.time_ns()}.jsonl"), plan
            )
            return (time.process_time() - started) / run.asked

    return measure


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-model", action="store_true", help="leave part 3 out")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}

    def show(name: str, values: Sequence[float], unit: str, scale: float = 1) -> None:
        found[f"{name}, {unit}"] = numbers = spread([value * scale for value in values])
        print(
            f"{name:<34} {numbers['median']:8.2f} {unit}  [{numbers['min']:.2f},"
            f" {numbers['max']:.2f}]  n = {numbers['n']}"
        )

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        times = [overhead(scratch) for _ in range(options.repeats)]
        show("judging without a model", [cpu for cpu, _ in times], "CPU ms per judgment", 1000)
        show("the same on the clock", [clock for _, clock in times], "ms per judgment", 1000)
        write_store(scratch / "many.jsonl")
        show(
            "100,000 judgments, load and sum up",
            [read_store(scratch / "many.jsonl") for _ in range(options.repeats)],
            "CPU s",
        )
        if not options.no_model:
            import torch

            torch.set_num_threads(options.threads)
            encoded = [overhead_with_tokenizer(scratch) for _ in range(options.repeats)]
            show("judging with its tokenizer", encoded, "CPU ms per judgment", 1000)
            logits, generate = judge_with("logits"), judge_with("generate")
            rounds = []
            for number in range(1, options.repeats + 1):
                rounds.append((logits(scratch), generate(scratch)))
                ratio = rounds[-1][1] / rounds[-1][0]
                print(
                    f"round {number}: {rounds[-1][0]:.3f} against {rounds[-1][1]:.3f} CPU s,"
                    f" {ratio:.2f}x",
                    flush=True,
                )
            show("logits", [first for first, _ in rounds], "CPU s per judgment")
            show(
                f"generate, {WRITTEN_TOKENS} tokens",
                [second for _, second in rounds],
                "CPU s per judgment",
            )
            show("generate / logits", [second / first for first, second in rounds], "x")
    if options.record:
        write_result("judge_cpu", found, options.threads, load)


if __name__ == "__main__":
    main()
