"""An accelerate config file, read without torch: what a launch with it asks for.

`recipes check` checks these files too: most keys that accelerate does not know would be taken
silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, load
from recipes_lib.config.yaml_source import no_such_file
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root

DISTRIBUTED_TYPES = ("NO", "MULTI_GPU", "FSDP")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
# Every key that `accelerate config` writes (accelerate.commands.config.config_args.ClusterConfig)
# stands in one of these three.
_KEYS_TEXT = """
    compute_environment debug distributed_type dynamo_config enable_cpu_affinity fsdp_config
    gpu_ids machine_rank main_process_ip main_process_port main_training_function mixed_precision
    num_machines num_processes rdzv_backend same_network use_cpu
"""
_KEYS = frozenset(_KEYS_TEXT.split())
# Read for TPUs only, which no distributed_type here means; `accelerate config` writes some of them
# into every file.
_TPU_KEYS = """
    tpu_name tpu_zone tpu_use_cluster tpu_use_sudo tpu_vm tpu_env command_file commands
    downcast_bf16
"""
_WITHOUT_EFFECT = frozenset(_TPU_KEYS.split())
_REFUSED = {
    "deepspeed_config": (
        "DeepSpeed is not supported; use distributed_type: FSDP (accelerate_configs/fsdp.yaml)"
    ),
    "megatron_lm_config": (
        "Megatron is not supported; use distributed_type: FSDP (accelerate_configs/fsdp.yaml)"
    ),
    "parallelism_config": "only data parallelism and FSDP2 are supported; remove it",
    "fp8_config": "training in fp8 is not supported; remove it",
    "mpirun_config": (
        "processes on CPUs are started without MPI: MULTI_GPU with use_cpu: true"
        " (accelerate_configs/ddp_cpu.yaml)"
    ),
}
# The last five are of FSDP1, without effect under FSDP2.
_FSDP_TEXT = """
    fsdp_version fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params
    fsdp_reshard_after_forward fsdp_offload_params fsdp_cpu_ram_efficient_loading
    fsdp_state_dict_type fsdp_activation_checkpointing
    fsdp_backward_prefetch fsdp_forward_prefetch fsdp_use_orig_params fsdp_sync_module_states
    fsdp_sharding_strategy
"""
_FSDP_KEYS = frozenset(_FSDP_TEXT.split())


@dataclass(frozen=True)
class AccelerateConfig:
    """What an accelerate config file asks for."""

    path: Path
    distributed_type: str = "NO"
    num_processes: int = 1
    num_machines: int = 1
    main_process_port: int | None = None
    use_cpu: bool = False
    mixed_precision: str = "no"
    fsdp: dict[str, Any] = field(default_factory=dict)


def accelerate_config_path(name_or_path: str | Path) -> Path:
    """Return the file of a config given by name (a file in accelerate_configs/) or by path.

    Raises:
        RecipeError: there is no such file; the message lists what exists.
    """
    given = Path(name_or_path)
    if given.suffix in (".yaml", ".yml", ".json"):
        if not given.is_file():
            raise no_such_file(given, str(name_or_path))
        return given
    folder = project_root() / "accelerate_configs"
    path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(entry.stem for entry in folder.glob("*.yaml"))
        near = did_you_mean(str(name_or_path), names)
        raise RecipeError(
            f"launch.accelerate '{name_or_path}' is not a file in accelerate_configs/",
            *near,
            f"there are {', '.join(names) or 'none'}",
        )
    return path


def load_accelerate_config(name_or_path: str | Path) -> AccelerateConfig:
    """Return the accelerate config of that name or path.

    Raises:
        RecipeError: no such file, not an accelerate config, or values accelerate cannot act on.
    """
    path = accelerate_config_path(name_or_path)
    values = load(path, "accelerate").values
    read = {one.name: values[one.name] for one in fields(AccelerateConfig) if one.name in values}
    return AccelerateConfig(path, fsdp=values.get("fsdp_config") or {}, **read)


def precision_conflict(train: Mapping[str, Any], asked: str, asked_by: str) -> list[str]:
    """Return what is wrong, then what to do, where a launch asks for another mixed precision than
    the recipe: it would win, unsaid.

    Args:
        train: the recipe's `train` section.
        asked: `mixed_precision` of the launch; `no` leaves it to the recipe.
        asked_by: what asks for it, for the message.

    Example:
        >>> precision_conflict({"bf16": False}, "bf16", "mine.yaml")[0]
        'mine.yaml asks for mixed_precision bf16, but the recipe for none (train.bf16: false)'
        >>> precision_conflict({"bf16": True}, "bf16", "mine.yaml")
        []
    """
    half = "fp16" if train.get("fp16") else None if train.get("bf16") is False else "bf16"
    if asked.lower() in ("no", half):
        return []
    wanted = f"{half} (train.{half}: true)" if half else "none (train.bf16: false)"
    hint = (
        "leave it to the recipe: mixed_precision: 'no' in the accelerate config, no"
        " --mixed_precision, no ACCELERATE_MIXED_PRECISION"
    )
    other = asked.lower() in MIXED_PRECISIONS
    return [
        f"{asked_by} asks for mixed_precision {asked}, but the recipe for {wanted}",
        hint,
        *([f"or set train.{asked.lower()}: true in the recipe"] if other else []),
    ]


def processes_per_machine(config: AccelerateConfig) -> int:
    """Return how many processes the config starts on each machine."""
    if config.distributed_type == "NO":
        return 1
    return max(config.num_processes // config.num_machines, 1)


class AccelerateRules(KindRules):
    """Rules of accelerate configs, which have no schema of ours; the model's layer names are
    checked with the recipe.
    """

    has_schema = False

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what is wrong with an accelerate config."""
        values, fsdp = document.values, document.values.get("fsdp_config") or {}
        for key, why in _REFUSED.items():
            if values.get(key):
                yield document.error((key,), f"{key} cannot be used here", why)
        for key in (key for key in values if key not in _KEYS | _WITHOUT_EFFECT | _REFUSED.keys()):
            what = f"unknown key '{key}' in an accelerate config"
            yield document.error((key,), what, *did_you_mean(key, _KEYS))
        if not isinstance(fsdp, dict):
            yield document.error(("fsdp_config",), "fsdp_config must be a mapping")
            return
        for key in (key for key in fsdp if key not in _FSDP_KEYS):
            what, near = f"unknown key 'fsdp_config.{key}'", did_you_mean(key, _FSDP_KEYS)
            yield document.error(("fsdp_config", key), what, *near)
        for path, what, *hints in _wrong_values(values, fsdp):
            yield document.error(path, what, *hints)


def _wrong_values(values: dict[str, Any], fsdp: dict[str, Any]) -> Iterator[Any]:
    """Yield the key, what is wrong with its value, and hints."""
    kind, precision = values.get("distributed_type", "NO"), values.get("mixed_precision", "no")
    if kind is False:
        yield ("distributed_type",), "distributed_type NO is read as false; quote it: 'NO'"
    elif kind not in DISTRIBUTED_TYPES:
        hint = did_you_mean(str(kind), DISTRIBUTED_TYPES)
        if kind == "MULTI_CPU":
            hint = ["MULTI_CPU starts one process; use MULTI_GPU with use_cpu: true"]
        what = f"distributed_type '{kind}' is not supported; one of {', '.join(DISTRIBUTED_TYPES)}"
        yield ("distributed_type",), what, *hint
    if precision is False:
        yield ("mixed_precision",), "mixed_precision no is read as false; quote it: 'no'"
    elif precision == "fp8":
        what = "the training would compute in the recipe's precision"
        hint = ["write mixed_precision: 'no'; the recipe decides (train.bf16, train.fp16)"]
        yield ("mixed_precision",), f"mixed_precision fp8 is not supported: {what}", *hint
    elif precision not in MIXED_PRECISIONS:
        what = f"mixed_precision '{precision}' is none of {', '.join(MIXED_PRECISIONS)}"
        yield ("mixed_precision",), what
    for key, least in (("num_processes", 1), ("num_machines", 1), ("main_process_port", 0)):
        number = values.get(key, least)
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            yield (key,), f"{key} must be a whole number >= {least}, got {number!r}"
    if not isinstance(values.get("use_cpu", False), bool):
        yield ("use_cpu",), "use_cpu must be true or false"
    if kind != "FSDP":
        return
    if fsdp.get("fsdp_version") != 2:
        what = "fsdp_config.fsdp_version must be 2: FSDP1 is deprecated upstream"
        yield ("fsdp_config", "fsdp_version"), what
    if fsdp.get("fsdp_state_dict_type", "SHARDED_STATE_DICT") != "FULL_STATE_DICT":
        what = "must be FULL_STATE_DICT: a sharded final save writes no adapter"
        key = "fsdp_state_dict_type"
        yield ("fsdp_config", key), f"fsdp_config.{key} {what}"
