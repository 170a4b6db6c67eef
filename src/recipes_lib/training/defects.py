"""A defect of this project or of a library, told in one message; the traceback is kept where the run is."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from pathlib import Path

from recipes_lib.errors import RecipesError
from recipes_lib.training.ranks import rank


def as_message(error: Exception, run: Path | None) -> RecipesError:
    """Return the error as one message and write its traceback into the run's folder: a rerun with --debug may take days.

    Args:
        run: the run's folder, where it exists.
    """
    summary = (str(error).strip().splitlines() or [""])[0]
    where = "--debug shows where"
    if run is not None and run.is_dir():
        file = run / (f"traceback-rank{rank()}.txt" if "RANK" in os.environ else "traceback.txt")
        with suppress(OSError):
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            where = f"the traceback is in {file}"
    return RecipesError(f"internal error: {type(error).__name__}: {summary}", f"this is a bug; {where}")
