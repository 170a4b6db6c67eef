"""Foreign answers as rows of generations.jsonl: alpaca_eval's model_outputs.json and FastChat's
model_answer JSON lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes_lib.core.json_files import Row
from recipes_lib.foreign.files import Foreign
from recipes_lib.foreign.parts import Part, check_unique, one_model, question_id
from recipes_lib.judging.store import text_hash


def read_answers(file: Foreign, model: str | None) -> Part:
    """Return the answers of one model.

    Raises:
        DataError: an answer is no text, a question stands there twice, or several models answer and
            none was named.
    """
    fastchat = file.format == "fastchat-answers"
    name_of = "model_id" if fastchat else "generator"
    chosen = one_model(file, [str(row.get(name_of, "")) for _, row in file.rows], model)
    rows = [(line, row) for line, row in file.rows if str(row.get(name_of, "")) == chosen]
    answers = list(_fastchat(file, rows) if fastchat else _alpaca_eval(file, rows))
    answers = check_unique(file, [(row["question_id"], row["turn"]) for row in answers], answers)
    lacks = ["decoding settings, seed and prompt format of the answers are not in the file"]
    if not any(row["tokens"] for row in answers):
        lacks.append("whether an answer was cut at a token limit is not in the file")
    return Part(
        "mt_bench" if fastchat else "alpaca_eval",
        file,
        answers=answers,
        models=(chosen,) if chosen else (),
        rows_of=chosen if len(rows) < len(file.rows) else None,
        lacks=tuple(lacks),
    )


def answer_row(question: str, turn: int, text: str, model: str, *, instruction: str = "") -> Row:
    """Return a row of generations.jsonl; what a foreign file does not tell is null."""
    return {
        "key": text_hash(f"imported:{question}:{turn}:{model}:{text}"),
        "question_id": question,
        "turn": turn,
        "answer": text,
        "finish_reason": None,
        "tokens": None,
        "seed": None,
        "decoding": None,
        "model": f"imported:{model}",
        "prompt_format_hash": None,
        **({"instruction": instruction} if instruction else {}),
    }


def _fastchat(file: Foreign, rows: list[tuple[int | None, Row]]) -> Iterator[Row]:
    for line, row in rows:
        try:
            turns: Any = row["choices"][0]["turns"]
            assert isinstance(turns, list) and all(isinstance(text, str) for text in turns)
        except (LookupError, TypeError, AssertionError):
            raise file.error(
                "an answer needs choices[0].turns, a list of texts", line=line
            ) from None
        for turn, text in enumerate(turns, 1):
            yield answer_row(str(row["question_id"]), turn, text, str(row.get("model_id", "")))


def _alpaca_eval(file: Foreign, rows: list[tuple[int | None, Row]]) -> Iterator[Row]:
    for number, (line, row) in enumerate(rows, 1):
        instruction, output = row["instruction"], row["output"]
        if not isinstance(instruction, str) or not isinstance(output, str):
            raise file.error(f"row {number}: instruction and output must be texts", line=line)
        whole = f"{instruction}\n\n{row['input']}" if row.get("input") else instruction
        yield answer_row(
            question_id(whole), 1, output, str(row.get("generator", "")), instruction=whole
        )
