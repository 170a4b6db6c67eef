"""What is to run, before Slurm is asked: jobs with their commands, sizes and order.

A job is one stage of a run (train, an evaluation, the report) or, in a study, one stage of several equal arms (an array). Its commands are
argument lists: no shell reads a value of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes_lib.errors import RecipeError
from recipes_lib.recipe.accelerate_config import AccelerateConfig

# Placeholders that launch/job.sbatch fills in where the task runs.
MULTI_NODE_WORDS = (
    *("--num_machines", "@NODES@", "--machine_rank", "@NODE_RANK@", "--main_process_ip", "@HEAD@", "--main_process_port", "@PORT@"),
    *("--rdzv_backend", "static", "--same_network"),
)


@dataclass(frozen=True)
class JobSize:
    """How large a job is: machines, processes on each, and whether each process needs a GPU."""

    nodes: int = 1
    processes: int = 1
    uses_gpus: bool = True
    distributed_type: str = "NO"

    @property
    def gpus(self) -> int:
        """GPUs to ask for on each machine."""
        return self.processes if self.uses_gpus else 0


@dataclass(frozen=True)
class Task:
    """One command line, and one that must succeed after it.

    `what` names it for people: an arm, an eval.
    """

    args: tuple[str, ...]
    check: tuple[str, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class Job:
    """One submission.

    `label` names its files and is unique in the chain; `stage` is the profile's key (train, eval, report). More than one task makes an
    array. `after` holds labels (`train`, or `train.2` for one task of an array) that must have succeeded, `after_any` those that must
    have ended.
    """

    label: str
    stage: str
    tasks: tuple[Task, ...]
    shape: JobSize = field(default_factory=JobSize)
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    throttle: int | None = None
    seconds: int | None = None

    @property
    def is_array(self) -> bool:
        """Whether the job has several tasks."""
        return len(self.tasks) > 1

    def task_labels(self) -> list[str]:
        """Return the file names of the tasks: the label, with a number each in an array."""
        return [f"{self.label}.{index}" for index in range(len(self.tasks))] if self.is_array else [self.label]


def training_command(python: str, config: AccelerateConfig, config_path: str, shape: JobSize, script: list[str]) -> tuple[str, ...]:
    """Return the command of a training task: one per machine, each of which starts its processes.

    Args:
        python: the interpreter's name inside the job.
        config_path: where the job finds the accelerate config.
        script: recipe, overrides and options of the training script.
    """
    train = [python, "-m", "recipes_lib.train", *script]
    if shape.nodes * shape.processes == 1:
        return tuple(train)
    launcher = [python, "-m", "accelerate.commands.launch", "--config_file", config_path, "--num_processes", "@WORLD@"]
    if shape.nodes > 1:
        launcher += MULTI_NODE_WORDS
    elif config.num_machines > 1:
        launcher += ["--num_machines", "1"]
    return (*launcher, *train[1:])


def check_job_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of a command once each can stand on a line of its own.

    Raises:
        RecipeError: one holds a line break.
    """
    for word in words:
        if "\n" in word or "\0" in word:
            raise RecipeError(
                f"a value with a line break cannot be launched from the command line: {word[:60]!r}", "write it into the recipe"
            )
    return words
