"""What can be wrong in a study file by itself: structure, names, factors and cells. Needs no torch
and reads no other file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.design_sections import BASE_ARM
from recipes_lib.config.loader import COMMAND_LINE, Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.vocabulary import dotted_names, subschema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import check_run_name, shown_path

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study

_MADE_BY_LAUNCH = ("launch.distributed_type", "launch.world_size", "launch.mixed_precision")
# What a study gives to every training itself.
_GIVEN = {
    "train.seed": (
        "the seeds of a study stand under its own key: seeds: [1, 2], on the command line"
        " 'seeds=[1, 2]'"
    ),
    "run.name": "a run of a study is named after the study, its arm and its seed",
}
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")


def between_keys(document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong between a study's own values."""
    yield from (*_names(document), *_arms(document), *_factors(document), *_files(document))


def with_whole_arms(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with every bare path written as `{recipe: path}`."""
    arms = values.get("arms")
    if not isinstance(arms, dict):
        return values
    return {
        **values,
        "arms": {
            name: {"recipe": arm} if isinstance(arm, str) else arm for name, arm in arms.items()
        },
    }


def _names(document: Document) -> Iterator[RecipeError]:
    """The study's name, its question, seeds."""
    if not document.values["question"].strip():
        yield document.error(
            ("question",),
            "question is empty",
            "it heads the report, for example: Does rank 32 beat rank 8?",
        )
    for name in document.values["arms"]:
        if not _ARM_NAME.match(name) or name.endswith("."):
            what = f"arm name {name!r} cannot be part of a folder name"
            yield document.error(
                ("arms", name), what, "use 1 to 60 letters, digits, '.', '_' or '-'"
            )
            continue
        try:
            check_run_name(f"{document.path.stem}--{name}--seed0000")
        except RecipeError as error:
            yield document.error(
                ("arms", name),
                f"arm '{name}': {error.what.replace('run.name', 'its run')}",
                *error.hints,
            )
    places: list[tuple[KeyPath, Any]] = [(("seeds",), document.values.get("seeds"))]
    places += [
        (("arms", name, "seeds"), arm.get("seeds"))
        for name, arm in document.values["arms"].items()
        if isinstance(arm, dict)
    ]
    for path, seeds in places:
        if seeds == []:
            yield document.error(
                path,
                f"{'.'.join(map(str, path))} is empty",
                "name at least one seed, or remove the key",
            )
        for seed in dict.fromkeys(seeds or []):
            if seed < 0 or (seeds or []).count(seed) > 1:
                reason = (
                    "must be a whole number >= 0"
                    if seed < 0
                    else "stands there twice: the same training twice tells nothing"
                )
                yield document.error(path, f"{'.'.join(map(str, path))}: seed {seed} {reason}")


def _arms(document: Document) -> Iterator[RecipeError]:
    """What stands for each arm: exactly one of a recipe to train, an imported run, published
    numbers.
    """
    for name, arm in with_whole_arms(document.values)["arms"].items():
        imported, published, path = arm.get("imported"), arm.get("published_only"), ("arms", name)
        if imported and published:
            yield document.error(
                (*path, "published_only"),
                f"arm '{name}' is imported and published_only; one of them",
            )
        if not arm.get("recipe") and not imported and not published:
            yield document.error(
                path,
                f"arm '{name}' has no recipe",
                "name one, or `imported: RUN`, or `published_only: true`",
            )
        if published and not document.values.get("published"):
            yield document.error(
                (*path, "published_only"),
                f"arm '{name}' is published_only, and the study names no published file",
            )
        if name == BASE_ARM and not imported and not published:
            yield document.error(
                path, f"'{BASE_ARM}' is the name of the base model's own arm", "choose another name"
            )
        idle = (
            [key for key in ("seeds", "accelerate", "gpus", "nodes") if arm.get(key)]
            if not arm.get("recipe")
            else []
        )
        if idle:
            yield document.error(
                (*path, idle[0]), f"arm '{name}': {idle[0]} has no meaning without a recipe"
            )


def _factors(document: Document) -> Iterator[RecipeError]:
    """Factors name keys that exist, and every arm says where it stands."""
    factors = document.values.get("factors") or {}
    for factor, prefixes in factors.items():
        path: KeyPath = ("factors", factor)
        if not prefixes:
            yield document.error(
                path,
                f"factor '{factor}' names no key",
                "name what it may change, for example [lora.r]",
            )
        for position, prefix in enumerate(prefixes):
            if not _exists(prefix):
                near = [f"did you mean {name}?" for name in dotted_names(prefix)[:1]]
                yield document.error(
                    (*path, position),
                    f"factor '{factor}': there is no key '{prefix}'",
                    *near,
                    "all keys: recipes explain",
                )
    cells: dict[tuple[str, ...], str] = {}
    for name, arm in document.values["arms"].items():
        cell = (arm.get("cell") or {}) if isinstance(arm, dict) else {}
        place: KeyPath = ("arms", name, "cell")
        for factor in cell:
            if factor not in factors:
                yield document.error(
                    (*place, factor),
                    f"arm '{name}': no factor '{factor}'",
                    *did_you_mean(factor, factors),
                    f"factors: {_list(factors)}",
                )
        missing = (
            [factor for factor in factors if factor not in cell] if cell or len(factors) > 1 else []
        )
        if missing and name != BASE_ARM:
            yield document.error(
                place,
                f"arm '{name}': its cell does not say {_list(missing)}",
                f"cell: {{{missing[0]}: LEVEL, ...}}",
            )
        if (
            cell
            and not missing
            and (twin := cells.setdefault(tuple(cell[factor] for factor in factors), name)) != name
        ):
            yield document.error(
                place,
                f"arms '{twin}' and '{name}' are in the same cell",
                "several seeds of one cell: seeds: [1, 2, 3]",
            )


def _files(document: Document) -> Iterator[RecipeError]:
    name = document.values.get("published")
    if name and not (document.folder(("published",)) / name).is_file():
        path = shown_path(document.folder(("published",)) / name)
        yield document.error(("published",), f"published: no such file: {path}")


def _exists(key: str) -> bool:
    """Whether a dotted key, or a section, can be written in a recipe."""
    if key in _MADE_BY_LAUNCH:
        return True
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        schema = subschema(*parts[:length])
        if schema is not None:
            return length == len(parts) or "properties" not in schema
    return False


def check_overrides(words: Sequence[str]) -> list[RecipeError]:
    """Return an error for every override that would change nothing, because the study gives that
    value to each training itself.
    """
    keys = dict.fromkeys(word.removeprefix("--").partition("=")[0] for word in words)
    return [
        RecipeError(f"{key} cannot be overridden in a study", _GIVEN[key], file=COMMAND_LINE)
        for key in keys
        if key in _GIVEN
    ]


def check_eval_names(document: Document, names: Sequence[str]) -> list[RecipeError]:
    """Return an error for every eval whose results would lie in the folder of one before it."""
    twice = [position for position, name in enumerate(names) if name in names[:position]]
    hint = "name it once; another eval of that name needs another file name"
    return [
        document.error(("evals", position), f"evals: '{names[position]}' stands there twice", hint)
        for position in twice
    ]


def check_levels(document: Document, study: Study) -> list[RecipeError]:
    """Add warnings where the declared levels and the recipes do not fit together; nothing here
    stops a study.
    """
    known = [arm for arm in study.arms if arm.recipe is not None]
    varying = study.differing()
    for factor in study.factors:
        keys = [key for key in varying if study.factor_of(key) == factor]
        if len(known) > 1 and not keys:
            what = (
                f"warning: factor '{factor}' changes nothing: {_list(study.factors[factor])} has"
                " one value in all arms"
            )
            document.warnings.append(document.error(("factors", factor), what))
            continue
        for one, other in itertools.combinations(known, 2):
            if factor not in one.cell or factor not in other.cell:
                continue
            # The config's name may differ inside one strategy (fsdp, fsdp_qlora); what it does is
            # launch.distributed_type.
            changed = [
                key
                for key in keys
                if key != "launch.accelerate" and varying[key][one.name] != varying[key][other.name]
            ]
            if one.cell[factor] == other.cell[factor] and changed:
                what = (
                    f"warning: arms '{one.name}' and '{other.name}' are both {factor}:"
                    f" {one.cell[factor]}, but {changed[0]} differs"
                )
                document.warnings.append(document.error(("arms", other.name), what))
    for cell in study.missing_cells():
        what = (
            "warning: no arm has the cell"
            f" {', '.join(f'{factor}: {level}' for factor, level in cell.items())}"
        )
        document.warnings.append(
            document.error(("factors",), what, "an effect of one factor cannot be told apart there")
        )
    return []


def _list(names: Any) -> str:
    return ", ".join(names) or "none"
