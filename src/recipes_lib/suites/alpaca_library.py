"""The alpaca_eval library's own numbers on our verdicts: one pass per order, then its metric on the mean of both.

The library gets the verdicts as `fn_completions`: it pairs the outputs, drops duplicates, parses and counts as it always does, and
never draws an order of its own. Its cache is off: its key leaves prompt, judge and decoding out, and our judgments are stored already.
Nothing is written into site-packages. Nothing is downloaded, except `df_gamed.csv` where its length-controlled rate is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes_lib.atomic_files import write_text
from recipes_lib.errors import EnvironmentFault
from recipes_lib.generation.fingerprints import hash_of

_INSTRUCTIONS = "3e053e0aef9e138ba0c5b5a6e773a1a1750d96dfea70852f892a637a92c34179"  # hash of AlpacaEval's 805, in their order
_TEMPLATE = "{instruction}\n\x1e\n{output_1}\n\x1e\n{output_2}"
_CONFIG = """{name}:
  prompt_template: "{name}/prompt.txt"
  is_randomize_output_order: false
  is_shuffle: false
  batch_size: 1
"""
# preference by (order, verdict): output_1 is the opponent's, output_2 the candidate's; 2 says that the candidate wins.
_PREFERENCE = {("BA", "A"): 1.0, ("BA", "B"): 2.0, ("AB", "A"): 2.0, ("AB", "B"): 1.0}


@dataclass(frozen=True)
class Row:
    """One question with both outputs and the verdict per order: "A", "B", "tie", or None where there is none."""

    instruction: str
    dataset: str
    opponent: str
    candidate: str
    verdicts: Mapping[str, str | None]


def is_alpaca_eval(instructions: Sequence[str]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their order, by which the library looks their difficulty up."""
    return hash_of(list(instructions)) == _INSTRUCTIONS


def library_numbers(
    rows: Sequence[Row], candidate: str, opponent: str, judge: str, folder: Path, *, length_controlled: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the library's metrics and its annotations.

    Args:
        rows: questions in order.
        candidate: name of the evaluated model (generator_2).
        opponent: name of its opponent (generator_1).
        judge: hash of judge, prompt and decoding, part of the cache path.
        folder: where the annotator config and the cache go.
        length_controlled: also compute the library's length-controlled rate; only for its 805 questions in order.

    Returns:
        {win_rate, standard_error, n_total, n_wins, n_wins_base, n_draws, by_order, ...} in percent, and one annotation per question.

    Raises:
        EnvironmentFault: alpaca_eval is not installed, or its file for length control cannot be fetched.
    """
    with _quiet_library():
        from alpaca_eval import metrics

        passes = {order: _one_pass(rows, order, candidate, opponent, judge, folder) for order in ("BA", "AB")}
        annotations = []
        for first, second in zip(passes["BA"], passes["AB"], strict=True):
            preferences = [first["preference"], second["preference"]]
            known = all(value is not None and not math.isnan(value) for value in preferences)
            row = {key: value for key, value in first.items() if key not in ("preference", "preference_raw_completion")}
            row["preference"] = sum(preferences) / 2 if known else None
            row["preference_by_order"] = {"reference_first": preferences[0], "model_first": preferences[1]}
            annotations.append(row)
        numbers = _plain(metrics.get_winrate(annotations)) if any(row["preference"] is not None for row in annotations) else _nothing()
        numbers["by_order"] = {
            name: _plain(metrics.get_winrate(done))["win_rate"] if any(row["preference"] is not None for row in done) else None
            for name, done in (("reference_first", passes["BA"]), ("model_first", passes["AB"]))
        }
        if length_controlled:
            numbers |= _length_controlled(annotations)
    return numbers, annotations


def _one_pass(rows: Sequence[Row], order: str, candidate: str, opponent: str, judge: str, folder: Path) -> list[dict[str, Any]]:
    """Let the library annotate all pairs in one order."""
    import pandas as pd
    from alpaca_eval import evaluate, utils

    name = f"judge-{judge[:12]}-{'reference' if order == 'BA' else 'model'}-first"
    config = folder / name
    write_text(config / "configs.yaml", _CONFIG.format(name=name))
    write_text(config / "prompt.txt", _TEMPLATE)
    frame = pd.DataFrame([{"instruction": row.instruction, "output_1": row.opponent, "output_2": row.candidate} for row in rows])
    prompts = utils.make_prompts(frame, template=_TEMPLATE)[0]
    verdicts = {prompt: row.verdicts.get(order) for prompt, row in zip(prompts, rows, strict=True)}

    def complete(prompts: Sequence[str], **_: Any) -> dict[str, Any]:
        return {"completions": [verdicts.get(prompt) or "" for prompt in prompts]}

    def parse(completion: str) -> list[float | None]:
        return [1.5 if completion == "tie" else _PREFERENCE.get((order, completion))]

    _, annotations = evaluate(
        model_outputs=[_output(row, row.candidate, candidate) for row in rows],
        reference_outputs=[_output(row, row.opponent, opponent) for row in rows],
        annotators_config=str(config.resolve()),
        fn_completions=complete,
        fn_completion_parser=parse,
        caching_path=None,
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
        fn_metric=lambda _: {"win_rate": 0.0, "standard_error": 0.0},  # counted later: its own call fails without any verdict
        sort_by="win_rate",
        annotation_kwargs={"is_ordered": True, "chunksize": None},
    )
    return [_plain(annotation) for annotation in annotations]


def _output(row: Row, text: str, generator: str) -> dict[str, Any]:
    return {"dataset": row.dataset, "instruction": row.instruction, "output": text, "generator": generator}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers without numpy types; NaN becomes None."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}


def _nothing() -> dict[str, Any]:
    """What the library says where it has no verdict: it would fail on that."""
    return {"win_rate": None, "standard_error": None, "n_wins": 0, "n_wins_base": 0, "n_draws": 0, "n_total": 0, "discrete_win_rate": None}


def _length_controlled(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The library's length-controlled win rate, which looks the difficulty of an instruction up by its place among the 805."""
    import pandas as pd
    from alpaca_eval import metrics

    try:
        found = metrics.get_length_controlled_winrate(pd.DataFrame(annotations), save_weights_dir=None)
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentFault(
            f"alpaca_eval's file for length control cannot be fetched: {reason}", "set metrics.length_controlled: own"
        ) from None
    return {key: _plain(found)[key] for key in ("length_controlled_winrate", "lc_standard_error")}


def own_length_controlled(rows: Sequence[tuple[int, int, float]]) -> dict[str, Any]:
    """Return the win rate at equal length by a logistic model with the length term only: P(win) = s(a + b tanh(d)).

    d is the difference of the answers' lengths in characters, candidate minus opponent, over its standard deviation. The library's model
    has terms for the instruction's difficulty and two gamed baselines as well, so the two numbers differ.

    Args:
        rows: per resolved question the candidate's length, the opponent's, and the outcome (1, 0.5, 0).

    Returns:
        {estimate, low, high (percent), n, b}; None where lengths or outcomes do not vary.

    Source: Dubois et al. (2024), "Length-Controlled AlpacaEval", without its instruction and regularisation terms.
    """
    empty = {"estimate": None, "low": None, "high": None, "n": len(rows), "length_term": None, "method": "own: length term only"}
    lengths = np.array([candidate - opponent for candidate, opponent, _ in rows], dtype=float)
    outcomes = np.array([outcome for *_, outcome in rows], dtype=float)
    if len(rows) < 10 or lengths.std() == 0 or outcomes.std() == 0:
        return empty
    design = np.stack([np.ones_like(lengths), np.tanh(lengths / lengths.std())], axis=1)
    ridge = np.diag([0.0, 1e-2])  # keeps the length term finite where length decides everything
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + ridge
        step = np.linalg.solve(hessian, design.T @ (outcomes - p) - ridge @ weights)
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
    inverse = np.linalg.inv(design.T @ (design * (p * (1 - p))[:, None]) + ridge)
    meat = design.T @ (design * ((outcomes - p) ** 2)[:, None])  # robust: a tie is half an outcome, not a coin flip
    error = math.sqrt((inverse @ meat @ inverse)[0, 0])

    def percent(logit: float) -> float:
        return 100 / (1 + math.exp(-max(-30.0, min(30.0, logit))))

    a = float(weights[0])
    limits = {"estimate": percent(a), "low": percent(a - 1.96 * error), "high": percent(a + 1.96 * error)}
    return empty | limits | {"length_term": float(weights[1])}


def annotations_text(annotations: Sequence[Mapping[str, Any]]) -> str:
    """Return annotations.json's text as the library writes it: a list of records."""
    return json.dumps(list(annotations), indent=2, ensure_ascii=False, default=str) + "\n"


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Import and run the library without its chatter: it sets the root logger to INFO and draws progress bars.

    Raises:
        EnvironmentFault: it is not installed, or setuptools has become too new for it.
    """
    root = logging.getLogger()
    level = root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # alpaca_eval imports pkg_resources, which says that it will go
            try:
                import alpaca_eval  # noqa: F401
            except ImportError as error:
                hint = "pip install 'setuptools<82'" if "pkg_resources" in str(error) else "pip install -e '.[eval]'"
                raise EnvironmentFault(f"alpaca_eval cannot be imported: {error}", hint) from None
            root.setLevel(logging.ERROR)
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
