"""What differs between two arms: keys of their recipes, and what their runs recorded.

Each difference has a level. A `cause` is a key that a factor declares, `tuned` a key of which each
arm has its best value of one grid, a `confound` anything else that may change what is learnt, and a
`note` what changes no result. Without a study nothing is declared.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.runs import ArmRuns, Run
from recipes_lib.analysis.text import setting_text
from recipes_lib.config.recipe import DPO, RecipeFile, keys_of, preference_file
from recipes_lib.core.environment import EVALUATION_PACKAGES
from recipes_lib.core.files import DataError, hash_of, read_object
from recipes_lib.training.resume_guard import FREE_KEYS, flatten

Level = Literal["cause", "tuned", "confound", "note"]
KeyValues = Mapping[str, Any]  # by dotted key
SEED = "train.seed"
EXAMPLES_PER_STEP = "launch.examples_per_step"
OF_RUN = ("run.name", "run.notes", "run.tags")  # they say nothing of what is learnt
_BEST = "train.load_best_model_at_end"
_CHECKPOINT_CHOICE = ("eval_steps", "save_steps", "eval_strategy", "save_strategy", "eval_on_start")
# They decide how the same mathematics is cut into pieces, or where a job runs.
_SAME_MATHEMATICS = (
    "train.activation_checkpointing",
    "train.activation_checkpointing_kwargs",
    "train.gradient_checkpointing",
    "train.gradient_checkpointing_kwargs",
    "train.per_device_train_batch_size",
    "train.per_device_eval_batch_size",
    "train.gradient_accumulation_steps",
    "train.ddp_find_unused_parameters",
    "train.torch_compile",
    "launch.accelerate",
    "launch.gpus",
    "launch.nodes",
)
_OF_BATCH = (
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "launch.world_size",
)
_GLOBAL_BATCH = "run.global_batch_size"
_DATA = ("data", "data.source", "data.split", "data.max_examples", "data.filters")
_MODEL = ("model", "model.name_or_path", "model.revision")
_PROMPT = ("data", "data.prompt_format", "data.chat_template", "data.chat_template_kwargs")
_LAUNCH = ("launch", "launch.accelerate", "launch.gpus", "launch.world_size")
_LENGTH = ("train.num_train_epochs", "train.max_steps", "train.max_length", "train.packing")
_OF_STEPS = (_GLOBAL_BATCH, *_DATA, *_OF_BATCH, *_LENGTH)
NOT_RECORDED = "not recorded"
# The keys by which a factor declares what runs recorded.
_DECLARED_BY: Mapping[str, Sequence[str]] = {
    "training data": _DATA,
    "weights of the base": _MODEL,
    "prompt format": _PROMPT,
    "processes": _LAUNCH,
    "distribution": _LAUNCH,
    "optimizer steps": _OF_STEPS,
}
# Every training writes these (run.json's guard and environment.json). Where a file is gone, nobody
# knows whether two arms were alike in them.
_ALWAYS_RECORDED = ("training data", "prompt format", "hardware", "torch")


@dataclass(frozen=True)
class Difference:
    """One thing that two arms have differently."""

    what: str
    first: str
    second: str
    level: Level

    @property
    def is_unknown(self) -> bool:
        """Whether neither arm recorded it, so that nobody knows whether they differ."""
        return self.first == self.second == NOT_RECORDED

    @property
    def text(self) -> str:
        """The difference inside a sentence."""
        if self.is_unknown:
            return f"{self.what} ({NOT_RECORDED} in either arm)"
        return f"{self.what} ({self.first} against {self.second})"


def arm_differences(
    first: ArmRuns, second: ArmRuns, design: Design | None = None
) -> list[Difference]:
    """Return what differs between two trained arms, first the recipes' keys."""
    if first.is_base or second.is_base:
        return []
    values = _with_batch(arm_values(first, design))
    other_values = _with_batch(arm_values(second, design))
    differences = []
    for key in dict.fromkeys([*values, *other_values]):
        value = _value(key, values)
        other_value = _value(key, other_values)
        if value != other_value and not key.startswith("tune."):
            difference = Difference(
                what=key,
                first=setting_text(value),
                second=setting_text(other_value),
                level=_level(key, values, other_values, design),
            )
            differences.append(difference)
    facts = _facts_of_arm(first, design)
    other_facts = _facts_of_arm(second, design)
    for name in facts | other_facts:
        texts = facts.get(name, {NOT_RECORDED})
        other_texts = other_facts.get(name, {NOT_RECORDED})
        # What an arm must record and one of its runs did not may differ, in both arms too.
        if texts != other_texts or NOT_RECORDED in texts:
            # Only here, after they were compared whole, are long values cut.
            difference = Difference(
                what=name,
                first=" and ".join(setting_text(text) for text in sorted(texts)),
                second=" and ".join(setting_text(text) for text in sorted(other_texts)),
                level="confound",
            )
            differences.append(difference)
    return differences


def _facts_of_arm(arm: ArmRuns, design: Design | None) -> dict[str, set[str]]:
    """What the runs of an arm recorded and no factor declares: the whole values, each once."""
    facts_by_run = [_recorded_facts(run) for run in arm.runs]
    if not facts_by_run:
        return {}
    texts: dict[str, set[str]] = {}
    for name in dict.fromkeys(itertools.chain(_ALWAYS_RECORDED, *facts_by_run)):
        keys = _DATA if name.endswith(" rows") else _DECLARED_BY.get(name, ())
        if design is None or not design.declares(*keys):
            texts[name] = {str(facts.get(name, NOT_RECORDED)) for facts in facts_by_run}
    return texts


def arm_values(arm: ArmRuns, design: Design | None) -> KeyValues:
    """Return the values of an arm by dotted key: as the study resolves them, else as recorded."""
    if design is not None and design.values.get(arm.name):
        return design.values[arm.name]
    resolved = [run.resolved for run in arm.runs if run.resolved]
    if not resolved:
        return {}
    flat = flatten(dict(resolved[0]))
    values = {key: value for key, value in flat.items() if key not in OF_RUN}
    world_size = (arm.runs[0].state.get("guard") or {}).get("launch.world_size")
    if world_size is not None:
        values["launch.world_size"] = world_size
    seeds = sorted({run.seed for run in arm.runs if run.seed is not None})
    if len(seeds) > 1:
        values[SEED] = seeds
    return values


def _level(key: str, first: KeyValues, second: KeyValues, design: Design | None) -> Level:
    if not changes_result(key, first, second):
        return "note"
    grid = f"tune.{key}"
    if grid in first and first.get(grid) == second.get(grid):
        return "tuned"
    if design is None:
        return "confound"
    if key != EXAMPLES_PER_STEP:
        return "cause" if design.factor_of(key) else "confound"
    sources = [key for key in (_GLOBAL_BATCH, *_OF_BATCH) if first.get(key) != second.get(key)]
    is_declared = bool(sources) and all(design.factor_of(source) for source in sources)
    return "cause" if is_declared else "confound"


def changes_result(key: str, first: KeyValues, second: KeyValues) -> bool:
    """Return whether a key can change what is learnt."""
    section, _, name = key.partition(".")
    if key == SEED:
        return False  # chance, and no cause
    if section == "train" and name in _CHECKPOINT_CHOICE:  # the best checkpoint is one of these
        return bool(first.get(_BEST) or second.get(_BEST))
    return key not in _SAME_MATHEMATICS and not (section == "train" and FREE_KEYS.match(name))


def _with_batch(values: KeyValues) -> KeyValues:
    """The values with the examples per optimizer step, which follow from several keys."""
    if values.get(_GLOBAL_BATCH) is not None:
        return {**values, EXAMPLES_PER_STEP: int(values[_GLOBAL_BATCH])}
    factors = [_value(key, values) for key in _OF_BATCH]
    if None in factors:
        return values
    return {**values, EXAMPLES_PER_STEP: math.prod(factors)}


def _value(key: str, values: KeyValues) -> Any:
    """The value of a key, its default where it is absent; None in a section that is absent."""
    if values.get(key) is not None:
        return values[key]
    section, dot, _ = key.partition(".")
    if dot and not any(name.startswith(f"{section}.") for name in values):
        return None
    model = preference_file() if values.get("stage") == DPO else RecipeFile
    return keys_of(model).get(key, {}).get("default")


def base_weights(run: Run) -> str:
    """Return the hash of the weights that a training began with; of a base, of those it is."""
    records = [run.state, run.state.get("weights_check") or {}]
    for name in ("adapter", "model"):
        with suppress(DataError):
            records.append(read_object(run.folder / name / "weights_check.json"))
    for record in records:
        if record.get("base_fingerprint"):
            return str(record["base_fingerprint"])[:12]
    return ""


def code_text(git: Mapping[str, Any] | None) -> str:
    """Return the commit that wrote something; nothing where it is not known."""
    git = git or {}
    commit = str(git.get("commit") or "")[:12]
    if commit and git.get("dirty"):
        return f"{commit} with changes"
    return commit


def _recorded_facts(run: Run) -> dict[str, Any]:
    """What a run recorded, by name."""
    guard = run.state.get("guard") or {}
    # of the hardware its class: the kinds of devices, whatever their number and memory
    devices = run.environment.get("devices") or []
    kinds = sorted({str(device).partition(",")[0] for device in devices})
    code = code_text(run.environment.get("git"))
    if code.endswith("changes"):  # nobody knows which, so no two runs have the same code
        code += f" of {run.name}"
    facts = {
        "training data": str(guard.get("data_fingerprint") or "")[:12],
        "weights of the base": base_weights(run),
        "prompt format": str(guard.get("prompt_format_hash") or "")[:12],
        "processes": guard.get("launch.world_size"),
        "distribution": guard.get("launch.distribution"),
        "optimizer steps": (run.state.get("summary") or {}).get("steps"),
        "hardware": "; ".join(kinds),
        "code": code,
    }
    for name, part in run.splits.items():
        if isinstance(part, dict) and "count" in part:
            ids = hash_of(sorted(map(str, part.get("ids", []))))[:12]
            facts[f"{name} rows"] = f"{part['count']} ({ids})"
    for name, version in (run.environment.get("libraries") or {}).items():
        # what evaluates is compared with the evaluations
        if name not in EVALUATION_PACKAGES:
            facts[name] = version
    return {name: value for name, value in facts.items() if value not in (None, "")}
