"""The configurations of models: of a folder, of the Hub, or of the models that people fine-tune, so
that a plan needs neither weights nor the Hub.

Known ones stand in `recipes/FOLDER/model.json` for the folder's model, and in
`recipes/models.jsonl`, one object a line, for others; also in a folder `recipes` of the working
directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import project_root, shown_path

_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "n_embd", "d_model")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model without its files.

    Args:
        names: repositories that say the same in their config.json.
        source: where the numbers were read.
        license: as the model card names it; None where it was not looked up.
        gated: whether the Hub gives the files only after an agreement.
    """

    names: tuple[str, ...]
    source: str
    config: Mapping[str, Any]
    license: str | None = None
    gated: bool = False


def known_facts() -> dict[str, ModelFacts]:
    """Return repository name -> facts.

    Raises:
        RecipeError: a file of facts cannot be read.
    """
    folders = {folder.resolve(): None for folder in (project_root() / "recipes", Path("recipes"))}
    return {name: facts for folder in folders for facts in _facts(folder) for name in facts.names}


@lru_cache(maxsize=4)
def _facts(folder: Path) -> tuple[ModelFacts, ...]:
    others = folder / "models.jsonl"
    texts = [(file, file.read_text("utf-8")) for file in sorted(folder.glob("*/model.json"))]
    if others.is_file():
        texts += [(others, line) for line in others.read_text("utf-8").splitlines() if line]
    found = []
    for file, text in texts:
        try:
            values = json.loads(text)
            facts = ModelFacts(**{**values, "names": tuple(map(str, values["names"]))})
        except (ValueError, TypeError, LookupError):
            facts = None
        if facts is None or not isinstance(facts.config, dict) or not facts.source:
            form = '{"names": [...], "source": "...", "config": {"model_type": ...}}'
            raise RecipeError("cannot be read", f"a model is {form}", file=shown_path(file))
        found.append(facts)
    return tuple(found)


def known_config(name: str) -> Mapping[str, Any] | None:
    """Return the config.json of a local folder or of a known model, else None."""
    if Path(name).is_dir():
        return object_or_none(Path(name) / "config.json")
    try:
        facts = known_facts().get(name)
    except RecipeError:
        return None
    return facts.config if facts is not None else None


def widest(name: str) -> int | None:
    """Return the largest width of a model's matrices, above which no LoRA rank makes sense."""
    config = known_config(name)
    if config is None:
        return None
    text = config.get("text_config") or config
    widths = [text[key] for key in _WIDTHS if isinstance(text.get(key), int)]
    return max(widths, default=None)
