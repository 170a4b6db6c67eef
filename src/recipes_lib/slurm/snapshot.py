"""A copy of everything a queued job reads from YAML: later edits of a recipe must not change what
was submitted.

The files keep their places relative to each other, so names, `extends` and relative paths mean what
they meant. Data is not copied: a link stands where a recipe looks for it, and the training itself
refuses rows that changed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from recipes_lib.compare.design import Study
from recipes_lib.config.loader import COMMAND_LINE, Origin
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.project import shown_path
from recipes_lib.data.sources import listed_sources
from recipes_lib.eval_recipe import EvalRecipe


class Snapshot:
    """Files to copy, and where each of them will lie.

    Args:
        folder: where the copies go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copies: set[Path] = set()
        self.links: set[Path] = set()

    def add_recipe(self, recipe: Recipe) -> None:
        """Add a recipe, what it extends, its chat template, and links to its data."""
        self.add_files(recipe.path, *_written_in(recipe.origins.values()))
        written = dataclasses.replace(recipe.data, **recipe.as_written)
        pairs = zip(listed_sources(written), listed_sources(recipe.data), strict=True)
        for name, place in ((one.source, Path(other.source)) for one, other in pairs):
            if _is_relative(name) and place.exists():
                self.links.add(place)
        template = Path(recipe.data.chat_template or "")
        if _is_relative(recipe.as_written.get("chat_template", "/")) and template.is_file():
            self.add_files(template)

    def add_eval(self, recipe: EvalRecipe) -> None:
        """Add an eval recipe, its judge with prompts and rubrics, and links to its questions."""
        document = recipe.document
        self.add_files(recipe.path, *_written_in(document.origins.values()))
        for key in ("questions", "references", "include_path", "folder"):
            if name := getattr(recipe.data, key):
                self.links |= _beside(document.folder(("data", key)), name)
        if recipe.judge is not None:
            judge, folder = recipe.judge.judge, recipe.judge.path.parent
            prompts = (judge.relative_prompt, judge.absolute_prompt)
            files = _beside(folder, *prompts, judge.rubric, judge.reference_rubric)
            self.add_files(recipe.judge.path, *(path for path in files if path.is_file()))

    def add_study(self, study: Study) -> None:
        """Add a study, the recipes of its arms, its evals and the published numbers."""
        self.add_files(study.path, *([study.published] if study.published else []))
        for arm in study.arms:
            if arm.recipe is not None:
                self.add_recipe(arm.recipe)
        for one in study.evals:
            self.add_eval(one)

    def add_files(self, *paths: Path) -> None:
        """Add single files."""
        self.copies |= set(map(_absolute, paths))

    def _around(self) -> set[Path]:
        """Return the links that other files lie below: they come to be as folders."""
        above = {parent for path in (*self.copies, *self.links) for parent in path.parents}
        return self.links & above

    @property
    def root(self) -> Path:
        """The folder above all files and their own folders: those give runs and evals
        their names.
        """
        around = self._around()
        paths = (*self.copies, *self.links)
        return Path(os.path.commonpath([p if p in around else p.parent for p in paths])).parent

    def place(self, path: Path) -> Path:
        """Return where the copy of a file will lie."""
        return self.folder / _absolute(path).relative_to(self.root)

    def shown(self, path: Path) -> str:
        """Return where the copy will lie, as a user would type it."""
        return shown_path(self.place(path))

    def write(self) -> None:
        """Copy and link, over what an earlier submission left, and note where it all comes from."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.folder.with_suffix(".origin"), f"{self.root.resolve()}\n")
        for path in sorted(self.copies):
            self.place(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.place(path))
        for path in sorted(self.links - self._around()):
            place = self.place(path)
            if not place.exists() and not any(above.is_symlink() for above in place.parents):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path)


def _absolute(path: Path) -> Path:
    """The path with the links in it kept: two recipes beside each other stay beside each other."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve would follow links)


def _written_in(origins: Iterable[Origin]) -> set[Path]:
    """Return the files in which values were written."""
    files = {Path(origin.file) for origin in origins if origin.file != COMMAND_LINE}
    return {file for file in files if file.is_file()}


def _beside(folder: Path, *names: str) -> set[Path]:
    """Return what lies at relative names in a folder; absolute paths and Hub ids need nothing."""
    relative = (folder / name for name in names if not Path(name).is_absolute())
    return {_absolute(path) for path in relative if path.exists()}


def _is_relative(name: str) -> bool:
    """Whether a copied recipe would look for this path beside itself."""
    return not name.startswith("~") and not Path(name).is_absolute()
