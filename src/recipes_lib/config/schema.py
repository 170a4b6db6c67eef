"""`make schema`: writes what the installed TRL, PEFT and transformers say into the repository.

`config/upstream.json` holds the keys of the three upstream sections; schema/*.schema.json, from
which editors complete and check, are made of the pydantic models. `--check` says what would change.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import RecipeFile
from recipes_lib.config.upstream import UPSTREAM_FILE
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.slurm.profile import Profile
from recipes_lib.study.config import study_schema

_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_MAY_BE_INHERITED = ("RecipeFile", "ModelSection", "DataSection", "EvalRecipe", "JudgeSection")
SCHEMAS: dict[str, Callable[[], Any]] = {
    "recipe": lambda: _editable(RecipeFile.model_json_schema()),
    "eval": lambda: _editable(EvalRecipe.model_json_schema()),
    "study": study_schema,
    "profile": Profile.model_json_schema,
}


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with `--check` say which would change."""
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    changed = _written({UPSTREAM_FILE: upstream_sections()}, check)
    if changed and not check:  # this process has made its models of the old fields
        print(f"wrote: {changed[0]}", flush=True)
        return subprocess.call([sys.executable, "-m", "recipes_lib.config.schema"])
    folder = project_root() / "schema"
    schemas = {folder / f"{name}.schema.json": schema() for name, schema in SCHEMAS.items()}
    changed += _written(schemas, check)
    word = "out of date (make schema)" if check else "wrote"
    print(f"{word}: {', '.join(changed)}" if changed else "schema/ is up to date")
    return int(check and bool(changed))


def _written(files: dict[Path, Any], check: bool) -> list[str]:
    """Return the files with another content than they should have; write them unless `check`."""
    changed = []
    for path, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed.append(shown_path(path))
            if not check:
                path.write_text(text, encoding="utf-8")
    return changed


def _editable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a file that may extend another, which then has the required keys."""
    for part in (schema, *schema["$defs"].values()):
        if part["title"] in _MAY_BE_INHERITED:
            part.pop("required", None)
    one_or_more = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = one_or_more
    return schema


def upstream_sections() -> dict[str, Any]:
    """Return key -> JSON Schema, with text and default, of the three upstream sections."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    train = _fields(SFTConfig)
    trackers = {"enum": ["none", *sorted(INTEGRATION_TO_CALLBACK)]}
    train["report_to"]["anyOf"] = [trackers, {"type": "array", "items": trackers}]
    quantization = _documented_arguments(BitsAndBytesConfig)
    return {"train": train, "lora": _fields(LoraConfig), "quantization": quantization}


def _fields(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        schema = _schema(hints[field.name])
        if choices := field.metadata.get("choices"):
            schema = {"enum": [*choices]}
        schema["description"] = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = default.value if isinstance(default, enum.Enum) else default
        if default is None or isinstance(default, bool | int | float | str | list):
            schema["default"] = default
        fields[field.name] = schema
    return fields


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if origin in (typing.Union, types.UnionType):
        # text beside an enum or a mapping only exists for upstream's command line
        kinds = [typing.get_origin(member) or member for member in arguments]
        parsed = any(
            isinstance(kind, type) and issubclass(kind, dict | enum.Enum) for kind in kinds
        )
        parts = [_schema(member) for member in arguments if not (parsed and member is str)]
        # typing's caches decide the order of a union: it is sorted, null last
        parts.sort(key=lambda part: (part.get("type") == "null", json.dumps(part)))
        different = [part for index, part in enumerate(parts) if part not in parts[:index]]
        return different[0] if len(different) == 1 else {"anyOf": different}
    if list in (origin, hint) or tuple in (origin, hint):
        items = {"items": _schema(arguments[0])} if arguments and origin is list else {}
        return {"type": "array", **items}
    return {"type": "object"}


def _documented_arguments(cls: Any) -> dict[str, Any]:
    """Return the arguments of a class that is no dataclass, typed by its docstring."""
    kinds = {kind.__name__: name for kind, name in _SCALARS.items()} | {"list[str]": "array"}
    entry = r"^ {4}(\w+) \(`([^`]+)`.*\):\n((?: {8,}.+\n)+)"
    entries = re.findall(entry, inspect.getdoc(cls) or "", re.MULTILINE)
    documented = {name: (kind, " ".join(text.split())) for name, kind, text in entries}
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            kind, text = documented.get(name, ("", ""))
            schema: dict[str, Any] = {"type": kinds.get(kind, "string")}
            if parameter.default is None:
                schema = {"anyOf": [schema, {"type": "null"}]}
            arguments[name] = {**schema, "description": text, "default": parameter.default}
    return arguments


if __name__ == "__main__":
    sys.exit(main())
