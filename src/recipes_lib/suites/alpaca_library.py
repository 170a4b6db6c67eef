"""The alpaca_eval library's own numbers on our verdicts: its metric on each order, and on the mean
of both.

The verdicts become annotations as the library's annotator would write them (a test holds the two
beside each other), and its metric counts them. Its annotator is left out: it has nothing to ask,
and takes minutes for tens of thousands of questions. Nothing is downloaded, except `df_gamed.csv`
where its length-controlled rate is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.eval_log import ORDERS, Sample

# hash of AlpacaEval's 805, in their order
_INSTRUCTIONS = "3e053e0aef9e138ba0c5b5a6e773a1a1750d96dfea70852f892a637a92c34179"
# preference by (order, verdict): output_1 is the opponent's, output_2 the candidate's; 2 says that
# the candidate wins.
_PREFERENCE = {("BA", "A"): 1.0, ("BA", "B"): 2.0, ("AB", "A"): 2.0, ("AB", "B"): 1.0}


def is_alpaca_eval(instructions: Sequence[str]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their order, by which the library looks
    their difficulty up.
    """
    return hash_of(list(instructions)) == _INSTRUCTIONS


def library_numbers(
    samples: Sequence[Sample],
    candidate: str,
    opponent: str,
    judge: str,
    *,
    length_controlled: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the library's metrics and its annotations.

    Args:
        samples: one comparison per question in order, with its texts.
        candidate: name of the evaluated model (generator_2).
        opponent: name of its opponent (generator_1).
        judge: hash of judge, prompt and decoding, part of the annotator's name.
        length_controlled: also compute the library's length-controlled rate; only for its 805
            questions in order.

    Returns:
        {win_rate, standard_error, n_total, n_wins, n_wins_base, n_draws, by_order, ...} in percent,
        and one annotation per question.

    Raises:
        EnvironmentFault: alpaca_eval is not installed, or its file for length control cannot be
            fetched.
    """
    annotations = [_annotation(one, candidate, opponent, f"judge-{judge[:12]}") for one in samples]
    with _quiet_library():
        numbers = _win_rate([row["preference"] for row in annotations])
        orders = {
            name: [row["preference_by_order"][name] for row in annotations]
            for name in ("reference_first", "model_first")
        }
        numbers["by_order"] = {
            name: _win_rate(preferences)["win_rate"] for name, preferences in orders.items()
        }
        if length_controlled:
            numbers |= _length_controlled(annotations)
    return numbers, annotations


def _annotation(one: Sample, candidate: str, opponent: str, annotator: str) -> dict[str, Any]:
    """One question as the library's annotator writes it: preference 1 for the opponent, 2 for the
    candidate, 1.5 for a tie.
    """
    said = dict(zip(ORDERS, one.verdicts, strict=True))
    tie = one.opponent == one.answer
    first, second = (
        1.5 if tie or said[order] == "tie" else _PREFERENCE.get((order, said[order]))
        for order in ("BA", "AB")
    )
    return {
        "dataset": one.category,
        "instruction": one.input,
        "output_1": one.opponent,
        "generator_1": opponent,
        "output_2": one.answer,
        "generator_2": candidate,
        "annotator": annotator,
        "preference": None if first is None or second is None else (first + second) / 2,
        "preference_by_order": {"reference_first": first, "model_first": second},
    }


def _win_rate(preferences: Sequence[float | None]) -> dict[str, Any]:
    """The library's metric; what it would say where there is no verdict, on which it fails."""
    from alpaca_eval import metrics

    if all(preference is None for preference in preferences):
        nothing = {
            "win_rate": None,
            "standard_error": None,
            "n_wins": 0,
            "n_wins_base": 0,
            "n_draws": 0,
        }
        return {**nothing, "n_total": 0, "discrete_win_rate": None}
    return _plain(metrics.get_winrate([{"preference": preference} for preference in preferences]))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers without numpy types; NaN becomes None."""
    plain = {
        key: value.item() if hasattr(value, "item") else value for key, value in values.items()
    }
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in plain.items()
    }


def _length_controlled(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The library's length-controlled win rate, which looks the difficulty of an instruction up by
    its place among the 805.
    """
    import pandas as pd
    from alpaca_eval import metrics

    try:
        found = metrics.get_length_controlled_winrate(
            pd.DataFrame(annotations), save_weights_dir=None
        )
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentFault(
            f"alpaca_eval's file for length control cannot be fetched: {reason}",
            "set metrics.length_controlled: own",
        ) from None
    return {key: _plain(found)[key] for key in ("length_controlled_winrate", "lc_standard_error")}


def own_length_controlled(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the win rate at equal length by a logistic model with the length term only: P(win) =
    s(a + b tanh(d)).

    d is the difference of the answers' lengths in characters, candidate minus opponent, over its
    standard deviation. The library's model has terms for the instruction's difficulty and two gamed
    baselines as well, so the two numbers differ.

    Args:
        samples: comparisons; those without an outcome are left out.

    Returns:
        {estimate, low, high (percent), n, b}; None where lengths or outcomes do not vary.

    Source: Dubois et al. (2024), "Length-Controlled AlpacaEval", without its instruction and
        regularisation terms.
    """
    known = [
        (one.lengths[0] - one.lengths[1], one.value) for one in samples if one.value is not None
    ]
    empty = {
        "estimate": None,
        "low": None,
        "high": None,
        "n": len(known),
        "length_term": None,
        "method": "own: length term only",
    }
    lengths, outcomes = np.array(known, dtype=float).reshape(-1, 2).T
    if len(known) < 10 or lengths.std() == 0 or outcomes.std() == 0:
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
    meat = design.T @ (
        design * ((outcomes - p) ** 2)[:, None]
    )  # robust: a tie is half an outcome, not a coin flip
    error = math.sqrt((inverse @ meat @ inverse)[0, 0])

    def percent(logit: float) -> float:
        return 100 / (1 + math.exp(-max(-30.0, min(30.0, logit))))

    a = float(weights[0])
    limits = {
        "estimate": percent(a),
        "low": percent(a - 1.96 * error),
        "high": percent(a + 1.96 * error),
    }
    return empty | limits | {"length_term": float(weights[1])}


def annotations_text(annotations: Sequence[Mapping[str, Any]]) -> str:
    """Return annotations.json's text as the library writes it: a list of records."""
    return json.dumps(list(annotations), indent=2, ensure_ascii=False, default=str) + "\n"


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Import and run the library without its chatter: it sets the root logger to INFO and draws
    progress bars.

    Raises:
        EnvironmentFault: it is not installed, or setuptools has become too new for it.
    """
    root = logging.getLogger()
    level = root.level
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(
                "ignore"
            )  # alpaca_eval imports pkg_resources, which says that it will go
            try:
                import alpaca_eval  # noqa: F401
            except ImportError as error:
                hint = (
                    "pip install 'setuptools<82'"
                    if "pkg_resources" in str(error)
                    else "pip install -e '.[eval]'"
                )
                raise EnvironmentFault(f"alpaca_eval cannot be imported: {error}", hint) from None
            root.setLevel(logging.ERROR)
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
