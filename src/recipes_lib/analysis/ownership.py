"""Whose results lie in a run's folder: of this run and its present weights, or of another.

A folder that was renamed, results that were copied, and a training that was done again leave files
that say the contrary of the truth.
"""

from contextlib import suppress

from recipes_lib.analysis.runs import Run
from recipes_lib.config.preflight import local_folder
from recipes_lib.core.errors import DataError, RecipesError
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.engines import ENGINES
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.models import model_key
from recipes_lib.evals.recipe import GenerationSection
from recipes_lib.weights.runs import finished_run


def check_ownership(run: Run) -> None:
    """Refuse a run whose folder holds the results of another run, or of its former weights.

    Weights that are not on this machine, the run's or its base's, are not compared.

    Raises:
        DataError: names the file, and what to do.
    """
    if run.foreign:
        return
    recorded_name = str(run.state.get("name") or run.name)
    if recorded_name != run.name:
        what = f"the folder is named {run.name}, and its run is {recorded_name}"
        remedy = f"give the folder its run's name again: {recorded_name}"
        raise DataError(what, remedy, file=run.folder / "run.json")
    for log in run.evals:
        if log.target and log.target != run.name:
            what = f"this is a result of {log.target}, in the folder of {run.name}"
            raise DataError(what, f"move it back, or {_again(log)}", file=log.file)
    if run.is_base:
        return
    weights = None  # stays so where some are gone
    with suppress(RecipesError, OSError):
        trained = finished_run(RunDirectory(run.name, run.folder.parent), remote_code=True)
        base = local_folder(trained.recipe)  # nothing is fetched to compare results
        if base is not None and trained.weights.is_dir():
            weights = model_key(trained.recipe, trained.weights)
    if weights is None:
        return
    for log in run.evals:
        engine = ENGINES.get(str(log.answers.engine))
        if engine is None:  # not recorded
            continue
        # as it was written: nothing of it is judged by today's rules
        section = GenerationSection.model_construct(**(log.recipe.get("generation") or {}))
        # earlier versions did not count a server's address
        sections = (section, section.model_copy(update={"base_url": None}))
        answered_by = [engine.answered_by(each, run.name, weights) for each in sections]
        if log.answers.fingerprint not in answered_by:
            what = f"this is a result of other weights than {run.name} has now"
            raise DataError(what, _again(log), file=log.file)


def _again(log: EvalLog) -> str:
    """How to make a result again; the command that made it is recorded."""
    return f"evaluate again: {log.command}" if log.command else "evaluate again"
