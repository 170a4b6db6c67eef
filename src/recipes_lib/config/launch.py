"""A launch: accelerate config, processes, machines, command, examples of a step. No torch."""

import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from recipes_lib.config.documents import Document, Values, did_you_mean, read
from recipes_lib.config.parsing import IsPath, Section, parse
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root

DEFAULT_PORT = 29500
READS_ONCE_KEY = "fsdp_cpu_ram_efficient_loading"
READS_ONCE_VARIABLE = READS_ONCE_KEY.upper()  # where accelerate's launcher puts it
# Flags that a training takes itself, however it is started.
TRAIN_FLAGS = {
    "resume_anyway": "resume although settings that affect the result have changed",
    "trust_remote_code": "run code that ships with the model, if the recipe allows it too",
}
WRAP_KEY = "fsdp_transformer_layer_cls_to_wrap"
# accelerate reads over unknown keys
_FSDP_KEYS = {
    "fsdp_version", "fsdp_state_dict_type", "fsdp_auto_wrap_policy", "fsdp_min_num_params",
    "fsdp_reshard_after_forward", "fsdp_offload_params", "fsdp_activation_checkpointing",
    WRAP_KEY, READS_ONCE_KEY,
    # of FSDP1, which `accelerate config` writes for FSDP2, too
    "fsdp_backward_prefetch", "fsdp_forward_prefetch", "fsdp_use_orig_params",
    "fsdp_sync_module_states", "fsdp_sharding_strategy",
}  # fmt: skip
_FIXED_FOR_FSDP = {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}
AccelerateConfigName = Annotated[str, IsPath(unless=lambda name: not Path(name).suffix)]


class LaunchSection(Section):
    """The default way to launch; never part of the mathematics."""

    accelerate: AccelerateConfigName = "single_gpu"
    """Name of a file in accelerate_configs/, without .yaml, or a path."""
    gpus: int | None = Field(None, ge=1)
    """Processes per node. Default: the accelerate config's."""
    nodes: int = Field(1, ge=1)
    """Machines."""


class AccelerateConfig(Section):
    """What a launch reads of an accelerate config; accelerate refuses other keys."""

    model_config = ConfigDict(extra="allow")
    kind: ClassVar = "accelerate"

    path: Path = Field(Path(), exclude=True)
    distributed_type: Literal["NO", "MULTI_GPU", "FSDP"] = "NO"
    num_processes: int = Field(1, ge=1)
    num_machines: int = Field(1, ge=1)
    main_process_port: int | None = Field(None, ge=0)
    use_cpu: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    fsdp_config: Values = {}


def load_accelerate_config(name_or_path: str | Path) -> AccelerateConfig:
    """Return the accelerate config of a path, or of a name in an accelerate_configs/ folder."""
    path = Path(name_or_path)
    if not path.suffix:
        files: dict[str, Path] = {}
        for root in (project_root(), Path.cwd()):
            for file in (root / "accelerate_configs").glob("*.yaml"):
                files[file.stem] = file
        if path.name not in files:
            what = f"launch.accelerate '{path}' is not a file in accelerate_configs/"
            raise RecipeError(what, *did_you_mean(path.name, files), f"known: {', '.join(files)}")
        path = files[path.name]
    config = parse(AccelerateConfig, read(path), accelerate_rules)
    return config.model_copy(update={"path": path})


def accelerate_rules(config: AccelerateConfig, document: Document) -> Iterator[RecipeError]:
    """Yield what accelerate would take and cannot be launched here."""
    for key in ("deepspeed_config", "megatron_lm_config", "parallelism_config"):
        if document.values.get(key):
            hint = "use distributed_type: FSDP (accelerate_configs/fsdp.yaml)"
            yield document.error(key, f"{key} cannot be used here", hint)
    if config.distributed_type != "NO" and "num_processes" not in config.model_fields_set:
        what = f"{config.distributed_type} without num_processes starts 1 process"
        yield document.error("distributed_type", what, "set num_processes")
    for key in sorted(config.fsdp_config.keys() - _FSDP_KEYS):
        near = did_you_mean(key, _FSDP_KEYS, "fsdp_config.{}".format)
        yield document.error(f"fsdp_config.{key}", f"unknown key 'fsdp_config.{key}'", *near)
    for key, value in _FIXED_FOR_FSDP.items():
        if config.distributed_type == "FSDP" and config.fsdp_config.get(key) != value:
            why = "FSDP1 is deprecated, and a sharded final save writes no adapter"
            yield document.error(f"fsdp_config.{key}", f"fsdp_config.{key} must be {value}: {why}")


def asks_for(variable: str) -> bool:
    """Whether accelerate's launcher, or the user in its place, has switched a variable on."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def precision_conflict(train: Values, requested: str, source: str) -> list[str]:
    """Return what is wrong where a launch would silently win over the recipe's mixed precision."""
    half = "bf16"
    if train.get("fp16"):
        half = "fp16"
    elif train.get("bf16") is False:
        half = "no"
    if requested.lower() in ("no", half):
        return []
    what = f"{source} asks for mixed_precision {requested}, but the recipe for {half} (train.bf16)"
    return [what, "let the recipe decide: mixed_precision: 'no', and no flag or variable for it"]


@dataclass(frozen=True)
class Launch:
    """How many processes run where."""

    config: AccelerateConfig
    per_machine: int  # processes on each machine
    machines: int = 1
    rank: int | None = None  # of this machine, of several
    address: str | None = None  # of machine 0
    port: int | None = None  # a free one of machine 0

    @property
    def world_size(self) -> int:
        """Processes of all machines together."""
        return self.per_machine * self.machines

    @property
    def distributed_type(self) -> str:
        """What accelerate is asked for: NO, MULTI_GPU or FSDP."""
        return self.config.distributed_type if self.world_size > 1 else "NO"

    def launcher_words(self) -> list[str]:
        """Return the arguments of `accelerate launch` before the script."""
        words = ["--config_file", os.path.relpath(self.config.path)]
        if self.world_size != self.config.num_processes:
            words += ["--num_processes", str(self.world_size)]
        if self.machines != self.config.num_machines:
            words += ["--num_machines", str(self.machines)]
            if self.machines > 1:
                words.append("--same_network")
        if self.machines > 1:
            words += ["--machine_rank", str(self.rank), "--main_process_ip", str(self.address)]
        if self.port:
            words += ["--main_process_port", str(self.port)]
        return words

    def plain_command(self, file: str, overrides: Sequence[str]) -> str:
        """Return the command that trains a recipe without us; of several machines, machine 0's."""
        launch = self
        if self.machines > 1:
            port = self.config.main_process_port or DEFAULT_PORT
            launch = replace(self, rank=0, address="HOST_OF_RANK_0", port=port)
        script = ["-m", "recipes_lib.train", file] + list(overrides)
        return shlex.join(["accelerate", "launch"] + launch.launcher_words() + script)

    def command(self, script: Sequence[str]) -> list[str]:
        """Return what `recipes train` starts: `python -m` for one process, which stops cleanly."""
        if self.world_size > 1:
            accelerate = str(Path(sys.executable).with_name("accelerate"))
            return [accelerate, "launch"] + self.launcher_words() + list(script)
        # what accelerate launch would set: the training refuses another than the recipe's
        precision = f"ACCELERATE_MIXED_PRECISION={self.config.mixed_precision}"
        on_cpu = f"ACCELERATE_USE_CPU={str(self.config.use_cpu).lower()}"
        return ["env", precision, on_cpu, sys.executable] + list(script)


@dataclass(frozen=True)
class Active:
    """The processes that are really running, or in a check those that a launch would start."""

    world_size: int
    distributed_type: str
    device: str
    wrapped_classes: str = ""  # layer classes that FSDP is told to wrap, with commas between them
    source: str = "the accelerate config"  # who tells it


def plan_launch(
    section: LaunchSection,
    accelerate: str | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
) -> Launch:
    """Return the launch of a recipe's section, with flags that win over it: a config named by a
    flag replaces the section's, and with it the section's numbers.
    """
    config = load_accelerate_config(accelerate or section.accelerate)
    if accelerate is None:
        gpus = gpus or section.gpus
        if nodes is None and section.nodes > 1:
            nodes = section.nodes
    is_single = config.distributed_type == "NO"
    per_machine = 1 if is_single else max(config.num_processes // config.num_machines, 1)
    launch = Launch(config, gpus or per_machine, nodes or config.num_machines)
    if is_single and launch.world_size > 1:
        what = f"{config.path.stem} starts one process, but {launch.world_size} were requested"
        hint = "for several: --accelerate ddp or fsdp; on CPUs ddp_cpu or fsdp_cpu"
        raise RecipeError(what, hint)
    return launch


def place_machine(launch: Launch, rank: int | None, host: str | None, port: int | None) -> Launch:
    """Return the launch with this machine's place in it."""
    if launch.machines == 1:
        if rank is not None or host:
            raise RecipeError("--machine-rank and --main-process-ip also need --nodes")
        return replace(launch, port=port)
    port = port or launch.config.main_process_port or DEFAULT_PORT
    if rank is None or host is None or not 0 <= rank < launch.machines:
        flags = f"--machine-rank N --main-process-ip HOST_OF_RANK_0 --main-process-port {port}"
        what = f"this starts one of {launch.machines} machines, on one shared runs folder"
        raise RecipeError(what, f"run it on each with its N (0 to {launch.machines - 1}): {flags}")
    return replace(launch, rank=rank, address=host, port=port)


def solve_batch(global_batch_size: int, per_device: int, world_size: int) -> int:
    """Return the accumulation steps that make a step see `global_batch_size` examples."""
    micro_batch = per_device * world_size
    accumulation, rest = divmod(global_batch_size, micro_batch)
    if rest == 0 and accumulation > 0:
        return accumulation
    batch = f"{per_device} per device x {world_size} processes = {micro_batch}"
    what = f"run.global_batch_size {global_batch_size} is not a multiple of {batch}"
    hint = f"set it to {(accumulation + 1) * micro_batch}"
    if global_batch_size % world_size == 0:
        # another batch is another experiment, fewer examples at a time are not
        smaller = math.gcd(global_batch_size // world_size, per_device)
        hint = f"keep the batch with train.per_device_train_batch_size: {smaller}, or {hint}"
    raise RecipeError(what, hint)


def planned_steps(rows: int, batch: int, epochs: float, max_steps: int = -1) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the run, for which `max_steps` above 0 wins. A
    step is a whole global batch; the rows that do not fill one are left out of the epoch.
    """
    per_epoch = max(rows // batch, 1)
    if max_steps > 0:
        return per_epoch, max_steps
    return per_epoch, math.ceil(per_epoch * epochs)
