"""Reads results of evaluations, whichever program wrote them: a file here for each format.

A reader is a module with three names:

    FORM            what to give it, as errors and `--help` say it
    matches(path)   whether a file or folder is in its format; must be cheap and never raise
    read(path)      a list of `Run`: its arm's name, seed (where the format knows one), metrics with
                    their samples, and facts about how it was asked

A new format is a module and its name in `READERS`; the first that matches reads. A plain table is
the last: any file with its ending matches.
"""

from dataclasses import replace
from glob import glob
from pathlib import Path

from recipes_lib.analysis.readers import (
    alpaca_eval,
    helm,
    inspect_log,
    lighteval,
    lm_eval,
    ours,
    plain_table,
)
from recipes_lib.analysis.runs import Run
from recipes_lib.analysis.text import sentence_list
from recipes_lib.core.errors import DataError, RecipeError, RecipesError, one_line
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import open_run

READERS = (ours, inspect_log, lm_eval, alpaca_eval, lighteval, helm, plain_table)


def read_results(path: Path) -> list[Run] | None:
    """Return the runs of a file or folder; None where it is neither, or a folder of nothing known.

    Raises:
        DataError: a file in no format that is read, or one that is damaged.
    """
    try:
        for reader in READERS:
            if reader.matches(path):
                return [replace(run, given=str(path)) for run in reader.read(path)]
    except (RecipesError, ModuleNotFoundError, OSError, MemoryError):
        raise
    except Exception as error:  # of a zip, a codec, JSON or its shape
        what = f"is damaged: {type(error).__name__}: {one_line(error)}"
        raise DataError(what, file=path) from error
    if path.is_file():
        raise DataError("holds no results that can be read", known_forms(), file=path)
    return None


def read_word(word: str) -> list[Run]:
    """Return the runs of a word of the command line: a run's name, a file or folder of results, or
    NAME=GLOB, the trainings of one arm.

    Raises:
        RecipesError: it is none of these, or cannot be read.
    """
    path = Path(word)
    if "=" in word and not path.exists():
        return _trainings(word)
    runs = read_results(path)
    if runs is not None:
        return runs
    try:
        folder = open_run(word).path
    except RecipeError:
        if path.is_dir():
            what = "this folder holds no results that can be read"
        elif path.suffix in (*plain_table.ENDINGS, ".json", ".eval"):
            what = "this is no file" if path.exists() else "there is no such file"
        else:
            raise
        raise RecipeError(what, known_forms(), file=path) from None
    return ours.read(folder)


def _trainings(word: str) -> list[Run]:
    """Return the runs of NAME=GLOB; a pattern that matches no path is one of runs' names."""
    name, _, pattern = word.partition("=")
    paths = [Path(pattern)] if Path(pattern).exists() else []  # as "[1].csv" is a name too
    for root in (Path(), runs_root()):
        found = glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 - that raises on "."
        paths = paths or [root / match for match in sorted(found)]
    if not name or not pattern or not paths:
        hint = "several trainings of an arm are NAME=GLOB, such as 'r8=out/r8-s*'"
        raise RecipeError(f"{word}: there are no results of this name", hint)
    trainings: list[Run] = []
    for path in paths:
        runs = read_word(str(path))
        if len({run.arm or run.name for run in runs}) > 1:
            names = sentence_list([run.name for run in runs], 3)
            raise DataError(f"holds {names}, and {name} is one arm", file=path)
        for run in runs:
            seeds = [other.seed for other in trainings if other.seed is not None]
            if run.seed in seeds:
                what = f"is a second training of {name} with seed {run.seed}"
                raise DataError(what, "an arm is one recipe, trained once per seed", file=path)
            state = {} if run.foreign else run.state  # else a model as it is, and no training
            trainings.append(replace(run, arm=name, given=word, state=state))
    return trainings


def known_forms() -> str:
    """Return what can be compared, a phrase for each format."""
    return "; ".join(reader.FORM for reader in READERS)
