"""The numbers of a judged result under the keys that `recipes judge replay --json` uses, so that
one program reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def replay_numbers(result: Mapping[str, Any], suite: str) -> dict[str, Any]:
    """Return recorded, unparsed, contradictions, order and bounds of an AlpacaEval or MT-Bench
    result.

    `recorded` is in percent of the resolved pairs (n) for a comparison, and the mean grade (n
    graded turns) for MT-Bench.
    """
    card, pairs = result["audit"], result["pairs"]
    grade: Any = result.get("score") or result.get("mean_score")
    resolved = pairs["n"] - pairs["unresolved"] if pairs else 0
    recorded: dict[str, Any] = {
        name: 100 * pairs[name] / resolved if resolved else None for name in ("win", "loss", "tie")
    }
    alpaca = suite == "alpaca_eval"
    recorded |= {
        "n": resolved if alpaca else grade["n"],
        "mean_score": grade["estimate"] if grade else None,
        "mean_score_interval": [grade["low"], grade["high"]] if grade else None,
        "scale": "1..5" if grade else None,
    }
    if alpaca:
        shares = pairs["win_bounds"]
        bounds = {
            "of": "win percent",
            **{
                name: None if shares[name] is None else 100 * shares[name]
                for name in ("all_lost", "all_won")
            },
        }
    else:
        bounds = {
            "of": "mean score",
            "all_lost": grade["bounds"]["all_1"],
            "all_won": grade["bounds"]["all_5"],
        }
    missing = card["asked"] - card["statuses"].get("ok", 0)
    return {
        "recorded": recorded,
        "unparsed": {"count": missing, "share": missing / card["asked"] if card["asked"] else 0.0},
        "contradictions": card["contradictions"],
        "order": _order(pairs),
        "bounds": bounds,
    }


def _order(pairs: Mapping[str, Any] | None) -> dict[str, Any]:
    """In which orders the judge was asked, and how often the second order changed the winner."""
    if not pairs:
        return {"judged": "single-answer", "flips": None, "flip_rate": None, "interval": None}
    same = pairs["swap_consistency"]
    if same["estimate"] is None:
        return {"judged": "both", "flips": 0, "flip_rate": None, "interval": [None, None]}
    return {
        "judged": "both",
        "flips": round(same["n"] * (1 - same["estimate"])),
        "flip_rate": 1 - same["estimate"],
        "interval": [1 - same["high"], 1 - same["low"]],
    }
