"""`make schema`: writes config/upstream.json of TRL and PEFT, and schema/*.schema.json of ours."""

import dataclasses
import enum
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import Values
from recipes_lib.config.recipe import DPO, RecipeFile
from recipes_lib.config.upstream_sections import UPSTREAM_FILE, TrainSection, preference_section
from recipes_lib.core.project import project_root
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.slurm.profile import Profile
from recipes_lib.study.config import StudyFile

_SCALARS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "None", Any: "object"}


def main() -> int:
    """Write the files. A second call writes the schemas of fields that upstream has changed."""
    for path, text in generated_files().items():
        path.write_text(text, encoding="utf-8")
    return 0


def generated_files() -> dict[Path, str]:
    """Return the path and text of each file."""
    contents: dict[Path, Values] = {UPSTREAM_FILE: upstream_sections()}
    for model in (RecipeFile, EvalRecipe, StudyFile, Profile):
        schema = model.model_json_schema()
        if model in (RecipeFile, EvalRecipe):
            # a file may extend another one, which then has the required keys
            for part in (schema, *schema["$defs"].values()):
                part.pop("required", None)
            names = {"type": "array", "items": {"type": "string"}}
            schema["properties"]["extends"] = {"anyOf": [{"type": "string"}, names]}
        if model is RecipeFile:
            _add_stages(schema)
        contents[project_root() / "schema" / f"{model.kind}.schema.json"] = schema
    writer = json.JSONEncoder(indent=1, ensure_ascii=False)
    return {path: writer.encode(content) + "\n" for path, content in contents.items()}


def _add_stages(schema: Values) -> None:
    """Let the value of `stage` decide what an editor offers in `train`."""
    of_pairs = preference_section().model_json_schema()
    fields = preference_section().model_fields
    for key in sorted(TrainSection.model_fields.keys() - fields.keys()):
        of_pairs["properties"][key] = {"type": "null"}  # which drops a key of the base
    schema["$defs"][of_pairs["title"]] = of_pairs
    of_sft = schema["properties"].pop("train")
    schema["properties"]["train"] = {}  # a property of both
    schema["if"] = {"properties": {"stage": {"const": DPO}}, "required": ["stage"]}
    schema["then"] = {"properties": {"train": {"$ref": f"#/$defs/{of_pairs['title']}"}}}
    schema["else"] = {"properties": {"train": of_sft}}


def upstream_sections() -> Values:
    """Return key -> type as Python writes it, text and default, of the upstream sections; of dpo
    what differs from `train`, null for what DPOConfig lacks.
    """
    import torch
    from peft import LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import DPOConfig, SFTConfig

    train = _fields(SFTConfig)
    trackers = f"Literal{['none', *sorted(INTEGRATION_TO_CALLBACK)]}"
    train["report_to"]["type"] = f"{trackers} | list[{trackers}]"
    backends = torch.compiler.list_backends(exclude_tags=())
    train["torch_compile_backend"]["type"] = f"Literal{backends} | None"
    of_pairs = _fields(DPOConfig)
    of_pairs["loss_type"]["default"] = "sigmoid"  # TRL's, a list of one
    dpo: Values = {key: None for key in train if key not in of_pairs}
    for key, field in of_pairs.items():
        if key not in train or field.get("default") != train[key].get("default"):
            dpo[key] = field
    return {"train": train, "dpo": dpo, "lora": _fields(LoraConfig)}


def _fields(cls: Any) -> Values:
    hints = typing.get_type_hints(cls)
    fields: Values = {}
    for field in dataclasses.fields(cls):
        choices = field.metadata.get("choices")
        kind = f"Literal{list(choices)}" if choices else _type_text(hints[field.name])
        text = field.metadata.get("help", "").replace("%%", "%")  # argparse's percent sign
        fields[field.name] = {"type": kind, "description": " ".join(text.split())}
        default = field.default
        if isinstance(default, enum.Enum):
            default = default.value
        if default is None or isinstance(default, bool | int | float | str | list):
            fields[field.name]["default"] = default
    return fields


def _type_text(hint: Any) -> str:
    """Return a type as Python writes it."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Literal:
        return f"Literal{list(arguments)}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"Literal{[member.value for member in hint]}"
    if origin in (typing.Union, types.UnionType):
        kinds = {_type_text(member) for member in arguments}
        if any(kind.startswith(("Literal", "Values")) for kind in kinds):
            kinds -= {"str"}  # text beside an enum or a mapping is for upstream's command line
        return " | ".join(sorted(kinds))  # typing's caches decide the order
    if origin is list:
        return f"list[{_type_text(arguments[0])}]"
    if list in (origin, hint) or tuple in (origin, hint):
        return "list[object]"
    return _SCALARS.get(hint, "Values")


if __name__ == "__main__":
    sys.exit(main())
