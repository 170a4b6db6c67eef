"""Results as text tables for the terminal: every number with its n and interval, banners on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes_lib.terminal import say


def say_results(results: Sequence[dict[str, Any]]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(result["eval"] for result in results):
        mine = [result for result in results if result["eval"] == name]
        say(tables(mine))
        for result in mine:
            if command := result.get("lm_eval_command"):
                say(f"$ {command}")
        say()
    for result in results:
        say(f"kept in {result['file']}")


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of results of one suite."""
    lines = [f"{results[0]['eval']}: {_what(results[0])}", ""]
    said: dict[str, list[str]] = {}
    for result in results:
        for banner in result["banners"]:
            said.setdefault(banner, []).append(result["target"])
    for banner, targets in said.items():
        lines.append(f"! {banner}" if len(targets) == len(results) else f"! {', '.join(targets)}: {banner}")
    lines += [""] if said else []
    lines += {"alpaca_eval": _alpaca, "mt_bench": _mt_bench, "lm_eval": _lm_eval}[results[0]["suite"]](results)
    return "\n".join(lines)


def _what(result: dict[str, Any]) -> str:
    if result["suite"] == "lm_eval":
        return "lm-eval"
    judge = result["judge"]
    return f"{result['n']} questions, judge {judge['name']} ({judge['model']}, {judge['mode']})"


def _alpaca(results: Sequence[dict[str, Any]]) -> list[str]:
    head = [
        "model",
        "against",
        "n",
        "win",
        "loss",
        "tie",
        "unresolved",
        "win rate, tie = half [95%]",
        "all lost .. won",
        "at equal length",
        "mean 1-5",
    ]
    rows = []
    for result in results:
        pairs = result["pairs"]
        bounds = pairs["score_bounds"]
        equal = result["length_controlled"]
        counts = [str(pairs[name]) for name in ("win", "loss", "tie", "unresolved")]
        rows.append(
            [
                *(result["target"], result["against"], str(pairs["n"]), *counts, percent_interval(pairs["score"])),
                f"{percent(bounds['all_lost']['estimate'])} .. {percent(bounds['all_won']['estimate'])}",
                "n/a" if not equal or equal["estimate"] is None else f"{equal['estimate']:.1f}% [{equal['low']:.1f}, {equal['high']:.1f}]",
                "-" if not result["mean_score"] else interval(result["mean_score"]),
            ]
        )
    lines = grid(head, rows)
    lines += ["", "judged in both orders; a pair whose orders disagree is a tie"]
    lines += [_judge_line(result) for result in results]
    lines += [_answer_line(result) for result in results]
    return lines


def _mt_bench(results: Sequence[dict[str, Any]]) -> list[str]:
    turns = list(results[0]["by_turn"])
    head = ["model", "n", "turns", "no grade", "mean 1-5 [95%]", "all 1 .. 5", *(f"turn {turn}" for turn in turns), "win rate"]
    rows = []
    for result in results:
        score = result["score"]
        pairs = result["pairs"]
        rows.append(
            [
                *(result["target"], str(result["n"]), str(score["turns"]), str(score["without_grade"]), interval(score)),
                f"{_number(score['bounds']['all_1'])} .. {_number(score['bounds']['all_5'])}",
                *(_number(result["by_turn"][turn]["estimate"]) for turn in turns),
                "-" if not pairs else f"{percent_interval(pairs['score'])} against {result['against']}",
            ]
        )
    lines = grid(head, rows)
    lines += [
        "",
        *grid(
            ["category", *(result["target"] for result in results)],
            [[name, *(_cell(result, name) for result in results)] for name in results[0]["by_category"]],
        ),
    ]
    lines += ["", "grades are 1-5, as the judge gives them"]
    lines += [_judge_line(result) for result in results]
    lines += [_answer_line(result) for result in results]
    return lines


def _cell(result: dict[str, Any], category: str) -> str:
    turns = result["by_category"][category]
    return " / ".join(_number(turns[turn]["estimate"]) for turn in turns if turn != "all") + f"  (n {turns['all']['turns']})"


def _lm_eval(results: Sequence[dict[str, Any]]) -> list[str]:
    head = ["task", "metric", "few-shot", "n", *(result["target"] for result in results)]
    keys = list(dict.fromkeys((row["task"], row["metric"], row["filter"]) for result in results for row in result["tasks"]))
    found = [{(row["task"], row["metric"], row["filter"]): row for row in result["tasks"]} for result in results]
    rows = []
    for key in keys:
        cells = [table.get(key) for table in found]
        first = next(cell for cell in cells if cell)
        name = key[1] if key[2] == "none" else f"{key[1]} ({key[2]})"
        shots = "-" if first["num_fewshot"] is None else str(first["num_fewshot"])
        rows.append([key[0], name, shots, str(first["n"]), *("-" if cell is None else _score(cell) for cell in cells)])
    return grid(head, rows)


def _score(row: dict[str, Any]) -> str:
    limits = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.4f}{limits}"


def _judge_line(result: dict[str, Any]) -> str:
    card = result["audit"]
    consistent = (
        ""
        if not card["swap_consistency"]["n"]
        else f"orders agree {percent_interval(card['swap_consistency'])}, Response A wins {percent_interval(card['first_position'])}, "
    )
    checks = [check["result"] for check in card["checks"]]
    mass = "" if card["mean_mass"] is None else f"verdict mass {card['mean_mass']:.3f}, "
    states = f"{checks.count('pass')} pass, {checks.count('fail')} fail, {checks.count('not measured')} not measured"
    return f"judge on {result['target']}: {consistent}{mass}audit {states}"


def _answer_line(result: dict[str, Any]) -> str:
    answers, speed = result["answers"]["answers"], result["answers"]["generated_now"]
    same = answers["identical"]["count"]
    made = "" if not speed or not speed["seconds"] else f", {speed['new_tokens'] / speed['seconds']:.0f} tokens/s"
    return f"answers of {result['target']}: {answers['n']}, {answers['empty']} empty, {answers['cut']} cut, {same} identical{made}"


def percent(value: float | None) -> str:
    """Return a share in percent."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


def percent_interval(value: dict[str, Any]) -> str:
    """Return a share with its interval in percent, its limits cut to 0 and 100."""
    if value["estimate"] is None:
        return "n/a"
    limits = "" if value["low"] is None else f" [{100 * max(value['low'], 0):.1f}, {100 * min(value['high'], 1):.1f}]"
    return f"{percent(value['estimate'])}{limits}"


def interval(value: dict[str, Any]) -> str:
    """Return a number with its interval."""
    limits = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{_number(value['estimate'])}{limits}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
