"""All evaluation steps of a study in one process: each base is loaded once for all its adapters and
evals, then each judge once.

A step is finished as soon as its result is written. What fails takes only itself and what depends
on it along; answers and judgments that were made are kept, so the same command continues.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.design import Study
from recipes_lib.compare.design_sections import BASE_ARM
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.json_files import read_object
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evaluate import write_result
from recipes_lib.generation.judges import opened
from recipes_lib.generation.subjects import grouped, loaded
from recipes_lib.generation.targets import Asking, base_target, distinct, find_targets, record_base
from recipes_lib.study.adapter_check import check_loaded, check_weight_files
from recipes_lib.study.arms import base_arm, base_record, base_run, free_name, study_folder
from recipes_lib.study.graph import Graph, Step, digest_of, result_digest
from recipes_lib.suites.harness import Harness
from recipes_lib.suites.judged_suite import JudgedSuite
from recipes_lib.suites.recipe import EvalRecipe
from recipes_lib.suites.registry import SUITES
from recipes_lib.weights.finished_run import finished_run

if TYPE_CHECKING:
    from recipes_lib.generation.subjects import Subject

EVALUATION_STEPS = ("check", "answers", "judgments", "comparison", "lm_eval")
Report = Callable[[str], None]


@dataclass
class FailedSteps:
    """Steps that failed in this attempt: name -> (error, exit code)."""

    found: dict[str, tuple[str, int]] = field(default_factory=dict)

    @contextmanager
    def noted(self, graph: Graph, steps: Sequence[Step], debug: bool = False) -> Iterator[None]:
        """Record an error as a failure of these steps, and go on."""
        try:
            yield
        except RecipesError as error:
            self.add(graph, steps, str(error), int(error.exit_code))
        except Exception as error:  # a library's error must not take the other arms along
            if debug:
                raise
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            self.add(graph, steps, f"{type(error).__name__}: {lines[0]}", int(ExitCode.FAILED))

    def add(self, graph: Graph, steps: Sequence[Step], error: str, exit_code: int) -> None:
        """Note a failure of steps."""
        for step in steps:
            graph.fail(step, error, exit_code)
            self.found[step.name] = (error, exit_code)


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
        record_base(subject.run, subject.target.recipe, subject.fingerprint, subject.prompts)
    if base_run(study) != subject.name:
        write_json(
            base_record(study), {"run": subject.name, "model": arm.recipe.model.name_or_path}
        )


def set_results_aside(study: Study, graph: Graph, step: Step, say: Report) -> None:
    """Move what older code answered or judged in this step into the study's folder, because what is
    stored is not asked again.
    """
    record = graph.record(step.name)
    if (
        record is None
        or record["version"] == step.version
        or step.kind not in ("answers", "judgments", "comparison")
    ):
        return
    for name in record["files"]:
        file = runs_root() / name
        store = (
            file
            if file.suffix == ".jsonl"
            else file.with_name(f"{file.stem.replace('result', 'judgments', 1)}.jsonl")
        )
        if store.is_file():
            away = free_name(study_folder(study) / "replaced" / store.relative_to(runs_root()))
            away.parent.mkdir(parents=True, exist_ok=True)
            store.rename(away)
            say(f"{step.name}: made by older code, moved to {shown_path(away)}")
    graph.forget(step.name)  # or an attempt that is killed would lose what it made anew


@dataclass
class _Job:
    """One suite with the steps that its targets' answers and results complete, by run; steps that
    are fresh are not among them.

    `own` is False for a comparison of two arms.
    """

    recipe: EvalRecipe
    suite: Harness | JudgedSuite
    answers: dict[str, Step]
    results: dict[str, Step]
    own: bool = True


class Evaluation:
    """The evaluation steps that are not fresh, ready to run.

    Args:
        study: the study.
        graph: its steps; the base's run is known.
        todo: the steps to do, all of `KINDS`.
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
        self.study, self.graph, self.say, self.debug, self.remote_code = (
            study,
            graph,
            say,
            debug,
            remote_code,
        )
        self.failures = FailedSteps()
        self.todo = {step.name: step for step in todo}
        self.fresh = {name for name, state in graph.survey().items() if state.fresh}
        self.jobs: list[_Job] = []

    def run(self) -> FailedSteps:
        """Do every step; return what failed."""
        quiet_libraries()
        for step in self.todo.values():
            set_results_aside(self.study, self.graph, step, self.say)
        self._check_files()
        for recipe in self.study.evals:
            self._plan(recipe)
        self._visit()
        self._judge()
        return self.failures

    def _mine(self, kind: str, recipe: EvalRecipe | None = None) -> list[Step]:
        """The steps of a kind that are to be done and did not fail, nor what they need."""
        steps = [
            step
            for step in self.todo.values()
            if step.kind == kind and (recipe is None or step.eval == recipe.name)
        ]
        return [
            step
            for step in steps
            if step.name not in self.failures.found and not self._blocked(step)
        ]

    def _blocked(self, step: Step) -> bool:
        """Whether a step above this one failed or was never done."""
        for name in step.upstream:
            above = self.graph.steps[name]
            if name in self.failures.found or (name in self.todo and self._blocked(above)):
                return True
            if name not in self.todo and name not in self.fresh:
                return True
        return False

    # ---- Adapters ----

    def _check_files(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        for step in self._mine("check"):
            with self.failures.noted(self.graph, [step], self.debug):
                self.facts[step.run] = check_weight_files(
                    finished_run(RunDirectory(step.run), self.remote_code)
                )

    def _check_loaded(self, subject: Subject) -> None:
        """Finish the check of a run whose model is loaded.

        Raises:
            RecipesError: the model is not the one that was trained.
        """
        for step in self._mine("check"):
            if step.run == subject.name:
                facts = {**self.facts[step.run], "as_trained": check_loaded(subject)}
                self.graph.finish(step, digest_of(facts["sha256"]), [], **facts)
                self.say(
                    f"check {subject.name}: {facts['parameters']:,} numbers, finite, and the model"
                    " answers as when it was trained"
                )

    # ---- What is asked ----

    def _plan(self, recipe: EvalRecipe) -> None:
        """Open the suites of one eval: everyone's own results, and the comparisons."""
        suite_of = partial(SUITES[recipe.suite.name], remote_code=self.remote_code)
        if recipe.suite.name == "lm_eval":
            steps = self._mine("lm_eval", recipe)
            with self.failures.noted(self.graph, steps, self.debug):
                if steps:
                    self.jobs.append(
                        _Job(
                            recipe,
                            suite_of(recipe, self._words(steps), None),
                            {},
                            {step.run: step for step in steps},
                        )
                    )
            return
        answers, judgments = self._mine("answers", recipe), self._mine("judgments", recipe)
        with self.failures.noted(self.graph, [*answers, *judgments], self.debug):
            if answers or judgments:
                # Everyone takes part, also whose results are fresh: the judge's probes and its
                # audit are then what they would have been in one go, wherever an earlier attempt
                # ended. What is stored is not asked again.
                suite = suite_of(recipe, self._words(self._available(recipe)), None)
                self.jobs.append(
                    _Job(
                        recipe,
                        suite,
                        {step.run: step for step in answers},
                        {step.run: step for step in judgments},
                    )
                )
        # The judge's probes belong to its audit above; asking them again for every pair would tell
        # nothing new.
        plain = dataclasses.replace(
            recipe, metrics=dataclasses.replace(recipe.metrics, probe_pairs=0)
        )
        for step in self._mine("comparison", recipe):
            with self.failures.noted(self.graph, [step], self.debug):
                against = base_run(self.study) if step.against == BASE_ARM else step.against
                self.jobs.append(
                    _Job(
                        plain, suite_of(plain, [step.run], against), {}, {step.run: step}, own=False
                    )
                )

    def _available(self, recipe: EvalRecipe) -> list[Step]:
        """The answers of an eval that are there or can be made."""
        steps = [step for step in self.graph.of_kind("answers") if step.eval == recipe.name]
        return [
            step
            for step in steps
            if step.name in self.fresh or (step.name in self.todo and not self._blocked(step))
        ]

    def _words(self, steps: Sequence[Step]) -> list[str]:
        return list(dict.fromkeys(step.run for step in steps))

    # ---- Models ----

    def _visit(self) -> None:
        """Load base after base and let every suite ask its targets."""
        unchecked = [step.run for step in self._mine("check")]
        for served in (False, True):
            jobs = [job for job in self.jobs if job.suite.served == served]
            targets = [target for job in jobs for target in job.suite.targets]
            targets += (
                [] if served else find_targets(unchecked, Asking(remote_code=self.remote_code))
            )
            for group in grouped(distinct(targets)):
                steps = [
                    step
                    for job in jobs
                    for step in [*job.answers.values(), *job.results.values()]
                    if _names(group, step)
                ]
                steps += [step for step in self._mine("check") if _names(group, step)]
                with (
                    self.failures.noted(self.graph, steps, self.debug),
                    loaded(group, weights=not served) as subjects,
                ):
                    for subject in subjects:
                        self._ask(subject, jobs)

    def _ask(self, subject: Subject, jobs: Sequence[_Job]) -> None:
        """Check one loaded subject, then let it do what every suite wants of it."""
        checks = [step for step in self._mine("check") if step.run == subject.name]
        with self.failures.noted(self.graph, checks, self.debug):
            self._check_loaded(subject)
        if any(step.name in self.failures.found for step in checks):
            self._drop(subject, jobs)
            return
        for job in jobs:
            if not any(
                str(target.identity) == str(subject.target.identity) for target in job.suite.targets
            ):
                continue
            mine = [
                step
                for step in (job.answers.get(subject.name), job.results.get(subject.name))
                if step
            ]
            started = time.monotonic()
            with self.failures.noted(self.graph, mine, self.debug):
                job.suite.visit(subject)
                self._finish_visit(job, subject, time.monotonic() - started)
            if any(step.name in self.failures.found for step in mine):
                self._drop(subject, [job])

    def _finish_visit(self, job: _Job, subject: Subject, seconds: float) -> None:
        """Record the answers of a judged suite, or the whole result of lm-eval."""
        folder = runs_root() / subject.name / "evals" / job.recipe.name
        if isinstance(job.suite, Harness):
            step = job.results.get(subject.name)
            result = next((one for one in job.suite.results if one["target"] == subject.name), None)
            if step and result:
                self._finish_result(job, step, result, seconds)
        elif step := job.answers.get(subject.name):
            answers = job.suite.answering.answers_of(subject)
            self.graph.finish(
                step,
                answers.digest,
                [folder / "generations.jsonl"],
                seconds=round(seconds, 2),
                tokens=answers.tokens,
            )

    def _drop(self, subject: Subject, jobs: Sequence[_Job]) -> None:
        """Leave a subject that failed out of its suites, so that the others go on."""
        for job in jobs:
            step = job.results.pop(subject.name, None)
            if isinstance(job.suite, JudgedSuite):
                job.suite.answering.words = [
                    word for word in job.suite.answering.words if word != subject.name
                ]
            if step and step.name not in self.failures.found:
                self.failures.add(
                    self.graph, [step], "its model failed above", int(ExitCode.FAILED)
                )

    # ---- Judges ----

    def _judge(self) -> None:
        """Load judge after judge and let it judge every suite that names it."""
        waiting = [
            job
            for job in self.jobs
            if isinstance(job.suite, JudgedSuite) and job.results and job.suite.answering.words
        ]
        waiting = [
            job for job in waiting if not all(self._blocked(step) for step in job.results.values())
        ]
        while waiting:
            file = _suite(waiting[0]).judge_file
            same = [job for job in waiting if _suite(job).judge_file == file]
            steps = [step for job in same for step in job.results.values()]
            with self.failures.noted(self.graph, steps, self.debug), opened(file) as judge:
                self._judge_all(same, judge)
            waiting = [job for job in waiting if _suite(job).judge_file != file]

    def _judge_all(self, jobs: Sequence[_Job], judge: Any) -> None:
        """Ask one judge for every verdict, then write the results: each says where else this judge
        failed its audit.
        """
        judged: list[tuple[_Job, float]] = []
        for job in jobs:
            started = time.monotonic()
            with self.failures.noted(self.graph, list(job.results.values()), self.debug):
                _suite(job).judge(judge)
                judged.append((job, (time.monotonic() - started) / max(1, len(job.results))))
        audits = [
            self._audit(recipe, [job for job, _ in judged])
            for recipe in self.study.evals
            if recipe.judge == jobs[0].recipe.judge
        ]
        for job, seconds in judged:
            with self.failures.noted(self.graph, list(job.results.values()), self.debug):
                _suite(job).conclude(
                    judge,
                    [
                        audit
                        for audit in audits
                        if not job.own or audit.recipe.name != job.recipe.name
                    ],
                )
                for result in _suite(job).results:
                    if step := job.results.get(result["target"]):
                        self._finish_result(job, step, result, seconds)

    def _audit(self, recipe: EvalRecipe, judged: Sequence[_Job]) -> _Audit:
        """The scorecards of an eval: of this process, else those that its results hold."""
        for job in judged:
            if job.own and job.recipe.name == recipe.name:
                return _Audit(recipe, dict(_suite(job).cards))
        cards = {}
        for step in self.graph.of_kind("judgments"):
            file = runs_root() / step.run / "evals" / recipe.name / "result.json"
            if step.eval == recipe.name and step.name in self.fresh and file.is_file():
                cards[step.run] = read_object(file)["audit"]
        return _Audit(recipe, cards)

    def _finish_result(self, job: _Job, step: Step, result: dict[str, Any], seconds: float) -> None:
        """Write a result into its run, and record its step."""
        whole = write_result(job.recipe, result)
        file = runs_root() / step.run / "evals" / job.recipe.name / Path(whole["file"]).name
        self.graph.finish(step, result_digest(whole), [file], seconds=round(seconds, 2))


@dataclass(frozen=True)
class _Audit:
    """What `JudgedSuite.conclude` reads of another suite."""

    recipe: EvalRecipe
    cards: dict[str, dict[str, Any]]


def _suite(job: _Job) -> Any:
    """The suite of a judged job."""
    return job.suite


def _names(group: Sequence[Any], step: Step) -> bool:
    """Whether a step is about one of these targets."""
    names = {target.trained.run.name if target.trained else BASE_ARM for target in group}
    return step.run in names or (step.arm == BASE_ARM and BASE_ARM in names)
