"""NOTICE: whose model this was made from, and under which terms, as far as the base's own files
say.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from recipes_lib.config.model_files import local_folder
from recipes_lib.core.errors import RecipesError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

TERMS = re.compile(r"^(licen[sc]e|notice|use_policy|copying)([._-].*)?$", re.IGNORECASE)
COPIES = "base_license"


def write_notice(folder: Path, recipe: Recipe, name: str, holds_base: bool) -> None:
    """Write NOTICE, and copy the base's licence files into `base_license/`.

    Args:
        folder: the export.
        recipe: the run's recipe, to find the base's files on this machine.
        name: what to call the base.
        holds_base: whether the exported weights contain the base's, not only a difference to them.
    """
    base = _base_folder(recipe)
    terms = (
        [file for file in sorted(base.iterdir()) if file.is_file() and TERMS.match(file.name)]
        if base
        else []
    )
    for file in terms:
        (folder / COPIES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / COPIES / file.name)
    revision = f", revision {recipe.model.revision}" if recipe.model.revision else ""
    licence = _stated_licence(base)
    contents = (
        "contain the base's weights, changed"
        if holds_base
        else "are a difference to the base's weights; they do not contain them"
    )
    lines = [
        f"Made from the base model {name}{revision}.",
        f"These weights {contents}.",
        (
            f"Licence of the base, as its model card states it: {licence}."
            if licence
            else (
                "The base's files on the training machine state no licence: read it on the model's"
                " page before you pass this on."
            )
        ),
    ]
    if terms:
        lines.append(f"Its own terms are in {COPIES}/: {', '.join(file.name for file in terms)}.")
    lines.append(
        "The licence of the training data is not covered here: see data.source in recipe.yaml."
    )
    (folder / "NOTICE").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _base_folder(recipe: Recipe) -> Path | None:
    try:
        return local_folder(recipe)
    except RecipesError:
        return None


def _stated_licence(base: Path | None) -> str | None:
    """Return the `license` of the base's model card."""
    card = base / "README.md" if base else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    found = (
        header.get("license_name") or header.get("license") if isinstance(header, dict) else None
    )
    return str(found) if found else None
