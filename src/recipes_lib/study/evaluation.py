"""All evaluation steps of a study in one process: each base is loaded once for all its adapters and
evals, then each judge once.

A step is finished as soon as its result is written. What fails takes only itself and what depends
on it along; answers and judgments that were made are kept, so the same command continues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from recipes_lib.compare.design import BASE_ARM, Study
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.core.json_files import read_object
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.eval_log import EvalLog, Scorecard
from recipes_lib.eval_recipe import UNJUDGED, EvalRecipe
from recipes_lib.evaluate import Done, evaluate
from recipes_lib.generation.subjects import Subject, loaded
from recipes_lib.generation.targets import Asking, Target, base_target, find_targets
from recipes_lib.study.arms import base_arm, base_record, base_run, move_aside
from recipes_lib.study.graph import Failure, Graph, Step, result_digest
from recipes_lib.suites.judged import JudgedSuite
from recipes_lib.suites.registry import suite_of
from recipes_lib.suites.suite import Asker
from recipes_lib.weights.finished_run import finished_run
from recipes_lib.weights.verify import (
    CheckedFiles,
    TrainedAnswers,
    check_answers_as_trained,
    check_weight_files,
)

EVALUATION_STEPS = ("check", "answers", "judgments", "comparison", *UNJUDGED)
Report = Callable[[str], None]


class FailedSteps:
    """Steps that failed in this attempt: `found` has them by name.

    Args:
        debug: raise what is not one of our errors.
    """

    def __init__(self, graph: Graph, debug: bool) -> None:
        self.graph, self.debug = graph, debug
        self.found: dict[str, Failure] = {}

    @contextmanager
    def noted(self, steps: Sequence[Step]) -> Iterator[None]:
        """Record an error as a failure of these steps, and go on."""
        try:
            yield
        except Exception as error:
            self.note(steps, error)

    def note(self, steps: Sequence[Step], error: Exception) -> None:
        """Note an error as a failure of steps; one of a library must not take the other arms along
        either.
        """
        if isinstance(error, RecipesError):
            self.add(steps, error)
            return
        if self.debug:
            raise error
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        self.add(steps, f"{type(error).__name__}: {lines[0]}")

    def add(self, steps: Sequence[Step], error: RecipesError | str) -> None:
        """Note a failure of steps."""
        for step in steps:
            self.found[step.name] = self.graph.fail(step, error)


def record_base_run(study: Study) -> None:
    """Find out under which name the base's evaluations are kept, and note it; weights are not
    loaded.
    """
    arm = base_arm(study) if study.include_base else None
    if arm is None or arm.recipe is None:
        return
    target = base_target(arm.recipe)
    with loaded([target], weights=False) as subjects:
        subject = subjects[0]
        subject.record()
    if base_run(study) != subject.name:
        known = {"run": subject.name, "model": arm.recipe.model.name_or_path}
        write_json(base_record(study), known)


def set_results_aside(study: Study, graph: Graph, step: Step, say: Report) -> None:
    """Move what older code answered or judged in this step into the study's folder, because what is
    stored is not asked again.
    """
    record = graph.record(step.name)
    if record is None or record.version == step.version:
        return
    if step.kind not in ("answers", "judgments", "comparison"):
        return
    for name in record.files:
        store = runs_root() / name
        if store.suffix != ".jsonl":
            store = store.with_name(f"{store.stem.replace('result', 'judgments', 1)}.jsonl")
        if store.is_file():
            say(f"{step.name}: made by older code, moved to {move_aside(study, store)}")
    graph.forget(step.name)  # or an attempt that is killed would lose what it made anew


@dataclass
class _Job:
    """One suite with the steps that its targets' answers and results complete, by run; steps that
    are fresh are not among them.
    """

    suite: Asker
    answers: dict[str, Step] = field(default_factory=dict)
    results: dict[str, Step] = field(default_factory=dict)

    def steps(self, run: str) -> list[Step]:
        """Return the steps about a run."""
        return [steps[run] for steps in (self.answers, self.results) if run in steps]


class _AdapterChecks(Asker):
    """Whether loaded runs answer as they did when they were trained; what does not is evaluated
    nowhere.
    """

    is_gate = True

    def __init__(self, steps: Mapping[str, Step], remote_code: bool) -> None:
        super().__init__(find_targets(list(steps), Asking(remote_code=remote_code)))
        self.facts: dict[str, TrainedAnswers | None] = {}

    def visit(self, subject: Subject) -> list[EvalLog]:
        """Check one loaded run.

        Raises:
            RecipesError: the model is not the one that was trained.
        """
        trained, model = subject.target.trained, subject.model
        assert trained is not None
        with subject.using() if subject.using else nullcontext():
            facts = check_answers_as_trained(trained, model) if model is not None else None
        self.facts[subject.name] = facts
        return []


class Evaluation:
    """The evaluation steps that are not fresh, ready to run.

    Args:
        study: the study.
        graph: its steps; the base's run is known.
        todo: the steps to do, all of `EVALUATION_STEPS`.
        debug: raise what is not one of our errors.
        remote_code: whether the command line allowed code that ships with a model.
    """

    def __init__(
        self,
        study: Study,
        graph: Graph,
        todo: Sequence[Step],
        say: Report,
        debug: bool = False,
        remote_code: bool = False,
    ) -> None:
        self.study, self.graph, self.say, self.remote_code = study, graph, say, remote_code
        self.failures = FailedSteps(graph, debug)
        self.todo = {step.name: step for step in todo}
        self.fresh = {name for name, state in graph.survey().items() if state.fresh}
        self.jobs: list[_Job] = []

    def run(self) -> FailedSteps:
        """Do every step; return what failed."""
        quiet_libraries()
        for step in self.todo.values():
            set_results_aside(self.study, self.graph, step, self.say)
        self._plan_checks()
        for recipe in self.study.evals:
            self._plan(recipe)
        evaluate([job.suite for job in self.jobs], self._record)
        return self.failures

    def _mine(self, kind: str, recipe: EvalRecipe | None = None) -> list[Step]:
        """The steps of a kind that are to be done and did not fail, nor what they need."""
        return [
            step
            for step in self.todo.values()
            if step.kind == kind
            and (recipe is None or step.eval == recipe.name)
            and step.name not in self.failures.found
            and not self._blocked(step)
        ]

    def _blocked(self, step: Step) -> bool:
        """Whether a step above this one failed or was never done."""
        return any(
            name in self.failures.found
            or (self._blocked(self.todo[name]) if name in self.todo else name not in self.fresh)
            for name in step.upstream
        )

    def _plan_checks(self) -> None:
        """Check the files of trained runs, and open the check of their loaded models."""
        self.files: dict[str, CheckedFiles] = {}
        for step in self._mine("check"):
            with self.failures.noted([step]):
                run = finished_run(RunDirectory(step.run), self.remote_code)
                self.files[step.run] = check_weight_files(run)
        left = _by_run(self._mine("check"))
        with self.failures.noted(list(left.values())):
            if left:
                self.jobs.append(_Job(_AdapterChecks(left, self.remote_code), answers=left))

    def _plan(self, recipe: EvalRecipe) -> None:
        """Open the suites of one eval: everyone's own results, and the comparisons."""
        opened = partial(suite_of, remote_code=self.remote_code)
        if not recipe.is_judged:
            steps = self._mine(recipe.suite.name, recipe)
            with self.failures.noted(steps):
                if steps:
                    suite = opened(recipe, list(_by_run(steps)))
                    self.jobs.append(_Job(suite, results=_by_run(steps)))
            return
        answers, judgments = self._mine("answers", recipe), self._mine("judgments", recipe)
        with self.failures.noted([*answers, *judgments]):
            if answers or judgments:
                # Everyone takes part, also whose results are fresh: the judge's probes and its
                # audit are then what they would have been in one go, wherever an earlier attempt
                # ended. What is stored is not asked again.
                suite = opened(recipe, list(_by_run(self._available(recipe))))
                self._add(suite, answers, judgments, self._stored_cards(recipe, but=recipe.name))
        # The judge's probes belong to its audit above; asking them again for every pair would tell
        # nothing new.
        plain = dataclasses.replace(
            recipe, metrics=dataclasses.replace(recipe.metrics, probe_pairs=0)
        )
        for step in self._mine("comparison", recipe):
            with self.failures.noted([step]):
                against = base_run(self.study) if step.against == BASE_ARM else step.against
                suite = opened(plain, [step.run], against)
                self._add(suite, [], [step], self._stored_cards(recipe), counts_elsewhere=False)

    def _add(
        self,
        suite: Asker,
        answers: Sequence[Step],
        results: Sequence[Step],
        cards: dict[str, list[Scorecard]],
        counts_elsewhere: bool = True,
    ) -> None:
        """Take a judged suite with the steps it completes."""
        assert isinstance(suite, JudgedSuite)
        suite.wanted = {step.run for step in results}
        suite.cards_elsewhere, suite.counts_elsewhere = cards, counts_elsewhere
        self.jobs.append(_Job(suite, _by_run(answers), _by_run(results)))

    def _available(self, recipe: EvalRecipe) -> list[Step]:
        """The answers of an eval that are there or can be made."""
        return [
            step
            for step in self.graph.of_kind("answers")
            if step.eval == recipe.name
            and (step.name in self.fresh or (step.name in self.todo and not self._blocked(step)))
        ]

    def _stored_cards(self, recipe: EvalRecipe, but: str = "") -> dict[str, list[Scorecard]]:
        """The scorecards of this eval's judge that fresh results of the study hold, by eval."""
        found: dict[str, list[Scorecard]] = {
            other.name: []
            for other in self.study.evals
            if other.judge == recipe.judge and other.name != but
        }
        for step in self.graph.of_kind("judgments"):
            file = runs_root() / step.run / "evals" / str(step.eval) / "result.json"
            if step.eval in found and step.name in self.fresh and file.is_file():
                found[step.eval].append(read_object(file)["audit"])
        return found

    def _record(self, done: Done) -> None:
        """Finish the steps of what ended, or note why they failed."""
        job = next(job for job in self.jobs if job.suite is done.suite)
        runs = [
            target.trained.run.name if target.trained else str(base_run(self.study))
            for target in done.targets
        ]
        steps = [step for run in runs for step in job.steps(run)]
        if done.error is not None:
            concerned = steps if runs else list(job.results.values())
            self.failures.note(concerned, done.error)
            for target, run in zip(done.targets, runs, strict=True):
                self._leave_out(target, run, job)
            return
        suite, seconds = job.suite, round(done.seconds, 2)
        for step in steps:
            if isinstance(suite, _AdapterChecks):
                held, told = self.files[step.run], suite.facts[step.run]
                facts = {**held, "as_trained": told or {}}
                self.graph.finish(step, digest_of(held["sha256"]), [], **facts)
                self.say(
                    f"check {step.run}: {held['parameters']:,} numbers, finite, and the model"
                    " answers as when it was trained"
                )
            elif isinstance(suite, JudgedSuite) and step.kind == "answers":
                answers = suite.answers_of(done.targets[0])
                files = [answers.folder(suite.recipe.name) / "generations.jsonl"]
                facts = {"seconds": seconds, "tokens": answers.tokens}
                self.graph.finish(step, answers.digest, files, **facts)
        for log in done.results:
            if finished := job.results.get(log.target):
                folder = runs_root() / finished.run / "evals" / suite.recipe.name
                files = [folder / log.file.name]
                self.graph.finish(finished, result_digest(log.to_dict()), files, seconds=seconds)

    def _leave_out(self, target: Target, run: str, failed: _Job) -> None:
        """Give up what a target that failed was to have: everything after a failed check, else what
        rests on the same answers.
        """
        for job in self.jobs:
            if job is failed or isinstance(failed.suite, _AdapterChecks):
                step = job.results.pop(run, None)
                if step and step.name not in self.failures.found:
                    self.failures.add([step], "its model failed above")
            elif not isinstance(job.suite, _AdapterChecks) and (
                job.suite.recipe.name == failed.suite.recipe.name
            ):
                job.suite.drop(target)


def _by_run(steps: Sequence[Step]) -> dict[str, Step]:
    return {step.run: step for step in steps}
