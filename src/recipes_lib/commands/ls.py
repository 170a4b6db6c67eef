"""recipes ls: the recipes of this project and of the working directory, by model."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import Document, load_document
from recipes_lib.config.recipe import Recipe, recipe_from
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, say, say_json
from recipes_lib.models.known import ModelFacts, known_facts, named_shape
from recipes_lib.models.shapes import ModelShape
from recipes_lib.planning.cards import CARDS, DEFAULT, card_named, cpu_card
from recipes_lib.planning.lengths import Lengths, lengths_of
from recipes_lib.planning.plan import plan_launched

_START = "start-here"
LARGEST_DATA = 300_000  # bytes; reading more would keep the list waiting
# Keys of the YAML files of other kinds under recipes/, which are not read further.
_OTHERS = re.compile(r"^(question|arms|tables):", re.M)
# Of more rows than this every fortieth length is planned with, and the longest: nearly the same.
_MANY_ROWS, _EVERY = 2_000, 40
# What a card is sold as, GB, and what a process can see of it, GiB.
_SIZES = sorted(
    {
        int(size[1]): min(card.memory_gib for card in CARDS if card.name.endswith(size[0]))
        for card in CARDS
        if "mig" not in card.name and (size := re.search(r"-(\d+)gb$", card.name))
    }.items()
)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One recipe of the list.

    Args:
        name: what `recipes show` and `recipes new --from` take.
        parameters: of the model; None where nothing is known of it.
        trained: parameters that are trained; None where it could not be planned.
        needed_gib: planned for one process.
        card_gb: size of the smallest card that suffices for each of `processes`; None on a CPU, and
            where none does or it could not be planned.
        results: whose numbers the folder's README has: ours, published.
        unreadable: the command that says why it cannot be read.
    """

    name: str
    model: str = "?"
    parameters: int | None = None
    active_parameters: int | None = None
    license: str | None = None
    gated: bool | None = None
    method: str = "-"
    trained: int | None = None
    accelerate: str = "-"
    processes: int = 1
    on_cpu: bool = False
    needed_gib: float | None = None
    card_gb: int | None = None
    results: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    rows_from_hub: bool = False
    unreadable: str | None = None

    @property
    def starts_here(self) -> bool:
        """Whether it is the one to start with."""
        return _START in self.tags

    def says(self, words: Sequence[str]) -> bool:
        """Return whether name, model, method, licence, results or tags hold every word."""
        text = (self.name, self.model, self.method, str(self.license), *self.results, *self.tags)
        return all(word.lower() in " ".join(text).lower() for word in words)

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns of the table."""
        trained = "-" if self.trained is None else _count(self.trained)
        notes = ["start here"] * self.starts_here + ["rows from the Hub"] * self.rows_from_hub
        return (
            f"  {self.name}",
            self.method,
            self._suffices,
            trained,
            ", ".join(self.results) or "-",
            self.unreadable or ", ".join(notes),
        )

    @property
    def _suffices(self) -> str:
        if self.on_cpu:
            return "CPU" if self.needed_gib is None else f"CPU, {self.needed_gib:.1f} GiB"
        if self.needed_gib is None:
            return "-"
        size = f"{self.card_gb} GB" if self.card_gb else f"more than {_SIZES[-1][0]} GB"
        return f"{self.processes} x {size}"

    @property
    def heading(self) -> str:
        """The line above all recipes of its model."""
        known = [] if self.parameters is None else [f"{_count(self.parameters)} parameters"]
        if self.parameters and self.active_parameters not in (None, self.parameters):
            known[0] += f", {_count(self.active_parameters or 0)} per token"
        known += [self.license] if self.license else []
        known += ["gated"] if self.gated else []
        return f"{self.model}{': ' if known else ''}{', '.join(known)}"


_HEAD = ("  recipe", "method", "GPUs that suffice", "trained", "results", "")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="only recipes whose name, model, method, licence, results or tags hold every word",
    )
    parser.add_argument("--json", action="store_true", help="the list as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Print one line per recipe under its model; files that cannot be read are listed with the
    command that says why.
    """
    found = [one for file in recipe_files() if (one := _listed(file)) and one.says(args.words)]
    groups: dict[str, list[Listed]] = {}
    for one in sorted(found, key=lambda one: (not one.starts_here, one.name)):
        groups.setdefault(one.model, []).append(one)
    ordered = [one for group in groups.values() for one in group]
    if args.json:
        return say_json([asdict(one) for one in ordered])
    if not ordered:
        where = f" in {project_root() / 'recipes'} or ./recipes"
        say(f"no recipes{' match ' + ' '.join(args.words) if args.words else where}")
        next_step("recipes ls" if args.words else "recipes new my-first --from RECIPE")
        return ExitCode.DONE
    lines = _fitted([_HEAD, *(one.cells for one in ordered)])
    say(lines[0])
    for group in groups.values():
        say(group[0].heading)
        for one in group:
            say(lines[1 + ordered.index(one)])
    if any(one.needed_gib for one in ordered):
        say(
            "GPUs by the plan of each recipe's own launch; for a card of yours: recipes plan RECIPE"
            " --gpu CARD"
        )
    next_step(f"recipes new my-first --from {ordered[0].name}")
    return ExitCode.DONE


def _fitted(rows: list[tuple[str, ...]]) -> list[str]:
    """Return aligned lines; on a narrow terminal without the last columns that do not fit."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for columns in range(len(rows[0]), 0, -1):
        lines = aligned([row[:columns] for row in rows])
        if width is None or max(map(len, lines)) <= width:
            break
    return lines


def recipe_files() -> list[Path]:
    """Return the files under recipes/ of the working directory and of the project, bases
    left out.
    """
    folders = {
        folder.resolve(): folder
        for folder in (project_root() / "recipes", Path("recipes"))
        if folder.is_dir()
    }
    return [
        file
        for folder in folders.values()
        for file in sorted(folder.rglob("*.yaml"))
        if not file.name.startswith("_")
    ]


def _listed(file: Path) -> Listed | None:
    """Return the entry of a recipe; a YAML of another kind has none."""
    with suppress(OSError, UnicodeDecodeError):  # said by what follows
        if _OTHERS.search(file.read_text(encoding="utf-8")):
            return None
    try:
        document = load_document(file)
    except RecipesError:
        return Listed(
            name=_name(file), unreadable=f"cannot be read: recipes check {shown_path(file)}"
        )
    if document.kind.name != "recipe":
        return None
    sections: dict[str, Any] = {
        key: value if isinstance(value, dict) else {} for key, value in document.values.items()
    }
    model = str(sections.get("model", {}).get("name_or_path", "?"))
    shape, facts = _model(model)
    sources = _sources(document)
    listed = Listed(
        name=_name(file),
        model=model,
        parameters=shape.parameters if shape else None,
        active_parameters=shape.active_parameters if shape else None,
        license=facts.license if facts else None,
        gated=facts.gated if facts else None,
        method=method(document.values),
        accelerate=str(sections.get("launch", {}).get("accelerate", "single_gpu")),
        results=_results(file),
        tags=tuple(map(str, sections.get("run", {}).get("tags") or ())),
        rows_from_hub=None in sources,
    )
    return _planned(listed, document, sources) if shape else listed


@lru_cache(maxsize=256)
def _model(name: str) -> tuple[ModelShape | None, ModelFacts | None]:
    """Return shape and facts of a model, as far as they are known here."""
    try:
        return named_shape(name), known_facts().get(name)
    except RecipesError:  # a file of facts that cannot be read: `recipes plan` says which
        return None, None


def _results(file: Path) -> tuple[str, ...]:
    """Return whose numbers the README beside a recipe has for it."""
    text = _results_in(file.parent / "README.md")
    ours = re.search(rf"^(\| )?`{re.escape(file.stem)}`(?![ |]*not measured)", text, re.M)
    elsewhere = "Published elsewhere" in text and "none was found" not in text
    return ("ours",) * bool(ours) + ("published",) * (elsewhere or "\n| original" in text)


@lru_cache(maxsize=256)
def _results_in(readme: Path) -> str:
    try:
        return readme.read_text(encoding="utf-8").partition("## Results")[2]
    except (OSError, UnicodeDecodeError):
        return ""


def _sources(document: Document) -> list[Path | None]:
    """Return the rows' files and folders, looked for beside the YAML that names them and from the
    working directory; None for those of the Hub.
    """
    source = document.values.get("data", {}).get("source")
    parts = source if isinstance(source, list) else [source]
    names = [part.get("source") if isinstance(part, dict) else part for part in parts]
    beside = Path(document.origin(("data", "source")).file).parent
    return [
        next((path for path in (beside / name, Path(name)) if path.exists()), None)
        for name in names
        if isinstance(name, str)
    ]


def _planned(listed: Listed, document: Document, sources: Sequence[Path | None]) -> Listed:
    """Add what a plan of the recipe's own launch says, where it is had at once: without a network,
    large files or a GPU query; else only `recipes plan` can say.

    The document was not checked, which would take most of the time of the list: what cannot be
    planned has no numbers.
    """
    try:
        recipe = recipe_from(document)
        launch = plan_launch(recipe.launch)
        here = replace(listed, on_cpu=launch.config.use_cpu, processes=launch.world_size)
        files = [path for path in sources if path is not None]
        if not all(path.is_file() and path.stat().st_size <= LARGEST_DATA for path in files):
            return here
        card = cpu_card() if launch.config.use_cpu else card_named(DEFAULT)
        plan = plan_launched(recipe, launch, card, _thinned(recipe))
        enough = next((size for size, gib in _SIZES if plan.least <= gib), None)
        return replace(
            here,
            needed_gib=round(plan.least, 1),
            trained=plan.settings.trained_parameters,
            card_gb=None if launch.config.use_cpu else enough,
        )
    except (RecipesError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return listed


def _thinned(recipe: Recipe) -> Lengths:
    """Return some of the lengths of a recipe's rows, the longest among them: what a forward pass
    needs is decided there.
    """
    shape, _ = _model(recipe.model.name_or_path)
    lengths = lengths_of(recipe, shape.vocabulary if shape else 0, tokenize=False)
    if len(lengths.tokens) <= _MANY_ROWS:
        return lengths
    some = sorted(lengths.tokens)
    return replace(lengths, tokens=(*some[::_EVERY], *some[-1:]))


def _count(number: int) -> str:
    """Return a number of parameters as people say it.

    Example:
        >>> _count(8_030_261_248), _count(134_515_008), _count(460_800)
        ('8.0B', '135M', '0.5M')
    """
    if number >= 995_000_000:
        return f"{number / 1e9:.1f}B"
    return f"{number / 1e6:.0f}M" if number >= 9_950_000 else f"{number / 1e6:.1f}M"


def method(values: Mapping[str, Any]) -> str:
    """Return the method in a word or two.

    Example:
        >>> method({"lora": {"r": 8}, "quantization": {"load_in_4bit": True}})
        'QLoRA r=8'
    """
    lora = values.get("lora")
    if not lora:
        return "full"
    kind = "DoRA" if lora.get("use_dora") else "LoRA"
    return f"{'Q' if values.get('quantization') else ''}{kind} r={lora.get('r', 8)}"


def _name(file: Path) -> str:
    """Return the short name that `recipes show` and `recipes new --from` take."""
    real = Path(os.path.realpath(file))  # resolve() raises for a link that points to itself
    for folder in (Path("recipes").resolve(), project_root() / "recipes"):
        if real.is_relative_to(folder):
            return real.relative_to(folder).with_suffix("").as_posix()
    return shown_path(file)
