"""The keys of a study file and of one arm in it.

As in `recipe.sections`, each field is a key and each `help` its documentation; the JSON Schema and
the checks are generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recipes_lib.config.schema import fields_of, file_schema
from recipes_lib.config.sections import key

BASE_ARM = "base"


@dataclass(frozen=True, kw_only=True)
class LaunchKeys:
    """How arms are launched; the study's values are the defaults of its arms."""

    accelerate: str | None = key(
        "Name of a file in accelerate_configs/, without .yaml. Absent: the recipe's"
        " launch.accelerate."
    )
    gpus: int | None = key(
        "Processes per node. Absent: the recipe's launch.gpus, else what the accelerate config"
        " says.",
        minimum=1,
    )
    nodes: int | None = key("Machines. Absent: the recipe's launch.nodes.", minimum=1)
    seeds: list[int] | None = key(
        "Values of train.seed; each is a training of its own, and the variance between them enters"
        " the intervals. Absent: the recipe's."
    )
    overrides: list[str] = key(
        "`section.key=value` words, as after `recipes train RECIPE`.", factory=list
    )


@dataclass(frozen=True, kw_only=True)
class ArmSection(LaunchKeys):
    """One variant. A bare path is short for `{recipe: path}`."""

    recipe: str | None = key("The arm's recipe, relative to the study file.")
    cell: dict[str, str] = key(
        "The arm's level of each factor; with one factor it may be absent.", factory=dict
    )
    imported: str | None = key(
        "Name of a run made by `recipes import`: its answers and judgments stand for the arm, and"
        " nothing is trained. A recipe beside it says what was trained, for the list of"
        " differences."
    )
    published_only: bool = key(
        "Nothing but the published numbers stands for this arm: nothing is run, and nothing can be"
        " tested.",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class StudySection(LaunchKeys):
    """A study: a question, the arms that answer it, and how they are evaluated."""

    question: str = field(
        metadata={"help": "What the study is to answer, as one question. It heads the report."}
    )
    factors: dict[str, list[str]] = key(
        "Factor -> the keys it may change (`lora.r`, `quantization`, ...). Every other difference"
        " between arms is listed as a confound. Several factors make a factorial.",
        factory=dict,
    )
    include_base: bool = key(
        "Evaluate the arms' base model too, as the arm `base`; once, however many arms there are.",
        True,
    )
    evals: list[str] = key("Eval recipes, relative to the study file.", factory=list)
    published: str | None = key(
        "Numbers published elsewhere, shown beside ours with their protocol."
    )


def study_schema() -> dict[str, Any]:
    """Return the schema of a study file; an arm is a path or a mapping."""
    keys = fields_of(StudySection)
    arm = {"type": "object", "additionalProperties": False, "properties": fields_of(ArmSection)}
    arms = {
        "type": "object",
        "description": "Name -> arm. A bare path is short for {recipe: path}.",
        "minProperties": 1,
        "additionalProperties": {"anyOf": [{"type": "string"}, arm]},
    }
    order = [
        "question",
        "factors",
        "arms",
        "accelerate",
        "gpus",
        "nodes",
        "seeds",
        "overrides",
        "include_base",
        "evals",
        "published",
    ]
    properties = {**keys, "arms": arms}
    required, ordered = ["question", "arms"], {key: properties[key] for key in order}
    return file_schema("study", "A study", required=required, properties=ordered)
