"""The audit of supervision.json and the gate before step 1: what was read, what was cut, and what
the loss sees.

Everything that would otherwise happen silently is counted here and its rows are named by id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipes_lib.data.examples import BadRows, SettingError, listed
from recipes_lib.data.injections import Found, Injections
from recipes_lib.data.rows import Rows
from recipes_lib.data.splits import SPLITS, TRAIN, VALIDATION, Splits
from recipes_lib.data.supervision import Supervision, decoded_spans

NUM_REASONS = 10
PERCENTILES = (5, 50, 95)


def audit_rows(
    rows: Rows,
    tokens: Mapping[str, np.ndarray],
    splits: Splits,
    settings: Supervision,
    tokenizer: Any,
    *,
    filtered: Mapping[str, int],
    skipped: BadRows,
    injections: Injections,
    shown: Sequence[tuple[int, Any, Any]],
) -> dict[str, Any]:
    """Count and name; the result is plain JSON.

    Args:
        rows: those used, before rows without supervised tokens are dropped.
        tokens: `Tokens.numbers` of these rows.
        filtered: name of a filter -> number of rows it left out.
        shown: position, token ids and labels of the rows to show.
    """
    cut, bare = tokens["lengths"] < tokens["tokens_before"], tokens["supervised"] == 0
    trained = int((tokens["supervised"][splits.rows[TRAIN]] > 0).sum())
    return {
        "prompt_format": settings.section.prompt_format,
        "loss_on": "whole text" if settings.whole else "completion",
        "max_length": settings.max_length,
        "truncation_mode": "keep_end" if settings.keep_end else "keep_start",
        "eos_token": settings.eos_token,
        "rows": {
            "read": rows.num_read,
            "bad": len(skipped.found),
            "filtered": dict(filtered),
            "used": len(rows),
            **{name: len(splits.rows[name]) for name in SPLITS},
            "trained": trained,
        },
        "bad_rows": skipped.record(),
        "unused_columns": rows.unused_columns(),
        "unread_files": rows.unread,
        "tokens": _distribution(tokens["lengths"]),
        "supervised_tokens": _distribution(tokens["supervised"]),
        "prompt_tokens": _distribution(tokens["prompt_tokens"]),
        "completion_tokens": _distribution(tokens["tokens_before"] - tokens["prompt_tokens"]),
        "tokens_per_split": {name: _totals(tokens, splits.rows[name]) for name in SPLITS},
        "truncated": (
            _named(rows, splits, cut) | {"lost_end_token": int((cut & (tokens["ends"] == 0)).sum())}
        ),
        "no_supervised_tokens": _named(rows, splits, bare),
        "changed_by_template": _named(rows, splits, tokens["changed"] == 1),
        "empty_completions": _empty(rows, splits),
        "special_token_injections": (
            {"treated_as": _treatment(settings)} | _injection(injections.special_tokens)
        ),
        "template_markers": _injection(injections.markers),
        "duplicates": {
            "exact_groups": splits.exact_groups,
            "exact_rows": sum(map(len, splits.exact_groups)) - len(splits.exact_groups),
            "across_splits": splits.across,
            "moved_to_train": splits.moved,
            "near_groups": splits.near_groups,
        },
        "boundary_merges": int(tokens["boundary_merges"].sum()),
        "end_token_supervised": {
            "untruncated_rows": int((~cut).sum()),
            "of_which_supervised": int((~cut & (tokens["ends"] == 1)).sum()),
        },
        "end_tokens": _end_tokens(tokens["end_tokens"], tokenizer),
        "examples": [_shown(rows, tokenizer, *row) for row in shown],
    }


def check_audit(
    audit: Mapping[str, Any], max_unsupervised_fraction: float, *, evaluates: bool = False
) -> None:
    """The gate: refuse data that cannot teach what the recipe asks for.

    Args:
        evaluates: whether the training computes a validation loss.

    Raises:
        SettingError: no or too few rows with supervised tokens, only empty rows, EOS without loss,
            or nothing to validate on. It carries the `audit`.
    """
    try:
        _gate(audit, max_unsupervised_fraction)
        if evaluates and not audit["tokens_per_split"][VALIDATION]["supervised"]:
            what = (
                "train.eval_strategy asks for a validation loss, but none of"
                f" {audit['rows']['used']} rows is held out"
            )
            raise SettingError(
                "data.split.validation",
                what,
                "add rows, raise data.split.validation, or set train.eval_strategy: 'no'",
            )
    except SettingError as error:
        error.audit = audit
        raise


def _gate(audit: Mapping[str, Any], max_unsupervised_fraction: float) -> None:
    used, bare = audit["rows"]["used"], audit["no_supervised_tokens"]
    limit, p95 = audit["max_length"], audit["prompt_tokens"]["p95"]
    if audit["empty_completions"]["count"] == used:
        raise SettingError(
            "data.source",
            f"{used}/{used} rows have an empty completion: there is nothing to learn",
            "check data.columns",
        )
    if (
        bare["count"] > max_unsupervised_fraction * used
        or bare["count"] == used
        or not audit["rows"]["trained"]
    ):
        hints = [f"raise train.max_length above {p95}"]
        if bare["count"] < used:
            accepted = (
                f"at most {max_unsupervised_fraction:.0%} are accepted"
                " (data.max_unsupervised_fraction)"
            )
            drop = f"{hints[0]}, or leave long rows out with data.filters.max_tokens: {limit}"
            hints = [f"{accepted}; rows {listed(bare['ids'], 5)}", drop]
        what = (
            f"{bare['count']}/{used} rows have no supervised token at max_length={limit}; p95"
            f" prompt is {p95}"
        )
        raise SettingError("train.max_length", what, *hints)
    end = audit["end_token_supervised"]
    if end["of_which_supervised"] < end["untruncated_rows"]:
        missing = end["untruncated_rows"] - end["of_which_supervised"]
        what = (
            f"{missing}/{used} rows do not end with a supervised end token: the model would not"
            " learn to stop"
        )
        hint = (
            "the template must end an assistant turn with a special token, inside {% generation %}"
            " if it has that"
        )
        raise SettingError("data.chat_template", what, hint)


def warnings_of(audit: Mapping[str, Any]) -> list[str]:
    """What the user should know before training, one line each; empty when all is well."""
    truncated, bare, empty = (
        audit["truncated"],
        audit["no_supervised_tokens"],
        audit["empty_completions"],
    )
    lines = []
    if bad := audit["bad_rows"]["count"]:
        lines.append(
            f"{bad} of {audit['rows']['read']} rows cannot be used and are left out"
            " (data.on_bad_row: skip):"
        )
        lines += [
            f"  {count} x {reason}"
            for reason, count in list(audit["bad_rows"]["reasons"].items())[:NUM_REASONS]
        ]
    for file, columns in audit["unused_columns"].items():
        lines.append(f"columns that are not used: {listed(columns)} (in {file})")
    for folder, files in audit["unread_files"].items():
        lines.append(f"files that are not read: {listed(files)} (in {folder})")
    if truncated["count"]:
        cut = (
            f"{truncated['count']} rows ({truncated['fraction']:.1%}) are cut at"
            f" max_length={audit['max_length']}"
        )
        lines.append(f"{cut}, {truncated['lost_end_token']} lose their end token")
    if bare["count"]:
        lines.append(
            f"{bare['count']} rows have no supervised token and are left out:"
            f" {listed(bare['ids'], 5)}"
        )
    if empty["count"]:
        lines.append(
            f"{empty['count']} rows have an empty completion and teach only the end token"
            " (data.filters.drop_empty_completions)"
        )
    if changed := audit["changed_by_template"]["count"]:
        where = listed(audit["changed_by_template"]["places"], 3)
        lines.append(
            f"{changed} rows have a message of which the chat template leaves out or changes"
            f" something: {where}"
        )
    injected, markers = audit["special_token_injections"], audit["template_markers"]
    if injected["num_rows"]:
        acts = "read as text" if injected["treated_as"] == "text" else "ACTING as special tokens"
        lines.append(
            f"{injected['num_rows']} rows contain special tokens, {acts}: {_found(injected)}"
        )
    if markers["num_rows"]:
        lines.append(f"{markers['num_rows']} rows contain template markers: {_found(markers)}")
    duplicates = audit["duplicates"]
    if duplicates["exact_rows"] or duplicates["near_groups"]:
        near = f"{len(duplicates['near_groups'])} groups that differ only in case or white space"
        lines.append(f"{duplicates['exact_rows']} exact duplicates, {near}")
    if duplicates["moved_to_train"]:
        lines.append(
            f"{len(duplicates['moved_to_train'])} held-out rows moved into training, because an"
            " exact duplicate is there"
        )
    elif duplicates["across_splits"]:
        lines.append(
            f"{len(duplicates['across_splits'])} groups of exact duplicates lie in more than one"
            " split: reported, not moved"
        )
    if audit["boundary_merges"]:
        merged = (
            f"{audit['boundary_merges']} rows have a token that holds the prompt's end and the"
            " completion's start"
        )
        lines.append(f"{merged}: it counts as completion, and generation starts from other tokens")
    if audit["end_tokens"] and audit["eos_token"] not in audit["end_tokens"]:
        turn_end = listed(audit["end_tokens"], 3)
        lines.append(
            f"turns end with {turn_end}, but generation stops at {audit['eos_token']}: set"
            " train.eos_token to the turn's end"
        )
    if not audit["rows"]["validation"]:
        lines.append("no validation rows")
    return lines


def _found(injection: Mapping[str, Any]) -> str:
    return f"{listed(injection['count'], 5)}; rows {listed(injection['rows'], 5)}"


def _treatment(settings: Supervision) -> str:
    return (
        "text"
        if settings.section.prompt_format != "chat" and settings.section.special_tokens == "text"
        else "special tokens"
    )


def _injection(found: Found) -> dict[str, Any]:
    count = Counter[str]()
    for texts in found.values():
        count.update(texts)
    return {
        "num_rows": len(found),
        "count": dict(sorted(count.items())),
        "rows": {id: sorted(texts) for id, texts in found.items()},
    }


def _shown(
    rows: Rows, tokenizer: Any, index: int, ids: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    return {
        "id": rows.ids[index],
        "place": rows.place(index),
        "spans": decoded_spans(tokenizer, ids.tolist(), labels.tolist()),
    }


def _ordered(splits: Splits, mask: np.ndarray) -> list[int]:
    """The positions that a mask names, split by split."""
    return (
        [index for name in SPLITS for index in splits.rows[name] if mask[index]]
        if mask.any()
        else []
    )


def _empty(rows: Rows, splits: Splits) -> dict[str, Any]:
    indices = _ordered(splits, np.frombuffer(rows.empty, dtype=np.bool_))
    return {"count": len(indices), "ids": [rows.ids[index] for index in indices]}


def _named(rows: Rows, splits: Splits, mask: np.ndarray) -> dict[str, Any]:
    indices = _ordered(splits, mask)
    return {
        "count": len(indices),
        "fraction": len(indices) / len(rows) if len(rows) else 0.0,
        "ids": [rows.ids[index] for index in indices],
        "places": [rows.place(index) for index in indices],
    }


def _end_tokens(tokens: np.ndarray, tokenizer: Any) -> dict[str, int]:
    """The tokens that end the answers of rows that were not cut, and how many rows each of them
    ends.
    """
    found, counts = np.unique(tokens[tokens >= 0], return_counts=True)
    return {
        str(tokenizer.convert_ids_to_tokens(int(index))): int(rows)
        for index, rows in zip(found, counts, strict=True)
    }


def _totals(tokens: Mapping[str, np.ndarray], indices: Sequence[int]) -> dict[str, int]:
    return {
        name: int(tokens[column][indices].sum())
        for name, column in (("tokens", "lengths"), ("supervised", "supervised"))
    }


def _distribution(lengths: np.ndarray) -> dict[str, int]:
    """Total, and per row the percentiles and the maximum, as whole tokens."""
    if not len(lengths):
        return {"total": 0, **{f"p{p}": 0 for p in PERCENTILES}, "max": 0}
    ranks = np.percentile(lengths, PERCENTILES, method="nearest")
    percentiles = {f"p{p}": int(rank) for p, rank in zip(PERCENTILES, ranks, strict=True)}
    return {"total": int(lengths.sum()), **percentiles, "max": int(lengths.max())}
