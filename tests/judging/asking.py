"""Judging items in one call."""

from __future__ import annotations

from collections.abc import Iterable

from recipes_lib.judging.judge import Item, Judge, JudgePlan, JudgeRun, ask, build_requests
from recipes_lib.judging.store import JudgmentStore


def judge_items(
    items: Iterable[Item], judge: Judge, store: JudgmentStore, plan: JudgePlan
) -> JudgeRun:
    """Judge every item as `ask` does."""
    return ask(build_requests(items, plan, judge.fingerprint), judge, store, plan)
