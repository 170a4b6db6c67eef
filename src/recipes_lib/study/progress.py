"""What of a study is done, what the rest takes, and what forbids it. Imports no torch."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from recipes_lib.analysis.differences import arm_differences
from recipes_lib.analysis.runs import ArmRuns
from recipes_lib.analysis.text import question_text, sentence_list
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError, RecipesError, print_error
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, describe_holder, is_held
from recipes_lib.core.terminal import count
from recipes_lib.data.reading import check_rows
from recipes_lib.evals.answers import check_questions
from recipes_lib.evals.judge import Judge
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import evaluated_bases, known_by
from recipes_lib.evals.questions import answer_count, question_count
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import BASE_ARM, Arm, Study, full_name
from recipes_lib.study.lock import current_part
from recipes_lib.study.needs import Host, missing_needs
from recipes_lib.study.trainings import is_trained, study_trainings, study_tunings, what_changed
from recipes_lib.weights.load import base_fingerprint


@dataclass(frozen=True)
class Evaluation:
    """One result: a run's answers to an eval, judged against those of another run where named."""

    recipe: EvalRecipe
    run: str
    against: str = ""

    @property
    def file(self) -> Path:
        """Its result.json."""
        return log_file(runs_root() / self.run, self.recipe.name, self.against or None)

    @property
    def title(self) -> str:
        """What it is, for people."""
        title = f"{self.recipe.name} of {self.run}"
        if self.against:
            title += f" against {self.against}"
        return title


def base_recipe(study: Study) -> Recipe:
    """Return the recipe that says how the base is asked: the first without quantization, if any."""
    for arm in study.arms:
        if arm.recipe.base_format is None:
            return arm.recipe
    return study.arms[0].recipe


def base_run(study: Study) -> str:
    """Return the run of the base model; `base` before it was first evaluated."""
    recipe = base_recipe(study)
    bases = evaluated_bases(recipe.to_dict(), runs_root(), base_fingerprint(recipe))
    return bases[-1].name if bases else BASE_ARM


def evaluations(study: Study) -> list[Evaluation]:
    """Return every result asked for; in AlpacaEval each arm meets the baseline too, by seed."""
    base = base_run(study)
    runs: dict[str, dict[int, str]] = {}  # of each arm, by seed
    if study.file.include_base:
        runs[BASE_ARM] = {-1: base}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    results: list[Evaluation] = []
    for recipe in study.evals:
        opponent = recipe.opponent(None) or REFERENCE
        against = {REFERENCE: "", BASE_ARM: base}.get(opponent, opponent)
        pairs: list[tuple[str, str]] = []
        for by_seed in runs.values():
            pairs += [(run, against) for run in by_seed.values()]
        if recipe.suite.name == "alpaca_eval":
            baseline = runs[study.baseline]
            for by_seed in runs.values():
                for seed, rival in baseline.items():
                    if seed in by_seed:
                        pairs.append((by_seed[seed], rival))
                    elif not baseline.keys() & by_seed.keys():
                        # no seed in common, as with the base: every run meets every other
                        pairs += [(run, rival) for run in by_seed.values()]
        for run, rival in dict.fromkeys(pairs):
            if run != rival:
                results.append(Evaluation(recipe, run, rival))
    return results


def is_evaluated(result: Evaluation) -> bool:
    """Whether the result is there, of the weights, questions and judge that the study has now."""
    recipe = result.recipe
    with suppress(RecipesError, OSError):  # a model that is not here
        model = known_by(result.run, recipe)
        opponent = known_by(result.against, recipe) if result.against else None
        judge = Judge(recipe.judge, fetch=False).fingerprint if recipe.judge else None
        return is_current(result.file, recipe.settings_key(), model, opponent, judge)
    return False


def progress_of(study: Study) -> dict[str, str]:
    """Return the state of each training and result: done, missing, or what its run.json says."""
    states: dict[str, str] = {}
    for training in study_tunings(study) + study_trainings(study):
        folder = RunDirectory(training.run).path
        if is_trained(training):
            state = "done"
        elif is_held(folder):
            state = f"running{describe_holder(folder)}"
        else:
            # only now, when no process writes it any more
            state = str(training.state.get("state", "missing"))
            reasons = what_changed(training) + training.error_lines
            if reasons:
                state += f": {reasons[0]}"
        states[f"training {training.run}"] = state
    for result in evaluations(study):
        # the base is no training of the study
        is_trained_now = states.get(f"training {result.run}", "done") == "done"
        states[result.title] = "missing"
        if is_trained_now and is_evaluated(result):
            states[result.title] = "done"
    return states


def missing_of(study: Study) -> list[str]:
    """Return every training and result that is not done, those that failed first and with why."""
    failed: list[str] = []
    missing: list[str] = []
    for name, state in progress_of(study).items():
        if state.startswith("failed"):
            failed.append(f"{name} ({state})")
        elif state != "done":
            missing.append(name)
    return failed + missing


def plan_lines(study: Study) -> Iterator[str]:
    """Yield what a study takes, in at most 15 lines."""
    from recipes_lib.stats import PRIMARY_SHARE, planned_effect  # scipy

    part = current_part(study)
    trainings = study_tunings(part) + study_trainings(part)
    left = [training.run for training in trainings if not is_trained(training)]
    yield question_text(study.file.question)
    where = f", for {part.aims.look.place}" if part.aims.look else ""
    names = sentence_list(left, 3)
    yield f"trainings: {len(left)} of {len(trainings)} to do{where}  {names}".rstrip()
    answers: dict[tuple[str, str], int] = {}
    judgments = 0
    probes: dict[tuple[str, str], int] = {}  # of the judge's audit, by eval recipe and opponent
    for result in evaluations(part):
        suite = result.recipe.suite.name
        is_new = (result.recipe.name, result.run) not in answers
        number = answer_count(result.recipe)
        answers[result.recipe.name, result.run] = number
        if suite == "alpaca_eval":
            judgments += 2 * number  # each pair in both orders
            # two probes a pair, in both orders, of the first model that is judged
            pairs_probed = min(number, result.recipe.metrics.probe_pairs)
            probes[result.recipe.name, result.against] = 4 * pairs_probed
        elif suite == "mt_bench" and is_new:
            judgments += number
    yield f"answers: {sum(answers.values()):,}"
    audit = f" and up to {sum(probes.values()):,} of the judge's audit" if probes else ""
    yield f"judge requests: {judgments:,}{audit}"
    undeclared: list[str] = []
    for first, second in combinations([ArmRuns(arm.name, ()) for arm in study.arms], 2):
        for difference in arm_differences(first, second, study.design):
            if difference.level == "confound" and difference.what not in undeclared:
                undeclared.append(difference.what)
    if undeclared:
        yield f"differences that no factor declares: {sentence_list(undeclared, 4)}"

    # the difference on the primary metric that 80% of such studies find, where it is known
    primary = str(study.aims.primary)
    seeds = min(len(arm.seeds) for arm in study.arms)
    questions = 0
    for recipe in study.evals:
        if full_name(recipe, primary):
            questions = question_count(recipe)
            break
    pairs = math.comb(len(study.arms) + study.file.include_base, 2)
    if not pairs:
        return
    # the primary metric's comparisons have four fifths of the level
    comparisons = pairs / PRIMARY_SHARE
    least = planned_effect(primary, questions, seeds, comparisons)
    if least:
        effect = f"{100 * least:.1f} points" if least < 1 else "no difference, however large,"
        sizes = f"{count(questions, 'question')}, {count(seeds, 'seed')} per arm, assumed spread"
        yield f"80% of such studies would find {effect} of {primary} ({sizes})"
    yield from _look_lines(study, primary, questions, least or 0.0, comparisons)


def _look_lines(
    study: Study, primary: str, questions: int, effect: float, comparisons: float
) -> Iterator[str]:
    """Yield how many trainings a study with looks takes, as far as the spread is known."""
    if not study.looks:
        return
    from recipes_lib.analysis.futility import expected_seeds  # scipy

    looks = [look.seeds for look in study.looks]
    arms = len(study.arms)
    line = f"looks after {sentence_list([str(number) for number in looks])} seeds"
    sizes = [0.0]
    if 0 < effect < 1:
        sizes += [effect, 1.5 * effect]
    for size in sizes:
        seeds = expected_seeds(looks, primary, questions, size, max(2, arms), comparisons)
        if seeds is not None:
            where = (
                f"at {100 * size:.1f} points" if size else f"of {arms * looks[-1]} if none differs"
            )
            line += f", {arms * seeds:.1f} trainings {where}"
    yield line
    if study.file.include_base and looks[0] < 4:
        yield "  pairs with the base are not in it: a look under 4 seeds seldom decides one"


def refuse_unmet(study: Study, fetch: bool = False) -> None:
    """Refuse a study if its evaluations would fail later; only `fetch` asks the Hub."""
    arms = study.arms if is_untrained(study) else ()
    raise_all(list(unmet(study, arms, fetch)))


def nothing_to_compare(study: Study) -> list[RecipeError]:
    """Return a warning where the study has one arm and no base to compare it with."""
    if len(study.arms) > 1 or study.file.include_base:
        return []
    title = "warning: one arm without a base: the report will compare nothing"
    hint = "add an arm, or set include_base: true"
    return [RecipeError(title, hint, file=study.document.file)]


def is_untrained(study: Study) -> bool:
    """Whether there is anything left to train."""
    return not all(map(is_trained, study_tunings(study) + study_trainings(study)))


def missing_needs_of(study: Study) -> list[RecipesError]:
    """Return what the trainings that are left, and the judges after them, need and do not have."""
    if not is_untrained(study):
        return []
    return missing_needs([arm.recipe for arm in study.arms], study.evals, Host())


def raise_all(errors: Sequence[RecipesError]) -> None:
    """Raise the first error and print the others; do nothing where there is none."""
    for error in errors[1:]:
        print_error(error)
    if errors:
        raise errors[0]


def unmet(study: Study, arms: Sequence[Arm], fetch: bool = False) -> Iterator[RecipesError]:
    """Yield errors: rows unreadable, with an eval's questions, or not held out."""
    runs = {BASE_ARM, REFERENCE, *(training.run for training in study_trainings(study))}
    for number, recipe in enumerate(study.evals):
        check_questions(recipe)
        rival = recipe.opponent(None) or BASE_ARM
        if rival not in runs and not (runs_root() / rival / "run.json").is_file():
            yield recipe.document.error("metrics.against", f"there is no run '{rival}'")
        split = str(recipe.data.questions)
        without = [arm.name for arm in arms if not getattr(arm.recipe.data.split, split, True)]
        if without:
            what = f"no {split} rows are held out in {', '.join(without)}: set data.split.{split}"
            yield study.document.error(("evals", number), f"{recipe.name}: {what}")
    # arms that train on the same rows: once
    by_data = {str(arm.recipe.data): arm.recipe for arm in arms}
    for trained in by_data.values():
        yield from check_rows(trained)
        for name, leaks in search_recipe(trained, study.evals, fetch).items():
            if leaks.is_error:
                yield leak_error(name, leaks, trained)
