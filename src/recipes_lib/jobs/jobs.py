"""Jobs, their tasks and their order, as any scheduler can run them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.jobs.records import TaskState
from recipes_lib.study.needs import Host

Stage = Literal["train", "eval", "report"]
STAGES = get_args(Stage)


@dataclass(frozen=True)
class Task:
    """One command."""

    launcher: tuple[str, ...]  # the words that start it: Python, a container, accelerate
    args: tuple[str, ...]  # what is started, with its arguments
    title: str = ""  # its name for people; of a training, the name of its run


@dataclass(frozen=True)
class Job:
    """What is submitted at once: one task, or several alike that need not wait for each other."""

    label: str  # its name, unique in the plan; its files are called after it
    stage: Stage  # a site may have its own flags for it
    tasks: tuple[Task, ...]
    uses_gpus: bool = True  # one for each process
    nodes: int = 1
    processes: int = 1  # on each node
    after: tuple[str, ...] = ()  # labels of jobs that must have succeeded before
    after_any: tuple[str, ...] = ()  # labels of jobs that must have ended before
    throttle: int | None = None  # how many tasks may run at the same time; None for all


@dataclass
class Plan:
    """What the submission of a recipe or a study needs."""

    name: str  # of the run or the study
    folder: Path  # where scripts, logs and exit codes will lie
    jobs: list[Job] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by the file's name in `folder`
    evals: list[EvalRecipe] = field(default_factory=list)  # that the jobs run
    warnings: list[str] = field(default_factory=list)  # for the user, who may go on

    def write_recipes(self) -> None:
        """Write the recipes that the trainings read; later edits do not reach them."""
        for file, recipe in self.recipes.items():
            recipe.write(self.folder / file)


class Site(Protocol):
    """What a plan depends on of the place where its jobs will run."""

    @property
    def scheduler(self) -> str:
        """Name of the folder with a launch's files in that of its run."""

    @property
    def python(self) -> tuple[str, ...]:
        """The words that start Python there."""

    @property
    def vllm(self) -> str | None:
        """The program that serves a judge beside its evaluation; None if nothing does."""

    @property
    def max_concurrent_arms(self) -> int | None:
        """How many trainings of a study may run at the same time; None for all."""

    @property
    def has_gpus(self) -> bool:
        """Whether a job that uses GPUs gets some."""

    @property
    def largest_array(self) -> int | None:
        """How many tasks a job may have; None where that is not known."""

    @property
    def host(self) -> Host:
        """What the jobs will see and have, as far as it is known here."""

    def error(self, what: str, *hints: str) -> RecipeError:
        """Return an error about the description of the site."""

    def doubts(self, jobs: Sequence[Job]) -> Iterator[str]:
        """Yield a warning for what the scheduler may accept and the user hardly means."""


class Backend(Protocol):
    """A scheduler. It writes and reads a launch's records with `jobs.records`."""

    @property
    def scheduler(self) -> str:
        """Name of the folder with a launch's files in that of its run."""

    def prepare(self, plan: Plan) -> None:
        """Write all that a submission needs into the plan's folder."""

    def preview(self, plan: Plan) -> Iterator[str]:
        """Yield what would be submitted, as lines for a shell."""

    def submit(self, plan: Plan) -> dict[str, str]:
        """Prepare, submit every job or none, and return {label: job id}."""

    def states(self, folder: Path) -> list[TaskState]:
        """Return the state of every task that was submitted from a folder, in order."""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End jobs that wait or run."""
