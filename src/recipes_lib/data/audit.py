"""The audit of supervision.json and the gate before step 1: what was read, what was cut, and what the loss sees.

Everything that would otherwise happen silently is counted here and its rows are named by id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipes_lib.data.examples import Example, SettingError, listed
from recipes_lib.data.splits import SPLITS, TRAIN, VALIDATION, Splits
from recipes_lib.data.supervision import Encoded, Supervision, decoded_spans

NUM_SHOWN = 3
PERCENTILES = (5, 50, 95)


def audit_rows(
    rows: Mapping[str, Sequence[tuple[Example, Encoded]]],
    splits: Splits,
    settings: Supervision,
    tokenizer: Any,
    *,
    rows_read: int,
    filtered: Mapping[str, int],
    injections: Mapping[str, Any],
) -> dict[str, Any]:
    """Count and name; the result is plain JSON.

    Args:
        rows: split -> its examples with their tokens, before rows without supervised tokens are dropped.
        filtered: name of a filter -> number of rows it left out.
    """
    everything = [pair for name in SPLITS for pair in rows[name]]
    truncated = [pair for pair in everything if len(pair[1].ids) < pair[1].tokens_before]
    lost_end = [pair for pair in truncated if not pair[1].ends]
    bare = [pair for pair in everything if not pair[1].supervised]
    empty = [example for example, _ in everything if is_empty(example)]
    special = injections["special_tokens"]
    return {
        "prompt_format": settings.section.prompt_format,
        "loss_on": "whole text" if settings.whole else "completion",
        "max_length": settings.max_length,
        "truncation_mode": "keep_end" if settings.keep_end else "keep_start",
        "eos_token": settings.eos_token,
        "rows": {
            "read": rows_read,
            "filtered": dict(filtered),
            "used": len(everything),
            **{name: len(rows[name]) for name in SPLITS},
            "trained": sum(bool(encoded.supervised) for _, encoded in rows[TRAIN]),
        },
        "tokens": _distribution([len(e.ids) for _, e in everything]),
        "supervised_tokens": _distribution([e.supervised for _, e in everything]),
        "prompt_tokens": _distribution([e.prompt_tokens for _, e in everything]),
        "completion_tokens": _distribution([e.tokens_before - e.prompt_tokens for _, e in everything]),
        "tokens_per_split": {name: _totals([e for _, e in rows[name]]) for name in SPLITS},
        "truncated": _named(truncated, everything) | {"lost_end_token": len(lost_end)},
        "no_supervised_tokens": _named(bare, everything),
        "empty_completions": {"count": len(empty), "ids": [example.id for example in empty]},
        "special_token_injections": {"treated_as": _treatment(settings)} | _injection(special),
        "template_markers": _injection(injections["markers"]),
        "duplicates": {
            "exact_groups": splits.exact_groups,
            "exact_rows": sum(map(len, splits.exact_groups)) - len(splits.exact_groups),
            "across_splits": splits.across,
            "moved_to_train": splits.moved,
            "near_groups": splits.near_groups,
        },
        "boundary_merges": sum(encoded.boundary_merge for _, encoded in everything),
        "end_token_supervised": {
            "untruncated_rows": len(everything) - len(truncated),
            "of_which_supervised": sum(e.ends for _, e in everything if len(e.ids) == e.tokens_before),
        },
        "end_tokens": _end_tokens([e for _, e in everything if len(e.ids) == e.tokens_before and e.ends], tokenizer),
        "examples": [_shown(example, encoded, tokenizer) for example, encoded in rows[TRAIN][:NUM_SHOWN]],
    }


def check_audit(audit: Mapping[str, Any], max_unsupervised_fraction: float, *, evaluates: bool = False) -> None:
    """The gate: refuse data that cannot teach what the recipe asks for.

    Args:
        evaluates: whether the training computes a validation loss.

    Raises:
        SettingError: no or too few rows with supervised tokens, only empty rows, EOS without loss, or nothing to validate on. It
            carries the `audit`.
    """
    try:
        _gate(audit, max_unsupervised_fraction)
        if evaluates and not audit["tokens_per_split"][VALIDATION]["supervised"]:
            what = f"train.eval_strategy asks for a validation loss, but none of {audit['rows']['used']} rows is held out"
            raise SettingError("data.split.validation", what, "add rows, raise data.split.validation, or set train.eval_strategy: 'no'")
    except SettingError as error:
        error.audit = audit
        raise


def _gate(audit: Mapping[str, Any], max_unsupervised_fraction: float) -> None:
    used, bare = audit["rows"]["used"], audit["no_supervised_tokens"]
    limit, p95 = audit["max_length"], audit["prompt_tokens"]["p95"]
    if audit["empty_completions"]["count"] == used:
        raise SettingError("data.source", f"{used}/{used} rows have an empty completion: there is nothing to learn", "check data.columns")
    if bare["count"] > max_unsupervised_fraction * used or bare["count"] == used or not audit["rows"]["trained"]:
        hints = [f"raise train.max_length above {p95}"]
        if bare["count"] < used:
            accepted = f"at most {max_unsupervised_fraction:.0%} are accepted (data.max_unsupervised_fraction)"
            drop = f"{hints[0]}, or leave long rows out with data.filters.max_tokens: {limit}"
            hints = [f"{accepted}; rows {listed(bare['ids'], 5)}", drop]
        what = f"{bare['count']}/{used} rows have no supervised token at max_length={limit}; p95 prompt is {p95}"
        raise SettingError("train.max_length", what, *hints)
    end = audit["end_token_supervised"]
    if end["of_which_supervised"] < end["untruncated_rows"]:
        missing = end["untruncated_rows"] - end["of_which_supervised"]
        what = f"{missing}/{used} rows do not end with a supervised end token: the model would not learn to stop"
        hint = "the template must end an assistant turn with a special token, inside {% generation %} if it has that"
        raise SettingError("data.chat_template", what, hint)


def warnings_of(audit: Mapping[str, Any]) -> list[str]:
    """What the user should know before training, one line each; empty when all is well."""
    truncated, bare, empty = audit["truncated"], audit["no_supervised_tokens"], audit["empty_completions"]
    lines = []
    if truncated["count"]:
        cut = f"{truncated['count']} rows ({truncated['fraction']:.1%}) are cut at max_length={audit['max_length']}"
        lines.append(f"{cut}, {truncated['lost_end_token']} lose their end token")
    if bare["count"]:
        lines.append(f"{bare['count']} rows have no supervised token and are left out: {listed(bare['ids'], 5)}")
    if empty["count"]:
        lines.append(f"{empty['count']} rows have an empty completion and teach only the end token (data.filters.drop_empty_completions)")
    injected, markers = audit["special_token_injections"], audit["template_markers"]
    if injected["num_rows"]:
        acts = "read as text" if injected["treated_as"] == "text" else "ACTING as special tokens"
        lines.append(f"{injected['num_rows']} rows contain special tokens, {acts}: {_found(injected)}")
    if markers["num_rows"]:
        lines.append(f"{markers['num_rows']} rows contain template markers: {_found(markers)}")
    duplicates = audit["duplicates"]
    if duplicates["exact_rows"] or duplicates["near_groups"]:
        near = f"{len(duplicates['near_groups'])} groups that differ only in case or white space"
        lines.append(f"{duplicates['exact_rows']} exact duplicates, {near}")
    if duplicates["moved_to_train"]:
        lines.append(f"{len(duplicates['moved_to_train'])} held-out rows moved into training, because an exact duplicate is there")
    elif duplicates["across_splits"]:
        lines.append(f"{len(duplicates['across_splits'])} groups of exact duplicates lie in more than one split: reported, not moved")
    if audit["boundary_merges"]:
        merged = f"{audit['boundary_merges']} rows have a token that holds the prompt's end and the completion's start"
        lines.append(f"{merged}: it counts as completion, and generation starts from other tokens")
    if audit["end_tokens"] and audit["eos_token"] not in audit["end_tokens"]:
        turn_end = listed(audit["end_tokens"], 3)
        lines.append(f"turns end with {turn_end}, but generation stops at {audit['eos_token']}: set train.eos_token to the turn's end")
    if not audit["rows"]["validation"]:
        lines.append("no validation rows")
    return lines


def _found(injection: Mapping[str, Any]) -> str:
    return f"{listed(injection['count'], 5)}; rows {listed(injection['rows'], 5)}"


def is_empty(example: Example) -> bool:
    """Whether the text that the example should teach is empty."""
    fields = example.fields
    for name in ("response", "completion", "text"):
        if isinstance(fields.get(name), str):
            return not fields[name].strip()
    messages = fields.get("messages") or fields.get("completion") or []
    return not any(message["content"].strip() for message in messages if message["role"] == "assistant")


def _treatment(settings: Supervision) -> str:
    return "text" if settings.section.prompt_format != "chat" and settings.section.special_tokens == "text" else "special tokens"


def _injection(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_rows": len(found["rows"]), "count": dict(found["count"]), "rows": dict(found["rows"])}


def _named(pairs: Sequence[tuple[Example, Encoded]], everything: Sequence[Any]) -> dict[str, Any]:
    return {
        "count": len(pairs),
        "fraction": len(pairs) / len(everything) if everything else 0.0,
        "ids": [example.id for example, _ in pairs],
        "places": [example.place for example, _ in pairs],
    }


def _end_tokens(encoded: Sequence[Encoded], tokenizer: Any) -> dict[str, int]:
    """The tokens that end the answers of rows that were not cut, and how many rows each of them ends."""
    count = Counter(int(e.ids[e.answer_end - 1]) for e in encoded)
    return {str(tokenizer.convert_ids_to_tokens(index)): rows for index, rows in count.items()}


def _totals(encoded: Sequence[Encoded]) -> dict[str, int]:
    return {"tokens": sum(len(e.ids) for e in encoded), "supervised": sum(e.supervised for e in encoded)}


def _distribution(lengths: Sequence[int]) -> dict[str, int]:
    """Total, and per row the percentiles and the maximum, as whole tokens."""
    if not lengths:
        return {"total": 0, **{f"p{p}": 0 for p in PERCENTILES}, "max": 0}
    ranks = np.percentile(lengths, PERCENTILES, method="nearest")
    percentiles = {f"p{p}": int(rank) for p, rank in zip(PERCENTILES, ranks, strict=True)}
    return {"total": int(sum(lengths)), **percentiles, "max": int(max(lengths))}


def _shown(example: Example, encoded: Encoded, tokenizer: Any) -> dict[str, Any]:
    return {"id": example.id, "place": example.place, "spans": decoded_spans(tokenizer, encoded.ids, encoded.labels)}
