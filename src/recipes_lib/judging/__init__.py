"""Judging answers with a language model, and judging the judge: prompts, verdicts, store, outcomes,
audit, replay.

Nothing here loads a model. A judge is anything with `complete(requests) -> replies`
(`judge.Judge`).
"""
