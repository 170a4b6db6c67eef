"""Evaluation: models answer, judges and rules decide, and every result is an `EvalLog`."""
