"""Judging answers with a language model, and judging the judge; nothing here loads a model."""
