"""What is to run, before Slurm is asked: jobs with their commands, sizes and order.

A job is one stage of a run (train, an evaluation, the report) or, in a study, one stage of several
equal arms (an array). Its commands are argument lists: no shell reads a value of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes_lib.config.accelerate_config import AccelerateConfig


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
    """One command, and one that must succeed after it.

    Args:
        launcher: what starts it: Python, a container, accelerate.
        args: what is started.
        what: its name for people: an arm, an eval.
    """

    launcher: tuple[str, ...]
    args: tuple[str, ...]
    check: tuple[str, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class Job:
    """One submission.

    `label` names its files and is unique in the chain; `stage` is the profile's key (train, eval,
    report). More than one task makes an array. `after` holds labels (`train`, or `train.2` for one
    task of an array) that must have succeeded, `after_any` those that must have ended.
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
        return (
            [f"{self.label}.{index}" for index in range(len(self.tasks))]
            if self.is_array
            else [self.label]
        )


def launcher_of(
    python: tuple[str, ...], config: AccelerateConfig, config_path: str, shape: JobSize
) -> tuple[str, ...]:
    """Return what starts a training on each machine: Python, or accelerate where there are several
    processes.

    Args:
        python: the words that start Python inside the job.
        config_path: where the job finds the accelerate config.
    """
    world = shape.nodes * shape.processes
    if world == 1:
        return python
    machines = (
        ("--num_machines", str(shape.nodes)) if shape.nodes > 1 or config.num_machines > 1 else ()
    )
    accelerate = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config_path,
        "--num_processes",
        str(world),
    )
    return (*python, *accelerate, *machines)
