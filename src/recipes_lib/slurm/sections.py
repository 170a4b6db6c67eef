"""The keys of a site profile (launch/profiles/*.yaml): what a Slurm site is like, and nothing of
any recipe.

As in `recipe.sections`, each field is a key and each `help` its documentation; the JSON Schema and
the checks are generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes_lib.config.sections import key

STAGES = ("train", "eval", "report")


@dataclass(frozen=True, kw_only=True)
class EnvironmentSection:
    """How a job finds Python and this project. Nothing set: the Python that submitted it."""

    modules: list[str] = key("Modules to load, in this order.", factory=list)
    conda: str | None = key("Conda environment to activate: its name or its folder.")
    venv: str | None = key("Virtual environment to activate: its folder.")
    container: list[str] = key(
        "Words put before every command, for example [apptainer, exec, --nv, image.sif].",
        factory=list,
    )
    srun: list[str] = key(
        "Words for srun, which starts every command of a job:"
        " [--container-image=/images/recipes.sqsh, --container-mounts=/scratch] for a container of"
        " pyxis and enroot.",
        factory=list,
    )
    setup: list[str] = key("Further lines of bash, run last.", factory=list)


@dataclass(frozen=True, kw_only=True)
class DirectoriesSection:
    """Where the site wants large files; `{user}` is the user's name. Absent: as in the shell that
    submits.
    """

    runs: str | None = key(
        "Folder of the runs (RECIPES_RUNS_ROOT); login and compute nodes must both see it."
    )
    cache: str | None = key("Folder of materialised models (RECIPES_CACHE).")
    hub: str | None = key("Folder of the Hub's cache (HF_HOME), which `recipes prefetch` fills.")
    temporary: str | None = key("Scratch of a job (TMPDIR); `{job}` is the job id.")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One site. The first six keys must be written; null is a value: the site's default, or for
    gres a cluster without GPUs.
    """

    partition: str | dict[str, str | None] | None = field(
        metadata={"help": "Partition, or one per stage: {train: a, eval: b, report: c}."}
    )
    time: str | dict[str, str | None] | None = field(
        metadata={
            "help": (
                'Time limit, or one per stage, quoted: "08:00:00" or "1-12:00:00". A plan that is'
                " shorter wins for training."
            )
        }
    )
    gres: str | None = field(
        metadata={
            "help": (
                "What asks for GPUs, `{gpus}` their number per node: gpu:{gpus} or"
                " gpu:h100-47:{gpus}."
            )
        }
    )
    cpus_per_gpu: int = field(
        metadata={
            "help": "CPU cores per GPU, or per process on a cluster without GPUs.",
            "minimum": 1,
        }
    )
    memory_gib_per_gpu: int | None = field(
        metadata={"help": "Host memory in GiB per GPU, or per process without GPUs.", "minimum": 1}
    )
    environment: EnvironmentSection = field(
        metadata={
            "help": "How a job finds Python and this project; {} is the Python that submitted it."
        }
    )
    account: str | None = key("Account the jobs are charged to.")
    qos: str | None = key("Quality of service.")
    gpu: str | None = key(
        "Card for the estimate of the training time, a name of `recipes plan --gpu`."
    )
    vllm: str | None = key(
        "The vllm program, of an environment of its own. A job starts the judge with it that an"
        " evaluation expects at 127.0.0.1; null: no job does."
    )
    signal_lead_s: int = key(
        "Seconds before the time limit at which a training is asked to save: more than a step, an"
        " evaluation batch and a save.",
        300,
        minimum=10,
    )
    max_requeues: int = key(
        "How often a job that was stopped is queued again by itself.", 20, minimum=0
    )
    max_concurrent_arms: int | None = key(
        "Arms of a study that train at the same time; null is no limit.", minimum=1
    )
    offline: bool = key(
        "Compute nodes have no network: jobs use what `recipes prefetch` fetched"
        " (HF_HUB_OFFLINE=1).",
        True,
    )
    variables: dict[str, str] = key(
        "Environment variables of every job, NCCL's for example.", factory=dict
    )
    directories: DirectoriesSection = key(
        "Where the site wants large files.", factory=DirectoriesSection
    )
    extra_sbatch: list[str] = key(
        "Further flags of sbatch, one word each: [--constraint=h100, --exclusive].", factory=list
    )

    def of_stage(self, key: str, stage: str) -> str | None:
        """Return the value of `partition` or `time` for a stage."""
        value = getattr(self, key)
        return value.get(stage) if isinstance(value, dict) else value
